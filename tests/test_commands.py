"""What the commands write and say when all is well, and that a bad call says why and destroys nothing"""
import base64, dataclasses, io, json, os, re, shutil, signal, subprocess, sys, time, warnings
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cifar_nbdev import __version__
from cifar_nbdev.callbacks import lr_find
from cifar_nbdev.commands import ABOUT, cifar_predict, cifar_report, cifar_runs
from cifar_nbdev.data import dataloaders, load_data, shapes10
from cifar_nbdev.files import check_settings, pick_device, progress_bar
from cifar_nbdev.live import clear_live, pack_weights
from cifar_nbdev.model import ImageClassifier
from cifar_nbdev.page import reproduce, write_report
from cifar_nbdev.predict import load_model, prepare_image
from cifar_nbdev.readings import READINGS
from cifar_nbdev.report import REPORT
from cifar_nbdev.runs import (Settings, load_run, load_runs, load_weights, run_name, save_run, save_weights,
                              weights_sha256)
from cifar_nbdev.sources import DataError
from cifar_nbdev.sweep import sweep
from cifar_nbdev.terminal import Parser, one_line_errors
from cifar_nbdev.train import evaluate, fit
from conftest import COMMAND, arrays, clean_env, hashes, python, save_npz

NAME = 'shapes10 (synthetic)'


def command(*args, cwd, name='cifar_report'):
    "Run an installed command in a process of its own, its output into pipes"
    file = COMMAND.with_name(COMMAND.name.replace('cifar_report', name))
    return subprocess.run([file, *map(str, args)], cwd=cwd, env=clean_env(PYTHONIOENCODING='utf-8'),
                          capture_output=True, text=True, encoding='utf-8')


@pytest.fixture(scope='module')
def good(small, tmp_path_factory):
    "A folder in which the command was run on small.npz, and what it said"
    folder = tmp_path_factory.mktemp('good')
    save_npz(folder/'small.npz', small, name=NAME)
    said = command('--data', 'small.npz', '--epochs', 2, '--device', 'cpu', '--workers', 1, cwd=folder)
    assert said.returncode == 0, said.stderr
    return folder, said


class Page(HTMLParser):
    "Collects tags with their attributes, and text"
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ''
        self.feed(text)
    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs)))
    def handle_data(self, data): self.text += data


def read_page(good):
    "The page as HTML, and parsed"
    html = (good[0]/'report'/'index.html').read_text(encoding='utf-8')
    return html, Page(html)


def test_a_good_run_writes_everything(good):
    files = set(hashes(good[0]/'report'))
    stems = {'a-lr0.005', 'b-lr0.01', 'c-lr0.0001'}
    figures = {str(Path('figures', f'{s}.{e}')) for s in stems for e in ('png', 'svg')}
    runs = {f for f in files if f.startswith('runs')}
    live = {str(Path('live', f'{f}.js')) for f in ('net', *(f'lr{lr}-epoch2' for lr in (.005, .01, .0001)))}
    assert files - runs == {'index.html', 'table.csv', 'table.md'} | figures | live
    assert sorted(Path(f).suffix for f in runs) == ['.json'] * 3 + ['.safetensors'] * 3
    assert len({Path(f).stem for f in runs}) == 3


def test_it_prints_the_table_and_then_the_path(good):
    folder, said = good
    title, *lines = (folder/'report'/'table.md').read_text(encoding='utf-8').splitlines()
    table = [line for line in said.stdout.splitlines() if line.startswith('|')]
    cells = [[c.strip() for c in line.split('|')] for line in (*table, *lines) if line.startswith('|')]
    assert said.stdout.startswith(title) and len(table) == 5 and max(map(len, table)) <= 80
    assert all(set(shown) <= set(stored) for shown, stored in zip(cells[:5], cells[5:]))
    assert {'lr', 'ours'} <= set(cells[0])
    address = said.stdout.splitlines()[-1].removeprefix('The report: ')
    assert address == (folder/'report'/'index.html').resolve().as_uri()


def test_lines_and_no_bar_where_nobody_watches(good):
    first, *runs = [line for line in good[1].stderr.splitlines() if 'Numba compiles' not in line]
    assert first == f'{NAME}, not CIFAR-10: 3 runs of 2 epochs by compiled_step'
    stored = {p.stem for p in (good[0]/'report'/'runs').glob('*.json')}
    assert {line.partition(': test accuracy ')[0] for line in runs} == stored and len(runs) == 3


def test_a_bar_where_somebody_watches(monkeypatch, capsys):
    for watched in (True, False):
        monkeypatch.setattr(sys.stderr, 'isatty', lambda: watched, raising=False)
        with progress_bar(total=3, desc='here') as bar: bar.update(3)
        assert ('here: 100%' in capsys.readouterr().err) == watched


def test_quiet_says_nothing_but_the_result(good, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(good[0])
    args = '--data small.npz --epochs 1 --device cpu --workers 1 --lrs 0.01 --quiet --out'.split() + [str(tmp_path)]
    cifar_report(args)
    out, err = capfd.readouterr()
    assert err == '' and 'The report: file://' in out
    for more, said in (('--epochs 0', 'cifar_report: epochs is 0'), ('--verbose', 'not allowed with')):
        with pytest.raises(SystemExit) as e: cifar_report([*args, *more.split()])
        assert e.value.code == 2 and said in capfd.readouterr().err


def test_verbose_says_every_epoch_and_the_first_call_how_long_it_compiled(good, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(good[0])
    compiled = iter((3., 12.6))                         # seconds before and after it got ready
    monkeypatch.setattr('cifar_nbdev.page.compile_seconds', lambda: next(compiled))
    args = '--data small.npz --epochs 3 --device cpu --workers 1 --lrs 0.01 0.02 --verbose --out'.split()
    cifar_report([*args, str(tmp_path)])
    first, *lines = capfd.readouterr().err.splitlines()
    assert first == f'{NAME}, not CIFAR-10: 2 runs of 3 epochs by compiled_step, compiled in 10 s'
    assert len(lines) == 2 * (1 + 3)
    for r in load_runs(tmp_path/'runs'):
        i = next(i for i, line in enumerate(lines) if f"lr{r['config']['lr']:g}-" in line)
        for line, e in zip(lines[i + 1:i + 4], r['epochs']):
            assert line.startswith(f"  epoch {e['epoch']:>3}: loss {e['train_loss']:.4f}")
            assert line.endswith(f"test accuracy {e['test_acc']:.2%}")


@pytest.mark.skipif(os.name == 'nt', reason='a terminal by pty')
def test_in_a_terminal_there_is_a_bar_and_verbose_lines_above_it(good, tmp_path):
    import fcntl, pty, struct, termios
    shutil.copy(good[0]/'small.npz', tmp_path)
    args = '--data small.npz --epochs 2 --device cpu --workers 1 --lrs 0.01 --verbose'.split()
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 100, 0, 0))
    process = subprocess.Popen([COMMAND, *args], cwd=tmp_path, env=clean_env(TERM='xterm', NUMBA_CACHE_DIR=tmp_path/'numba'),
                               stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = b''
    with suppress(OSError):                             # at its end
        while part := os.read(ours, 1000): text += part
    os.close(ours)
    text = text.decode()
    assert process.wait() == 0, text
    assert 'sweep: 100%' in text and text.count('  epoch ') == 2 and 'Traceback' not in text
    assert re.search(r'1 run of 2 epochs by compiled_step, compiled in \d+ s', text)
    assert re.search(r'\r *\rgate-lr0.01-seed0-[0-9a-f]{8}: test accuracy', text)


def test_the_page_needs_nothing_else(good):
    html, page = read_page(good)
    sources = ('src', 'href', 'srcset', 'data', 'poster', 'action')
    links = [v for t, a in page.tags for k, v in a.items() if k in sources and t != 'a']
    assert len(links) == 3 and all(link.startswith('data:image/') for link in links)
    assert not [a['href'] for t, a in page.tags if t == 'a' and ':' in a['href']]       # files beside it
    assert not {'link', 'iframe', 'base', 'object'} & {t for t, _ in page.tags}
    assert [a for t, a in page.tags if t == 'script'] == [{}]           # the live net's, without a src
    assert not re.search(r'url\(|@import|http-equiv', html)


def test_the_page_shows_the_figures_that_are_beside_it(good):
    _, page = read_page(good)
    images = [a for t, a in page.tags if t == 'img']
    shown = [base64.b64decode(a['src'].split(',', 1)[1]) for a in images]
    files = ('a-lr0.005.svg', 'b-lr0.01.svg', 'c-lr0.0001.svg')
    assert shown == [(good[0]/'report'/'figures'/f).read_bytes() for f in files]
    assert all(NAME in a['alt'] for a in images)
    places = [page.text.index(f'({c}) Learning rate') for c in 'abc']
    assert places == sorted(places)


def test_the_page_says_what_ran_on_what(good):
    _, page = read_page(good)
    run = load_runs(good[0]/'report'/'runs')[0]
    for said in ('300 training and 100 test images', '2 epochs', 'epochs: 2 instead of 30',
                 run['data']['sha256'][:16], torch.__version__, 'compiled_step', '3 of 3 runs were trained'):
        assert said in page.text
    assert all(r['weights_sha256'][:12] in page.text for r in load_runs(good[0]/'report'/'runs'))


def test_it_says_everywhere_that_this_is_not_cifar10(good):
    folder, said = good
    html, page = read_page(good)
    assert 'This is NOT CIFAR-10' in said.stdout and '--data cifar10' in said.stdout
    assert 'This is not CIFAR-10' in page.text[:page.text.index('Loss and accuracy')]
    assert 'nan' not in page.text and 'accuracy around 50%' not in page.text           # statements about CIFAR-10
    assert '--data cifar10' in page.text
    assert 'not CIFAR-10' in html[html.index('<title>'):html.index('</title>')]
    for svg in (folder/'report'/'figures').glob('*.svg'):       # letters are paths, the text is a comment
        assert f'<!-- {NAME}, not CIFAR-10 -->' in svg.read_text(encoding='utf-8')
    assert 'not CIFAR-10' in (folder/'report'/'table.md').read_text(encoding='utf-8')
    for file in ('index.html', 'table.md', 'table.csv'):            # and none of the report's accuracies
        text = (folder/'report'/file).read_text(encoding='utf-8')
        assert not [acc for acc in REPORT.values() if f'{100 * acc:.2f}' in text]


def test_figures_are_pictures(good):
    from PIL import Image
    for png in (good[0]/'report'/'figures').glob('*.png'):
        with Image.open(png) as image:
            assert min(image.size) > 500 and len(image.convert('RGB').getcolors(1 << 20)) > 10


def test_the_table_agrees_with_the_runs(good):
    table = pd.read_csv(good[0]/'report'/'table.csv').set_index('lr')
    last = {r['config']['lr']: 100 * r['epochs'][-1]['test_acc'] for r in load_runs(good[0]/'report'/'runs')}
    assert table['ours'].round(2).to_dict() == {lr: round(acc, 2) for lr, acc in last.items()}
    assert 'report' not in table


def test_a_run_json_has_what_was_promised(good, small):
    keys = dict(config='lr momentum weight_decay epochs bs seed reading init change',
                data='name sha256 n_train n_test',
                env='cifar_nbdev step python torch torchvision numpy numba platform device threads')
    for file in (good[0]/'report'/'runs').glob('*.json'):
        run = json.loads(file.read_text(encoding='utf-8'))
        assert {'epochs', 'wall_seconds', 'weights_sha256', *keys} <= set(run)
        for k, names in keys.items(): assert set(names.split()) <= set(run[k])
        assert [e['epoch'] for e in run['epochs']] == [1, 2]
        for e in run['epochs']:
            assert set(e) >= {'epoch', 'train_loss', 'train_acc', 'test_loss', 'test_acc', 'seconds'}
            assert 0 <= e['train_acc'] <= 1 and 0 <= e['test_acc'] <= 1 and (e['test_acc'] * 100) % 1 < 1e-6
        assert run['data'] == dict(name=NAME, sha256=small.sha256, n_train=300, n_test=100)
        assert (run['config']['bs'], run['config']['epochs'], run['env']['device']) == (128, 2, 'cpu')


def test_the_weights_are_those_of_the_run(good, small):
    for file in (good[0]/'report'/'runs').glob('*.json'):
        run, model = json.loads(file.read_text(encoding='utf-8')), ImageClassifier()
        load_weights(model, file.with_suffix('.safetensors'))
        assert weights_sha256(model) == run['weights_sha256']
        assert evaluate(model, dataloaders(small).test)[1] == run['epochs'][-1]['test_acc']


def test_the_same_command_again_trains_nothing(good, monkeypatch, capsys, tmp_path):
    before = hashes(good[0]/'report')
    monkeypatch.chdir(good[0])
    monkeypatch.setattr('cifar_nbdev.sweep.loky.ProcessPoolExecutor', None)
    cifar_report('--data small.npz --epochs 2 --device cpu'.split())
    after = hashes(good[0]/'report')
    assert {k for k in before | after if before.get(k) != after.get(k)} == {'index.html'}
    assert '0 of 3 runs were trained' in read_page(good)[1].text and 'The report:' in capsys.readouterr().out


def test_it_can_print_to_a_terminal_that_knows_ascii_only(good, monkeypatch):
    monkeypatch.chdir(good[0])
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BytesIO(), encoding='ascii'))
    cifar_report('--data small.npz --epochs 2 --device cpu'.split())
    sys.stdout.flush()
    assert b'The report:' in sys.stdout.buffer.getvalue()


# Before anything is imported

def test_help_and_version_are_quick_and_import_nothing_heavy(tmp_path):
    code = """import sys
from cifar_nbdev.commands import *
for command in (cifar_report, cifar_predict, cifar_runs, cifar_bench, cifar_results, overview):
    for option in ('--help', '--version', '--no-such-option'):
        try: command([option])
        except SystemExit: pass
print({'torch', 'numpy', 'pandas', 'matplotlib', 'jinja2', 'scipy', 'numba'} & sys.modules.keys())"""
    assert python(code, cwd=tmp_path).stdout.splitlines()[-1] == 'set()'
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        said = command('--help', cwd=tmp_path)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1
    assert 'default: 0.005 0.01 0.0001' in said.stdout and 'default: report' in said.stdout


@pytest.mark.parametrize('name', ABOUT)
def test_help_has_examples_that_the_command_understands(name, monkeypatch, capsys):
    import cifar_nbdev.commands as commands
    with pytest.raises(SystemExit) as e: getattr(commands, name)(['--help'])
    examples = capsys.readouterr().out.partition('examples:\n')[2].splitlines()
    assert e.value.code == 0 and len(examples) > 1 and all(line.startswith(f'  {name}') for line in examples)
    assert max(map(len, examples)) <= 80
    class Understood(Exception): "The arguments are parsed"
    def work(*_): raise Understood
    monkeypatch.setattr(commands, 'one_line_errors', work)
    for line in examples:
        args = line.split('>')[0].split()[1:]
        with pytest.raises(Understood): getattr(commands, name)(args)


def test_python_m_says_what_there_is(tmp_path):
    said = subprocess.run([sys.executable, '-m', 'cifar_nbdev'], cwd=tmp_path, env=clean_env(),
                          capture_output=True, text=True)
    assert (said.returncode, said.stderr) == (0, '') and said.stdout.startswith(f'cifar_nbdev {__version__}')
    assert all(re.search(f'^{name} +[A-Z]', said.stdout, re.M) for name in ABOUT) and 'https://' in said.stdout
    assert max(map(len, said.stdout.splitlines())) <= 92
    said = subprocess.run([sys.executable, '-m', 'cifar_nbdev', 'report'], cwd=tmp_path, env=clean_env(),
                          capture_output=True, text=True)
    assert said.returncode == 2 and said.stderr.startswith('python -m cifar_nbdev: unrecognized arguments')


@pytest.mark.parametrize('words', ['--seeds 0 1 2', '--seeds 0,1,2', '--seeds 0, 1,2', '--seeds=0,1,2'])
def test_lists_in_both_forms(monkeypatch, words):
    seen = {}
    monkeypatch.setattr('cifar_nbdev.page.reproduce', lambda **kwargs: seen.update(kwargs) or exit())
    with pytest.raises(SystemExit): cifar_report([*words.split(), '--lrs', '0.1,1e-3'])
    assert seen['seeds'] == [0, 1, 2] and seen['lrs'] == [.1, .001]
    assert set(seen) == {'data', 'out', 'lrs', 'seeds', 'epochs'}   # the rest is left to `reproduce`


def test_the_learning_rates_are_those_of_the_report(monkeypatch):
    seen = {}
    monkeypatch.setattr('cifar_nbdev.page.reproduce', lambda **kwargs: seen.update(kwargs) or exit())
    with pytest.raises(SystemExit): cifar_report([])
    assert seen == dict(data='auto', out='report', lrs=list(REPORT), seeds=[0], epochs=30)


# The page, from the library

EVIL = '</title></style><script>alert(1)</script>" onload="alert(1)'


def test_nothing_in_a_run_runs_on_the_page(good, tmp_path):
    runs = load_runs(good[0]/'report'/'runs')
    for r in runs:
        for k in ('bs', 'epochs', 'momentum', 'weight_decay', 'seed', 'reading', 'init'): r['config'][k] = EVIL
        r['data'] |= dict(name=EVIL, sha256=EVIL)
        r['env'] = {EVIL: EVIL, 'step': EVIL}
        r |= dict(weights_sha256=EVIL, peak_memory_mb=EVIL)
    page = Page(write_report(runs, tmp_path, EVIL).read_text(encoding='utf-8'))
    assert 'script' not in {t for t, _ in page.tags} and not [a for _, a in page.tags if 'onload' in a]
    assert page.text.count('<script>alert(1)</script>') > 10


def test_a_name_with_dollars_is_drawn_as_it_is(good, tmp_path):
    runs = [dict(r, data=r['data'] | {'name': r'mine $\foo$ 5$'}) for r in load_runs(good[0]/'report'/'runs')]
    assert r'mine $\foo$ 5$, not CIFAR-10' in write_report(runs, tmp_path).read_text(encoding='utf-8')


def tiny_net(data, seed):
    "A net that is not the report's"
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))


def test_a_net_of_ones_own(small, tmp_path):
    "Its page says nothing about the report, not even beside CIFAR-10"
    data = dataclasses.replace(small, name='CIFAR-10, unverified copy 12345678')
    state = torch.random.get_rng_state()
    index = reproduce(data, (.005, .02), model=tiny_net, epochs=2, out=tmp_path, device='cpu', workers=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    page = Page(index.read_text(encoding='utf-8'))
    assert 'tiny_net, a net of your own, on CIFAR-10, unverified copy' in page.text
    assert 'train_step' in page.text and 'the report' not in page.text.lower() and '52.24' not in page.text
    assert {p.name for p in (tmp_path/'figures').iterdir()} == {
        f'lr{lr}.{kind}' for lr in ('0.005', '0.02') for kind in ('png', 'svg')}


def test_learning_rates_that_hardly_differ_have_files_of_their_own(small, tmp_path):
    "Figures, captions and nets; %g would give both one name. A whole number stays short"
    lrs = {.12345671: '0.12345671', .12345672: '0.12345672', 1e-5: '1e-05', 1.: '1'}
    index = reproduce(small, lrs, epochs=1, out=tmp_path, device='cpu', workers=1, progress=False)
    page = Page(index.read_text(encoding='utf-8'))
    links = [a['href'] for tag, a in page.tags if tag == 'a' and a['href'].startswith('figures/')]
    assert set(links) == {f'figures/lr{lr}.{kind}' for lr in lrs.values() for kind in ('png', 'svg')}
    assert all((tmp_path/link).is_file() for link in links)
    assert len({(tmp_path/'figures'/f'lr{lr}.svg').read_bytes() for lr in lrs.values()}) == len(lrs)
    script = (tmp_path/'live'/'net.js').read_text()
    nets = {n['lr']: n for n in json.loads(script[script.index('{'):script.rindex(')')])['nets']}
    assert set(nets) == set(lrs.values()) and all(f'Learning rate {lr}:' in page.text for lr in nets)
    for run in load_runs(tmp_path/'runs'):
        n = nets[lrs[run['config']['lr']]]
        assert n['curves']['Loss'][1] == [round(run['epochs'][0]['test_loss'], 4)]
        model = load_weights(ImageClassifier(), next((tmp_path/'runs').glob(
            f'*{run_name(run["config"], run["data"]["sha256"])}.safetensors')))
        assert pack_weights(model)['floats'] in (tmp_path/'live'/f'{n["files"][0]}.js').read_text()


def test_a_folder_of_something_else_is_kept_apart(small, tmp_path):
    "The page has this call's runs only, and figures of others are gone; their runs stay"
    more = dict(out=tmp_path, epochs=1, device='cpu', workers=1, progress=False)
    reproduce(small, (.005, .02), **more)
    other = dataclasses.replace(small, y_train=small.y_train.flip(0))
    page = Page(reproduce(other, (.005,), bs=50, momentum=.5, **more).read_text(encoding='utf-8'))
    assert 'momentum: 0.5 instead of 0.9' in page.text and 'bs: 50 instead of 128' in page.text
    runs = load_runs(tmp_path/'runs')
    assert [r['config']['bs'] for r in runs if r['data']['sha256'] == other.sha256] == [50]
    assert len(runs) == 3 and len({r['data']['sha256'] for r in runs}) == 2
    assert [r['weights_sha256'][:12] in page.text for r in runs] == [r['data']['sha256'] == other.sha256 for r in runs]
    assert {p.name for p in (tmp_path/'figures').iterdir()} == {'a-lr0.005.png', 'a-lr0.005.svg'}


# Bad input

class Bomb:
    "An object that only pickle can store"


def bad_npz(small, path, key, value):
    "small.npz, with one array replaced"
    return save_npz(path, small, **{key: value(arrays(small)[key])})


def not_a_number_of_images(y): return y[:-1]

NPZ = dict(
    shape=('x_train', lambda x: x[:, :16], '(300, 16, 32, 3)'),
    flat=('x_test', lambda x: x.reshape(100, -1), '(100, 3072)'),
    grey=('x_train', lambda x: x[..., :1], '(300, 32, 32, 1)'),
    dtype=('x_train', lambda x: x.astype(np.float32), 'float32'),
    none=('x_test', lambda x: x[:0], '(0, 32, 32, 3)'), label=('y_train', lambda y: y + 1000, '1000 to 1009'),
    negative=('y_test', lambda y: y - 1, '-1 to 8'), float_label=('y_train', lambda y: y / 1, 'float64'),
    one_hot=('y_train', lambda y: np.eye(10, dtype=int)[y], '(300, 10)'),
    fewer=('y_test', not_a_number_of_images, '(99,)'),
    pickled=('y_test', lambda y: np.array([Bomb()] * len(y)), 'pickle'))


def truncated(small, path):
    "small.npz, half of it"
    save_npz(path, small)
    path.write_bytes(path.read_bytes()[:300_000])


def damaged(small, path):
    "small.npz with other bytes in the middle"
    save_npz(path, small)
    content = bytearray(path.read_bytes())
    content[300_000:300_100] = bytes(100)
    path.write_bytes(content)

FILES = dict(
    truncated=(truncated, 'whole'), damaged=(damaged, 'whole'),
    keys=(lambda small, path: np.savez(path, images=arrays(small)['x_train']), 'y_train'),
    text=(lambda small, path: path.write_text('x_train'), 'whole'),
    empty=(lambda small, path: path.write_bytes(b''), 'whole'),
    folder=(lambda small, path: path.mkdir(), 'folder'), missing=(lambda small, path: None, 'no such file'))

OPTIONS = {
    '--data cifar100': 'cifar100', '--lrs 0': 'lr', '--lrs -0.005': '-0.005', '--lrs nan': 'nan',
    '--lrs inf': 'inf', '--lrs fast': 'fast', '--lrs ,': 'lr', '--lrs 0.005 0': 'lr', '--epochs 0': 'epochs',
    '--epochs -1': '-1', '--epochs 1.5': '1.5', '--epochs many': 'many', '--seeds -1': 'seed',
    '--seeds x': 'x', '--seeds ,': 'seed', '--workers 0': 'workers', '--device tpu': 'tpu',
    '--device cuda:99': 'cuda:99', '--device cuda:x': 'cuda:x', '--device meta': 'meta', '--bs 0': '--bs',
    'more': 'more', '--out small.npz': 'small.npz',
    '--out small.npz/below': 'below', '--out': '--out'}


def refused(good, capfd, *args):
    "Run the command in this process: status 2, an error of one or two lines, nothing changed; the error"
    before = hashes(good[0])
    folders = {p for p in good[0].rglob('*') if p.is_dir()}
    with pytest.raises(SystemExit) as e:
        cifar_report(['--data', 'small.npz', '--epochs', '2', '--device', 'cpu', *args])
    out, err = capfd.readouterr()
    assert e.value.code == 2 and out == ''
    *before_it, line = err.splitlines()             # what is going to be done, if it was begun
    assert line.startswith('cifar_report: ') and err.endswith('\n') and len(before_it) < 2, err
    assert hashes(good[0]) == before and {p for p in good[0].rglob('*') if p.is_dir()} == folders
    return err


@pytest.mark.parametrize('options', OPTIONS)
def test_bad_options(good, capfd, monkeypatch, options):
    monkeypatch.chdir(good[0])
    assert OPTIONS[options] in refused(good, capfd, *options.split())


@pytest.mark.parametrize('case', [*NPZ, *FILES])
def test_bad_files(good, small, capfd, monkeypatch, tmp_path, case):
    monkeypatch.chdir(good[0])
    path = tmp_path/'bad.npz'
    if case in NPZ: bad_npz(small, path, *NPZ[case][:2])
    else: FILES[case][0](small, path)
    err = refused(good, capfd, '--data', str(path))
    assert str(path) in err and (NPZ | FILES)[case][-1] in err


def test_bad_settings_are_refused_before_the_data_are_read(good, capfd, monkeypatch):
    monkeypatch.chdir(good[0])
    assert 'lr' in refused(good, capfd, '--data', 'none.npz', '--lrs', '0')


@pytest.mark.parametrize('options', ['--lrs 0', '--data cifar100', '--device tpu'])
def test_a_refused_command_makes_no_folder(good, capfd, monkeypatch, options):
    monkeypatch.chdir(good[0])
    refused(good, capfd, '--out', 'new', *options.split())
    assert not (good[0]/'new').exists()


def test_the_installed_command_refuses_alike(good):
    said = command('--data', 'small.npz', '--lrs', 'nan', cwd=good[0])
    assert said.returncode == 2 and said.stdout == '' and said.stderr.startswith('cifar_report: lr is nan')
    assert len(said.stderr.splitlines()) == 1


def test_a_loss_that_is_not_finite_ends_one_run_only(good, capfd, monkeypatch):
    monkeypatch.chdir(good[0])
    before = hashes(good[0])
    with pytest.raises(SystemExit) as e:
        cifar_report('--data small.npz --lrs 1e30 0.02 --epochs 2 --device cpu --workers 1'.split())
    err = capfd.readouterr().err
    assert e.value.code == 2 and '\ncifar_report: 1 of 2 runs failed' in err
    assert len(err.splitlines()) == 4                   # what will be done, the good run, and the error
    assert 'epoch 1, step' in err and '1e+30' in err
    after = hashes(good[0])
    assert {k: after.get(k) for k in before} == before
    assert {k.split('-')[1] for k in after.keys() - before} == {'lr0.02'}


def test_a_damaged_run_is_named(good, capfd, monkeypatch, tmp_path):
    shutil.copytree(good[0], tmp_path/'copy')
    run = next((tmp_path/'copy'/'report'/'runs').glob('*.json'))
    run.write_bytes(run.read_bytes()[:100])
    monkeypatch.chdir(tmp_path/'copy')
    assert run.name in refused((tmp_path/'copy', None), capfd)


# Photographs

@pytest.fixture(scope='module')
def photos(good, tmp_path_factory):
    "A folder with images, and files that are none"
    from PIL import Image
    folder = tmp_path_factory.mktemp('photos')
    for name in ('a.png', 'b.jpg', 'caf\u00e9 1.webp'): Image.new('RGB', (50, 40), 'teal').save(folder/name)
    (folder/'empty.jpg').write_bytes(b'')
    (folder/'notes.jpg').write_text('no image')
    (folder/'folder.jpg').mkdir()
    Image.new('1', (20_000, 10_000)).save(folder/'bomb.png')
    shutil.copy(next((good[0]/'report'/'runs').glob('*.safetensors')), folder/'net.safetensors')
    return folder

BAD_PHOTOS = ['empty.jpg', 'notes.jpg', 'folder.jpg', 'bomb.png', 'none.png', '~nobody-here/x.png']


def test_photos(photos):
    said = command('a.png', 'b.jpg', '--weights', 'net.safetensors', cwd=photos, name='cifar_predict')
    assert (said.returncode, said.stderr) == (0, '')
    lines = said.stdout.splitlines()
    assert lines[0] == 'a.png: centre 40x40 of 50x40, averaged to 32x32' and len(lines) == 8
    said = [re.fullmatch(r' +([\d.]+)%  class \d', line)[1] for line in lines[1:4]]       # small.npz has no names
    assert sorted(map(float, said), reverse=True) == [*map(float, said)]


def test_photos_as_json(photos, capsys, monkeypatch):
    monkeypatch.chdir(photos)
    cifar_predict('a.png b.jpg --weights net.safetensors --json --top 10'.split())
    out, err = capsys.readouterr()
    a, b = json.loads(out)
    assert a['file'] == 'a.png' and b['prepared'] == 'centre 40x40 of 50x40, averaged to 32x32' and err == ''
    assert sum(c['probability'] for c in a['classes']) == pytest.approx(1) and len(a['classes']) == 10


def test_what_is_no_photo_gets_a_line_and_the_others_are_done(photos, capsys, monkeypatch):
    monkeypatch.chdir(photos)
    with pytest.raises(SystemExit) as e:
        cifar_predict([*BAD_PHOTOS[:2], 'a.png', *BAD_PHOTOS[2:], 'b.jpg', '--weights', 'net.safetensors'])
    out, err = capsys.readouterr()
    names, lines = [line.split(':')[0] for line in out.splitlines() if line[0] != ' '], err.splitlines()
    assert e.value.code == 1 and names == ['a.png', 'b.jpg'] and len(lines) == len(BAD_PHOTOS)
    assert all(line.startswith(f'cifar_predict: {name}') for line, name in zip(lines, BAD_PHOTOS))


@pytest.mark.parametrize('args, said', [
    (BAD_PHOTOS, 'empty.jpg'), (['a.png', '--weights', 'none'], 'none: no such file'),
    (['a.png', '--weights', 'a.png'], 'not a whole .safetensors'), (['a.png', '--top', '0'], '--top is 0'),
    (['a.png', '--top', 'x'], '--top'), ([], 'IMAGE'), (['a.png', '--weights'], '--weights')])
def test_nothing_to_say_about_photos_is_status_2(photos, capsys, monkeypatch, args, said):
    monkeypatch.chdir(photos)
    with pytest.raises(SystemExit) as e:
        cifar_predict([*args, *([] if '--weights' in args else ['--weights', 'net.safetensors'])])
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == '' and said in err and err.startswith('cifar_predict: ')
    assert len(err.splitlines()) == (len(BAD_PHOTOS) if args is BAD_PHOTOS else 1)


def test_a_net_of_ones_own_is_not_guessed(small, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(photos)
    sweep(small, (.01,), model=tiny_net, epochs=1, out=tmp_path, device='cpu', workers=1, progress=False)
    with pytest.raises(SystemExit) as e:
        cifar_predict(['a.png', '--weights', str(next(tmp_path.glob('*.safetensors')))])
    assert e.value.code == 2 and 'load_weights' in capsys.readouterr().err


def test_odd_names_do_nothing_to_a_terminal(photos, capsys, monkeypatch):
    monkeypatch.chdir(photos)
    shutil.copy('a.png', 'red\x1b[31m.png')
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BytesIO(), encoding='ascii'))
    with pytest.raises(SystemExit):
        cifar_predict(['caf\u00e9 1.webp', 'red\x1b[31m.png', 'gone\x1b[31m.png', '--weights', 'net.safetensors'])
    sys.stdout.flush()
    out, err = sys.stdout.buffer.getvalue(), capsys.readouterr().err
    assert b'caf? 1.webp: ' in out and b'red?[31m.png: ' in out and 'gone?[31m.png' in err and '\x1b' not in err


# Which runs are there?

def test_runs_say_once_what_they_share(good, capsys, monkeypatch):
    monkeypatch.chdir(good[0])
    runs = load_runs('report/runs')
    cifar_runs(['report'])
    out = capsys.readouterr().out
    common, table = out.split('\n\n')
    assert common.startswith(f'{len(runs)} runs with ') and 'momentum 0.9' in common and NAME in ' '.join(common.split())
    head, *rows = table.splitlines()
    assert head.split() == 'run lr train acc test acc best at epoch seconds'.split() and len(rows) == len(runs)
    assert max(map(len, out.splitlines())) <= 80
    for row, r in zip(rows, runs):
        assert f"{100 * r['epochs'][-1]['test_acc']:.2f}" in row and f"{r['config']['lr']:g}" in row


def test_runs_for_other_programs(good, capsys, monkeypatch):
    monkeypatch.chdir(good[0])
    cifar_runs(['report', '--format', 'csv'])
    csv = pd.read_csv(io.StringIO(capsys.readouterr().out))
    cifar_runs(['report', 'report/runs', '--format', 'json'])               # of two names the first
    rows = json.loads(capsys.readouterr().out)
    runs = load_runs('report/runs')
    assert csv['lr'].tolist() == [r['lr'] for r in rows] == [r['config']['lr'] for r in runs]
    assert [r['test acc'] for r in rows] == pytest.approx([100 * r['epochs'][-1]['test_acc'] for r in runs])
    assert {r['data'] for r in rows} == {NAME} and {r['folder'] for r in rows} == {str(Path('report', 'runs'))}
    assert set(rows[0]) == set(csv)


def test_damaged_runs_get_a_line_and_the_rest_is_shown(good, capsys, monkeypatch, tmp_path):
    shutil.copytree(good[0]/'report', tmp_path/'report')
    monkeypatch.chdir(tmp_path)
    a, b, _, *more = sorted(Path('report/runs').glob('*.json'))
    for file in more: file.unlink()                     # another test's
    a.write_bytes(a.read_bytes()[:50])
    b.write_text('[]')
    with pytest.raises(SystemExit) as e: cifar_runs(['report', 'none'])
    out, err = capsys.readouterr()
    assert e.value.code == 1 and out.startswith('1 run with') and len(err.splitlines()) == 3
    assert a.name in err and b.name in err and 'none: no runs in it' in err
    long = 'x' * 300                                    # more than a disk can name
    with pytest.raises(SystemExit) as e: cifar_runs([long, '~nobody-here/runs', 'report'])
    out, err = capsys.readouterr()
    assert e.value.code == 1 and out.startswith('1 run with') and long in err and '~nobody-here/runs: ' in err
    with pytest.raises(SystemExit) as e: cifar_runs(['none', str(a)])
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == '' and len(err.splitlines()) == 2


def test_a_run_that_lies_does_nothing_to_a_terminal(good, capsys, tmp_path):
    run = load_runs(good[0]/'report'/'runs')[0]
    run['data']['name'] = 'red\x1b[31m\nnext'
    file = save_run(run, tmp_path)
    with pytest.raises(SystemExit): cifar_runs([str(tmp_path)])
    out, err = capsys.readouterr()
    assert out == '' and len(err.splitlines()) == 1 and file.name in err and '\x1b' not in err


@pytest.mark.parametrize('kind', ['text', 'csv', 'json'])
@pytest.mark.skipif(os.name == 'nt', reason='Windows has no such names')
def test_a_folder_of_runs_does_nothing_to_a_terminal(good, capsys, tmp_path, kind):
    folder = tmp_path/'red\x1b[31m\u202e'
    folder.mkdir()
    save_run(load_runs(good[0]/'report'/'runs')[0], folder)
    cifar_runs([str(folder), '--format', kind])
    said = capsys.readouterr()
    assert '[31m' in said.out and not {'\x1b', '\u202e'} & set(said.out + said.err)


RED = 'N\x1b[31m\x1b]0;title\x07', 'N\u202e', 'N\nnext'

@pytest.mark.parametrize('name', RED)
@pytest.mark.parametrize('key', ['name', 'classes'])
def test_names_that_cannot_be_printed_are_refused(good, small, capfd, monkeypatch, tmp_path, key, name):
    monkeypatch.chdir(good[0])
    value = name if key == 'name' else (*small.classes[:-1], name)
    with pytest.raises(ValueError, match=key): dataclasses.replace(small, **{key: value})
    path = save_npz(tmp_path/'red.npz', small, **{key: value})
    with pytest.raises(DataError, match='red.npz: .* letters that can be printed'): load_data(path)
    err = refused(good, capfd, '--data', str(path))
    assert str(path) in err and not {'\x1b', '\x07', '\u202e'} & set(err)


def test_an_npz_without_a_name_and_with_a_name_that_cannot_be_printed(small, tmp_path):
    path = save_npz(tmp_path/'red\x7f.npz', small)
    with pytest.raises(DataError, match='letters that can be printed'): load_data(path)
    assert load_data(path, name='mine').name == 'mine'


def test_a_tensor_does_nothing_to_a_terminal(good, photos, capsys, monkeypatch, tmp_path):
    "Its name is part of the error, which stays two lines; the second cannot pass for a line of ours"
    monkeypatch.chdir(photos)
    net, about = load_model('net.safetensors')
    state = net.state_dict() | {'x\x1b[31mEVIL\n\nfake line\nmore': torch.zeros(0)}
    file = tmp_path/'evil.safetensors'
    save_weights(state, file, about | dict(weights_sha256=weights_sha256(state)))
    with pytest.raises(SystemExit): cifar_predict(['a.png', '--weights', str(file)])
    first, second = capsys.readouterr().err.splitlines()
    assert 'x?[31mEVIL' in first and second.startswith('  fake line; more')


def test_a_warning_does_nothing_to_a_terminal(capsys):
    with one_line_errors(Parser('try', 'Try')): warnings.warn('red\x1b[31m\nnext', stacklevel=1)
    assert capsys.readouterr().err == 'red?[31m\nnext\n'


@pytest.mark.skipif(os.name == 'nt', reason='POSIX pipes')
def test_a_reader_who_has_had_enough_is_no_error(good):
    said = subprocess.run(f'{COMMAND.with_name("cifar_runs")} report --format json | head -c 1', shell=True,
                          cwd=good[0], env=clean_env(), capture_output=True, text=True)
    assert (said.stdout, said.stderr) == ('[', '')


# The library's side: typed exceptions

@pytest.mark.parametrize('error, call', [
    (ValueError, lambda d, p: load_data('cifar100')),
    (FileNotFoundError, lambda d, p: load_data(p/'none.npz')),
    (DataError, lambda d, p: load_data(bad_npz(d, p/'bad.npz', 'y_train', lambda y: y - 1))),
    (ValueError, lambda d, p: fit(ImageClassifier(), dataloaders(d), lr=0)),
    (ValueError, lambda d, p: fit(ImageClassifier(), dataloaders(d), lr=float('nan'))),
    (ValueError, lambda d, p: fit(ImageClassifier(), dataloaders(d), epochs=0)),
    (ValueError, lambda d, p: dataloaders(d, bs=0)), (ValueError, lambda d, p: dataloaders(d, bs=1.5)),
    (ValueError, lambda d, p: dataloaders(d, num_workers=-1)),
    (ValueError, lambda d, p: dataloaders(d, num_workers=1.5)),
    (ValueError, lambda d, p: fit(ImageClassifier(), dataloaders(d), lr=1e299)),
    (ValueError, lambda d, p: fit(ImageClassifier(), dataloaders(d), weight_decay=1e299)),
    (ValueError, lambda d, p: shapes10(-1, 5)), (ValueError, lambda d, p: shapes10(5, 0)),
    (ValueError, lambda d, p: shapes10(2.5, 1)), (ValueError, lambda d, p: shapes10(2, 1, seed=1.5)),
    (ValueError, lambda d, p: shapes10(10**12, 1)), (ValueError, lambda d, p: ImageClassifier(seed=1.5)),
    (ValueError, lambda d, p: lr_find(d, steps=0)), (ValueError, lambda d, p: lr_find(d, steps=2.5)),
    (ValueError, lambda d, p: pick_device('tpu')), (ValueError, lambda d, p: pick_device('cuda:99')),
    (ValueError, lambda d, p: sweep(d, [.01], reading='none')),
    (ValueError, lambda d, p: sweep(d, [.01], bs=0)),
    (ValueError, lambda d, p: sweep(d, [.01], model=type('x' * 600, (), {'__call__': tiny_net})(), out=p)),
    (ValueError, lambda d, p: Settings(reading='own: red\x1b[31m')),
    (OSError, lambda d, p: reproduce(d, out=save_npz(p/'a.npz', d)/'below')),
    (FileNotFoundError, lambda d, p: load_weights(ImageClassifier(), p/'none.safetensors'))])
def test_typed_exceptions(small, tmp_path, error, call):
    with pytest.raises(error) as e: call(small, tmp_path)
    assert str(e.value)


HOMELESS = '~nobody-here/x'

@pytest.mark.parametrize('call', [
    lambda d: load_data(f'{HOMELESS}.npz'), lambda d: load_data('cifar10', HOMELESS), lambda d: load_data('auto', HOMELESS),
    lambda d: load_run(f'{HOMELESS}.json'), lambda d: load_runs(HOMELESS),
    lambda d: load_weights(ImageClassifier(), HOMELESS), lambda d: save_weights(ImageClassifier(), HOMELESS),
    lambda d: load_model(HOMELESS), lambda d: prepare_image(HOMELESS), lambda d: clear_live(HOMELESS),
    lambda d: reproduce(d, out=HOMELESS), lambda d: write_report([dict(data=dict(name=NAME))], HOMELESS)])
def test_a_home_that_is_not_known_is_an_error_that_names_the_path(small, call):
    with pytest.raises(FileNotFoundError, match=HOMELESS): call(small)


def test_a_setting_of_this_package_names_its_path_too(monkeypatch):
    monkeypatch.setenv('CIFAR_NBDEV_ROOT', HOMELESS)
    with pytest.raises(FileNotFoundError, match=HOMELESS): load_data('cifar10', download=False)


def test_a_folder_is_no_weights(tmp_path):
    with pytest.raises(ValueError, match='not a file'): load_weights(ImageClassifier(), tmp_path)


def test_numbers_of_numpy_are_numbers(small):
    "As seed, batch size, number of images and of steps, whatever their width"
    assert shapes10(*np.array([20, 10]), seed=np.uint8(3)).sha256 == shapes10(20, 10, seed=3).sha256
    for more in ({}, dict(num_workers=np.int64(0))):
        a, b = (dataloaders(small, t(64), seed=t(2**31 - 1), **more).train for t in (int, np.int32))
        assert all(torch.equal(x, z) and torch.equal(y, w) for (x, y), (z, w) in zip(a, b, strict=True))
    assert weights_sha256(ImageClassifier(seed=np.int64(7))) == weights_sha256(ImageClassifier(seed=7))
    assert len(lr_find(small, high=.01, steps=np.int64(2), device='cpu', progress=False)) == 2


def test_an_error_names_both_ends():
    with pytest.raises(ValueError, match=r'bs is 2147483648, wanted .* below 2\*\*31'): check_settings(bs=2**31)
    with pytest.raises(ValueError, match='lr is .* below 3e38'): check_settings(lr=1e299)


@pytest.mark.parametrize('other', [dict(branches=3), 'no gate', 'two heads', dict(classes=100), dict(kernel_size=3)])
def test_weights_of_another_model_are_refused(tmp_path, other):
    net = READINGS[other]() if isinstance(other, str) else ImageClassifier(**other)
    save_weights(net, tmp_path/'other.safetensors')
    model = ImageClassifier(seed=0)
    before = weights_sha256(model)
    with pytest.raises(ValueError, match='another model'): load_weights(model, tmp_path/'other.safetensors')
    assert weights_sha256(model) == before


@pytest.mark.parametrize('content', [b'', b'\0' * 100, b'half'])
def test_a_file_that_holds_no_weights_is_refused(tmp_path, content):
    (tmp_path/'bad.safetensors').write_bytes(content)
    with pytest.raises(ValueError, match='not a whole'):
        load_weights(ImageClassifier(), tmp_path/'bad.safetensors')


# Interrupt

@pytest.mark.skipif(os.name == 'nt', reason='POSIX signals')
@pytest.mark.parametrize('kill', [os.kill, getattr(os, 'killpg', None)],
                         ids=['the command alone', 'Ctrl-C in a terminal'])
def test_an_interrupt_keeps_what_is_finished(tmp_path, kill):
    save_npz(tmp_path/'data.npz', shapes10(1000, 100), name=NAME)
    lrs = [f'{n}e-4' for n in range(1, 61)]                                  # enough for a slow machine
    args = ['--data', 'data.npz', '--lrs', *lrs, *'--epochs 20 --device cpu --workers 1'.split()]
    process = subprocess.Popen([COMMAND, *args], cwd=tmp_path, env=clean_env(), start_new_session=True,
                               # a shell's background jobs ignore it
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (finished := list((tmp_path/'report'/'runs').glob('[!.]*.json'))):
        assert process.poll() is None, process.stderr.read()
        time.sleep(.005)
    kill(process.pid, signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    runs = len(load_runs(tmp_path/'report'/'runs'))
    assert finished[0].exists() and 1 <= runs < 60
    last = err.splitlines()[-1]
    said = re.match(r'cifar_report: interrupted. (\d+) of 60 runs finished', last)
    assert runs - 1 <= int(said[1]) <= runs and 'Traceback' not in err       # one may end at that moment
    assert len(err.splitlines()) == runs + 2 and out == ''
    assert not (tmp_path/'report'/'index.html').exists()
