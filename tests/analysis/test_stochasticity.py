"""SND against eq. 10 number by number, and against closed forms."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normkernels import DBN1d, IterNorm1d
from normkernels.analysis import snd, stochasticity
from tests.oracles import measures
from tests.tolerances import IDENTITY, assert_identity, rounding
from tests.tolerances.analysis import snd_sampling

D = torch.float64


def batch_norm(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0, correction=0)


class Recorder:
    """A function of batches that remembers which samples came, by their first feature, and what it made of them."""

    def __init__(self, norm: Callable[[Tensor], Tensor], data: Tensor) -> None:
        self.norm, self.first = norm, data[:, 0].tolist()
        self.batches: list[tuple[list[int], Tensor]] = []

    def __call__(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        self.batches.append(([self.first.index(value) for value in x[:, 0].tolist()], y))
        return y

    def draws(self, batch_size: int) -> list[list[tuple[list[int], Tensor]]]:
        each = -(-len(self.first) // batch_size)
        return [self.batches[i : i + each] for i in range(0, len(self.batches), each)]


@pytest.fixture(params=[2**28, 0], ids=["kept", "computed-twice"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(stochasticity, "KEPT_BYTES", request.param)
    return 1 if request.param else 2


@pytest.mark.parametrize(("samples", "batch_size"), [(6, 3), (7, 3), (7, 6), (5, 5), (3, 1)])
def test_eq_10(samples: int, batch_size: int, passes: int) -> None:
    """Batches partition the samples; only a last one that is short gets others, as many as it takes to fill it."""
    num_draws = 4
    data = torch.randn(samples, 3, dtype=D)
    norm = Recorder(batch_norm if batch_size > 1 else torch.sin, data)
    got = snd(norm, data, batch_size, num_draws)
    draws = norm.draws(batch_size)
    assert len(draws) == num_draws * passes
    outputs: list[list[Tensor]] = [[] for _ in range(samples)]
    for batches in draws[:num_draws]:
        remaining = samples
        for members, y in batches:
            assert len(members) == batch_size == len(set(members))
            for sample, output in list(zip(members, y, strict=True))[: min(remaining, batch_size)]:
                outputs[sample].append(output)
            remaining -= batch_size
    assert [len(of_sample) for of_sample in outputs] == [num_draws] * samples
    assert len({str([members for members, _ in batches]) for batches in draws}) > 1
    assert_identity(got, measures.snd(outputs))


def test_two_outputs_of_every_sample(passes: int) -> None:
    """N = 3, B = 2, F = x - mean_B: the output is x_i - (x_i + x_j) / 2 for one or the other x_j.

    Half of the distance between them, |x_j - x_k| / 4, is eq. 9. The third sample is alone in its batch and is filled
    up with one of the others, as often with one as with the other.
    """
    num_draws = 1000
    data = torch.randn(3, 1, dtype=D)
    expected = sum(abs(data[j] - data[k]).item() / 4 for j, k in ((0, 1), (0, 2), (1, 2))) / 3
    got = snd(lambda x: x - x.mean(0), data, 2, num_draws).item()
    assert 1 - snd_sampling(num_draws) <= got / expected <= 1 + IDENTITY


@pytest.mark.parametrize("norm", [nn.LayerNorm(5, dtype=D), nn.BatchNorm1d(5, dtype=D).eval(), torch.tanh])
def test_is_zero_where_samples_do_not_depend_on_each_other(norm: Callable[[Tensor], Tensor]) -> None:
    assert_identity(1 + snd(norm, torch.randn(20, 5, dtype=D), 8, 3), 1.0)


def test_full_batch_has_no_disturbance() -> None:
    assert_identity(1 + snd(batch_norm, torch.randn(20, 5, dtype=D), 20, 3), 1.0)


def test_grows_with_whitening_and_shrinks_with_the_batch() -> None:
    """The order is that of IterNorm's Figure 4b and of its Figure 5a."""
    data = torch.randn(512, 32, dtype=D)
    norms = [nn.BatchNorm1d(32, dtype=D), IterNorm1d(32, num_iterations=5, dtype=D), DBN1d(32, 32, dtype=D)]
    small, large = ([snd(norm, data, batch_size, 4).item() for norm in norms] for batch_size in (64, 256))
    assert small[0] < small[2] and small[1] < small[2]
    assert all(b < a for a, b in zip(small, large, strict=True))


@pytest.mark.parametrize("make", [nn.BatchNorm1d, IterNorm1d, DBN1d])
def test_a_module_stays_as_it_is(make: Any) -> None:
    layer = make(4)
    layer(torch.randn(10, 4))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    value = snd(layer, torch.randn(20, 4), 8, 3)
    assert value > 0 and not value.requires_grad and layer.training
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


class Counting(nn.Module):
    """Its output depends on how often it was called, as batch renormalization's statistics do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def test_buffers_are_fresh_for_every_batch() -> None:
    assert snd(Counting(), torch.randn(9, 2), 3, 3) == 0


def test_same_seed_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.randn(50, 3)

    def value(seed: int, norm: Callable[[Tensor], Tensor] = batch_norm) -> Tensor:
        return snd(norm, data, 8, 3, generator=torch.Generator().manual_seed(seed))

    kept = value(1)
    assert torch.equal(kept, value(1)) and not torch.equal(kept, value(2))
    monkeypatch.setattr(stochasticity, "KEPT_BYTES", 0)
    assert torch.equal(kept, value(1)), "passes over other batches"
    torch.manual_seed(3)
    default = snd(batch_norm, data, 8, 3)
    torch.manual_seed(3)
    assert torch.equal(default, snd(lambda x: batch_norm(x) + 0 * torch.rand(()), data, 8, 3)), (
        "norm draws numbers, too"
    )


def test_a_generator_goes_on() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(50, 3)
    assert not torch.equal(*(snd(batch_norm, data, 8, 3, generator=generator) for _ in range(2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types(dtype: torch.dtype) -> None:
    """Sums are float64: only the rounding of outputs of size 4 or less remains, in each of d entries."""
    data = torch.randn(64, 8, dtype=dtype)
    got, exact = (
        snd(norm, x, 16, 4, generator=torch.Generator().manual_seed(0))
        for norm, x in ((lambda x: batch_norm(x.double()).to(dtype), data), (batch_norm, data.double()))
    )
    assert got.dtype == (D if dtype == D else torch.float32) and got.shape == ()
    assert abs(got.double() - exact) <= rounding(4 * 8**0.5, dtype)


def test_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.randn(10, 2)
    snd(batch_norm, data, 5, 3)
    assert capsys.readouterr().err == ""
    pytest.importorskip("tqdm")
    snd(batch_norm, data, 5, 3, progress=True)
    assert "3/3" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match="tqdm"):
        snd(batch_norm, data, 5, 3, progress=True)


GOOD: dict[str, Any] = {"norm": batch_norm, "data": torch.ones(6, 2), "batch_size": 3, "num_draws": 2}


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"norm": 3}, TypeError, "norm: expected a function or a module, got int"),
        ({"data": [1.0]}, TypeError, "data: expected a torch.Tensor, got list"),
        ({"data": torch.ones(6, 2, dtype=torch.int64)}, TypeError, "data: expected float16"),
        ({"data": torch.ones(6, 2, 1)}, ValueError, r"data: expected shape \(N, d\)"),
        ({"data": torch.ones(0, 2)}, ValueError, r"data: expected shape \(N, d\)"),
        ({"batch_size": 7}, ValueError, "batch_size: expected at most the 6 samples, got 7"),
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
        ({"batch_size": 2.0}, TypeError, "batch_size: expected an int"),
        ({"num_draws": 1}, ValueError, "num_draws: expected at least 2, got 1"),
        ({"norm": lambda x: x[:, :1]}, ValueError, r"norm\(batch\): expected the batch's shape \(3, 2\), got \(3, 1\)"),
        ({"norm": lambda x: x.sum(0)}, ValueError, r"norm\(batch\): expected the batch's shape"),
        ({"norm": lambda x: None}, TypeError, r"norm\(batch\): expected a torch.Tensor, got NoneType"),
    ],
)
def test_bad_input(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        snd(**{**GOOD, **bad})
