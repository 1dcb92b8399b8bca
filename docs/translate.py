"""From nbdev's processed notebooks, which speak Quarto, to notebooks that myst-nb understands"""
import re
from pathlib import Path

import yaml
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell

_OPTION = re.compile(r'#\|\s*([\w-]+)\s*(?::\s*(.*)|.*)')
_IGNORED = {'eval', 'code-summary', 'slow', 'cuda', 'warning', 'message'}   # of no meaning for a stored notebook
_ENTRY = re.compile(r'---\s+(?:\[source\]\((?P<source>[^)]*)\)\{[^}]*\}\s+)?(?P<level>#+) (?P<name>\S+)\n')


def pop_options(cell):
    "Cut the leading `#| name: value` lines off a code cell; a dict of them, with None for a name that has no value"
    lines, options = cell.source.splitlines(), {}
    while lines and (m := _OPTION.match(lines[0])):
        options[m[1]] = yaml.safe_load(m[2]) if m[2] else None
        del lines[0]
    cell.source = '\n'.join(lines)
    return options


def front_matter(nb):
    "The YAML of a notebook's first raw cell"
    for cell in nb.cells:
        if cell.cell_type == 'raw' and cell.source.startswith('---'): return yaml.safe_load(cell.source.strip().strip('-'))
    return {}


def page_name(path, front):
    "Name of a notebook's page: what its front matter says, else the file's name without the number"
    return Path(front.get('output-file') or re.sub(r'^\d+[a-z]*_', '', path.name)).stem


def _callout(m):
    "The first line of an admonition from that of a callout"
    title = re.search(r'title="([^"]*)"', m[3])
    return f'{m[1]}{{admonition}} {title[1]}\n:class: {m[2]}' if title else f'{m[1]}{{{m[2]}}}'


def to_myst(text, site):
    "Quarto's Markdown as MyST: callouts, headings with attributes, references, links to pages of the `site`"
    text = re.sub(r'^(:{3,}) *\{\.callout-(\w+)([^}]*)\}', _callout, text, flags=re.M)
    text = re.sub(r'^(#+ .*?) *\{([#.][^}]*)\} *$', r'{\2}\n\1', text, flags=re.M)
    text = re.sub(r'(?<![\w`])@((?:fig|tbl)-[\w-]*\w)', r'{numref}`\1`', text)
    page = rf'\]\((?:{re.escape(site)}/)?(?:(?:\d+[a-z]*_)?([\w-]+)\.ipynb|([\w-]+)\.html)(#[^)]*)?\)'
    return re.sub(page, lambda m: f']({m[1] or m[2]}.ipynb{m[3] or ""})', text)


def _entry(text):
    "What `show_doc` says of a function or class, under a heading with nbdev's own anchor"
    m = _ENTRY.match(text)
    if not m: return text
    link = f'[source]({m["source"]}){{.source}}\n\n' if m['source'] else ''
    return f'{{#{m["name"].lower()} .entry}}\n{m["level"]} {m["name"]}\n\n{link}{text[m.end():]}'


def _figure(options):
    "myst-nb's settings for a figure with a label, a caption and a text for those who cannot see it"
    figure = {'name': options.pop('label', None), 'caption': options.pop('fig-cap', None)}
    image = {'alt': options.pop('fig-alt', None) or figure['caption']}
    settings = {'figure': figure if figure['caption'] else {}, 'image': image}
    return {k: s for k, v in settings.items() if (s := {a: b for a, b in v.items() if b})}


def translate_cell(cell, site):
    "A cell for myst-nb, or None if it is not shown"
    if cell.cell_type == 'raw' or cell.source.startswith('<!-- WARNING'): return None
    if cell.cell_type == 'markdown':
        cell.source = to_myst(cell.source, site)
        return cell
    options = pop_options(cell)
    if options.pop('include', True) is False: return None
    if options.get('output') == 'asis':
        texts = [o.get('text') or o.data['text/markdown'] for o in cell.outputs]
        return new_markdown_cell(to_myst(_entry('\n\n'.join(texts)), site))
    shown = {'remove-input': options.pop('echo', True) is False, 'hide-input': options.pop('code-fold', None) is True,
             'remove-output': options.pop('output', True) is False}
    cell.metadata.update(tags=[tag for tag, on in shown.items() if on], mystnb=_figure(options))
    cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']
    if unknown := options.keys() - _IGNORED: raise ValueError(f'#| {", ".join(unknown)}: not known to docs/translate.py, in\n{cell.source}')
    return cell


def translate(nb, front, path, cfg):
    "A whole notebook for myst-nb, titled and described by its front matter, with a link to where it came from"
    site = cfg['doc_host'] + cfg['doc_baseurl']
    nb.cells = [c for cell in nb.cells if (c := translate_cell(cell, site))]
    if not any(c.cell_type == 'markdown' and c.source.startswith('# ') for c in nb.cells):
        lead = f"\n\n> {front['description']}" if 'description' in front else ''
        nb.cells.insert(0, new_markdown_cell(f"# {front['title']}{lead}"))
    source = f"{cfg['git_url']}/blob/{cfg['branch']}/{cfg['nbs_path']}/{path.name}"
    nb.cells[0].source = re.sub(r'^# .*$', rf'\g<0>\n\n[notebook]({source}){{.source}}', nb.cells[0].source, count=1, flags=re.M)
    nb.metadata = NotebookNode(kernelspec=nb.metadata.kernelspec, myst={'html_meta': {'description': front.get('description', '')}})
    return nb
