"""Sweeps on executors: the library's own processes, the standard library's, Dask's; workers killed midway"""
import multiprocessing, os, pickle, signal, threading, time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager, nullcontext

import pytest

from cifar_nbdev.data import shapes10
from cifar_nbdev.train import SweepError, load_runs, sweep, train_run
from conftest import hashes, python

LRS, SEEDS = (.005, .01, .0001), (0, 1)
SETTINGS = dict(epochs=6, device='cpu', progress=False)


@pytest.fixture(scope='module')
def data():
    "Images for runs that take a second or two"
    return shapes10(1000, 100)


@pytest.fixture(scope='module')
def expected(data):
    "Hash of the weights of each run, by learning rate and seed"
    runs = sweep(data, LRS, SEEDS, **SETTINGS)
    return {(r['config']['lr'], r['config']['seed']): r['weights_sha256'] for r in runs}


class Pool(ProcessPoolExecutor):
    "Two processes, and how many bytes the largest of its tasks was"
    def __init__(self):
        super().__init__(2, mp_context=multiprocessing.get_context('spawn'))
        self.largest = 0

    def submit(self, fn, *args):
        self.largest = max(self.largest, len(pickle.dumps(args)))
        return super().submit(fn, *args)


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


@pytest.mark.parametrize('make', [Pool, dask])
def test_any_executor_gives_the_same_runs(data, expected, tmp_path, make):
    with make() as executor:
        runs = sweep(data, LRS, SEEDS, out=tmp_path, executor=executor, **SETTINGS)
        if make is Pool: assert 0 < executor.largest < 5_000        # the images do not travel with each run
        assert sweep(data, LRS, SEEDS, out=tmp_path, executor=executor, **SETTINGS) == runs
    assert results(runs) == results(load_runs(tmp_path)) == expected


def test_images_travel_to_a_dask_worker_once(data):
    with dask() as executor:
        client, scattered = executor._client, []
        scatter = client.scatter
        client.scatter = lambda *args, **kwargs: scattered.append(kwargs) or scatter(*args, **kwargs)
        sweep(data, LRS, epochs=1, device='cpu', progress=False, executor=executor)
        assert scattered == [dict(broadcast=True)]


class Elsewhere(Pool):
    "As if its processes ran on a machine that does not share our disk"
    def submit(self, fn, config, shared, device, out, scratch, name, pause):
        return super().submit(fn, config, shared, device, '/not/here', '/nor/here', name, pause)


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


@contextmanager
def one_killed(executor, out):
    "Kill a worker when the first run is finished and another on its way; a dict for what was finished then"
    finished, over = {}, threading.Event()
    def kill():
        while not over.is_set():
            if list(out.glob('[!.]*.json')) and list(out.glob('[!.]*.ckpt')):
                then = {k: v for k, v in hashes(out).items() if k.endswith('.json')}
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
@pytest.mark.parametrize('make, slots', [(nullcontext, 2), (nullcontext, 4), (dask, 2)])     # 4: two runs are put aside
def test_every_run_ends_once_though_a_worker_is_killed(data, expected, tmp_path, make, slots):
    with make() as executor, one_killed(executor, tmp_path) as finished:
        runs = sweep(data, LRS, SEEDS, out=tmp_path, workers=slots, executor=executor, **SETTINGS)
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


def test_a_failing_run_takes_no_other_with_it(data, tmp_path):
    with dask() as executor, pytest.raises(SweepError) as e:
        sweep(data, (1e6, .01), epochs=2, device='cpu', progress=False, out=tmp_path, executor=executor)
    assert ['lr1e+06' in name for name in e.value.errors] == [True] and len(load_runs(tmp_path)) == 1


def test_the_library_works_without_dask(tmp_path):
    code = ("import sys; sys.modules['distributed'] = sys.modules['dask'] = None; "
            "from cifar_nbdev.train import sweep; from cifar_nbdev.data import shapes10; "
            "print(len(sweep(shapes10(200, 100), (.01, .001), epochs=1, device='cpu')))")
    r = python(code, cwd=tmp_path)
    assert r.stdout.strip() == '2', r.stderr
