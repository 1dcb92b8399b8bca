"""README.md from the index notebook: what it shows, in the Markdown that GitHub shows"""
import base64, re

import nbformat
from bs4 import BeautifulSoup
from translate import pop_options

_HIDDEN = {'hide', 'export', 'exporti', 'default_exp'}
_NOTE = '<!-- Made from nbs/index.ipynb by docs/build.py: edit the notebook, not this file -->'


def table(html):
    "A pandas table in Markdown, numbers to the right"
    rows = [[c.get_text().strip() for c in tr.find_all(['th', 'td'])] for tr in BeautifulSoup(html, 'html.parser').find_all('tr')]
    n_head = len(BeautifulSoup(html, 'html.parser').thead.find_all('tr'))
    head = [next(filter(None, reversed(names)), '') for names in zip(*rows[:n_head])]     # pandas puts the index's name into a row of its own
    columns = list(zip(head, *rows[n_head:]))
    number = [all(re.fullmatch(r'[-+−–\d.,%]*', v) for v in c[1:]) for c in columns]
    widths = [max(3, *map(len, c)) for c in columns]
    rows = [[v.rjust(w) if n else v.ljust(w) for v, w, n in zip(row, widths, number)] for row in zip(*columns)]
    rows.insert(1, ['-' * (w - 1) + (':' if n else '-') for w, n in zip(widths, number)])
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def _output(o, options, images):
    "One stored output as Markdown; a figure goes into `images` under its label"
    data = o.get('data', {})
    if 'image/png' in data:
        name = f"docs/{options.get('label') or f'index-{len(images)}'}.png"
        images[name] = base64.b64decode(data['image/png'])
        caption = options.get('fig-cap')
        return f"![{options.get('fig-alt') or caption or ''}]({name})" + (f'\n\n*{caption}*' if caption else '')
    if 'text/markdown' in data: return data['text/markdown'].strip()
    if '<table' in data.get('text/html', ''): return table(data['text/html'])
    text = o.get('text') if o.get('name') == 'stdout' else data.get('text/plain')
    return f'```\n{text.rstrip()}\n```' if text else ''


def _callouts(text):
    "Quarto's callouts as GitHub's alerts"
    def alert(m): return f'> [!{m[1].upper()}]\n' + '\n'.join(f'> {line}'.rstrip() for line in m[2].strip().splitlines())
    return re.sub(r'^:{3,} *\{\.callout-(\w+)[^}]*\}\n(.*?)^:{3,} *$', alert, text, flags=re.M | re.S)


def readme(nb):
    "The text of README.md, and its images by path"
    parts, images = [], {}
    for cell in nb.cells:
        if cell.cell_type == 'markdown': parts.append(_callouts(cell.source))
        if cell.cell_type != 'code': continue
        options = pop_options(cell)
        if _HIDDEN & options.keys() or options.get('include') is False: continue
        if options.get('echo') is not False: parts.append(f'```python\n{cell.source}\n```')
        if options.get('output') is not False: parts += [_output(o, options, images) for o in cell.outputs]
    title, *rest = filter(None, (p.strip() for p in parts))
    return '\n\n'.join([title, _NOTE, *rest]) + '\n', images


def write_readme(root):
    "Write README.md and its images"
    text, images = readme(nbformat.read(root/'nbs'/'index.ipynb', as_version=4))
    (root/'README.md').write_text(text, encoding='utf-8', newline='\n')
    for name, data in images.items(): (root/name).write_bytes(data)
