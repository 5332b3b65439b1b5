"""The CUDA kernels name what they refuse, and hand on the rest to another backend, with one warning for a reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import normkernels as nk
from normkernels import _warnings
from tests.ops.cuda_calls import ANYWHERE, SERVED, SIMT, equal, filtered, given, raw, step
from tests.ops.test_spectral_kernels import values
from tests.oracles import inputs
from tests.oracles.run import incoming_gradient, leaf, moved
from tests.tolerances import assert_agree

pytestmark = pytest.mark.usefixtures("backend")

# --- bad input ------------------------------------------------------------------------------------------------------

Change = Callable[[Any], Any]


def half(t: Tensor) -> Tensor:
    return t.half()


def shorter(t: Tensor) -> Tensor:
    return t[:-1]


def of_other_width(t: Tensor) -> Tensor:
    return t[:, :4]


def one_group(t: Tensor) -> Tensor:
    return t[:1]


def flat(t: Tensor) -> Tensor:
    return t.flatten()


def oblong(t: Tensor) -> Tensor:
    return t[:, :3]


GROUPS = "expected a group size that divides the 8 channels, got"
SQUARE = ": expected shape (G, d, d), got"

# Op, number of the argument, the change or the value, what the error says after the op's name. x is (6, 8, 5, 3).
BAD: list[tuple[str, int, Change | object, str]] = [
    ("moments", 0, flat, "x: expected shape (N, C) or (N, C, *), got (720)"),
    ("moments", 1, 3, f"{GROUPS} 3"),
    ("moments", 1, 0, f"{GROUPS} 0"),
    ("moments", 1, -4, f"{GROUPS} -4"),
    ("cross_moments", 0, shorter, "y: expected shape (6, 8, 5, 3), got (5, 8, 5, 3)"),
    ("cross_moments", 0, half, "y: expected float32, got float16"),
    ("cross_moments", 1, flat, "x: expected shape (N, C) or (N, C, *), got (720)"),
    ("cross_moments", 2, shorter, "mean: expected shape (8), got (7)"),
    ("cross_moments", 2, half, "mean: expected float32, got float16"),
    ("cross_moments", 3, 5, f"{GROUPS} 5"),
    ("inverse_sqrt", 0, flat, f"cov{SQUARE} (32)"),
    ("inverse_sqrt", 0, oblong, f"cov{SQUARE} (2, 3, 4)"),
    ("inverse_sqrt_backward", 0, oblong, f"grad{SQUARE} (2, 3, 4)"),
    ("inverse_sqrt_backward", 1, one_group, "W: expected shape (2, 4, 4), got (1, 4, 4)"),
    ("inverse_sqrt_backward", 1, half, "W: expected float32, got float16"),
    ("inverse_sqrt_backward", 2, oblong, "saved_matrix: expected shape (2, 4, 4), got (2, 3, 4)"),
    ("inverse_sqrt_backward", 3, one_group, "saved_scale: expected shape (2, 1), got (1, 1)"),
    ("whiten", 0, flat, "x: expected shape (N, C) or (N, C, *), got (720)"),
    ("whiten", 1, shorter, "mean: expected shape (8), got (7)"),
    ("whiten", 1, half, "mean: expected float32, got float16"),
    ("whiten", 2, flat, f"W{SQUARE} (32)"),
    ("whiten", 2, oblong, f"W{SQUARE} (2, 3, 4)"),
    ("whiten", 2, one_group, "W: expected shape (2, 4, 4), got (1, 4, 4)"),
    ("whiten", 2, lambda w: w[:, :3, :3], f"{GROUPS} 3"),
    ("whiten", 2, lambda w: w[:, :0, :0], f"{GROUPS} 0"),
    ("whiten", 2, half, "W: expected float32, got float16"),
    ("whiten", 3, shorter, "weight: expected shape (8), got (7)"),
    ("whiten", 3, half, "weight: expected float32, got float16"),
    ("whiten", 4, lambda b: b.view(1, 8, 1, 1), "bias: expected shape (8), got (1, 8, 1, 1)"),
    ("whiten", 4, lambda b: b.long(), "bias: expected float32, got Long"),
    ("stacked_mix", 0, of_other_width, "grad: expected shape (6, 8, 5, 3), got (6, 4, 5, 3)"),
    ("stacked_mix", 0, half, "grad: expected float32, got float16"),
    ("stacked_mix", 1, flat, "x: expected shape (N, C) or (N, C, *), got (720)"),
    ("stacked_mix", 2, shorter, "grad_mean: expected shape (8), got (7)"),
    ("stacked_mix", 3, half, "mean: expected float32, got float16"),
    ("stacked_mix", 4, lambda m: m[..., :4], "matrix: expected shape (G, d, 2 d), got (2, 4, 4)"),
    ("stacked_mix", 4, one_group, "matrix: expected shape (2, 4, 8), got (1, 4, 8)"),
    ("stacked_mix", 4, half, "matrix: expected float32, got float16"),
    ("stacked_mix", 5, shorter, "constant: expected shape (8), got (7)"),
    ("iter_norm", 0, flat, "x: expected shape (N, C) or (N, C, *), got (720)"),
    ("iter_norm", 1, shorter, "weight: expected shape (8), got (7)"),
    ("iter_norm", 4, lambda _: -1, "num_iterations: expected at least 0, got -1"),
    ("iter_norm", 1, half, "weight: expected float32, got float16"),
    ("iter_norm", 2, shorter, "bias: expected shape (8), got (7)"),
    ("iter_norm", 2, lambda b: b.double(), "bias: expected float32, got float64"),
    ("iter_norm", 3, 3, f"{GROUPS} 3"),
    ("iter_norm_backward", 0, of_other_width, "grad: expected shape (6, 8, 5, 3), got (6, 4, 5, 3)"),
    ("iter_norm_backward", 0, half, "grad: expected float32, got float16"),
    ("iter_norm_backward", 1, flat, "x: expected shape (N, C) or (N, C, *), got (720)"),
    ("iter_norm_backward", 2, shorter, "weight: expected shape (8), got (7)"),
    ("iter_norm_backward", 2, half, "weight: expected float32, got float16"),
    ("iter_norm_backward", 3, shorter, "mean: expected shape (8), got (7)"),
    ("iter_norm_backward", 4, oblong, f"W{SQUARE} (2, 3, 4)"),
    ("iter_norm_backward", 4, one_group, "W: expected shape (2, 4, 4), got (1, 4, 4)"),
    ("iter_norm_backward", 5, oblong, "saved_matrix: expected shape (2, 4, 4), got (2, 3, 4)"),
    ("iter_norm_backward", 6, one_group, "saved_scale: expected shape (2, 1), got (1, 1)"),
    ("pop_norm", 0, flat, "x: expected shape (N, C) or (N, C, *), got (720)"),
    ("pop_norm", 1, shorter, "weight: expected shape (8), got (7)"),
    ("pop_norm", 1, half, "weight: expected float32, got float16"),
    ("pop_norm", 2, shorter, "bias: expected shape (8), got (7)"),
    ("pop_norm_backward", 0, of_other_width, "grad: expected shape (6, 8, 5, 3), got (6, 4, 5, 3)"),
    ("pop_norm_backward", 0, half, "grad: expected float32, got float16"),
    ("pop_norm_backward", 1, flat, "x: expected shape (N, C) or (N, C, *), got (720)"),
    ("pop_norm_backward", 2, shorter, "weight: expected shape (8), got (7)"),
    ("pop_norm_backward", 3, half, "bias: expected float32, got float16"),
    ("pop_norm_backward", 4, shorter, "mean: expected shape (8), got (7)"),
    ("pop_norm_backward", 5, half, "var: expected float32, got float16"),
    ("precondition", 0, [], "weight_grads: expected at least one layer, got none"),
    ("precondition", 0, lambda w: [w[0], w[1].flatten()],
     "weight_grads: expected non-empty shapes (O, I / groups, *k), got (15)"),
    ("precondition", 0, lambda w: [w[0], w[1][:0]],
     "weight_grads: expected non-empty shapes (O, I / groups, *k), got (0, 5)"),
    ("precondition", 0, lambda w: [w[0], w[1].half()], "weight_grads: expected float32, got float16"),
    ("precondition", 1, lambda b: b[:1], "bias_grads: expected one for each of the 2 layers, got 1"),
    ("precondition", 1, lambda b: [b[0][:5], b[1]], "bias_grads: expected shape (6), got (5)"),
    ("precondition", 1, lambda b: [b[0].half(), b[1]], "bias_grads: expected float32, got float16"),
    ("precondition", 2, lambda m: m[1:], "means: expected one for each of the 2 layers, got 1"),
    ("precondition", 2, lambda m: [m[0][:4], m[1]], "means: expected shape (8), got (4)"),
    ("precondition", 3, lambda v: [v[0].half(), v[1]], "variances: expected float32, got float16"),
    ("precondition", 3, lambda v: v[:1], "variances: expected one for each of the 2 layers, got 1"),
    ("precondition", 4, [4, 1], "groups: expected a divisor of the 6 outputs, got 4"),
    ("precondition", 4, [0, 1], "groups: expected a divisor of the 6 outputs, got 0"),
    ("precondition", 4, [2], "groups: expected one for each of the 2 layers, got 1"),
    ("precondition", 5, [1.0, 0.0], "q2: expected a number above 0, got 0"),
    ("precondition", 5, [], "q2: expected one for each of the 2 layers, got 0"),
    ("spectral_filter", 0, lambda z: z[0], "z: expected shape (N, C, h, w), got (8, 5, 3)"),
    ("spectral_filter", 1, flat, "v: expected shape (C, H, W), got (120)"),
    ("spectral_filter", 1, shorter, "v: expected shape (8, 5, 3), got (7, 5, 3)"),
    ("spectral_filter", 1, half, "v: expected float32, got float16"),
    ("spectral_filter", 2, [0, 1, 0], "source: expected 4 numbers, got 3"),
    ("spectral_filter", 2, [1, 1, 0, 1], "source: expected start, step and count within 0:5, got 1, 1, 5"),
    ("spectral_filter", 2, [0, 1, 0, 2], "source: expected start, step and count within 0:3, got 0, 2, 3"),
    ("spectral_filter", 2, [0, 0, 0, 1], "source: expected start, step and count within 0:5, got 0, 0, 5"),
    ("spectral_filter", 3, [0, 1, 5, 0, 1], "target: expected 6 numbers, got 5"),
    ("spectral_filter", 3, [-1, 1, 5, 0, 1, 3], "target: expected start, step and count within 0:5, got -1, 1, 5"),
    ("spectral_filter", 3, [0, 1, 6, 0, 1, 3], "target: expected start, step and count within 0:5, got 0, 1, 6"),
    ("spectral_filter", 3, [0, 1, 5, 0, 2, 3], "target: expected start, step and count within 0:3, got 0, 2, 3"),
    ("spectral_filter", 3, [0, 1, 5, 0, 1, -1], "target: expected start, step and count within 0:3, got 0, 1, -1"),
    ("spectral_filter", 3, [2**32, 1, 1, 0, 1, 1], "target: expected start, step and count within 0:5, got 2147483647"),
]  # fmt: skip


@SIMT
def test_every_op_has_bad_input() -> None:
    assert {op for op, *_ in BAD} == set(SERVED)


@ANYWHERE
@pytest.mark.parametrize(("op", "at", "bad", "message"), BAD)
def test_bad_input_is_named(op: str, at: int, bad: Change | object, message: str) -> None:
    """The raw op names it, whoever calls it. So the op is this backend's: eager has no such checks."""
    values = given(op)
    assert raw(op)(*values) is not None
    values[at] = bad(values[at]) if callable(bad) else bad
    with pytest.raises(RuntimeError) as raised:
        raw(op)(*values)
    assert f"{op}: {message}" in str(raised.value)


# --- what is left to another backend --------------------------------------------------------------------------------


@pytest.fixture
def unwarned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_warnings, "warned", set())


def pop_step(x: Tensor) -> list[Tensor]:
    given = leaf(x)
    y, mean, var = nk.ops.pop_norm(given)  # type: ignore[arg-type]
    return [y.detach(), mean, var, *torch.autograd.grad(y, given, incoming_gradient(y.detach()))]  # type: ignore[arg-type]


def conditioned(dtype: torch.dtype) -> list[Tensor]:
    """Return what is changed in place, and the rows that are left."""
    arguments = given("precondition", dtype)
    left = raw("precondition")(*arguments)
    return [*arguments[0], *arguments[1], left]


# The call, its ops that another backend serves, and the reason.
HANDED_ON: dict[str, tuple[Callable[[], list[Tensor]], list[str], str]] = {
    "float64": (lambda: step(inputs.gaussian((150, 8)), 8), ["iter_norm", "iter_norm_backward"],
                "expected float32 or a half type, got float64"),
    "wide-group": (lambda: step(inputs.gaussian((150, 136), group_size=136, dtype=torch.float32), 136),
                   ["iter_norm", "iter_norm_backward"], "expected groups of at most 128 channels, got 136"),
    "float64-pop-norm": (lambda: pop_step(inputs.gaussian((15, 8))), ["pop_norm", "pop_norm_backward"],
                         "expected float32 or a half type, got float64"),
    "float64-layers": (lambda: conditioned(torch.float64), ["precondition"],
                       "expected float32 or a half type, got float64"),
    "high-plane": (lambda: filtered((2, 3, 65, 7)), ["spectral_filter"],
                   "expected planes of at most 64 x 64, got 65 x 7"),
    "wide-plane": (lambda: filtered((2, 3, 7, 65)), ["spectral_filter"],
                   "expected planes of at most 64 x 64, got 7 x 65"),
}  # fmt: skip


@ANYWHERE
@pytest.mark.usefixtures("unwarned")
@pytest.mark.parametrize("case", HANDED_ON)
def test_what_it_does_not_serve_is_handed_on_with_one_warning(case: str) -> None:
    call, ops, reason = HANDED_ON[case]
    with nk.use_backend("eager"):
        expected = call()
    with pytest.warns(UserWarning) as caught:
        got = call()
    message = f"plain PyTorch instead of the CUDA kernels: {reason}"
    assert [str(warning.message) for warning in caught] == [f"{op}: {message}" for op in ops]
    assert equal(got, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()


# Another algorithm was asked for, or nothing is there to do: neither is worth a warning.
SILENT: dict[str, Callable[[], list[Tensor]]] = {
    "eigh": lambda: step(inputs.gaussian((150, 8), dtype=torch.float32), 8, method="eigh", eps=1e-3),
    "empty-batch": lambda: step(torch.empty(0, 8, 5, 3), 4),
    "empty-batch-float64": lambda: step(torch.empty(0, 8, 5, 3, dtype=torch.float64), 4),
    "empty-batch-pop-norm": lambda: pop_step(torch.empty(0, 8, 5, 3)),
    "empty-plane": lambda: filtered((0, 3, 9, 7)),
    "empty-window": lambda: [nk.ops.spectral_filter(*(moved(values(s)) for s in ((2, 3, 9, 7), (3, 9, 7))),
                                                    (slice(2, 2), slice(0, 7)))],
}  # fmt: skip


@ANYWHERE
@pytest.mark.usefixtures("unwarned")
@pytest.mark.parametrize("case", SILENT)
def test_what_is_not_for_it_is_handed_on_without_a_warning(case: str) -> None:
    with nk.use_backend("eager"):
        expected = SILENT[case]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_agree(SILENT[case](), expected)
