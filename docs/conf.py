"Sphinx's settings; build.py runs Sphinx over the translated notebooks"
from configparser import ConfigParser
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective

_config = ConfigParser(delimiters=['='], interpolation=None)
_config.read(Path(__file__).parent.parent/'settings.ini', encoding='utf-8')
_cfg = _config['DEFAULT']

project, author, release = _cfg['title'], _cfg['author'], _cfg['version']
project_copyright, language = _cfg['copyright'], 'en'
extensions = ['myst_nb', 'sphinx_copybutton', 'formulas']
html_math_renderer = 'mathml'
nb_execution_mode = 'off'
nb_merge_streams = True
nb_render_markdown_format = 'myst'
nb_ipywidgets_js = {}                                   # its default loads from a CDN
myst_enable_extensions = ['attrs_block', 'attrs_inline', 'colon_fence', 'dollarmath']
myst_heading_anchors = 4
myst_update_mathjax = False
myst_url_schemes = ['http', 'https', 'mailto']
numfig = True
numfig_secnum_depth = 0
numfig_format = {'figure': 'Figure %s'}
nitpicky = True
copybutton_exclude = '.linenos, .gp, .go'

html_theme = 'sphinx_book_theme'
html_title = _cfg['title']
html_baseurl = _cfg['doc_host'] + _cfg['doc_baseurl'] + '/'
html_static_path = ['_static', '../cifar_nbdev/live.css', '../cifar_nbdev/live.js']
html_css_files, html_js_files = ['custom.css'], ['print.js']
html_search_scorer = str(Path(__file__).parent/'search.js')
html_favicon = '_static/favicon.svg'
html_context = {'default_mode': 'auto'}                 # light or dark, as the browser prefers
html_copy_source = False
html_use_index = False
html_theme_options = {
    'repository_url': _cfg['git_url'], 'repository_branch': _cfg['branch'], 'use_repository_button': True,
    'use_download_button': False, 'use_fullscreen_button': False,
    'home_page_in_toc': True, 'show_toc_level': 2, 'navbar_persistent': [],
    'pygments_light_style': 'a11y-high-contrast-light', 'pygments_dark_style': 'a11y-high-contrast-dark',
}


class Reserve(SphinxDirective):
    "Keeps anchors for what a page defines: a heading with such a name gets another"
    final_argument_whitespace, required_arguments = True, 1

    def run(self):
        for anchor in self.arguments[0].split(): self.state.document.ids.setdefault(anchor, nodes.target())
        return []


class Entry(SphinxDirective):
    "The place of functions and classes, `module.name=anchor` each: where links and the search find them"
    final_argument_whitespace, required_arguments = True, 1
    option_spec = {'source': directives.uri}

    def run(self):
        entries = [item.split('=') for item in self.arguments[0].split()]
        place = nodes.paragraph(ids=[anchor for _, anchor in entries], classes=['entry'])
        for name, anchor in entries:
            kind = 'class' if name.split('.')[-1][0].isupper() else 'function'
            self.env.domains.python_domain.note_object(name, kind, anchor, location=place)
        place += nodes.reference('', 'source', refuri=self.options['source'], classes=['source'])
        return [place]


def live_net(app, page, template, context, doctree):
    "The style and script of the live net, on its page alone"
    if page != 'live': return
    app.add_css_file('live.css')
    app.add_js_file('live.js')


def setup(app):
    "What the translated notebooks need"
    app.add_directive('reserve', Reserve)
    app.add_directive('entry', Entry)
    app.connect('html-page-context', live_net)
