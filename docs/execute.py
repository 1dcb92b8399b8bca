"""Executes the notebooks on shapes10 and stores their outputs, \
or checks that the stored ones are what the code gives

    python docs/execute.py [--check] [notebook ...]

The check is the notebooks' test, too: each runs once, every assertion must hold, no file may be left behind.
Figures are compared by the data they draw, not by their pixels: lines, areas, bars, images and texts are
summed up in a few numbers each, which are stored in the metadata of the figure's output. Cells flagged
`slow` or `cuda` are not run and keep their outputs. In cells flagged `trains`, which train on this machine,
decimal numbers may be off by 0.1: processors round differently, and training lets that grow. A check runs on
the data that CIFAR_NBDEV_DATA and CIFAR_NBDEV_ROOT choose; where those are not shapes10, outputs of cells
flagged `data` or `trains` need only be of the same kinds.
"""
import argparse, base64, copy, inspect, io, math, os, re, subprocess, sys, tempfile, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat.v4 import new_code_cell
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
MAX_SIZE = 300_000                                      # bytes of a notebook with its outputs
DRAWN = 'application/x-drawn+json'
ENV = dict(TQDM_DISABLE='1', OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore', PYDEVD_DISABLE_FILE_VALIDATION='1')
SHAPES = dict(CIFAR_NBDEV_DATA='shapes10')             # no photographs in the repository
_SKIP = re.compile(r'^#\|\s*(?:slow|cuda)\b|^[^#\n]*nbdev_export\(\)', re.M)
_UNWATCHED = {'.git', '__pycache__', '.ipynb_checkpoints', '.ruff_cache'}


def hook(mime):
    "Runs in the notebook's kernel: from now on a figure's output also carries what the figure draws"
    import numpy as np
    from IPython import get_ipython
    from IPython.core.formatters import BaseFormatter
    from traitlets import Unicode

    def numbers(array):
        "Size, lowest, highest, mean, a mean with growing weights (tells the order); of points, by coordinate"
        a = np.ma.filled(np.ma.asarray(array, dtype=float), np.nan)
        if a.ndim == 2 and a.shape[1] == 2: return numbers(a[:, 0]) + numbers(a[:, 1])
        a = a[np.isfinite(a)]
        sums = (a.min(), a.max(), a.mean(), (a * np.linspace(0, 1, a.size)).mean()) if a.size else ()
        return [a.size, *(float(f'{v:.7g}') for v in sums)]

    def drawn(fig):
        "All data and texts of a figure"
        found = [['figure', fig.get_suptitle()]]
        for ax in fig.axes:
            texts = [ax.get_title(), ax.get_xlabel(), ax.get_ylabel(), *(t.get_text() for t in ax.texts)]
            if ax.get_legend(): texts += [t.get_text() for t in ax.get_legend().get_texts()]
            found.append(['axes', *texts, *(float(f'{v:.5g}') for v in (*ax.get_xlim(), *ax.get_ylim()))])
            found += [['line', *numbers(line.get_xydata())] for line in ax.lines]
            found += [['bar', *numbers(p.get_patch_transform().transform(p.get_path().vertices))]
                      for p in ax.patches]
            found += [['image', *numbers(i.get_array())] for i in ax.images]
            for c in ax.collections:
                parts = (*(p.vertices for p in c.get_paths()), c.get_offsets(), c.get_array())
                found.append(['area', *(n for part in parts if part is not None for n in numbers(part))])
        return found

    class DrawnFormatter(BaseFormatter):                # not `for_type`: choosing a figure format undoes that
        format_type = Unicode(mime)
        def __call__(self, obj):
            if type(obj).__module__ == 'matplotlib.figure': return drawn(obj)

    get_ipython().display_formatter.formatters[mime] = DrawnFormatter()


def _hook_cell():
    "A cell that installs `hook`"
    return new_code_cell(f'{inspect.getsource(hook)}\nhook({DRAWN!r})\ndel hook')


def _tidy(outputs):
    "Outputs as stored: no standard error, no widgets, no counts; what a figure draws goes into its metadata"
    widget = 'application/vnd.jupyter.widget-view+json'
    outputs = [o for o in outputs if o.get('name') != 'stderr' and widget not in o.get('data', {})]
    for o in outputs:
        if 'execution_count' in o: o.execution_count = None
        if DRAWN in o.get('data', {}): o.metadata['drawn'] = o.data.pop(DRAWN)
        if 'image/png' in o.get('data', {}): o.data['image/png'] = _small(o.data['image/png'])
    return outputs


def _small(png):
    "A base64 PNG in 256 colours, which is smaller and looks the same"
    with io.BytesIO() as f:
        image = Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB')
        image.quantize(256, dither=Image.Dither.NONE).save(f, 'PNG', optimize=True)
        return min(base64.b64encode(f.getvalue()).decode(), png.replace('\n', ''), key=len)


def execute(path, **env):
    "A notebook with the outputs that its cells give now, in an environment with `env` added"
    nb = nbformat.read(path, as_version=4)
    ran = copy.deepcopy(nb)
    for cell in ran.cells:
        if _SKIP.search(cell.source): cell.metadata['tags'] = ['skip-execution']
    ran.cells.insert(0, _hook_cell())
    NotebookClient(ran, timeout=600, kernel_name='python3', store_widget_state=False, coalesce_streams=True,
                   extra_arguments=['--log-level=ERROR'],
                   resources={'metadata': {'path': str(path.parent)}}).execute(env=os.environ | ENV | env)
    for cell, new in zip(nb.cells, ran.cells[1:]):
        if cell.cell_type == 'code': cell.outputs = _tidy(new.outputs)
    return nb


def _text(data):
    "What a reader sees of a stored or fresh output, without markup that versions of libraries differ in"
    text = data if isinstance(data, str) else repr(data)
    text = re.sub(r'<style.*?</style>|<[^>]+>', ' ', text, flags=re.S)
    return ' '.join(re.sub(r' at 0x[0-9a-f]+', '', text).split())


def _same(a, b):
    "Are what two figures draw alike? Numbers may differ by rounding"
    if isinstance(a, list) and isinstance(b, list): return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6)
    return a == b


def _roughly(a, b):
    "Are two texts the same but for small differences of decimal numbers and percentages?"
    if not isinstance(a, str): return _same(a, b)
    number = re.compile(r'\d+\.\d+|\d+%')
    values = ([float(v.rstrip('%')) / (100 if '%' in v else 1) for v in number.findall(t)] for t in (a, b))
    return number.sub('', a) == number.sub('', b) and all(abs(x - y) < .1 for x, y in zip(*values))


def _contents(cell):
    "The outputs of a cell as (kind, content); the pixels of a figure are left out"
    for o in cell.get('outputs', []):
        if o.output_type == 'stream': yield o.name, _text(o.text)
        for mime, data in sorted(o.get('data', {}).items()):
            if mime.startswith('image/') and 'drawn' in o.metadata: yield 'figure', o.metadata['drawn']
            else: yield mime, _text(data)


def differences(stored, fresh, own_data=False):
    "What is stored in a notebook but is not what its code gives, cell by cell; `own_data`: not on shapes10"
    for i, (old, new) in enumerate(zip(stored.cells, fresh.cells)):
        a, b = list(_contents(old)), list(_contents(new))
        had, has = ([kind for kind, _ in contents] for contents in (a, b))
        trains = re.search(r'^#\| *trains\b', new.source, re.M)
        if had != has: yield f'cell {i}: stored outputs are {had}, the code gives {has}'
        elif not (own_data and (trains or re.search(r'^#\| *data\b', new.source, re.M))):
            same = _roughly if trains else _same
            yield from (f'cell {i}, {kind}:\n  stored {_first(x, y)}\n  now    {_first(y, x)}'
                        for (kind, x), (_, y) in zip(a, b) if not same(x, y))


def _first(x, y):
    "The part of `x` where it begins to differ from `y`"
    if isinstance(x, str):
        n = len(os.path.commonprefix([x, y]))
        return repr(x[max(0, n - 40):n + 60])
    return next((a for a, b in zip(x, y) if not _same(a, b)), f'{len(x)} parts')


def complaints(nb):
    "What must not be stored: figures without a picture, paths of this machine, and too much"
    here = (str(ROOT), str(Path.home()) + '/', tempfile.gettempdir() + '/')
    for i, cell in enumerate(nb.cells):
        if '#| fig-cap:' in cell.source and 'figure' not in dict(_contents(cell)):
            yield f'cell {i}: has a caption but shows no figure'
        for kind, text in _contents(cell):
            if kind != 'figure' and any(p in text for p in here):
                yield f'cell {i}: its output has a path of this machine in it'
    if (size := len(nbformat.writes(nb).encode())) > MAX_SIZE:
        yield f'{size:,} bytes with its outputs, wanted at most {MAX_SIZE:,}'


def data_used():
    "What the notebooks get from `load_data(download=False)`, in the environment as it is"
    code = 'from cifar_nbdev.data import load_data; print(load_data(download=False).name)'
    command = [sys.executable, '-W', 'ignore', '-c', code]
    r = subprocess.run(command, cwd=ROOT/'nbs', capture_output=True, text=True)
    return (r.stdout.strip() or f'nothing: {r.stderr.strip()}').splitlines()[-1]


class Watch:
    "Tells which files of a folder are new or changed, each once"
    def __init__(self, root=ROOT, but=()):
        self.root, self.but, self.lock = Path(root), {Path(p) for p in but}, threading.Lock()
        self.seen = self.files()

    def files(self):
        "Size and time of every file, less those that running Python or git makes anywhere"
        found = {}
        for folder, subs, names in os.walk(self.root):
            subs[:] = [s for s in subs if s not in _UNWATCHED and not (Path(folder)/s/'pyvenv.cfg').exists()]
            for path in (Path(folder)/n for n in names):
                if path in self.but: continue
                try: found[path] = path.stat().st_size, path.stat().st_mtime_ns
                except FileNotFoundError: pass          # gone again: the notebook beside this one had made it
        return found

    def new(self):
        "Files that have come or changed since the last call"
        with self.lock:
            before, self.seen = self.seen, self.files()
            return [p.relative_to(self.root) for p, state in self.seen.items() if before.get(p) != state]


def run(path, check, own_data=False, watch=None):
    "Check one notebook or store its outputs; what is wrong with it"
    stored, start = nbformat.read(path, as_version=4), time.perf_counter()
    try:
        fresh = execute(path, **({} if check else SHAPES))
        wrong = list(complaints(stored if check else fresh))
        if check: wrong += differences(stored, fresh, own_data)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as e: wrong = [f'a cell failed:\n{e}']
    if watch: wrong += [f'left {p} behind (or a notebook that ran beside it did)' for p in watch.new()]
    if not check and not wrong:
        from nbdev.clean import nbdev_clean
        nbformat.write(fresh, path)
        nbdev_clean(fname=str(path))
    said = 'FAILED' if wrong else 'as stored' if check else 'stored'
    print(f'{path.name}: {said} ({time.perf_counter() - start:.0f} s)', flush=True)
    return [f'{path.name}, {w}' for w in wrong]


def run_all(notebooks=(), check=True):
    "Two notebooks at a time; what is wrong with each, by its path"
    name = data_used() if check else 'shapes10'
    paths = [p.resolve() for p in notebooks] or sorted((ROOT/'nbs').glob('[!._]*.ipynb'))
    print(f'{len(paths)} notebooks, on {name}', flush=True)
    watch, own_data = Watch(but=paths), not name.startswith('shapes10')
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(paths, pool.map(lambda p: run(p, check, own_data, watch), paths)))


def main(argv=None):
    "The command line; the exit status is 1 if anything is wrong"
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--check', action='store_true',
                   help='store nothing, fail if a stored output is not what the code gives')
    p.add_argument('notebooks', nargs='*', type=Path, help='default: all in nbs/')
    args = p.parse_args(argv)
    wrong = sum(run_all(args.notebooks, args.check).values(), [])
    print(*wrong, sep='\n', file=sys.stderr)
    return int(bool(wrong))


if __name__ == '__main__': sys.exit(main())
