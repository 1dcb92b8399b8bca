"""What tests share: small data, an environment without the user's settings, Python in a process of its own,
the built site and a browser"""
import functools, hashlib, json, os, shutil, subprocess, sys, threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
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


# The site in a browser

BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
DRIVER = shutil.which('chromedriver')
FLAGS = ('--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run '
         '--disable-background-networking --disable-component-update --disable-sync '
         '--disable-dev-shm-usage').split()
NEEDS_BROWSER = [
    pytest.mark.skipif(not find_spec('sphinx_book_theme') or not find_spec('selenium'),
                       reason='the site needs the doc extra: make docs installs it'),
    pytest.mark.skipif(not BROWSER or not DRIVER, reason='no Chromium with its driver here: on Debian, '
                       'apt-get install chromium chromium-driver')]


@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "The site, built now: once in a session, by whichever of its processes is the first to ask"
    from fcntl import LOCK_EX, flock
    shared = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ: shared = shared.parent
    with open(shared/'site.lock', 'w') as f:
        flock(f, LOCK_EX)
        if not (shared/'site.built').exists():
            subprocess.run([sys.executable, 'docs/build.py'], cwd=ROOT, check=True)
            (shared/'site.built').touch()
    return ROOT/'_docs'


class Quiet(SimpleHTTPRequestHandler):
    "A file server that says nothing"
    def log_message(self, *args): pass


@contextmanager
def served(folder):
    "The address of a folder, while the block runs"
    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_address[1]}'
    server.shutdown()
    server.server_close()


@pytest.fixture(scope='module')
def url(site):
    "Where the site is served"
    with served(site) as address: yield address


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    "Chromium with an empty profile, its console and its requests logged"
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]: options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_script_timeout(30)
    yield driver
    driver.quit()


def show(browser, address, width, scheme):
    "Open a page and wait until it has settled"
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(
        width=width, height=900, deviceScaleFactor=1, mobile=width < 500))
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(
        features=[dict(name='prefers-color-scheme', value=scheme)]))
    for log in ('browser', 'performance'): browser.get_log(log)
    browser.get(address)
    browser.execute_async_script(
        'const done = arguments[0]; const go = () => setTimeout(done, 100);'
        'document.readyState == "complete" ? go() : addEventListener("load", go)')


def requests(browser):
    "What a page asked for, from the performance log: addresses, and those that failed"
    asked, failed = {}, []
    for entry in browser.get_log('performance'):
        message = json.loads(entry['message'])['message']
        p = message['params']
        if message['method'] == 'Network.requestWillBeSent': asked[p['requestId']] = p['request']['url']
        if message['method'] == 'Network.responseReceived' and p['response']['status'] >= 400:
            failed.append(p['response']['url'])
        if message['method'] == 'Network.loadingFailed' and not p.get('canceled'):
            failed.append(asked.get(p['requestId']))
    return [a for a in asked.values() if not a.startswith(('data:', 'blob:'))], failed
