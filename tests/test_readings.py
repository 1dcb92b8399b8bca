"""The readings of the report's text: formulas, initial weights, stored weights"""
import hashlib

import pytest
import torch
import torch.nn.functional as F

from cifar_nbdev.readings import READINGS
from cifar_nbdev.runs import load_runs, load_weights, weights_sha256
from conftest import ROOT

# of names and values in the state dict, seeds 0 and 1; the stored runs started from these weights
START = {
    'gate': ('f7db6419e981d453', '5d3d4eea484be12c'),
    'mix-first': ('f7db6419e981d453', '5d3d4eea484be12c'),
    'two heads': ('bd5ac0a773845674', '90db064d1e7da899'),
    'no gate': ('c378c7d803bcb735', '87c18940b164d202'),
    'flat gate': ('f4306fd4ee0055d4', '9a84e1ca3b6850ed'),
    'softmax gate': ('f7db6419e981d453', '5d3d4eea484be12c'),
    'sigmoid gate': ('f7db6419e981d453', '5d3d4eea484be12c'),
    'relu gate': ('f7db6419e981d453', '5d3d4eea484be12c'),
    'centred input': ('f7db6419e981d453', '5d3d4eea484be12c')}
SQUASH = {'softmax gate': lambda a: a.softmax(1), 'sigmoid gate': torch.sigmoid, 'relu gate': torch.relu}


def state_sha256(model):
    h = hashlib.sha256()
    for name, t in model.state_dict().items():
        h.update(name.encode())
        h.update(t.numpy().tobytes())
    return h.hexdigest()[:16]


def formula(reading, m, x):
    "Logits by the table of readings, written out for two branches"
    if reading == 'centred input': x = 2*x - 1
    c1, c2 = m.conv(x).chunk(2, 1)
    if reading == 'no gate': return m.fc((F.relu(c1) + F.relu(c2)).flatten(1))
    a = m.gate(x.flatten(1) if reading == 'flat gate' else x.mean((2, 3)))
    a1, a2 = SQUASH.get(reading, lambda a: a)(a)[:, :, None, None, None].unbind(1)
    if reading == 'mix-first': return m.fc(F.relu(a1*c1 + a2*c2).flatten(1))
    if reading == 'two heads': return m.fc[0](F.relu(a1*c1).flatten(1)) + m.fc[1](F.relu(a2*c2).flatten(1))
    return m.fc((a1*F.relu(c1) + a2*F.relu(c2)).flatten(1))


def test_names_are_those_of_the_stored_runs():
    assert list(READINGS) == list(START)
    assert {r['config']['reading'] for r in load_runs(ROOT/'nbs'/'results')} <= set(READINGS)


@pytest.mark.parametrize('reading', READINGS)
def test_a_reading_is_its_formula_with_the_same_gradients(reading):
    m, x = READINGS[reading](seed=3), torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits = m(x), formula(reading, m, x)
    torch.testing.assert_close(*logits, atol=1e-6, rtol=0)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), list(m.parameters())) for out in logits)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('reading', READINGS)
def test_initial_weights_are_those_that_the_stored_runs_started_from(reading):
    state = torch.get_rng_state()
    assert tuple(state_sha256(READINGS[reading](seed=s)) for s in (0, 1)) == START[reading]
    assert torch.equal(torch.get_rng_state(), state)                # the global random state is left alone


@pytest.mark.parametrize('reading', ['gate', 'mix-first'])
def test_stored_weights_load(reading):
    run, = load_runs(ROOT/'nbs'/'results', reading=reading, init='pytorch', lr=.005, seed=0)
    file, = (ROOT/'nbs'/'results').glob(f'{reading}-lr0.005-seed0-*.safetensors')
    model = load_weights(READINGS[reading](), file)
    assert weights_sha256(model) == run['weights_sha256']


@pytest.mark.parametrize('reading', READINGS)
def test_what_is_no_batch_of_images_is_refused(reading):
    with pytest.raises(ValueError, match='wanted'): READINGS[reading](seed=0)(torch.zeros(3, 32, 32))
