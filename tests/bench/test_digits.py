"""The digits experiment: an honest split, equal conditions for every norm, and runs that repeat."""

import pytest
import torch
from torch import nn

import normkernels as nk

pytest.importorskip("sklearn")  # before what imports it

from bench.experiments.digits import Epoch, batches, build_network, digits_split, summarize, train


def test_split_covers_everything_once():
    split = digits_split()
    both = torch.cat([split.train_index, split.test_index])
    assert sorted(both.tolist()) == list(range(1797))
    assert split.train_x.shape == (len(split.train_index), 1, 8, 8)
    assert len(split.test_y) == len(split.test_index)


def test_no_image_is_on_both_sides():
    split = digits_split()
    train_images = {tuple(x.flatten().tolist()) for x in split.train_x}
    test_images = {tuple(x.flatten().tolist()) for x in split.test_x}
    assert not train_images & test_images


def test_split_is_stratified_and_the_same_at_every_call():
    first, second = digits_split(), digits_split()
    assert torch.equal(first.train_index, second.train_index)
    assert torch.equal(first.test_x, second.test_x)
    assert not torch.equal(first.train_index, digits_split(seed=1).train_index)
    share = first.test_y.bincount(minlength=10) / first.train_y.bincount(minlength=10)
    assert share.min() > 0.9 * share.max()


def test_standardization_uses_the_training_images_only():
    split = digits_split()
    assert abs(float(split.train_x.mean())) < 1e-5
    assert abs(float(split.train_x.std()) - 1) < 1e-5
    assert abs(float(split.test_x.mean())) > 1e-5


def test_every_norm_starts_from_the_same_weights():
    states = [build_network(norm, seed=3) for norm in (nn.BatchNorm2d, nk.IterNorm2d, nk.DBN2d)]
    shared = [[p for m in net if isinstance(m, (nn.Conv2d, nn.Linear)) for p in m.parameters()] for net in states]
    for other in shared[1:]:
        assert all(torch.equal(a, b) for a, b in zip(shared[0], other, strict=True))
    assert not torch.equal(build_network(nn.BatchNorm2d, 4)[0].weight, shared[0][0])


def test_batches_are_disjoint_equal_and_depend_on_seed_and_epoch():
    first = list(batches(100, 32, seed=0, epoch=1))
    assert [len(b) for b in first] == [32, 32, 32]
    assert len(set(torch.cat(first).tolist())) == 96
    assert all(torch.equal(a, b) for a, b in zip(first, batches(100, 32, 0, 1), strict=True))
    assert not torch.equal(first[0], next(batches(100, 32, 0, 2)))
    assert not torch.equal(first[0], next(batches(100, 32, 1, 1)))


def test_training_repeats_and_learns():
    norms = {"BatchNorm2d": nn.BatchNorm2d, "IterNorm2d": nk.IterNorm2d}
    runs = [train(norms, seeds=1, epochs=2, batch_size=128) for _ in range(2)]
    figures = [{(e.norm, e.epoch): (e.train_loss, e.test_accuracy) for e in run} for run in runs]
    assert figures[0] == figures[1]
    assert set(figures[0]) == {(n, e) for n in norms for e in (1, 2)}
    for name in norms:
        assert figures[0][name, 2][0] < figures[0][name, 1][0]


def test_summary_takes_the_last_epoch_over_the_seeds():
    history = [
        Epoch("a", 0, 1, 9.0, 0.1, 50.0),
        Epoch("a", 0, 2, 1.0, 0.8, 2.0),
        Epoch("a", 1, 1, 9.0, 0.1, 50.0),
        Epoch("a", 1, 2, 3.0, 0.9, 4.0),
    ]
    (summary,) = summarize(history)
    assert (summary.final_loss, summary.seconds_per_epoch) == (2.0, 3.0)
    assert abs(summary.accuracy - 0.85) < 1e-12
    assert abs(summary.accuracy_std - 0.1 / 2**0.5) < 1e-12
    (single,) = summarize(history[:2])
    assert single.accuracy_std != single.accuracy_std
