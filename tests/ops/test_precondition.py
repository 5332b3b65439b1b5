"""precondition against steps 3 to 5 of BNP's Algorithms 2 and 3, entry by entry, and as the matrix P P^T / q^2."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import normkernels as nk
from tests.oracles import inputs
from tests.oracles.run import back, moved
from tests.tolerances import largest
from tests.tolerances.bnp import precondition_floors

# The kernels leave float64 to plain PyTorch, and say so once.
pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.filterwarnings("ignore:.*plain PyTorch instead of the Triton kernels"),
]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPS1, EPS2 = 1e-2, 1e-4

# Shape of the weight, groups, bias: what layers have.
LAYERS = {
    "linear": ((7, 5), 1, True),
    "linear-no-bias": ((6, 3), 1, False),
    "linear-wide": ((3, 1030), 1, True),
    "linear-one-input": ((4, 1), 1, True),
    "conv1d": ((5, 3, 4), 1, True),
    "conv2d": ((4, 6, 3, 3), 1, True),
    "conv2d-no-bias": ((8, 4, 1, 1), 1, False),
    "conv2d-grouped": ((6, 2, 3, 2), 3, True),
    "conv2d-depthwise": ((8, 1, 5, 5), 8, True),
    "conv2d-deep": ((2, 120, 3, 3), 1, True),
    "conv3d": ((3, 2, 2, 3, 2), 1, True),
}


def name(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


class Layer:
    """Random gradients and statistics of one layer, in float64 with the type's values."""

    def __init__(self, shape: tuple[int, ...], groups: int, bias: bool, dtype: torch.dtype, seed: int = 0) -> None:
        g = inputs.generator(seed)
        stat = torch.float64 if dtype == torch.float64 else torch.float32
        channels = shape[1] * groups
        self.groups, self.q2 = groups, 1.0 + 0.25 * seed
        self.Gw = torch.randn(shape, dtype=torch.float64, generator=g).to(dtype)
        self.Gb = torch.randn(shape[0], dtype=torch.float64, generator=g).to(dtype) if bias else None
        self.mean = torch.randn(channels, dtype=torch.float64, generator=g).to(stat)
        self.var = torch.randn(channels, dtype=torch.float64, generator=g).exp().to(stat)

    def expected(self) -> tuple[Tensor, Tensor | None]:
        """Return [b, w] <- P P^T [b, w] / q^2 for each output, with P of eq. 15 (23 for kernels), in float64."""
        Gw = self.Gw.double().clone()
        Gb = None if self.Gb is None else self.Gb.double().clone()
        outputs, inputs_, taps = len(Gw), Gw.shape[1], Gw[0, 0].numel()
        for o in range(outputs):
            first = o // (outputs // self.groups) * inputs_
            var = self.var[first : first + inputs_].double()
            sigma = (var + EPS1 * var.max() + EPS2).sqrt().repeat_interleave(taps)
            mu = self.mean[first : first + inputs_].double().repeat_interleave(taps)
            D = torch.diag(torch.cat([torch.ones(1, dtype=torch.float64), 1 / sigma]))
            U = torch.eye(1 + len(mu), dtype=torch.float64)
            if Gb is not None:
                U[0, 1:] = -mu
            P = U @ D
            w_hat = torch.cat([torch.zeros(1, dtype=torch.float64) if Gb is None else Gb[o : o + 1], Gw[o].flatten()])
            w_hat = P @ (P.T @ w_hat) / self.q2
            Gw[o] = w_hat[1:].view_as(Gw[o])
            if Gb is not None:
                Gb[o] = w_hat[0]
        return Gw, Gb


def run(layers: Sequence[Layer], eps1: float = EPS1, eps2: float = EPS2) -> tuple[list[Any], list[int]]:
    """Run the op on copies with the same strides; return [(Gw, Gb)] and the rows that were left."""
    copies = [(moved_copy(layer.Gw), moved_copy(layer.Gb), moved(layer.mean), moved(layer.var)) for layer in layers]
    left = nk.ops.precondition(
        *(list(values) for values in zip(*copies, strict=True)),
        [layer.groups for layer in layers], [layer.q2 for layer in layers], eps1, eps2,
    )  # fmt: skip
    assert all(each.dtype == torch.int32 and each.shape == () for each in left)
    return [(back(Gw), back(Gb)) for Gw, Gb, *_ in copies], [int(each) for each in left]


def moved_copy(t: Tensor | None) -> Tensor | None:
    return None if t is None else moved(copy.deepcopy(t))


def check(layers: Sequence[Layer]) -> None:
    results, left = run(layers)
    assert left == [0] * len(layers)
    for layer, (Gw, Gb) in zip(layers, results, strict=True):
        exact_w, exact_b = layer.expected()
        floor_w, floor_b = precondition_floors(layer.Gw, layer.Gb, layer.mean, layer.var, layer.q2, exact_w, exact_b)
        assert Gw.dtype == layer.Gw.dtype and Gw.stride() == layer.Gw.stride()
        assert ((Gw.double() - exact_w).abs() <= floor_w).all(), largest((Gw.double() - exact_w).abs() - floor_w)
        assert (Gb is None) == (exact_b is None)
        if Gb is not None:
            assert exact_b is not None and floor_b is not None
            assert ((Gb.double() - exact_b).abs() <= floor_b).all(), largest((Gb.double() - exact_b).abs() - floor_b)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("kind", LAYERS)
def test_each_kind_of_layer(kind: str, dtype: torch.dtype) -> None:
    check([Layer(*LAYERS[kind], dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_all_layers_at_once(dtype: torch.dtype) -> None:
    check([Layer(*spec, dtype, seed) for seed, spec in enumerate(LAYERS.values())])


def test_more_layers_than_one_launch_takes() -> None:
    check([Layer((1, 1 + i % 3), 1, i % 2 == 0, torch.float32, i) for i in range(130)])


def test_several_types() -> None:
    check([Layer((3, 4, 2), 1, True, dtype, seed) for seed, dtype in enumerate(DTYPES * 2)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "every-other"])
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    layers = [Layer((4, 6, 3, 3), 1, True, dtype), Layer((6, 2, 3, 2), 3, True, dtype, 1)]
    for layer in layers:
        if layout == "channels_last":
            layer.Gw = layer.Gw.contiguous(memory_format=torch.channels_last)
        elif layout == "transposed":
            layer.Gw = layer.Gw.transpose(0, 1).contiguous().transpose(0, 1)
        else:
            layer.Gw = layer.Gw.repeat_interleave(2, 0)[::2]
    check(layers)


def test_gradient_views_of_a_bucket() -> None:
    """DDP's gradients are parts of one flat tensor, which must change in place and nowhere else."""
    layer = Layer((5, 3), 1, True, torch.float32)
    bucket = moved(torch.cat([torch.full((1,), 7.0), layer.Gw.flatten(), torch.full((2,), 7.0), layer.Gb]))
    Gw, Gb = bucket[1:16].view(5, 3), bucket[18:]
    nk.ops.precondition([Gw], [Gb], [moved(layer.mean)], [moved(layer.var)], [1], [1.0], EPS1, EPS2)
    exact_w, exact_b = layer.expected()
    assert exact_b is not None
    expected = torch.cat([torch.full((1,), 7.0), exact_w.flatten().float(), torch.full((2,), 7.0), exact_b.float()])
    torch.testing.assert_close(back(bucket), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_left(value: float, dtype: torch.dtype) -> None:
    """The row is left as a whole, and no other row; also where the mean is 0, and where only the bias is not finite."""
    layers = [Layer((4, 3, 2), 1, True, dtype), Layer((4, 5), 1, False, dtype, 1), Layer((3, 2), 1, True, dtype, 2)]
    layers[0].mean[1] = 0.0
    before = [(layer.Gw.clone(), layer.Gb if layer.Gb is None else layer.Gb.clone()) for layer in layers]
    exact = [layer.expected() for layer in layers]
    layers[0].Gw[2, 1, 0] = value
    layers[1].Gw[0, 4] = value
    assert layers[2].Gb is not None and layers[0].Gb is not None
    layers[2].Gb[1] = value
    results, left = run(layers)
    assert left == [1, 1, 1]
    for layer, row, (Gw, Gb), (before_w, before_b), (exact_w, exact_b) in zip(
        layers, (2, 0, 1), results, before, exact, strict=True
    ):
        torch.testing.assert_close(Gw[row], layer.Gw[row], rtol=0, atol=0, equal_nan=True)
        others = [i for i in range(len(Gw)) if i != row]
        floors = precondition_floors(before_w, before_b, layer.mean, layer.var, layer.q2, exact_w, exact_b)
        for key, got, want, floor in (("weight", Gw, exact_w, floors[0]), ("bias", Gb, exact_b, floors[1])):
            if got is not None:
                assert ((got.double() - want).abs() <= floor)[others].all(), key
        if Gb is not None:
            torch.testing.assert_close(Gb[row], layer.Gb[row], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_rows_that_would_overflow_are_left(dtype: torch.dtype, bias: bool) -> None:
    """The result of finite gradients is beyond the type's largest number, even where a mean of 0 hides it."""
    layer = Layer((3, 4), 1, bias, dtype)
    layer.mean[2] = 0.0
    layer.var.fill_(1e-3)
    layer.Gw[1, 2] = torch.finfo(dtype).max / 2  # times 900
    before = layer.Gw.clone(), None if layer.Gb is None else layer.Gb.clone()
    ((Gw, Gb),), left = run([layer])
    assert left == [1] and Gw.isfinite().all()
    assert torch.equal(Gw[1], before[0][1]) and not torch.equal(Gw[0], before[0][0])
    if Gb is not None:
        assert before[1] is not None and Gb[1] == before[1][1] and Gb.isfinite().all()


def test_large_means_keep_the_digits_of_step_5() -> None:
    """With a mean of 1000 deviations the sum is that of the new weights' gradients, which does not cancel twice."""
    layer = Layer((4, 500), 1, True, torch.float32)
    layer.mean += 1000.0
    layer.var.fill_(1.0)
    check([layer])


@pytest.mark.parametrize("variance", [0.0, 1e-12, 1e12])
def test_extreme_variances(variance: float) -> None:
    """eps2 keeps constant inputs from dividing by 0."""
    layer = Layer((4, 6), 1, True, torch.float32)
    layer.var.fill_(variance)
    check([layer])


def test_it_is_deterministic() -> None:
    layer = Layer((9, 700), 1, True, torch.float32)
    (first, _), (second, _) = run([layer]), run([layer])
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))


def test_nothing_to_do() -> None:
    assert nk.ops.precondition([], [], [], [], [], []) == []


@pytest.mark.on_cpu
def test_gradients_that_require_gradients() -> None:
    """They are changed without a record of it, as after backward(create_graph=True)."""
    Gw = torch.ones(2, 3).requires_grad_() * 2
    before = Gw.grad_fn
    nk.ops.precondition([Gw], [None], [torch.zeros(3)], [torch.ones(3)], [1], [1.0], 0.0, 1.0)
    assert Gw.grad_fn is before and torch.equal(Gw.detach(), torch.ones(2, 3))


GRAD, VECTOR = torch.ones(4, 3), torch.ones(3)


@pytest.mark.parametrize(
    ("change", "error", "expected", "got"),
    [
        ({"weight_grads": [[1.0]]}, TypeError, "torch.Tensor", "list"),
        ({"weight_grads": [GRAD.long()]}, TypeError, "float32", "int64"),
        ({"weight_grads": [VECTOR]}, ValueError, "(O, I / groups, *k)", "(3,)"),
        ({"weight_grads": [GRAD[:0]]}, ValueError, "non-empty", "(0, 3)"),
        ({"weight_grads": [GRAD, GRAD]}, ValueError, "each of the 2 layers", "1"),
        ({"bias_grads": [VECTOR]}, ValueError, "(4,)", "(3,)"),
        ({"bias_grads": [torch.ones(4).half()]}, TypeError, "float32", "float16"),
        ({"means": [torch.ones(4)]}, ValueError, "(3,)", "(4,)"),
        ({"means": [VECTOR.half()]}, TypeError, "float32", "float16"),
        ({"variances": [VECTOR.to("meta")]}, ValueError, "cpu", "meta"),
        ({"groups": [3]}, ValueError, "divisor of the 4 outputs", "3"),
        ({"groups": [0]}, ValueError, "at least 1", "0"),
        ({"q2": [0]}, ValueError, "above 0", "0"),
        ({"q2": [float("inf")]}, ValueError, "finite", "inf"),
        ({"eps1": -1.0}, ValueError, "at least 0", "-1"),
        ({"eps2": "1"}, TypeError, "a number", "'1'"),
    ],
    ids=lambda value: "-".join(f"{k}" for k in value) if isinstance(value, dict) else None,
)
@pytest.mark.on_cpu
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], expected: str, got: str) -> None:
    given: dict[str, Any] = {
        "weight_grads": [GRAD.clone()], "bias_grads": [torch.ones(4)], "means": [VECTOR], "variances": [VECTOR],
        "groups": [1], "q2": [1.0],
    }  # fmt: skip
    with pytest.raises(error) as raised:
        nk.ops.precondition(**(given | change))
    assert expected in str(raised.value) and got in str(raised.value)
