"""Two things that do not do the same have other hashes; the same thing has the same hash, also in another process"""
import functools
import math
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cifar_nbdev.content import code_sha256
from conftest import python

PLAIN = '''
class Net(nn.Module):
    k = 2
    def __init__(self, act=F.relu):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(12, 4), nn.Linear(4, 2), act
        self.register_buffer('fixed', torch.ones(2), persistent=False)
    @staticmethod
    def s(x): return x
    @classmethod
    def c(cls, x): return cls.k * x
    @property
    def p(self): return 1
    def forward(self, x): return self.c(self.s(self.b(self.act(self.a(x.flatten(1)))))) * self.p * helper(x)
table, key = {'a': torch.ones(2)}, 'a'
class Numbers: one = 1
double = functools.partial(max, 2)
act = F.relu
def deep5(x): return x
def deep4(x): return deep5(x)
def deep3(x): return deep4(x)
def deep2(x): return deep3(x)
def deep1(x): return deep2(x)
def helper(x): return [(lambda y: table[key].sum() * Numbers.one * double(1) * act(y) * deep1(y))(z) for z in x]
net = Net()
'''
EDITS = {
    'class attribute': ('k = 2', 'k = 3'), 'static method': ('def s(x): return x', 'def s(x): return -x'),
    'class method': ('cls.k * x', 'cls.k + x'), 'property': ('return 1', 'return 2'),
    'function as attribute': ('net = Net()', 'net = Net(F.silu)'),
    'lambda as attribute': ('net = Net()', 'net = Net(lambda x: x)'),
    'partial as attribute': ('net = Net()', 'net = Net(functools.partial(F.leaky_relu, negative_slope=.2))'),
    'dict as attribute': ('net = Net()', 'net = Net(); net.d = {1: 2}'),
    'tensor as attribute': ('net = Net()', 'net = Net(); net.t = torch.ones(1)'),
    'array as attribute': ('net = Net()', 'net = Net(); net.n = np.float32(2)'),
    'dtype as attribute': ('net = Net()', 'net = Net(); net.n = torch.float64'),
    'frozen': ('net = Net()', 'net = Net(); net.a.requires_grad_(False)'),
    'buffer': ('torch.ones(2), pers', 'torch.zeros(2), pers'),
    'hook': ('net = Net()', 'net = Net(); net.a.register_forward_hook(lambda m, x, y: -y)'),
    'forward of the instance': ('net = Net()', 'net = Net(); net.b.forward = lambda x: x'),
    'global tensor': ("{'a': torch.ones(2)}", "{'a': torch.zeros(2)}"),
    'global class': ('one = 1', 'one = 1.5'), 'global partial': ('(max, 2)', '(max, 3)'),
    'global alias': ('act = F.relu\n', 'act = F.gelu\n'), 'deep call': ('def deep5(x): return x', 'def deep5(x): return -x'),
    'in a lambda': ('double(1)', 'double(7)'), 'base': ('class Net(nn.Module):', 'class Net(nn.Sequential):')}


def made(code):
    "The net that some code makes, as in cells of a notebook"
    space = dict(__name__='__main__', nn=nn, F=F, torch=torch, np=np, functools=functools)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(code, space)
    return space['net']


@pytest.mark.parametrize('edit', EDITS)
def test_any_edit_is_told(edit):
    old, new = EDITS[edit]
    assert PLAIN.count(old) == 1
    shas = [code_sha256(made(code)) for code in (PLAIN, PLAIN, PLAIN.replace(old, new))]
    assert shas[0] == shas[1] != shas[2]


def test_weights_count_if_asked_for_and_training_does_not():
    one, two = made(PLAIN), made(PLAIN).eval()
    assert code_sha256(one, weights=True) == code_sha256(two, weights=True)
    with torch.no_grad(): two.a.weight[0, 0] += 1
    assert code_sha256(one, weights=True) != code_sha256(two, weights=True)
    assert code_sha256(one) == code_sha256(two)


def test_it_is_the_same_in_another_process(tmp_path):
    code = 'import functools\nimport numpy as np\nimport torch\nimport torch.nn.functional as F\nfrom torch import nn\n'
    code += 'from cifar_nbdev.content import code_sha256\ntorch.manual_seed(0)' + PLAIN
    code += "net.kept = {'b', 'a', 'c'}, {1: [2., None]}, 2 + 1j\nprint(code_sha256(net, weights=True))"
    shas = {python(code, cwd=tmp_path, PYTHONHASHSEED=seed).stdout for seed in (1, 2)}
    assert len(shas) == 1 and len(shas.pop()) == 65


def test_what_leads_to_itself_ends():
    a = dict(b=[1])
    a['b'].append(a)
    def even(n): return n == 0 or odd(n - 1)
    def odd(n): return n != 0 and even(n - 1)
    assert len({code_sha256(v) for v in (a, even, odd)}) == 3
    b = dict(b=[1])
    b['b'].append(b)
    assert code_sha256(a) == code_sha256(b)


def test_a_name_that_is_an_attribute_is_no_global():
    space = dict(scale=1)
    exec(textwrap.dedent('''
        def f(x): return x.scale
        def g(x): return scale'''), space)
    before = [code_sha256(space[k]) for k in 'fg']
    space['scale'] = 2
    assert [code_sha256(space[k]) == sha for k, sha in zip('fg', before)] == [True, False]


def test_numbers_that_differ_little_are_told():
    values = [1, 1., True, '1', b'1', None, math.nan, np.float32(1), torch.tensor(1.), torch.tensor(1), np.ones(1), [1], (1,)]
    assert len({code_sha256(v) for v in values}) == len(values)
