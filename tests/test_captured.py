"""Fused against separate training: on the CPU without capture, on CUDA with it where there is a card"""
import math

import pytest
import torch
import torch.nn.functional as F

from cifar_nbdev.data import dataloaders, shapes10
from cifar_nbdev.fused import FusedClassifier, fit_fused
from cifar_nbdev.model import READINGS, ImageClassifier
from cifar_nbdev.train import (NonFiniteLossError, SweepError, _fuse, check_sweep, fit, load_runs, run_name,
                               sweep)
from tqdm import tqdm

LRS = (.005, .01, .0001)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA card here')


@pytest.fixture(scope='module')
def data():
    "Eight batches of 128 and one of 80 an epoch"
    return shapes10(1104, 300)


@pytest.fixture(autouse=True)
def one_order(monkeypatch):
    "One order of additions: that of autograd, in one thread"
    monkeypatch.setattr('cifar_nbdev.train.is_plain_gate', lambda model: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def apart(a, b):
    return max((p.cpu() - q.cpu()).abs().max().item() for p, q in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize('device, within', [('cpu', 1e-6), pytest.param('cuda', 1e-4, marks=needs_cuda)])
@pytest.mark.parametrize('reading', READINGS)
def test_45_steps_are_those_of_separate_models(data, reading, device, within):
    fused = [ImageClassifier(reading=reading, seed=0) for _ in LRS]
    histories = fit_fused(fused, data, LRS, epochs=5, device=device)
    for model, lr, epochs in zip(fused, LRS, histories):
        alone = ImageClassifier(reading=reading, seed=0)
        start = [p.clone() for p in alone.parameters()]
        history = fit(alone, dataloaders(data), 5, lr, device=device, progress=False)
        assert apart(model, alone) < within
        assert max((p.cpu() - q).abs().max().item() for p, q in zip(model.parameters(), start)) > 100 * within
        for ours, theirs in zip(epochs, history.epochs):
            assert all(math.isclose(ours[k], theirs[k], abs_tol=1e-4 if device == 'cpu' else 1e-2)
                       for k in ('train_loss', 'train_acc', 'test_loss', 'test_acc'))


@pytest.mark.parametrize('reading', READINGS)
def test_gradients_do_not_mix(data, reading):
    models = [ImageClassifier(reading=reading, seed=s) for s in range(3)]
    x, y = data.x_train[:50].float() / 255, data.y_train[:50]
    losses = torch.stack([F.cross_entropy(logits, y) for logits in FusedClassifier(models)(x)])
    (losses * torch.tensor([1., 0, 2])).sum().backward()
    for model, weight in zip(models, (1, 0, 2)):
        wanted = torch.autograd.grad(weight * F.cross_entropy(model(x), y), list(model.parameters()),
                                     allow_unused=True)
        for p, g in zip(model.parameters(), wanted):
            torch.testing.assert_close(p.grad, torch.zeros_like(p) if g is None else g, atol=1e-6, rtol=1e-5)


def fuse(data, lrs, seeds, out=None, device='cpu'):
    "What `sweep` does on CUDA"
    configs = check_sweep(lrs, seeds, momentum=.9, weight_decay=5e-4, epochs=2, bs=128, reading='gate')
    return _fuse(data, {run_name(c, data.sha256): c for c in configs}, torch.device(device), out,
                 tqdm(disable=True))


def test_a_fused_sweep_writes_the_runs_of_a_plain_one(data, tmp_path):
    fused = fuse(data, LRS, (0, 1), tmp_path)
    plain = sweep(data, LRS, (0, 1), epochs=2, device='cpu', progress=False)
    configs = {run_name(r['config'], data.sha256): r['config'] for r in plain}
    assert {n: r['config'] for n, r in fused.items()} == configs
    for run in plain:
        same = fused[run_name(run['config'], data.sha256)]
        assert same['env']['fused'] == 3 and same['data'] == run['data'] and run.keys() == same.keys()
        assert [e.keys() for e in same['epochs']] == [e.keys() for e in run['epochs']]
        assert math.isclose(same['epochs'][-1]['test_loss'], run['epochs'][-1]['test_loss'], abs_tol=1e-4)
    assert load_runs(tmp_path) == sorted(fused.values(),
                                         key=lambda r: (r['config']['lr'], r['config']['seed']))
    assert len(list(tmp_path.glob('*.safetensors'))) == 6


def test_a_loss_that_is_not_finite_is_reported_and_the_others_are_kept(data, tmp_path):
    done = fuse(data, (1e6, .01), (0,), tmp_path)
    bad, good = done.values()
    assert isinstance(bad, NonFiniteLossError) and 'epoch 1' in str(bad) and '1e+06' in str(bad)
    assert load_runs(tmp_path) == [good]


@needs_cuda
def test_a_sweep_on_cuda_is_fused(data):
    runs = sweep(data, LRS, (0, 1), epochs=2, device='cuda', progress=False)
    assert [r['env']['fused'] for r in runs] == [3] * 6
    with pytest.raises(SweepError, match='not finite'):
        sweep(data, (1e6,), epochs=1, device='cuda', progress=False)
