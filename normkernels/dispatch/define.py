"""The one torch.library.Library: what ``define`` makes of an op's record.

PyTorch's dispatcher is the only dispatcher. Every op is defined here once, with its eager implementation under
CompositeExplicitAutograd: that is the fallback on every device. The faster backends' implementations are registered
under their device's key and so take precedence there: the compiled ones by the extension, the others by choose.py, over
the compiled ones. ``use_backend`` replaces the registrations of choose.py for the time of a ``with`` block, which costs
nothing outside of it.

An op has two twins of the same schema. In the namespace ``normkernels_next`` it serves the calls that a compiled kernel
leaves to the next backend (fallback.py); in ``normkernels_launches`` the extension records what it would launch for
tensors without memory (compiled.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from normkernels.dispatch import fallback, vmap
from normkernels.dispatch.precision import full_precision
from normkernels.dispatch.record import IMPLEMENTATIONS, OPS, Op
from normkernels.triton import launch

LIBRARY = torch.library.Library("normkernels", "DEF")
NEXT = torch.library.Library("normkernels_next", "DEF")
LAUNCHES = torch.library.Library("normkernels_launches", "DEF")


def define(op: Op) -> Op:
    """Define an op in PyTorch's dispatcher, with all that its record gives, and return the record.

    The public functions apply ``autograd`` themselves (autograd.py): it is cheaper than the registration, and
    forward-mode differentiation raises where the registration would return zeros. The raw op has it registered all the
    same, for exported programs, in which nothing but the raw op is left.
    """
    full_name = f"normkernels::{op.name}"
    exact = full_precision(op.eager)
    LIBRARY.define(op.schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    LIBRARY.impl(op.name, exact, "CompositeExplicitAutograd")
    torch.library.register_fake(full_name, op.fake, lib=LIBRARY)
    if op.autograd is not None:
        backward, setup_context = op.autograd.backward, op.autograd.setup_context
        torch.library.register_autograd(full_name, backward, setup_context=setup_context, lib=LIBRARY)
    if op.channels is not None:
        torch.library.register_vmap(full_name, vmap.rule(op.channels, op.raw), lib=LIBRARY)
        if op.autograd is not None:
            op.autograd.vmap = staticmethod(vmap.rule(op.channels, op.autograd.apply))  # type: ignore[method-assign]
    OPS[op.name], IMPLEMENTATIONS[op.name] = op, {"eager": exact}
    if op.kernels:
        kernels = launch.implementation(op.triton_module, op.name)
        IMPLEMENTATIONS[op.name]["triton"] = fallback.from_triton(op.name, kernels, exact)
    LAUNCHES.define(op.schema)
    NEXT.define(op.schema)
    NEXT.impl(op.name, fallback.from_compiled(op), "CompositeExplicitAutograd")
    return op


def differentiable(op: str) -> Callable[..., Any]:
    """Return an op with its gradient, for gradients that are another op's, whose module imports theirs."""
    autograd = OPS[op].autograd
    assert autograd is not None
    return autograd.apply
