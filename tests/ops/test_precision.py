"""Precision that no switch of the process may take away, large means, determinism, threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import normkernels as nk
from normkernels.dispatch import record
from tests.oracles import inputs
from tests.oracles.run import Config, incoming_gradient, oracle, plain_path, run
from tests.tolerances import assert_within, largest
from tests.tolerances.whitening import assert_iter_norm, exactly_centered

OPTIONS = {
    "newton-trace": {"num_iterations": 5, "scaling": "trace"},
    "newton-frobenius": {"num_iterations": 3, "scaling": "frobenius"},
    "eigh": {"method": "eigh", "eps": 1e-3},
}
METHODS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


@pytest.fixture(scope="module")
def large() -> Tensor:
    """Draw x large enough for reduced-precision products and for several threads to be worth it."""
    return inputs.gaussian((32, 64, 8, 8), dtype=torch.float32, group_size=64)


def fused(x: Tensor, options: dict[str, Any], create_graph: bool = False) -> tuple[Tensor, ...]:
    """Return y, mean, W, dx, dweight, dbias of iter_norm."""
    leaves = [x.detach().requires_grad_(), *(torch.linspace(-1, 2, x.shape[1]).requires_grad_() for _ in range(2))]
    y, mean, w = nk.ops.iter_norm(leaves[0], 64, weight=leaves[1], bias=leaves[2], **options)
    grads = torch.autograd.grad(y, leaves, incoming_gradient(y.detach()), create_graph=create_graph)
    return tuple(t.detach() for t in (y, mean, w, *grads))


def composed(x: Tensor, options: dict[str, Any], create_graph: bool = False) -> tuple[Tensor, ...]:
    """Return the same from the three primitives, with a mean that needs a gradient of its own."""
    leaves = [x.detach().requires_grad_(), *(torch.linspace(-1, 2, x.shape[1]).requires_grad_() for _ in range(2))]
    _, mean, cov = nk.ops.moments(leaves[0], 64)
    w = nk.ops.inverse_sqrt(cov, **options)
    y = nk.ops.whiten(leaves[0], mean + leaves[2], w, leaves[1], leaves[2])
    grads = torch.autograd.grad(y, leaves, incoming_gradient(y.detach()), create_graph=create_graph)
    return tuple(t.detach() for t in (y, mean, w, *grads))


def same_bits(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


# backward: closed-form, in raw ops. create_graph: differentiable PyTorch around them. eigh has no second derivative.
WAYS = {
    f"{path.__name__}-{name}{'-create_graph' if create_graph else ''}": (path, options, create_graph)
    for path in (fused, composed)
    for name, options in OPTIONS.items()
    for create_graph in (False, True)
    if not (create_graph and name == "eigh")
}
EVERY_WAY = pytest.mark.parametrize(("path", "options", "create_graph"), WAYS.values(), ids=WAYS.keys())
Path = Callable[..., tuple[Tensor, ...]]


@EVERY_WAY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_does_not_reach_inside(
    large: Tensor, dtype: torch.dtype, path: Path, options: dict[str, Any], create_graph: bool
) -> None:
    """Autocast would lower each matmul of the covariance and of Newton's iteration, in forward and backward."""
    expected = path(large, options, create_graph)
    with torch.autocast("cpu", dtype):
        got = path(large, options, create_graph)
        assert torch.is_autocast_enabled("cpu")
    assert same_bits(got, expected)


def precision_in_force() -> tuple[str, str]:
    return torch.backends.mkldnn.matmul.fp32_precision, torch.backends.mkldnn.conv.fp32_precision


def lower_everything(to: str) -> None:
    torch.backends.fp32_precision = to


# Three of torch's switches: the oldest, at both of its settings, and the newest, which convolutions follow, too.
SWITCHES = {
    "matmul-high": (torch.set_float32_matmul_precision, "high", "highest"),
    "matmul-medium": (torch.set_float32_matmul_precision, "medium", "highest"),
    "everything-bf16": (lower_everything, "bf16", "none"),
}


@pytest.fixture(params=SWITCHES.values(), ids=SWITCHES.keys())
def reduced(request: pytest.FixtureRequest) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Yield two functions: one allows reduced precision to the whole process, one forbids it again."""
    switch, low, high = request.param
    yield lambda: switch(low), lambda: switch(high)
    switch(high)
    for kind in (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv):
        kind.fp32_precision = "none"


def test_switches_are_left_to_their_owner(
    large: Tensor, reduced: tuple[Callable[[], None], Callable[[], None]]
) -> None:
    """A switch that was off for a while is on again, and still obeys the user's own switch afterwards."""
    lower, restore = reduced
    lower()
    lowered = precision_in_force()
    restore()
    restored = precision_in_force()
    lower()
    fused(large, {})
    assert precision_in_force() == lowered
    restore()
    assert precision_in_force() == restored


class Products(TorchDispatchMode):
    """Notes the float32 precision in force at each matrix product and convolution, inside of the raw ops, too.

    Not every CPU has products that would follow a switch, so looking at results is not enough.
    """

    NAMES = ("mm", "bmm", "addmm", "baddbmm", "mv", "convolution", "_linear_pointwise")

    def __init__(self) -> None:
        super().__init__()
        self.precisions: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "normkernels":
            with self:
                return record.IMPLEMENTATIONS[func._opname]["eager"](*args, **(kwargs or {}))
        if func._opname in self.NAMES:
            self.precisions.update(precision_in_force())
        return func(*args, **(kwargs or {}))


@EVERY_WAY
def test_reduced_precision_does_not_reach_inside(
    large: Tensor, reduced: tuple[Callable[[], None], Callable[[], None]], path: Path, options: dict[str, Any],
    create_graph: bool,
) -> None:  # fmt: skip
    """It is meant for convolutions, which may bear TF32 or bfloat16; Newton's iteration does not."""
    expected = path(large, options, create_graph)
    reduced[0]()
    assert same_bits(path(large, options, create_graph), expected)
    with Products() as products:
        path(large, options, create_graph)
    assert products.precisions and products.precisions <= {"none", "ieee"}


# 1e5: x - mean is exact in float32 (Sterbenz), but the mean itself is rounded to 1/256 of a standard deviation.
@METHODS
@pytest.mark.parametrize("mean", [1e3, -1e5], ids="mean{:g}".format)
def test_large_means_cost_nothing(mean: float, options: dict[str, Any]) -> None:
    """The plain path carries the rounding of the mean into y and into the gradients; iter_norm takes it out again."""
    config = Config(**{"eps": 1e-3, **options})
    x = inputs.gaussian((16, 8, 4, 4), dtype=torch.float32, mean=mean)
    dy = incoming_gradient(x) + 3  # a mean of its own, which the rounding of x's mean would be multiplied with
    got, reference = run(nk.ops.iter_norm, config, x, dy), oracle(config, x, dy)
    floor = exactly_centered(x, dy, reference, config)
    assert_within("y", got.y, reference.y, None, floor.y, largest(reference.y))
    assert_within("W", got.w, reference.w, None, floor.w, largest(reference.w))
    assert_within("dx", got.dx, reference.dx, None, floor.dx, largest(reference.dx))


@METHODS
@pytest.mark.parametrize("threads", [1, 2])
def test_deterministic(large: Tensor, threads: int, options: dict[str, Any]) -> None:
    """Results are equal bit for bit, without torch's deterministic mode, which the fixtures switch on."""
    torch.use_deterministic_algorithms(False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first = fused(large, options)
        assert all(same_bits(first, fused(large, options)) for _ in range(3))
    finally:
        torch.set_num_threads(before)


@METHODS
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_products_at_their_real_size(
    large: Tensor, memory_format: torch.memory_format, group_size: int, options: dict[str, Any]
) -> None:
    """d and m are those of a real layer: kernels that are chosen by size are the ones in use."""
    config = Config(**{"eps": 1e-5, "group_size": group_size, **options})
    x = large.contiguous(memory_format=memory_format)
    dy = incoming_gradient(x)
    got = run(nk.ops.iter_norm, config, x, dy)
    assert_iter_norm(got, oracle(config, x, dy), plain_path(config, x, dy), x, dy, None, config)


# Working memory may be kept from call to call.


@METHODS
def test_results_outlive_the_next_call(large: Tensor, options: dict[str, Any]) -> None:
    """Nothing that was returned may lie in working memory."""
    for path in (fused, composed):
        first = path(large, options)
        copies = tuple(t.clone() for t in first)
        path(2 - large, options)
        assert same_bits(first, copies)


@METHODS
def test_threads_do_not_share_working_memory(large: Tensor, options: dict[str, Any]) -> None:
    """Data-parallel replicas and data loaders call the op from several threads at once."""
    batches = [large * (i + 1) + i for i in range(8)]
    expected = [fused(x, options) for x in batches]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda x: fused(x, options), batches))
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


def test_inference_mode_first(large: Tensor) -> None:
    """Memory allocated in inference mode cannot be written to outside of it: it must not be kept for later."""

    def steps() -> tuple[Tensor, ...]:
        with torch.inference_mode():
            nk.ops.iter_norm(large, 64)
        return fused(large, {})

    with ThreadPoolExecutor(1) as fresh_thread:
        assert same_bits(fresh_thread.submit(steps).result(), fused(large, {}))
