"""The package as a whole: metadata in one place, imports one way, docstrings, and nothing global touched"""
import ast, json, random, re, runpy, sys
from configparser import ConfigParser
from importlib import import_module, metadata
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cifar_nbdev.data import dataloaders, shapes10
from cifar_nbdev.model import ImageClassifier
from cifar_nbdev.train import evaluate, fit, save_run, sweep, train_run
from conftest import ROOT, python

MODULES = [m for p in sorted((ROOT/'nbs').glob('[0-9]*_*.ipynb'))
           for m in re.findall(r'#\| default_exp (\w+)', p.read_text(encoding='utf-8'))]
EXTRAS = ['dev', 'doc', 'cluster', 'peers']


def settings():
    "settings.ini"
    config = ConfigParser(delimiters=['='], interpolation=None)
    config.read(ROOT/'settings.ini', encoding='utf-8')
    return config['DEFAULT']


def tree(module):
    "Syntax tree of a module"
    return ast.parse((ROOT/'cifar_nbdev'/f'{module}.py').read_text(encoding='utf-8'))


def test_every_module_comes_from_a_notebook():
    modules = {p.stem for p in (ROOT/'cifar_nbdev').glob('[!_]*.py')}
    assert modules == set(MODULES)
    assert [m for m in MODULES if m not in ('fused', 'gradient')][:5] == ['data', 'model', 'train', 'report', 'explore']


def test_setup_takes_everything_from_settings(monkeypatch):
    cfg, got = settings(), {}
    monkeypatch.setitem(sys.modules, 'setuptools', SimpleNamespace(setup=got.update))
    monkeypatch.chdir(ROOT)
    runpy.run_path('setup.py')
    assert (got['name'], got['version'], got['python_requires']) == \
        (cfg['lib_name'], cfg['version'], '>=' + cfg['min_python'])
    assert got['install_requires'] == cfg['requirements'].split()
    assert got['extras_require'] == {e: cfg[f'{e}_requirements'].split() for e in EXTRAS}
    assert got['entry_points']['console_scripts'] == cfg['console_scripts'].split()
    assert 'version' not in (ROOT/'pyproject.toml').read_text(encoding='utf-8')


def test_what_is_installed_agrees_with_settings():
    cfg = settings()
    assert metadata.version('cifar_nbdev') == cfg['version'] == import_module('cifar_nbdev').__version__
    def norm(r): return re.sub(r'\s', '', r).lower().replace('_', '-')
    have = {norm(r.split(';')[0]) for r in metadata.requires('cifar_nbdev')}
    keys = ['requirements', *(f'{e}_requirements' for e in EXTRAS)]
    assert have == {norm(r) for k in keys for r in cfg[k].split()}, \
        'settings.ini has changed since the package was installed: make test installs it again'
    entries = metadata.distribution('cifar_nbdev').entry_points
    scripts = {f'{e.name}={e.value}' for e in entries if e.group == 'console_scripts'}
    assert scripts == set(cfg['console_scripts'].split())


@pytest.mark.parametrize('module', MODULES)
def test_imports_run_one_way(module):
    allowed = set(MODULES[:MODULES.index(module)])
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom) and node.level:
            below = {node.module} if node.module else {a.name for a in node.names} - {'__version__'}
            assert below <= allowed, f'line {node.lineno}'
        names = [node.module or ''] if isinstance(node, ast.ImportFrom) else \
            [a.name for a in node.names] if isinstance(node, ast.Import) else []
        own = {n.split('.')[1] for n in names if n.startswith('cifar_nbdev.')}
        assert own <= allowed | {module}
        assert not {'nbs', 'notebooks', 'nbdev'} & {n.split('.')[0] for n in names}


@pytest.mark.parametrize('path', sorted((ROOT/'nbs').glob('*.ipynb')), ids=lambda p: p.stem)
def test_lines_of_code_fit_a_page(path):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    code = [line for c in cells if c['cell_type'] == 'code' for line in ''.join(c['source']).splitlines()]
    assert not [line for line in code if len(line) > 110 and not line.startswith('#| fig-')]


def public(body, owner=''):
    "Public functions, classes and methods below `body`, with their names"
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_'):
            yield owner + node.name, node
            if isinstance(node, ast.ClassDef): yield from public(node.body, f'{node.name}.')


@pytest.mark.parametrize('module', MODULES)
def test_every_public_name_has_a_docstring_of_one_line(module):
    names = dict(public(tree(module).body))
    assert names
    for name, node in names.items():
        doc = ast.get_docstring(node)
        assert doc and '\n' not in doc, name


@pytest.mark.parametrize('module', MODULES)
def test_what_is_exported_is_what_is_public(module):
    exported = set(import_module(f'cifar_nbdev.{module}').__all__)
    assert exported >= {n for n, _ in public(tree(module).body) if '.' not in n}
    assert all(hasattr(import_module(f'cifar_nbdev.{module}'), n) for n in exported)


def test_importing_everything_does_not_import_torchvision(tmp_path):
    imports = '; '.join(f'import cifar_nbdev.{m}' for m in MODULES)
    r = python(f'{imports}; import sys; print("torchvision" in sys.modules)', cwd=tmp_path)
    assert (r.returncode, r.stdout.strip(), r.stderr) == (0, 'False', '')


def one_epoch(dl):
    for xb, yb in dl: pass

def quiet_sweep(data, folder):
    "A sweep whose one run is there already"
    save_run(train_run(data, .01, epochs=1, device='cpu')[0], folder)
    return sweep(data, [.01], epochs=1, device='cpu', out=folder)

CALLS = dict(
    shapes10=lambda d, folder: shapes10(50, 50),
    model=lambda d, folder: ImageClassifier(seed=0),
    loaders=lambda d, folder: [one_epoch(dl) for dl in dataloaders(d)],
    torchvision_loaders=lambda d, folder: [one_epoch(dl)
                                           for dl in dataloaders(d.subset(20, 20), 8, num_workers=0)],
    fit=lambda d, folder: fit(MODEL, dataloaders(d), 1, device='cpu', checkpoint=folder/'fit.ckpt'),
    evaluate=lambda d, folder: evaluate(MODEL, dataloaders(d).test),
    train_run=lambda d, folder: train_run(d, .01, epochs=1, device='cpu'),
    sweep=quiet_sweep)
MODEL = ImageClassifier(seed=0)


def global_state():
    "What a library must leave as it found it"
    numpy = [str(part) for part in np.random.get_state()]
    return [torch.get_rng_state().tolist(), numpy, random.getstate(), torch.get_num_threads(),
            torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled()]


@pytest.mark.parametrize('name', CALLS)
def test_no_global_state_is_touched(name, small, tmp_path):
    before = global_state()
    CALLS[name](small, tmp_path)
    assert [a == b for a, b in zip(before, global_state())] == [True] * len(before)


@pytest.mark.parametrize('change', [lambda: torch.rand(1), lambda: np.random.rand(), lambda: random.random()])
def test_global_state_would_show_a_draw(change):
    before = global_state()
    change()
    assert global_state() != before


@pytest.mark.parametrize('name', ['loaders', 'model', 'shapes10', 'train_run'])
def test_global_seeds_change_nothing(name, small, tmp_path):
    def result(seed):
        torch.manual_seed(seed); np.random.seed(seed); random.seed(seed)
        calls = {'loaders': lambda: [x.sum().item() for x, _ in dataloaders(small).train],
                 'model': lambda: ImageClassifier(seed=0).conv.weight.tolist(),
                 'shapes10': lambda: shapes10(20, 20).sha256,
                 'train_run': lambda: train_run(small, .01, epochs=1, device='cpu')[0]['weights_sha256']}
        return calls[name]()
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try: assert result(1) == result(2)
    finally: torch.set_rng_state(states[0]); np.random.set_state(states[1]); random.setstate(states[2])


def test_shapes10_does_not_depend_on_the_processor(tmp_path):
    found = np.show_config(mode='dicts')['SIMD Extensions'].get('found')
    if not found: pytest.skip('NumPy uses no instructions that it could do without')
    r = python('from cifar_nbdev.data import shapes10; print(shapes10().sha256)', cwd=tmp_path,
               NPY_DISABLE_CPU_FEATURES=' '.join(found))
    assert r.stdout.split() == [shapes10().sha256], r.stderr
