"""The one torch.library.Library, and which backend serves an op.

PyTorch's dispatcher is the only dispatcher. Every op is defined here once, with its eager implementation under
CompositeExplicitAutograd: that is the fallback on every device. The faster backends' implementations are registered
under their device's key and so take precedence there: the compiled ones by the extension, the others from here, over
the compiled ones. ``use_backend`` replaces the registrations from here for the time of a ``with`` block, which costs
nothing outside of it.

A compiled kernel leaves a call to the next backend by calling the op's twin in the namespace ``normkernels_next``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from normkernels.dispatch import vmap
from normkernels.dispatch.fallback import falling_back, handed_on
from normkernels.dispatch.precision import full_precision
from normkernels.dispatch.record import _FUNCTIONS, _IMPLEMENTATIONS
from normkernels.triton import launch

LIBRARY = torch.library.Library("normkernels", "DEF")

NEXT = torch.library.Library("normkernels_next", "DEF")


def define(
    schema: str,
    *,
    eager: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: type[torch.autograd.Function] | None = None,
    triton: str | None = None,
) -> None:
    """Define an op by its schema, with the eager implementation, the shape function (fake) and its gradient.

    triton: the module whose function of the op's name is the Triton implementation; it serves CUDA tensors, and
    what it does not support falls back to eager, with one warning for each reason.

    The public functions apply ``autograd`` themselves: it is cheaper than the registration, and forward-mode
    differentiation raises where the registration would return zeros. The raw op has it registered all the same, for
    exported programs, in which nothing but the raw op is left.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    exact = full_precision(eager)
    LIBRARY.impl(name, exact, "CompositeExplicitAutograd")
    torch.library.register_fake(f"normkernels::{name}", fake, lib=LIBRARY)
    if autograd is not None:
        _FUNCTIONS[name] = autograd
        torch.library.register_autograd(
            f"normkernels::{name}", autograd.backward, setup_context=autograd.setup_context, lib=LIBRARY
        )
    vmap.register(name, autograd, LIBRARY)
    _IMPLEMENTATIONS[name] = {"eager": exact}
    kernels = None
    if triton is not None:
        kernels = launch.implementation(triton, name)
        _IMPLEMENTATIONS[name]["triton"] = falling_back(name, kernels, exact)
    NEXT.define(schema)
    NEXT.impl(name, handed_on(name, kernels, exact), "CompositeExplicitAutograd")


def differentiable(op: str) -> Callable[..., Any]:
    """Return an op with its gradient, for gradients that are another op's, whose module imports theirs."""
    return _FUNCTIONS[op].apply


def ops() -> tuple[str, ...]:
    """Return the names of all ops, in order of definition."""
    return tuple(_IMPLEMENTATIONS)
