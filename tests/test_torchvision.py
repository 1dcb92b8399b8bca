"""A torchvision that does not import: what does not need it works, what does says the cause and the fix"""
import json, sys

import pytest

from cifar_nbdev.data import dataloaders, load_data
from conftest import python, save_npz

NMS = "RuntimeError('operator torchvision::nms does not exist')"
BROKEN = [NMS, "ImportError('libc10.so: undefined symbol')",
          "OSError('libtorch_cuda.so: cannot open shared object file')",
          "AttributeError(\"partially initialized module 'torchvision' has no attribute 'extension'\")",
          "RuntimeError()"]


def break_torchvision(folder, error):
    "Put a torchvision into `folder` that raises `error` when it is imported; the folder to search first"
    (folder/'first'/'torchvision').mkdir(parents=True)
    (folder/'first'/'torchvision'/'__init__.py').write_text(f'raise {error}\n')
    return folder/'first'


@pytest.fixture(params=BROKEN, ids=lambda e: e.split('(')[0])
def broken(request, monkeypatch, tmp_path):
    "In this process, torchvision does not import; the error's text"
    for name in [m for m in sys.modules if m.split('.')[0] == 'torchvision']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(break_torchvision(tmp_path, request.param))
    for k in ('CIFAR10_URL', 'CIFAR_NBDEV_DATA', 'CIFAR_NBDEV_ROOT'): monkeypatch.delenv(k, raising=False)
    monkeypatch.setattr('cifar_nbdev.sources.SOURCES', ())
    return str(eval(request.param))


def test_what_needs_it_says_cause_and_fix(broken, small, tmp_path):
    for call in (lambda: dataloaders(small, num_workers=0),
                 lambda: load_data('cifar10', root=tmp_path/'root')):
        with pytest.raises(ImportError) as e: call()
        assert all(part in str(e.value) for part in (broken, 'torchvision', 'pip install', 'shapes10'))
    assert not (tmp_path/'root').exists()


def test_auto_falls_back_to_shapes(broken, tmp_path):
    with pytest.warns(UserWarning, match='NOT CIFAR-10.*\n.*torchvision'): d = load_data(root=tmp_path/'root')
    assert d.name == 'shapes10 (synthetic)'


WORKS = """
import json, sys
import numpy as np
from cifar_nbdev.data import dataloaders, load_data, shapes10
from cifar_nbdev.model import ImageClassifier
from cifar_nbdev.runs import Settings, train_run
from cifar_nbdev.train import fit
d = load_data(sys.argv[1])
history = fit(ImageClassifier(seed=0), dataloaders(d), 1, device='cpu')
run, model = train_run(shapes10(300, 100), Settings(lr=.01, epochs=1), device='cpu')
try: import torchvision; broken = False
except RuntimeError: broken = True
print(json.dumps([d.name, len(history), run['epochs'][0]['epoch'], broken]))
"""


def test_what_does_not_need_it_works(small, tmp_path):
    save_npz(tmp_path/'small.npz', small, name='mine')
    r = python(WORKS, tmp_path/'small.npz', cwd=tmp_path, PYTHONPATH=break_torchvision(tmp_path, NMS))
    assert r.returncode == 0, r.stderr
    assert json.loads(r.stdout) == ['mine', 1, 1, True]


def test_without_torchvision_a_run_still_says_what_it_ran_on(monkeypatch, small):
    from importlib.metadata import PackageNotFoundError, version
    from cifar_nbdev import runs
    def installed(name):
        if name == 'torchvision': raise PackageNotFoundError(name)
        return version(name)
    monkeypatch.setattr(runs, 'version', installed)
    run, _ = runs.train_run(small, runs.Settings(lr=.01, epochs=1), device='cpu')
    assert 'torchvision' in run['env'] and not run['env']['torchvision']


def test_the_report_works(small, tmp_path):
    save_npz(tmp_path/'small.npz', small, name='mine')
    code = 'from cifar_nbdev.commands import cifar_report; cifar_report()'
    args = '--data small.npz --lrs 0.005 --epochs 1 --device cpu --out out'.split()
    r = python(code, *args, cwd=tmp_path, PYTHONPATH=break_torchvision(tmp_path, NMS))
    assert r.returncode == 0 and '1 run of 1 epoch by compiled_step' in r.stderr and 'Error' not in r.stderr
    assert 'mine, not CIFAR-10' in r.stdout and (tmp_path/'out'/'index.html').exists()
