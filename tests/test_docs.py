"""The site's builder: from Quarto to MyST, the README, and the check of stored outputs against the code"""
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell

from conftest import ROOT

pytest.importorskip('sphinx', reason='the site needs the doc extra: make docs installs it')
sys.path.insert(0, str(ROOT/'docs'))
import build, execute, readme, translate                # noqa: E402

HOST = 'https://cifar-nbdev.github.io/cifar_nbdev'


@pytest.fixture(scope='module')
def translator():
    "For the library as it is"
    return translate.Translator(build.settings(), ROOT/'cifar_nbdev')


def code(*lines, outputs=()):
    "A code cell with these lines"
    return new_code_cell('\n'.join(lines), outputs=list(outputs))


def stream(text): return new_output('stream', name='stdout', text=text)


# Markdown

@pytest.mark.parametrize('quarto, myst', [
    ('::: {.callout-note}\nText\n:::', ':::{note}\nText\n:::'),
    ('::: {.callout-warning title="Slow"}\nText\n:::', ':::{admonition} Slow\n:class: warning\nText\n:::'),
    ('[`fit`](https://cifar-nbdev.github.io/cifar_nbdev/train.html#fit)', '[`fit`](train.ipynb#fit)'),
    ('[Data](data.html)', '[Data](data.ipynb)'), ('[Data](00_data.ipynb)', '[Data](data.ipynb)'),
    ('[home](https://example.org/data.html)', '[home](https://example.org/data.html)'),
    ('see @fig-curves.', 'see {numref}`fig-curves`.'), ('mail a@fig-tree.org', 'mail a@fig-tree.org'),
    ('## Title {#sec-title}', '{#sec-title}\n## Title')])
def test_markdown(translator, quarto, myst):
    assert translator.markdown(quarto) == myst


# Cells

def test_options_are_cut_off_and_read():
    cell = code('#| echo: false', '#| fig-cap: "a: b"', '#| slow', 'x = 1', '#| not one')
    assert translate.pop_options(cell) == {'echo': False, 'fig-cap': 'a: b', 'slow': None}
    assert cell.source == 'x = 1\n#| not one'


def test_a_figure_has_its_label_caption_and_alt_text(translator):
    cell = translator.cell(code('#| label: fig-a', '#| fig-cap: Caption', '#| fig-alt: Alt',
                                '#| echo: false', 'plot()'))
    assert cell.metadata.mystnb == {'figure': {'name': 'fig-a', 'caption': 'Caption'},
                                    'image': {'alt': 'Alt'}}
    assert cell.metadata.tags == ['remove-input']


@pytest.mark.parametrize('cell', [new_raw_cell('---\ntitle: x\n---'), code('#| include: false', 'x = 1'),
                                  new_markdown_cell('<!-- WARNING: made -->')])
def test_hidden_cells_are_left_out(translator, cell):
    assert translator.cell(cell) is None


def test_an_unknown_option_is_an_error(translator):
    with pytest.raises(ValueError, match='colour'): translator.cell(code('#| colour: red', 'x'))


def test_standard_error_is_left_out(translator):
    cell = translator.cell(code('x', outputs=[new_output('stream', name='stderr', text='bar'),
                                              stream('shown')]))
    assert [o.text for o in cell.outputs] == ['shown']


def test_an_entry_has_the_signature_with_its_comments(translator):
    shown = ('---\n\n[source](https://github.com/x/blob/main/cifar_nbdev/train.py#L10)'
             '{target="_blank" style="float:right"}\n\n'
             '### fit\n\n```python\n\ndef fit(model):\n\n```\n\n*Train*')
    cell = translator.cell(code('#| echo: false', '#| output: asis', 'show_doc(fit)',
                                outputs=[stream(shown)]))
    assert cell.cell_type == 'markdown' and cell.source.startswith('{#fit .entry}\n### fit\n')
    assert 'epochs: int = 30,  # Passes over the training images' in cell.source and '*Train*' in cell.source


def test_pages_come_in_the_order_of_the_notebooks(translator, tmp_path):
    for name, title in (('index', 'Home'), ('10_last', 'Last'), ('02b_mid', 'Mid'), ('00_first', 'First')):
        nb = new_notebook(cells=[new_raw_cell(f'---\ntitle: {title}\n---'), new_markdown_cell('Text')],
                          metadata={'kernelspec': {'name': 'python3', 'display_name': 'Python 3'}})
        nbformat.write(nb, tmp_path/f'{name}.ipynb')
    build.pages(build.settings(), tmp_path, tmp_path/'out')
    home = nbformat.read(tmp_path/'out'/'index.ipynb', 4)
    assert home.cells[-1].source.split('\n\n')[1].split() == ['first', 'mid', 'last', '```']
    assert nbformat.read(tmp_path/'out'/'mid.ipynb', 4).cells[0].source.startswith('# Mid')


@pytest.mark.parametrize('body, found', [
    ('<a href="other.html#here">x</a>', ''), ('<a href="none.html">x</a>', 'leads nowhere'),
    ('<a href="other.html#gone">x</a>', 'no such anchor'),
    (f'<a href="{HOST}/other.html">x</a>', 'within the site'),
    ('<i id="a"></i><i id="a"></i>', 'occurs twice'), ('<img src="other.html">', 'no alt text'),
    ('<script src="https://cdn.example/a.js"></script>', 'fetches'),
    ('<a href="https://example.org">x</a>', '')])
def test_a_faulty_page_is_found(tmp_path, body, found):
    (tmp_path/'index.html').write_text(body)
    (tmp_path/'other.html').write_text('<i id="here"></i>')
    problems = list(build.problems(tmp_path, HOST))
    assert [found in p for p in problems] == [True] * bool(found)


# README

def test_the_readme_shows_what_the_page_shows():
    picture = new_output('display_data', data={'image/png': 'aGk=', 'text/plain': '<Figure>'})
    table = new_output('execute_result', data={'text/markdown': '| a |\n|--:|\n| 1 |', 'text/plain': 'x'})
    text, figures = readme.readme(new_notebook(cells=[
        new_raw_cell('---\ntitle: x\n---'), new_markdown_cell('# Title'), code('#| hide', 'secret()'),
        code('#| echo: false', '#| fig-alt: Three curves', 'draw()', outputs=[picture]),
        code('#| echo: false', 'table()', outputs=[table]), code('shown()')]))
    (name, content), = figures.items()
    assert content == b'hi' and f'![Three curves]({name})' in text
    assert '| 1 |' in text and '```python\nshown()\n```' in text
    assert not any(word in text for word in ('secret', 'draw()', 'table()', 'title: x', '#|'))


def test_the_committed_readme_is_that_of_the_index():
    text, figures = readme.readme(nbformat.read(ROOT/'nbs'/'index.ipynb', 4))
    assert (ROOT/'README.md').read_text(encoding='utf-8') == text
    assert figures and all((ROOT/name).read_bytes() == content for name, content in figures.items())


# Stored outputs

PLOT = ('import matplotlib.pyplot as plt\nfig, ax = plt.subplots()\n'
        'ax.plot([1, 2, 3], [1, 4, {}])\nax.set_title("a");')

@pytest.fixture(scope='module')
def stored(tmp_path_factory):
    "A notebook with its outputs, and its path"
    path = tmp_path_factory.mktemp('nbs')/'a.ipynb'
    cells = [code('x = 2\nprint("x is", x)'), code(PLOT.format(9)),
             code('#| eval: false', 'print(1)', outputs=[stream('kept')])]
    nbformat.write(new_notebook(cells=cells), path)
    assert execute.run(path, check=False) == []
    return nbformat.read(path, 4), path


def test_outputs_are_stored(stored):
    nb, path = stored
    texts = [o.get('text', '') for c in nb.cells for o in c.outputs if o.output_type == 'stream']
    assert texts == ['x is 2\n', 'kept']
    assert execute.run(path, check=True) == []


@pytest.mark.parametrize('cell, old, new, said', [
    (0, 'x = 2', 'x = 3', "'x is 2'"), (1, '4', '3', 'line'), (1, '"a"', '"b"', 'axes')])
def test_a_stale_output_is_found(stored, tmp_path, cell, old, new, said):
    nb, path = stored[0].copy(), tmp_path/'a.ipynb'
    nb.cells = [c.copy() for c in nb.cells]
    nb.cells[cell].source = nb.cells[cell].source.replace(old, new)
    nbformat.write(nb, path)
    wrong = execute.run(path, check=True)
    assert wrong and f'cell {cell}' in wrong[0] and said in wrong[0]


@pytest.mark.parametrize('printed, fine', [('"loss 1.35, 23%"', True), ('"loss 1.31, 35%"', False),
                                           ('"loss 1.31"', False), ('"cost 1.31, 22%"', False)])
def test_where_training_is_flagged_numbers_may_be_a_little_off(tmp_path, printed, fine):
    path, flag = tmp_path/'a.ipynb', '#| trains\n'
    nbformat.write(new_notebook(cells=[code(flag + 'print("loss 1.31, 22%")')]), path)
    assert execute.run(path, check=False) == []
    nb = nbformat.read(path, 4)
    nb.cells[0].source = flag + f'print({printed})'
    nbformat.write(nb, path)
    assert (execute.run(path, check=True) == []) == fine


def test_a_path_of_this_machine_is_refused(tmp_path):
    nbformat.write(new_notebook(cells=[code(f'print({str(Path.home()/"x")!r})')]), tmp_path/'a.ipynb')
    assert any('path of this machine' in w for w in execute.run(tmp_path/'a.ipynb', check=False))


def test_a_caption_without_a_figure_is_refused(tmp_path):
    cells = [code('#| fig-cap: "a"\n' + PLOT.format(9)), code('#| fig-cap: "b"\nprint(1)')]
    nbformat.write(new_notebook(cells=cells), tmp_path/'a.ipynb')
    wrong = execute.run(tmp_path/'a.ipynb', check=False)
    assert wrong == ['a.ipynb, cell 1: has a caption but shows no figure']
