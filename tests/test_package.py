"""The package as a whole: its house and limits, imports one way, metadata in one place, no traces left"""
import ast, functools, graphlib, inspect, os, pydoc, random, re, runpy, statistics, sys
from configparser import ConfigParser
from importlib import import_module, metadata
from types import SimpleNamespace

import matplotlib
import nbformat
import numpy as np
import pytest
import torch
from fastcore.docments import docments
from threadpoolctl import threadpool_info

from cifar_nbdev.compiled import compiled_step
from cifar_nbdev.data import dataloaders, shapes10
from cifar_nbdev.model import ImageClassifier
from cifar_nbdev.report import curves
from cifar_nbdev.runs import Settings, save_run, train_run
from cifar_nbdev.sweep import sweep
from cifar_nbdev.train import evaluate, fit
from conftest import ROOT, python

HOUSE = dict(                                           # notebooks by their modules, floor by floor
    data='00', model='01', train='02', report='03',
    explore='04', live='04b', widgets='04c', readings='05', changes='06', speed='07', peers='07b',
    callbacks='08', predict='09',
    files='10', sources='11', machine='11b', download='11c', compiled='12', captured='13', content='13a', checkpoint='13b', runs='14', fingerprint='14b', compare='14c', sweep='15', page='16', results='16b', terminal='16c',
    commands='17')
GUIDE = (ROOT/'CONTRIBUTING.md').read_text(encoding='utf-8')
LAYERS = re.findall(r'\w+', re.search(r'before it:\n([\w, ]+)\.', GUIDE)[1])      # lowest first
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
OTHERS = {'index', '09b_own', '17b_main'}                # without a module that is imported
LIGHT = {'terminal', 'commands'}                        # import nothing heavy, so no `document` either
EXTRAS = ['dev', 'doc', 'cluster', 'export', 'peers']
PROTOCOL = {'forward', 'new_head', 'new_gate', 'before_fit', 'after_batch', 'after_epoch', 'after_fit'}     # said by the class
PEERS = {'lightning', 'skorch', 'keras', 'distributed', 'dask', 'onnx', 'onnxscript'}                     # in extras of their own


def settings():
    "settings.ini"
    config = ConfigParser(delimiters=['='], interpolation=None)
    config.read(ROOT/'settings.ini', encoding='utf-8')
    return config['DEFAULT']


def source(module):
    "Text of a module"
    return (ROOT/'cifar_nbdev'/f'{module}.py').read_text(encoding='utf-8')


def tree(module):
    "Syntax tree of a module"
    return ast.parse(source(module))


def code_lines(text):
    "Lines that are neither blank nor a comment"
    return [line for line in text.splitlines() if line.strip() and not line.strip().startswith('#')]


def cells(path, kind='code'):
    "Sources of a notebook's cells"
    return [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == kind]


def exported(path):
    "Sources of the cells that go into a module"
    return [s for s in cells(path) if re.match(r'(#\|.*\n)*#\| *exports?\b', s)]


# The house

def test_every_module_comes_from_its_notebook():
    assert {p.stem for p in (ROOT/'cifar_nbdev').glob('[!_]*.py')} == set(HOUSE) == set(LAYERS)
    assert {p.stem for p in NOTEBOOKS} == OTHERS | {f'{n}_{module}' for module, n in HOUSE.items()}


@pytest.mark.parametrize('module', HOUSE)
def test_a_notebook_has_the_form_of_the_others(module):
    path = ROOT/'nbs'/f'{HOUSE[module]}_{module}.ipynb'
    front, code = cells(path, 'raw')[0], cells(path)
    assert re.search(rf'^output-file: {module}\.html$', front, re.M)
    assert re.search(r'^title: .+$', front, re.M) and re.search(r'^description: .+$', front, re.M)
    assert re.match(r'# .+\n\n> .+', cells(path, 'markdown')[0])
    assert f'#| default_exp {module}' in code
    if module not in LIGHT: assert exported(path)[-1] == '#| export\ndocument(__name__)'
    assert code[-1].startswith('#| hide\n') and code[-1].endswith('nbdev.nbdev_export()')


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_no_cell_is_for_reading_only(path):
    assert not [s for s in cells(path) if re.search(r'^#\| *eval:', s, re.M)], \
        'Jupyter runs it all the same: put such code into a Markdown block'


@pytest.mark.parametrize('module', HOUSE)
def test_a_module_keeps_its_limits(module):
    assert len(code_lines(source(module))) <= 250
    functions = [n for n in ast.walk(tree(module)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not {n.name: length for n in functions if (length := n.end_lineno - n.lineno + 1) > 30}
    lengths = [len(code_lines(s)) for s in exported(ROOT/'nbs'/f'{HOUSE[module]}_{module}.ipynb')]
    assert max(lengths) <= 25


def test_most_exported_cells_are_short():
    assert statistics.median(len(code_lines(s)) for p in NOTEBOOKS for s in exported(p)) <= 10


@pytest.mark.parametrize('path', [*NOTEBOOKS, *sorted((ROOT/'docs').glob('*.py')), ROOT/'setup.py'],
                         ids=lambda p: p.name)
def test_lines_of_code_fit_a_page(path):
    code = '\n'.join(cells(path)) if path.suffix == '.ipynb' else path.read_text(encoding='utf-8')
    assert not [line for line in code.splitlines() if len(line) > 110 and not line.startswith('#| fig-')]


@pytest.mark.parametrize('name', ['00_data', '01_model', '02_train', '03_report'])
def test_a_reading_time_is_that_of_the_text(name):
    "238 words a minute, which is silent reading (Brysbaert, 2019), and 5 seconds for each line of code that is shown"
    path = ROOT/'nbs'/f'{name}.ipynb'
    words = sum(len(s.split()) for s in cells(path, 'markdown'))
    lines = sum(len(code_lines(s)) for s in cells(path) if not s.startswith('#| hide'))
    said = re.search(r'The report, \d of 4: some (\d+) minutes', cells(path, 'markdown')[0])
    assert abs(int(said[1]) - (words / 238 + lines / 12)) < 5


# Imports

def imports(module):
    "Every import of a module, also inside its functions: (own module or '', package, names)"
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            for a in node.names:
                package, *rest = a.name.split('.')
                yield ('.'.join(rest) if package == 'cifar_nbdev' else ''), package, []
        elif isinstance(node, ast.ImportFrom):
            path, names = (node.module or '').split('.'), [a.name for a in node.names]
            if node.level or path[0] == 'cifar_nbdev':
                own = path[0] if node.level else '.'.join(path[1:])
                if own: yield own, 'cifar_nbdev', names
                else: yield from ((n, 'cifar_nbdev', []) for n in names if n != '__version__')
            else: yield '', path[0], names


def test_imports_run_one_way():
    graph = {m: {own for own, _, _ in imports(m) if own} - {m} for m in LAYERS}
    list(graphlib.TopologicalSorter(graph).static_order())              # a circle raises CycleError
    for i, module in enumerate(LAYERS): assert graph[module] <= set(LAYERS[:i]), module


@pytest.mark.parametrize('module', LAYERS)
def test_no_module_uses_what_another_keeps_to_itself(module):
    others = [(own, names) for own, _, names in imports(module) if own not in ('', module)]
    assert not [n for _, names in others for n in names if n.startswith('_')]
    modules = {own for own, names in others if not names}
    private = [f'{n.value.id}.{n.attr}' for n in ast.walk(tree(module)) if isinstance(n, ast.Attribute)
               and isinstance(n.value, ast.Name) and n.value.id in modules and re.match('_(?!_)', n.attr)]
    assert not private


def test_importing_everything_does_not_import_torchvision(tmp_path):
    code = '; '.join(f'import cifar_nbdev.{m}' for m in LAYERS)
    r = python(f'{code}; import sys; print("torchvision" in sys.modules)', cwd=tmp_path)
    assert (r.returncode, r.stdout.strip(), r.stderr) == (0, 'False', '')


def test_the_commands_import_nothing_heavy(tmp_path):
    heavy = {'torch', 'numpy', 'pandas', 'matplotlib', 'scipy', 'numba'}
    r = python(f'import cifar_nbdev.commands, sys; print(sorted({heavy} & set(sys.modules)))', cwd=tmp_path)
    assert (r.stdout.strip(), r.stderr) == ('[]', '')


# Names and what is said of them

def public(body, owner=''):
    "Public functions, classes and methods below `body`, with their names"
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith('_'):
            yield owner + node.name, node
            if isinstance(node, ast.ClassDef): yield from public(node.body, f'{node.name}.')


@pytest.mark.parametrize('module', LAYERS)
def test_every_public_name_has_a_docstring(module):
    def said(name): return inspect.getdoc(functools.reduce(getattr, name.split('.'), m))    # or its base
    m = import_module(f'cifar_nbdev.{module}')
    assert not [n for n, _ in public(tree(module).body) if n.split('.')[-1] not in PROTOCOL and not said(n)]


@pytest.mark.parametrize('module', LAYERS)
def test_every_parameter_has_a_comment_that_help_shows(module):
    m = import_module(f'cifar_nbdev.{module}')
    for name in (n.name for n in tree(module).body if isinstance(n, ast.FunctionDef) and n.name[0] != '_'):
        f = getattr(m, name)
        f = getattr(f, 'py_func', f)                    # what Numba compiles
        parameters = inspect.signature(f).parameters.values()
        named = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        notes = {k: v for k, v in docments(f).items() if k in named}
        assert not [k for k, v in notes.items() if not v], name
        said = ' '.join((f.__doc__ or '').split())
        if module not in LIGHT: assert not [k for k, v in notes.items() if ' '.join(v.split()) not in said], name


def test_help_shows_the_parameters():
    text = ' '.join(pydoc.plain(pydoc.render_doc(fit)).split())
    notes = docments(fit)
    for name in inspect.signature(fit).parameters: assert ' '.join(notes[name].split()) in text, name


@pytest.mark.parametrize('module', LAYERS)
def test_what_is_exported_is_what_is_public(module):
    m = import_module(f'cifar_nbdev.{module}')
    assert set(m.__all__) >= {n for n, _ in public(tree(module).body) if '.' not in n}
    assert all(hasattr(m, n) for n in m.__all__)


# Metadata

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
    assert not re.search(r'^version', (ROOT/'pyproject.toml').read_text(encoding='utf-8'), re.M)
    patterns = got['package_data']['cifar_nbdev']
    installed = {p.name for pattern in patterns for p in (ROOT/'cifar_nbdev').glob(pattern)}
    there = {p.name for p in (ROOT/'cifar_nbdev').iterdir() if p.is_file() and p.suffix != '.py'}
    assert installed == there >= {'py.typed', 'page.html'}


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


def required(*keys):
    "Names of the distributions that settings.ini requires"
    cfg = settings()
    return {re.split('[<>=]', r)[0].lower() for k in keys for r in cfg[k].split()}


def test_what_is_required_is_what_is_imported():
    packages = {p.lower() for m in LAYERS for _, p, _ in imports(m)}
    packages = {'pillow' if p == 'pil' else p for p in packages}
    others = packages - set(sys.stdlib_module_names) - {'cifar_nbdev', 'ipython'} - PEERS
    assert others == required('requirements')


def test_tested_versions_are_named_for_all_that_is_required():
    pins = (ROOT/'constraints.txt').read_text(encoding='utf-8')
    names = set(re.findall(r'^([\w-]+)==[\w.]+(?:; python_version (?:<|>=) "3.11")?$', pins, re.M))
    assert names >= required(*(f'{k}requirements' for k in ('', 'dev_', 'doc_', 'cluster_', 'export_')))
    assert not re.search(r'^ *-|://| @ ', pins, re.M)   # no options, no addresses


def test_changelog_and_citation_are_of_this_version():
    version = settings()['version']
    assert f'## [{version}]' in (ROOT/'CHANGELOG.md').read_text(encoding='utf-8')
    assert f'\nversion: {version}\n' in (ROOT/'CITATION.cff').read_text(encoding='utf-8')


# Nothing global is touched

def one_epoch(dl):
    for xb, yb in dl: pass

def quiet_sweep(data, folder):
    "A sweep whose one run is there already"
    save_run(train_run(data, QUICK, device='cpu')[0], folder)
    return sweep(data, [.01], epochs=1, device='cpu', out=folder)

CALLS = dict(
    shapes10=lambda d, folder: shapes10(50, 50),
    model=lambda d, folder: ImageClassifier(seed=0),
    loaders=lambda d, folder: [one_epoch(dl) for dl in dataloaders(d)],
    torchvision_loaders=lambda d, folder: [one_epoch(dl)
                                           for dl in dataloaders(d.subset(20, 20), 8, num_workers=0)],
    fit=lambda d, folder: fit(MODEL, dataloaders(d), 1, device='cpu', checkpoint=folder/'fit.ckpt'),
    evaluate=lambda d, folder: evaluate(MODEL, dataloaders(d).test),
    compiled=lambda d, folder: fit(ImageClassifier(seed=0), dataloaders(d), 1, device='cpu',
                                   step=compiled_step),
    train_run=lambda d, folder: train_run(d, QUICK, device='cpu'),
    curves=lambda d, folder: curves(train_run(d, QUICK, device='cpu')[0]),
    sweep=quiet_sweep)
MODEL, QUICK = ImageClassifier(seed=0), Settings(lr=.01, epochs=1)


def arithmetic():
    "PyTorch's switches that decide how it computes"
    cudnn = torch.backends.cudnn
    return [torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(), torch.backends.mkldnn.enabled,
            torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.enabled, cudnn.benchmark,
            cudnn.deterministic]


def global_state():
    "What a library must leave as it found it"
    pools = {p['filepath']: p['num_threads'] for p in threadpool_info()}
    own = {k: v for k, v in os.environ.items() if not k.startswith('TORCHINDUCTOR')}    # set on its import
    return dict(torch=torch.get_rng_state().tolist(), numpy=[str(part) for part in np.random.get_state()],
                random=random.getstate(), arithmetic=arithmetic(), pools=pools,
                threads=(torch.get_num_threads(), torch.get_num_interop_threads()), environment=own,
                folder=os.getcwd(), figures=matplotlib.rcParams.copy() | {'backend': ''})


def changed(before):
    "What is no longer as it was; a library that is loaded meanwhile may bring a pool of threads"
    after = global_state()
    after['pools'] = {k: v for k, v in after['pools'].items() if k in before['pools']}
    return [k for k, v in before.items() if after[k] != v]


@pytest.mark.parametrize('name', CALLS)
def test_no_global_state_is_touched(name, small, tmp_path):
    before = global_state()
    CALLS[name](small, tmp_path)
    assert changed(before) == []


@pytest.mark.parametrize('change, what', [
    (lambda: torch.rand(1), 'torch'), (lambda: np.random.rand(), 'numpy'),
    (lambda: random.random(), 'random'),
    (lambda: torch.set_num_threads(torch.get_num_threads() + 1), 'threads'),
    (lambda: setattr(torch.backends.cudnn, 'benchmark', True), 'arithmetic')])
def test_global_state_would_show_a_change(change, what):
    before, threads, benchmark = global_state(), torch.get_num_threads(), torch.backends.cudnn.benchmark
    try:
        change()
        assert what in changed(before)
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = benchmark


@pytest.mark.parametrize('name', ['loaders', 'model', 'shapes10', 'train_run'])
def test_global_seeds_change_nothing(name, small, tmp_path):
    def result(seed):
        torch.manual_seed(seed); np.random.seed(seed); random.seed(seed)
        calls = {'loaders': lambda: [x.sum().item() for x, _ in dataloaders(small).train],
                 'model': lambda: ImageClassifier(seed=0).conv.weight.tolist(),
                 'shapes10': lambda: shapes10(20, 20).sha256,
                 'train_run': lambda: train_run(small, QUICK, device='cpu')[0]['weights_sha256']}
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
