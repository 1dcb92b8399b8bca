"""Ends that nobody wished for: signals, forks, full disks. What is finished is kept, nothing is left behind"""
import errno
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cifar_nbdev.data import load_data, shapes10
from cifar_nbdev.files import abandoned, atomic_write, hold, scratch_folder
from cifar_nbdev.sweep import sweep
from conftest import COMMAND, clean_env, ours, python, save_npz

pytestmark = pytest.mark.skipif(os.name == 'nt', reason='POSIX signals and locks')

SWEEP = """
from cifar_nbdev.data import shapes10
from cifar_nbdev.sweep import sweep
if __name__ == '__main__':
    print('begun', flush=True)
    sweep(shapes10(500, 100), (.01,), range(200), epochs=3, device='cpu', workers=1, progress=False)
"""


def semaphores(process):
    "Those that loky made for a process; other tests have theirs"
    return [p for p in os.listdir('/dev/shm') if f'loky-{process.pid}-' in p] if os.path.isdir('/dev/shm') else []


def default_signals():
    "A job in the background, or under nohup, would ignore them, and its children too"
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM): signal.signal(number, signal.SIG_DFL)


def start(tmp_path):
    "A process that sweeps, and its folder for temporary files, once it works there"
    tmp = tmp_path/'tmp'
    tmp.mkdir(exist_ok=True)
    (tmp_path/'job.py').write_text(SWEEP)
    process = subprocess.Popen([sys.executable, 'job.py'], cwd=tmp_path, env=clean_env(TMPDIR=tmp), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                               preexec_fn=default_signals)
    while not list(tmp.rglob('*.epochs')):
        assert process.poll() is None, process.stderr.read()
        time.sleep(.05)
    return process, tmp


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGHUP', 'SIGINT'])
def test_a_signal_leaves_nothing(tmp_path, name):
    number = getattr(signal, name)
    process, tmp = start(tmp_path)
    for _ in range(3):                                  # the impatient
        os.kill(process.pid, number)
        time.sleep(.05)
    out, err = process.communicate(timeout=20)
    if name == 'SIGINT': assert 'SweepInterrupt' in err and err.count('Traceback') <= 2
    else: assert process.returncode == 128 + number and not err
    for _ in range(50):                                 # its helper is quick, but not at once
        if not semaphores(process): break
        time.sleep(.1)
    assert not ours(tmp) and not semaphores(process)


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path, small, monkeypatch):
    process, tmp = start(tmp_path)
    process.kill()
    process.communicate()
    left, = ours(tmp)
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp))
    for _ in range(100):                                # until its worker has ended
        sweep(small, (.01,), epochs=1, device='cpu', executor=ThreadPoolExecutor(1), progress=False)
        if not left.exists(): break
        time.sleep(.1)
    assert not ours(tmp)


def test_a_scratch_folder_in_use_is_left_alone(tmp_path):
    with scratch_folder('test', tmp_path) as one:
        os.utime(one, (0, 0))                           # old, but held
        with scratch_folder('test', tmp_path): assert one.exists()
    assert not list(tmp_path.iterdir())


def test_half_files_of_killed_writers_are_removed_by_the_next(tmp_path):
    code = ("import os, sys; from cifar_nbdev.files import atomic_write\n"
            "with atomic_write('run.json') as tmp: tmp.write_text('half'); os.kill(os.getpid(), 9)")
    python(code, cwd=tmp_path)
    half, = tmp_path.iterdir()
    os.utime(half, (0, 0))
    (tmp_path/'.run-notes.json').write_text('of the user')
    with atomic_write(tmp_path/'run.json') as tmp: tmp.write_text('whole')
    assert {p.name for p in tmp_path.iterdir()} == {'run.json', '.run-notes.json'}


def test_a_file_that_is_being_written_is_not_abandoned(tmp_path):
    file = tmp_path/'file'
    file.touch()
    os.utime(file, (0, 0))
    assert abandoned(file)
    with open(file) as f:
        hold(f.fileno())
        assert not abandoned(file)
    file.touch()
    assert not abandoned(file) and not abandoned(tmp_path/'none')


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_full_disk_is_an_oserror_that_names_the_file(tmp_path, number):
    (tmp_path/'run.json').write_text('old')
    with pytest.raises(OSError) as e:
        with atomic_write(tmp_path/'run.json'): raise OSError(number, os.strerror(number))
    assert e.value.errno == number and e.value.filename == str(tmp_path/'run.json')
    assert (tmp_path/'run.json').read_text() == 'old' and len(list(tmp_path.iterdir())) == 1


FULL = """
import resource, signal, sys
from cifar_nbdev.checkpoint import Checkpoint
from cifar_nbdev.data import dataloaders, shapes10
from cifar_nbdev.model import ImageClassifier
from cifar_nbdev.runs import Settings, save_run, save_weights, train_run
from cifar_nbdev.train import fit
data = shapes10(100, 50)
run, model = train_run(data, Settings(epochs=1), device='cpu', progress=False)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)           # no room: files end at 10 kB
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
for write in (lambda: save_weights(model, 'w.safetensors'), lambda: save_run(run, 'runs', model),
              lambda: fit(model, dataloaders(data), 1, device='cpu', progress=False, checkpoint='c.ckpt')):
    try: write()
    except OSError as e: print(type(e).__name__, e.errno, e.filename.split('/')[-1].split('-')[0])
"""


def test_every_writer_says_alike_that_there_is_no_room(tmp_path):
    r = python(FULL, cwd=tmp_path)
    names = 'w.safetensors', 'gate', 'c.ckpt'
    assert r.stdout.split('\n')[:-1] == [f'OSError {errno.EFBIG} {name}' for name in names], r
    assert not [p for p in tmp_path.rglob('*') if p.is_file()]


def test_rights_and_links_stay(tmp_path):
    (tmp_path/'real.json').write_text('old')
    (tmp_path/'real.json').chmod(0o640)
    (tmp_path/'link.json').symlink_to('real.json')
    with atomic_write(tmp_path/'link.json') as tmp: tmp.write_text('new')
    assert (tmp_path/'link.json').is_symlink() and (tmp_path/'real.json').read_text() == 'new'
    assert stat.S_IMODE((tmp_path/'real.json').stat().st_mode) == 0o640


def test_a_refused_chmod_is_no_error(tmp_path, monkeypatch):
    def refuse(*args): raise PermissionError(errno.EPERM, 'no')
    monkeypatch.setattr(os, 'chmod', refuse)
    with atomic_write(tmp_path/'a') as tmp: tmp.write_text('b')
    assert (tmp_path/'a').read_text() == 'b'


FORK = """
import os, signal, sys, torch
from cifar_nbdev.data import dataloaders, shapes10
from cifar_nbdev.model import ImageClassifier
from cifar_nbdev.train import fit
dls = dataloaders(shapes10(600, 200))
def train(): return fit(ImageClassifier(seed=0), dls, 1, device='cpu', progress=False)
torch.set_num_threads(2)
train()
sys.stdout.flush()
if not os.fork():
    signal.alarm(60)                                    # rather than hang
    try: train()
    except RuntimeError as e: print(e, flush=True)
    torch.set_num_threads(1)
    print(len(train()), flush=True)
    os._exit(0)
os.wait()
"""


def test_a_forked_process_says_why_it_cannot(tmp_path):
    said, trained = python(FORK, cwd=tmp_path).stdout.splitlines()
    assert 'this process was forked' in said and 'set_num_threads(1)' in said and trained == '1'


DAEMON = """
import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from cifar_nbdev.data import shapes10
from cifar_nbdev.sweep import sweep
def job():
    more = dict(seeds=[0, 1], epochs=1, device='cpu', progress=False)
    try: sweep(shapes10(100, 50), (.01,), **more)
    except RuntimeError as e: print(e, flush=True)
    print(len(sweep(shapes10(100, 50), (.01,), executor=ThreadPoolExecutor(1), **more)), flush=True)
if __name__ == '__main__':
    p = multiprocessing.get_context('spawn').Process(target=job, daemon=True)
    p.start()
    p.join()
"""


def test_a_daemon_process_says_that_it_may_not(tmp_path):
    (tmp_path/'job.py').write_text(DAEMON)
    r = subprocess.run([sys.executable, 'job.py'], cwd=tmp_path, env=clean_env(), capture_output=True,
                       text=True)
    said, runs = r.stdout.splitlines()
    assert said == 'a daemon process: use executor=ThreadPoolExecutor(1)' and runs == '2'


def test_several_at_once_in_one_folder(tmp_path):
    "Same and other settings: each writes what it would write alone"
    save_npz(tmp_path/'d.npz', shapes10(300, 100))
    def command(*more):
        return [COMMAND, '--data', 'd.npz', '--epochs', '2', '--device', 'cpu', '--workers', '1', *more]
    def begin(args): return subprocess.Popen(args, cwd=tmp_path, env=env, stdout=subprocess.PIPE,
                                             stderr=subprocess.PIPE, text=True)
    env = clean_env()
    processes = [begin(command('--lrs', '0.005', *more)) for more in ((), ('0.02',))]
    said = [(p.communicate()[1], p.returncode) for p in processes]
    assert [code for _, code in said] == [0] * 2, said
    sweep(load_data(tmp_path/'d.npz'), (.005, .02), epochs=2, device='cpu', out=tmp_path/'alone'/'runs',
          executor=ThreadPoolExecutor(1), progress=False)
    results = [{p.name: json.loads(p.read_text())['weights_sha256'] for p in (tmp_path/out/'runs').glob('*.json')}
               for out in ('report', 'alone')]
    assert results[0] == results[1] and len(results[0]) == 2
    assert not list((tmp_path/'report').rglob('.*')) and not list(tmp_path.rglob('*.ckpt'))
