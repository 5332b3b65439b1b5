"""The one torch.library.Library, and which backend serves an op.

PyTorch's dispatcher is the only dispatcher. Every op is defined here once, with its eager implementation under
CompositeExplicitAutograd: that is the fallback on every device. The faster backends' implementations are registered
under their device's key and so take precedence there: the compiled ones by the extension, the others from here, over
the compiled ones. ``use_backend`` replaces the registrations from here for the time of a ``with`` block, which costs
nothing outside of it.

A compiled kernel leaves a call to the next backend by calling the op's twin in the namespace ``normkernels_next``,
which takes the reason as a last argument.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normkernels.ops import _cuda, _triton, _vmap
from normkernels.ops._checks import check_integer, resolve_group_size
from normkernels.ops._triton import Unsupported
from normkernels.ops._warnings import warn_once

LIBRARY = torch.library.Library("normkernels", "DEF")
NEXT = torch.library.Library("normkernels_next", "DEF")
BACKENDS = ("cuda", "triton", "eager")
KEYS = ("CPU", "CUDA")

# Op -> backends, fastest first, as `make gpu-check` measures it; "default" is for ops without an entry.
# The file that NORMKERNELS_BACKEND_ORDER names is laid over it.
ORDER: dict[str, tuple[str, ...]] = {"default": BACKENDS}

# Op -> backend -> implementation. The implementations of "cuda" are registered by the extension and not here.
_IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {}
_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}  # op -> its gradient
_compiled: set[tuple[str, str]] = set()  # (op, dispatch key) of the kernels that the extension has registered
_chosen = "auto"
_overrides: torch.library.Library | None = None


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
    _vmap.register(name, autograd, LIBRARY)
    _IMPLEMENTATIONS[name] = {"eager": exact}
    kernels = None
    if triton is not None:
        kernels = _triton.implementation(triton, name)
        _IMPLEMENTATIONS[name]["triton"] = falling_back(name, kernels, exact)
    parameters, _, results = schema.partition(") ->")
    NEXT.define(f"{parameters}, str reason) ->{results}".replace("str ", "int[] "))
    texts = [i for i, one in enumerate(parameters.split(", ")) if "str " in one]
    NEXT.impl(name, reporting(handed_on(name, kernels, exact, texts)), "CompositeExplicitAutograd")


def differentiable(op: str) -> Callable[..., Any]:
    """Return an op with its gradient, for gradients that are another op's, whose module imports theirs."""
    return _FUNCTIONS[op].apply


def ops() -> tuple[str, ...]:
    """Return the names of all ops, in order of definition."""
    return tuple(_IMPLEMENTATIONS)


def falling_back(op: str, kernels: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls ``kernels``, or ``eager`` where they raise Unsupported."""

    def call(*args: Any) -> Any:
        try:
            return kernels(*args)
        except Unsupported as reason:
            warn_once(f"{op}: plain PyTorch instead of the Triton kernels: {reason}")
        return eager(*args)

    return call


def handed_on(
    op: str, kernels: Callable[..., Any] | None, eager: Callable[..., Any], texts: Sequence[int] = ()
) -> Callable[..., Any]:
    """Return a function that serves a call which a compiled kernel leaves to the next backend.

    Its last argument is the reason. Triton's ``kernels`` serve the call where they can, else ``eager``. One warning
    tells that, unless the reason is empty. The reason, and the arguments number ``texts``, come as UTF-8: LibTorch
    would leak strings (csrc/tensors.h).
    """

    def call(*args: Any) -> Any:
        *arguments, reason = args
        reason = bytes(reason).decode()
        for i in texts:
            arguments[i] = bytes(arguments[i]).decode()
        server, refusal, result = "plain PyTorch", "", None
        on_gpu = device_of(args).type == "cuda"
        if kernels is not None and on_gpu and _triton.installed() and "triton" in _next_backends(op):
            try:
                server, result = "Triton", kernels(*arguments)
            except Unsupported as unsupported:
                server, refusal = "plain PyTorch", str(unsupported)
        if reason:
            # A GPU that was not compiled for is one reason, not one for each op.
            subject = "" if reason.startswith(_cuda.OTHER_GPU) else f"{op}: "
            warn_once(f"{subject}{server} instead of the CUDA kernels: {reason}")
        elif refusal:
            warn_once(f"{op}: plain PyTorch instead of the Triton kernels: {refusal}")
        return result if server == "Triton" else eager(*arguments)

    return call


def reporting(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``function`` for a call from C++, which gets the text of its errors this way."""

    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except BaseException as error:  # a KeyboardInterrupt, too
            _cuda.set_error(error)
            raise

    return call


def device_of(args: Sequence[Any]) -> torch.device:
    """Return the device of the first tensor among an op's arguments, or in lists among them; without one, the CPU."""
    tensors = (each for arg in args for each in (arg if isinstance(arg, list | tuple) else (arg,)))
    return next((each.device for each in tensors if isinstance(each, Tensor)), torch.device("cpu"))


def full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``function`` without autocast and without reduced-precision float32 products.

    Covariances and Newton's iteration lose all meaning in TF32 or bfloat16 (three decimal digits), and allowing
    these for convolutions is not asking for that. Both switches are process-wide, so they are touched only
    when they are set.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        device = device_of(args).type
        with contextlib.ExitStack() as stack:
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
            backends: Any = torch.backends
            on_cpu = (backends.mkldnn.matmul, backends.mkldnn.conv)
            on_cuda = (backends.cuda.matmul, backends.cudnn.conv)  # cuDNN's convolutions are TF32 unless told otherwise
            for kind in on_cuda if device == "cuda" else on_cpu:
                before = kind.fp32_precision
                if before not in ("none", "ieee"):
                    kind.fp32_precision = "ieee"
                    stack.callback(_restore_precision, kind, before)
            if device == "cuda" and not backends.cudnn.deterministic:  # sums in a fixed order
                backends.cudnn.deterministic = True
                stack.callback(setattr, backends.cudnn, "deterministic", False)
            return function(*args, **kwargs)

    return wrapped


def traceable_full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that is no op as ``full_precision`` does, so that torch.compile traces into it.

    Compiled, they run only without autocast: Dynamo cannot trace the other switches.
    """
    exact = full_precision(function)

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        if not torch.compiler.is_compiling():
            return exact(*args)
        with torch.autocast(device_of(args).type, enabled=False):
            return function(*args)

    return wrapped


def _restore_precision(kind: Any, before: str) -> None:
    """Restore the precision that was in force before, by inheriting it ("none") where that gives the same."""
    kind.fp32_precision = "none"
    if kind.fp32_precision != before:
        kind.fp32_precision = before


def availability(backend: str) -> tuple[bool, str]:
    """Return whether a backend can run here, and why (not)."""
    _check_backend(backend, BACKENDS)
    if backend == "cuda":
        return _cuda.availability()
    if backend == "eager":
        return True, "plain PyTorch, on every device"
    if not _triton.installed():
        return False, "the package triton is not installed"
    if _triton.interpreted():
        return True, "Triton kernels in Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors"
    if torch.cuda.is_available():
        return True, "Triton kernels, on NVIDIA GPUs of compute capability 8.0 or newer"
    return False, "no CUDA device (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly, to test them)"


def explain(
    op: str, tensor: Tensor, *, group_size: int | None = None, plane: Sequence[int] | None = None
) -> tuple[str, str]:
    """Return (backend, reason) for ``op`` applied to a tensor like this one; see backend_of for the options."""
    if op not in _IMPLEMENTATIONS:
        raise ValueError(f"op: expected one of {', '.join(_IMPLEMENTATIONS)}, got {op!r}")
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensor: expected a torch.Tensor, got {type(tensor).__name__}")
    if group_size is not None and tensor.dim() >= 2:
        group_size = resolve_group_size(tensor.shape[1], group_size)  # as the op does: more than C means one group
    if plane is not None:
        plane = [check_integer("plane", side, minimum=1) for side in plane]
    chosen = "chosen by use_backend or NORMKERNELS_BACKEND"
    if _chosen == "eager":
        return "eager", chosen
    passed_over = []
    for backend in _candidates(op):
        reason = _refusal(backend, op, tensor, group_size, plane)
        if not reason:
            return backend, chosen if backend == _chosen else availability(backend)[1]
        passed_over.append(f"{backend}: {reason}")
        if backend == "triton" and availability(backend)[0] and backend in _IMPLEMENTATIONS[op] and tensor.is_cuda:
            break  # a call that Triton does not serve goes to eager, whatever the order
    return "eager", "; ".join(passed_over)


def _refusal(backend: str, op: str, tensor: Tensor, group_size: int | None, plane: Sequence[int] | None) -> str:
    """Return why a backend that is not eager leaves a call to the next one, "" if it does not."""
    available, reason = availability(backend)
    if backend not in _IMPLEMENTATIONS[op] and not (backend == "cuda" and (op, "CUDA") in _compiled):
        return "does not implement it" if available or backend == "triton" else reason
    if not available:
        return reason
    if not tensor.is_cuda and not (backend == _chosen and backend in _IMPLEMENTATIONS[op]):
        return "serves CUDA tensors only" + (", unless use_backend chooses it" if backend == "triton" else "")
    if backend == "cuda":
        return _cuda.refusal(op, tensor.device, tensor.dtype, group_size=group_size, plane=plane)
    try:
        _triton.check_supported(tensor, group_size=group_size, plane=plane)
        if group_size is not None:
            _triton.check_entries(op, tensor, group_size)
    except Unsupported as unsupported:
        return str(unsupported)
    return ""


def backend_of(op: str, tensor: Tensor, *, group_size: int | None = None, plane: Sequence[int] | None = None) -> str:
    """Return the name of the backend ("cuda", "triton" or "eager") that serves ``op`` on a tensor like this one.

    Whether kernels serve a call may also depend on group_size, the channels whitened together, or on plane, the size
    (H, W) of the spectrum of a filter; None leaves that out of the answer.
    Raises ValueError for an unknown op, and for a group_size that the op refuses on this tensor.
    ``python -m normkernels.info`` shows the reason too.
    """
    return explain(op, tensor, group_size=group_size, plane=plane)[0]


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Serve every op from one backend inside a ``with`` block; "auto" is the default order.

    Ops that the backend does not implement get the next one of cuda, triton and eager. It holds for the whole process
    (all threads), like the dispatcher it changes.
    Raises ValueError for an unknown name, RuntimeError for a backend that cannot run here.
    """
    _check_available(backend)
    before = _chosen
    _choose(backend)
    try:
        yield
    finally:
        _choose(before)


def _choose(backend: str) -> None:
    global _chosen, _overrides, _compiled
    if _overrides is not None:
        # This comes before the next registration: the dispatcher warns of kernels that replace kernels.
        _overrides._destroy()
        _overrides = None
    _chosen = backend
    _compiled = {(op, key) for op in _IMPLEMENTATIONS for key in KEYS if _cuda.registered(op, key)}
    _overrides = torch.library.Library("normkernels", "IMPL")
    with warnings.catch_warnings():
        # A compiled kernel is replaced on purpose.
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        for op in _IMPLEMENTATIONS:
            for key in KEYS:
                implementation = _implementation(op, key)
                if implementation is not None:
                    _overrides.impl(op, implementation, key)


def _implementation(op: str, key: str) -> Callable[..., Any] | None:
    """Return what to register for an op under a dispatch key; None where the compiled kernel is to serve it."""
    implementations = _IMPLEMENTATIONS[op]
    for backend in _candidates(op) if key == "CUDA" or _chosen != "auto" else ():
        if backend == "cuda" and (op, key) in _compiled:
            return None
        usable = key == "CUDA" or backend == _chosen  # on a CPU only the chosen backend, or eager
        if backend in implementations and usable and (backend != "triton" or _triton.installed()):
            return implementations[backend]
    return implementations["eager"]


def _candidates(op: str) -> tuple[str, ...]:
    """Return the backends that may serve an op, in order, without eager, which follows them."""
    order = _order(op) if _chosen == "auto" else BACKENDS[BACKENDS.index(_chosen) :]
    return order[: order.index("eager")]


def _next_backends(op: str) -> tuple[str, ...]:
    """Return the backends after cuda, in order of preference."""
    order = _order(op) if "cuda" in _order(op) else BACKENDS
    return order[order.index("cuda") + 1 :]


def _order(op: str) -> tuple[str, ...]:
    table = order()
    return table.get(op, table["default"])


@functools.cache
def order() -> dict[str, tuple[str, ...]]:
    """Return ORDER, with the entries of the file that NORMKERNELS_BACKEND_ORDER names in place of its own."""
    extra = os.environ.get("NORMKERNELS_BACKEND_ORDER")
    return ORDER | read_order(Path(extra)) if extra else ORDER


def read_order(path: Path) -> dict[str, tuple[str, ...]]:
    """Read a file such as {"default": ["cuda", "triton", "eager"], "whiten": ["triton", "cuda", "eager"]}.

    Raises ValueError that names what was expected.
    """
    try:
        table = json.loads(path.read_text())
        if not isinstance(table, Mapping):
            raise ValueError(f"a {type(table).__name__}")
        for op, backends in table.items():
            if op not in ("default", *_IMPLEMENTATIONS):
                raise ValueError(f"the op {op!r}")
            if (
                not isinstance(backends, list)
                or backends[-1:] != ["eager"]
                or not all(backend in BACKENDS and backends.count(backend) == 1 for backend in backends)
            ):
                raise ValueError(f"{backends!r} for {op}")
    except (OSError, ValueError) as error:
        expected = f"a JSON object of ops (or default) and lists of {', '.join(BACKENDS)}, each once, eager last"
        raise ValueError(f"NORMKERNELS_BACKEND_ORDER: expected {path} to be {expected}; got {error}") from None
    return {op: tuple(backends) for op, backends in table.items()}


def _check_backend(backend: str, names: tuple[str, ...]) -> None:
    if backend not in names:
        raise ValueError(f"backend: expected one of {', '.join(names)}, got {backend!r}")


def _check_available(backend: str) -> None:
    _check_backend(backend, ("auto", *BACKENDS))
    if backend != "auto":
        available, reason = availability(backend)
        if not available:
            raise RuntimeError(f"backend {backend!r} is not available: {reason}")


def apply_environment() -> None:
    """Load the compiled kernels, follow NORMKERNELS_BACKEND and its ORDER; called once, when all ops are defined."""
    _cuda.load()
    order()
    backend = os.environ.get("NORMKERNELS_BACKEND", "auto")
    try:
        _check_available(backend)
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"NORMKERNELS_BACKEND: {error}") from None
    _choose(backend)
