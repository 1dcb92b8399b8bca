"""All results made anew, and checked"""
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cifar_nbdev import results
from cifar_nbdev.changes import choose, final_test, validation_split
from cifar_nbdev.data import load_data, shapes10
from cifar_nbdev.model import ImageClassifier
from cifar_nbdev.results import keep_weights, make_results, verify, weights_file
from cifar_nbdev.runs import Settings, load_runs, load_weights, run_name, save_run, weights_sha256
from cifar_nbdev.sources import DataError
from cifar_nbdev.sweep import sweep
from conftest import ROOT, hashes

HERE = dict(executor=ThreadPoolExecutor(1), device='cpu', progress=False)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "All results on a few shapes, with one reading and one change: data and folder"
    data, out = shapes10(300, 100), tmp_path_factory.mktemp('made')/'results'
    with pytest.MonkeyPatch.context() as m:
        m.setattr(results, 'CANDIDATES', {('gate', 'pytorch'): 2, ('gate', 'normal 0.01'): 2,
                                          ('mix-first', 'pytorch'): 1})
        m.setattr(results, 'CHANGES', {c: results.CHANGES[c] for c in ['all three']})
        make_results(data, out, epochs=2, **HERE)
        before = hashes(out)
        make_results(data, out, epochs=2, **HERE)
        assert hashes(out) == before                                           # nothing was done again
    return data, out


def test_all_results_are_made(made):
    data, out = made
    runs = load_runs(out)
    assert len(runs) == 3*5 + 5 and {r['data']['sha256'] for r in runs} == {data.sha256}
    of_changes = load_runs(out/'changes')
    assert len(of_changes) == 2 * (2*3 + 5)
    assert {r['data']['sha256'] for r in of_changes} == {validation_split(data).sha256}
    found = json.loads((out/'inside.json').read_text())
    first = next(r for r in runs if [r['config'][k] for k in ('lr', 'seed', 'reading')] == [.005, 0, 'gate'])
    assert np.trace(found['confusion']) / 100 == pytest.approx(first['epochs'][-1]['test_acc'])


def test_only_what_was_chosen_is_tested_and_only_once(made):
    data, out = made
    runs = load_runs(out/'changes')
    found, best = json.loads((out/'changes'/'tested.json').read_text()), choose(runs)
    chosen = {run_name(r['config'], r['data']['sha256']): r['weights_sha256'] for r in runs
              if best[r['config'].get('change') or 'none'] == r['config']['lr']}
    assert {n: t['weights_sha256'] for n, t in found.items()} == chosen and len(chosen) == 2 * 8
    for weights in (out/'changes').glob('*.safetensors'): weights.unlink()
    assert final_test(data, out/'changes') == found                                  # read, not tested again


def test_weights_meet_only_the_data_that_they_were_split_from(made):
    data, out = made
    with pytest.raises(ValueError, match='are of other data, wanted validation_split of this'):
        final_test(shapes10(300, 100, seed=1), out/'changes')


def checks(made): return verify(*made, **HERE)


def test_what_is_stored_is_true(made):
    found = checks(made)
    assert set(found['verdict']) == {'the same bits'} and len(found) == 3 * 3          # training, epochs 1 and 2


def test_the_stored_runs_are_true():
    try: data = load_data('cifar10', download=False)
    except DataError as e: pytest.skip(str(e))
    found = verify(data, ROOT/'nbs'/'results', **HERE)
    assert len(found) == 3 * 7 and not (found['verdict'] == 'DIFFERS').any(), found.to_string()


@pytest.fixture
def copy(made, tmp_path): return made[0], shutil.copytree(made[1], tmp_path/'copy')


def test_a_lie_in_a_run_is_found(copy):
    _, folder = copy
    for lr, key in ((.005, 'train_acc'), (.01, 'test_loss'), (.0001, 'train_loss')):
        run, = load_runs(folder, reading='gate', init=Settings.init, lr=lr, seed=0)
        run['epochs'][0][key] *= .999
        save_run(run, folder)
    found = checks(copy)
    wrong = found[found['verdict'] == 'DIFFERS'][['run', 'done again']].values.tolist()
    assert wrong == [['lr 0.005', 'training, epochs 1 to 2'], ['lr 0.01', 'training, epochs 1 to 2'],
                     ['lr 0.01', 'test after epoch 1'], ['lr 0.0001', 'training, epochs 1 to 2']]


def test_weights_of_another_run_are_found(copy):
    _, folder = copy
    shutil.copy(weights_file(folder, .005, 2), weights_file(folder, .01, 2))
    found = checks(copy)
    assert found['done again'][found['verdict'] == 'DIFFERS'].tolist() == ['test after epoch 2']


def test_kept_weights_of_other_data_are_not_taken_for_these(made, tmp_path):
    data, folder = made[0], tmp_path/'other'
    other = shapes10(300, 100, seed=1)
    for d in (other, data):                             # one after the other, in one folder
        sweep(d, [.01], epochs=1, out=folder, **HERE)
        keep_weights(d, folder, .01, 1, device='cpu', progress=False)
    run, = [r for r in load_runs(folder) if r['data']['sha256'] == data.sha256]
    kept = load_weights(ImageClassifier(), weights_file(folder, .01, 1))
    assert weights_sha256(kept) == run['weights_sha256']


def test_another_code_is_found(copy, tmp_path):
    data, folder = copy
    shutil.copytree(ROOT/'cifar_nbdev', tmp_path/'cifar_nbdev', ignore=shutil.ignore_patterns('__pycache__'))
    file = tmp_path/'cifar_nbdev'/'model.py'
    code = file.read_text(encoding='utf-8')
    file.write_text(code.replace('numel() ** -.5', 'numel() ** -.501'), encoding='utf-8')
    np.savez(tmp_path/'data.npz', **arrays(data))
    r = subprocess.run([sys.executable, '-c', 'from cifar_nbdev.commands import cifar_results as c; c()', '--verify',
                        '--data', tmp_path/'data.npz', '--out', folder, '--workers', '1', '--device', 'cpu'],
                       env=os.environ | {'PYTHONPATH': str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True)
    assert r.returncode == 1 and r.stderr.endswith('3 of 9 checks failed\n'), r.stderr     # trained, not tested again
    assert r.stdout.count('training, epochs 1 to 2') == r.stdout.count('DIFFERS') == 3


def arrays(data):
    return dict(x_train=data.x_train.permute(0, 2, 3, 1).numpy(), y_train=data.y_train.numpy(),
                x_test=data.x_test.permute(0, 2, 3, 1).numpy(), y_test=data.y_test.numpy(),
                classes=np.array(data.classes), name=np.array(data.name))


def test_other_data_are_refused(made):
    with pytest.raises(ValueError, match='has 0 runs of the recipe'): verify(shapes10(300, 100, seed=1), made[1])
