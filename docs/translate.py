"""From notebooks as nbdev has them, in Quarto's flavour, to notebooks that myst-nb understands

What the site shows of a code cell: nothing of `export` and `hide`, everything of `exports`; there each public
function and class gets an anchor, as nbdev's own links expect it: `train.html#fit`.
"""
import ast, os, re
from itertools import zip_longest
from pathlib import Path

import yaml
from bs4 import BeautifulSoup
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell

WIDGET = 'application/vnd.jupyter.widget-view+json'
_OPTION = re.compile(r'#\|\s*([\w-]+)(?::[ \t]*(.+)|[ \t]+(\w+))?[ \t]*$')
_HIDDEN = {'hide', 'export', 'exporti', 'default_exp'}
_NO_EFFECT = {'exports', 'slow', 'cuda', 'trains', 'data'}              # nothing runs here
_AS_IS = re.compile(r'(^ *```.*?^ *```|^#.*?$|!?\[[^\]]*\]\([^)]*\))', re.M | re.S)    # code, headings, links


def _yaml(text):
    "Names and values, or an error that shows the text"
    try: return yaml.safe_load(text)
    except yaml.YAMLError as e: raise ValueError(f'no YAML, quote a value with a colon:\n{text}\n{e}') from e


def pop_options(cell):
    "Cut the leading `#| name: value` lines off a code cell; a dict of them, None where there is no value"
    lines, options = cell.source.splitlines(), {}
    while lines and (m := _OPTION.match(lines[0])):
        options[m[1]] = _yaml(f'{m[1]}: {m[2]}')[m[1]] if m[2] else m[3]
        del lines[0]
    cell.source = '\n'.join(lines).strip('\n')
    return options


def options_of(cell):
    "The same without a change of the cell; nothing of one that holds no code"
    return pop_options(cell.copy()) if cell.cell_type == 'code' else {}


def front_matter(nb):
    "The YAML of a notebook's first raw cell"
    raw = [c.source.strip() for c in nb.cells if c.cell_type == 'raw' and c.source.startswith('---')]
    return _yaml(raw[0].strip('-')) if raw else {}


def page_name(path, front):
    "Name of a notebook's page: what its front matter says, else the file's name without the number"
    return Path(front.get('output-file') or re.sub(r'^\d+[a-z]*_', '', path.name)).stem


def definitions(source, public=True):
    "Functions and classes that Python code defines: line by name"
    found = (n for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)))
    return {n.name: n.lineno for n in found if not (public and n.name.startswith('_'))}


def anchors(names):
    "An anchor for each name: nbdev's, and a number where names differ by nothing but case"
    lower = [n.lower() for n in names]
    return {n: low + '-2' * (low in lower[:i]) for i, (n, low) in enumerate(zip(names, lower))}


class Page:
    "A notebook, what its page is called, and what it defines before the reader's eyes"
    def __init__(self, nb, path):
        self.nb, self.path, self.front = nb, path, front_matter(nb)
        self.name = page_name(path, self.front)
        cells = [(cell, options_of(cell)) for cell in nb.cells]
        self.module = next((o['default_exp'] for _, o in cells if 'default_exp' in o), self.name)
        self.anchors = anchors([n for c, o in cells if 'exports' in o for n in definitions(c.source)])


class Translator:
    "Turns Quarto's Markdown and cell options into MyST's, for a site whose pages know each other's functions"
    def __init__(self, cfg, root, pages):
        self.cfg, self.library, self.pages = cfg, Path(root)/cfg['lib_path'], {p.name: p for p in pages}
        self.site = cfg['doc_host'] + cfg['doc_baseurl']
        self.blob = f"{cfg['git_url']}/blob/{cfg['branch']}"
        self.targets = {}                               # 'fit' and 'train.fit' -> 'cifar_nbdev.train.fit'
        for page in pages:
            for name in page.anchors:
                full = f"{cfg['lib_name']}.{page.module}.{name}"
                for key in (name, f'{page.module}.{name}', full): self.targets.setdefault(key, full)

    def markdown(self, text):
        "Callouts, headings with attributes, references to figures, links; fenced code stays as it is"
        text = re.sub(r'^(:{3,}) *\{\.callout-(\w+)([^}]*)\}', _callout, text, flags=re.M)
        text = re.sub(r'^(#+ .*?) *\{([#.][^}]*)\} *$', r'{\2}\n\1', text, flags=re.M)
        text = re.sub(r'(?<![\w`])@((?:fig|tbl)-[\w-]*\w)', r'{numref}`\1`', text)
        parts = _AS_IS.split(text)
        return ''.join(self._link(p) if i % 2 else self._words(p) for i, p in enumerate(parts))

    def _words(self, text):
        "`name` and `name()` become links to where the name is defined"
        def linked(m): return f'[{m[0]}](#{self.targets[m[1]]})' if m[1] in self.targets else m[0]
        return re.sub(r'(?<![\w`{}])`([\w.]+)(?:\(\))?`(?!`)', linked, text)

    def _link(self, text):
        "A link to a page, to a function on it, or to another file of the repository; what is none stays"
        m = re.fullmatch(r'(!?\[(?:`([\w.]+)(?:\(\))?`|[^\]]*)\])\(([^)#]*)(?:#([^)]*))?\)', text)
        if not m or m[1].startswith('!'): return text
        said, name, path, anchor = m.groups()
        path, anchor = path.removeprefix(self.site + '/'), f'#{anchor}' if anchor else ''
        here = re.fullmatch(r'[\w-]+\.(html|ipynb)', path)
        if page := here and self.pages.get(page_name(Path(path), {})):
            found = [n for n, a in page.anchors.items() if f'#{a}' == anchor]
            if anchor and name in page.anchors: found = [name]
            return f"{said}(#{self.cfg['lib_name']}.{page.module}.{found[0]})" if found else \
                f'{said}({page.name}.ipynb{anchor})'
        if not path or here or ':' in path: return text
        file = os.path.normpath(f"{self.cfg['nbs_path']}/{path}")
        return f'{said}({self.blob}/{file}{anchor})'

    def _entry(self, page, names):
        "Marks the place of a cell's functions and classes, with a link to their source"
        module = f"{self.cfg['lib_name']}.{page.module}"
        file = self.library/f'{page.module}.py'
        line = definitions(file.read_text(encoding='utf-8')).get(names[0]) if file.exists() else None
        source = f"{self.blob}/{self.cfg['lib_path']}/{file.name}" + (f'#L{line}' if line else '')
        what = ' '.join(f'{module}.{n}={page.anchors[n]}' for n in names)
        return new_markdown_cell(f'```{{entry}} {what}\n:source: {source}\n```')

    def cell(self, cell, page=None):
        "The cells for myst-nb that one cell becomes"
        if cell.cell_type == 'raw': return []
        if cell.cell_type == 'markdown':
            cell.source = self.markdown(cell.source)
            return [cell]
        options = pop_options(cell)
        if _HIDDEN & options.keys() or options.pop('include', True) is False: return []
        names = list(definitions(cell.source)) if 'exports' in options else []
        summary = options.pop('code-summary', None)
        shown = {'remove-input': options.pop('echo', True) is False,
                 'hide-input': options.pop('code-fold', None) is True,
                 'remove-output': options.pop('output', True) is False}
        settings = _figure(options)
        if shown['hide-input']:
            summary = summary or ', '.join(names or definitions(cell.source, public=False)) or 'The code'
            settings |= dict(code_prompt_show=summary, code_prompt_hide=summary)
        cell.metadata.update(tags=[tag for tag, on in shown.items() if on], mystnb=settings)
        cell.outputs = [o for o in cell.outputs
                        if o.get('name') != 'stderr' and WIDGET not in o.get('data', {})]
        for o in cell.outputs:
            if 'dataframe' in o.get('data', {}).get('text/html', ''):
                o.data['text/html'] = _table(o.data['text/html'])
        if unknown := options.keys() - _NO_EFFECT:
            raise ValueError(f'#| {", ".join(unknown)}: docs/translate.py does not know it, '
                             f'in\n{cell.source}')
        return [*([self._entry(page, names)] if names else []), cell]

    def notebook(self, page):
        "A whole notebook for myst-nb, titled and described by its front matter, with a link to its source"
        front, nb, blob = page.front, page.nb, self.blob
        nb.cells = [c for cell in nb.cells for c in self.cell(cell, page)]
        if not any(c.cell_type == 'markdown' and c.source.startswith('# ') for c in nb.cells):
            nb.cells.insert(0, new_markdown_cell(f"# {front['title']}\n\n> {front.get('description', '')}"))
        link = f"[notebook]({blob}/{self.cfg['nbs_path']}/{page.path.name}){{.source}}"
        nb.cells[0].source = re.sub(r'^# .*$', lambda m: f'{m[0]}\n\n{link}', nb.cells[0].source,
                                    count=1, flags=re.M)
        if page.anchors:                                # or a heading of the same name would take the anchor
            nb.cells.insert(0, new_markdown_cell(f"```{{reserve}} {' '.join(page.anchors.values())}\n```"))
        nb.metadata = NotebookNode(kernelspec=nb.metadata.kernelspec,
                                   myst={'html_meta': {'description': front.get('description', '')}})
        return nb


def _table(html):
    "A pandas table with one row of headings, text to the left, numbers to the right, column name as caption"
    table = BeautifulSoup(html, 'html.parser').table
    head, body = table.thead.find_all('tr'), table.tbody.find_all('tr')
    if len(head) == 2:                                  # the second row has nothing but the index's names
        first = head[0].find_all('th')
        names = [c.string for c in head[1].extract().find_all('th') if c.string]
        if caption := first[len(names) - 1].string:
            table.insert(0, BeautifulSoup(f'<caption>{caption}</caption>', 'html.parser'))
        for c, name in zip(first, names): c.string = name
    for th in table.find_all('th'): th['scope'] = 'col' if th.find_parent('thead') else 'row'
    rows = [row.find_all(['th', 'td'])[::-1] for row in (head[0], *body)]   # cells on the left may be merged
    for column in zip_longest(*rows):
        title, *cells = filter(None, column)
        if not all(re.fullmatch(r'[-+−–\d.,%]*|NaN', c.get_text()) for c in cells):
            for c in (title, *cells): c['class'] = 'text'
    return str(table)


def _callout(m):
    "The first line of an admonition from that of a callout"
    title = re.search(r'title="([^"]*)"', m[3])
    return f'{m[1]}{{admonition}} {title[1]}\n:class: {m[2]}' if title else f'{m[1]}{{{m[2]}}}'


def _figure(options):
    "myst-nb's settings for a figure with a label, a caption and a text for those who cannot see it"
    figure = {'name': options.pop('label', None), 'caption': options.pop('fig-cap', None)}
    image = {'alt': options.pop('fig-alt', None) or figure['caption']}
    settings = {'figure': figure if figure['caption'] else {}, 'image': image}
    return {k: s for k, v in settings.items() if (s := {a: b for a, b in v.items() if b})}
