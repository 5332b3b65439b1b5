"""SyncIterNorm and SyncDBN: several processes compute what one with the whole batch does."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import normkernels as nk
from normkernels.primitives.iter_norm.sync import sync_iter_norm
from tests.layers.sync_ranks import Problem, counted_collectives, run_on_ranks, step, training_steps
from tests.oracles.run import Result, oracle, plain_path
from tests.tolerances import assert_agree, assert_within, largest
from tests.tolerances.whitening import SCALED_Y, SYNCHRONIZED, assert_iter_norm, exactly_centered

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")

NCHW, NHWC = torch.contiguous_format, torch.channels_last
VARIANTS = {
    "NCHW": Problem(),
    "NHWC": Problem(layout=NHWC),
    "NC": Problem(positions=(), unit=5),  # enough samples for the covariance to have its rank
    "NCL": Problem(positions=(11,)),
    "NCDHW": Problem(positions=(3, 2, 3)),
    "float64": Problem(dtype=torch.float64),
    "bfloat16": Problem(dtype=torch.bfloat16, affine=False),
    "autocast": Problem(dtype=torch.bfloat16, autocast=True),
    "groups of 1": Problem(group_size=1),
    "one group": Problem(group_size=64),
    "frobenius": Problem(scaling="frobenius"),
    "not affine": Problem(affine=False),
    "mean 1e4": Problem(mean=1e4),
    "DBN": Problem(dbn=True),
    "DBN float64": Problem(dbn=True, dtype=torch.float64),
    "DBN mean 1e4": Problem(dbn=True, mean=1e4, layout=NHWC),
}
TWO = ((4, 4), (6, 2), (8, 0))
FOUR = ((2, 2, 2, 2), (3, 0, 4, 1))


def title(splits: tuple[int, ...], variant: str) -> str:
    return f"{'+'.join(map(str, splits))} {variant}"


PROBLEMS = {title(s, name): replace(problem, splits=s) for s in TWO + FOUR for name, problem in VARIANTS.items()}


def of_world(world: int) -> dict[str, Problem]:
    return {name: problem for name, problem in PROBLEMS.items() if len(problem.splits) == world}


# Cases. They run on every rank and return what the tests compare.


def buffers(layer: Any) -> list[Tensor]:
    return [value.clone() for value in layer.buffers()]


def without_samples(splits: tuple[int, ...], rank: int, device: str) -> Any:
    """Run a good batch, then one with this many values per channel.

    Return y, gradients, and the buffers before and after.
    """
    good, few = Problem(), Problem(splits=splits, positions=())
    layer = good.layer()
    layer(good.share(good.whole()[0], rank))
    before = buffers(layer)
    x = torch.full((splits[rank], 8), 3.0)
    return step(layer, x, torch.ones_like(x)), before, buffers(layer), few.splits


def not_finite(value: float, dbn: bool, rank: int, device: str) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Run a good batch, then one with a value on rank 1 that is not finite."""
    problem = Problem(dbn=dbn)
    layer = problem.layer(momentum=0.1)
    x = problem.share(problem.whole()[0], rank)
    layer(x)
    before = buffers(layer)
    if rank == 1:
        x[1, 2, 3, 1] = value
    y = layer(x)
    return before, buffers(layer), y.detach()


def several_batches(options: dict[str, Any], rank: int, device: str) -> list[Tensor]:
    problem = Problem(splits=(6, 2))
    layer = problem.layer(**options)
    x = problem.whole()[0]
    for k in range(3):
        layer(problem.share((k + 1) * x + k, rank))
    return buffers(layer)


def evaluation(options: dict[str, Any], rank: int, device: str) -> tuple[Tensor, list[int]]:
    """Return y of this rank's samples in evaluation, after a step of training, and its collectives."""
    problem = Problem(splits=(6, 2))
    layer = problem.layer(**options)
    x = problem.share(problem.whole()[0], rank)
    layer(x)
    layer.eval()
    with counted_collectives() as found:
        y = layer(x.requires_grad_())
        y.sum().backward()
    return y.detach(), found


def collectives_of(problem: Problem, rank: int, device: str) -> dict[str, list[int]]:
    """Return the bytes of the collectives, in order."""
    layer = problem.layer()
    x = problem.share(problem.whole()[0], rank)
    found = {}
    with counted_collectives() as found["first forward"]:
        layer(x)
    with counted_collectives() as found["forward"]:
        y = layer(x.clone().requires_grad_())
    with counted_collectives() as found["backward"]:
        y.sum().backward()
    with counted_collectives() as found["x without gradient"]:
        layer(x).sum().backward()
    with counted_collectives() as found["no_grad"], torch.no_grad():
        layer(x)
    return found


def constant(mean: float, rank: int, device: str) -> dict[str, Tensor | None]:
    """Run a step where all channels but the first have one value each.

    Their sums of squares leave rounding, and no variance.
    """
    problem = Problem(splits=(6, 2), dtype=torch.float64)  # squares of float32 numbers are exact
    x = (mean * torch.linspace(0.3, 1.7, 8, dtype=torch.float64)).view(1, 8, 1, 1).expand(8, 8, 5, 3).clone()
    x[:, 0] += problem.whole()[0][:, 0]
    x = problem.share(x, rank)
    return step(problem.layer(), x, torch.ones_like(x))


def unlike_scales() -> Tensor:
    """Return channels whose standard deviations differ by 1e4 within a group."""
    return Problem().whole()[0] * torch.logspace(0, 4, 8).roll(3).view(1, 8, 1, 1)


def decorrelated(rank: int, device: str) -> Tensor:
    """Return y of this rank's samples, by an eigendecomposition of all ranks' covariance."""
    problem = Problem(splits=(6, 2), dbn=True, affine=False)
    return problem.layer()(problem.share(unlike_scales(), rank)).detach()


def pairs(rank: int, device: str) -> tuple[dict[str, Tensor | None], list[bool]]:
    """Run a step in two groups of two ranks: each pair has a batch of its own."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    problem = Problem(splits=(6, 2))
    layer = problem.layer(process_group=groups[rank // 2])
    x, dy = (problem.share(t, rank % 2) for t in problem.whole())
    found = step(layer, x * (1 + rank // 2), dy)
    return found, [layer.process_group is group for group in groups]


COUNTED = {
    "float32": Problem(),
    "float64": Problem(dtype=torch.float64),
    "bfloat16": Problem(dtype=torch.bfloat16),
    "groups of 1": Problem(group_size=1),
    "one group, uneven": Problem(group_size=64, splits=(8, 0)),
    "DBN": Problem(dbn=True),
    "wide": Problem(channels=24, group_size=12),
}
NOT_FINITE = [(value, dbn) for value in (float("nan"), float("inf"), -float("inf"), 3e38) for dbn in (False, True)]
AVERAGES: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.1},
    "cumulative": {"momentum": None},
    "none": {"track_running_stats": False},
}
CONSTANTS = (0.0, 1.0, 1e4, 1e7)

TWO_RANKS = {
    "all empty": partial(without_samples, (0, 0)),
    "one value": partial(without_samples, (1, 0)),
    **{f"not finite {value} {dbn}": partial(not_finite, value, dbn) for value, dbn in NOT_FINITE},
    **{f"several {name}": partial(several_batches, options) for name, options in AVERAGES.items()},
    **{f"evaluation {name}": partial(evaluation, options) for name, options in AVERAGES.items()},
    **{f"collectives {name}": partial(collectives_of, problem) for name, problem in COUNTED.items()},
    **{f"constant {mean}": partial(constant, mean) for mean in CONSTANTS},
    "unlike scales": decorrelated,
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(training_steps(of_world(2)) | TWO_RANKS, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(training_steps(of_world(4)) | {"pairs": pairs}, 4, tmp_path_factory.mktemp("four"))


def same_on_all(found: list[list[Tensor]]) -> list[Tensor]:
    """Check that results are equal on every rank, bit for bit, and return them."""
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)
    return found[0]


def merged(found: list[dict[str, Tensor | None]]) -> Result:
    """Merge results into one process's: batches end to end, gradients of weight and bias added up."""
    mean, w, batches = same_on_all(
        [[r["running_mean"], r["running_whitening"], r["num_batches_tracked"]] for r in found]
    )
    assert batches == 1
    y, dx = (torch.cat([r[key] for r in found]) for key in ("y", "dx"))
    dweight, dbias = (
        torch.stack([r[key] for r in found]).sum(0) if key in found[0] else None for key in ("dweight", "dbias")
    )
    return Result(y, mean, w, dx, dweight, dbias)


def assert_as_one_process(problem: Problem, found: list[dict[str, Tensor | None]]) -> None:
    got, (x, dy), config = merged(found), problem.whole(), problem.config()
    for name, like in (("y", x), ("dx", x)):
        shares = like.split([n * problem.unit for n in problem.splits])
        for r, share in zip(found, shares, strict=True):
            assert r[name].dtype == share.dtype and r[name].shape == share.shape
            assert share.numel() == 0 or r[name].stride() == share.stride()
    layer = problem.layer(synchronized=False)
    weight, bias = (None if p is None else p.detach() for p in (layer.weight, layer.bias))
    exact, plain = oracle(config, x, dy, weight, bias), plain_path(config, x, dy, weight, bias)
    assert_iter_norm(got, exact, plain, x, dy, weight, config)
    if problem.dtype != torch.bfloat16:  # the mean's rounding is in no result
        floor = exactly_centered(x, dy, exact, config)
        scale = 1.0 if weight is None else largest(weight)
        assert_within("y", got.y, exact.y, None, scale * floor.y, largest(exact.y))
        assert_within("dx", got.dx, exact.dx, None, scale * floor.dx, largest(exact.dx))
        for key in ("y", "w", "dx", "dweight", "dbias"):
            value, reference = getattr(got, key), getattr(exact, key)
            if value is not None:
                assert_within(key, value, reference, None, SYNCHRONIZED * largest(reference), largest(reference))

    alone = step(layer, x, dy, problem.autocast)  # beside the oracle, for what a user compares with
    assert_agree([got.mean, got.w], [alone["running_mean"], alone["running_whitening"]])


@pytest.mark.parametrize("name", of_world(2))
def test_two_ranks_are_one_process_with_the_whole_batch(two: list[dict[str, Any]], name: str) -> None:
    assert_as_one_process(PROBLEMS[name], [rank[name] for rank in two])


@pytest.mark.parametrize("name", of_world(4))
def test_four_ranks_are_one_process_with_the_whole_batch(four: list[dict[str, Any]], name: str) -> None:
    assert_as_one_process(PROBLEMS[name], [rank[name] for rank in four])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs, as NCCL has one for each process")
def test_two_ranks_with_nccl(tmp_path_factory: pytest.TempPathFactory) -> None:
    problems = of_world(2)
    ranks = run_on_ranks(training_steps(problems), 2, tmp_path_factory.mktemp("nccl"), backend="nccl")
    for name, problem in problems.items():
        assert_as_one_process(problem, [rank[name] for rank in ranks])


def test_groups_of_processes(four: list[dict[str, Any]]) -> None:
    """Each pair computes what one process does with the pair's own batch."""
    problem = Problem(splits=(6, 2))
    x, dy = problem.whole()
    for pair in range(2):
        ranks = [four[2 * pair + i]["pairs"] for i in range(2)]
        assert all(mine == [pair == 0, pair == 1] for _, mine in ranks)
        got = merged([found for found, _ in ranks])
        alone = step(problem.layer(synchronized=False), x * (1 + pair), dy)
        assert_agree(
            [got.y, got.mean, got.w, got.dx, got.dweight, got.dbias],
            [alone[k] for k in ("y", "running_mean", "running_whitening", "dx", "dweight", "dbias")],
        )


@pytest.mark.parametrize("name", ["all empty", "one value"])
def test_too_few_values_leave_running_statistics_alone(two: list[dict[str, Any]], name: str) -> None:
    """The last rank that has data does not fail beside the others, which have none left."""
    for rank in two:
        found, before, after, _ = rank[name]
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a, b)
        assert all(found[key].isfinite().all() for key in ("y", "dx", "dweight", "dbias"))
        assert not found["dweight"].any() and not found["dx"].any()
    assert two[1][name][0]["y"].shape == (0, 8)
    if name == "one value":  # the mean itself: nothing is left but beta
        assert torch.equal(two[0][name][0]["y"][0], Problem().layer().bias)
        assert torch.equal(two[0][name][0]["dbias"], torch.ones(8))
    assert not two[1][name][0]["dbias"].any()


@pytest.mark.parametrize(("value", "dbn"), NOT_FINITE)
def test_what_is_not_finite_on_one_rank_reaches_no_running_statistics(
    two: list[dict[str, Any]], value: float, dbn: bool
) -> None:
    for rank in two:
        before, after, y = rank[f"not finite {value} {dbn}"]
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a, b)
        assert not y[:, :4].isfinite().all()  # the bad value is not hidden


@pytest.mark.parametrize("name", AVERAGES)
def test_running_averages(two: list[dict[str, Any]], name: str) -> None:
    problem = Problem(splits=(6, 2))
    layer = problem.layer(synchronized=False, **AVERAGES[name])
    for k in range(3):
        layer((k + 1) * problem.whole()[0] + k)
    assert_agree(same_on_all([rank[f"several {name}"] for rank in two]), buffers(layer))


@pytest.mark.parametrize("name", AVERAGES)
def test_evaluation_is_that_of_a_rank_alone(two: list[dict[str, Any]], name: str) -> None:
    """It takes running statistics or, without them, those of the rank's own batch, as SyncBatchNorm does."""
    problem = Problem(splits=(6, 2))
    x = problem.whole()[0]
    layer = problem.layer(synchronized=False, **AVERAGES[name])
    layer(x)
    layer.eval()
    for rank, found in enumerate(two):
        y, collectives = found[f"evaluation {name}"]
        assert collectives == []
        assert_agree(y, layer(problem.share(x, rank)).detach())


@pytest.mark.parametrize("name", COUNTED)
def test_one_collective_forward_and_one_backward(two: list[dict[str, Any]], name: str) -> None:
    """They have as many bytes as docs/distributed.md says, whatever the rank has of the batch."""
    problem = COUNTED[name]
    forward, backward = problem.forward_bytes(), problem.backward_bytes()
    for rank in two:
        assert rank[f"collectives {name}"] == {
            "first forward": [-1, forward],
            "forward": [forward],
            "backward": [backward],
            "x without gradient": [forward],
            "no_grad": [forward],
        }


@pytest.mark.parametrize("mean", CONSTANTS)
def test_constant_channels_have_no_variance(two: list[dict[str, Any]], mean: float) -> None:
    """They give beta, however large they are, and a group of them has the whitening matrix of no covariance."""
    layer = Problem(dtype=torch.float64).layer()
    got, bias = merged([rank[f"constant {mean}"] for rank in two]), layer.bias.detach()
    assert torch.equal(got.y[:, 4:], bias[4:].view(4, 1, 1).expand(8, 4, 5, 3))
    assert_agree(
        got.w[1], nk.ops.inverse_sqrt(torch.zeros(1, 4, 4, dtype=torch.float64), layer.num_iterations, layer.eps)[0]
    )


def test_one_rank_needs_no_collective(tmp_path: Any) -> None:
    problem = Problem(splits=(8,))
    x, dy = problem.whole()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/start", rank=0, world_size=1)
    try:
        with counted_collectives() as found:
            got = step(problem.layer(), x, dy)
            with pytest.raises(ValueError, match="more than one value per channel"):
                problem.layer()(torch.ones(1, 8))
    finally:
        dist.destroy_process_group()
    assert found == []
    alone = step(problem.layer(synchronized=False), x, dy)
    assert all(torch.equal(got[key], alone[key]) for key in alone)


def test_channels_of_unlike_scale(two: list[dict[str, Any]]) -> None:
    layer = Problem(dbn=True, affine=False, dtype=torch.float64).layer()
    whole = nk.DBN2d(8, layer.group_size, layer.eps, affine=False, dtype=torch.float64)
    y = torch.cat([found["unlike scales"] for found in two])
    assert (y - whole(unlike_scales().double())).abs().max() <= SCALED_Y


def test_defaults_are_iter_norms() -> None:
    """The function has the defaults of iter_norm; the layers give it all options."""
    ours, theirs = (inspect.signature(function).parameters for function in (sync_iter_norm, nk.ops.iter_norm))
    assert {name: p.default for name, p in ours.items() if name != "process_group"} == {
        name: p.default for name, p in theirs.items()
    }
