"""The captured step is `train_step`: to the bit without CUDA, with its bookkeeping; nearly so on a card"""
import copy, gc
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from cifar_nbdev import captured
from cifar_nbdev.captured import captured_step
from cifar_nbdev.data import dataloaders
from cifar_nbdev.model import ImageClassifier
from cifar_nbdev.readings import READINGS
from cifar_nbdev.train import train_step

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA card here')
cuda = pytest.param('cuda', marks=needs_cuda)


@pytest.fixture(autouse=True)
def one_order():
    "One order of additions: that of one thread"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Normed(nn.Module):
    "A model with buffers, and with numbers drawn at random in each step"
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.AvgPool2d(8), nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(.2),
                                    nn.Linear(48, 10))
    def forward(self, x): return self.layers(x)


def trained(step, data, make=ImageClassifier, epochs=3, lrs=(.05,), device='cpu', seed=0):
    "Model, losses of all steps, and the optimizer, after epochs of two batches of 128 and one of 44"
    model, dl, losses = make(seed=seed).to(device), dataloaders(data, seed=seed).train, []
    opt = torch.optim.SGD(model.parameters(), lr=lrs[0], momentum=.9, weight_decay=5e-4)
    for epoch in range(epochs):
        opt.param_groups[0]['lr'] = lrs[epoch % len(lrs)]
        losses += [step(model, opt, xb.to(device), yb.to(device))[0] for xb, yb in dl]
    return model, torch.stack(losses), opt


def assert_same(a, b, atol=0):
    for p, q in zip(a[0].state_dict().values(), b[0].state_dict().values()):
        torch.testing.assert_close(p, q, atol=atol, rtol=0)
    torch.testing.assert_close(a[1], b[1], atol=10*atol, rtol=0)


class Replayed:
    "What a CUDA graph does, on a CPU: a step that reads and writes the same memory each time"
    def __init__(self, model, opt, xb, yb):
        start = copy.deepcopy([t.detach() for t in tensors(model, opt)])
        self.step = lambda: train_step(model, opt, xb, yb)
        self.results, self.parameters = self.step(), list(model.parameters())
        self.gradients = [p.grad for p in self.parameters]
        with torch.no_grad():               # recording computes nothing
            for t, before in zip(tensors(model, opt), start): t.copy_(before)
    def replay(self):
        for there, t in zip(self.results, self.step()): there.copy_(t)
        for there, p in zip(self.gradients, self.parameters): there.copy_(p.grad)
        for p in self.parameters: p.grad = None


def tensors(model, opt):
    momenta = [opt.state[p]['momentum_buffer'] for p in model.parameters()]
    return [*model.parameters(), *model.buffers(), *momenta]


@pytest.fixture(params=['direct', 'replayed', cuda])
def way(request, monkeypatch):
    "Where the steps are computed"
    if request.param == 'replayed':
        def record(*args): return (graph := Replayed(*args)), graph.results
        monkeypatch.setattr(captured, '_record', record)
    return request.param


@pytest.mark.parametrize('make', [*READINGS.values(), Normed])
def test_the_same_bits_for_any_model_with_a_learning_rate_that_changes(small, way, make):
    device = 'cuda' if way == 'cuda' else 'cpu'
    if make is Normed and way != 'direct': make = lambda seed: Normed(seed).eval()      # draws nothing
    found, plain = (trained(step, small, make, lrs=(.05, .02), device=device)
                    for step in (captured_step, train_step))
    assert_same(found, plain, atol=1e-5 if way == 'cuda' else 0)


def test_losses_gradients_and_logits_are_the_steps_own(small, way):
    device = 'cuda' if way == 'cuda' else 'cpu'
    steps = {}
    for step in (captured_step, train_step):
        model = ImageClassifier(seed=0).to(device)
        opt, found = torch.optim.SGD(model.parameters(), lr=.05, momentum=.9), []
        for xb, yb in [*dataloaders(small).train] * 2:
            results = step(model, opt, xb.to(device), yb.to(device))
            assert type(results) is tuple and not any(t.requires_grad for t in results)
            found.append([*results, *(p.grad.clone() for p in model.parameters())])
        steps[step] = found
    for a, b in zip(steps[captured_step], steps[train_step], strict=True):
        for t, u in zip(a, b, strict=True):
            torch.testing.assert_close(t, u, atol=0 if device == 'cpu' else 1e-5, rtol=0)


def recorded(monkeypatch):
    "A list that grows with every recording"
    seen, record = [], captured._record
    monkeypatch.setattr(captured, '_record', lambda *args: (seen.append(args[2].shape[0]), record(*args))[1])
    return seen


def test_what_is_recorded_when(small, monkeypatch):
    seen = recorded(monkeypatch)
    trained(captured_step, small, epochs=1)
    assert seen == [128]                                        # the first takes the plain step
    seen.clear()
    trained(captured_step, small, epochs=3)
    assert seen == [128, 44]
    seen.clear()
    trained(captured_step, small, epochs=4, lrs=(.1, .1, .05, .05))
    assert seen == [128, 44, 128, 44]


@pytest.mark.parametrize('change', [lambda m: m.eval(), lambda m: m.conv.requires_grad_(False),
                                    lambda m: setattr(m.fc.weight, 'data', m.fc.weight.data.clone())])
def test_a_change_of_the_model_is_recorded_anew(small, monkeypatch, change):
    seen, model = recorded(monkeypatch), ImageClassifier(seed=0)
    opt, (xb, yb) = torch.optim.SGD(model.parameters(), lr=.01), next(iter(dataloaders(small).train))
    for _ in range(3): captured_step(model, opt, xb, yb)
    assert len(seen) == 1
    change(model)
    for _ in range(2): captured_step(model, opt, xb, yb)
    assert len(seen) == 2


def test_everything_goes_with_the_optimizer(small):
    found, before = trained(captured_step, small), len(captured._steps)
    assert found[2] in captured._steps
    del found
    gc.collect()
    assert len(captured._steps) < before


def test_what_cannot_be_recorded_is_refused_in_one_line(small, monkeypatch):
    class Graph:
        "A capture that fails, in the step and once more at its end"
        def __init__(self, *args, capture_error_mode=''): pass
        def __enter__(self): return self
        def __exit__(self, *error):
            if error[0]: raise RuntimeError('operation failed due to a previous error during capture')
    class Cuda:
        CUDAGraph = graph = Graph
        stream = staticmethod(nullcontext)
        current_stream = staticmethod(lambda: None)
    class Xb: is_cuda = True
    def failing(*args): raise RuntimeError('operation not permitted when stream is capturing\nand more')
    monkeypatch.setattr(captured.torch, 'cuda', Cuda)
    monkeypatch.setattr(captured, 'train_step', failing)
    with pytest.raises(ValueError) as e: captured._record(ImageClassifier(seed=0), None, Xb(), None)
    line = str(e.value)
    assert 'not permitted' in line and 'step=train_step' in line and len(line.splitlines()) == 1


@pytest.mark.parametrize('device', ['cpu', cuda])
def test_several_at_once(small, device):
    def run(seed):
        if device == 'cpu': return trained(captured_step, small, seed=seed)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream): found = trained(captured_step, small, seed=seed, device=device)
        stream.synchronize()
        return found
    alone = [run(seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool: both = list(pool.map(run, range(3)))
    for a, b in zip(alone, both): assert_same(a, b, atol=0 if device == 'cpu' else 1e-5)
