"""The built site in a real browser: headless Chromium opens every page from a local server"""
import functools, json, re, shutil, subprocess, sys, threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from importlib.util import find_spec
from urllib.parse import urlsplit

import pytest

from conftest import ROOT

BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
DRIVER = shutil.which('chromedriver')
FLAGS = ('--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run '
         '--disable-background-networking --disable-component-update --disable-sync '
         '--disable-dev-shm-usage').split()
SCREENS = {'desktop': (1300, 'light'), 'phone': (390, 'light'), 'dark': (1300, 'dark')}
MODULES = [p.stem for p in sorted((ROOT/'cifar_nbdev').glob('[!_]*.py'))]
FLOORS = {'The report': '0[0-3]', 'Beyond it': '0[4-9]', 'Under the hood': '1'}

pytestmark = [
    pytest.mark.skipif(not find_spec('sphinx_book_theme') or not find_spec('selenium'),
                       reason='the site needs the doc extra: make docs installs it'),
    pytest.mark.skipif(not BROWSER or not DRIVER, reason='no Chromium with its driver here: on Debian, '
                       'apt-get install chromium chromium-driver')]


@pytest.fixture(scope='module')
def site():
    "The site, built now"
    subprocess.run([sys.executable, 'docs/build.py'], cwd=ROOT, check=True)
    return ROOT/'_docs'


class Quiet(SimpleHTTPRequestHandler):
    "A file server that says nothing"
    def log_message(self, *args): pass


@pytest.fixture(scope='module')
def url(site):
    "Where the site is served"
    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_address[1]}'
    server.shutdown()
    server.server_close()


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
        'const done = arguments[0]; const go = () => (window.MathJax?.startup?.promise ?? Promise.resolve())'
        '.then(() => setTimeout(done, 100));'
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


WIDER = """return [...document.querySelectorAll('body *')].filter(e => {
  const r = e.getBoundingClientRect();
  if (!r.width || !r.height || getComputedStyle(e).visibility == 'hidden' || \
r.right <= innerWidth + 1 || r.left >= innerWidth) return false;
  for (let p = e; p; p = p.parentElement) \
if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX) || \
getComputedStyle(p).position == 'fixed') return false;
  return true}).map(e => e.tagName + '.' + e.className)"""
SCROLLED = ("return [...document.querySelectorAll('.bd-article p, .bd-article pre, .bd-article li')]"
            ".filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth)"
            ".map(e => e.textContent.slice(0, 60))")
UNLOADED = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"


@pytest.mark.parametrize('screen', SCREENS)
def test_every_page(browser, site, url, screen):
    width, scheme = SCREENS[screen]
    pages = sorted(p.name for p in site.glob('*.html'))
    assert {'index.html', 'data.html', 'model.html', 'train.html', 'report.html'} <= set(pages)
    for page in pages:
        show(browser, f'{url}/{page}', width, scheme)
        asked, failed = requests(browser)
        assert asked and {urlsplit(a).netloc for a in asked} == {urlsplit(url).netloc}, page
        assert not failed, page
        console = [e for e in browser.get_log('browser') if e['level'] in ('SEVERE', 'WARNING')]
        assert not console, page
        assert browser.execute_script('return document.documentElement.scrollWidth') <= width, page
        assert not browser.execute_script(WIDER) and not browser.execute_script(UNLOADED), page
        if width > 1000: assert not browser.execute_script(SCROLLED), page
        theme = browser.execute_script('return document.documentElement.dataset.theme')
        assert theme in (scheme, 'auto'), page


def test_the_first_screen_of_the_home_page_has_the_curves_and_the_table(browser, url):
    show(browser, f'{url}/index.html', 1300, 'light')
    for what in ('.bd-article h1', '.bd-article img', '.bd-article table'):
        bottom = f'return document.querySelector("{what}").getBoundingClientRect().bottom'
        assert browser.execute_script(bottom) <= 900, what


def test_search_finds_fit_and_lands_on_it(browser, url):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait
    show(browser, f'{url}/search.html?q=fit', 1300, 'light')
    fit = '#search-results a[href*="train.html"][href$="#fit"]'
    link = WebDriverWait(browser, 20).until(lambda b: b.find_elements(By.CSS_SELECTOR, fit))[0]
    browser.execute_script('arguments[0].click()', link)
    WebDriverWait(browser, 20).until(lambda b: 'train.html' in b.current_url)
    WebDriverWait(browser, 20).until(lambda b: b.execute_script(
        'const t = document.getElementById("fit").getBoundingClientRect().top; return t >= -5 && t < 300'))
    assert browser.current_url.endswith('#fit')


def test_the_sidebar_has_the_floors_and_their_pages(browser, site, url):
    show(browser, f'{url}/index.html', 1300, 'light')
    seen = browser.execute_script(
        "return [...document.querySelectorAll('.bd-sidebar-primary nav :is(p.caption, a.internal)')]"
        ".map(e => e.matches('a') ? new URL(e.href).pathname.slice(1) : e.textContent.trim())")
    wanted = []
    for caption, numbers in FLOORS.items():
        cells = [json.loads(p.read_text(encoding='utf-8'))['cells']
                 for p in sorted((ROOT/'nbs').glob(f'{numbers}*_*.ipynb'))]
        wanted += [caption, *(re.search(r'output-file: (\S+)', ''.join(c[0]['source']))[1] for c in cells)]
    assert [s for s in seen if s != 'index.html'] == wanted
    assert {p.name for p in site.glob('*.html')} - {'index.html', 'search.html'} == set(wanted) - set(FLOORS)


@pytest.fixture(scope='module')
def soups(site):
    "Every page, parsed, by name"
    from bs4 import BeautifulSoup
    return {p.stem: BeautifulSoup(p.read_text(encoding='utf-8'), 'html.parser') for p in site.glob('*.html')}


@pytest.mark.parametrize('module', MODULES)
def test_every_public_name_has_its_source_on_the_page_below_its_anchor(soups, module):
    m = import_module(f'cifar_nbdev.{module}')
    names = [n for n in m.__all__ if getattr(getattr(m, n), '__module__', '') == m.__name__]
    code = {n: entry.find_next('pre').get_text() for entry in soups[module].select('p.entry')
            for n in (entry['id'], *(s['id'] for s in entry.find_all('span', id=True)))}
    def shown(n):
        found = code.get(n.lower(), '') + '\n' + code.get(f'{n.lower()}-2', '')     # Fit beside fit
        return re.search(rf'^(def|class) {n}\b', found, re.M)
    assert not [n for n in names if not shown(n)]


def test_the_data_page_shows_how_batches_are_cut(soups):
    code = '\n'.join(pre.get_text() for pre in soups['data'].find_all('pre'))
    assert re.search(r'^class BatchLoader:\n(?:.*\n)+?    def __iter__', code, re.M)
    assert not re.search(r'^#\|', code, re.M), 'a directive is shown'


def test_a_folded_cell_says_what_it_holds_and_opens(browser, soups, url):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait
    folded = {m: f for m, soup in soups.items() if (f := soup.select('details.hide.above-input'))}
    for details in (d for found in folded.values() for d in found):
        assert not details.has_attr('open') and details.find(class_='collapsed').get_text().strip()
    module = next(iter(folded))
    show(browser, f'{url}/{module}.html', 1300, 'light')
    details = browser.find_element(By.CSS_SELECTOR, 'details.hide.above-input')
    assert not details.find_element(By.TAG_NAME, 'pre').is_displayed()
    browser.execute_script('arguments[0].scrollIntoView({block: "center"})', details)
    details.find_element(By.TAG_NAME, 'summary').click()
    WebDriverWait(browser, 20).until(lambda b: details.find_element(By.TAG_NAME, 'pre').is_displayed())
