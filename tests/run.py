"""All tests, for `make test`: each notebook runs once, its outputs compared with those stored, then pytest;
the last line counts what passed"""
import os, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'docs'))


class Count:
    "A pytest plugin that keeps pytest's own counts"
    passed = failed = skipped = 0

    def pytest_terminal_summary(self, terminalreporter):
        "Called once, after the last test"
        n = {k: len(v) for k, v in terminalreporter.stats.items()}
        self.passed, self.skipped = n.get('passed', 0), n.get('skipped', 0) + n.get('xfailed', 0)
        self.failed = n.get('failed', 0) + n.get('error', 0) + n.get('xpassed', 0)


# the longest first, so that at the end no process waits for another
LONG = [f'tests/test_{name}.py' for name in 'commands sweep ends fuzz site killed compiled'.split()]
# a test that hangs fails after this many seconds, and says where: the longest takes minutes on a busy machine
OPTIONS = '-q -n 2 --dist loadfile --no-loadscope-reorder --durations=5 --timeout=900'.split()


def main():
    "Run everything; 0 if all passed"
    import execute
    for name in ('CIFAR_NBDEV_DATA', 'CIFAR_NBDEV_ROOT'):               # the notebooks run in nbs/
        if os.environ.get(name) and Path(os.environ[name]).exists():
            os.environ[name] = str(Path(os.environ[name]).resolve())
    os.chdir(ROOT)
    notebooks, count = execute.run_all(check=True), Count()
    for wrong in notebooks.values(): print(*wrong, sep='\n', end='\n' * bool(wrong), flush=True)
    bad = sum(map(bool, notebooks.values()))
    # two at a time, of one thread each; a file's tests together: what they share is made once
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    others = sorted({p.as_posix() for p in Path('tests').glob('test_*.py')} - {*LONG})
    status = pytest.main([*LONG, *others, *OPTIONS], plugins=[count])
    passed, failed = len(notebooks) - bad + count.passed, bad + count.failed
    if not notebooks or status and not count.failed: failed += 1        # no notebooks, no tests, or it broke
    print(f'{passed} passed, {failed} failed' + f', {count.skipped} skipped' * (count.skipped > 0))
    return int(failed > 0)


if __name__ == '__main__': sys.exit(main())
