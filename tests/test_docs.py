"""The site's builder: from Quarto to MyST, the floors of the sidebar, and the README"""
import re, subprocess, sys

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell

from conftest import ROOT

pytest.importorskip('sphinx', reason='the site needs the doc extra: make docs installs it')
sys.path.insert(0, str(ROOT/'docs'))
import build, formulas, readme, slim, translate

HOST = 'https://cifar-nbdev.github.io/cifar_nbdev'
BLOB = 'https://github.com/cifar-nbdev/cifar_nbdev/blob/main'
FIT = 'def fit(model): pass\n\ndef _share(): pass'
KERNEL = {'name': 'python3', 'display_name': 'Python 3', 'language': 'python'}
HISTORY = 'class History: pass\n\ndef history(): pass'


def code(*lines, outputs=()):
    "A code cell with these lines"
    return new_code_cell('\n'.join(lines), outputs=list(outputs))


def page(name, *cells, title='Title'):
    "A page as build.py makes it, of a notebook with these cells"
    nb = new_notebook(cells=[new_raw_cell(f'---\ntitle: {title}\ndescription: Text\n---'), *cells],
                      metadata={'kernelspec': KERNEL})
    return translate.Page(nb, ROOT/'nbs'/f'{name}.ipynb')


@pytest.fixture
def train():
    "A page that defines `fit`, and two names that differ by their case only"
    return page('02_train', code('#| default_exp train'), code('#| exports', FIT),
                code('#| export', 'def unseen(): pass'), code('#| exports', '#| code-fold: true', HISTORY),
                new_markdown_cell('## Fit\n\n`fit` fits.'))


@pytest.fixture
def translator(train):
    "For that page and another"
    return translate.Translator(build.settings(), ROOT, [train, page('00_data')])


def stream(text): return new_output('stream', name='stdout', text=text)


# Markdown

@pytest.mark.parametrize('quarto, myst', [
    ('::: {.callout-note}\nText\n:::', ':::{note}\nText\n:::'),
    ('::: {.callout-warning title="Slow"}\nText\n:::', ':::{admonition} Slow\n:class: warning\nText\n:::'),
    ('[`fit`](https://cifar-nbdev.github.io/cifar_nbdev/train.html#fit)', '[`fit`](#cifar_nbdev.train.fit)'),
    ('[the loop](train.html#fit)', '[the loop](#cifar_nbdev.train.fit)'),
    ('[`history`](train.html#history)', '[`history`](#cifar_nbdev.train.history)'),
    ('[`History`](train.html#history)', '[`History`](#cifar_nbdev.train.History)'),
    ('[why](02_train.ipynb#stage-2)', '[why](train.ipynb#stage-2)'),
    ('`fit`, `fit()`, `train.fit`', '[`fit`](#cifar_nbdev.train.fit), [`fit()`](#cifar_nbdev.train.fit), '
                                    '[`train.fit`](#cifar_nbdev.train.fit)'),
    ('`unseen` `_share` ``fit`` `fit(x)`', '`unseen` `_share` ``fit`` `fit(x)`'),
    ('## How `fit` works', '## How `fit` works'), ('```python\n`fit`\n```', '```python\n`fit`\n```'),
    ('[see `fit`](https://example.org)', '[see `fit`](https://example.org)'),
    ('[how](../CONTRIBUTING.md)', f'[how]({BLOB}/CONTRIBUTING.md)'),
    ('[a run](results/a.json)', f'[a run]({BLOB}/nbs/results/a.json)'),
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
    cell, = translator.cell(code('#| label: fig-a', '#| fig-cap: Caption', '#| fig-alt: Alt',
                                 '#| echo: false', 'plot()'))
    assert cell.metadata.mystnb == {'figure': {'name': 'fig-a', 'caption': 'Caption'},
                                    'image': {'alt': 'Alt'}}
    assert cell.metadata.tags == ['remove-input']


@pytest.mark.parametrize('cell', [
    new_raw_cell('---\ntitle: x\n---'), code('#| include: false', 'x = 1'), code('#| hide', 'x = 1'),
    code('#| export', 'import re'), code('#|exporti', 'x = 1'), code('#| default_exp train')])
def test_hidden_cells_are_left_out(translator, cell):
    assert translator.cell(cell) == []


@pytest.mark.parametrize('option', ['colour: red', 'eval: false'])
def test_an_unknown_option_is_an_error(translator, option):
    with pytest.raises(ValueError, match=option.split(':')[0]): translator.cell(code(f'#| {option}', 'x'))


def test_a_caption_that_is_no_yaml_is_named(translator):
    cell = code('#| fig-cap: a: b', 'x')
    with pytest.raises(ValueError, match='(?s)quote.*fig-cap: a: b'): translator.cell(cell)


@pytest.mark.parametrize('flag', ['trains', 'data', 'slow', 'cuda'])
def test_a_flag_is_cut_off(translator, flag):
    cell, = translator.cell(code(f'#| {flag}', 'x'))
    assert cell.source == 'x'


def test_standard_error_is_left_out(translator):
    bar = new_output('stream', name='stderr', text='bar')
    cell, = translator.cell(code('x', outputs=[bar, stream('shown')]))
    assert [o.text for o in cell.outputs] == ['shown']


def test_an_exported_cell_is_shown_below_the_anchors_of_its_names(translator, train):
    reserved, title, entry, cell, *_ = translator.notebook(train).cells
    assert reserved.source == '```{reserve} fit history history-2\n```' and title.source.startswith('# Title')
    assert entry.source.startswith('```{entry} cifar_nbdev.train.fit=fit\n:source: ' + BLOB)
    assert re.search(r'/cifar_nbdev/train\.py#L\d+\n', entry.source)
    assert cell.source == FIT and cell.metadata.tags == []


def test_a_folded_cell_is_named_by_what_it_defines(translator, train):
    entry, cell = translator.notebook(train).cells[4:6]
    assert entry.source.split('\n')[0].split()[1:] == ['cifar_nbdev.train.History=history',
                                                       'cifar_nbdev.train.history=history-2']
    assert cell.source == HISTORY and cell.metadata.tags == ['hide-input']
    assert cell.metadata.mystnb['code_prompt_show'] == 'History, history'
    said, = translator.cell(code('#| code-fold: true', '#| code-summary: "How"', 'x'))
    assert said.metadata.mystnb['code_prompt_show'] == 'How'


def test_the_sidebar_lists_the_pages_by_floor(tmp_path):
    names = ['index', '16_page', '10_files', '07_speed', '04_explore', '03_report', '00_data']
    for name in names:
        p = page(name, new_markdown_cell('Text'), title=name.split('_')[-1].title())
        nbformat.write(p.nb, tmp_path/f'{name}.ipynb')
    build.write_pages(build.settings(), tmp_path.glob('*.ipynb'), tmp_path/'out')
    trees = [c.source for c in nbformat.read(tmp_path/'out'/'index.ipynb', 4).cells if 'toctree' in c.source]
    assert [(t.split(':caption: ')[1].split('\n')[0], t.split('\n\n')[1].split()[:-1]) for t in trees] == [
        ('The report', ['data', 'report']), ('Beyond it', ['explore', 'speed']),
        ('Under the hood', ['files', 'page'])]
    assert nbformat.read(tmp_path/'out'/'files.ipynb', 4).cells[0].source.startswith('# Files')


def test_links_reach_functions_also_past_a_heading_of_their_name(tmp_path, train):
    nbformat.write(train.nb, tmp_path/'02_train.ipynb')
    text = '# Home\n\n`fit`, [`history`](train.html#history), [T](train.html)'
    home = page('index', new_markdown_cell(text))
    nbformat.write(home.nb, tmp_path/'index.ipynb')
    make = 'import build, pathlib; p = pathlib.Path(r"{0}"); build.build_site(p/"site", p.glob("*.ipynb"))'
    subprocess.run([sys.executable, '-c', make.format(tmp_path)], cwd=ROOT/'docs', check=True)
    text = (tmp_path/'site'/'index.html').read_text(encoding='utf-8')
    for anchor in ('#fit', '#history-2', ''): assert f'href="train.html{anchor}"' in text, anchor
    text = (tmp_path/'site'/'train.html').read_text(encoding='utf-8')
    assert re.search(r'<p class="entry" id="fit">\s*<a class="source[^>]*>source</a></p>', text)
    assert text.count('id="fit"') == 1 and '>class</span>' in text and 'unseen' not in text


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


# What pages weigh

@pytest.mark.parametrize('tex, found', [
    (r'\log 10', '<mi>log</mi><mspace width="0.167em" /><mn>10</mn>'),
    (r'\log(x)', '<mi>log</mi><mo stretchy="false">'), (r'\max(x)', '<mi>max</mi>'),
    (r'|p|', '<mo stretchy="false" lspace="0" rspace="0">&#x0007C;</mo>'),
    (r'L = -p', '<mo form="prefix">&#x02212;</mo>'), (r'\partial v', '<mi>&#x02202;</mi><mi>v</mi>')])
def test_a_formula_is_spaced_as_in_tex(tex, found):
    assert found in formulas.mathml(tex)


def test_an_unknown_command_in_a_formula_is_an_error():
    with pytest.raises(ValueError, match=r'frobnicate'): formulas.mathml(r'\frobnicate x')


def test_styles_that_no_page_can_use_are_left_out():
    css = ('/* Copyright A */ .a, .gone { color: red } .gone .a { color: blue } .a:not(.gone) { x: y } '
           '@media print { .gone { x: y } } @media print { #b { x: y } } @font-face { src: url(c) } '
           '.bs-tooltip-auto { x: y } /* a note */ :root { --c: d }')
    kept = slim.style(slim.tinycss2.parse_stylesheet(css), {'a', 'b'})
    kept = re.sub(r'\s+', ' ', kept)
    assert kept == ('/* Copyright A */ .a{ color: red } .a:not(.gone) { x: y } @media print {#b { x: y }} '
                    '.bs-tooltip-auto { x: y } :root { --c: d }'), kept


def test_files_that_no_page_asks_for_are_left_out(tmp_path):
    for name in ('a.css', 'b.css', 'c.svg', 'd.js', 'd.js.LICENSE.txt', 'd.js.map', 'locales/e'):
        (tmp_path/'_static'/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/'_static'/name).write_text({'a.css': '@import "b.css"; p { x: url(c.svg) }'}.get(name, ''))
    (tmp_path/'i.html').write_text(
        '<link href="_static/a.css?v=1"><script src="_static/d.js"></script>'
        '<script src="searchindex.js"></script><table><th class="head">x</th></table>')
    slim.slim(tmp_path)
    left = {p.name for p in (tmp_path/'_static').rglob('*')}
    assert left == {'a.css', 'b.css', 'c.svg', 'd.js', 'd.js.LICENSE.txt'}
    text = (tmp_path/'i.html').read_text()
    assert 'searchindex' not in text and '<th scope="col" class="head">' in text


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


@pytest.mark.parametrize('link, there', [
    ('[Data](00_data.ipynb)', '[Data](nbs/00_data.ipynb)'),
    ('[x](02_train.ipynb#fit)', '[x](nbs/02_train.ipynb)'),
    ('[x](../CONTRIBUTING.md)', '[x](CONTRIBUTING.md)'), ('[x](results/a.json)', '[x](nbs/results/a.json)'),
    ('[x](https://example.org/a.html)', '[x](https://example.org/a.html)'), ('[x](#part)', '[x](#part)'),
    ('```\n[x](a.ipynb)\n```', '```\n[x](a.ipynb)\n```')])
def test_links_of_the_readme_lead_to_files_of_the_repository(link, there):
    assert readme.repository_links(link) == there


def test_the_committed_readme_is_that_of_the_index():
    text, figures = readme.readme(nbformat.read(ROOT/'nbs'/'index.ipynb', 4))
    assert (ROOT/'README.md').read_text(encoding='utf-8') == text
    assert figures and all((ROOT/name).read_bytes() == content for name, content in figures.items())
    paths = [m for m in re.findall(r'\]\(([^)#]+)', text) if ':' not in m]
    assert 'nbs/00_data.ipynb' in paths and not [p for p in paths if not (ROOT/p).is_file()]
    assert text.count(HOST) == 1, 'the site is named once'


@pytest.mark.parametrize('path', sorted((ROOT/'nbs').glob('*.ipynb')), ids=lambda p: p.stem)
def test_notebooks_link_notebooks(path):
    "In Jupyter and on GitHub there are no pages yet"
    text = '\n'.join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'markdown')
    links = [link.split('#')[0] for link in re.findall(r'\]\((?![a-z]+:|#)([^)]+)\)', text)]
    assert not [link for link in links if not (ROOT/'nbs'/link).exists()]


def test_a_table_with_two_index_levels_has_its_names_and_its_caption():
    table = pd.DataFrame({'acc': [52.1, 51.7, 53.4]}, pd.MultiIndex.from_tuples(
        [('gate', 'pytorch'), ('gate', 'normal'), ('no gate', 'pytorch')], names=['reading', 'init']))
    from bs4 import BeautifulSoup
    html = translate._table(table.rename_axis(columns='in %').to_html())
    table = BeautifulSoup(html, 'html.parser').table
    assert table.caption.text == 'in %' and [c.text for c in table.thead.find_all('th')] == ['reading', 'init', 'acc']
    assert {c.text: c.get('class') for c in table.tbody.find_all(['th', 'td'])} == {
        **dict.fromkeys(('gate', 'pytorch', 'normal', 'no gate'), ['text']),
        **dict.fromkeys(('52.1', '51.7', '53.4'), None)}
