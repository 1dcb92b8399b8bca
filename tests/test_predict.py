"""Files that are no images, images in every form, and nets that come back from files of three kinds"""
import json, os, sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cifar_nbdev.model import ImageClassifier
from cifar_nbdev.predict import OPSET, export_onnx, load_model, predict, prepare_image, save_model
from cifar_nbdev.readings import READINGS
from cifar_nbdev.runs import Settings, load_run, load_weights, new_model, save_weights, weights_sha256
from conftest import ROOT, hashes

COLOURS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


# Files

def of_bytes(content): return lambda path: path.write_bytes(content)

def cut(kind):
    "Half of an image file"
    def write(path):
        COLOURS.save(path, kind)
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    return write

def wrong_sum(path):
    "A PNG with a changed byte in its pixels"
    COLOURS.save(path, 'PNG')
    b = bytearray(path.read_bytes())
    b[len(b) // 2] ^= 1
    path.write_bytes(b)

BAD = dict(
    empty=of_bytes(b''), text=of_bytes(b'a photograph'), pdf=of_bytes(b'%PDF-1.7\n'),
    svg=of_bytes(b'<svg xmlns="http://www.w3.org/2000/svg"/>'), header=of_bytes(b'\xff\xd8'),
    eps=of_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\n'),
    jpeg=cut('JPEG'), webp=cut('WEBP'), gif=cut('GIF'), tiff=cut('TIFF'), bmp=cut('BMP'), wrong_sum=wrong_sum, bomb=lambda path: Image.new('1', (20_000, 10_000)).save(path, 'PNG'),
    large=lambda path: Image.new('1', (9_500, 9_500)).save(path, 'PNG'), folder=lambda path: path.mkdir(),
    floats=lambda path: Image.fromarray(np.ones((9, 9), np.float32)).save(path, 'TIFF'),
    missing=lambda path: None, link=lambda path: path.symlink_to('nowhere'),
    pipe=getattr(os, 'mkfifo', lambda path: path.mkdir()))


@pytest.mark.parametrize('case', BAD)
@pytest.mark.filterwarnings('error')
def test_what_is_no_image_is_refused_in_one_line_that_names_it(tmp_path, case):
    BAD[case](path := tmp_path/'photo.png')
    with pytest.raises((ValueError, FileNotFoundError)) as e: prepare_image(path)
    assert str(path) in str(e.value) and 'anted' in str(e.value) and '\n' not in str(e.value)
    assert len(str(e.value)) < 300


def test_an_unreadable_file_says_so(tmp_path):
    COLOURS.save(path := tmp_path/'photo.png')
    path.chmod(0)
    if os.access(path, os.R_OK): pytest.skip('this user may read everything')
    with pytest.raises(PermissionError, match='photo.png'): prepare_image(path)


# Every form of image

def test_every_orientation_is_put_upright(tmp_path):
    turns = [None, *(getattr(Image.Transpose, t) for t in (
        'FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_90 TRANSVERSE ROTATE_270').split())]
    wanted = prepare_image(COLOURS)[0]
    for tag, turn in enumerate(turns, 1):
        exif, image = Image.Exif(), COLOURS if turn is None else COLOURS.transpose(turn)
        exif[0x0112] = tag
        image.save(tmp_path/'photo.png', exif=exif)
        x, said = prepare_image(tmp_path/'photo.png')
        assert torch.equal(x, wanted), tag
        assert said == 'upright by EXIF, ' * (tag > 1) + 'averaged to 32x32'


@pytest.mark.parametrize('mode, said', [
    ('RGB', ''), ('RGBA', ''), ('P', ''), ('L', 'grey to RGB, '), ('1', 'black and white to RGB, '),
    ('CMYK', 'CMYK to RGB, '), ('YCbCr', 'YCbCr to RGB, '), ('HSV', 'HSV to RGB, '), ('LA', ''),
    ('I;16', '16 bits to 8, grey to RGB, ')])
def test_every_mode_gives_colours(mode, said):
    image = COLOURS.convert('L').convert(mode) if mode == 'I;16' else COLOURS.convert(mode)
    x, found = prepare_image(image)
    assert x.dtype == torch.uint8 and x.shape == (3, 32, 32) and x.is_contiguous()
    assert found == said + 'averaged to 32x32'


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P'])
def test_what_is_transparent_is_white(tmp_path, mode):
    image = Image.new('RGBA', (40, 40), (200, 0, 0, 0)).convert(mode)
    image.save(tmp_path/'clear.png', **({'transparency': image.getpixel((0, 0))} if mode == 'P' else {}))
    x, said = prepare_image(tmp_path/'clear.png')
    assert said.startswith('on white') and (x == 255).all()


def test_it_is_the_mean_of_the_middle():
    a = np.random.default_rng(1).integers(0, 256, (64, 97, 3), np.uint8)
    mean = a[:, 16:80].reshape(32, 2, 32, 2, 3).mean((1, 3))
    x, said = prepare_image(a)
    assert np.abs(x.permute(1, 2, 0).numpy() - mean).max() <= 1         # rounded in both directions
    assert said == 'centre 64x64 of 97x64, averaged to 32x32'


@pytest.mark.parametrize('shape, channels_last', [((3, 32, 40), False), ((32, 40, 3), True), ((4, 32, 3), True),
                                                  ((3, 32, 3), True), ((1, 32, 40), False)])
def test_channels_are_found(shape, channels_last):
    "Where both ends could be them, NumPy's are last, PyTorch's first"
    a = np.random.default_rng(2).integers(0, 256, shape, np.uint8)
    first = np.moveaxis(a, 2, 0) if channels_last else a
    assert torch.equal(prepare_image(a)[0], prepare_image(torch.tensor(np.ascontiguousarray(first)))[0])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_of_every_width(dtype):
    assert (prepare_image(torch.full((3, 32, 32), .5, dtype=dtype, requires_grad=True))[0] == 128).all()


# What a net says

def test_predict_leaves_the_net_as_it_is(small):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.LazyLinear(10))
    net(torch.zeros(2, 3, 32, 32))
    net[2].eval()
    before, modes = weights_sha256(net), [m.training for m in net.modules()]
    table = predict(net, small.x_test[0], small.classes)
    assert weights_sha256(net) == before and [m.training for m in net.modules()] == modes
    assert set(table.index) == set(small.classes) and table['probability'].is_monotonic_decreasing
    assert table.columns.name == 'as it is' and abs(table['probability'].sum() - 1) < 1e-9


@pytest.mark.parametrize('net, said', [
    (nn.Identity(), r'\(1, 3, 32, 32\)'), (ImageClassifier, 'an nn.Module'), (nn.LSTM(32, 2), '.')])
def test_what_gives_no_logits_is_refused(small, net, said):
    with pytest.raises((ValueError, RuntimeError), match=said): predict(net, small.x_test[0])


def test_a_net_that_is_not_finite_is_refused(small):
    net = ImageClassifier(seed=0)
    net.fc.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match='not finite'): predict(net, small.x_test[0])


# Nets in files

@pytest.mark.parametrize('file', sorted(ROOT.glob('nbs/results/**/*-seed*.safetensors')), ids=lambda p: p.stem)
def test_stored_runs_come_back(file):
    run = load_run(file.with_suffix('.json'))
    net, about = load_model(file)
    assert weights_sha256(net) == run['weights_sha256'] and not net.training
    assert about['config'] == run['config'] and about['classes'][3] in ('cat', 'frame') and about['epochs'] == 30


def test_of_any_size(small, tmp_path):
    for i, (reading, C) in enumerate(READINGS.items()):
        net = C(branches=1 + i % 3, channels=2 + i, kernel_size=1 + i, classes=10, seed=i)
        save_model(net, tmp_path/'net.safetensors', small, lr=.1)
        again, about = load_model(str(tmp_path/'net.safetensors'))
        assert type(again) is C and weights_sha256(again) == weights_sha256(net), reading
        x = small.x_test[:3].float() / 255
        assert torch.equal(again(x), net(x)) and all(p.requires_grad for p in again.parameters())
        assert about['config'] == dict(lr=.1, reading=reading) and about['data']['sha256'] == small.sha256


def header(**change):
    about = dict(config=dict(reading='gate'), data=dict(name='x', sha256='0' * 64), classes=None,
                 weights_sha256='0' * 64, epochs=None, cifar_nbdev=None)
    return about | change


@pytest.mark.parametrize('about, said', [
    (header(), 'it is damaged'), (header(config=dict(reading='own: x')), "one's own"), ([], 'wanted an object'),
    (header(config=dict(reading='gates')), 'unknown reading'),
    (header(config=dict(reading='two heads')), 'two heads'),
    (header(config=dict(reading='gate', lr='fast')), 'lr is'),
    (header(config=dict(reading='gate', x=1)), 'unknown settings'),
    (header(classes=[1]), 'classes'), (header(classes=['a'] * 1001), 'classes'), (header(epochs=-1), 'epochs'),
    (header(data={}), 'name is missing'), (header(weights_sha256='0'), 'weights_sha256'), ({}, 'config is missing')])
def test_a_header_that_lies_is_refused(tmp_path, about, said):
    save_weights(ImageClassifier(seed=0), tmp_path/'bad.safetensors', {'x': 1})
    b = (tmp_path/'bad.safetensors').read_bytes()
    n = int.from_bytes(b[:8], 'little')
    head = json.loads(b[8:8 + n]) | {'__metadata__': {'cifar_nbdev': json.dumps(about)}}
    head = json.dumps(head).encode()
    (tmp_path/'bad.safetensors').write_bytes(len(head).to_bytes(8, 'little') + head + b[8 + n:])
    with pytest.raises(ValueError, match=said) as e: load_model(tmp_path/'bad.safetensors')
    assert '\n' not in str(e.value) and 'bad.safetensors' in str(e.value)


@pytest.mark.parametrize('shapes', [
    {'conv.weight': (100_000, 3, 1, 1), 'fc.weight': (1, 1024)},       # a gate on all pixels would take 1.2 GB
    {'conv.weight': (6, 3, 5, 5), 'fc.weight': (10, 4704), 'fc.bias': (10,)}, {'conv.weight': (6, 3)},
    {'conv.weight': (6, 3, 33, 33), 'fc.weight': (10, 4704)}, {'conv.weight': (0, 3, 5, 5), 'fc.weight': (0, 9)}])
@pytest.mark.parametrize('reading', ['flat gate', 'two heads'])
def test_a_net_of_another_size_takes_no_memory(tmp_path, shapes, reading):
    state = {k: torch.zeros(shape) for k, shape in shapes.items()}
    save_weights(state, tmp_path/'bad.safetensors', header(config=dict(reading=reading)))
    with pytest.raises(ValueError, match='does not hold the weights of'): load_model(tmp_path/'bad.safetensors')


def test_half_precision_is_refused(small, tmp_path):
    with pytest.raises(ValueError, match='float16, wanted torch.float32'):
        save_model(ImageClassifier().half(), tmp_path/'net.safetensors', small)
    save_weights(ImageClassifier().half(), tmp_path/'net.safetensors', header())
    with pytest.raises(ValueError, match='F16, wanted F32'): load_model(tmp_path/'net.safetensors')


def test_a_refused_net_leaves_no_file(small, tmp_path):
    for net, told in ((nn.Linear(1, 1), {}), (ImageClassifier(), dict(lr=0)), (ImageClassifier(classes=3), {})):
        with pytest.raises(ValueError): save_model(net, tmp_path/'net.safetensors', small, **told)
    with pytest.raises(ValueError, match='cannot export Loop'): export_onnx(Loop(), tmp_path/'net.onnx')
    assert hashes(tmp_path) == {}


# ONNX

class Loop(nn.Module):
    "A net that cannot be exported: what it does depends on the numbers"
    def forward(self, x):
        while x.sum() > 1: x = x / 2
        return x.flatten(1)[:, :10]


def trained_mode():
    "A net of one's own that evaluation mode changes"
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(),
                         nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 7))

STORED = next(ROOT.glob('nbs/results/gate-lr0.005-seed0-*.safetensors'))
NETS = {'no gate': lambda data: READINGS['no gate'](seed=0), 'two heads': lambda data: READINGS['two heads'](seed=0),
        'all three': lambda data: new_model(data, Settings(change='all three')), 'own': lambda data: trained_mode(),
        'stored': lambda data: load_weights(ImageClassifier(), STORED)}


@pytest.mark.parametrize('name', NETS)
def test_onnx_says_what_torch_says(small, tmp_path, capfd, name):
    onnx, ort = pytest.importorskip('onnx'), pytest.importorskip('onnxruntime')
    net, path = NETS[name](small), tmp_path/'net.onnx'
    export_onnx(net, path)
    assert net.training and capfd.readouterr() == ('', '')
    assert [o.version for o in onnx.load(path).opset_import] == [OPSET]
    assert [p.name for p in tmp_path.iterdir()] == ['net.onnx']
    session = ort.InferenceSession(path, providers=['CPUExecutionProvider'])
    x = torch.cat([small.x_train, small.x_test])[:256].float() / 255
    with torch.no_grad(): wanted = net.eval()(x)
    for n in (256, 7, 1):
        found, = session.run(['logits'], {'images': x[:n].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), wanted[:n], rtol=1e-6, atol=1e-5)


def test_onnx_is_asked_for_by_name(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[export\]'"):
        export_onnx(ImageClassifier(), tmp_path/'net.onnx')


class Fixed(nn.Module):
    "A net that asks for the length of a batch"
    def forward(self, x): return x.new_ones(len(x), 10) + x.flatten(1)[:, :10]


def test_a_fixed_batch_size_is_no_onnx(tmp_path):
    pytest.importorskip('onnx')
    with pytest.raises(ValueError, match='use x.shape'): export_onnx(Fixed(), tmp_path/'net.onnx')
    assert not list(tmp_path.iterdir())
