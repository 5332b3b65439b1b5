"""Input checks that several measures share, beside those of the ops."""

from __future__ import annotations

from torch import Tensor, nn

from normkernels._checks import DTYPES, check_tensor


def check_module(name: str, value: object) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}: expected an nn.Module, got {type(value).__name__}")


def check_callable(name: str, value: object) -> None:
    if not callable(value):
        raise TypeError(f"{name}: expected a function or a module, got {type(value).__name__}")


def check_floating(name: str, value: object) -> None:
    check_tensor(name, value)
    assert isinstance(value, Tensor)
    if value.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {value.dtype}")


def check_finite(name: str, value: Tensor) -> None:
    if not value.isfinite().all():
        raise ValueError(f"{name}: expected finite values, got {int((~value.isfinite()).sum())} that are not")


def check_loss(name: str, loss: object) -> None:
    """Raise unless the loss is a scalar with a graph."""
    check_tensor(name, loss)
    assert isinstance(loss, Tensor)
    if loss.dim():
        raise ValueError(f"{name}: expected a scalar, got shape {tuple(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError(f"{name}: expected a scalar that requires a gradient, got one without a graph")
