"""Callbacks outside of Jupyter: a killed log, rows beside a bar, TensorBoard, figures from several threads"""
import io, json, re, threading

import matplotlib
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from cifar_nbdev.callbacks import CSVLog, EarlyStopping, EpochRows, LivePlot
from cifar_nbdev.data import dataloaders
from cifar_nbdev.files import progress_bar
from cifar_nbdev.model import ImageClassifier
from cifar_nbdev.report import curves, figure_style
from cifar_nbdev.train import fit
from conftest import ROOT, python


def train(data, epochs=3, **kwargs):
    return fit(ImageClassifier(seed=0), dataloaders(data), epochs, .05, device='cpu', progress=False, **kwargs)


def test_a_log_of_a_killed_training_is_whole(tmp_path):
    r = python('import os, signal, sys\n'
               'from cifar_nbdev.callbacks import CSVLog\n'
               'from cifar_nbdev.data import dataloaders, shapes10\n'
               'from cifar_nbdev.model import ImageClassifier\n'
               'from cifar_nbdev.train import fit\n'
               'def kill(model, history):\n'
               '    if len(history) == 3: os.kill(os.getpid(), signal.SIGKILL)\n'
               'fit(ImageClassifier(seed=0), dataloaders(shapes10(300, 100)), 9, progress=False,\n'
               '    callbacks=[CSVLog(sys.argv[1]), kill])', tmp_path/'log.csv', cwd=tmp_path)
    assert r.returncode == -9, r.stderr
    assert pd.read_csv(tmp_path/'log.csv')['epoch'].tolist() == [1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ['log.csv']


def test_a_log_is_this_training_s(small, tmp_path):
    log, kept = tmp_path/'new'/'log.csv', tmp_path/'checkpoint'
    log.parent.mkdir()
    log.write_text('of another training\n')
    seen = []
    class Before:
        def before_fit(self, t): seen.append(log.read_text())
    first = train(small, 2, checkpoint=kept, callbacks=[CSVLog(log), Before()])
    more = train(small, 3, checkpoint=kept, callbacks=[CSVLog(log), Before()])
    assert [len(s.splitlines()) for s in seen] == [1, 3]        # fresh, then with what the checkpoint had
    assert more.resumed == len(first) == 2
    pd.testing.assert_frame_equal(pd.read_csv(log, index_col='epoch'), more.to_frame())


def test_early_stopping_does_not_train_on_from_its_checkpoint(small, tmp_path):
    def stopped(patience):
        return train(small, 9, checkpoint=tmp_path/'c', callbacks=[EarlyStopping(patience, min_change=9)])
    assert [len(stopped(p)) for p in (2, 2, 3)] == [3, 3, 4]    # nothing is better than the first by that much


def test_rows_stand_above_a_bar(small, monkeypatch):
    err = io.StringIO()
    err.isatty = lambda: True
    monkeypatch.setattr('sys.stderr', err)
    with progress_bar(total=9, desc='bar', file=err):
        train(small, callbacks=[EpochRows(file=err)])
    lines = [line.split('\r')[-1] for line in err.getvalue().split('\n')]
    assert [line.split()[0] for line in lines[1:5]] == ['epoch', '1', '2', '3']
    assert not any('bar' in line for line in lines[1:5])


def test_outside_of_jupyter_a_live_plot_says_so_once(small, capfd):
    history = train(small, callbacks=[LivePlot()])
    out, err = capfd.readouterr()
    assert (len(history), out, err) == (3, '', 'LivePlot: not in Jupyter, so nothing is shown\n')
    live = LivePlot()
    def press(model, history): live.stop()
    history = train(small, callbacks=[press, live])
    assert (len(history), history.interrupted) == (1, False)


def test_threads_that_draw_leave_the_session_its_style(small):
    def style(): return matplotlib.rcParams.copy() | {'backend': ''}       # is chosen at the first figure
    history, before = train(small, 1), style()
    inside = threading.Event()
    def draw():
        with figure_style():
            inside.set()
            curves(history)
    with plt.style.context('dark_background'):
        with figure_style():
            other = threading.Thread(target=draw)
            other.start()
            assert not inside.wait(.3)                          # it waits for its turn
        other.join(20)
        assert inside.is_set() and plt.rcParams['figure.facecolor'] == 'black'
    assert style() == before


def test_the_block_for_tensorboard_writes_what_history_has(small, tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    cells = json.loads((ROOT/'nbs'/'08_callbacks.ipynb').read_text(encoding='utf-8'))['cells']
    text = next(s for c in cells if 'SummaryWriter' in (s := ''.join(c['source'])))
    names = {}
    exec(re.search(r'```python\n(.*?)```', text, re.S)[1], names)
    history = train(small, callbacks=[names['TensorBoard'](tmp_path)])
    events = EventAccumulator(str(tmp_path)).Reload()
    for part in ('train', 'test'):
        for what in ('loss', 'acc'):
            found = [(e.step, e.value) for e in events.Scalars(f'{what}/{part}')]
            assert found == [(e['epoch'], pytest.approx(e[f'{part}_{what}'])) for e in history.epochs]
