"""The live net in a real browser: it answers as PyTorch does, takes whatever it is given, and asks nobody"""
import io, json, struct, time, zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from cifar_nbdev.data import shapes10
from cifar_nbdev.live import RUNS, write_live
from cifar_nbdev.model import ImageClassifier
from cifar_nbdev.page import write_report
from cifar_nbdev.results import KEPT, weights_file
from cifar_nbdev.runs import Settings, load_runs, load_weights, save_run, train_run
from conftest import NEEDS_BROWSER, ROOT, requests, show

pytestmark = NEEDS_BROWSER
LRS = .01, .1
EVIL = '</script><img src=x onerror="document.title=1">'
PIXELS = """                                            // from a copy, made for being read
  window.copy ??= new OffscreenCanvas(32, 32).getContext('2d', {willReadFrequently: true})
  copy.drawImage(document.querySelector('.live-picture canvas'), 0, 0)
  return [...copy.getImageData(0, 0, 32, 32).data].filter((_, i) => i % 4 < 3)"""
PROBS = "return [...document.querySelectorAll('.live-net td:nth-child(3) data')].map(d => +d.value)"


@pytest.fixture(scope='module')
def report(small, tmp_path_factory):
    "A report on shapes, two learning rates, one epoch: its folder, and its nets by learning rate"
    out, runs, nets = tmp_path_factory.mktemp('report'), [], {}
    for lr in LRS:
        run, nets[lr] = train_run(small, Settings(lr=lr, epochs=1), device='cpu', progress=False)
        save_run(run, out/'runs', nets[lr])
        runs.append(run)
    write_report(runs, out, classes=small.classes)
    return out, nets


def png(x):
    "An image (H, W, 3) or (H, W, 4) as the bytes of a PNG"
    with io.BytesIO() as f:
        Image.fromarray(x).save(f, 'PNG')
        return f.getvalue()


def prepared(image):
    "What the net should see of an image, by PIL: uint8 (32, 32, 3)"
    image = ImageOps.exif_transpose(image).convert('RGBA')
    image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
    n = min(image.size)
    left, top = (image.width - n) // 2, (image.height - n) // 2
    image = image.crop((left, top, left + n, top + n))
    return np.asarray(image.resize((32, 32), Image.Resampling.BOX))


def probabilities(model, x):
    "PyTorch's answer to one image, uint8 (32, 32, 3)"
    with torch.no_grad(): return model(torch.tensor(x).permute(2, 0, 1)[None].float() / 255).softmax(1)[0].numpy()


def wait(browser, script, wanted, seconds=20):
    "Run a script until it gives what is wanted"
    end = time.time() + seconds
    while not wanted(found := browser.execute_script(script)):
        assert time.time() < end, found
        time.sleep(.02)
    return found


def seen(browser): return np.array(browser.execute_script(PIXELS), np.uint8).reshape(32, 32, 3)


def give(browser, path, content):
    "Put a file into the page's real file input"
    path.write_bytes(content)
    browser.find_element('css selector', 'input[type=file]').send_keys(str(path))


def choose(browser, lr, step=0):
    "Choose a learning rate and a place of the epochs' slider, and wait for the net"
    browser.execute_script("""
        const [i, step] = arguments, slider = document.querySelector('[type=range]')
        document.querySelectorAll('[name=live-lr]')[i].click()
        if (slider) { slider.value = step; slider.dispatchEvent(new Event('input')) }""", lr, step)


def pictures(n=20):
    "Drawn shapes, and noise of several kinds, uint8 (n, 32, 32, 3)"
    rng = np.random.default_rng(0)
    shapes = shapes10(10, n - 8, seed=3).x_test.permute(0, 2, 3, 1).numpy()
    noise = [rng.integers(0, high, (32, 32, 3), np.uint8) for high in (256, 100, 30)]
    flat = [np.full((32, 32, 3), v, np.uint8) for v in ((0, 0, 0), (255, 255, 255), (20, 160, 240))]
    ramp = np.linspace(0, 255, 1024).reshape(32, 32, 1).repeat(3, 2).astype(np.uint8)
    return [*shapes, *noise, *flat, ramp, ramp.transpose(1, 0, 2)]


def agree(browser, path, models):
    "Give 20 pictures, to each model in turn, and compare: the largest difference of a probability"
    worst = 0
    for i, x in enumerate(pictures()):
        (lr, step), model = list(models.items())[i % len(models)]
        choose(browser, lr, step)
        give(browser, path, png(x))
        wait(browser, PIXELS, lambda found: found == x.reshape(-1).tolist())    # bit by bit
        p = probabilities(model, x)
        found = wait(browser, PROBS, lambda found: len(found) == len(p) and np.abs(p - found).max() < 1e-4)
        worst = max(worst, np.abs(p - found).max())
    return worst


def quiet(browser):
    "Nothing was asked of anybody else, nothing failed, and the console is empty"
    asked, failed = requests(browser)
    console = [e for e in browser.get_log('browser') if e['level'] in ('SEVERE', 'WARNING')]
    assert not failed and not console, (failed, console)
    assert all(a.startswith(('file:', 'http://127.0.0.1')) for a in asked)
    return asked


def test_on_the_site_it_answers_as_pytorch_does(browser, url, tmp_path):
    lrs = [r['config']['lr'] for lr in (.005, .01, .0001)
           for r in load_runs(ROOT/'nbs'/RUNS, reading='gate', init='pytorch', lr=lr, seed=0)]
    models = {(i, s): load_weights(ImageClassifier(), weights_file(ROOT/'nbs'/RUNS, lr, epoch))
              for i, lr in enumerate(lrs) for s, epoch in enumerate(KEPT)}
    show(browser, f'{url}/live.html', 1300, 'light')
    wait(browser, PROBS, lambda found: len(found) == 10)
    assert agree(browser, tmp_path/'x.png', models) < 1e-4
    assert len([a for a in quiet(browser) if '/live/lr' in a]) >= 20            # each when it was asked for


def test_in_a_report_opened_as_a_file_it_answers_as_pytorch_does(browser, report, tmp_path):
    out, nets = report
    show(browser, (out/'index.html').as_uri(), 1300, 'light')
    assert agree(browser, tmp_path/'x.png', {(i, 0): nets[lr] for i, lr in enumerate(LRS)}) < 1e-4
    text = browser.find_element('css selector', '.live-net').text
    assert 'Trained on shapes10 (synthetic), not CIFAR-10' in text and 'crescent' in text
    quiet(browser)


def test_it_runs_nets_of_other_sizes_and_shows_names_as_they_are(browser, report, tmp_path):
    out, _ = report
    model = ImageClassifier(3, 4, 7, classes=5, seed=1)
    (tmp_path/'index.html').write_bytes((out/'index.html').read_bytes())
    runs = load_runs(out/'runs', lr=LRS[0])
    write_live(tmp_path/'live', runs, {LRS[0]: {1: model}}, (EVIL, 'b', 'c', 'd', 'e'))
    show(browser, (tmp_path/'index.html').as_uri(), 1300, 'light')
    assert agree(browser, tmp_path/'x.png', {(0, 0): model}) < 1e-4
    assert browser.execute_script("return document.querySelectorAll('.live-maps figure').length") == 3 * 2 + 2
    assert EVIL in browser.find_element('css selector', '.live-net').get_attribute('textContent')
    assert not browser.find_elements('css selector', '.live-net :is(script, img)') and browser.title != '1'


def odd_pictures():
    "Name, bytes, what it should look like, and by how much a pixel may differ"
    rng = np.random.default_rng(1)
    def noise(*shape): return rng.integers(0, 256, shape, np.uint8)
    def picture(name, image, off=0, kind='PNG', **more):
        with io.BytesIO() as f:
            image.save(f, kind, **more)
            return name, f.getvalue(), prepared(Image.open(io.BytesIO(f.getvalue()))), off
    for size in ((32, 32), (20, 45), (33, 33), (333, 250), (64, 700)):
        yield picture(f'{size}.png', Image.fromarray(noise(*size, 3)))
    yield picture('clear.png', Image.fromarray(noise(96, 96, 4)), off=1)
    yield picture('hole.png', Image.new('RGBA', (32, 32), (0, 0, 0, 0)))
    yield picture('grey.png', Image.fromarray(noise(100, 80)))
    upright = Image.Exif()
    upright[0x0112] = 6
    halves = Image.new('RGB', (120, 80), 'red')
    halves.paste('blue', (0, 0, 60, 80))
    yield picture('lying.jpg', halves, off=3, kind='JPEG', quality=95, exif=upright)
    frames = [Image.new('P', (40, 40), i) for i in (1, 2)]
    for frame in frames: frame.putpalette([0, 0, 0, 200, 40, 90, 10, 250, 30])
    yield picture('moving.gif', frames[0], kind='GIF', save_all=True, append_images=frames[1:], duration=20)


def large_png(w, h):
    "A black PNG of one bit a pixel: small as a file"
    def part(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    header = struct.pack('>IIBBBBB', w, h, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((1 + -(-w // 8)) * h), 1)
    return b'\x89PNG\r\n\x1a\n' + part(b'IHDR', header) + part(b'IDAT', rows) + part(b'IEND', b'')


def test_it_takes_pictures_of_any_kind_and_refuses_what_is_none(browser, report, tmp_path):
    show(browser, (report[0]/'index.html').as_uri(), 1300, 'light')
    for name, content, wanted, off in odd_pictures():
        give(browser, tmp_path/name, content)
        wait(browser, PIXELS, lambda found: np.abs(np.array(found) - wanted.reshape(-1)).max() <= off, 5)
        assert not browser.find_element('css selector', '.live-alarm').text, name
    before = seen(browser)
    refused = {'none.png': (b'no picture', 'is no picture'), 'empty.png': (b'', 'is empty'),
               'cut.png': (png(pictures(9)[0])[:40], 'is no picture'),
               'large.png': (large_png(13_000, 12_000), 'more than 150 million')}
    for name, (content, said) in refused.items():
        give(browser, tmp_path/name, content)
        text = wait(browser, "return document.querySelector('.live-alarm').textContent", lambda t: said in t)
        assert text.startswith(name) and (seen(browser) == before).all()
    quiet(browser)


def test_pictures_can_be_dropped_pasted_and_drawn(browser, report, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains
    show(browser, (report[0]/'index.html').as_uri(), 1300, 'light')
    for i, kind in enumerate(('drop', 'paste')):
        x = pictures(9)[i]
        browser.execute_script("""
            const [kind, content] = arguments, data = new DataTransfer()
            data.items.add(new File([new Uint8Array(content)], 'x.png', {type: 'image/png'}))
            document.body.dispatchEvent(kind == 'drop'
              ? new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})
              : new ClipboardEvent('paste', {clipboardData: data, bubbles: true}))""", kind, list(png(x)))
        wait(browser, PIXELS, lambda found: found == x.reshape(-1).tolist())
    click = "[...document.querySelectorAll('.live-button')].find(b => b.textContent == 'Clear').click()"
    browser.execute_script(click + "; document.querySelector('[aria-label=red]').click()")
    assert (seen(browser) == 255).all()
    canvas = browser.find_element('css selector', '.live-picture canvas')
    browser.execute_script('arguments[0].scrollIntoView({block: "center"})', canvas)
    ActionChains(browser, duration=50).move_to_element_with_offset(canvas, -60, 0).click_and_hold() \
        .move_to_element_with_offset(canvas, 60, 0).release().perform()
    x = seen(browser)
    assert (x[16, 10:22] == (208, 32, 32)).all() and (x[:8] == 255).all() and (x[24:] == 255).all()
    p = probabilities(report[1][LRS[0]], x)
    assert np.abs(p - browser.execute_script(PROBS)).max() < 1e-4
    assert browser.find_element('css selector', '.live-says').get_attribute('aria-busy') == 'false'


def test_the_keyboard_reaches_everything(browser, url):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys
    def press(*keys): ActionChains(browser).send_keys(*keys).perform()
    active = """const e = document.activeElement, seen = e.closest('label, button, canvas') ?? e
        return [e.getAttribute('aria-label') || e.title || e.labels?.[0]?.textContent || e.textContent,
                [seen, e].some(e => getComputedStyle(e).outlineStyle != 'none')]"""
    show(browser, f'{url}/live.html', 1300, 'light')
    first = wait(browser, PROBS, lambda found: len(found) == 10)
    canvas = browser.find_element('css selector', '.live-picture canvas')
    browser.execute_script('arguments[0].focus()', canvas)
    before = seen(browser)
    press(Keys.ARROW_RIGHT, Keys.SPACE)
    changed = (seen(browser) != before).any(2)
    assert changed[15:18, 16:19].any() and changed.sum() <= 9 and browser.execute_script(PROBS) != first
    reached, actions = [], {'0.005': Keys.ARROW_RIGHT, 'Epoch': Keys.ARROW_LEFT, 'flower': Keys.SPACE}
    for _ in range(25):
        press(Keys.TAB)
        name, outline = browser.execute_script(active)
        reached.append(name.strip())
        assert outline, f'the focus on {name} cannot be seen'
        if key := actions.pop(name.strip(), None):
            before = browser.execute_script(PROBS)
            press(key)
            wait(browser, PROBS, lambda found: len(found) == 10 and found != before)
        if name.startswith('What speaks for'): break
    assert reached[0] == 'Choose a picture' and {'black', 'Clear', 'stripes', 'Epoch'} <= set(reached)
    assert not actions and reached[-1].startswith('What speaks for')
    assert browser.find_element('css selector', '[type=range]').get_attribute('aria-valuetext') == 'epoch 20'


LOW = """
const light = c => c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
  .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0)
const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor
  if (!/, 0\\)|transparent/.test(c)) return c } return matchMedia('(prefers-color-scheme: dark)').matches ?
  'rgb(0,0,0)' : 'rgb(255,255,255)' }
return [...document.querySelectorAll('.live-net *')].filter(e => e.getClientRects().length &&
  [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim())).map(e => {
  const s = getComputedStyle(e), [a, b] = [s.fill != 'rgb(0, 0, 0)' ? s.fill : s.color, ground(e)].map(light)
  return [e.textContent, (Math.max(a, b) + .05) / (Math.min(a, b) + .05)] }).filter(([_, ratio]) => ratio < 4.5)"""


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_it_can_be_read_on_a_phone_in_light_and_dark(browser, url, report, scheme):
    for address in (f'{url}/live.html', (report[0]/'index.html').as_uri()):
        show(browser, address, 390, scheme)
        wait(browser, PROBS, lambda found: len(found) == 10)
        assert browser.execute_script('return document.documentElement.scrollWidth') <= 390
        tops = browser.execute_script("return [...document.querySelectorAll('.live-top > *')]"
                                      ".map(e => e.getBoundingClientRect().top)")
        assert tops[0] < tops[2] < tops[1], 'picture, answer, net'
        assert browser.execute_script(LOW) == []
        unnamed = browser.execute_script(
            "return [...document.querySelectorAll('.live-net :is(input, button, select, canvas)')].filter(e => "
            "!(e.ariaLabel || e.title || e.textContent.trim() || e.labels?.length)).map(e => e.outerHTML)")
        assert unnamed == []


def test_what_is_missing_is_said_in_one_line(browser, report, tmp_path):
    def alarm(wanted):
        return wait(browser, "return [...document.querySelectorAll('.live-alarm')].map(e => e.textContent)"
                    ".join('')", lambda text: wanted in text)
    (tmp_path/'index.html').write_bytes((report[0]/'index.html').read_bytes())
    show(browser, (tmp_path/'index.html').as_uri(), 1300, 'light')
    assert alarm('live/net.js is not there') and 'Here the page runs' in browser.page_source
    (tmp_path/'live').mkdir()
    (tmp_path/'live'/'net.js').write_bytes((report[0]/'live'/'net.js').read_bytes())
    show(browser, (tmp_path/'index.html').as_uri(), 1300, 'light')
    assert alarm('live/lr0.01-epoch1.js is not there')
    assert not browser.find_elements('css selector', '.live-net data')
    browser.get_log('browser')                          # where Chromium itself names the missing files


def test_without_javascript_the_page_says_what_it_would_show(site, report):
    from bs4 import BeautifulSoup
    for page, more in ((site/'live.html', ('explore_gates', 'predict')), (report[0]/'index.html', ())):
        text = BeautifulSoup(page.read_text(encoding='utf-8'), 'html.parser').select_one('.live-net').get_text()
        for word in ('JavaScript', '32×32', 'gates', 'probabilities', 'nothing is sent', *more): assert word in text


def test_the_script_is_small_and_holds_no_way_out():
    script = (ROOT/'cifar_nbdev'/'live.js').read_text(encoding='utf-8')
    assert len(script.encode()) < 60_000 and script.count('\n') < 300
    assert max(map(len, script.split('\n'))) <= 110
    for word in ('fetch(', 'XMLHttpRequest', 'sendBeacon', 'WebSocket', 'innerHTML', 'insertAdjacent', 'eval(',
                 'document.write', '</', '{{', '{%', '{#'): assert word not in script, word


def test_nets_that_the_page_cannot_run_are_left_out(report, small, tmp_path, monkeypatch):
    runs = load_runs(report[0]/'runs')
    monkeypatch.setattr('cifar_nbdev.page._figures', lambda runs: [])           # they take long
    def left(name, runs, classes=small.classes):
        out = tmp_path/name
        for file in (report[0]/'runs').glob('*.safetensors'):
            (out/'runs').mkdir(parents=True, exist_ok=True)
            (out/'runs'/file.name).write_bytes(file.read_bytes())
        (out/'live').mkdir()
        for old in ('net.js', 'lr7-epoch3.js', 'mine.js'): (out/'live'/old).write_text('old')
        html = write_report(runs, out, classes=classes).read_text(encoding='utf-8')
        assert ('Try the net' in html) == ('live-net' in html)
        return 'Try the net' in html, sorted(p.name for p in (out/'live').iterdir())
    assert left('all', runs) == (True, ['lr0.01-epoch1.js', 'lr0.1-epoch1.js', 'mine.js', 'net.js'])
    assert left('unnamed', runs, None) == (False, ['mine.js'])
    for name, config in (('reading', {'reading': 'mix-first'}), ('change', {'change': 'normalised input'}),
                         ('missing', {'momentum': .5})):
        assert left(name, [dict(r, config=r['config'] | config) for r in runs]) == (False, ['mine.js'])
    with pytest.warns(UserWarning, match='without its nets.*another model'):
        assert left('classes', runs, ('a', 'b')) == (False, ['mine.js'])
    about = (report[0]/'live'/'net.js').read_text()
    assert json.loads(about[about.index('{'):about.rindex(')')])['classes'] == list(small.classes)
