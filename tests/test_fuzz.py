"""Files that lie: whatever their bytes, a reader gives what it promises or raises its one documented error"""
import copy
import io
import json
import os
import resource
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from cifar_nbdev import sources
from cifar_nbdev.changes import load_tested
from cifar_nbdev.checkpoint import _belongs, _restore
from cifar_nbdev.data import dataloaders, load_data, shapes10
from cifar_nbdev.model import ImageClassifier
from cifar_nbdev.predict import load_model, prepare_image
from cifar_nbdev.results import load_bench
from cifar_nbdev.runs import Settings, load_run, load_weights, save_run, train_run, weights_sha256
from cifar_nbdev.sources import DataError, read_official
from cifar_nbdev.train import fit
from conftest import ROOT, save_npz

TRIES = int(os.environ.get('FUZZ', 2000))               # FUZZ=20000 for a long look
DATA, MODEL = shapes10(40, 20), ImageClassifier(seed=1)
fuzz = settings(max_examples=TRIES, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck))
half = settings(fuzz, max_examples=TRIES // 2)          # for a reader with two tests


# What can happen to bytes

@st.composite
def damage(draw):
    "A function of bytes, that changes them in a few places"
    steps = draw(st.lists(st.tuples(st.sampled_from('flip set cut add end'.split()), st.floats(0, 1),
                                    st.binary(min_size=1, max_size=8)), min_size=1, max_size=4))
    def change(content):
        b = bytearray(content)
        for kind, where, new in steps:
            i = int(where**3 * (len(b) - 1)) if b else 0        # rather near the start, where headers are
            if kind == 'flip' and b: b[i] ^= 1 << new[0] % 8
            elif kind == 'set': b[i:i + len(new)] = new
            elif kind == 'cut': del b[i:i + new[0]]
            elif kind == 'add': b[i:i] = new
            elif kind == 'end': del b[i:]
        return bytes(b)
    return change


def inside_zip(content, which, change):
    "A zip file in which one member is changed, and all checksums fit"
    old, new = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    with zipfile.ZipFile(new, 'w') as z:
        for i, info in enumerate(old.infolist()):
            b = old.read(info)
            z.writestr(info, change(b) if i == which % len(old.infolist()) else b)
    return new.getvalue()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([10**400, -1, 7, 1e300, float('nan'), '<script>', 'x' * 10_000, [[[[[[[[]]]]]]]]]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5)


def places(v, path=()):
    "Where values are in nested lists and dictionaries"
    yield path
    for k, inner in v.items() if isinstance(v, dict) else enumerate(v) if isinstance(v, list) else ():
        yield from places(inner, (*path, k))


@st.composite
def other_values(draw):
    "A function of what is in a JSON file, that changes or removes some of it"
    steps = draw(st.lists(st.tuples(st.floats(0, 1), st.booleans(), values), min_size=1, max_size=3))
    def change(v):
        v = copy.deepcopy(v)
        for where, remove, new in steps:
            found = list(places(v))
            *path, last = found[int(where * (len(found) - 1))] or (None,)
            new = copy.deepcopy(new)                    # or it could be put into itself
            if last is None: v = new; continue
            inner = v
            for k in path: inner = inner[k]
            if remove: del inner[last]
            else: inner[last] = new
        return v
    return change


def reads(read, documented):
    "What a reader gives, None for its documented error; anything else fails"
    try: return read()
    except documented as e:
        assert 0 < len(str(e)) < 3000 and str(e).count('\n') <= 1, str(e)[:3000]


# The readers

@pytest.fixture(scope='module', autouse=True)
def little_memory():
    "What needs gigabytes fails here, rather than being slow"
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('fuzz')


@pytest.fixture(scope='module')
def npz(folder):
    save_npz(folder/'good.npz', DATA.subset(3, 2), classes=np.array(DATA.classes), name=np.array('mine'))
    return (folder/'good.npz').read_bytes()


@pytest.fixture(scope='module')
def run(folder):
    run, model = train_run(DATA, Settings(epochs=2), device='cpu', progress=False)
    return run, save_run(run, folder/'runs', model)


def npz_reader(folder, content):
    (folder/'bad.npz').write_bytes(content)
    d = reads(lambda: load_data(folder/'bad.npz'), (DataError, ValueError))
    if d: assert d.x_train.dtype == torch.uint8 and len(d.classes) > d.y_train.max() and d.name != 'CIFAR-10'


@half
@given(damage())
def test_npz(folder, npz, change): npz_reader(folder, change(npz))


@half
@given(damage(), st.integers(0, 5))
def test_npz_with_checksums_that_fit(folder, npz, change, i): npz_reader(folder, inside_zip(npz, i, change))


@half
@given(damage())
def test_run_bytes(folder, run, change):
    file = folder/run[1].name
    file.write_bytes(change(run[1].read_bytes()))
    reads(lambda: load_run(file), ValueError)


@half
@given(other_values())
def test_run_values(folder, run, change):
    file = folder/run[1].name
    file.write_text(json.dumps(change(run[0])))
    if r := reads(lambda: load_run(file), ValueError):
        assert all(0 <= e['test_acc'] <= 1 for e in r['epochs']) and r['config'] == run[0]['config']
        assert r['data']['sha256'] == DATA.sha256


def test_a_json_file_of_any_size_is_not_read(folder):
    (folder/'long.json').write_bytes(b'[' + b' ' * 20_000_001)
    reads(lambda: load_bench(folder/'long.json'), ValueError)
    with pytest.raises(ValueError, match='20,000,002 bytes, wanted a JSON file of at most 20 MB'):
        load_bench(folder/'long.json')


def test_an_npz_member_is_as_long_as_its_header_says(folder, npz):
    def bigger(content): return content.replace(b'(3, 32, 32, 3)', b'(9, 32, 32, 3)')
    (folder/'bad.npz').write_bytes(inside_zip(npz, 0, bigger))
    with pytest.raises(DataError, match='x_train is not as long as its shape says'): load_data(folder/'bad.npz')


@fuzz
@given(other_values())
def test_bench_values(folder, change):
    stored = json.loads((ROOT/'nbs'/'results'/'bench.json').read_text())
    (folder/'bench.json').write_text(json.dumps(change(stored)))
    reads(lambda: load_bench(folder/'bench.json'), ValueError)


@fuzz
@given(other_values())
def test_tested_values(folder, change):
    stored = json.loads((ROOT/'nbs'/'results'/'changes'/'tested.json').read_text())
    (folder/'tested.json').write_text(json.dumps(change(stored)))
    if t := reads(lambda: load_tested(folder/'tested.json'), ValueError):
        assert all(0 <= x['test_acc'] <= 1 for x in t.values())


@fuzz
@given(damage())
def test_weights(folder, run, change):
    file, model = folder/'weights.safetensors', MODEL
    file.write_bytes(change(run[1].with_suffix('.safetensors').read_bytes()))
    before = weights_sha256(model)
    if reads(lambda: load_weights(model, file), ValueError) is None: assert weights_sha256(model) == before


def net_reader(folder, content, run):
    "A net that comes back is the one that was saved"
    (folder/'net.safetensors').write_bytes(content)
    if found := reads(lambda: load_model(folder/'net.safetensors'), ValueError):
        net, about = found
        assert weights_sha256(net) == about['weights_sha256'] == run['weights_sha256'] and not net.training
        assert len(about['classes']) == 10 and about['config']['reading'] == 'gate'


@half
@given(damage())
def test_net_bytes(folder, run, change):
    net_reader(folder, change(run[1].with_suffix('.safetensors').read_bytes()), run[0])


@half
@given(other_values())
def test_net_header(folder, run, change):
    content = run[1].with_suffix('.safetensors').read_bytes()
    n = int.from_bytes(content[:8], 'little')
    header = json.loads(content[8:8 + n])
    about = json.dumps(change(json.loads(header['__metadata__']['cifar_nbdev'])))
    header = json.dumps(header | {'__metadata__': {'cifar_nbdev': about}}).encode()
    net_reader(folder, len(header).to_bytes(8, 'little') + header + content[8 + n:], run[0])


@pytest.fixture(scope='module')
def images():
    "An image in each of the usual formats, as files"
    def saved(kind):
        with io.BytesIO() as f:
            image.save(f, kind)
            return f.getvalue()
    image = Image.fromarray(DATA.x_train[0].permute(1, 2, 0).numpy())
    return [saved(kind) for kind in ('PNG', 'JPEG', 'GIF', 'WEBP', 'BMP', 'TIFF', 'PPM')]


@fuzz
@given(damage(), st.integers(0, 6))
def test_images(folder, images, change, i):
    (folder/'bad.image').write_bytes(change(images[i]))
    found = reads(lambda: prepare_image(folder/'bad.image'), ValueError)
    assert found is None or found[0].dtype == torch.uint8 and found[0].shape == (3, 32, 32)


def test_a_flipped_bit_in_the_weights_of_a_run_is_noticed(run, tmp_path):
    rng, content = np.random.default_rng(0), run[1].with_suffix('.safetensors').read_bytes()
    file = (tmp_path/run[1].name).with_suffix('.safetensors')
    (tmp_path/run[1].name).write_bytes(run[1].read_bytes())
    for _ in range(100):
        bad, i = bytearray(content), rng.integers(len(content))
        bad[i] ^= 1 << rng.integers(8)
        file.write_bytes(bad)
        with pytest.raises(ValueError): load_weights(ImageClassifier(), file)


@pytest.fixture(scope='module')
def checkpoint(folder):
    file = folder/'good.ckpt'
    fit(ImageClassifier(seed=0), dataloaders(DATA), 2, device='cpu', progress=False, checkpoint=file)
    return file.read_bytes()


class Grab:
    "Callback: keeps the training, which has just read its checkpoint"
    def before_fit(self, t): self.t, self.state = t, torch.get_rng_state()


@pytest.fixture(scope='module')
def resume(folder, checkpoint):
    "A function that goes on from a checkpoint; a refused one leaves model, order and random state alone"
    grab, model, file, dls = Grab(), ImageClassifier(seed=0), folder/'bad.ckpt', dataloaders(DATA)
    file.write_bytes(checkpoint)
    fit(model, dls, 2, device='cpu', progress=False, checkpoint=file, callbacks=[grab])
    belongs = _belongs(grab.t)
    def state(): return weights_sha256(model), *(s.tobytes() for s in (
        torch.get_rng_state().numpy(), dls.train.sampler.generator.get_state().numpy()))
    def go(content):
        file.write_bytes(content)
        before = state()
        found = reads(lambda: (_restore(grab.t, file, belongs), True), ValueError)
        assert found or state() == before
        return found
    yield go
    torch.set_rng_state(grab.state)


@half
@given(damage())
def test_checkpoint(checkpoint, resume, change): resume(change(checkpoint))


@half
@given(damage(), st.integers(0, 20))
def test_checkpoint_with_checksums_that_fit(checkpoint, resume, change, i):
    resume(inside_zip(checkpoint, i, change))


def test_a_flipped_bit_in_a_checkpoint_is_noticed(checkpoint, resume):
    rng, noticed = np.random.default_rng(0), 0
    for _ in range(300):
        bad, i = bytearray(checkpoint), rng.integers(len(checkpoint))
        bad[i] ^= 1 << rng.integers(8)
        noticed += resume(bad) is None
    assert noticed >= 295                               # the others change a date, and the like


@fuzz
@given(st.dictionaries(st.sampled_from(['data_batch_1', 'data_batch_5', 'test_batch', 'batches.meta']),
                       st.binary(max_size=30)), st.binary(max_size=30) | st.none())
def test_official_files(folder, files, archive):
    root = folder/'official'
    (root/'cifar-10-batches-py').mkdir(parents=True, exist_ok=True)
    for p in (root/'cifar-10-batches-py').iterdir(): p.unlink()
    for name, content in files.items(): (root/'cifar-10-batches-py'/name).write_bytes(content)
    (root/sources.ARCHIVE).write_bytes(archive or b'')
    assert read_official(root) is None
