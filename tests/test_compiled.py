"""The gradient by hand is used where it may be, and nobody can tell"""
import math

import pytest
import torch
from torch import nn

from cifar_nbdev.data import dataloaders
from cifar_nbdev.gradient import Threads, compiled, logits_by_hand, loss_and_gradient
from cifar_nbdev.model import READINGS, ImageClassifier
from cifar_nbdev.train import fit, weights_sha256


def trained(model, data, by_autograd=False, wrap=lambda dl: dl):
    "The model after two epochs of `fit`; in another module it is not recognised"
    train, test = dataloaders(data)
    fit(nn.Sequential(model) if by_autograd else model, (wrap(train), test), 2, device='cpu', progress=False)
    return model


@pytest.fixture
def calls(monkeypatch):
    "Counts calls of `loss_and_gradient`"
    from cifar_nbdev import train
    found, original = [], train.loss_and_gradient
    monkeypatch.setattr(train, 'loss_and_gradient', lambda *args: (found.append(1), original(*args))[1])
    return found


@pytest.fixture(params=[1, 2])
def threads(request):
    "PyTorch's number of threads, put back afterwards"
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_fit_by_hand_is_as_near_to_float64_as_autograd(small, calls, threads):
    class Double(nn.Module):
        "A model that computes in float64"
        def __init__(self, model):
            super().__init__()
            self.model = model.double()
        def forward(self, x): return self.model(x.double())
    by_hand, by_autograd = (trained(ImageClassifier(seed=0), small, b) for b in (False, True))
    exact = trained(Double(ImageClassifier(seed=0)), small)
    assert len(calls) == 2 * len(dataloaders(small).train)
    assert weights_sha256(by_hand) != weights_sha256(by_autograd)
    for model in (by_hand, by_autograd):
        for p, q in zip(model.parameters(), exact.parameters()):
            torch.testing.assert_close(p.double(), q, atol=1e-6, rtol=0)


def test_the_same_threads_give_the_same_bits_and_are_given_back(small, threads):
    first, second = (trained(ImageClassifier(seed=0), small) for _ in range(2))
    assert weights_sha256(first) == weights_sha256(second)
    assert torch.get_num_threads() == threads
    with pytest.raises(IndexError): trained(ImageClassifier(classes=3, seed=0), small)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize('n', [1, 7, 50, 128])
def test_any_number_of_images_has_its_gradient(small, n, threads):
    x, y, model = small.x_train[:n].float() / 255, small.y_train[:n], ImageClassifier(seed=0)
    with Threads() as t:
        loss, logits = loss_and_gradient(model, x, y, t)
        assert torch.equal(logits, logits_by_hand(model, x, t))
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    wanted = torch.nn.functional.cross_entropy(model(x), y)
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach(), atol=1e-6, rtol=0)
    torch.testing.assert_close(logits, model(x).detach(), atol=1e-6, rtol=0)
    for p, grad in zip(model.parameters(), found): torch.testing.assert_close(grad, p.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize('where', ['weights', 'images'])
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(small, where, value):
    x, model = small.x_train[:32].float() / 255, ImageClassifier(seed=0)
    with torch.no_grad(): (x if where == 'images' else model.conv.weight)[3, 0, 2, 2] = value
    with Threads() as threads: loss, logits = loss_and_gradient(model, x, small.y_train[:32], threads)
    assert not loss.isfinite()
    assert torch.equal(logits.isfinite().all(1), model(x).isfinite().all(1))


def test_code_that_cannot_be_kept_on_disk_iscompiled_all_the_same():
    names = {}
    exec('def twice(x): return 2 * x', names)           # from no file, so there is nothing to keep it beside
    assert compiled(names['twice'])(3) == 6


@pytest.mark.parametrize('reading', READINGS)
def test_other_readings_are_left_to_autograd(small, calls, reading):
    trained(ImageClassifier(reading=reading, seed=0), small)
    assert bool(calls) == (reading == 'gate')


def test_hooks_see_every_step_from_the_epoch_after(small, calls):
    model, seen, train = ImageClassifier(seed=0), [], dataloaders(small).train
    def watch(model, history):
        if len(history) == 1: model.fc.register_full_backward_hook(lambda *args: seen.append(1))
    fit(model, dataloaders(small), 3, device='cpu', progress=False, callbacks=[watch])
    assert len(calls) == len(train) and len(seen) == 2 * len(train)


@pytest.mark.parametrize('what', ['weights', 'images'])
def test_another_order_in_memory_is_no_matter(small, what):
    class Last:
        "A loader of images in channels_last order"
        def __init__(self, dl): self.dl, self.sampler = dl, dl.sampler
        def __len__(self): return len(self.dl)
        def __iter__(self): return ((x.to(memory_format=torch.channels_last), y) for x, y in self.dl)

    plain, model = trained(ImageClassifier(seed=0), small), ImageClassifier(seed=0)
    if what == 'weights': trained(model.to(memory_format=torch.channels_last), small)
    else: trained(model, small, wrap=Last)
    for p, q in zip(plain.parameters(), model.parameters()): torch.testing.assert_close(p, q, atol=1e-6, rtol=0)
