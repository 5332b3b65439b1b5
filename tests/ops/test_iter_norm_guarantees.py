"""Promises of iter_norm besides its values: bad batches, derivatives of every kind, memory, layout, errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import normkernels as nk
from tests.oracles import inputs, iternorm
from tests.oracles.run import back, incoming_gradient, leaf, moved
from tests.tolerances import assert_agree
from tests.tolerances.whitening import SAVED_FOR_BACKWARD, largest_stretch

# The kernels leave float64 and the second derivatives' small products to plain PyTorch, and say so once.
pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.filterwarnings("ignore:.*plain PyTorch instead of the Triton kernels"),
]

OPTIONS = {
    "newton-trace": {"num_iterations": 5, "scaling": "trace"},
    "newton-frobenius": {"num_iterations": 3, "scaling": "frobenius"},
    "eigh": {"method": "eigh", "eps": 1e-3},
}
METHODS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
NEWTON = pytest.mark.parametrize("options", list(OPTIONS.values())[:2], ids=list(OPTIONS)[:2])


def everything(x: Tensor, options: dict[str, object], group_size: int = 8) -> tuple[Tensor, ...]:
    """Return y, mean, W, dx, dweight, dbias of one forward and backward."""
    leaves = [leaf(x), *(leaf(torch.linspace(-1, 2, x.shape[1])) for _ in range(2))]
    y, mean, w = nk.ops.iter_norm(leaves[0], group_size, weight=leaves[1], bias=leaves[2], **options)  # type: ignore[arg-type]
    grads = torch.autograd.grad(y, leaves, moved(incoming_gradient(back(y))))  # type: ignore[arg-type]
    return tuple(map(back, (y, mean, w, *grads)))  # type: ignore[arg-type]


# Bad batches.


@METHODS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_value_ruins_its_group_and_nothing_else(bad: float, options: dict[str, object]) -> None:
    """Nothing raises, not even eigh; the group is NaN throughout, as with BatchNorm; the other has the same bits."""
    x = inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32, group_size=4)
    expected = everything(x, options, 4)
    x[2, 1, 0, 0] = bad
    y, mean, w, dx, dweight, dbias = everything(x, options, 4)
    assert y[:, :4].isnan().all() and dx[:, :4].isnan().all() and w[0].isnan().all()
    assert not mean[1].isfinite() and mean[[0, 2, 3]].isfinite().all()
    for got, ref in ((y, expected[0]), (dx, expected[3])):
        assert torch.equal(got[:, 4:], ref[:, 4:])
    for got, ref in ((mean, expected[1]), (dweight, expected[4]), (dbias, expected[5])):
        assert torch.equal(got[4:], ref[4:])
    assert torch.equal(w[1], expected[2][1])


@METHODS
@pytest.mark.on_cpu
def test_overflow_of_the_covariance_is_nan_and_raises_nothing(options: dict[str, object]) -> None:
    """The values are finite, but their squares are not finite in float32."""
    y, _, w = nk.ops.iter_norm(inputs.gaussian((9, 8), dtype=torch.float32, scale=1e25), 8, **options)  # type: ignore[arg-type]
    assert not w.isfinite().any() and not y.isfinite().any()


@METHODS
@pytest.mark.parametrize("shape", [(0, 8), (0, 8, 3), (0, 8, 4, 3), (4, 8, 0, 3)], ids=str)
def test_empty_batch(shape: tuple[int, ...], options: dict[str, object]) -> None:
    y, mean, w, dx, dweight, dbias = everything(torch.empty(shape), options)
    assert y.shape == dx.shape == shape
    for zero in (mean, dweight, dbias):
        assert torch.equal(zero, torch.zeros(8))
    assert w.isfinite().all()


@METHODS
def test_one_sample_gives_the_bias(options: dict[str, object]) -> None:
    """m = 1: nothing is left after centering.

    Layers refuse it in training; the op is defined.
    """
    x = inputs.gaussian((1, 8), dtype=torch.float32)
    y, mean, w, dx, _, _ = everything(x, options)
    assert torch.equal(y[0], torch.linspace(-1, 2, 8)) and torch.equal(mean, x[0])
    assert w.isfinite().all() and not dx.any()


@METHODS
@pytest.mark.parametrize("value", [0.0, 1.5])
def test_constant_batch_without_eps(value: float, options: dict[str, object]) -> None:
    """A covariance of zero has no inverse square root; the output is still the bias, and nothing is NaN."""
    result = everything(torch.full((9, 8), value), options | {"eps": 0.0})
    assert torch.equal(result[0], torch.linspace(-1, 2, 8).expand(9, 8))
    assert all(t.isfinite().all() for t in result)


@METHODS
@pytest.mark.parametrize("eps", [0.0, 1e-9], ids="eps{:g}".format)
def test_eigenvalues_that_rounding_made_negative(eps: float, options: dict[str, object]) -> None:
    """With fewer samples than channels at variances of 1e8, zero eigenvalues are anything within +-10 in float32.

    No digit of those directions is left, but nothing is NaN, and no direction is stretched by more than eps allows.
    """
    for seed in range(8):
        x = inputs.gaussian((5, 16), dtype=torch.float32, group_size=16, scale=1e4, seed=seed)
        result = everything(x, options | {"eps": eps}, 16)
        assert all(t.isfinite().all() for t in result)
        assert eps == 0.0 or torch.linalg.matrix_norm(result[2].double(), 2) <= largest_stretch(eps, torch.float32, 16)


# Derivatives.


@METHODS
@pytest.mark.parametrize("layout", ["NC", "NHWC", "NCHW-cropped"])
def test_gradcheck(layout: str, options: dict[str, object]) -> None:
    x = inputs.LAYOUTS[layout][1](inputs.gaussian((9, 4) if layout == "NC" else (2, 4, 2, 2), group_size=4))
    weight, bias = torch.randn(2, 4, dtype=torch.float64).unbind()
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    assert gradcheck(lambda x, w, b: nk.ops.iter_norm(x, 2, weight=w, bias=b, **options)[0], leaves)


@NEWTON
def test_gradgradcheck(options: dict[str, object]) -> None:
    leaves = [t.requires_grad_() for t in (inputs.gaussian((5, 4), group_size=4), *torch.randn(2, 4).double().unbind())]
    assert gradgradcheck(lambda x, w, b: nk.ops.iter_norm(x, 2, weight=w, bias=b, **options)[0], leaves)


@NEWTON
@pytest.mark.parametrize("asked", ["x", "weight"])
def test_gradient_penalty(asked: str, options: dict[str, object]) -> None:
    """The gradient of a squared gradient norm, the use of double backward, agrees with the oracle's."""

    def penalty(path: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        leaves = {"x": inputs.gaussian((7, 4, 3), group_size=4), "weight": torch.linspace(1, 2, 4, dtype=torch.float64)}
        for value in leaves.values():
            value.requires_grad_()
        y = path(leaves["x"], 4, eps=1e-5, weight=leaves["weight"], **options)[0]
        (grad,) = torch.autograd.grad(y.sin().sum(), leaves[asked], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), list(leaves.values()))

    ours, reference = penalty(nk.ops.iter_norm), penalty(iternorm.iter_norm)
    assert_agree(ours, reference)


def test_double_backward_of_eigh_is_refused() -> None:
    x = inputs.gaussian((9, 4)).requires_grad_()
    y = nk.ops.iter_norm(x, 4, method="eigh")[0]
    with pytest.raises(NotImplementedError, match=r"eigh.*create_graph"):
        torch.autograd.grad(y.sin().sum(), x, create_graph=True)


@METHODS
@pytest.mark.on_cpu
def test_repeated_backward(options: dict[str, object]) -> None:
    """Backward changes nothing that it needs: the second gradient has the same bits, and accumulates."""
    x = inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32).requires_grad_()
    y = nk.ops.iter_norm(x, 8, **options)[0]  # type: ignore[arg-type]
    dy = incoming_gradient(y.detach())
    kept = x.detach().clone(), dy.clone(), y.detach().clone()
    first, second = (torch.autograd.grad(y, x, dy, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, dy, y), strict=True))


@METHODS
@pytest.mark.on_cpu
def test_backward_sees_changed_inputs(options: dict[str, object]) -> None:
    """x is saved, not copied: writing to it between forward and backward is an error, not a wrong gradient."""
    leaf = inputs.gaussian(inputs.SHAPE_4D).requires_grad_()
    x = leaf * 1
    y = nk.ops.iter_norm(x, 8, **options)[0]  # type: ignore[arg-type]
    x.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "moments": lambda x: nk.ops.moments(x, 4)[2],
    "inverse_sqrt": lambda x: nk.ops.inverse_sqrt(x.view(1, 4, 4).square()),
    "whiten": lambda x: nk.ops.whiten(x, torch.zeros(4), torch.eye(4)[None]),
    "iter_norm": lambda x: nk.ops.iter_norm(x, 4)[0],
}


# torch.func.jvp loads torch's own decompositions, which use a deprecated function of torch.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("op", OPS)
def test_forward_mode_is_refused(op: str) -> None:
    """It is refused because a tangent of zero would be silently wrong."""
    x = torch.randn(4, 4)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)jvp|forward"):
        torch.func.jvp(OPS[op], (x,), (torch.ones_like(x),))


# Memory.


@METHODS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.on_cpu
@pytest.mark.large
def test_saved_for_backward(memory_format: torch.memory_format, dtype: torch.dtype, options: dict[str, object]) -> None:
    """That is at most 1.1 times the input, x itself included: no centered copy, no float32 copy of half types."""
    x = torch.randn(64, 64, 32, 32).to(dtype, memory_format=memory_format).requires_grad_()
    weight, bias = torch.ones(64, requires_grad=True), torch.zeros(64, requires_grad=True)
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        nk.ops.iter_norm(x, 64, weight=weight, bias=bias, **options)  # type: ignore[arg-type]
    assert x.untyped_storage().data_ptr() in storages
    assert sum(storages.values()) <= SAVED_FOR_BACKWARD * x.numel() * x.element_size()


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NLC", "NDHWC"])
@pytest.mark.on_cpu
def test_layout_is_kept(layout: str) -> None:
    """y, and the gradient of x, have x's strides, whatever those of dy are."""
    shape, lay_out = inputs.LAYOUTS[layout]
    x = lay_out(inputs.gaussian(shape)).requires_grad_()
    y = nk.ops.iter_norm(x, 8)[0]
    for dy in (torch.ones_like(y), torch.ones(shape, dtype=y.dtype), torch.ones((), dtype=y.dtype).expand(shape)):
        (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        assert y.stride() == dx.stride() == x.stride()


# Errors. The message says what was expected and what came.

X, VECTOR = torch.randn(4, 6), torch.ones(6)


@pytest.mark.parametrize(
    ("change", "error", "expected", "got"),
    [
        ({"x": [1.0]}, TypeError, "torch.Tensor", "list"),
        ({"x": X.long()}, TypeError, "float32", "int64"),
        ({"x": X.cfloat()}, TypeError, "float32", "complex64"),
        ({"x": X[0]}, ValueError, "(N, C", "(6,)"),
        ({"x": X[:, :0]}, ValueError, "at least one channel", "(4, 0)"),
        ({"group_size": 4}, ValueError, "1, 2, 3, 6", "4"),
        ({"group_size": 0}, ValueError, "at least 1", "0"),
        ({"group_size": 2.0}, TypeError, "int", "2.0"),
        ({"num_iterations": -1}, ValueError, "at least 0", "-1"),
        ({"num_iterations": 5.0}, TypeError, "int", "5.0"),
        ({"eps": -1.0}, ValueError, "at least 0", "-1"),
        ({"eps": float("nan")}, ValueError, "at least 0", "nan"),
        ({"weight": VECTOR[:5]}, ValueError, "(6,)", "(5,)"),
        ({"weight": VECTOR.view(1, 6, 1, 1)}, ValueError, "(6,)", "(1, 6, 1, 1)"),
        ({"weight": VECTOR.double()}, TypeError, "float32", "float64"),
        ({"weight": VECTOR.to("meta")}, ValueError, "cpu", "meta"),
        ({"bias": VECTOR[:5]}, ValueError, "(6,)", "(5,)"),
        ({"bias": VECTOR.half()}, TypeError, "float32", "float16"),
        ({"scaling": "norm"}, ValueError, "trace, frobenius", "'norm'"),
        ({"method": "svd"}, ValueError, "newton, eigh", "'svd'"),
    ],
    ids=lambda value: "-".join(f"{k}" for k in value) if isinstance(value, dict) else None,
)
def test_wrong_arguments(change: dict[str, object], error: type[Exception], expected: str, got: str) -> None:
    arguments = {"x": X, "group_size": 3, "weight": VECTOR, "bias": VECTOR} | change
    with pytest.raises(error) as raised:
        nk.ops.iter_norm(**arguments)  # type: ignore[arg-type]
    assert expected in str(raised.value) and got in str(raised.value) and next(iter(change)) in str(raised.value)
