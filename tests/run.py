"""All tests: nbdev_test on each notebook, then pytest; the last line counts what passed (for `make test`)"""
import os, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def data_used():
    "Which data the notebooks get from `load_data(download=False)`"
    code = "from cifar_nbdev.data import load_data; print(load_data(download=False))"
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=ROOT/'nbs',
                       capture_output=True, text=True)
    return r.stdout.strip() or r.stderr.strip().splitlines()[-1]


def notebook(path):
    "Run one notebook's cells with nbdev_test; did all pass?"
    command = ['nbdev_test', '--path', str(path.relative_to(ROOT)), '--n_workers', '0', '--timing']
    r = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                       env=os.environ | {'TQDM_DISABLE': '1'})
    passed = r.returncode == 0 and 'Success.' in r.stdout       # a notebook that nbdev skips has not passed
    print(f'{path.name}: {"passed" if passed else "FAILED"}\n{r.stdout}', flush=True)
    return passed


class Count:
    "A pytest plugin that keeps pytest's own counts"
    passed = failed = skipped = 0

    def pytest_terminal_summary(self, terminalreporter):
        "Called once, after the last test"
        n = {k: len(v) for k, v in terminalreporter.stats.items()}
        self.passed, self.skipped = n.get('passed', 0), n.get('skipped', 0) + n.get('xfailed', 0)
        self.failed = n.get('failed', 0) + n.get('error', 0) + n.get('xpassed', 0)


def main():
    "Run everything; 0 if all passed"
    source = os.environ.get('CIFAR_NBDEV_DATA', '')
    if Path(source).is_file():                          # the notebooks run in nbs/
        os.environ['CIFAR_NBDEV_DATA'] = str(Path(source).resolve())
    os.chdir(ROOT)
    notebooks, count = sorted((ROOT/'nbs').glob('[!.]*.ipynb')), Count()
    print(f'{len(notebooks)} notebooks, on {data_used()}', flush=True)
    with ThreadPoolExecutor(2) as pool: done = list(pool.map(notebook, notebooks))
    status = pytest.main(['tests', '-q', '--durations=5'], plugins=[count])
    passed, failed = sum(done) + count.passed, len(done) - sum(done) + count.failed
    if not done or status and not count.failed: failed += 1   # no notebooks, no tests, or pytest itself broke
    print(f'{passed} passed, {failed} failed' + f', {count.skipped} skipped' * (count.skipped > 0))
    return int(failed > 0)


if __name__ == '__main__': sys.exit(main())
