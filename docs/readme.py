"README.md from the index notebook, by nbconvert"
import os, re

import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import TagRemovePreprocessor
from translate import pop_options

_HIDDEN = {'hide', 'export', 'exporti', 'default_exp'}
_NOTE = '<!-- Made from nbs/index.ipynb by docs/build.py: edit the notebook, not this file -->\n\n'


def repository_links(text):
    "Links of a notebook in nbs/, from the folder above: `00_data.ipynb` is `nbs/00_data.ipynb` there"
    def above(m): return f'{m[1]}({os.path.normpath("nbs/" + m[2])})'
    parts = re.split(r'(^```.*?^```)', text, flags=re.M | re.S)         # not in code
    link = re.compile(r'((?<!!)\[[^\]]*\])\((?![a-z]+:|#)([^)#\s]+)(?:#[^)]*)?\)')
    parts[::2] = [link.sub(above, p) for p in parts[::2]]
    return ''.join(parts)


def readme(nb):
    "The text of README.md, and its figures by path"
    cells, alts = [], []
    for cell in nb.cells:
        options = pop_options(cell) if cell.cell_type == 'code' else {}
        if cell.cell_type == 'raw' or _HIDDEN & options.keys(): continue
        if options.get('echo') is False: cell.metadata.tags = ['remove-input']
        if options.get('echo') is False and not cell.outputs:
            raise ValueError(f'index.ipynb has no output of the cell {cell.source[:40]!r}. Run make outputs')
        if 'fig-alt' in options: alts.append(options['fig-alt'])
        if cell.cell_type == 'markdown': cell.source = repository_links(cell.source)
        cells.append(cell)
    nb.cells, nb.metadata.language_info = cells, {'name': 'python'}
    remover = TagRemovePreprocessor(enabled=True, remove_input_tags={'remove-input'})
    exporter = MarkdownExporter(preprocessors=[remover])
    text, resources = exporter.from_notebook_node(nb, {'unique_key': 'index', 'output_files_dir': 'docs'})
    for alt in alts: text = text.replace('![png]', f'![{alt}]', 1)
    return _NOTE + re.sub(r'\s*\n\n\s*?(?=\S)', '\n\n', text.strip()) + '\n', resources['outputs']


def write_readme(root):
    "Write README.md and its figures"
    text, figures = readme(nbformat.read(root/'nbs'/'index.ipynb', as_version=4))
    (root/'README.md').write_text(text, encoding='utf-8', newline='\n')
    for old in (root/'docs').glob('index_*.png'): old.unlink()
    for name, data in figures.items(): (root/name).write_bytes(data)
