"""What a checkpoint belongs to, what is in it, and that a training goes on from it as if nothing had happened"""
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import (BatchSampler, DataLoader, RandomSampler, SequentialSampler, SubsetRandomSampler,
                              TensorDataset, WeightedRandomSampler, default_collate)

from cifar_nbdev.checkpoint import describe_batches
from cifar_nbdev.data import dataloaders
from cifar_nbdev.runs import weights_sha256
from cifar_nbdev.sweep import sweep
from cifar_nbdev.train import fit

fit = partial(fit, device='cpu', progress=False)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))


def resumed(first, second, path, epochs=3):
    "Weights of a training that was taken up after its first epoch; both are called with (epochs, **more of fit)"
    first(1, checkpoint=path)
    return second(epochs, checkpoint=path)


def smoothed(by):
    def step(model, opt, xb, yb):
        opt.zero_grad()
        loss = F.cross_entropy(logits := model(xb), yb, label_smoothing=by)
        loss.backward()
        opt.step()
        return loss.detach(), logits.detach()
    return step


def test_another_step_of_the_same_name_is_refused(small, tmp_path):
    def run(by): return lambda n, **more: fit(net(), dataloaders(small), n,
                                              step=smoothed(by), **more)
    assert len(resumed(run(.1), run(.1), tmp_path/'c')) == 3
    with pytest.raises(ValueError, match='step step .{8} .now step'): run(.9)(4, checkpoint=tmp_path/'c')


class Halve:
    def after_epoch(self, t):
        for g in t.opt.param_groups: g['lr'] *= .5


def clamp(model, history):
    with torch.no_grad():
        for p in model.parameters(): p.clamp_(-.01, .01)


def noise(model, history):
    with torch.no_grad(): model[1].bias.add_(torch.randn(10))


@pytest.mark.parametrize('callback', [Halve(), clamp, noise], ids=['lr', 'weights', 'random'])
def test_what_callbacks_change_is_saved(small, tmp_path, callback):
    def run(n, **more):
        model = net()
        torch.manual_seed(1)
        fit(model, dataloaders(small), n, callbacks=[callback], **more)
        return weights_sha256(model)
    assert resumed(run, run, tmp_path/'c') == run(3)


def test_an_epoch_is_saved_though_a_callback_ends_the_training(small, tmp_path):
    def stop(model, history):
        if len(history) == 2: raise ZeroDivisionError
    def run(n, **more): return fit(net(), dataloaders(small), n,
                                   checkpoint=tmp_path/'c', **more)
    with pytest.raises(ZeroDivisionError): run(3, callbacks=[stop])
    assert run(3).resumed == 2


def sampled(data, kind):
    g = torch.Generator().manual_seed(0)
    def batches(sampler): return DataLoader(data, batch_sampler=BatchSampler(sampler, 50, False))
    return dict(
        inner=lambda: batches(RandomSampler(data, generator=g)), inner_sequence=lambda: batches(SequentialSampler(data)),
        weighted=lambda: DataLoader(data, 50, sampler=WeightedRandomSampler([1.] * 300, 300, generator=g)),
        weighted_otherwise=lambda: DataLoader(data, 50, sampler=WeightedRandomSampler([*range(300)], 300, generator=g)),
        some=lambda: DataLoader(data, 50, sampler=SubsetRandomSampler(range(100), generator=g)),
        others=lambda: DataLoader(data, 50, sampler=SubsetRandomSampler(range(200, 300), generator=g)),
        listed=lambda: DataLoader(data, 50, sampler=range(300)),
        backwards=lambda: DataLoader(data, 50, sampler=[*range(300)][::-1]),
        replaced=lambda: DataLoader(data, 50, sampler=RandomSampler(data, True, generator=g)),
        collated=lambda: DataLoader(data, 50, collate_fn=lambda items: default_collate(items[::-1])),
        plain=lambda: DataLoader(data, 50))[kind]()


KINDS = ('inner inner_sequence weighted weighted_otherwise some others listed backwards replaced collated plain').split()


def test_samplers_are_told_apart(small):
    data = TensorDataset(small.x_train.float() / 255, small.y_train)
    seen = [[describe_batches(sampled(data, kind)) for kind in KINDS] for _ in range(2)]
    assert seen[0] == seen[1]
    assert all(a != b for i, a in enumerate(seen[0]) for b in seen[0][:i])


@pytest.mark.parametrize('kind', KINDS)
def test_any_sampler_goes_on_where_it_was(small, tmp_path, kind):
    data = TensorDataset(small.x_train.float() / 255, small.y_train)
    def run(n, **more):
        model = net()
        fit(model, (sampled(data, kind), dataloaders(small).test), n, **more)
        return weights_sha256(model)
    assert resumed(run, run, tmp_path/'c') == run(3)


def test_a_folder_of_images_can_have_a_checkpoint(tmp_path):
    from PIL import Image
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import ToTensor
    for name in 'ab':
        (tmp_path/'images'/name).mkdir(parents=True)
        for i in range(3): Image.new('RGB', (32, 32), (40 * i, 200, 9)).save(tmp_path/'images'/name/f'{i}.png')
    dl = DataLoader(ImageFolder(tmp_path/'images', ToTensor()), 2)
    for n in (1, 2): history = fit(net(), (dl, dl), n, checkpoint=tmp_path/'c')
    assert history.resumed == 1


class Extra(nn.Linear):
    def get_extra_state(self): return {'a': 1}
    def set_extra_state(self, state): pass


@pytest.mark.parametrize('model, said', [
    (nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), '1.weight of the model is not made yet'),
    (nn.Sequential(nn.Flatten(), Extra(3072, 10)), 'extra_state of the model is dict')], ids=['lazy', 'extra state'])
def test_a_state_that_cannot_be_saved_is_refused_before_training(small, tmp_path, model, said):
    with pytest.raises(ValueError, match=said):
        fit(model, dataloaders(small), 1, checkpoint=tmp_path/'c')
    with pytest.raises(ValueError, match=said):
        sweep(small, (.01,), model=lambda data, seed: model, device='cpu', progress=False, executor=ThreadPoolExecutor(1))
    assert not (tmp_path/'c').exists()


def test_a_sparse_file_is_no_checkpoint(small, tmp_path):
    with open(tmp_path/'c', 'wb') as f: f.truncate(10**13)
    with pytest.raises(ValueError, match='is not a whole checkpoint'):
        fit(net(), dataloaders(small), 1, checkpoint=tmp_path/'c')
