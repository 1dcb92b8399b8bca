"""The notebooks' runner: outputs stored, compared with what the code gives, and no file left behind"""
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from conftest import ROOT

sys.path.insert(0, str(ROOT/'docs'))
import execute


def code(*lines, outputs=()):
    "A code cell with these lines"
    return new_code_cell('\n'.join(lines), outputs=list(outputs))


def stream(text): return new_output('stream', name='stdout', text=text)


PLOT = ('import matplotlib.pyplot as plt\nfig, ax = plt.subplots()\n'
        'ax.plot([1, 2, 3], [1, 4, {}])\nax.set_title("a");')

@pytest.fixture(scope='module')
def stored(tmp_path_factory):
    "A notebook with its outputs, and its path"
    path = tmp_path_factory.mktemp('nbs')/'a.ipynb'
    cells = [code('x = 2\nprint("x is", x)'), code(PLOT.format(9)),
             code('#| slow', 'print(1)', outputs=[stream('kept')])]
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


@pytest.mark.parametrize('flag, was, fine', [('data', '9', True), ('trains', '9', True), ('', '9', False)])
def test_on_other_data_only_kinds_of_flagged_outputs_are_compared(tmp_path, flag, was, fine):
    path, flags = tmp_path/'a.ipynb', [f'#| {flag}'] * bool(flag)
    nbformat.write(new_notebook(cells=[code(*flags, 'print(1)', outputs=[stream(was)])]), path)
    assert (execute.run(path, check=True, own_data=True) == []) == fine
    assert execute.run(path, check=True)


def test_on_other_data_a_missing_output_is_found(tmp_path):
    nbformat.write(new_notebook(cells=[code('#| data', 'x = 1', outputs=[stream('1')])]), tmp_path/'a.ipynb')
    wrong, = execute.run(tmp_path/'a.ipynb', check=True, own_data=True)
    assert 'the code gives []' in wrong


def test_outputs_are_stored_from_shapes_and_without_bars(tmp_path, monkeypatch):
    monkeypatch.setenv('CIFAR_NBDEV_DATA', 'cifar10')
    names = 'CIFAR_NBDEV_DATA', 'TQDM_DISABLE', 'OMP_NUM_THREADS'
    cells = [code('import os', f'[os.environ[n] for n in {names}]')]
    nbformat.write(new_notebook(cells=cells), tmp_path/'a.ipynb')
    assert execute.run(tmp_path/'a.ipynb', check=False) == []
    out, = nbformat.read(tmp_path/'a.ipynb', 4).cells[0].outputs
    assert out.data['text/plain'] == "['shapes10', '1', '1']"


def test_a_failing_cell_is_named(tmp_path):
    nbformat.write(new_notebook(cells=[code('1 / 0')]), tmp_path/'a.ipynb')
    wrong, = execute.run(tmp_path/'a.ipynb', check=True)
    assert 'a cell failed' in wrong and 'ZeroDivisionError' in wrong


def test_a_kernel_that_dies_is_a_failure(tmp_path):
    nbformat.write(new_notebook(cells=[code('import os', 'os._exit(1)')]), tmp_path/'a.ipynb')
    assert execute.run(tmp_path/'a.ipynb', check=True)


def test_a_file_left_behind_is_named_once(tmp_path):
    path = tmp_path/'a.ipynb'
    nbformat.write(new_notebook(cells=[code('x = open("left.txt", "w").write("x")')]), path)
    (tmp_path/'.venv').mkdir()
    (tmp_path/'.venv'/'pyvenv.cfg').write_text('')
    watch = execute.Watch(tmp_path, but=[path])
    wrong, = execute.run(path, check=True, watch=watch)
    assert 'left left.txt behind' in wrong and watch.new() == []
    (tmp_path/'.venv'/'x').write_text('x')
    (tmp_path/'left.txt').write_text('more')
    assert watch.new() == [Path('left.txt')]
