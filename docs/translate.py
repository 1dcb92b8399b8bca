"""From nbdev's processed notebooks, which speak Quarto, to notebooks that myst-nb understands"""
import ast, re
from itertools import groupby
from pathlib import Path

import yaml
from bs4 import BeautifulSoup
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell

WIDGET = 'application/vnd.jupyter.widget-view+json'
_OPTION = re.compile(r'#\|\s*([\w-]+)(?::[ \t]*(.+))?')
_NO_EFFECT = {'eval', 'code-summary', 'message', 'warning', 'slow', 'cuda', 'trains'}   # nothing runs here
_CODE_LINK = re.compile(r'\[`([^`]+)`\]\([^)]*\)')
_ENTRY = re.compile(r'---\s+(?:\[source\]\((?P<source>[^)]*)\)\S*[^}]*\}\s+)?(?P<level>#+) (?P<name>\S+)\n')


def pop_options(cell):
    "Cut the leading `#| name: value` lines off a code cell; a dict of them, None where there is no value"
    lines, options = cell.source.splitlines(), {}
    while lines and (m := _OPTION.match(lines[0])):
        options[m[1]] = yaml.safe_load(m[2]) if m[2] else None
        del lines[0]
    cell.source = '\n'.join(lines)
    return options


def front_matter(nb):
    "The YAML of a notebook's first raw cell"
    raw = [c.source.strip() for c in nb.cells if c.cell_type == 'raw' and c.source.startswith('---')]
    return yaml.safe_load(raw[0].strip('-')) if raw else {}


def page_name(path, front):
    "Name of a notebook's page: what its front matter says, else the file's name without the number"
    return Path(front.get('output-file') or re.sub(r'^\d+[a-z]*_', '', path.name)).stem


def _stub(node, lines):
    "Source of a function or class without what it does: signature, fields, public methods with docstrings"
    first = node.decorator_list[0] if node.decorator_list else node
    if isinstance(node, ast.ClassDef):
        header = lines[first.lineno - 1:node.lineno]
        fields = [line for n in node.body if isinstance(n, ast.AnnAssign)
                  for line in lines[n.lineno - 1:n.end_lineno]]
        methods = [n for n in node.body
                   if isinstance(n, ast.FunctionDef) and (n.name == '__init__' or n.name[0] != '_')]
        inner = [line for n in methods for line in [*_stub(n, lines), *_docstring(n, lines)]]
        return [*header, *fields, *inner] if fields or inner else [header[-1].rstrip(':'), *header[:-1]][:1]
    body = node.body[0]
    if body.lineno > node.lineno: return lines[first.lineno - 1:body.lineno - 1]
    return [*lines[first.lineno - 1:node.lineno - 1], lines[node.lineno - 1][:body.col_offset].rstrip()]


def _docstring(node, lines):
    "The lines of a function's docstring"
    return lines[node.body[0].lineno - 1:node.body[0].end_lineno] if ast.get_docstring(node) else []


def stubs(library):
    "Stub of each function and class of a library, by file and name"
    found = {}
    for path in library.glob('*.py'):
        lines = path.read_text(encoding='utf-8').splitlines()
        for node in ast.parse('\n'.join(lines)).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found[path.name, node.name] = '\n'.join(_stub(node, lines))
    return found


def anchors(names):
    "An anchor for each name: nbdev's, and a number where names differ by nothing but case"
    lower = [n.lower() for n in names]
    return {n: low + '-2' * (low in lower[:i]) for i, (n, low) in enumerate(zip(names, lower))}


class Translator:
    "Turns Quarto's Markdown and cell options into MyST's, for a site whose pages know each other's entries"
    def __init__(self, cfg, library):
        self.cfg, self.stubs, self.site = cfg, stubs(library), cfg['doc_host'] + cfg['doc_baseurl']
        self.anchors = anchors(dict.fromkeys(name for _, name in self.stubs))

    def markdown(self, text):
        "Callouts, headings with attributes, references to figures, links to pages and to entries"
        text = re.sub(r'^(:{3,}) *\{\.callout-(\w+)([^}]*)\}', _callout, text, flags=re.M)
        text = re.sub(r'^(#+ .*?) *\{([#.][^}]*)\} *$', r'{\2}\n\1', text, flags=re.M)
        text = re.sub(r'(?<![\w`])@((?:fig|tbl)-[\w-]*\w)', r'{numref}`\1`', text)
        page = (rf'(?:`([\w.]+)(?:\(\))?`)?\]\((?:{re.escape(self.site)}/)?'
                r'(?:(?:\d+[a-z]*_)?([\w-]+)\.ipynb|([\w-]+)\.html)(#[^)]*)?\)')
        return re.sub(page, self._link, text)

    def _link(self, m):
        "The end of a link to a page or an entry"
        text, (name, notebook, html, anchor) = m[0].split('](')[0], m.groups()
        if anchor and name in self.anchors: anchor = '#' + self.anchors[name]
        return f'{text}]({notebook or html}.ipynb{anchor or ""})'

    def entry(self, text):
        "What `show_doc` says of a function or class, with nbdev's anchor and the library's own signature"
        m = _ENTRY.match(text)
        if not m: return text
        name, source = m['name'], m['source'] or ''
        rest = re.sub(r'^```.*?^```', lambda code: _CODE_LINK.sub(r'\1', code[0]), text[m.end():],
                      count=1, flags=re.M | re.S)
        if stub := self.stubs.get((source.split('#')[0].split('/')[-1], name)):
            rest = re.sub(r'^```.*?^```', lambda _: f'```python\n{stub}\n```', rest,
                          count=1, flags=re.M | re.S)
        link = f'[source]({source}){{.source}}' if source else ''
        return f'{{#{self.anchors.get(name, name.lower())} .entry}}\n{m["level"]} {name}\n\n{link}\n\n{rest}'

    def cell(self, cell):
        "A cell for myst-nb, or None if it is not shown"
        if cell.cell_type == 'raw' or cell.source.startswith('<!-- WARNING'): return None
        if cell.cell_type == 'markdown':
            cell.source = self.markdown(cell.source)
            return cell
        options = pop_options(cell)
        if options.pop('include', True) is False: return None
        if options.get('output') == 'asis':
            texts = [o.get('text') or o.data['text/markdown'] for o in cell.outputs]
            line = re.search(r'#L(\d+)', texts[0]) if texts else None
            return new_markdown_cell(self.markdown(self.entry('\n\n'.join(texts))),
                                     metadata={'line': int(line[1])} if line else {})
        shown = {'remove-input': options.pop('echo', True) is False,
                 'hide-input': options.pop('code-fold', None) is True,
                 'remove-output': options.pop('output', True) is False}
        cell.metadata.update(tags=[tag for tag, on in shown.items() if on], mystnb=_figure(options))
        cell.outputs = [o for o in cell.outputs
                        if o.get('name') != 'stderr' and WIDGET not in o.get('data', {})]
        for o in cell.outputs:
            if 'dataframe' in o.get('data', {}).get('text/html', ''):
                o.data['text/html'] = _table(o.data['text/html'])
        if unknown := options.keys() - _NO_EFFECT:
            raise ValueError(f'#| {", ".join(unknown)}: docs/translate.py does not know it, '
                             f'in\n{cell.source}')
        return cell

    def notebook(self, nb, path):
        "A whole notebook for myst-nb, titled and described by its front matter, with a link to its source"
        front, cfg = front_matter(nb), self.cfg
        cells = [c for cell in nb.cells if (c := self.cell(cell))]
        nb.cells = [c for _, run in groupby(cells, lambda c: 'line' in c.metadata)
                    for c in sorted(run, key=lambda c: c.metadata.get('line', 0))]
        if not any(c.cell_type == 'markdown' and c.source.startswith('# ') for c in nb.cells):
            nb.cells.insert(0, new_markdown_cell(f"# {front['title']}\n\n> {front.get('description', '')}"))
        link = f"[notebook]({cfg['git_url']}/blob/{cfg['branch']}/{cfg['nbs_path']}/{path.name}){{.source}}"
        nb.cells[0].source = re.sub(r'^# .*$', lambda m: f'{m[0]}\n\n{link}', nb.cells[0].source,
                                    count=1, flags=re.M)
        nb.metadata = NotebookNode(kernelspec=nb.metadata.kernelspec,
                                   myst={'html_meta': {'description': front.get('description', '')}})
        return nb


def _table(html):
    "A pandas table with one row of headings, columns of text to the left, its columns' name as caption"
    table = BeautifulSoup(html, 'html.parser').table
    head, body = table.thead.find_all('tr'), table.tbody.find_all('tr')
    if len(head) == 2:                                  # the second row has nothing but the index's name
        first, name = head[0].find('th'), head[1].extract().find('th')
        if first.string: table.insert(0, BeautifulSoup(f'<caption>{first.string}</caption>', 'html.parser'))
        first.string = name.string
    for column in zip(*(row.find_all(['th', 'td']) for row in (head[0], *body))):
        if not all(re.fullmatch(r'[-+−–\d.,%]*|NaN', c.get_text()) for c in column[1:]):
            for c in column: c['class'] = 'text'
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
