"""What the user's object says is what is computed; callbacks, checkpoints and errors of `fit` and `evaluate`"""
import math, threading, zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastcore.basics import patch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from cifar_nbdev.checkpoint import describe_batches
from cifar_nbdev.compiled import compiled_step
from cifar_nbdev.data import dataloaders
from cifar_nbdev.files import reference_arithmetic
from cifar_nbdev.model import ImageClassifier
from cifar_nbdev.readings import READINGS
from cifar_nbdev.runs import load_weights, save_weights
from cifar_nbdev.train import NonFiniteLossError, cosine, evaluate, fit, train_step

fit = partial(fit, device='cpu', progress=False)


def weights(model): return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(data, epochs=2, model=None, **kwargs):
    "Weights after a few epochs"
    model = model or ImageClassifier(seed=0)
    fit(model, kwargs.pop('dls', None) or dataloaders(data), epochs, kwargs.pop('lr', .05), **kwargs)
    return weights(model)


def agrees(model, data):
    "Does `evaluate` say what the model itself gives?"
    x, y = data.x_test.float() / 255, data.y_test
    with torch.no_grad(): want = F.cross_entropy(model(x), y).item()
    assert evaluate(model, dataloaders(data).test)[0] == pytest.approx(want, abs=1e-5)


# What the user's object does

def test_a_patched_class_counts(small, monkeypatch):
    before, old = trained(small), ImageClassifier.gates
    try:
        @patch
        def gates(self: ImageClassifier, x): return x.new_ones(len(x), 2)
        agrees(ImageClassifier(seed=0), small)
        assert not torch.equal(trained(small), before)
        with pytest.raises(ValueError, match='step=train_step'): trained(small, step=compiled_step)
    finally:
        ImageClassifier.gates = old
        if hasattr(ImageClassifier, '_orig_gates'): del ImageClassifier._orig_gates       # `patch` keeps it
    assert torch.equal(trained(small), before)


def test_a_patched_layer_counts(small):
    model = ImageClassifier(seed=0)
    old = model.fc.forward
    model.fc.forward = lambda h: 3 * old(h)
    agrees(model, small)
    with pytest.raises(ValueError, match='step=train_step'): fit(model, dataloaders(small), 1, step=compiled_step)


@pytest.mark.parametrize('step', [train_step, compiled_step])
def test_a_patched_loss_counts_or_is_refused(small, monkeypatch, step):
    real, x, y = F.cross_entropy, small.x_test.float() / 255, small.y_test
    monkeypatch.setattr(F, 'cross_entropy', lambda a, b, **k: real(a, b, label_smoothing=.5, **k))
    try: row = fit(ImageClassifier(seed=0), ([(x, y)], [(x, y)]), 1, 1e-9, step=step).epochs[0]
    except ValueError as e: assert step is compiled_step and 'train_step' in str(e)
    else: assert step is train_step and row['train_loss'] == pytest.approx(row['test_loss'], abs=1e-4)


@pytest.mark.parametrize('step', [train_step, compiled_step])
def test_logits_far_from_zero(small, step):
    model, x, y = ImageClassifier(seed=0), small.x_test.float() / 255, small.y_test
    with torch.no_grad(): model.fc.weight.zero_(); model.fc.bias.fill_(1e8)
    row = fit(model, ([(x, y)], [(x, y)]), 1, 1e-12, step=step).epochs[0]
    assert row['train_loss'] == pytest.approx(math.log(10), abs=1e-3)


def test_a_session_in_float64_does_no_harm(small):
    model = ImageClassifier(seed=0)
    before = trained(small)
    torch.set_default_dtype(torch.float64)
    try: assert torch.equal(trained(small, model=model), before)
    finally: torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('reading', READINGS)
def test_the_mode_of_every_layer_is_put_back(small, reading):
    model = READINGS[reading](seed=0)
    model.fc.eval()
    modes = [m.training for m in model.modules()]
    evaluate(model, dataloaders(small).test)
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(ValueError): evaluate(model, [(torch.zeros(2, 1, 28, 28), torch.zeros(2, dtype=torch.long))])
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize('step', [train_step, compiled_step])
@pytest.mark.parametrize('label', [10, -1, -100])
def test_labels_out_of_range_are_refused_alike(small, step, label):
    x, y = small.x_test.float() / 255, small.y_test.clone()
    y[3] = label
    model, batches = ImageClassifier(seed=0), ([(x, y)], [(x, y)])
    if label != -100 or step is compiled_step:
        with pytest.raises(IndexError): fit(model, batches, 1, step=step)
    else:                                               # PyTorch's own mark for images that do not count
        rest = y != label
        fit(model, batches, 1, step=step)
        fit(other := ImageClassifier(seed=0), ([(x[rest], y[rest])], batches[1]), 1, step=step)
        torch.testing.assert_close(weights(model), weights(other), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize('step', [train_step, compiled_step])
def test_a_batch_in_which_nothing_counts_is_named(small, step):
    x, y = small.x_test.float() / 255, small.y_test
    for test in ([(x, y), (x[:0], y[:0])], [(x, y), (x, y*0 - 100)]):
        with pytest.raises(NonFiniteLossError, match='batch 2 of the test images has none with a label'):
            fit(ImageClassifier(seed=0), ([(x, y)], test), 1, device='cpu', step=step)


def test_batches_may_come_from_anywhere_but_must_come(small):
    model, test = ImageClassifier(seed=0), dataloaders(small).test
    assert evaluate(model, list(test)) == evaluate(model, test)
    for none in ([], (b for b in test)):
        with pytest.raises(ValueError, match='list or a DataLoader'): evaluate(model, none)
        with pytest.raises(ValueError, match='list or a DataLoader'): fit(model, (none, test), 1)


# Several at once

@pytest.mark.parametrize('step', [train_step, compiled_step])
def test_two_fits_at_once_give_what_each_gives_alone(small, step):
    def go(seed): return trained(small, 3, ImageClassifier(seed=seed), dls=dataloaders(small, seed=seed), step=step)
    threads, alone = torch.get_num_threads(), [go(0), go(1)]
    for _ in range(3):
        with ThreadPoolExecutor(2) as pool: both = list(pool.map(go, (0, 1)))
        assert all(torch.equal(a, b) for a, b in zip(alone, both)) and torch.get_num_threads() == threads


def test_reference_arithmetic_leaves_no_trace_however_trainings_overlap():
    def state(): return (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark,
                         torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32)
    torch.backends.cudnn.benchmark, before = True, None
    try:
        before, first, second = state(), threading.Event(), threading.Event()
        def a():
            with reference_arithmetic(): first.set(); second.wait(5)
        thread = threading.Thread(target=a)
        thread.start(); first.wait(5)
        with reference_arithmetic():                    # begins second, ends second
            second.set(); thread.join()
            assert state() == ('highest', False, True, False)
        assert state() == before
    finally: torch.backends.cudnn.benchmark = False


# Callbacks

class Watch:
    "Writes down what it is told"
    def __init__(self): self.seen = []
    def before_fit(self, t): self.seen.append('before')
    def after_batch(self, t): self.seen.append((t.losses > 0).sum().item())
    def after_epoch(self, t): self.seen.append(f'epoch {len(t.history)}')
    def after_fit(self, t): self.seen.append('after')


def test_callbacks_are_told(small):
    watch = Watch()
    trained(small, callbacks=[watch])
    assert watch.seen == ['before', 1, 2, 3, 'epoch 1', 1, 2, 3, 'epoch 2', 'after']


@pytest.mark.parametrize('error', [None, KeyboardInterrupt, ZeroDivisionError])
def test_the_end_is_told_whatever_ends_it(small, error):
    def stop(model, history):
        if error: raise error
        return True
    watch = Watch()
    if error is ZeroDivisionError:
        with pytest.raises(error): trained(small, callbacks=[watch, stop])
    else:
        h = fit(ImageClassifier(seed=0), dataloaders(small), 9, callbacks=[watch, stop])
        assert (len(h), h.interrupted) == (1, error is not None) and ('interrupted' in repr(h)) == h.interrupted
    assert watch.seen[-1] == 'after'


def test_a_callback_that_is_no_list_is_named(small):
    with pytest.raises(ValueError, match='callbacks is .*wanted a list'): trained(small, callbacks=print)


def test_a_schedule_of_any_kind(small):
    model, rates = ImageClassifier(seed=0), []
    class Rates:
        def after_batch(self, t): rates.append(t.opt.param_groups[0]['lr'])
    fit(model, dataloaders(small), 4, 1, schedule=partial(lambda done, w: min(1, done + w), w=.25), callbacks=[Rates()])
    assert rates[::3] == [.25, .5, .75, 1]
    start = weights(ImageClassifier(seed=0))
    assert torch.equal(trained(small, schedule=lambda done: 0), start)


# Checkpoints

@pytest.mark.parametrize('step', [train_step, compiled_step])
@pytest.mark.parametrize('schedule', [None, cosine])
def test_going_on_gives_the_same_bits(small, tmp_path, step, schedule):
    def stop(model, history): return len(history) == 2
    more = dict(step=step, schedule=schedule)
    trained(small, 4, checkpoint=tmp_path/'c', callbacks=[stop], **more)
    assert torch.equal(trained(small, 4, ImageClassifier(seed=1), checkpoint=tmp_path/'c', **more), trained(small, 4, **more))


def test_going_on_gives_the_same_bits_when_global_chance_is_drawn_from(small, tmp_path):
    def model(): return nn.Sequential(nn.Dropout(.5), ImageClassifier(seed=0))
    images = TensorDataset(small.x_train.float() / 255, small.y_train)
    def go(epochs, seed, **kwargs):
        torch.manual_seed(seed)
        return trained(small, epochs, model(), dls=(DataLoader(images, 128, shuffle=True), dataloaders(small).test), **kwargs)
    whole = go(3, 0)
    go(1, 0, checkpoint=tmp_path/'c')
    assert torch.equal(go(3, 9, checkpoint=tmp_path/'c'), whole) and not torch.equal(go(3, 9), whole)


def test_going_on_draws_nothing_from_global_chance_that_the_training_did_not(small, tmp_path):
    trained(small, 1, checkpoint=tmp_path/'c')
    torch.manual_seed(3)
    before = torch.get_rng_state()
    trained(small, 2, checkpoint=tmp_path/'c')
    assert torch.equal(torch.get_rng_state(), before)


OTHERS = {
    'training sha256': lambda d: dict(dls=dataloaders(replace(d, y_train=d.y_train.flip(0)))),
    'test sha256': lambda d: dict(dls=dataloaders(replace(d, y_test=d.y_test.flip(0)))),
    'batch_size 128': lambda d: dict(dls=dataloaders(d, bs=64)), 'seed 0': lambda d: dict(dls=dataloaders(d, seed=9)),
    'model': lambda d: dict(model=READINGS['mix-first'](seed=0)), 'step': lambda d: dict(step=compiled_step),
    'schedule': lambda d: dict(schedule=cosine), 'momentum': lambda d: dict(momentum=.8),
    'lr 0.05': lambda d: dict(lr=.04), 'weight_decay': lambda d: dict(weight_decay=0)}

@pytest.mark.parametrize('what', OTHERS)
def test_a_checkpoint_of_another_training_is_refused_and_named(small, tmp_path, what):
    trained(small, 1, checkpoint=tmp_path/'c')
    other = OTHERS[what](small)
    model = other.setdefault('model', ImageClassifier(seed=5))
    before, file = weights(model), (tmp_path/'c').read_bytes()
    with pytest.raises(ValueError, match=what) as e: trained(small, checkpoint=tmp_path/'c', **other)
    assert len(str(e.value).splitlines()) == 1
    assert torch.equal(weights(model), before) and (tmp_path/'c').read_bytes() == file


def test_a_checkpoint_of_another_number_of_threads_is_refused(small, tmp_path, monkeypatch):
    trained(small, 1, checkpoint=tmp_path/'c')
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 77)               # additions in another order
    with pytest.raises(ValueError, match='threads .*now 77'): trained(small, checkpoint=tmp_path/'c')


def test_a_damaged_checkpoint_is_refused(small, tmp_path):
    path = tmp_path/'c'
    trained(small, 1, checkpoint=path)
    whole, model = path.read_bytes(), ImageClassifier(seed=5)
    before, rng = weights(model), torch.Generator().manual_seed(0)
    with zipfile.ZipFile(path) as z: largest = max(z.infolist(), key=lambda i: i.file_size)
    places = torch.randint(largest.header_offset + 200, largest.header_offset + largest.file_size, (20,), generator=rng)
    for at in places.tolist():
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        with pytest.raises(ValueError, match='not a whole checkpoint'): trained(small, model=model, checkpoint=path)
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize('content', [b'', b'text', {'a': 1}, ImageClassifier(seed=0).state_dict(), [1]], ids=str)
def test_what_is_no_checkpoint_is_refused(small, tmp_path, content):
    if isinstance(content, bytes): (tmp_path/'c').write_bytes(content)
    else: torch.save(content, tmp_path/'c')
    with pytest.raises(ValueError, match='not a whole checkpoint') as e: trained(small, checkpoint=tmp_path/'c')
    assert len(str(e.value).splitlines()) == 1


def _repacked(path):
    "The same files in an archive that compresses them: small on disk, as large as it likes in memory"
    with zipfile.ZipFile(path) as z: content = {i: z.read(i) for i in z.namelist()}
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, data in content.items(): z.writestr(name, data)

def _edited(path, edit):
    state = torch.load(path, weights_only=True)
    edit(state)
    torch.save(state, path)

MISFITS = {
    'compressed': _repacked,
    'momentum of another shape': lambda path: _edited(path, lambda s: s['optimizer']['state'][0].update(
        momentum_buffer=torch.zeros(2, 2))),
    'an epoch twice': lambda path: _edited(path, lambda s: s['epochs'].append(s['epochs'][0])),
    'an accuracy of 7': lambda path: _edited(path, lambda s: s['epochs'][0].update(test_acc=7.)),
    'weights of another shape': lambda path: _edited(path, lambda s: s['model'].update(
        {'gate.bias': torch.zeros(5)})),
    'no order': lambda path: _edited(path, lambda s: s.update(order=torch.zeros(3, dtype=torch.uint8)))}

@pytest.mark.parametrize('misfit', MISFITS)
def test_a_whole_checkpoint_with_misfits_is_refused_and_nothing_is_changed(small, tmp_path, misfit):
    trained(small, 1, checkpoint=tmp_path/'c')
    MISFITS[misfit](tmp_path/'c')
    model, dls, chance = ImageClassifier(seed=5), dataloaders(small), torch.get_rng_state()
    before, order = weights(model), dls.train.sampler.generator.get_state()
    with pytest.raises(ValueError) as e: trained(small, model=model, dls=dls, checkpoint=tmp_path/'c')
    assert len(str(e.value).splitlines()) == 1 and str(tmp_path/'c') in str(e.value)
    assert torch.equal(weights(model), before) and torch.equal(torch.get_rng_state(), chance)
    assert torch.equal(dls.train.sampler.generator.get_state(), order)


class Bomb:
    "A pickle that makes a file when it is loaded"
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)

def test_nothing_in_a_checkpoint_is_run(small, tmp_path):
    trained(small, 1, checkpoint=tmp_path/'c')
    _edited(tmp_path/'c', lambda state: state.update(epochs=Bomb(tmp_path/'boom')))
    with pytest.raises(ValueError, match='not a whole checkpoint'): trained(small, checkpoint=tmp_path/'c')
    assert not (tmp_path/'boom').exists()
    torch.load(tmp_path/'c', weights_only=False)
    assert (tmp_path/'boom').exists()                   # it would have gone off


def test_paths_may_begin_with_a_tilde(small, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path)); monkeypatch.setenv('USERPROFILE', str(tmp_path))
    trained(small, 1, checkpoint='~/c.pt')
    save_weights(ImageClassifier(seed=0), '~/w.safetensors')
    assert {p.name for p in tmp_path.iterdir()} == {'c.pt', 'w.safetensors'}
    load_weights(ImageClassifier(), '~/w.safetensors')


# A loss that is not finite

def broken(seed=0):
    model = ImageClassifier(seed=seed)
    with torch.no_grad(): model.gate.bias[1] = math.inf
    return model


def infinite(data):
    x = data.x_train[:64].float() / 255
    x[5, 1] = math.inf
    return [(x[:32], data.y_train[:32]), (x[32:], data.y_train[32:64])]


@pytest.mark.parametrize('step', [train_step, compiled_step])
@pytest.mark.parametrize('said, given', [
    ('gate.bias of the model', lambda d: (broken(), dataloaders(d), .01)),
    ('batch 1 of the training images', lambda d: (ImageClassifier(seed=0), (infinite(d), dataloaders(d).test), .01)),
    ('batch 1 of the test images', lambda d: (ImageClassifier(seed=0), (dataloaders(d).train, infinite(d)), .01)),
    ('with lr 1e\\+06', lambda d: (ImageClassifier(seed=0), dataloaders(d), 1e6))])
def test_a_loss_that_is_not_finite_names_its_cause(small, step, said, given):
    model, dls, lr = given(small)
    with pytest.raises(NonFiniteLossError, match=said) as e: fit(model, dls, 3, lr, step=step)
    assert len(e.value.history) == 0 and len(str(e.value).splitlines()) == 1


def test_epochs_before_a_loss_that_is_not_finite_are_kept(small):
    def explode(model, history):
        with torch.no_grad(): model.fc.bias.mul_(1e38).mul_(1e38)
    with pytest.raises(NonFiniteLossError, match='epoch 2') as e: trained(small, 3, callbacks=[explode])
    assert [r['epoch'] for r in e.value.history.epochs] == [1]


def test_standard_error_may_be_missing(small, monkeypatch):
    monkeypatch.setattr('sys.stderr', None)
    assert len(fit(ImageClassifier(seed=0), dataloaders(small), 1, progress=True)) == 1


# What is passed

@pytest.mark.parametrize('bad, said', [
    (dict(callbacks=[3]), 'callbacks has 3'), (dict(callbacks=[Watch]), 'callbacks has'), (dict(schedule='cosine'), "schedule is 'cosine'"),
    (dict(step='compiled_step'), "step is 'compiled_step'"), (dict(schedule=lambda done: -1), 'schedule gives -1'),
    (dict(schedule=lambda done: math.nan), 'schedule gives nan'), (dict(model=ImageClassifier), 'wanted an nn.Module')])
def test_what_makes_no_sense_is_named_before_training(small, bad, said):
    with pytest.raises(ValueError, match=said) as e: fit(bad.pop('model', ImageClassifier(seed=0)), dataloaders(small), 1, **bad)
    assert len(str(e.value).splitlines()) == 1


def test_a_schedule_is_asked_for_the_epochs_only(small):
    assert len(fit(ImageClassifier(seed=0), dataloaders(small), 3, schedule=lambda done: [1, .5, .1][int(done * 3)])) == 3


def test_numbers_of_numpy_are_numbers(small, tmp_path):
    def worse(model, history): history.epochs[-1]['mine'] = np.float64(1)
    for epochs in (1, 2):
        history = fit(ImageClassifier(seed=0), dataloaders(small), epochs, np.float64(.01), np.float32(.5), checkpoint=tmp_path/'c',
                      callbacks=[worse])
    assert len(history) == 2
    stop = fit(ImageClassifier(seed=0), dataloaders(small), 9, callbacks=[lambda model, history: np.float64(1) > 0])
    assert len(stop) == 1


def test_what_is_not_finite_by_intention_is_let_be(small):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = ImageClassifier(seed=0)
            self.register_buffer('mask', torch.full((2, 2), -math.inf).triu(1))
        def forward(self, x): return self.net(x)
    assert len(fit(Masked(), dataloaders(small), 1)) == 1


@pytest.mark.parametrize('default', [torch.bfloat16, torch.float64])
def test_the_sums_do_not_depend_on_the_sessions_default(small, default):
    model, want = ImageClassifier(seed=0), evaluate(ImageClassifier(seed=0), dataloaders(small).test)
    torch.set_default_dtype(default)
    try: assert evaluate(model, dataloaders(small).test) == want
    finally: torch.set_default_dtype(torch.float32)


def test_a_checkpoint_tells_parts_and_orders_of_a_data_set_apart(small):
    data = TensorDataset(small.x_train.float() / 255, small.y_train)
    seen = [describe_batches(dl) for dl in (
        DataLoader(data, 50), DataLoader(data, 50, shuffle=True), DataLoader(Subset(data, range(100)), 50),
        DataLoader(Subset(data, range(100, 200)), 50))]
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])
