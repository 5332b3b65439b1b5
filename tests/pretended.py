"""A device without float64, pretended: its tensors hold tensors of the CPU, and it refuses what Apple's GPUs refuse.

Under ``pretended()`` the device "mps" exists. The mode sees every operator, those inside of this package's ops, too, of
which it runs the plain PyTorch. So an operator raises that makes float64 or complex128 there, that takes tensors of two
devices, or that Metal lacks; the CPU beside it stays a device of its own, where float64 is allowed. Values are right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from normkernels.dispatch import record

DEVICE = torch.device("mps", 0)
LACKING = (torch.float64, torch.complex128)
UNSUPPORTED = ("_linalg_eigh", "_linalg_svd", "linalg_qr", "frexp")
# Operators that take tensors of other devices: copies, and indices, which are moved.
CROSSING = ("_to_copy", "copy_", "index", "index_put_", "_index_put_impl_")


class PretendedTensor(Tensor):
    """A tensor on ``DEVICE``. For C++ it is on the device meta, as torch's fake tensors are."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> PretendedTensor:
        result = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device="meta", requires_grad=False,
        )  # fmt: skip
        result.held = held
        return result

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PretendedTensor({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: expected a call under pretended(), got one outside")


def _literal(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
    """Make a tensor as torch.tensor does, which moves its result to a device where no mode sees it."""
    made = _tensor(*args, device="cpu", **kwargs)
    return made if device is None else made.to(device)


_tensor = torch.tensor


class _Device(TorchDispatchMode):
    """Runs on the CPU what is for ``DEVICE``, where that would run it."""

    def __init__(self, unsupported: Sequence[str]) -> None:
        super().__init__()
        self.unsupported = unsupported

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "normkernels":
            with self:
                return record.IMPLEMENTATIONS[func._schema.name.partition("::")[2]]["eager"](*args, **kwargs)
        with self:  # where autograd is done, an operator made of others comes whole
            if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                return result
        name, given = func._schema.name.partition("::")[2], tree_flatten((args, kwargs))[0]
        theirs = [t for t in given if isinstance(t, PretendedTensor)]
        others = [t for t in given if isinstance(t, Tensor) and not isinstance(t, PretendedTensor) and t.dim()]
        here = bool(theirs)
        if (device := kwargs.get("device")) is not None:
            here = torch.device(device).type in (DEVICE.type, "meta")
            kwargs["device"] = "cpu"
        if theirs and others and name not in CROSSING:
            raise RuntimeError(f"{func}: expected all tensors on one device, got {DEVICE} and {others[0].device}")
        if here and name in self.unsupported:
            raise NotImplementedError(f"{func}: not implemented for {DEVICE}")
        if here and kwargs.get("dtype") in LACKING:
            raise TypeError(f"{func}: {DEVICE} has no {kwargs['dtype']}")
        if name == "copy_":
            here = isinstance(args[0], PretendedTensor)
        wrappers = {id(t.held): t for t in theirs}
        held_args, held_kwargs = tree_map(lambda t: t.held if isinstance(t, PretendedTensor) else t, (args, kwargs))
        result = func(*held_args, **held_kwargs)

        def wrap(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            if id(t) in wrappers and name != "_to_copy":  # changed in place
                return wrappers[id(t)]
            if not here:
                return t
            if t.dtype in LACKING:
                raise TypeError(f"{func}: {DEVICE} has no {t.dtype}")
            return PretendedTensor(t)

        return tree_map(wrap, result)


@contextlib.contextmanager
def pretended(*unsupported: str) -> Iterator[None]:
    """Make ``DEVICE`` exist, which lacks these operators, too."""
    try:
        with mock.patch.object(torch, "tensor", _literal), _Device((*UNSUPPORTED, *unsupported)):
            yield
    finally:
        _device_constructors.cache_clear()  # which may have kept _literal for torch.tensor
