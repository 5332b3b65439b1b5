"""The runtime itself: what kernels may rely on, and the mistakes that it must catch."""

from __future__ import annotations

import ctypes
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.simt import build

pytestmark = pytest.mark.simt

KERNELS = build.HERE / "runtime_kernels.cu"
ORDERS = ("ascending", "descending")


class Library:
    """The functions of runtime_kernels.cu; tensors are handed over as addresses, and an error's message comes back."""

    def __init__(self, path: Path) -> None:
        self.functions = ctypes.CDLL(str(path))

    def __getattr__(self, name):
        function = getattr(self.functions, name)
        function.restype = ctypes.c_char_p

        def call(*arguments):
            return function(*map(as_c, arguments)).decode()

        return call

    def run(self, name, *arguments):
        message = getattr(self, name)(*arguments)
        assert not message, message


def as_c(argument):
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return argument


@pytest.fixture(autouse=True, scope="module")
def _compiler() -> None:
    if reason := build.missing():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def library(request) -> Library:
    return Library(build.link("runtime", [KERNELS], sanitize=request.config.getoption("--simt") == "sanitized"))


@pytest.fixture(params=ORDERS)
def threads(request, monkeypatch) -> str:
    monkeypatch.setenv("NORMKERNELS_SIMT_THREADS", request.param)
    return request.param


@pytest.fixture(params=ORDERS)
def blocks(request, monkeypatch) -> str:
    monkeypatch.setenv("NORMKERNELS_SIMT_BLOCKS", request.param)
    return request.param


# --- what kernels may rely on ---------------------------------------------------------------------------------------


def check_sum(library: Library) -> None:
    per_block, blocks = 300, 7
    x = torch.randn(per_block * blocks - 123)
    sums, total, done = torch.empty(blocks), torch.empty(1), torch.zeros(1, dtype=torch.int32)
    library.run("sum", x, len(x), per_block, blocks, sums, total, done)
    expected = torch.stack([part.double().sum() for part in x.split(per_block)])
    torch.testing.assert_close(sums.double(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(total.double(), expected.sum()[None], atol=1e-4, rtol=0)


@pytest.mark.usefixtures("threads", "blocks")
def test_sum_by_shuffles_barrier_and_last_block(library):
    check_sum(library)


def test_fibers_without_assembly():
    """Processors other than x86-64 use these fibers."""
    check_sum(Library(build.link("runtime-ucontext", [KERNELS], ["-DNORMKERNELS_SIMT_UCONTEXT"])))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("width", [32, 8])
@pytest.mark.parametrize("argument", [0, 1, 5, 16])
def test_shuffles(library, argument, width):
    x, out = torch.randint(1000, (32,), dtype=torch.int32), torch.empty(3, 32, dtype=torch.int32)
    library.run("shuffle", x, argument, width, out)
    lane = np.arange(32)
    last = lane | (width - 1)
    sources = np.stack([lane & ~(width - 1) | argument % width, lane ^ argument, lane + argument])
    sources[1:] = np.where(sources[1:] > last, lane, sources[1:])
    assert torch.equal(out, x[torch.from_numpy(sources)])


def toward_zero(x: Tensor) -> Tensor:
    nearest = x.float()
    return torch.where(nearest.double().abs() > x.abs(), torch.nextafter(nearest, torch.zeros(())), nearest)


def cut(x: Tensor) -> Tensor:
    """Cut x to the 10 bits of mantissa that TF32 has."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def multiply(library: Library, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    c = c.clone()
    library.run("tf32" if a.dtype == torch.float32 else "bf16", a, b, c)
    return c


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    k = 8 if dtype == torch.float32 else 16
    return torch.randn(16, k).to(dtype), torch.randn(k, 8).to(dtype), torch.randn(16, 8)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensor_core_products(library, dtype):
    a, b, c = operands(dtype)
    got = multiply(library, a, b, c)
    if dtype == torch.float32:
        a, b = cut(a), cut(b)
    exact = a.double() @ b.double() + c
    assert torch.equal(got, toward_zero(exact))
    assert not torch.equal(got, exact.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensor_core_products_pass_on_what_is_not_finite(library, dtype):
    a, b, c = operands(dtype)
    a[3, 2], b[5, 6], c[8, 1], c[9, 1] = math.inf, math.nan, math.nan, -math.inf
    got = multiply(library, a, b, c)
    exact = (a.double()[:, :, None] * b.double()).sum(1) + c
    assert torch.equal(got.isnan(), exact.isnan())
    assert torch.equal(got[got.isinf()].double(), exact[exact.isinf()])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("n", [4, 256, 1000, 1024])
def test_pipeline_of_asynchronous_copies(library, n):
    x, y = torch.randn(n), torch.empty(n)
    library.run("pipeline", x, n, y, True)
    assert torch.equal(y, 2 * x)


def test_order_of_threads_and_blocks(library, threads, blocks):
    columns, rows, count = 3, 2, 64
    out = torch.empty(columns * rows, count, dtype=torch.int32)
    library.run("order", columns, rows, count, out, torch.zeros(1, dtype=torch.int32))
    expected = torch.arange(out.numel(), dtype=torch.int32).view(out.shape)
    expected = expected.flip(1) if threads == "descending" else expected
    assert torch.equal(out, expected.flip(0) if blocks == "descending" else expected)


def test_largest_block(library):
    library.run("switches", 1024, 10)


def test_sines_are_exact_where_they_can_be(library):
    sine, cosine = library.functions.sine, library.functions.cosine
    sine.argtypes = cosine.argtypes = [ctypes.c_double]
    sine.restype = cosine.restype = ctypes.c_double
    for n in range(-8, 9):
        assert (sine(n / 2), cosine(n / 2)) == ((0, 1, 0, -1)[n % 4], (1, 0, -1, 0)[n % 4])
    for x in np.linspace(-3, 3, 100):
        assert sine(x) == pytest.approx(np.sin(np.pi * x), abs=1e-14)
        assert cosine(x) == pytest.approx(np.cos(np.pi * x), abs=1e-14)


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, -1])
def test_a_missing_barrier_shows_in_one_of_two_orders(library, threads, step):
    x, right, wrong = torch.randn(64), torch.zeros(64), torch.zeros(64)
    library.run("neighbour", x, step, right, True)
    library.run("neighbour", x, step, wrong, False)
    assert torch.equal(right, torch.cat([x[1:], torch.zeros(1)]) if step > 0 else torch.cat([torch.zeros(1), x[:-1]]))
    seen = (threads == "ascending") == (step > 0)
    assert int(wrong.isnan().sum()) == (63 if seen else 0)


@pytest.mark.usefixtures("threads")
def test_a_missing_wait_shows(library):
    x, y = torch.randn(1000), torch.empty(1000)
    library.run("pipeline", x, 1000, y, False)
    assert not (y[:768] == 2 * x[:768]).any()


PLACE = r"runtime_kernels\.cu:\d+"
DIVERGENCES = {
    "returned": rf"8 returned \(first: thread 0\), 56 waiting in __syncthreads at {PLACE} \(first: thread 8\)",
    "two barriers": f"waits in __syncthreads at {PLACE} while others wait in __syncthreads at {PLACE}",
    "barrier and shuffle": f"waiting in __shfl_sync at {PLACE} .* 8 waiting in __syncthreads at {PLACE}|"
    f"waits in __shfl_sync at {PLACE} while",
    "two shuffles": f"waits in __shfl_.*sync at {PLACE} while others wait in __shfl_.*sync at {PLACE}",
    "part of a warp": rf"56 returned \(first: thread 8\), 8 waiting in __syncwarp at {PLACE}",
    "mask": f"__syncwarp at {PLACE}: expected the mask of all 32 lanes, got 255",
}


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergence_is_an_error(library, kind):
    message = library.divergent(list(DIVERGENCES).index(kind), torch.empty(1, dtype=torch.int32))
    assert message.startswith("divergent: block (0, 0)")
    check_sum(library)  # the fibers that were left in the middle do no harm
    assert re.search(DIVERGENCES[kind], message), message


COPIES = {
    "misaligned shared": "expected a shared address aligned to 16 bytes, got one 4 beyond",
    "misaligned global": "expected a global address aligned to 8 bytes, got one 4 beyond",
    "beyond shared": "expected 16 bytes within the 16 of shared memory, got offset 16",
    "not waited for": "returned with 1 asynchronous copies that it did not wait for",
}


@pytest.mark.parametrize("kind", COPIES)
def test_bad_copies_are_errors(library, kind):
    message = library.bad_copy(list(COPIES).index(kind), torch.zeros(8))
    assert message.startswith("bad_copy: block (0, 0), thread 0: ")
    assert COPIES[kind] in message


@pytest.mark.parametrize(
    ("grid", "threads", "shared_bytes", "message"),
    [
        ((0, 1), 32, 0, "blocks, got 0 x 1 x 1"),
        ((1, 65536), 32, 0, "blocks, got 1 x 65536 x 1"),
        ((1, 1), 0, 0, "expected 1 to 1024 threads in a block, got 0"),
        ((1, 1), 1025, 0, "expected 1 to 1024 threads in a block, got 1025"),
        ((1, 1), 32, 232449, "expected at most 232448 bytes of shared memory, got 232449"),
    ],
)
def test_bad_launches_are_errors(library, grid, threads, shared_bytes, message):
    assert message in library.launch_with(*grid, threads, ctypes.c_size_t(shared_bytes))


def test_settings(library, monkeypatch):
    monkeypatch.setenv("NORMKERNELS_SIMT_SHARED_BYTES", "1024")
    assert "at most 1024 bytes" in library.launch_with(1, 1, 32, ctypes.c_size_t(1025))
    monkeypatch.setenv("NORMKERNELS_SIMT_THREADS", "random")
    assert "expected ascending or descending, got random" in library.launch_with(1, 1, 32, ctypes.c_size_t(0))


# --- mistakes that the sanitizers find --------------------------------------------------------------------------------

ACCESSES = {
    "inside": "",
    "beyond shared memory": "AddressSanitizer: heap-buffer-overflow",
    "beyond global memory": "AddressSanitizer: heap-buffer-overflow",
    "copy beyond global memory": "AddressSanitizer: heap-buffer-overflow",
    "misaligned vector": "misaligned address",
}

# No tensors: memory from malloc has AddressSanitizer's fences right behind it, and torch takes seconds to import.
ACCESS = """
import ctypes, sys
library, malloc = ctypes.CDLL(sys.argv[1]), ctypes.CDLL(None).malloc
malloc.restype = ctypes.c_void_p
x, y = (ctypes.c_void_p(malloc(4 * 64)) for _ in range(2))
library.bad_access(int(sys.argv[2]), x, 64, y)
"""


@pytest.mark.parametrize("kind", ACCESSES)
def test_sanitizers_find_bad_accesses(kind):
    path = build.link("runtime", [KERNELS], sanitize=True)
    command = [sys.executable, "-c", ACCESS, str(path), str(list(ACCESSES).index(kind))]
    done = subprocess.run(command, env=build.sanitized_environment(), capture_output=True, text=True)
    assert (done.returncode == 0) == (kind == "inside")
    assert ACCESSES[kind] in done.stderr
    assert kind == "inside" or "bad_access_kernel" in done.stderr or "simt.cpp" in done.stderr
