"""Every private name of torch that the package uses, each with the reason why no public one will do.

They were looked up in torch 2.11, the oldest version that the package takes, in 2.13, which it is developed with, and
in 2.14. tests/test_imports.py finds private names anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor as is_batchedtensor  # torch.func tells nobody what it maps over
from torch._compile import _disable_dynamo

Function = TypeVar("Function", bound=Callable[..., Any])

# The bases of all BatchNorms, SyncBatchNorm among them, and of all convolutions have no public names.
BatchNormBase = nn.modules.batchnorm._BatchNorm
ConvolutionBase = nn.modules.conv._ConvNd
TransposedConvolutionBase = nn.modules.conv._ConvTransposeNd

# The operations of torch.optim on lists of tensors are documented, and private all the same.
foreach_sub, foreach_mul, foreach_norm = torch._foreach_sub, torch._foreach_mul, torch._foreach_norm

# A view that an op makes and returns could not be changed in place, unless it is made out of autograd's sight.
below_autograd = torch._C._AutoDispatchBelowADInplaceOrView

# torch.fx records a call of a scripted method by its name.
ScriptMethod = torch._C.ScriptMethod

_TRACERS = [getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL")]


def not_traced(function: Function) -> Function:
    """Return a function that torch.compile calls as it is.

    torch.compiler.disable, which is the same, imports torch._dynamo with the package: more than a second. This one, of
    torch.optim, does so at the first call.
    """
    return _disable_dynamo(function)  # type: ignore[return-value]


def constant(function: Function) -> Function:
    """Mark a function as torch.compiler.assume_constant_result does: Dynamo calls it once and keeps the result.

    The public decorator imports torch._dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_exporting() -> bool:
    """Return whether torch.export traces.

    In torch 2.11 Dynamo takes torch.compiler.is_exporting() for true whenever it compiles.
    """
    return torch.compiler._is_exporting_flag


def in_forward_mode() -> bool:
    """Return whether there is a level of forward-mode differentiation: nobody public tells."""
    return torch.autograd.forward_ad._current_level >= 0


def in_backward() -> bool:
    """Return whether a backward pass runs in this thread, as when activation checkpointing calls a layer again."""
    return torch._C._current_graph_task_id() != -1


def is_transformed() -> bool:
    """Return whether the call is one of torch.func, whose gradients go elsewhere, or of a tracer, which has no data."""
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._get_tracing_state() is not None:
        return True
    return any(torch._C._get_dispatch_mode(key) is not None for key in _TRACERS)


def has_kernel(op: str, key: str) -> bool:
    """Return whether an op ("namespace::name") has a kernel of its own for a dispatch key."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(op, key)


def without_storage(cls: type[Tensor]) -> Any:
    """Return a tensor of a subclass that has no memory."""
    return torch.Tensor._make_wrapper_subclass(cls, (0,))


def functional_collectives() -> Any:
    """Return the collectives that torch.compile keeps inside its graph; torch.distributed.nn's are not traced."""
    from torch.distributed import _functional_collectives  # imported late: torch may be built without distributed

    return _functional_collectives


def process_group_of(name: str) -> Any:
    """Return the process group of a name, which is what a compiled graph holds; c10d has no public look-up."""
    resolve: Any = torch.distributed.distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    return resolve(name)
