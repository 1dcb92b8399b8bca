"""Choosing on a validation set, and what a change brings"""
from dataclasses import replace

import numpy as np
import torch

from cifar_nbdev.changes import choose, gains, validation_split, validation_table
from cifar_nbdev.data import ImageData
from cifar_nbdev.runs import Normalised, Settings, run_name, train_run


def run(acc, lr=.01, seed=0, change=None):
    "A made-up run that ends with an accuracy"
    config = dict(lr=lr, momentum=.9, weight_decay=5e-4, epochs=1, bs=128, seed=seed, reading='gate',
                  init='pytorch', change=change)
    return dict(config=config, data=dict(name='made up', sha256='0'*64, n_train=9, n_test=1),
                epochs=[dict(epoch=1, test_acc=acc)], weights_sha256='')


def as_tested(runs, accs):
    return {run_name(r['config'], '0'*64): dict(test_acc=a) for r, a in zip(runs, accs)}


def test_the_split_takes_the_same_part_of_unequal_classes():
    y = torch.tensor([0]*30 + [1]*50 + [2]*7)
    x = torch.arange(len(y)).to(torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32)
    data = ImageData(x, y, x[:2], y[:2], ('a', 'b', 'c'), 'made up')
    part = validation_split(data)
    assert torch.bincount(part.y_test).tolist() == [3, 5, 1]
    pixels = lambda x: sorted(x[:, 0, 0, 0].tolist())
    assert sorted(pixels(part.x_train) + pixels(part.x_test)) == list(range(87))
    assert (part.y_test == y[part.x_test[:, 0, 0, 0].long()]).all() and part.classes == ('a', 'b', 'c')
    assert validation_split(data, seed=1).sha256 != part.sha256


def test_the_choice_is_the_best_mean_on_the_validation_set():
    accuracies = {None: {.01: (.5, .5), .005: (.7, .2)}, 'cosine schedule': {.01: (.1, .2), .005: (.2, .3)}}
    runs = [run(a, lr, s, c) for c, by_lr in accuracies.items()
            for lr, accs in by_lr.items() for s, a in enumerate(accs)]
    assert choose(runs) == {'none': .01, 'cosine schedule': .005}
    assert validation_table(runs).loc[('cosine schedule', .005)].round(6).tolist() == [2, 25, round(50**.5, 6)]
    # runs of before there were changes in a run's settings
    for r in runs:
        if r['config']['change'] is None: del r['config']['change']
    assert choose(runs) == {'none': .01, 'cosine schedule': .005}
    # seeds that the others were not run with do not count
    more = runs + [run(.9, .01, s, 'cosine schedule') for s in (2, 3)]
    assert choose(more) == choose(runs)


def test_a_gain_is_counted_seed_by_seed():
    runs = [run(0, seed=s) for s in range(3)] + [run(0, seed=s, change='four branches') for s in range(3)]
    table = gains(runs, as_tested(runs, (.5, .6, .4, .52, .63, .41)))
    row = table.loc['four branches']
    np.testing.assert_allclose((row['mean'], row['gain']), (52, 2))
    half = 4.302653 * 1 / 3**.5         # t with 2 degrees of freedom; differences 2, 3, 1 have sd 1
    np.testing.assert_allclose((row['gain from'], row['gain to']), (2 - half, 2 + half), rtol=1e-6)
    assert table.index.tolist() == ['none', 'four branches'] and np.isnan(table.loc['none', 'gain'])


def test_a_constant_colour_is_normalised_to_zero(small):
    x = small.x_train.clone()
    x[:, 1] = 7
    run, model = train_run(replace(small, x_train=x), Settings(epochs=1, change='normalised input'), device='cpu',
                           progress=False)
    assert np.isfinite([run['epochs'][0]['train_loss'], run['epochs'][0]['test_loss']]).all()
    seen = []
    Normalised(lambda x: seen.append(x), x)(x[:5].float() / 255)
    assert (seen[0][:, 1].abs() < 1e-5).all() and abs(seen[0][:, 0].std() - 1) < .5
    assert model.std[1] == 1
