"""What tests share: small data, an environment without the user's settings, Python in a process of its own"""
import hashlib, os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest

from cifar_nbdev.data import shapes10

ROOT = Path(__file__).resolve().parent.parent
COMMAND = Path(sys.executable).with_name('cifar_report.exe' if os.name == 'nt' else 'cifar_report')


@pytest.fixture(scope='session', autouse=True)
def compiled_code():
    "Compiled once, in a process of its own, so that no test sees the line that says so"
    subprocess.run([sys.executable, '-c', 'from cifar_nbdev.compiled import available; available()'],
                   env=clean_env(), capture_output=True)


@pytest.fixture(scope='session')
def small():
    "300 training and 100 test images: three batches an epoch"
    return shapes10(300, 100)


def clean_env(**more):
    "The environment without anything that chooses data, plus `more`"
    kept = {k: v for k, v in os.environ.items() if not k.startswith('CIFAR') and k != 'PYTHONPATH'}
    return kept | {k: str(v) for k, v in more.items()}


def python(code, *args, cwd, **env):
    "Run `code` in a new process; its output as text"
    return subprocess.run([sys.executable, '-c', code, *map(str, args)], cwd=cwd, env=clean_env(**env),
                          capture_output=True, text=True, encoding='utf-8')


def ours(tmp):
    "What is in a folder for temporary files, but for that of PyTorch's compiler, made when it is imported"
    return [p for p in tmp.iterdir() if not p.name.startswith('torchinductor')]


def arrays(d):
    "Images and labels as NumPy arrays, by Keras' names"
    return dict(x_train=d.x_train.permute(0, 2, 3, 1).numpy(), y_train=d.y_train.numpy(),
                x_test=d.x_test.permute(0, 2, 3, 1).numpy(), y_test=d.y_test.numpy())


def save_npz(path, d, **more):
    "Write an .npz in Keras' layout; `more` is added or takes the place of its arrays"
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **arrays(d) | more)
    return path


def hashes(folder):
    "Hash of every file below `folder`, by relative path"
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(Path(folder).rglob('*')) if p.is_file()}
