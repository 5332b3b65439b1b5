"""Input checks shared by ops and layers. Every message says what was expected and what came."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from normkernels._torch import in_forward_mode

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SCALINGS = ("trace", "frobenius")
METHODS = ("newton", "eigh")


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of means, covariances and buffers: float64 for float64 data, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_reverse_mode() -> None:
    """Raise in compiled code under forward-mode differentiation: it would silently drop the tangent of a tensor."""
    if torch.compiler.is_compiling() and in_forward_mode():
        raise NotImplementedError(
            "forward mode AD: expected reverse mode, got torch.compile inside of forward_ad.dual_level()"
        )


def check_tensor(name: str, value: object) -> None:
    """Raise unless ``value`` is a tensor, and in forward-mode differentiation of compiled code."""
    check_reverse_mode()
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def check_data(name: str, x: object) -> None:
    """Raise unless ``x`` is a floating-point (N, C, *) tensor with at least one channel."""
    check_tensor(name, x)
    assert isinstance(x, Tensor)
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"{name}: expected shape (N, C) or (N, C, *), got {tuple(x.shape)}")
    if x.shape[1] == 0:
        raise ValueError(f"{name}: expected at least one channel in dimension 1, got shape {tuple(x.shape)}")


def check_like(name: str, value: object, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], x: Tensor) -> None:
    """Raise unless ``value`` is a tensor of this shape and one of these types, on ``x``'s device."""
    check_tensor(name, value)
    assert isinstance(value, Tensor)
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dict.fromkeys(dtypes))
        raise TypeError(f"{name}: expected {expected} beside {x.dtype} data, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name}: expected a tensor on {x.device} like the input, got one on {value.device}")


def check_affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Raise unless weight and bias are (C,), in the data's own type or the statistics' type (as under autocast)."""
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            check_like(name, value, (x.shape[1],), (x.dtype, statistics_dtype(x.dtype)), x)


def resolve_group_size(channels: int, group_size: int) -> int:
    """Return the number of channels whitened together: min(group_size, C), which must divide C.

    Other implementations silently take a smaller divisor. That changes the model, so it is refused here.
    """
    group_size = check_integer("group_size", group_size, minimum=1)
    if group_size >= channels:
        return channels
    if channels % group_size:
        divisors = [d for d in range(1, channels + 1) if channels % d == 0]
        raise ValueError(
            f"group_size: expected a divisor of the {channels} channels, got {group_size}; "
            f"divisors are {', '.join(map(str, divisors))}"
        )
    return group_size


def check_integer(name: str, value: Any, minimum: int) -> int:
    """Return value as an int (or SymInt): NumPy's integers are accepted, bools and floats are not."""
    if not isinstance(value, int | torch.SymInt) and hasattr(value, "__index__") and not isinstance(value, Tensor):
        value = operator.index(value)
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")
    return value  # type: ignore[return-value]


def check_number(name: str, value: object, minimum: float = 0.0, maximum: float = float("inf")) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not minimum <= value <= maximum or value == float("inf"):  # the first comparison is false for NaN too
        bounds = f"at least {minimum:g}" if maximum == float("inf") else f"within [{minimum:g}, {maximum:g}]"
        raise ValueError(f"{name}: expected a finite number {bounds}, got {value}")


def check_flag(name: str, value: object) -> None:
    """Raise unless a value is True or False, also as 1 or 0 or NumPy's: "no" would be true by accident."""
    if isinstance(value, Tensor | str) or value not in (True, False):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_inverse_sqrt_options(num_iterations: int, eps: float, scaling: str, method: str) -> tuple[bool, bool]:
    """Return the options as the raw ops take them, which have no strings: whether scaling is Frobenius, method eigh."""
    check_integer("num_iterations", num_iterations, minimum=0)
    check_number("eps", eps)
    check_choice("scaling", scaling, SCALINGS)
    check_choice("method", method, METHODS)
    return scaling == "frobenius", method == "eigh"
