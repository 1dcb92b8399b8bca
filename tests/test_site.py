"""The built site in a real browser: headless Chromium opens every page from a local server"""
import contextlib, json, re
from importlib import import_module
from urllib.parse import urlsplit

import pytest

from conftest import NEEDS_BROWSER, ROOT, requests, served, show

SCREENS = {'desktop': (1300, 'light'), 'phone': (390, 'light'), 'dark': (1300, 'dark')}
MODULES = [p.stem for p in sorted((ROOT/'cifar_nbdev').glob('[!_]*.py'))]
FLOORS = {'The report': '0[0-3]', 'Beyond it': '0[4-9]', 'Under the hood': '1'}

pytestmark = NEEDS_BROWSER


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


@pytest.mark.parametrize('name', ['train.fit', 'train.evaluate', 'sweep.sweep', 'data.load_data'])
def test_search_puts_a_function_first_and_lands_on_it(browser, url, name):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait
    page, name = name.split('.')
    show(browser, f'{url}/search.html?q={name}', 1300, 'light')
    links = (By.CSS_SELECTOR, '#search-results li a')
    first = WebDriverWait(browser, 20).until(lambda b: b.find_elements(*links))[0]
    assert first.text == f'cifar_nbdev.{page}.{name}'
    browser.execute_script('arguments[0].click()', first)
    WebDriverWait(browser, 20).until(lambda b: f'{page}.html' in b.current_url)
    WebDriverWait(browser, 20).until(lambda b: b.execute_script(
        f'const t = document.getElementById("{name}").getBoundingClientRect().top;'
        'return t >= -5 && t < 300'))
    assert browser.current_url.endswith(f'#{name}')


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


# Weight

def loaded(browser, address):
    "Bytes that come over the wire when a page is opened for the first time, headers included"
    browser.execute_cdp_cmd('Network.setCacheDisabled', {'cacheDisabled': True})
    show(browser, address, 1300, 'light')
    browser.execute_cdp_cmd('Network.setCacheDisabled', {'cacheDisabled': False})
    messages = [json.loads(e['message'])['message'] for e in browser.get_log('performance')]
    return sum(m['params']['encodedDataLength'] for m in messages if m['method'] == 'Network.loadingFinished')


def test_a_page_is_light(browser, site, url):
    weights = {p.name: loaded(browser, f'{url}/{p.name}') for p in sorted(site.glob('*.html'))}
    assert min(weights.values()) > 200_000, 'the styles of the theme are not counted'
    assert not {name: weight for name, weight in weights.items() if weight > 750_000}


# Formulas

def formulas(path):
    "Formulas of a notebook's text"
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    text = '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    text = re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.S)
    return re.findall(r'\$\$(.+?)\$\$|\$([^$\n]+)\$', text, re.S)


def test_every_formula_is_set_by_the_browser(browser, soups, url):
    counted = 0
    for path in sorted((ROOT/'nbs').glob('[0-9]*.ipynb')):
        raw = ''.join(json.loads(path.read_text(encoding='utf-8'))['cells'][0]['source'])
        page = re.search(r'output-file: (\S+)', raw)[1]
        wanted = sum(len(block.split(r'\qquad')) if block else 1 for block, _ in formulas(path))
        assert len(soups[page.removesuffix('.html')].find_all('math')) == wanted, page
        if not wanted: continue
        show(browser, f'{url}/{page}', 1300, 'light')
        sizes = browser.execute_script("return [...document.querySelectorAll('math')].map(m => {"
                                       'const r = m.getBoundingClientRect(); return [r.width, r.height]})')
        assert all(w > 4 and h > 4 for w, h in sizes), page
        counted += wanted
    assert counted > 80


# Paper

PAPER = 680                                             # A4 between its margins, in CSS pixels
CUT_OFF = """return [...document.querySelectorAll('body *')].filter(e => {
  const r = e.getBoundingClientRect(), s = getComputedStyle(e);
  return r.width > 1 && r.height > 1 && s.visibility != 'hidden' && \
(r.right > innerWidth + 1 || s.overflowX != 'visible' && e.scrollWidth > e.clientWidth + 1)
}).map(e => e.tagName + '.' + e.className)"""
SHOWN = ("return [...document.querySelectorAll('{}')].filter(e => e.checkVisibility())"
         ".map(e => e.outerHTML.slice(0, 99))")
AROUND = ', '.join(('#pst-primary-sidebar', '#pst-secondary-sidebar', '.bd-header-article', 'button',
                    '.headerlink', '.prev-next-footer', '.bd-article a.source'))
FOLDED = "return [...document.querySelectorAll('.bd-article pre')].filter(e => !e.checkVisibility()).length"


@contextlib.contextmanager
def paper(browser, address):
    "A page as it goes to the printer, of a reader who prefers the dark"
    show(browser, address, PAPER, 'dark')
    dark = [dict(name='prefers-color-scheme', value='dark')]
    browser.execute_script('dispatchEvent(new Event("beforeprint"))')
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', {'media': 'print', 'features': dark})
    yield
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', {'media': '', 'features': dark})
    browser.execute_script('dispatchEvent(new Event("afterprint"))')


def test_on_paper_nothing_is_cut_off_or_folded(browser, site, url):
    folded = 0
    for page in sorted(p.name for p in site.glob('*.html') if p.name != 'search.html'):
        with paper(browser, f'{url}/{page}'):
            assert not browser.execute_script(CUT_OFF), page
            assert not browser.execute_script(SHOWN.format(AROUND)), page
            assert browser.execute_script('return document.documentElement.dataset.theme') == 'light'
            assert browser.execute_script('return document.querySelector("h1").checkVisibility()'), page
            assert not browser.execute_script(FOLDED), page
        folded += browser.execute_script('return document.querySelectorAll("details:not([open])").length')
        assert browser.execute_script('return document.documentElement.dataset.theme') == 'dark', page
    assert folded > 20, 'code is folded again'


# Everyone

CONTRAST = (ROOT/'tests'/'contrast.js').read_text(encoding='utf-8')
ACCURACIES = """return [...document.querySelectorAll('th')].filter(e => /^(report|ours)( \\(%\\))?$/.test(\
e.textContent.trim()) && e.checkVisibility()).slice(0, 2).map(e => {
  const r = e.getBoundingClientRect(), box = e.closest('table').parentElement.getBoundingClientRect();
  return [r.left - Math.max(0, box.left), Math.min(innerWidth, box.right) - r.right]})"""


def outlines(browser):
    "Faint marks of the focus; the keyboard is used first, or the browser draws none"
    from selenium.webdriver.common.keys import Keys
    browser.switch_to.active_element.send_keys(Keys.TAB)
    return browser.execute_script(CONTRAST + 'return faintFocus()')


def skip_link(browser):
    "Tab, Enter, Tab: whether the first link is seen and leads into the main part"
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait
    browser.switch_to.active_element.send_keys(Keys.TAB)
    first = browser.switch_to.active_element
    WebDriverWait(browser, 5).until(lambda b: first.is_displayed() and first.text.startswith('Skip'))
    assert first.rect['x'] >= 0 and first.rect['y'] >= 0 and first.rect['width'] > 20
    first.send_keys(Keys.ENTER)
    browser.switch_to.active_element.send_keys(Keys.TAB)
    return browser.execute_script('return document.activeElement.closest("main") != null')


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_and_focus_stand_out(browser, site, url, scheme):
    for page in sorted(p.name for p in site.glob('*.html')):
        show(browser, f'{url}/{page}', 1300, scheme)
        assert not browser.execute_script(CONTRAST + 'return faintText()'), page
        if page in ('index.html', 'report.html', 'search.html'): assert not outlines(browser), page


def test_contrast_finds_what_is_faint(browser, tmp_path):
    (tmp_path/'a.html').write_text(
        '<style>b { color: #999 } a { outline: none }</style><p>plain <b>faint</b>'
        ' <a href="#">no mark</a></p><button>plain</button>')
    with served(tmp_path) as address: show(browser, f'{address}/a.html', 1300, 'light')
    assert [f[:2] for f in browser.execute_script(CONTRAST + 'return faintText()')] == ['B.']
    assert [f[:2] for f in outlines(browser)] == ['A.']


def test_the_skip_link_leads_into_the_page(browser, url):
    show(browser, f'{url}/report.html', 1300, 'light')
    assert skip_link(browser)


@pytest.mark.parametrize('page', ['index', 'report'])
def test_a_phone_shows_the_accuracies(browser, url, page):
    show(browser, f'{url}/{page}.html', 390, 'light')
    room = browser.execute_script(ACCURACIES)
    assert len(room) == 2 and min(min(r) for r in room) >= 0, room


def test_headings_are_in_order_and_columns_have_heads(soups):
    for name, soup in soups.items():
        levels = [int(h.name[1]) for h in soup.find_all(re.compile('^h[1-6]$'))]
        assert levels[0] == 1 and levels.count(1) == 1, name
        assert all(b <= a + 1 for a, b in zip(levels, levels[1:])), name
        assert soup.html['lang'] == 'en' and all(th.get('scope') for th in soup.find_all('th')), name


# The report page

@pytest.fixture(scope='module')
def report(tmp_path_factory):
    "A report of the stored runs, one of their JSON files beside it"
    from cifar_nbdev.page import write_report
    from cifar_nbdev.runs import load_runs, save_run
    out = tmp_path_factory.mktemp('report')
    runs = load_runs(ROOT/'nbs'/'results', reading='gate')
    runs = [r for r in runs if r['config']['lr'] in (.005, .01, .0001)]
    for r in runs[1:]: save_run(r, out/'runs')
    return write_report(runs, out)


@pytest.fixture(scope='module')
def report_url(report):
    "Where it is served"
    with served(report.parent) as address: yield f'{address}/index.html'


def test_every_link_of_the_report_leads_to_a_file(report):
    from bs4 import BeautifulSoup
    soup = BeautifulSoup(report.read_text(encoding='utf-8'), 'html.parser')
    links = [a['href'] for a in soup.find_all('a') if not a['href'].startswith('#')]
    assert not [link for link in links if not (report.parent/link).exists()]
    files = {p.relative_to(report.parent).as_posix() for p in report.parent.rglob('*') if p.is_file()}
    assert files - set(links) == {'index.html'} and 'runs/' in links


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_the_report_page_is_for_everyone(browser, report_url, scheme):
    show(browser, report_url, 1300, scheme)
    assert skip_link(browser)
    assert not browser.execute_script(CONTRAST + 'return faintText()') and not outlines(browser)
    levels = browser.execute_script('return [...document.querySelectorAll("h1, h2, h3")].map(h => h.tagName)')
    assert levels[0] == 'H1' and set(levels[1:]) == {'H2'}
    assert not browser.execute_script('return document.querySelector("th:not([scope]), img:not([alt])")')
    show(browser, report_url, 390, scheme)
    room = browser.execute_script(ACCURACIES)
    assert len(room) == 2 and min(min(r) for r in room) >= 0, room
    with paper(browser, report_url): assert not browser.execute_script(CUT_OFF)
    assert loaded(browser, report_url) < 1_000_000
