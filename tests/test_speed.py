"""The benchmark runs, and gives what the notebook draws. What it measures is not tested: no timed tests"""
import copy, json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from subprocess import CompletedProcess

import matplotlib.pyplot as plt
import pytest

from cifar_nbdev import speed
from cifar_nbdev.data import shapes10
from cifar_nbdev.speed import (PEERS, WAYS, bench, bench_cuda, convolution_seconds, plot_epochs, plot_scaling,
                               ratios)
from conftest import save_npz


@pytest.fixture(scope='module')
def quick():
    "What `bench(quick=True)` gives, as it comes back from a file"
    with pytest.MonkeyPatch.context() as m:
        m.setenv('OMP_NUM_THREADS', '1')                # several wait for each other on busy cores
        return json.loads(json.dumps(bench('shapes10', quick=True, progress=False)))


def test_every_way_is_measured(quick):
    assert list(quick['seconds']) == list(quick['memory_mb']) == list(WAYS)
    assert all(len(t) == 1 and t[0] > 0 for t in quick['seconds'].values())
    assert quick['data'] == dict(name='shapes10 (synthetic)', n_train=300, n_test=100)
    assert quick['env']['device'] == 'cpu' and quick['env']['step'] == 'compiled_step'
    assert all(quick['env'][k] for k in ('cifar_nbdev', 'torch', 'numpy', 'numba', 'threads'))


def test_every_other_part_is_measured(quick):
    assert [c.keys() for c in quick['convolutions']] == [{'PyTorch', 'compiled'}]
    assert min(quick['convolutions'][0].values()) > 0
    assert [n for n, _ in quick['images']] == [60, 120, 180, 240, 300]
    assert [n for n, _ in quick['runs']] == [n for n, _ in quick['one batch']] == [1, 2]
    assert quick['table']['runs'] == 3 and quick['table']['epochs'] == 2 and quick['table']['seconds'] > 0


def test_it_can_be_drawn(quick):
    result = copy.deepcopy(quick)
    result['seconds'] |= {peer: [1.] for peer in PEERS}
    result['memory_mb'] |= dict.fromkeys(PEERS, 1)
    assert {t.get_text() for t in plot_epochs(result).axes[0].get_yticklabels()} == {*WAYS, *PEERS}
    assert len(plot_scaling(result).axes) == 2 and not plt.get_fignums()


def test_ratios_are_of_medians():
    table = ratios(dict(seconds={"the report's recipe": [10, 20, 90], 'images in memory': [8],
                                 'fit, compiled_step': [4, 4]},
                        memory_mb={"the report's recipe": 3, 'images in memory': 2, 'fit, compiled_step': 1}))
    assert table.loc["the report's recipe"].tolist() == [20, 5, 1, 2.5, 3]
    assert table.loc['fit, compiled_step'].tolist() == [4, 1, .2, .5, 1]
    assert ratios(dict(seconds={'fit': [2., 3.]})).loc['fit'].tolist() == [2.5]


def test_more_images_take_more_convolutions(monkeypatch):
    monkeypatch.setattr(speed, '_seconds', lambda f, steps: 1)          # a second a batch
    assert convolution_seconds(129, 128) == dict(PyTorch=2*2 + 1, compiled=2*2 + 1)


@pytest.mark.parametrize('peer', PEERS)
def test_peers(peer):
    if not find_spec(peer.lower()): pytest.skip(f'{peer} is not installed')
    ticks = []
    PEERS[peer](shapes10(150, 20), 2, lambda: ticks.append(1))
    assert len(ticks) == 2


def test_on_a_graphics_card_tried_without_one(monkeypatch, tmp_path):
    source = save_npz(tmp_path/'tiny.npz', shapes10(150, 20))
    with ThreadPoolExecutor(1) as pool:                 # starting processes takes longer than all the rest
        monkeypatch.setattr(speed, 'sweep', partial(speed.sweep, executor=pool))
        result = bench_cuda(source, rounds=2, seeds=2, epochs=1, device='cpu', progress=False)
    json.dumps(result)
    assert list(result['seconds']) == ['fit', 'fit, captured_step', 'table', 'table, 2 seeds']
    assert all(len(t) == 2 and min(t) > 0 for t in result['seconds'].values())
    assert {lr: len(a) for lr, a in result['accuracies'].items()} == {'0.005': 2, '0.01': 2, '0.0001': 2}
    assert result['env']['step'] == 'captured_step' and result['data']['n_train'] == 150
    assert list(ratios(result)) == ['seconds']


def test_bad_arguments(monkeypatch):
    with pytest.raises(ValueError, match='rounds is 0, wanted 1 or more'): bench('shapes10', rounds=0)
    with pytest.raises(ValueError, match="unknown source 'nowhere'"): bench('nowhere')
    monkeypatch.setattr('cifar_nbdev.speed.find_spec', lambda name: None)
    with pytest.raises(ValueError, match="lightning, skorch, keras not installed: pip install .*peers.*"):
        bench('shapes10', peers=True)
    monkeypatch.setattr('torch.cuda.device_count', lambda: 0)
    with pytest.raises(ValueError, match="device 'cuda' is not there"): bench_cuda('shapes10')


def test_a_part_that_fails_is_named_in_one_line(monkeypatch):
    for stderr, why in (('in f\nValueError: no images\n', 'ValueError: no images'), ('', 'exit status -9')):
        monkeypatch.setattr('subprocess.run', lambda *args, **kwargs: CompletedProcess(args, -9, '', stderr))
        with pytest.raises(RuntimeError, match=f'^measuring fit, images: {why}$'):
            speed._measure(['fit', 'images'], 'shapes10', True)
