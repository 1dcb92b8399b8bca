"""Sweeps: any executor, nets of the user's own, changed code, killed workers, Ctrl-C, failing runs"""
import json, multiprocessing, os, pickle, signal, threading, time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cifar_nbdev import sweep as module, train
from cifar_nbdev.content import code_sha256
from cifar_nbdev.data import shapes10
from cifar_nbdev.fingerprint import differences, fingerprint
from cifar_nbdev.model import ImageClassifier
from cifar_nbdev.runs import load_runs, own_model
from cifar_nbdev.sweep import SweepError, check_sweep, sweep
from cifar_nbdev.train import NonFiniteLossError
from conftest import hashes, ours, python

LRS, SEEDS = (.005, .01, .0001), (0, 1)
SETTINGS = dict(epochs=6, device='cpu', progress=False)
ONE = dict(SETTINGS, epochs=1, workers=1)


@pytest.fixture(scope='module')
def data():
    "Images for runs that take a second or two"
    return shapes10(1000, 100)


@pytest.fixture(scope='module')
def expected(data):
    "Hash of the weights of each run, by learning rate and seed"
    with threads() as executor:
        return results(sweep(data, LRS, SEEDS, executor=executor, **SETTINGS))


class Pool(ProcessPoolExecutor):
    "Two processes, and how many bytes the largest of its tasks was"
    def __init__(self):
        super().__init__(2, mp_context=multiprocessing.get_context('spawn'))
        self.largest = 0

    def submit(self, fn, *args):
        self.largest = max(self.largest, len(pickle.dumps(args)))
        return super().submit(fn, *args)


def threads(): return ThreadPoolExecutor(2)


@contextmanager
def dask():
    "Dask's scheduler with two worker processes on this machine"
    distributed = pytest.importorskip('distributed',
                                      reason='Dask needs the cluster extra: pip install -e ".[cluster]"')
    with distributed.LocalCluster(2, threads_per_worker=1, processes=True,
                                  dashboard_address=None) as cluster, distributed.Client(cluster) as client:
        with client.get_executor() as executor: yield executor


def workers(executor):
    "Process numbers of the workers"
    if executor is None:
        import psutil
        return [p.pid for p in psutil.Process().children(recursive=True)
                if 'loky' in ' '.join(p.cmdline()) and 'tracker' not in ' '.join(p.cmdline())]
    if isinstance(executor, ProcessPoolExecutor): return list(executor._processes)
    return list(executor._client.run(os.getpid).values())


def results(runs): return {(r['config']['lr'], r['config']['seed']): r['weights_sha256'] for r in runs}


# executors

@pytest.mark.parametrize('make', [nullcontext, Pool, dask])
def test_any_executor_gives_the_same_runs(data, expected, tmp_path, make):
    count, random = torch.get_num_threads(), torch.get_rng_state()
    with make() as executor:
        if make is dask:
            scattered, scatter = [], executor._client.scatter
            executor._client.scatter = lambda *args, **kwargs: scattered.append(kwargs) or scatter(*args, **kwargs)
        runs = sweep(data, LRS, SEEDS, out=tmp_path, executor=executor, **SETTINGS)
        # the images do not travel with each run, but once
        if make is Pool: assert 0 < executor.largest < 5_000
        if make is dask: assert scattered == [dict(broadcast=True)]
        assert sweep(data, LRS, SEEDS, out=tmp_path, executor=executor, **SETTINGS) == runs
    assert results(runs) == results(load_runs(tmp_path)) == expected
    assert {r['env']['threads'] for r in runs} == {1}
    assert torch.get_num_threads() == count and torch.equal(torch.get_rng_state(), random)


class Elsewhere(Pool):
    "As if its processes ran on a machine that does not share our disk"
    def submit(self, fn, job, shared):
        return super().submit(fn, replace(job, out='/not/here', scratch='/nor/here'), shared)


def test_a_worker_without_our_disk_sends_its_weights_home(data, expected, tmp_path):
    with Elsewhere() as executor: runs = sweep(data, LRS, SEEDS, out=tmp_path, executor=executor, **SETTINGS)
    assert results(runs) == results(load_runs(tmp_path)) == expected
    assert len(list(tmp_path.glob('*.safetensors'))) == 6


class Forgetful(Pool):
    "Loses each result and asks again, as Dask does when the worker that holds a result dies"
    repeated = 0
    def submit(self, *args):
        first = super().submit(*args).result()
        again = super().submit(*args)
        self.repeated += again.result()[0] == first[0]      # seconds and all
        return again


def test_a_run_whose_result_was_lost_is_not_done_again(data, tmp_path):
    with Forgetful() as executor: runs = sweep(data, LRS, (0,), out=tmp_path, executor=executor, **SETTINGS)
    assert executor.repeated == 3 and all(r in load_runs(tmp_path) for r in runs)


def test_data_are_hashed_once_in_a_worker_not_once_a_run(small, tmp_path):
    job = next(iter(module._jobs(small, check_sweep((.01,), (0,), epochs=1), 'cpu', None, None).values()))
    shared = module._share(small, tmp_path, None, False, 'cpu')
    (tmp_path/'open').touch()
    job = replace(job, scratch=str(tmp_path))
    runs = [module._work(job, shared)[0] for _ in range(2)]
    assert module._images(shared, torch.device('cpu')) is module._images(shared, torch.device('cpu'))
    assert [r['data']['sha256'] for r in runs] == [small.sha256] * 2
    module._mapped.cache_clear()


def test_the_library_works_without_dask(tmp_path):
    code = ("import sys; sys.modules['distributed'] = sys.modules['dask'] = None; "
            "from cifar_nbdev.sweep import sweep; from cifar_nbdev.data import shapes10; "
            "print(len(sweep(shapes10(200, 100), (.01,), epochs=1, device='cpu')))")
    r = python(code, cwd=tmp_path)
    assert r.stdout.strip() == '1', r.stderr


# workers killed

@contextmanager
def one_killed(executor, out):
    "Kill a worker when the first run is finished and another on its way; a dict for what was finished then"
    finished, over = {}, threading.Event()
    def kill():
        while not over.is_set():
            if list(out.glob('[!.]*.json')) and list(out.glob('[!.]*.ckpt')):
                then = {k: v for k, v in hashes(out).items() if k.endswith('.json') and k[0] != '.'}
                os.kill(workers(executor)[0], signal.SIGKILL)
                return finished.update(then)
            time.sleep(.01)
    thread = threading.Thread(target=kill)
    thread.start()
    try: yield finished
    finally:
        over.set()
        thread.join()


@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='no SIGKILL on this system')
@pytest.mark.parametrize('make', [nullcontext, dask])
def test_every_run_ends_once_though_a_worker_is_killed(data, expected, tmp_path, make):
    with make() as executor, one_killed(executor, tmp_path) as finished:
        runs = sweep(data, LRS, SEEDS, out=tmp_path, workers=2, executor=executor, **SETTINGS)
    assert 1 <= len(finished) < 6 and results(runs) == expected
    after = hashes(tmp_path)
    assert len([k for k in after if k.endswith('.json')]) == 6 and {k: after[k] for k in finished} == finished


@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='no SIGKILL on this system')
def test_a_broken_pool_loses_nothing_and_the_same_call_does_the_rest(data, expected, tmp_path):
    with Pool() as executor, one_killed(executor, tmp_path) as finished:
        with pytest.raises(SweepError) as e:
            sweep(data, LRS, SEEDS, out=tmp_path, executor=executor, **SETTINGS)
    assert finished and all(isinstance(error, BrokenExecutor) for error in e.value.errors.values())
    assert len(e.value.runs) + len(e.value.errors) == 6
    assert all(name in str(e.value) for name in e.value.errors)
    with Pool() as executor: runs = sweep(data, LRS, SEEDS, out=tmp_path, executor=executor, **SETTINGS)
    assert results(runs) == expected and {k: hashes(tmp_path)[k] for k in finished} == finished


@pytest.mark.parametrize('make', [nullcontext, threads])
def test_a_failing_run_takes_no_other_with_it(data, tmp_path, make):
    with make() as executor, pytest.raises(SweepError) as e:
        sweep(data, (1e6, .01), epochs=2, device='cpu', progress=False, out=tmp_path, executor=executor)
    assert ['lr1e+06' in name for name in e.value.errors] == [True] and len(load_runs(tmp_path)) == 1
    assert isinstance(*e.value.errors.values(), NonFiniteLossError) and len(e.value.runs) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA here')
def test_runs_at_once_on_cuda_are_those_one_after_the_other(data):
    settings = dict(epochs=2, device='cuda', progress=False)
    with pytest.raises(SweepError) as e: sweep(data, (1e6, .01, .005), SEEDS, workers=4, **settings)
    alone = sweep(data, (.01, .005), SEEDS, workers=1, **settings)
    assert len(e.value.errors) == 2 and results(e.value.runs) == results(alone)
    assert {r['env']['step'] for r in e.value.runs} == {'captured_step'}


# identity, and the user's own nets

def test_other_labels_make_other_runs(small, tmp_path):
    noisy = replace(small, y_train=small.y_train.flip(0))
    with threads() as executor:
        a, b = (sweep(d, [.05], out=tmp_path, executor=executor, **ONE)[0] for d in (small, noisy))
    assert a['data']['sha256'] != b['data']['sha256'] and a['epochs'] != b['epochs']
    assert len(load_runs(tmp_path)) == 2


class Net(nn.Module):
    "Seeded"
    def __init__(self, seed, width=4):
        super().__init__()
        self.fc = nn.Linear(3072, 10)
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad(): self.fc.weight.copy_(torch.randn(10, 3072, generator=g) / 60)

    def forward(self, x): return self.fc(x.flatten(1))


@pytest.mark.parametrize('make', [Pool, threads])
def test_a_net_of_ones_own_is_swept(small, tmp_path, make):
    random = torch.get_rng_state()
    with make() as executor:
        runs = sweep(small, (.01,), SEEDS, model=lambda data, seed: Net(seed), out=tmp_path,
                     executor=executor, epochs=2, device='cpu', progress=False)
    assert len({r['weights_sha256'] for r in runs}) == 2
    assert {r['config']['reading'] for r in runs} == {'own: lambda'}
    assert torch.equal(torch.get_rng_state(), random)
    nets = [own_model(lambda data, seed: Net(seed), small, seed) for seed in SEEDS]
    assert {r['model'] for r in runs} == {code_sha256(net, weights=True) for net in nets}
    assert results(load_runs(tmp_path)) == results(runs)


def test_a_net_is_known_by_content_not_by_name(small, tmp_path):
    class Doubled(Net):
        def forward(self, x): return 2 * super().forward(x)
    def net(data, seed): return Net(seed)
    with threads() as executor:
        before = sweep(small, (.01,), model=net, out=tmp_path, executor=executor, **ONE)
    def net(data, seed): return Doubled(seed)
    after = sweep(small, (.01,), model=net, out=tmp_path, **ONE)
    assert before[0]['weights_sha256'] != after[0]['weights_sha256'] and len(load_runs(tmp_path)) == 2
    assert sweep(small, (.01,), model=net, out=tmp_path, **ONE) == after


class Scaled(Net):
    "A plain attribute counts"
    def __init__(self, scale):
        super().__init__(0)
        self.scale = scale

    def forward(self, x): return self.scale * super().forward(x)


@pytest.mark.parametrize('others', [
    lambda: [lambda data, seed, s=s: Scaled(s) for s in (1., 9.)],                  # an attribute
    lambda: [lambda data, seed, s=s: Net(seed + s) for s in (0, 1)],                # initial weights
    lambda: [lambda data, seed, s=s: nn.Sequential(nn.Flatten(), nn.Dropout(s), nn.Linear(3072, 10)) for s in (.1, .2)]])
def test_another_net_never_gets_an_old_run_back(small, tmp_path, others):
    a, b = (sweep(small, (.01,), model=f, out=tmp_path, executor=ThreadPoolExecutor(1), **ONE)[0] for f in others())
    assert a['weights_sha256'] != b['weights_sha256'] and len(load_runs(tmp_path)) == 2


def test_a_net_that_ignores_its_seed_is_the_same_each_time(small):
    def net(data, seed): return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    runs = [sweep(small, (.01,), (0, 1), model=net, executor=ThreadPoolExecutor(2), **ONE) for _ in range(2)]
    assert results(runs[0]) == results(runs[1]) and len({r['weights_sha256'] for r in runs[0]}) == 2


def test_a_net_in_half_precision_or_with_tied_weights_is_saved(small, tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3072, 3072, bias=False), nn.Linear(3072, 3072, bias=False)
            self.b.weight, self.fc = self.a.weight, nn.Linear(3072, 10).bfloat16()
        def forward(self, x): return self.fc(self.b(self.a(x.flatten(1))).bfloat16()).float()
    run = sweep(small, (1e-6,), model=lambda data, seed: Tied(), out=tmp_path, executor=ThreadPoolExecutor(1), **ONE)[0]
    assert load_runs(tmp_path) == [run] and len(list(tmp_path.glob('*.safetensors'))) == 1


@pytest.mark.parametrize('model, said', [(Net(0), 'wanted a function'), (lambda data, seed: 5, 'gives int'), (5, 'wanted a function')])
def test_what_makes_no_net_is_refused(small, model, said):
    with pytest.raises(ValueError, match=said): sweep(small, (.01,), model=model, **ONE)


def test_a_global_hook_is_noticed(small):
    before = fingerprint()
    hook = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try: assert differences(before, fingerprint()) == ['global hooks of torch.nn']
    finally: hook.remove()
    assert fingerprint() == before


def dropping(data, seed): return nn.Sequential(nn.Flatten(), nn.Dropout(.5), nn.Linear(3072, 10))


@pytest.mark.parametrize('make', [nullcontext, lambda: ThreadPoolExecutor(1)], ids=['processes', 'one thread'])
def test_a_run_draws_the_same_numbers_in_any_process_and_after_any_other(small, make):
    with make() as executor:
        more = dict(epochs=1, device='cpu', progress=False, model=dropping, executor=executor)
        both, again, alone = ([r['weights_sha256'] for r in sweep(small, (.01,), seeds, workers=w, **more)]
                              for seeds, w in (([0, 1], 1), ([0, 1], 2), ([1], 1)))
    assert both == again and both[1:] == alone and len(set(both)) == 2


def test_an_edited_net_gets_no_old_run_back(small, tmp_path):
    def run(change):
        def net(data, seed):
            change(m := Net(seed))
            return m
        with threads() as one: return sweep(small, (.01,), model=net, out=tmp_path, executor=one, **ONE)[0]
    changes = [lambda m: None, lambda m: m.requires_grad_(True).fc.bias.requires_grad_(False),
               lambda m: m.fc.register_forward_hook(lambda m, x, y: -y), lambda m: setattr(m, 'forward', Net(5).forward)]
    assert len({run(change)['weights_sha256'] for change in changes}) == len(load_runs(tmp_path)) == len(changes)


def test_a_global_that_is_named_like_an_attribute_is_no_other_code(tmp_path):
    code = ("import torch; from torch import nn; from cifar_nbdev.sweep import sweep; from cifar_nbdev.data import shapes10\n"
            "scale = 3\n"
            "class Scaled(nn.Module):\n"
            "    def __init__(self): super().__init__(); self.fc, self.scale = nn.Linear(3072, 10), 2.\n"
            "    def forward(self, x): return self.fc(x.flatten(1)) * self.scale\n"
            "print(len(sweep(shapes10(200, 100), (.01,), model=lambda data, seed: Scaled(), epochs=1, device='cpu')))")
    r = python(code, cwd=tmp_path)
    assert r.stdout == '1\n', r.stderr


# a session whose code is not what workers import

def gates(self, x): return x.new_zeros(len(x), 2)
def train_step(model, opt, xb, yb): return F.cross_entropy(model(xb), yb), model(xb)


@pytest.mark.parametrize('where, name, new, said', [
    (ImageClassifier, 'gates', gates, 'cifar_nbdev.model.ImageClassifier.gates'),
    (ImageClassifier, 'forward', lambda self, x: 2 * self.fc(x), 'cifar_nbdev.model.ImageClassifier.forward'),
    (F, 'cross_entropy', lambda a, b: a.square().mean(), 'torch.nn.functional.cross_entropy'),
    (F, 'relu', torch.sigmoid, 'torch.nn.functional.relu'),
    (torch, 'einsum', lambda *args: 0, 'torch.einsum'),
    (nn.Linear, 'forward', lambda self, x: 0, 'torch.nn.Linear.forward'),
    (train, 'train_step', train_step, 'cifar_nbdev.train.train_step'),
    (train.FiniteLoss, 'after_epoch', lambda self, t: None, 'cifar_nbdev.train.FiniteLoss.after_epoch'),
    (train, 'evaluate', torch.no_grad()(lambda *args: (0., 1.)), 'cifar_nbdev.train.evaluate')])
def test_changed_code_is_noticed_and_named(small, tmp_path, monkeypatch, where, name, new, said):
    before = fingerprint()
    monkeypatch.setattr(where, name, new)
    text = str(module._refusal(differences(before, fingerprint())))
    assert text.startswith(said) and len(text.splitlines()) == 1 and 'executor=ThreadPoolExecutor' in text


def test_processes_refuse_to_train_another_class(small, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageClassifier, 'gates', gates)
    with pytest.raises(ValueError, match='^cifar_nbdev.model.ImageClassifier.gates: not the same') as e:
        sweep(small, [.05], [0], out=tmp_path, **ONE)
    assert len(str(e.value).splitlines()) == 1 and not list(tmp_path.iterdir())


def test_threads_train_the_class_as_it_stands(small, monkeypatch):
    with threads() as executor:
        plain = sweep(small, [.05], executor=executor, **ONE)
        monkeypatch.setattr(ImageClassifier, 'gates', gates)
        patched = sweep(small, [.05], executor=executor, **ONE)
    assert patched[0]['weights_sha256'] != plain[0]['weights_sha256']


def test_a_users_module_that_changed_on_disk_is_noticed(tmp_path):
    (tmp_path/'nets.py').write_text('from cifar_nbdev.model import ImageClassifier\n'
                                    'def net(data, seed): return ImageClassifier(4, seed=seed)\n')
    code = ("import sys; sys.path.insert(0, '.'); sys.dont_write_bytecode = True; import nets\n"
            "from cifar_nbdev.sweep import sweep; from cifar_nbdev.data import shapes10\n"
            "open('nets.py', 'a').write('\\nclass ImageClassifier(ImageClassifier):\\n"
            "    def gates(self, x): return x.new_ones(len(x), 4)\\n')\n"
            "sweep(shapes10(200, 100), (.01,), model=nets.net, epochs=1, device='cpu')")
    r = python(code, cwd=tmp_path, PYTHONPATH=tmp_path)
    assert r.stderr.strip().splitlines()[-1].startswith('ValueError: model='), r.stderr


def test_all_code_of_a_run_is_looked_at(tmp_path):
    r = python("import sys; from cifar_nbdev import fingerprint, sweep\n"
               "used = {m[12:] for m in sys.modules if m.startswith('cifar_nbdev.')}\n"
               "print(*used - set(fingerprint.MODULES))", cwd=tmp_path)
    assert set(r.stdout.split()) <= {'sources', 'download'}, r.stderr           # a run is given its images


def test_a_session_that_has_worked_is_not_taken_for_another(small, tmp_path):
    code = ("import json, sys; from cifar_nbdev import fingerprint\n"
            "if sys.argv[1:]:\n"
            "    import matplotlib.pyplot, torch\n"
            "    from cifar_nbdev import data, model, train\n"
            "    m = model.ImageClassifier(seed=0)\n"
            "    dls = data.dataloaders(data.shapes10(200, 100), num_workers=0)\n"
            "    train.fit(m, dls, 1, device='cpu', progress=False)\n"
            "    model.summary(m, torch.zeros(2, 3, 32, 32))\n"
            "    torch.compile(m, backend='eager')(torch.zeros(2, 3, 32, 32))\n"
            "print(json.dumps(fingerprint.fingerprint()))")
    fresh = python(code, cwd=tmp_path, PYTHONHASHSEED=1)
    used = python(code, 'work', cwd=tmp_path, PYTHONHASHSEED=2)
    assert len(json.loads(fresh.stdout)) > 100, fresh.stderr
    assert json.loads(fresh.stdout) == json.loads(used.stdout), used.stderr


# Ctrl-C

INTERRUPTED = """
import os, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)                # a job in the background ignores it
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from cifar_nbdev.data import shapes10
from cifar_nbdev.sweep import SweepInterrupt, sweep
executor = ThreadPoolExecutor(2) if sys.argv[1] == 'threads' else None
out = 'runs' if sys.argv[2] == 'out' else None
def seen(): return len({p.stem for p in Path('tmp').rglob('*.epochs')})
def ctrl_c():
    while seen() < 5: time.sleep(.01)                   # two at a time: at least three have finished
    time.sleep(.3)
    global then
    then = time.perf_counter()
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=ctrl_c, daemon=True).start()
settings = dict(epochs=3, device='cpu', workers=2, out=out, executor=executor)
try: sweep(shapes10(500, 100), (.01,), range(200), **settings)
except KeyboardInterrupt as e:
    took = time.perf_counter() - then
    print(type(e).__name__, len(e.runs), round(took, 1), e)
if executor: executor.shutdown()
"""


@pytest.mark.skipif(os.name == 'nt', reason='no SIGINT from os.kill on Windows')
@pytest.mark.parametrize('kind, out', [('processes', ''), ('threads', 'out')])
def test_an_interrupted_sweep_keeps_its_runs_and_leaves_nothing(tmp_path, kind, out):
    (tmp_path/'tmp').mkdir()
    r = python(INTERRUPTED, kind, out, cwd=tmp_path, TMPDIR=tmp_path/'tmp')
    name, n, took, *text = r.stdout.split()
    assert name == 'SweepInterrupt' and int(n) >= 3 and float(took) < 5, r.stdout + r.stderr
    assert text[:6] == [n, 'of', '200', 'runs', 'finished,', text[5]] and int(text[5]) >= 3 * int(n) and not r.stderr, r.stderr
    assert not ours(tmp_path/'tmp')
    if out: assert len(load_runs(tmp_path/'runs')) >= int(n) and 'goes on from' in r.stdout


# arguments

@pytest.mark.parametrize('wrong, said', [
    (dict(lrs=.01), r'^lrs is 0.01, wanted a list: \[0.01\]$'), (dict(seeds=()), '^seeds is empty, wanted'),
    (dict(lrs='0.1'), '^lrs is'), (dict(lrs=[-1]), '^lr is -1, wanted'),
    (dict(epoch=3), "^unknown setting 'epoch', wanted"),
    (dict(workers=0), '^workers is 0, wanted'), (dict(device='abacus'), "^unknown device 'abacus'"),
    (dict(model=3), '^model is 3, wanted'), (dict(epochs=0), '^epochs is 0, wanted'),
    (dict(reading='x'), "^unknown reading 'x'"), (dict(change='magic'), "^unknown change 'magic'"),
    (dict(model=Net, reading='gate'), "^unknown setting 'reading', wanted"),
    (dict(model=Net, change='four branches'), "^unknown setting 'change', wanted")])
def test_a_senseless_argument_is_one_line(small, wrong, said):
    with pytest.raises(ValueError, match=said) as e: sweep(small, **wrong)
    assert len(str(e.value).splitlines()) == 1
