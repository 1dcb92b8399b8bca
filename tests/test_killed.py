"""Processes killed in the middle: what they finished is kept, and going on gives bitwise the same weights"""
import os, signal, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from cifar_nbdev.data import dataloaders, shapes10
from cifar_nbdev.files import atomic_write
from cifar_nbdev.model import ImageClassifier
from cifar_nbdev.runs import Settings, load_runs, load_weights, run_name, save_run, train_run, weights_sha256
from cifar_nbdev.sweep import _Dropped, _Job, _work, sweep
from cifar_nbdev.train import fit
from conftest import clean_env, hashes, python

pytestmark = pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='no SIGKILL on this system')


@pytest.fixture(autouse=True)
def one_thread():
    "The same thread count here as in the killed processes"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# fit: each process kills itself at a point of its own, in epoch 3 of 4

FIT = """
import os, signal, sys
import torch
from cifar_nbdev import data, train
from cifar_nbdev.data import dataloaders, shapes10
from cifar_nbdev.model import ImageClassifier
def die(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)
def half(state, f):
    f.write(b'half a checkpoint')
    f.flush()
    die()
class InEpoch3:
    def after_batch(self, t):
        if len(t.history) == 2: POINTS.pop(sys.argv[1], int)()
class Deadly:
    def __init__(self, dl): self.dl, self.left = dl, None
    def __getattr__(self, name): return getattr(self.dl, name)
    def __len__(self): return len(self.dl)
    def __iter__(self):
        for batch in self.dl:
            if self.left == 0: die()
            if self.left: self.left -= 1
            yield batch
torch.set_num_threads(1)
train_dl, test_dl = dataloaders(shapes10(300, 100))
train_dl = Deadly(train_dl)
POINTS = dict(step=lambda: setattr(train_dl, 'left', 1), write=lambda: setattr(torch, 'save', half),
              rename=lambda: setattr(os, 'replace', die))
train.fit(ImageClassifier(seed=0), (train_dl, test_dl), 4, device='cpu', \
checkpoint=sys.argv[1] + '.ckpt', callbacks=[InEpoch3()])
"""


@pytest.fixture(scope='module')
def killed(tmp_path_factory):
    "A folder with the checkpoints of fits that were killed, each at another point"
    folder = tmp_path_factory.mktemp('killed')
    processes = [subprocess.Popen([sys.executable, '-c', FIT, point], cwd=folder, env=clean_env(),
                                  stderr=subprocess.PIPE) for point in ('step', 'write', 'rename')]
    for p in processes:
        said = p.communicate()[1]
        assert p.returncode == -signal.SIGKILL, said.decode()
    return folder


@pytest.mark.parametrize('point', ['step', 'write', 'rename'])
def test_a_killed_fit_goes_on_to_the_same_weights(killed, small, point):
    whole, resumed = ImageClassifier(seed=0), ImageClassifier(seed=1)
    fit(whole, dataloaders(small), 4, device='cpu')
    done = []
    history = fit(resumed, dataloaders(small), 4, device='cpu', checkpoint=killed/f'{point}.ckpt',
                  callbacks=[lambda model, history: done.append(len(history))])
    assert done == [3, 4] and [e['epoch'] for e in history.epochs] == [1, 2, 3, 4]
    assert weights_sha256(resumed) == weights_sha256(whole)


def test_other_weights_would_be_seen(small):
    shas = set()
    for seed in (0, 1):
        model = ImageClassifier(seed=0)
        fit(model, dataloaders(small, seed=seed), 1, device='cpu')
        shas.add(weights_sha256(model))
    assert len(shas) == 2


@pytest.mark.parametrize('name', ['run', 'run.ckpt', 'run.a.b', '.run'])
def test_a_checkpoint_may_have_any_name(small, tmp_path, name):
    for epochs in (1, 2):
        history = fit(ImageClassifier(seed=0), dataloaders(small), epochs, device='cpu',
                      checkpoint=tmp_path/name)
    assert len(history) == 2 and [p.name for p in tmp_path.iterdir()] == [name]


def test_a_checkpoint_works_with_any_loader(small, tmp_path):
    from torch.utils.data import DataLoader, TensorDataset
    own = DataLoader(TensorDataset(small.x_train.float() / 255, small.y_train), 128, shuffle=True)
    for epochs in (1, 2):
        history = fit(ImageClassifier(seed=0), (own, dataloaders(small).test), epochs, device='cpu',
                      checkpoint=tmp_path/'run.ckpt')
    assert len(history) == 2


# sweep: the whole process group is killed while its second run is on its way

SWEEP = """
from cifar_nbdev.data import shapes10
from cifar_nbdev.sweep import sweep
sweep(shapes10(1000, 100), (.005, .01, .0001), epochs=6, device='cpu', workers=1, out='runs')
"""


def wait_for(found, process):
    "Poll until `found()`, while `process` runs"
    while not found():
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(.005)


def test_a_killed_sweep_goes_on_to_the_same_weights(tmp_path):
    runs, data = tmp_path/'runs', shapes10(1000, 100)
    process = subprocess.Popen([sys.executable, '-c', SWEEP], cwd=tmp_path, env=clean_env(TMPDIR=tmp_path),
                               start_new_session=True, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: list(runs.glob('[!.]*.json')), process)
        first = {p.stem for p in runs.glob('[!.]*.json')}
        wait_for(lambda: {p.stem for p in runs.glob('[!.]*.ckpt')} - first, process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    finished = {k: v for k, v in hashes(runs).items() if k.endswith('.json')}
    assert 1 <= len(finished) < 3
    again = sweep(data, (.005, .01, .0001), epochs=6, device='cpu', out=runs, executor=ThreadPoolExecutor(1))
    assert {k: hashes(runs)[k] for k in finished} == finished                       # not done again
    assert [r['config']['lr'] for r in again] == [.005, .01, .0001]
    for run in again:
        alone, _ = train_run(data, Settings(**run['config']), device='cpu')
        assert run['weights_sha256'] == alone['weights_sha256']
        saved = load_weights(ImageClassifier(), runs/f"{run_name(run['config'], data.sha256)}.safetensors")
        assert weights_sha256(saved) == run['weights_sha256']
    assert load_runs(runs) == sorted(again, key=lambda r: r['config']['lr'])
    files = list(runs.glob('[!.]*'))
    assert {p.suffix for p in files} == {'.json', '.safetensors'} and len(files) == 6


def test_no_worker_outlives_its_sweep(tmp_path):
    psutil = pytest.importorskip('psutil')
    long = SWEEP.replace('epochs=6', 'epochs=10_000')
    process = subprocess.Popen([sys.executable, '-c', long], cwd=tmp_path, env=clean_env(TMPDIR=tmp_path),
                               stderr=subprocess.PIPE)
    try:
        wait_for(lambda: list((tmp_path/'runs').glob('[!.]*.ckpt')), process)
        children = psutil.Process(process.pid).children(recursive=True)
    finally: process.kill()                             # the sweep alone, not its workers
    left = psutil.wait_procs(children, timeout=20)[1]
    for p in left: p.kill()
    assert children and not left
    process.communicate()


def test_a_run_that_went_on_counts_the_time_before(tmp_path):
    data = shapes10(1000, 100)
    def stop(model, history):
        if len(history) == 5: raise KeyboardInterrupt
    settings = Settings(lr=.01, epochs=6)
    with pytest.raises(KeyboardInterrupt):
        train_run(data, settings, device='cpu', checkpoint=tmp_path/'run.ckpt', callbacks=[stop])
    run, _ = train_run(data, settings, device='cpu', checkpoint=tmp_path/'run.ckpt')
    assert run['wall_seconds'] >= sum(e['seconds'] for e in run['epochs']) - .01


# files: whole, or not there

WRITE = """
import os, signal, sys
from cifar_nbdev.files import atomic_write
with atomic_write(sys.argv[1]) as tmp:
    tmp.write_text('half')
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_half_a_file_never_has_the_final_name(small, tmp_path):
    run, _ = train_run(small, Settings(lr=.01, epochs=1), device='cpu')
    path = save_run(run, tmp_path)
    before = path.read_bytes()
    for name in (path.name, path.name.replace('seed0', 'seed1')):
        assert python(WRITE, tmp_path/name, cwd=tmp_path).returncode == -signal.SIGKILL
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 3
    assert [p.name for p in tmp_path.iterdir() if p.name[0] != '.'] == [path.name]
    assert load_runs(tmp_path) == [run]         # what the killed processes left behind is not taken for runs


@pytest.mark.skipif(os.name == 'nt', reason='Windows replaces no file that is open')
def test_who_reads_the_old_file_reads_it_whole(tmp_path):
    (tmp_path/'a').write_text('old ' * 5000)
    with open(tmp_path/'a') as old:
        with atomic_write(tmp_path/'a') as tmp: tmp.write_text('new')
        assert old.read() == 'old ' * 5000 and (tmp_path/'a').read_text() == 'new'


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_a_failed_write_leaves_what_was_there(tmp_path, error):
    (tmp_path/'file').write_text('old')
    with pytest.raises(error):
        with atomic_write(tmp_path/'file') as tmp:
            tmp.write_text('new')
            raise error
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [('file', 'old')]


def test_a_run_put_aside_halfway_ends_with_the_same_weights(small, tmp_path):
    lrs = (.005, .01, .0001)                            # three runs, two at a time: the first is put aside
    alone = [train_run(small, Settings(lr=lr, epochs=5), device='cpu')[0]['weights_sha256'] for lr in lrs]
    for out in (None, tmp_path):
        runs = sweep(small, lrs, epochs=5, device='cpu', workers=2, progress=False, out=out)
        assert [run['weights_sha256'] for run in runs] == alone
        for run in runs:
            assert [e['epoch'] for e in run['epochs']] == [1, 2, 3, 4, 5]
            assert run['wall_seconds'] > .9 * sum(e['seconds'] for e in run['epochs'])
    assert {p.suffix for p in tmp_path.iterdir()} == {'.json', '.safetensors'}


def test_a_run_is_put_aside_at_the_epoch_asked_for(small, tmp_path):
    settings = Settings(lr=.01, epochs=3)
    (tmp_path/'open').touch()                           # as while the sweep is there
    job = _Job('run', settings, 'cpu', scratch=str(tmp_path), pause=2)              # no folder for results
    assert _work(job, small) == (None, None)
    epochs = torch.load(tmp_path/'run.ckpt', weights_only=True)['epochs']
    assert [e['epoch'] for e in epochs] == [1, 2]
    run, weights = _work(replace(job, pause=None), small)
    assert run['epochs'][:2] == epochs and len(run['epochs']) == 3 and not weights
    alone, _ = train_run(small, settings, device='cpu', progress=False)
    assert run['weights_sha256'] == alone['weights_sha256']
    assert sorted(p.name for p in tmp_path.iterdir()) == ['open', 'run.epochs']


def test_a_run_ends_with_its_sweep(small, tmp_path):
    job = _Job('run', Settings(lr=.01, epochs=1000), 'cpu', scratch=str(tmp_path))
    with pytest.raises(_Dropped): _work(job, small)                                 # there is no file `open`
    assert not list(tmp_path.glob('*.epochs')) or (tmp_path/'run.epochs').stat().st_size < 1000
