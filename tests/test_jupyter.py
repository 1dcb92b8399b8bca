"""Widgets in a real JupyterLab, driven by headless Chromium: a click ends a training, a slider draws anew"""
import os, socket, subprocess, sys, time
from importlib.util import find_spec
from urllib.request import urlopen

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from conftest import BROWSER, DRIVER, FLAGS, ROOT, clean_env

pytestmark = [
    pytest.mark.skipif(not find_spec('jupyterlab') or not find_spec('selenium'),
                       reason='needs JupyterLab and Selenium, of the dev and doc extras'),
    pytest.mark.skipif(not BROWSER or not DRIVER, reason='no Chromium with its driver here: on Debian, '
                       'apt-get install chromium chromium-driver'),
    pytest.mark.skipif(os.name == 'nt', reason='ends its server by a signal')]

TRAIN = """
from cifar_nbdev.callbacks import LivePlot
from cifar_nbdev.data import dataloaders, shapes10
from cifar_nbdev.model import ImageClassifier
from cifar_nbdev.train import fit
data = shapes10(300, 100)
history = fit(ImageClassifier(seed=0), dataloaders(data), 5000, 0.01, device='cpu', progress=False,
              callbacks=[LivePlot()])
print('ENDED', 0 < len(history) < 5000, history.interrupted)"""
EXPLORE = """
from cifar_nbdev.runs import Settings, train_run
from cifar_nbdev.widgets import explore_gates, explore_predictions, explore_runs
runs = [train_run(data, Settings(lr=.05, epochs=5, seed=s), device='cpu', progress=False)[0] for s in (0, 1)]
explore_runs(runs)"""
INSIDE = """
net = ImageClassifier(seed=0)
fit(net, dataloaders(data), 20, 0.02, device='cpu', progress=False)
display(explore_predictions(net, data), explore_gates(net, data))"""


@pytest.fixture
def lab(tmp_path):
    "Address of a notebook in a JupyterLab that knows nothing of the user's settings"
    (tmp_path/'work').mkdir()
    nb = new_notebook(cells=[new_code_cell(code.strip()) for code in (TRAIN, EXPLORE, INSIDE)])
    nb.metadata['kernelspec'] = dict(display_name='python3', language='python', name='python3')
    nbformat.write(nb, tmp_path/'work'/'try.ipynb')
    folders = {f'JUPYTER_{k}_DIR': tmp_path/k.lower() for k in ('CONFIG', 'DATA', 'RUNTIME')}
    folders |= {f'JUPYTERLAB_{k}_DIR': tmp_path/k.lower() for k in ('SETTINGS', 'WORKSPACES')}
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', f'--port={port}', '--ip=127.0.0.1',
         '--ServerApp.port_retries=0', '--IdentityProvider.token=secret', f'--ServerApp.root_dir={tmp_path}/work',
         '--LabApp.expose_app_in_browser=True', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate'],
        env=clean_env(PYTHONPATH=ROOT, OMP_NUM_THREADS=1, **folders), stdout=subprocess.DEVNULL,
        stderr=(tmp_path/'log').open('w'))
    try:
        for _ in range(300):
            try:
                urlopen(f'http://127.0.0.1:{port}/api', timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (tmp_path/'log').read_text()
                time.sleep(.1)
        yield f'http://127.0.0.1:{port}/lab/tree/try.ipynb?token=secret&reset'
    finally:
        server.terminate()                              # its kernels end with it
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()


class Notebook:
    "A notebook in the browser"
    def __init__(self, driver, address):
        from selenium.webdriver.support.ui import WebDriverWait
        self.driver, self.wait = driver, WebDriverWait(driver, 60, .1).until
        driver.get(address)
        self.wait(lambda d: d.execute_script(           # what is run before that may be lost
            'const k = window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel;'
            'return k?.connectionStatus == "connected" && k.status == "idle"'))
    def all(self, css): return self.driver.execute_script(f'return [...document.querySelectorAll({css!r})]')
    def run(self, cell):
        self.driver.execute_script(f'jupyterapp.shell.currentWidget.content.activeCellIndex = {cell};'
                                   'jupyterapp.commands.execute("notebook:run-cell")')
    def output(self, cell):
        return self.all('.jp-Notebook .jp-CodeCell')[cell].find_element('css selector', '.jp-Cell-outputWrapper')
    def until(self, cell, text):
        "Wait for a text in a cell's output"
        self.wait(lambda d: text in self.output(cell).text or 'Traceback' in self.output(cell).text)
        assert text in self.output(cell).text, self.output(cell).text
    def find(self, cell, css):
        "Elements of a cell's output, when there are some"
        return self.wait(lambda d: self.output(cell).find_elements('css selector', css))


@pytest.fixture
def notebook(lab, tmp_path):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in [*FLAGS, f'--user-data-dir={tmp_path}/profile', '--window-size=1300,2400']: options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try: yield Notebook(driver, lab)
    finally:
        driver.save_screenshot(tmp_path/'end.png')      # for whoever looks why it failed
        driver.quit()


def test_a_click_ends_a_training_and_widgets_answer(notebook):
    from selenium.webdriver.common.keys import Keys
    notebook.run(0)
    notebook.until(0, 'about ')                         # two epochs or more, of a cell that runs
    notebook.find(0, 'img[alt^=History]')
    notebook.find(0, 'button')[0].click()
    notebook.until(0, 'ENDED True False')
    notebook.until(0, 'stopped after')

    notebook.run(1)
    notebook.until(1, 'After epoch 5:')
    picture = notebook.find(1, 'img')[0].get_attribute('src')
    notebook.find(1, '.noUi-handle')[0].send_keys(Keys.ARROW_LEFT)
    notebook.until(1, 'After epoch 4:')
    assert notebook.find(1, 'img')[0].get_attribute('src') != picture

    notebook.run(2)
    button = next(b for b in notebook.find(2, 'button') if b.text not in '0')
    button.send_keys(Keys.SPACE)                        # by the keyboard
    notebook.find(2, 'img[alt^="Images of"]')
    first = notebook.find(2, 'img[alt^="Test image"]')[0].get_attribute('src')
    notebook.find(2, '.noUi-handle')[0].send_keys(Keys.ARROW_RIGHT)
    notebook.find(2, 'img[alt^="Test image 1 "]')
    assert notebook.find(2, 'img[alt^="Test image"]')[0].get_attribute('src') != first
