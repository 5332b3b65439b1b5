"""Every op as torch's machinery sees it: schema, fake, torch.compile without graph breaks, torch.export."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import normkernels as nk
from normkernels.dispatch.record import OPS
from tests.oracles import inputs
from tests.tolerances import assert_agree

# torch's own tracing code touches deprecated parts of torch.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")

LAYOUTS = ["NC", "NLC", "NCHW", "NHWC", "NHWC-1x1", "NCHW-cropped", "NCHW-channel-slice", "NDHWC"]


def data(layout: str, dtype: torch.dtype) -> Tensor:
    shape, lay_out = inputs.LAYOUTS[layout]
    return lay_out(inputs.gaussian(shape, dtype=dtype, group_size=4))


def samples(op: str, x: Tensor) -> list[tuple[Any, ...]]:
    """Return the record's samples of an op's arguments, for groups of four channels."""
    return list(OPS[op].samples(x, 4))


ABOUT_VALUES = ("test_schema", "test_faketensor")
ABOUT_TRACING = ("test_autograd_registration", "test_aot_dispatch_dynamic")


def check(op: str, given: tuple[Any, ...], traced: bool = True) -> None:
    """Check the schema (mutation, aliasing), the fake (shapes, strides, types), the gradient and symbolic shapes."""
    torch.library.opcheck(OPS[op].raw, given, test_utils=ABOUT_VALUES + (ABOUT_TRACING if traced else ()))


# Every layout in one type, every type in two layouts.
COMBINATIONS = [(layout, torch.float32) for layout in LAYOUTS] + [
    (layout, dtype) for layout in ("NCHW", "NHWC") for dtype in (torch.float64, torch.bfloat16)
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("layout", "dtype"), COMBINATIONS, ids=lambda value: str(value).removeprefix("torch."))
def test_opcheck(op: str, layout: str, dtype: torch.dtype) -> None:
    check(op, samples(op, data(layout, dtype))[0], traced=dtype == torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_opcheck_of_every_option(op: str) -> None:
    for given in samples(op, data("NCHW", torch.float32))[1:]:
        check(op, given)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(0, 8, 3, 2), (1, 8, 1, 1), (2, 8, 17, 34)], ids=str)
def test_opcheck_of_batches(op: str, shape: tuple[int, ...]) -> None:
    if shape[0] or op != "precondition":  # gradients have outputs
        check(op, samples(op, torch.randn(shape))[0])


@pytest.mark.parametrize("op", [name for name, op in OPS.items() if op.autograd])
@pytest.mark.parametrize("layout", ["NC", "NHWC", "NCHW-cropped"])
def test_opcheck_with_gradients(op: str, layout: str) -> None:
    """The raw ops know their gradients: an exported program holds nothing else."""
    given = samples(op, data(layout, torch.float64))[0]
    check(op, tuple(a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in given))


# Compiled. backend="aot_eager" traces forward and backward through fakes and runs the ops as they are.

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "moments": lambda x, w, b: nk.ops.moments(x, 4)[1:],
    "cross_moments": lambda x, w, b: nk.ops.cross_moments(x, x.sin(), w.float(), 4),
    "inverse_sqrt": lambda x, w, b: nk.ops.inverse_sqrt(nk.ops.moments(x, 4)[2]),
    "inverse_sqrt-eigh": lambda x, w, b: nk.ops.inverse_sqrt(nk.ops.moments(x, 4)[2], method="eigh"),
    "whiten": lambda x, w, b: nk.ops.whiten(x, b / 2, torch.outer(w, b).view(4, 4, 4)[:2], w, b),
    "iter_norm": lambda x, w, b: nk.ops.iter_norm(x, 4, weight=w, bias=b),
    "iter_norm-eigh": lambda x, w, b: nk.ops.iter_norm(x, 4, weight=w, bias=b, method="eigh"),
    "iter_norm-bare": lambda x, w, b: nk.ops.iter_norm(x * b[0], 4),
    "spectral": lambda x, w, b: nk.ops.spectral_filter(
        x, nk.ops.kernel_spectrum(torch.outer(w, b).view(8, 2, 2, 2), x.shape[2:]), [slice(1, None), slice(0, None, 2)]
    ),
}


def values_and_gradients(function: Callable[..., Any], *leaves: Tensor) -> list[Tensor]:
    """Return all outputs, and the gradients of the leaves that have one."""
    leaves = tuple(t.detach().clone().requires_grad_() for t in leaves)
    out = function(*leaves)
    out = [out] if isinstance(out, Tensor) else list(out)
    # The compiler asks for dL/dy in y's layout, and another order of summation gives other bits.
    wanted = [torch.empty_like(t).copy_(torch.linspace(-1, 1, t.numel()).view(t.shape)) for t in out]
    loss = sum((t * dt).float().sum() for t, dt in zip(out, wanted, strict=True) if t.requires_grad)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [t.detach() for t in (*out, *grads) if t is not None]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    """Check values up to the order in which a compiler adds gradients that meet, and that layouts are the very same."""
    assert [t.stride() for t in got] == [t.stride() for t in expected]
    assert_agree(got, expected)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_ops_compile_without_graph_breaks(function: str, layout: str) -> None:
    leaves = data(layout, torch.float32), torch.linspace(-1, 2, 8), torch.linspace(1, 3, 8)
    expected = values_and_gradients(FUNCTIONS[function], *leaves)
    compiled = torch.compile(FUNCTIONS[function], backend="aot_eager", fullgraph=True)
    assert_same(values_and_gradients(compiled, *leaves), expected)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_ops_compile_with_dynamic_shapes(function: str) -> None:
    """Every length may be a symbol, those of the matrices included, in forward and backward."""
    leaves = data("NCHW", torch.float32), torch.linspace(-1, 2, 8), torch.linspace(1, 3, 8)
    expected = values_and_gradients(FUNCTIONS[function], *leaves)
    compiled = torch.compile(FUNCTIONS[function], backend="aot_eager", fullgraph=True, dynamic=True)
    assert_same(values_and_gradients(compiled, *leaves), expected)


LAYERS = {
    "IterNorm2d": lambda: nk.IterNorm2d(8, 4),
    "IterNorm2d-cumulative": lambda: nk.IterNorm2d(8, 4, momentum=None),
    "IterNorm2d-bare": lambda: nk.IterNorm2d(8, 4, affine=False, track_running_stats=False),
    "DBN2d": lambda: nk.DBN2d(8, 4),
    "ConvNorm2d": lambda: seeded(lambda: nk.ConvNorm2d(8, 6, 3, stride=2, padding=1)),
    "ConvNorm2d-full-gradient": lambda: seeded(lambda: nk.ConvNorm2d(8, 8, 2, groups=2, detach_spectrum=False)),
}


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build()


def steps(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Run two training steps, then evaluation with its gradient; return every buffer after each, too."""
    seen: list[Tensor] = []
    for training in (True, True, False):
        layer.train(training)
        seen += values_and_gradients(layer, x)
        seen += [b.clone() for b in layer.buffers()]
        seen += [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    return seen


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_layers_compile_without_graph_breaks(layer: str, layout: str) -> None:
    """A compiled layer remembers what an eager one does: running statistics are included."""
    x = data(layout, torch.float32)
    expected = steps(LAYERS[layer](), x)
    assert_same(steps(torch.compile(LAYERS[layer](), backend="aot_eager", fullgraph=True), x), expected)


def test_compiled_under_autocast() -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 1), nk.IterNorm2d(8, 4))
    x = data("NCHW", torch.float32)

    def step(module: nn.Module) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return values_and_gradients(module, x)

    expected = step(net)
    assert expected[0].dtype == torch.bfloat16
    assert_same(step(torch.compile(net, backend="aot_eager", fullgraph=True)), expected)


def test_one_graph_for_every_batch_size() -> None:
    """A dynamic batch dimension is compiled once, not once for each size."""
    counter = CompileCounterWithBackend("aot_eager")
    layer = nk.IterNorm2d(8, 4)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for samples in (4, 7, 12):
        x = inputs.gaussian((samples, 8, 3, 2), dtype=torch.float32)
        torch._dynamo.mark_dynamic(x, 0)
        expected = nk.ops.iter_norm(x, 4)[0]
        assert_agree(compiled(x), expected)
    assert counter.frame_count == 1
    assert layer.num_batches_tracked == 3


def test_bad_batch_in_a_compiled_layer() -> None:
    """The check for NaN statistics is part of the graph, so it still protects the buffers."""
    layer = nk.IterNorm2d(8, 4)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = data("NCHW", torch.float32)
    compiled(x)
    before = [b.clone() for b in layer.buffers()]
    assert compiled(x.index_fill(0, torch.tensor([1]), float("nan"))).isnan().all()
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), before, strict=True))


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # inductor's own warnings, about the machine
def test_inductor() -> None:
    """The default backend, with generated code around the ops, is the same to rounding, in forward and backward."""
    net = nn.Sequential(nk.IterNorm2d(8, 4), nn.ReLU(), nk.DBN2d(8, 4))
    x = data("NHWC", torch.float32)
    expected = values_and_gradients(net, x)
    net[0].reset_running_stats()
    got = values_and_gradients(torch.compile(net, fullgraph=True), x)
    assert_agree(got, expected)


# Exported.


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11's own, in torch.export.load
@pytest.mark.parametrize("layer", ["IterNorm2d", "DBN2d", "IterNorm2d-bare", "ConvNorm2d"])
def test_export_of_evaluation(layer: str) -> None:
    """A program with a free batch size is saved and loaded; the file knows the op by name."""
    module = LAYERS[layer]()
    x = data("NCHW", torch.float32)
    module(x)
    module.eval()
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    names = {str(node.target) for node in loaded.graph.nodes if node.op == "call_function"}
    assert any(name.startswith("normkernels.") for name in names)
    for samples in (3, 11):
        other = inputs.gaussian((samples, *x.shape[1:]), dtype=torch.float32)
        assert_same(values_and_gradients(loaded.module(), other), values_and_gradients(module, other))
