"""The compiled step does what `train_step` does, or says in one line why not; and nothing can stop it"""
import functools, math, os, threading, warnings
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numba.core.caching import CacheImpl, IndexDataCacheFile
from torch import nn

from cifar_nbdev import compiled, machine
from cifar_nbdev.compiled import available, compiled_step, why_not
from cifar_nbdev.machine import machine_code, one_thread, parts, run_parts
from cifar_nbdev.model import ImageClassifier
from cifar_nbdev.readings import READINGS
from cifar_nbdev.train import train_step
from conftest import python


@pytest.fixture(params=[1, 2])
def threads(request):
    "PyTorch's number of threads, put back afterwards"
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def batches(data, bs=128, dtype=torch.float32):
    return [((x.float() / 255).to(dtype), y) for x, y in zip(data.x_train.split(bs), data.y_train.split(bs))]


def weights(model): return torch.cat([p.detach().flatten() for p in model.parameters()])


def sgd(model, lr=.01): return torch.optim.SGD(model.parameters(), lr=lr, momentum=.9, weight_decay=5e-4)


def trained(step, batches, epochs=2, seed=0, model=None, around=False):
    "All weights after some epochs"
    model = ImageClassifier(seed=seed) if model is None else model
    opt = sgd(model)
    for _ in range(epochs):
        with step.around() if around else one_thread():
            for xb, yb in batches: step(model, opt, xb, yb)
    return weights(model)


# ---- what it computes

def test_training_is_as_near_to_float64_as_autograd(small, threads):
    exact = trained(train_step, batches(small, dtype=torch.float64), model=ImageClassifier(seed=0).double())
    found = [trained(step, batches(small)) for step in (compiled_step, train_step)]
    assert not torch.equal(*found)
    for w in found: torch.testing.assert_close(w.double(), exact, atol=5e-6, rtol=0)


@pytest.mark.parametrize('n', [1, 7, 8, 50, 128])
def test_any_number_of_images_has_its_gradient(small, n, threads):
    (xb, yb), models = batches(small, n)[0], [ImageClassifier(seed=0) for _ in range(2)]
    (loss, logits), wanted = (step(m, sgd(m), xb, yb) for m, step in zip(models, (compiled_step, train_step)))
    assert loss.shape == () and not loss.requires_grad and not logits.requires_grad
    torch.testing.assert_close(loss, wanted[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(logits, wanted[1], atol=1e-6, rtol=0)
    for p, q in zip(*(m.parameters() for m in models)):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(p, q, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize('where', ['weights', 'images'])
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(small, where, value):
    (xb, yb), model = batches(small, 32)[0], ImageClassifier(seed=0)
    with torch.no_grad(): (xb if where == 'images' else model.conv.weight)[3, 0, 2, 2] = value
    wanted = model(xb).isfinite().all(1)
    loss, logits = compiled_step(model, sgd(model), xb, yb)
    assert not loss.isfinite() and torch.equal(logits.isfinite().all(1), wanted)


@pytest.mark.parametrize('value', [1e8, -1e30, 3e38])
def test_equal_logits_far_from_zero_have_loss_log_10(small, value):
    model, (xb, yb) = ImageClassifier(seed=0), batches(small)[0]
    with torch.no_grad(): model.fc.weight.zero_(); model.fc.bias.fill_(value)
    loss, logits = compiled_step(model, sgd(model), xb, yb)
    assert abs(loss.item() - math.log(10)) < 1e-5 and (logits == torch.tensor(value)).all()
    assert model.fc.bias.grad.abs().max() < 1


@pytest.mark.parametrize('what', ['weights', 'images', 'labels'])
def test_another_order_in_memory_is_no_matter(small, what):
    model, plain = ImageClassifier(seed=0), trained(compiled_step, batches(small))
    def turned(t):
        return t.repeat_interleave(2)[::2] if t.ndim == 1 else t.to(memory_format=torch.channels_last)
    if what == 'weights': model.to(memory_format=torch.channels_last)
    found = [(turned(x) if what == 'images' else x, turned(y) if what == 'labels' else y)
             for x, y in batches(small)]
    assert torch.equal(plain, trained(compiled_step, found, model=model))


def test_the_default_dtype_of_the_session_is_no_matter(small):
    plain, model, found = trained(compiled_step, batches(small)), ImageClassifier(seed=0), batches(small)
    torch.set_default_dtype(torch.float64)
    try: assert torch.equal(plain, trained(compiled_step, found, model=model))
    finally: torch.set_default_dtype(torch.float32)


# ---- what it refuses

def replace(owner, name, value): return lambda m: setattr(owner(m), name, value)

REFUSED = {
    'subclass': (lambda m: setattr(m, '__class__', READINGS['no gate']), 'wanted an ImageClassifier'),
    'dilation': (lambda m: setattr(m, 'conv', nn.Conv2d(3, 12, 5, dilation=2)), 'dilation=(2, 2)'),
    'padding': (lambda m: setattr(m.conv, 'padding', (1, 1)), 'padding=(1, 1)'),
    'no bias': (lambda m: setattr(m, 'fc', nn.Linear(4704, 10, bias=False)), 'no bias'),
    'head of two': (lambda m: setattr(m, 'fc', nn.Sequential(m.fc)), 'fc Sequential'),
    'no layer': (lambda m: setattr(m, 'gate', None), 'its layers are'),
    'kernels': (lambda m: setattr(m.conv, 'weight', nn.Parameter(torch.zeros(12, 3, 3, 3))),
                'wanted [(12, 3, 5, 5)'),
    'frozen': (lambda m: m.fc.requires_grad_(False), 'frozen'),
    'float64': (lambda m: m.double(), 'float64'),
    'elsewhere': (lambda m: m.to('meta'), 'on meta'),
    'shared': (lambda m: setattr(m.gate, 'bias', nn.Parameter(torch.zeros(2))) or
               setattr(m, 'fc', nn.Linear(4704, 2)) or setattr(m.fc, 'bias', m.gate.bias), 'share'),
    'forward hook': (lambda m: m.fc.register_forward_hook(print), 'Linear has a hook'),
    'backward hook': (lambda m: m.register_full_backward_hook(print), 'ImageClassifier has a hook'),
    'parameter hook': (lambda m: m.fc.weight.register_hook(print), 'has a hook'),
    'after-gradient hook': (lambda m: m.conv.bias.register_post_accumulate_grad_hook(print), 'has a hook'),
    'its forward': (lambda m: setattr(m, 'forward', lambda x: m.fc(x)), 'forward of this ImageClassifier'),
    'a layer\'s forward': (lambda m: setattr(m.fc, 'forward', lambda h: 3 * h), 'forward of this Linear'),
    'its gates': (lambda m: setattr(m, 'gates', lambda x: x), 'gates of this ImageClassifier')}


@pytest.mark.parametrize('what', REFUSED)
def test_a_model_that_is_not_as_built_is_refused_in_one_line(small, what):
    model, (change, words) = ImageClassifier(seed=0), REFUSED[what]
    opt = sgd(model)
    change(model)
    assert words in why_not(model)
    with pytest.raises(ValueError) as e: compiled_step(model, opt, *batches(small)[0])
    assert words in str(e.value) and 'step=train_step' in str(e.value) and len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize('model', [nn.Sequential(ImageClassifier(seed=0)), ImageClassifier(channels=5),
                                   ImageClassifier(kernel_size=3), *(c(seed=0) for c in READINGS.values())])
def test_other_models_are_refused(model):
    assert bool(why_not(model)) == (type(model) is not ImageClassifier or model.conv.kernel_size == (3, 3)
                                    or model.conv.out_channels == 10)


@pytest.mark.parametrize('sizes', [{}, dict(branches=1, channels=18, classes=7),
                                   dict(branches=6, channels=1)])
def test_the_sizes_that_it_takes(sizes): assert why_not(ImageClassifier(**sizes)) == ''


@pytest.mark.parametrize('owner, name, new', [
    (F, 'relu', F.leaky_relu), (F, 'cross_entropy', F.multi_margin_loss), (nn.Linear, 'forward', nn.Identity.forward),
    (F, 'conv2d', lambda *args: 0), (F, 'linear', torch.conv2d), (torch, 'einsum', lambda *args: 0),
    (torch.Tensor, 'backward', lambda self: None), (nn.Module, '_call_impl', lambda self, x: x),
    (nn.Conv2d, '_call_impl', lambda self, x: x)])
def test_another_function_in_its_place_is_noticed(monkeypatch, owner, name, new):
    monkeypatch.setattr(owner, name, new)
    assert 'has been replaced' in why_not(ImageClassifier(seed=0))


@pytest.mark.parametrize('mode, said', [(torch.no_grad, 'no_grad'), (torch.inference_mode, 'no_grad'),
                                        (torch.overrides.BaseTorchFunctionMode, 'BaseTorchFunctionMode')])
def test_a_mode_is_noticed(mode, said):
    model = ImageClassifier(seed=0)
    with mode(): assert said in why_not(model)
    assert not why_not(model)


def test_layers_may_have_their_parameters_in_any_order_but_no_others(small):
    model = ImageClassifier(seed=0)
    nn.utils.weight_norm(model.gate); nn.utils.remove_weight_norm(model.gate)
    want = trained(compiled_step, batches(small))
    torch.testing.assert_close(trained(compiled_step, batches(small), model=model).sort()[0], want.sort()[0])
    model.conv.scale = nn.Parameter(torch.ones(1))
    assert 'more parameters' in why_not(model)


def test_gradients_are_added_where_they_are_kept(small):
    class Twice(torch.optim.SGD):                       # a step for two batches
        n = 0
        def zero_grad(self, *args):
            self.n += 1
            if self.n % 2: super().zero_grad(*args)
        def step(self, *args):
            if not self.n % 2: super().step(*args)
    ends = []
    for step in (train_step, compiled_step):
        model = ImageClassifier(seed=0)
        opt = Twice(model.parameters(), lr=.05)
        for xb, yb in batches(small) * 2: step(model, opt, xb, yb)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends, atol=1e-6, rtol=0)


def patched(old): return functools.wraps(old)(lambda *args, **kwargs: old(*args, **kwargs))

@pytest.mark.parametrize('owner, name', [(ImageClassifier, 'forward'), (ImageClassifier, 'gates'),
                                         (ImageClassifier, '__call__'), (nn.Module, '__call__'),
                                         (nn.Linear, 'forward'), (nn.Conv2d, '_conv_forward'),
                                         (F, 'cross_entropy'), (F, 'relu')])
def test_a_class_or_function_that_was_replaced_is_noticed(monkeypatch, owner, name):
    old = getattr(owner, name)
    for new in (patched(old), functools.partial(old)):
        monkeypatch.setattr(owner, name, new)
        assert f'{name} has been replaced' in why_not(ImageClassifier(seed=0))
    monkeypatch.setattr(owner, name, old)
    assert not why_not(ImageClassifier(seed=0))


def test_a_class_that_was_replaced_before_the_import_is_noticed(tmp_path):
    code = '''if True:
        from fastcore.basics import patch
        from cifar_nbdev.model import ImageClassifier
        @patch
        def gates(self: ImageClassifier, x): return x.new_ones(len(x), 2)
        from cifar_nbdev.compiled import why_not
        print(why_not(ImageClassifier(seed=0)))'''
    assert python(code, cwd=tmp_path).stdout.strip() == 'ImageClassifier.gates has been replaced'


def test_modes_and_hooks_of_all_modules_are_noticed():
    model = ImageClassifier(seed=0)
    with torch.autocast('cpu'): assert why_not(model) == 'autocast is on'
    hook = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try: assert why_not(model) == 'all modules have a hook'
    finally: hook.remove()
    assert why_not(model) == ''


def test_looking_costs_little():
    import timeit
    model = ImageClassifier(seed=0)
    assert min(timeit.repeat(lambda: why_not(model), number=100, repeat=5)) / 100 < 2e-4       # mostly 25 us


@pytest.mark.parametrize('change, kind, words', [
    (lambda x, y: (x[:, :1], y), ValueError, '(B, 3, 32, 32)'),
    (lambda x, y: (x[0], y), ValueError, '(B, 3, 32, 32)'),
    (lambda x, y: (x[:0], y[:0]), ValueError, 'B at least 1'),
    (lambda x, y: (x.double(), y), ValueError, 'wanted float32'),
    (lambda x, y: (x.to('meta'), y), ValueError, 'on meta'),
    (lambda x, y: (x.requires_grad_(), y), ValueError, 'no gradient'),
    (lambda x, y: (x, y[1:]), ValueError, 'wanted int64 (128,)'),
    (lambda x, y: (x, y[:, None]), ValueError, 'wanted int64 (128,)'),
    (lambda x, y: (x, y.float()), ValueError, 'labels are torch.float32'),
    (lambda x, y: (x, y + 1), IndexError, 'wanted 0 to 9'),
    (lambda x, y: (x, y - 100), IndexError, 'labels go from -100 to')])
def test_batches_that_it_cannot_take(small, change, kind, words):
    model = ImageClassifier(seed=0)
    before, threads = weights(model), torch.get_num_threads()
    with pytest.raises(kind) as e: compiled_step(model, sgd(model), *change(*batches(small)[0]))
    assert words in str(e.value) and len(str(e.value).splitlines()) == 1
    assert torch.equal(weights(model), before) and torch.get_num_threads() == threads


# ---- threads

def test_the_number_of_threads_does_not_change_the_bits(small):
    before, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 9):
            torch.set_num_threads(n)
            found += [trained(compiled_step, batches(small), around=around) for around in (True, False)]
            assert torch.get_num_threads() == n
    finally: torch.set_num_threads(before)
    assert all(torch.equal(found[0], f) for f in found)


def test_it_works_on_as_many_threads_as_pytorch_has(monkeypatch):
    before, seen = torch.get_num_threads(), {}
    monkeypatch.setattr(machine, 'machine_code', lambda f, *args: f)
    def note(part, start, stop): seen.setdefault(threading.get_ident(), []).append(part); barrier.wait(20)
    try:
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            for held in (False, True):
                seen.clear(); barrier = threading.Barrier(n)         # passes only if there are n at once
                with one_thread() if held else warnings.catch_warnings(): run_parts(note, 8)
                assert len(seen) == n and sorted(sum(seen.values(), [])) == list(range(8))
    finally: torch.set_num_threads(before)


def test_an_error_in_a_part_comes_out(monkeypatch, threads):
    monkeypatch.setattr(machine, 'machine_code', lambda f, *args: f)
    def bad(part, start, stop):
        if part == 7: raise MemoryError('no room')
    with pytest.raises(MemoryError, match='no room'): run_parts(bad, 8)


def test_parts_cover_a_batch():
    for n in (1, 2, 7, 8, 9, 80, 128):
        cuts = parts(n)
        assert len(cuts) == min(n, 8) and [c[1] for c in cuts[1:]] == [c[2] for c in cuts[:-1]]
        assert cuts[0][1] == 0 and cuts[-1][2] == n and all(b > a for _, a, b in cuts)


def test_two_trainings_at_once_get_the_bits_that_each_gets_alone(small, threads):
    def run(seed):
        return trained(compiled_step, batches(small), 4, seed, around=True), torch.get_num_threads()
    alone = [run(seed) for seed in (0, 1)]
    with ThreadPoolExecutor(2) as pool: both = list(pool.map(run, (0, 1, 0, 1)))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(alone * 2, both))
    assert torch.get_num_threads() == threads and len({n for _, n in both}) == 1


def test_the_limit_is_for_one_thread_alone_and_ends_with_an_error(small, threads):
    def elsewhere(): return threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    found, model = [], ImageClassifier(seed=0)
    for inside in (False, True):
        with one_thread() if inside else warnings.catch_warnings():
            assert torch.get_num_threads() == (1 if inside else threads)
            t = elsewhere(); t.start(); t.join()
    assert found[0] == found[1]
    with pytest.raises(ZeroDivisionError):
        with compiled_step.around():
            compiled_step(model, sgd(model), *batches(small)[0])
            raise ZeroDivisionError
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork here')
def test_a_forked_process_starts_threads_of_its_own(tmp_path):
    code = '''if True:
        import os, torch
        from cifar_nbdev.compiled import compiled_step
        from cifar_nbdev.model import ImageClassifier
        torch.set_num_threads(2)
        models = [ImageClassifier(seed=0) for _ in range(2)]
        x, y = torch.linspace(0, 1, 16*3*32*32).view(16, 3, 32, 32), torch.arange(16) % 10
        def go(): return compiled_step(m := models.pop(), torch.optim.SGD(m.parameters()), x, y)[0].item()
        with compiled_step.around():        # OpenMP's own threads do not live through a fork
            loss, pid = go(), os.fork()
            if not pid: os._exit(0 if go() == loss else 3)
        print(os.waitpid(pid, 0)[1])'''
    assert python(code, cwd=tmp_path).stdout.strip() == '0'


# ---- the compiler and its cache: the loops in new processes, and what can go wrong with a small function

STEPS = '''if True:
    import hashlib, sys, torch
    from cifar_nbdev.compiled import available, compiled_step
    from cifar_nbdev.model import ImageClassifier
    model = ImageClassifier(seed=0)
    opt = torch.optim.SGD(model.parameters(), lr=.1, momentum=.9)
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        xb, yb = torch.rand(64, 3, 32, 32, generator=g), torch.randint(10, (64,), generator=g)
        compiled_step(model, opt, xb, yb)
    h = hashlib.sha256(b''.join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    print(h, available())
'''

def bits(folder, code=STEPS, **env):
    "What the steps print, and the lines that the package wrote on standard error"
    r = python(code, cwd=folder, NUMBA_CACHE_DIR=folder / 'cache', **env)
    assert r.returncode == 0, r.stderr
    said = [line for line in r.stderr.splitlines() if 'cifar_nbdev: ' in line or 'RuntimeWarning' in line]
    return r.stdout.strip(), said


def test_cold_warm_and_damaged_caches_give_the_same_bits(tmp_path):
    with ThreadPoolExecutor(2) as pool: (out, said), other = pool.map(bits, [tmp_path] * 2)  # both compile
    files = list((tmp_path / 'cache').rglob('*.nb?'))
    assert out.endswith('True') and other[0] == out and len(files) == 2
    said = [*said, *other[1]]
    assert said and all(str(files[0].parent) in line and 'for the next time' in line for line in said)
    assert bits(tmp_path, OMP_NUM_THREADS=1) == (out, [])
    for f in files: f.write_bytes(f.read_bytes()[:20])
    silent = STEPS.replace('import hashlib', 'sys = __import__("sys"); sys.stderr = None; import hashlib')
    assert bits(tmp_path, silent) == (out, [])
    assert not list((tmp_path / 'cache').rglob('*.nb?'))


def doubled(part, start, stop, x):
    for i in range(start, stop): x[i] *= 2


def doubles(folder=None):
    "Use a function as if for the first time in this process; the line that is said, if one is"
    machine._made.pop(doubled, None)
    x = np.ones(4, np.float32)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        machine_code(doubled, x)(0, 1, 3, x)
    assert x.tolist() == [1, 2, 2, 1] and len(said) <= 1
    line = str(said[0].message) if said else ''
    assert len(line.splitlines()) <= 1 and (not line or str(folder) in line and 'doubled' in line)
    return line


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "A cache folder with compiled code in it"
    monkeypatch.setattr(numba.config, 'CACHE_DIR', str(tmp_path / 'cache'))
    assert doubles() == '' and len(list((tmp_path / 'cache').rglob('*doubled*.nb?'))) == 2
    assert doubles() == ''
    return tmp_path / 'cache'


@pytest.mark.parametrize('ending', ['nbi', 'nbc', 'nb?'])
@pytest.mark.parametrize('damage', [lambda b: b[:20], lambda b: b[:-5], lambda b: b'', lambda b: b'what?'])
def test_a_damaged_cache_is_said_in_one_line_and_made_anew(cache, ending, damage):
    other = cache / 'compiled.other-1.py311.nbi'
    other.touch()
    for f in cache.rglob(f'*doubled*.{ending}'): f.write_bytes(damage(f.read_bytes()))
    assert 'for this process alone' in doubles(cache)
    assert not list(cache.rglob('*doubled*.nb?')) and other.exists()
    assert doubles() == '' and len(list(cache.rglob('*doubled*.nb?'))) == 2 and doubles() == ''


def test_an_index_without_its_data_is_no_more_than_a_new_start(cache):
    for f in cache.rglob('*doubled*.nbc'): f.unlink()
    assert doubles() == '' and len(list(cache.rglob('*doubled*.nbc'))) == 1


@pytest.mark.parametrize('error', [OSError(28, 'Disk full'), PermissionError(13, 'Not permitted')])
def test_a_cache_that_cannot_be_written_is_said_in_one_line(cache, monkeypatch, error):
    def save(*args): raise error
    monkeypatch.setattr(IndexDataCacheFile, 'save', save)
    for f in cache.rglob('*doubled*'): f.unlink()
    assert error.strerror in doubles(cache)


def test_no_folder_for_a_cache_at_all(cache, monkeypatch):
    monkeypatch.setattr(CacheImpl, '_locator_classes', [])
    assert 'no locator' in doubles(cache)


def test_without_jit_there_is_no_machine_code(monkeypatch):
    monkeypatch.setattr(numba.config, 'DISABLE_JIT', 1)
    monkeypatch.setattr(machine, '_made', {})
    with pytest.warns(RuntimeWarning, match='NUMBA_DISABLE_JIT is set'): assert not available()


def test_without_a_compiler_it_is_the_plain_step_and_one_line_says_so(small, monkeypatch, threads):
    def njit(**options): raise ImportError('LLVM is not here\nand more')
    monkeypatch.setattr(machine.numba, 'njit', njit)
    monkeypatch.setattr(machine, '_made', {})
    with pytest.warns(RuntimeWarning) as said: found = trained(compiled_step, batches(small), around=True)
    line, = (str(w.message) for w in said)
    assert '_forward_backward (ImportError: LLVM is not here)' in line and len(line.splitlines()) == 1
    assert not available()
    with compiled_step.around(): assert torch.get_num_threads() == threads
    plain = ImageClassifier(seed=0)
    assert torch.equal(found, trained_plainly(plain, batches(small)))


def trained_plainly(model, batches):
    opt = sgd(model)
    for _ in range(2):
        for xb, yb in batches: train_step(model, opt, xb, yb)
    return weights(model)


def test_several_threads_may_ask_at_once(monkeypatch):
    calls = []
    monkeypatch.setattr(machine, '_made', {})
    monkeypatch.setattr(machine, '_compile', lambda f, args: (calls.append(f) or f, ''))
    with ThreadPoolExecutor(4) as pool: assert all(pool.map(lambda _: available(), range(8)))
    assert calls == [compiled._forward_backward]
