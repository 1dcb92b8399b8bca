"""The benchmark runs, and gives what the notebook draws. What it measures is not tested: no timed tests"""
import json, subprocess, sys

import matplotlib.pyplot as plt
import pytest

from cifar_nbdev.bench import PEERS, WAYS, bars, cifar_bench, growth, ratios
from conftest import clean_env


@pytest.fixture(scope='module')
def quick(tmp_path_factory):
    "What `cifar_bench --quick` prints and writes"
    folder = tmp_path_factory.mktemp('bench')
    code = 'from cifar_nbdev.bench import cifar_bench; cifar_bench()'
    r = subprocess.run([sys.executable, '-c', code, '--quick', '--data', 'shapes10', '--out', 'b.json'],
                       cwd=folder, env=clean_env(), capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return r.stdout, json.loads((folder/'b.json').read_text())


def test_every_way_is_measured(quick):
    said, result = quick
    assert list(result['seconds']) == list(WAYS) and all(way in said for way in WAYS)
    assert all(len(t) == 1 and t[0] > 0 for t in result['seconds'].values())
    assert result['floor'].keys() == {'PyTorch', 'compiled'} and min(result['floor'].values()) > 0
    assert result['data'] == dict(name='shapes10 (synthetic)', n_train=1000, n_test=200)
    assert result['env']['device'] == 'cpu'
    assert abs(sum(result['profile'].values()) - 1) < 1e-6
    assert result['profile']['compiled loops, training'] > .3
    assert [n for n, _ in result['images']] == [200, 400, 600, 800, 1000]
    assert [n for n, _ in result['runs']] == [1, 2]
    assert result['table']['runs'] == 3 and result['memory_policy'].keys() == {'kept', 'given back'}
    assert result['overhead']['processes'] is not None


def test_it_can_be_drawn(quick):
    result = quick[1]
    result['seconds'] |= {peer: [1.] for peer in PEERS}
    result['memory_mb'] |= dict.fromkeys(PEERS, 1)
    assert {t.get_text() for t in bars(result).axes[0].get_yticklabels()} == {*WAYS, *PEERS}
    assert len(growth(result).axes) == 2 and ratios(result).loc['fit', 'times fit'] == 1
    assert not plt.get_fignums()


@pytest.mark.parametrize('args, said', [
    ('--rounds 0', 'rounds is 0'), ('--data nowhere', "unknown source 'nowhere'"),
    ('--out no/such/folder/b.json', 'cannot write')])
def test_bad_arguments(args, said, capsys):
    with pytest.raises(SystemExit) as e: cifar_bench(args.split())
    err = capsys.readouterr().err
    assert e.value.code == 2 and said in err and len(err.strip().splitlines()) == 1


def test_missing_peers_are_named_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr('cifar_nbdev.bench.find_spec', lambda name: None)
    with pytest.raises(SystemExit): cifar_bench(['--peers', '--data', 'shapes10'])
    assert "lightning, skorch, keras not installed: pip install -e '.[peers]'" in capsys.readouterr().err
