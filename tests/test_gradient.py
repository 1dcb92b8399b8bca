"""The gradient by hand is used where it may be, and nobody can tell"""
import pytest
import torch
from torch import nn

from cifar_nbdev.data import dataloaders
from cifar_nbdev.gradient import loss_and_gradient, rows_in_pairs
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


@pytest.fixture
def in_pairs(monkeypatch):
    "Says whether rows are computed in pairs, whatever the processor"
    return lambda yes: monkeypatch.setattr('cifar_nbdev.gradient.rows_in_pairs', lambda conv: yes)


@pytest.mark.parametrize('threads', [1, 2])
def test_row_by_row_fit_gives_the_bits_of_autograd(small, calls, threads, in_pairs):
    in_pairs(False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try: by_hand, other = (trained(ImageClassifier(seed=0), small, b) for b in (False, True))
    finally: torch.set_num_threads(before)
    assert weights_sha256(by_hand) == weights_sha256(other)
    assert len(calls) == 2 * len(dataloaders(small).train)


@pytest.mark.parametrize('threads', [1, 2])
def test_in_pairs_fit_is_as_near_to_float64_as_autograd(small, threads, in_pairs):
    class Double(nn.Module):
        "A model that computes in float64"
        def __init__(self, model):
            super().__init__()
            self.model = model.double()
        def forward(self, x): return self.model(x.double())
    in_pairs(True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        by_hand, by_autograd = (trained(ImageClassifier(seed=0), small, b) for b in (False, True))
        exact = trained(Double(ImageClassifier(seed=0)), small)
    finally: torch.set_num_threads(before)
    assert weights_sha256(by_hand) != weights_sha256(by_autograd)
    for model in (by_hand, by_autograd):
        for p, q in zip(model.parameters(), exact.parameters()):
            torch.testing.assert_close(p.double(), q, atol=1e-6, rtol=0)


@pytest.mark.parametrize('n', [1, 7, 50, 128])
def test_in_pairs_any_number_of_images_has_its_gradient(small, n):
    x, y, model = small.x_train[:n].float() / 255, small.y_train[:n], ImageClassifier(seed=0)
    loss_and_gradient(model, x, y, pairs=True)
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    for p, grad in zip(model.parameters(), found): torch.testing.assert_close(grad, p.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize('sizes, wanted', [({}, True), (dict(channels=5), True), (dict(channels=4), False),
                                           (dict(channels=7), False), (dict(kernel_size=4), False)])
@pytest.mark.parametrize('processor', ['AVX2', 'AVX512', 'DEFAULT'])
def test_rows_go_in_pairs_where_that_fills_vectors_of_eight(monkeypatch, processor, sizes, wanted):
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: processor)
    assert rows_in_pairs(ImageClassifier(**sizes, seed=0).conv) == (wanted and processor == 'AVX2')


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
