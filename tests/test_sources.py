"""Downloading CIFAR-10, against servers on this machine that are good, wrong, slow or silent"""
import hashlib, io, pickle, shutil, socket, tarfile, threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from cifar_nbdev import sources
from cifar_nbdev.data import load_data
from cifar_nbdev.download import DownloadError, download
from conftest import save_npz

BODY = bytes(range(256)) * 400
MD5 = hashlib.md5(BODY).hexdigest()


class Server(ThreadingHTTPServer):
    "Answers every request with `answer(handler, body)` and keeps the paths that were asked for"
    daemon_threads, block_on_close = True, False

    def __init__(self, answer, body):
        self.answer, self.body, self.asked, self.over = answer, body, [], threading.Event()
        super().__init__(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server_address[1]}/{sources.ARCHIVE}'
        threading.Thread(target=self.serve_forever, args=(.02,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    "Leaves the answer to its server"
    def do_GET(self):
        self.server.asked.append(self.path)
        try: self.server.answer(self, self.server.body)
        except OSError: pass                            # the client has hung up, as it should

    def head(self, length=None):
        "Status 200, with or without a length"
        self.send_response(200)
        if length is not None: self.send_header('Content-Length', str(length))
        self.end_headers()

    def log_message(self, *args): pass


def good(h, body): h.head(len(body)); h.wfile.write(body)
def no_length(h, body): h.head(); h.wfile.write(body)
def not_found(h, body): h.send_error(404)
def wrong_bytes(h, body): h.head(len(body)); h.wfile.write(body[:-1] + b'!')
def wrong_length(h, body): h.head(len(body) + 1); h.wfile.write(body + b'!')
def nonsense_length(h, body): h.head('much'); h.wfile.write(body)
def closed_half_way(h, body): h.head(len(body)); h.wfile.write(body[:len(body) // 2])
def silent(h, body): h.server.over.wait(30)
def stalled(h, body): h.head(len(body)); h.wfile.write(body[:1000]); h.server.over.wait(30)
def server_error(h, body):
    if len(h.server.asked) % 2: h.send_error(500)
    else: good(h, body)
def evil_words(h, body): h.send_response(404, '\x1b[2Jgone\x07'); h.end_headers()
def to_a_file(h, body): h.send_response(302); h.send_header('Location', 'file:///etc/hostname'); h.end_headers()

def dripping(h, body):
    "Headers, a byte at a time, for ten seconds: each comes before any time limit of a socket"
    for byte in b'HTTP/1.0 200 OK\r\nX: ' + b'x' * 200:
        if h.server.over.wait(.05): return
        h.wfile.write(bytes([byte]))

def not_http(h, body): h.wfile.write(b'hello\r\n\r\n')

def trickling(h, body):
    "5 kB/s: never fails by itself"
    h.head(len(body))
    for i in range(0, len(body), 100):
        if h.server.over.wait(.02): return
        h.wfile.write(body[i:i + 100])

def endless(h, body):
    "No length, and no end"
    h.head()
    while not h.server.over.is_set(): h.wfile.write(body)


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    "No settings, no proxy, no cache, no sources beyond this machine; an empty working folder"
    for k in ('CIFAR10_URL', 'CIFAR_NBDEV_DATA', 'CIFAR_NBDEV_ROOT'): monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv('no_proxy', '*')
    monkeypatch.setattr(sources, 'SOURCES', (closed_port(),))
    monkeypatch.setattr(sources, 'user_cache_path', lambda *a, **k: tmp_path/'cache')
    monkeypatch.chdir(tmp_path)


def closed_port():
    "An address at which nothing listens"
    with closing(socket.socket()) as s:
        s.bind(('127.0.0.1', 0))
        return f'http://127.0.0.1:{s.getsockname()[1]}/{sources.ARCHIVE}'


@pytest.fixture
def serve():
    "Start servers, and end them with the test"
    servers = []
    def start(answer, body=BODY):
        servers.append(Server(answer, body))
        return servers[-1]
    yield start
    for s in servers:
        s.over.set(); s.shutdown(); s.server_close()


def get(path, *servers, body=BODY, floor=300_000, timeout=.5, grace=.2):
    "`download` from `servers`, with short times"
    return download([s.url for s in servers], path, hashlib.md5(body).hexdigest(), len(body),
                    timeout, floor, grace)


def test_a_good_source_gives_the_file(serve, tmp_path):
    path = get(tmp_path/'new'/'file', serve(good))
    assert path.read_bytes() == BODY and [p.name for p in path.parent.iterdir()] == ['file']


def test_a_length_is_not_needed(serve, tmp_path):
    assert get(tmp_path/'file', serve(no_length)).read_bytes() == BODY


@pytest.mark.parametrize('answer, said', [
    (not_found, '404'), (wrong_bytes, 'has MD5'),
    (wrong_length, f'{len(BODY) + 1:,} bytes long, wanted {len(BODY):,}'), (nonsense_length, 'much'),
    (closed_half_way, f'ended after {len(BODY) // 2:,} of {len(BODY):,}'), (silent, 'timed out'),
    (stalled, 'timed out'), (not_http, 'hello'), (endless, 'ended after'), (dripping, 'no answer within 1.5 s'),
    (evil_words, 'HTTP Error 404: ?[2Jgone?'), (to_a_file, 'Redirection to url')],
    ids=lambda a: getattr(a, '__name__', ''))
def test_a_bad_source_alone_is_an_error_and_leaves_nothing(serve, tmp_path, answer, said):
    server = serve(answer)
    with pytest.raises(DownloadError) as e: get(tmp_path/'file', server)
    assert server.url in str(e.value) and said in str(e.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('answer', [not_found, wrong_bytes, wrong_length, closed_half_way, silent, stalled,
                                    not_http, endless, dripping, evil_words, to_a_file])
def test_after_a_bad_source_comes_the_next(serve, tmp_path, answer):
    bad, ok, never = serve(answer), serve(good), serve(good)
    assert get(tmp_path/'file', bad, ok, never).read_bytes() == BODY
    assert [p.name for p in tmp_path.iterdir()] == ['file']
    assert (len(bad.asked), len(ok.asked), len(never.asked)) == (1, 1, 0)


def test_a_server_in_trouble_is_asked_once_more(serve, tmp_path):
    server = serve(server_error)
    assert get(tmp_path/'file', server).read_bytes() == BODY and len(server.asked) == 2


def test_a_source_below_the_floor_is_left(serve, tmp_path):
    slow, ok = serve(trickling), serve(good)
    assert get(tmp_path/'file', slow, ok).read_bytes() == BODY and len(ok.asked) == 1


def test_the_last_source_may_be_slow(serve, tmp_path):
    body = BODY[:3000]
    path = get(tmp_path/'file', serve(not_found), serve(trickling, body), body=body, grace=.1)
    assert path.read_bytes() == body


def test_a_source_above_the_floor_is_kept(serve, tmp_path):
    body, never = BODY[:3000], serve(good, BODY[:3000])
    get(tmp_path/'file', serve(trickling, body), never, body=body, grace=.1, floor=100)
    assert not never.asked


def test_the_error_says_what_each_source_did(serve, tmp_path):
    slow, missing, wrong = serve(trickling), serve(not_found), serve(wrong_bytes)
    with pytest.raises(DownloadError) as e: get(tmp_path/'file', slow, missing, wrong)
    lines = str(e.value).splitlines()[1:]
    for line, server, said in zip(lines, (slow, missing, wrong), ('kB/s', '404', 'MD5'), strict=True):
        assert server.url in line and said in line


def test_a_failed_download_leaves_the_file_that_was_there(serve, tmp_path):
    (tmp_path/'file').write_text('old')
    with pytest.raises(DownloadError): get(tmp_path/'file', serve(wrong_bytes))
    assert (tmp_path/'file').read_text() == 'old' and len(list(tmp_path.iterdir())) == 1


# CIFAR-10 itself: a small archive of the official one's layout stands for it

def official_files():
    "Names and bytes of a small CIFAR-10: pickles of 20 images each"
    rng, files = np.random.default_rng(0), {}
    for name in [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch']:
        pixels = rng.integers(0, 256, (20, 3072), np.uint8)
        files[name] = pickle.dumps({'data': pixels, 'labels': rng.integers(0, 10, 20).tolist()})
    return files | {'batches.meta': pickle.dumps({'label_names': list(sources.CLASSES)})}


def tar(files):
    "A .tar.gz of `files` in the official folder, as bytes"
    with io.BytesIO() as f:
        with tarfile.open(fileobj=f, mode='w:gz') as t:
            for name, content in files.items():
                info = tarfile.TarInfo(f'cifar-10-batches-py/{name}')
                info.size = len(content)
                t.addfile(info, io.BytesIO(content))
        return f.getvalue()


@pytest.fixture
def official(monkeypatch):
    "The small archive's files and bytes; torchvision and the library take it for CIFAR-10"
    from torchvision.datasets import CIFAR10
    files = official_files()
    archive, md5 = tar(files), {k: hashlib.md5(v).hexdigest() for k, v in files.items()}
    monkeypatch.setattr(sources, 'ARCHIVE_SIZE', len(archive))
    monkeypatch.setattr(sources, 'ARCHIVE_MD5', hashlib.md5(archive).hexdigest())
    monkeypatch.setattr(CIFAR10, 'url', closed_port())          # nothing here leaves this machine
    monkeypatch.setattr(CIFAR10, 'tgz_md5', sources.ARCHIVE_MD5)
    monkeypatch.setattr(CIFAR10, 'train_list', [[k, m] for k, m in md5.items() if k.startswith('data')])
    monkeypatch.setattr(CIFAR10, 'test_list', [['test_batch', md5['test_batch']]])
    monkeypatch.setattr(CIFAR10, 'meta', CIFAR10.meta | {'md5': md5['batches.meta']})
    return files, archive


def unpack(files, root):
    "Write `files` where torchvision extracts them"
    folder = root/'cifar-10-batches-py'
    folder.mkdir(parents=True)
    for name, content in files.items(): (folder/name).write_bytes(content)


def is_official(d, files):
    "Does `d` hold exactly the pixels and labels of `files`?"
    train = [pickle.loads(files[f'data_batch_{i}']) for i in range(1, 6)]
    test = pickle.loads(files['test_batch'])
    return (d.name == 'CIFAR-10' and d.classes == sources.CLASSES
            and torch.equal(d.x_train.flatten(1),
                            torch.from_numpy(np.concatenate([t['data'] for t in train])))
            and d.y_train.tolist() == sum((t['labels'] for t in train), [])
            and torch.equal(d.x_test, torch.from_numpy(test['data']).view(-1, 3, 32, 32))
            and d.y_test.tolist() == test['labels'] and d.x_train.dtype == torch.uint8)


def test_cifar10_is_fetched_once(serve, official, monkeypatch, tmp_path):
    files, archive = official
    server = serve(good, archive)
    monkeypatch.setattr(sources, 'SOURCES', (serve(not_found).url, server.url))
    first = load_data('cifar10', root=tmp_path/'root')
    assert is_official(first, files) and len(server.asked) == 1
    assert load_data('cifar10', root=tmp_path/'root').sha256 == first.sha256 and len(server.asked) == 1
    assert load_data('auto', root=tmp_path/'root').name == 'CIFAR-10' and len(server.asked) == 1


def test_the_users_own_address_comes_first(serve, official, monkeypatch, tmp_path):
    own, other = serve(good, official[1]), serve(good, official[1])
    monkeypatch.setattr(sources, 'SOURCES', (other.url,))
    monkeypatch.setenv('CIFAR10_URL', own.url)
    assert is_official(load_data('cifar10', root=tmp_path), official[0])
    assert (len(own.asked), len(other.asked)) == (1, 0)


@pytest.mark.parametrize('address', ['nonsense', 'http://', 'http://[', 'file:/dev/null', 'ftp:'])
def test_after_an_address_that_is_none_come_the_others(serve, official, monkeypatch, tmp_path, address):
    monkeypatch.setenv('CIFAR10_URL', address)
    monkeypatch.setattr(sources, 'SOURCES', (serve(good, official[1]).url,))
    assert is_official(load_data('cifar10', root=tmp_path), official[0])


def test_a_file_is_no_address(official, monkeypatch, tmp_path):
    (tmp_path/'mine').write_bytes(official[1])
    monkeypatch.setenv('CIFAR10_URL', (tmp_path/'mine').as_uri())
    with pytest.raises(DownloadError, match='unknown url type: file'): load_data('cifar10', root=tmp_path/'root')


def test_a_download_goes_to_the_cache_or_where_the_environment_says(serve, official, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, 'SOURCES', (serve(good, official[1]).url,))
    load_data('cifar10')
    assert (tmp_path/'cache'/sources.ARCHIVE).read_bytes() == official[1]
    monkeypatch.setenv('CIFAR_NBDEV_ROOT', str(tmp_path/'env'))
    load_data('cifar10')
    assert (tmp_path/'env'/sources.ARCHIVE).read_bytes() == official[1]


def test_root_may_begin_with_a_tilde(serve, official, monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    monkeypatch.setattr(sources, 'SOURCES', (serve(good, official[1]).url,))
    assert is_official(load_data('cifar10', root='~/own'), official[0])
    assert (tmp_path/'own'/sources.ARCHIVE).exists() and not (tmp_path/'~').exists()


def test_offline_the_error_says_what_to_do(serve, official, monkeypatch, tmp_path):
    server = serve(not_found)
    monkeypatch.setenv('CIFAR10_URL', server.url)
    with pytest.raises(DownloadError) as e: load_data('cifar10', root=tmp_path/'root')
    for part in (server.url, '404', *sources.SOURCES, sources.ARCHIVE, sources.ARCHIVE_MD5, str(tmp_path/'root'),
                 'shapes10'):
        assert part in str(e.value)
    assert not list((tmp_path/'root').iterdir())


@pytest.mark.parametrize('where', ['root', 'CIFAR_NBDEV_ROOT', 'cache', './data'])
@pytest.mark.parametrize('what', ['archive', 'folder'])
def test_what_was_put_there_by_hand_is_used(official, monkeypatch, tmp_path, where, what):
    files, archive = official
    folder = tmp_path/{'./data': 'data', 'cache': 'cache'}.get(where, 'own')
    folder.mkdir()
    if what == 'folder': unpack(files, folder)
    else: (folder/sources.ARCHIVE).write_bytes(archive)
    if where == 'CIFAR_NBDEV_ROOT': monkeypatch.setenv(where, str(folder))
    assert is_official(load_data('cifar10', root=folder if where == 'root' else None), files)
    assert is_official(load_data('auto', root=folder if where == 'root' else None), files)


@pytest.mark.parametrize('name', ['data_batch_3', 'batches.meta'])
def test_a_damaged_folder_is_made_again_from_the_archive_beside_it(official, tmp_path, name):
    unpack(official[0] | {name: b'damaged'}, tmp_path)
    (tmp_path/sources.ARCHIVE).write_bytes(official[1])
    for _ in range(2): assert is_official(load_data('cifar10', root=tmp_path), official[0])
    folder = tmp_path/'cifar-10-batches-py'
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == official[0]
    assert {p.name for p in tmp_path.iterdir()} == {sources.ARCHIVE, folder.name}


def test_a_damaged_folder_alone_is_fetched_again_once(serve, official, monkeypatch, tmp_path):
    server = serve(good, official[1])
    monkeypatch.setattr(sources, 'SOURCES', (server.url,))
    unpack(official[0] | {'batches.meta': b'damaged'}, tmp_path)
    for _ in range(2): assert is_official(load_data('cifar10', root=tmp_path), official[0])
    assert len(server.asked) == 1


@pytest.mark.parametrize('what', ['folder', 'file'])
def test_nothing_is_written_through_a_link(official, tmp_path, what):
    root, other = tmp_path/'root', tmp_path/'other'
    unpack(official[0] | {'data_batch_1': b'precious'}, other)
    place = root/'cifar-10-batches-py'
    if what == 'folder':
        root.mkdir()
        place.symlink_to(other/'cifar-10-batches-py', target_is_directory=True)
    else:
        unpack(official[0], root)
        (place/'data_batch_1').unlink()
        (place/'data_batch_1').symlink_to(other/'cifar-10-batches-py'/'data_batch_1')
    (root/sources.ARCHIVE).write_bytes(official[1])
    assert is_official(load_data('cifar10', root=root), official[0])
    assert (other/'cifar-10-batches-py'/'data_batch_1').read_bytes() == b'precious'
    assert not place.is_symlink() and not (place/'data_batch_1').is_symlink()


def test_an_archive_in_a_folder_that_cannot_be_written_is_read(official, monkeypatch, tmp_path):
    (tmp_path/sources.ARCHIVE).write_bytes(official[1])
    monkeypatch.setattr(sources.os, 'access', lambda *a: False)
    assert is_official(load_data('cifar10', root=tmp_path), official[0])


def test_many_at_once_use_an_archive_for_the_first_time(official, tmp_path):
    (tmp_path/sources.ARCHIVE).write_bytes(official[1])
    for _ in range(10):
        shutil.rmtree(tmp_path/'cifar-10-batches-py', ignore_errors=True)
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda _: load_data('cifar10', root=tmp_path), range(6)))
        assert all(is_official(d, official[0]) for d in found)
    assert {p.name for p in tmp_path.iterdir()} == {sources.ARCHIVE, 'cifar-10-batches-py'}


class Bomb:
    "A pickle that makes a file when it is loaded"
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)


def test_the_bomb_works(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path/'boom')))
    assert (tmp_path/'boom').exists()


@pytest.mark.parametrize('name', ['data_batch_1', 'test_batch', 'batches.meta'])
@pytest.mark.parametrize('what', ['archive', 'folder'])
def test_nothing_is_unpickled_that_is_not_official(official, tmp_path, name, what):
    boom, root = tmp_path/'boom', tmp_path/'root'
    files = official[0] | {name: pickle.dumps(Bomb(boom))}
    root.mkdir()
    if what == 'folder': unpack(files, root)
    else: (root/sources.ARCHIVE).write_bytes(tar(files).ljust(sources.ARCHIVE_SIZE, b'\0')[:sources.ARCHIVE_SIZE])
    with pytest.raises(DownloadError): load_data('cifar10', root=root)
    with pytest.raises(FileNotFoundError): load_data('cifar10', root=root, download=False)
    assert not boom.exists()


def test_a_wrong_download_is_never_opened(serve, official, monkeypatch, tmp_path):
    bad = tar(official[0] | {'data_batch_1': pickle.dumps(Bomb(tmp_path/'boom'))})
    bad = bad.ljust(sources.ARCHIVE_SIZE, b'\0')[:sources.ARCHIVE_SIZE]
    monkeypatch.setattr(sources, 'SOURCES', (serve(good, bad).url,))
    with pytest.raises(DownloadError, match='has MD5'): load_data('cifar10', root=tmp_path/'root')
    assert not (tmp_path/'boom').exists() and not list((tmp_path/'root').iterdir())


def test_a_wrong_archive_is_replaced_by_a_right_one(serve, official, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, 'SOURCES', (serve(good, official[1]).url,))
    (tmp_path/sources.ARCHIVE).write_bytes(b'half of it')
    assert is_official(load_data('cifar10', root=tmp_path), official[0])


# 'auto'

def test_auto_without_a_network_warns_and_draws_shapes():
    with pytest.warns(UserWarning, match='NOT CIFAR-10') as caught: d = load_data()
    assert d.name == 'shapes10 (synthetic)'
    said = str(caught[0].message)
    assert all(part in said for part in (sources.ARCHIVE, sources.ARCHIVE_MD5, sources.SOURCES[0], 'cache'))


def test_auto_without_leave_to_download_contacts_nobody(serve, monkeypatch):
    server = serve(good)
    monkeypatch.setattr(sources, 'SOURCES', (server.url,))
    with pytest.warns(UserWarning, match='NOT CIFAR-10'): d = load_data(download=False)
    assert d.name == 'shapes10 (synthetic)' and not server.asked


def test_auto_downloads(serve, official, monkeypatch):
    monkeypatch.setattr(sources, 'SOURCES', (serve(good, official[1]).url,))
    assert is_official(load_data(), official[0])


def test_auto_takes_the_file_that_the_environment_names(small, monkeypatch, tmp_path):
    save_npz(tmp_path/'mine.npz', small, name='my shapes', classes=np.array(small.classes))
    monkeypatch.setenv('CIFAR_NBDEV_DATA', str(tmp_path/'mine.npz'))
    d = load_data()
    assert (d.name, d.classes) == ('my shapes', small.classes) and torch.equal(d.x_test, small.x_test)


def test_auto_never_passes_over_a_file_that_the_environment_names(monkeypatch, tmp_path):
    monkeypatch.setenv('CIFAR_NBDEV_DATA', str(tmp_path/'none.npz'))
    with pytest.raises(FileNotFoundError, match='none.npz'): load_data()


@pytest.mark.parametrize('name', ['cifar10-copy', 'cifar10'])
def test_auto_takes_an_npz_in_the_cache(small, tmp_path, name):
    save_npz(tmp_path/'cache'/'cifar100.npz', small.subset(200, 100))              # of another data set
    save_npz(tmp_path/'cache'/f'{name}.npz', small)
    d = load_data()
    assert d.name == f'CIFAR-10, unverified copy {d.sha256[:8]}' and torch.equal(d.x_train, small.x_train)
