"""The Triton backend: what it serves, how it is launched and configured, and what it promises beside its values.

Its values are tested where every backend's are (fixture ``backend``): test_moments, test_whiten, test_inverse_sqrt,
test_iter_norm, test_iter_norm_guarantees, test_pop_norm, test_precondition and test_spectral_kernels run once more with
its kernels. test_triton_diagonal is about those for single channels and for gradients, test_triton_spectral about the
spectrum of ConvNorm's weights.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import normkernels as nk
from normkernels import _warnings
from normkernels.dispatch import choose, define
from normkernels.triton import configs, launch, support
from tests import backends
from tests.oracles import inputs, iternorm
from tests.oracles.run import Config, incoming_gradient, oracle, run
from tests.tolerances import assert_within, largest
from tests.tolerances.moments import cov_floor, mean_floor
from tests.tolerances.whitening import exactly_centered

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
PACKAGE = Path(nk.__file__).parent
pytestmark = [
    pytest.mark.skipif(not choose.availability("triton")[0], reason="neither a GPU nor TRITON_INTERPRET=1"),
]
ACTIVATIONS = ("partial_moments", "partial_cross", "mix_kernel")


def gaussian(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    return inputs.gaussian(shape, dtype=dtype, **options).to(DEVICE)


def step(x: Tensor, group_size: int = 8, **options: Any) -> list[Tensor]:
    """Return y, mean, W and all gradients of one training step with gamma and beta."""
    parameters = [torch.linspace(-1, 2, x.shape[1], device=x.device).to(x.dtype) for _ in range(2)]
    leaves = [value.detach().requires_grad_() for value in (x, *parameters)]
    y, mean, W = nk.ops.iter_norm(leaves[0], group_size, weight=leaves[1], bias=leaves[2], **options)
    return [y.detach(), mean, W, *torch.autograd.grad(y, leaves, incoming_gradient(y.detach().cpu()).to(x.device))]


# --- what it serves -------------------------------------------------------------------------------------------------


@pytest.fixture
def unwarned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_warnings, "warned", set())


@pytest.mark.usefixtures("unwarned")
@pytest.mark.parametrize(
    ("dtype", "channels", "reason"),
    [(torch.float64, 8, "float64"), (torch.float32, 136, "at most 128 channels, got 136")],
    ids=["float64", "wide-group"],
)
def test_what_it_does_not_serve_falls_back_with_one_warning(dtype: torch.dtype, channels: int, reason: str) -> None:
    x = gaussian((150, channels), dtype, group_size=channels)
    with nk.use_backend("eager"):
        expected = step(x, channels)
    with nk.use_backend("triton"):
        with pytest.warns(UserWarning, match=reason) as caught:
            got = step(x, channels)
        assert nk.backend_of("iter_norm", x, group_size=channels) == "eager"
        assert reason in choose.explain("iter_norm", x, group_size=channels)[1]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step(x, channels)
    assert len(caught) == 2  # one for the op, one for its backward
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.usefixtures("unwarned")
def test_an_old_gpu_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "properties", lambda device: support.Device(75, 40))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    x = gaussian((9, 8))
    with nk.use_backend("triton"), pytest.warns(UserWarning, match=r"compute capability 8\.0 or newer, got an old GPU"):
        nk.ops.moments(x, 8)
    with nk.use_backend("triton"):
        assert nk.backend_of("moments", x) == "eager"


@pytest.mark.skipif(not ON_GPU, reason="asked on a GPU only")
@pytest.mark.gpu
def test_a_triton_that_does_not_work_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "defect", lambda: "RuntimeError: Failed to find C compiler")
    assert "Failed to find C compiler" in choose.explain("iter_norm", gaussian((9, 8)))[1]


def test_the_defect_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU Triton has no driver, which is such a defect."""
    from triton.runtime import driver

    class Broken:
        def get_current_target(self) -> None:
            raise RuntimeError("Failed to find C compiler.\nmore")

    monkeypatch.setattr(driver, "_active", Broken())
    assert support.defect.__wrapped__() == "RuntimeError: Failed to find C compiler."


@pytest.mark.usefixtures("unwarned")
def test_a_kernel_that_does_not_compile_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration of one's own may take too much shared memory, for example. An error of the GPU stays one."""
    from triton.runtime.errors import OutOfResources

    class Kernel:
        fn = test_plane_limit_is_in_the_answer
        error: Exception = OutOfResources(300000, 232448, "shared memory")

        def __getitem__(self, grid: object) -> Any:
            raise self.error

    monkeypatch.setattr(support, "interpreted", lambda: False)
    given: dict[str, Any] = {"config": configs.Config(1, 1, 1, "ieee"), "device": torch.device("cpu")}
    with pytest.raises(support.Unsupported, match=r"to compile with .*shared memory"):
        launch.launch(Kernel(), (1,), **given)
    Kernel.error = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        launch.launch(Kernel(), (1,), **given)


def test_a_missing_entry_is_in_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian((2, 128, 7, 7), group_size=128)
    with nk.use_backend("triton"):
        assert nk.backend_of("iter_norm", x, group_size=128) == "triton"
        monkeypatch.setattr(support, "architecture", lambda device: 80)
        assert nk.backend_of("iter_norm_backward", x, group_size=128) == "eager"
        assert "cross_moments, size 128, odd, float32" in choose.explain("iter_norm_backward", x, group_size=128)[1]


def test_plane_limit_is_in_the_answer() -> None:
    z = gaussian((2, 8, 5, 3))
    with nk.use_backend("triton"):
        assert nk.backend_of("spectral_filter", z, plane=(64, 64)) == "triton"
        assert nk.backend_of("spectral_filter", z, plane=(65, 3)) == "eager"
        assert "at most 64 x 64, got (65, 3)" in choose.explain("spectral_filter", z, plane=(65, 3))[1]


@pytest.mark.skipif(ON_GPU, reason="about tensors on a CPU")
def test_a_cpu_tensor_is_eagers_unless_triton_is_chosen() -> None:
    x = gaussian((9, 8))
    assert nk.backend_of("iter_norm", x) == "eager"
    assert "unless use_backend chooses it" in choose.explain("iter_norm", x)[1]
    with nk.use_backend("triton"):
        assert nk.backend_of("iter_norm", x) == "triton"


@pytest.mark.skipif(ON_GPU, reason="about machines without a GPU")
def test_without_the_interpreter_a_cpu_cannot_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match=r"no CUDA device .*TRITON_INTERPRET=1"), nk.use_backend("triton"):
        pass


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "installed", lambda: False)
    with pytest.raises(RuntimeError, match="triton is not installed"), nk.use_backend("triton"):
        pass
    assert "triton is not installed" in choose.explain("iter_norm", gaussian((9, 8)))[1]


def test_every_op_has_kernels() -> None:
    with nk.use_backend("triton"):
        assert {nk.backend_of(op, gaussian((2, 8, 8))) for op in define.ops()} == {"triton"}


def test_importing_the_package_does_not_import_triton() -> None:
    """It takes half a second, and those without a GPU never need it."""
    program = "import sys, normkernels; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300, env={"PYTHONPATH": ":".join(sys.path)})


# --- launches -------------------------------------------------------------------------------------------------------


class Launches(list[tuple[str, dict[str, Any]]]):
    """The kernels that were launched, and with what."""

    def names(self) -> list[str]:
        return [name for name, _ in self]


# Modules that launch kernels on activations, small matrices and gradients.
LAUNCHERS = (
    *(
        f"normkernels.primitives.{name}.triton"
        for name in ("moments", "inverse_sqrt", "whiten", "iter_norm", "pop_norm", "precondition")
    ),
    "normkernels.triton.diagonal",
)


def note_launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Note every launch, and make it."""
    noted = Launches()
    for module in LAUNCHERS:

        def noting(kernel: Any, grid: Any, *arguments: Any, **options: Any) -> None:
            noted.append((kernel.fn.__name__, {**options, "grid": grid, "arguments": arguments}))
            launch.launch(kernel, grid, *arguments, **options)

        monkeypatch.setattr(importlib.import_module(module), "launch", noting)
    return noted


launches = pytest.fixture(note_launches)


def test_launches_of_a_training_step(launches: Launches) -> None:
    with nk.use_backend("triton"):
        step(gaussian((6, 16, 5, 3)))
    assert launches.names() == [
        "partial_moments", "finish_forward", "mix_kernel", "partial_cross", "finish_backward", "mix_kernel",
    ]  # fmt: skip


def test_launches_of_inference(launches: Launches) -> None:
    layer = nk.IterNorm2d(16, group_size=8, device=DEVICE).eval()
    with nk.use_backend("triton"), torch.no_grad():
        layer(gaussian((6, 16, 5, 3)))
    assert launches.names() == ["mix_kernel"]


def test_launches_of_the_primitives(launches: Launches) -> None:
    x = gaussian((6, 16, 5, 3))
    with nk.use_backend("triton"), torch.no_grad():
        _, mean, cov = nk.ops.moments(x, 8)
        assert launches.names() == ["partial_moments", "finish_moments"]
        nk.ops.inverse_sqrt(cov)
        assert launches.names()[2:] == ["inverse_sqrt_kernel"]
        nk.ops.cross_moments(x, x, mean, 8)
        assert launches.names()[3:] == ["partial_cross", "finish_cross"]


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NCHW-channel-slice", "NC", "NCHW-every-other-sample"])
def test_data_is_read_in_place(layout: str, launches: Launches) -> None:
    """The kernels get x's own memory, whatever its strides: no copy is made first."""
    shape, lay_out = inputs.LAYOUTS[layout]
    x = lay_out(inputs.gaussian(shape, dtype=torch.float32)).to(DEVICE)
    with nk.use_backend("triton"):
        nk.ops.iter_norm(x, 8)
    for name, seen in launches:
        if name in ACTIVATIONS:
            assert seen["arguments"][0].data_ptr() == x.data_ptr()


# Elements of x and dy: the tile that gives a part its shift is read twice. Once more for each further block of rows.
@pytest.mark.skipif(ON_GPU, reason="the interpreter counts")
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_passes_over_the_data(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward reads x twice and writes y once, backward reads x and dy twice and writes dx once, as BatchNorm does."""
    from triton.runtime.interpreter import InterpreterBuilder

    shape, lay_out = inputs.LAYOUTS[layout]
    x = lay_out(inputs.gaussian(shape, dtype=torch.float32))
    dy = incoming_gradient(x)
    touched: Counter[str] = Counter()
    places = {"x": x, "dy": dy}

    def count(kind: str, pointers: Any, mask: Any) -> None:
        addresses = pointers.data[mask.data] if mask is not None else pointers.data
        for name, tensor in places.items():
            start, stop = tensor.data_ptr(), tensor.data_ptr() + 4 * tensor.numel()
            touched[f"{name} {kind}"] += int(np.count_nonzero((addresses >= start) & (addresses < stop)))

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        count("read", pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        touched["written"] += int(np.count_nonzero(mask.data)) if pointers.data.ndim == 2 else 0
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
    with nk.use_backend("triton"):
        _, mean, W, S, scale = torch.ops.normkernels.iter_norm(x, None, None, 8, 5, 1e-5, False, False)
        block = configs.configuration("moments", 16, launch.columns(x).layout, x.dtype, 80).block
        cut = launch.split(x.numel() // 8, 1, block, DEVICE)
        assert cut.parts > 1
        assert touched["x read"] == 2 * x.numel() + 8 * sum(
            min(block, x.numel() // 8 - part * cut.chunk) for part in range(cut.parts)
        )
        touched.clear()
        torch.ops.normkernels.iter_norm_backward(dy, x, None, mean, W, S, scale, 5, False, False)
        assert touched == {"x read": 2 * x.numel(), "dy read": 2 * x.numel()}
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
        touched.clear()
        torch.ops.normkernels.whiten(x, mean, W, None, None)
        assert touched == {"x read": x.numel(), "dy read": 0, "written": x.numel()}


@pytest.mark.parametrize("d", [16, 64, 128])
def test_a_wide_group_is_mixed_by_several_programs(d: int, launches: Launches) -> None:
    x = gaussian((150, d), group_size=d)
    with nk.use_backend("triton"):
        got = step(x, d)
    with nk.use_backend("eager"):
        expected = step(x, d)
    rows = [configs.configuration(name, d, "channels", x.dtype, 80).rows for name in ("mix", "stacked_mix")]
    assert [seen["grid"][0] for name, seen in launches if name == "mix_kernel"] == [max(1, d // row) for row in rows]
    assert d < 128 or rows[0] < d
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


def test_more_than_2_31_columns_are_counted_in_64_bits() -> None:
    """Nothing runs: an expanded tensor has as many columns as one likes."""
    seen: list[dict[str, Any]] = []
    x = torch.zeros(1, 2, 1, device=DEVICE).expand(2**16, 2, 2**15)
    with support.recording(90, lambda kernel, grid, arguments, config, meta: seen.append(meta)):
        from normkernels.primitives.moments.triton import moments

        moments(x, 2, False)
        moments(x[:9], 2, False)
    assert [meta["WIDE"] for meta in seen if "WIDE" in meta] == [True, False]


def test_64_bit_columns_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian((6, 8, 5, 3))
    with nk.use_backend("triton"):
        expected = step(x)
        monkeypatch.setattr(launch.Columns, "wide", True)
        assert all(torch.equal(a, b) for a, b in zip(step(x), expected, strict=True))


@pytest.mark.parametrize("group_size", [8, 1])
@pytest.mark.parametrize("samples", [2, 9, 15, 17])  # the last one's second part has one column
def test_fewer_columns_than_a_tile(samples: int, group_size: int) -> None:
    """The shift is the mean of the columns that a part's first tile has; any other costs digits, at this mean all."""
    x = gaussian((samples, 8), group_size=group_size, mean=1e4)
    with nk.use_backend("triton"):
        _, mean, cov = (value.cpu() if isinstance(value, Tensor) else value for value in nk.ops.moments(x, group_size))
    x = x.cpu()
    mean_ref, cov_ref = iternorm.moments(x.double(), group_size)
    assert_within("mean", mean, mean_ref, None, mean_floor(x), largest(mean_ref))
    assert ((cov.double() - cov_ref).abs() <= cov_floor(x, cov_ref)).all()


@backends.only(*backends.TRITON)
def test_large_means_cost_nothing(backend: str) -> None:
    """The rounding of the mean is taken out of y and of the gradients again; plain PyTorch: test_precision."""
    config = Config(eps=1e-3)
    x = inputs.gaussian((9, 8, 3, 5), dtype=torch.float32, mean=-1e5)
    dy = incoming_gradient(x) + 3  # a mean of its own, which the rounding of x's mean would be multiplied with
    got, reference = run(nk.ops.iter_norm, config, x, dy), oracle(config, x, dy)
    floor = exactly_centered(x, dy, reference, config)
    assert_within("y", got.y, reference.y, None, floor.y, largest(reference.y))
    assert_within("W", got.w, reference.w, None, floor.w, largest(reference.w))
    assert_within("dx", got.dx, reference.dx, None, floor.dx, largest(reference.dx))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_two_runs_agree_bit_by_bit(layout: str, dtype: torch.dtype) -> None:
    shape, lay_out = inputs.LAYOUTS[layout]
    x = lay_out(inputs.gaussian(shape, dtype=dtype)).to(DEVICE)
    with nk.use_backend("triton"):
        assert all(torch.equal(a, b) for a, b in zip(step(x), step(x), strict=True))


# --- torch's machinery ----------------------------------------------------------------------------------------------

LAYERS = {
    "IterNorm": lambda: nk.IterNorm2d(8, group_size=4, device=DEVICE),
    "DBN": lambda: nk.DBN2d(8, group_size=4, device=DEVICE),
    "ConvNorm": lambda: nk.ConvNorm2d(8, 8, 3, padding=1, device=DEVICE),
}


def trained(name: str, layer: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return output and gradients of a training step, then the output in evaluation, and the buffers."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.float().square().mean().backward()
    gradients = {key: parameter.grad for key, parameter in layer.named_parameters()}
    with torch.no_grad():
        evaluated = layer.eval()(x)
    return {"y": y.detach(), "dx": x.grad, "evaluated": evaluated, **gradients, **dict(layer.named_buffers())}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_do_not_change(name: str, autocast: bool) -> None:
    x = gaussian((6, 8, 6, 6))
    results = {}
    for backend in ("eager", "triton"):
        torch.manual_seed(0)
        with nk.use_backend(backend), torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            results[backend] = trained(name, LAYERS[name](), x)
    tolerance = 2e-2 if autocast and name == "ConvNorm" else 1e-4  # whitening gets float32 and stays in it
    for key, expected in results["eager"].items():
        got = results["triton"][key]
        assert got.dtype == expected.dtype and got.stride() == expected.stride(), key
        torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance, msg=key)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
@pytest.mark.parametrize("op", [op for op in define.ops() if op != "precondition"])
def test_opcheck(op: str) -> None:
    from tests.ops.test_library import RAW, arguments, spectral_arguments

    x = inputs.LAYOUTS["NHWC"][1](inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32, group_size=4))
    given = arguments(op, x) if op in RAW else spectral_arguments(op, x)
    given = tuple(value.to(DEVICE) if isinstance(value, Tensor) else value for value in given)
    with nk.use_backend("triton"):
        torch.library.opcheck(getattr(torch.ops.normkernels, op).default, given)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
@pytest.mark.parametrize("name", LAYERS)
def test_compiles_whole(name: str) -> None:
    x = gaussian((6, 8, 6, 6))
    with nk.use_backend("triton"):
        layer = LAYERS[name]()
        expected = layer(x)
        torch._dynamo.reset()
        got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# --- precision and configurations -----------------------------------------------------------------------------------


def kernel_sources() -> Iterator[Path]:
    yield from (*PACKAGE.glob("primitives/*/triton.py"), *PACKAGE.glob("triton/*.py"))


def test_every_product_states_its_precision() -> None:
    """tl.dot's own default for float32 is TF32, three digits."""
    products = [
        (path, node)
        for path in kernel_sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "dot"
    ]
    assert len(products) > 4
    for path, node in products:
        assert "input_precision" in [keyword.arg for keyword in node.keywords], f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    ("ours", "torchs", "dtype", "expected"),
    [
        (True, True, torch.float32, "tf32"),
        (True, False, torch.float32, "tf32x3"),
        (False, True, torch.float32, "tf32x3"),
        (True, True, torch.bfloat16, "bf16x3"),
    ],
)
def test_tf32_only_where_both_ask_for_it(ours: bool, torchs: bool, dtype: torch.dtype, expected: str) -> None:
    from normkernels.primitives.iter_norm.triton import iter_norm, iter_norm_backward

    used: dict[str, str] = {}

    def record(kernel: Any, grid: Any, arguments: Any, config: Any, meta: dict[str, Any]) -> None:
        used[kernel.fn.__name__] = meta["PRECISION"]

    setting: Any = torch.backends.cuda.matmul
    setting.fp32_precision = "tf32" if torchs else "ieee"
    x = gaussian((9, 8), dtype)
    try:
        with support.recording(90, record), nk.use_tf32() if ours else contextlib.nullcontext():
            y, mean, W, S, scale = iter_norm(x, None, None, 8, 5, 1e-5, False, False)
            iter_norm_backward(y, x, None, mean, W, S, scale, 5, False, False)
    finally:
        setting.fp32_precision = "none"
    assert not support.tf32_allowed()
    assert used.pop("mix_kernel") == expected
    assert len(used) == 4 and set(used.values()) == {"tf32x3"}  # statistics and Newton's iteration


def test_the_table_serves_every_architecture() -> None:
    """Entries for sm_80 serve all later ones that have no entries of their own."""
    keys = {key[:4] for key in configs.table()}
    on_sm_80 = {key[:4] for key in configs.table() if key[4] == 80}
    # There one kernel spills whatever its configuration, and the other is never reached; see docs/triton.md.
    assert keys - on_sm_80 == {(name, 128, "odd", "float32") for name in ("cross_moments", "stacked_mix")}
    with support.recording(80, lambda *_: None):  # otherwise the interpreter's
        for key in keys:
            dtype = torch.float32 if key[3] == "float32" else torch.float16
            newest = configs.configuration(*key[:3], dtype, 110)
            assert newest.warps in (1, 2, 4, 8, 16) and newest.block & (newest.block - 1) == 0
        assert configs.configuration("moments", 128, "positions", torch.float32, 120) != configs.configuration(
            "moments", 128, "positions", torch.float32, 100
        )
        oldest = configs.configuration("moments", 64, "positions", torch.float32, 86)
        assert oldest == configs.table()["moments", 64, "positions", "float32", 80]
        with pytest.raises(support.Unsupported, match=r"an entry for moments, size 64.*sm_75"):
            configs.configuration("moments", 64, "positions", torch.float32, 75)


def test_a_table_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NORMKERNELS_TRITON_CONFIGS replaces single entries."""
    row = {"kernel": "moments", "size": 16, "layout": "channels", "type": "float32", "arch": 80,
           "block": 16, "warps": 2, "stages": 1, "precision": "ieee"}  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps([row]))
    monkeypatch.setenv("NORMKERNELS_TRITON_CONFIGS", str(tmp_path / "mine.json"))
    own = configs.table.__wrapped__()
    assert own["moments", 16, "channels", "float32", 80] == configs.Config(16, 2, 1, "ieee")
    assert own["moments", 16, "positions", "float32", 80] == configs.table()["moments", 16, "positions", "float32", 80]


@pytest.mark.parametrize("text", ["", "{}}", "[{}]", '[{"kernel": "mix"}]', '["mix"]', None], ids=str)
def test_a_table_that_is_none(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.json: expected a JSON list of objects with kernel, size.*precision"):
        configs.read_table(path)


@pytest.mark.parametrize("d", [8, 1])
def test_the_answer_knows_the_entries_that_an_op_looks_up(d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """launch.PASSES says which entries these are; the launchers look them up."""
    looked_up: list[str] = []
    singles: tuple[str, ...] = ()

    def noting(kernel: str, size: int, *key: Any) -> configs.Config:
        if kernel not in ("merge", "newton"):
            looked_up.append(kernel)
            assert size == (1 if kernel in singles else configs.tile_size(d))
        return configs.configuration(kernel, size, *key)

    for module in LAUNCHERS:
        if hasattr(importlib.import_module(module), "configuration"):
            monkeypatch.setattr(importlib.import_module(module), "configuration", noting)
    x = gaussian((9, 8))
    raw = torch.ops.normkernels
    found = {}
    with nk.use_backend("triton"):
        mean = raw.moments(x, d, False)[0]
        y, _, W, S, scale = raw.iter_norm(x, None, None, d, 5, 1e-5, False, False)
        options = 4.0, 1e-5, True, True
        calls = {
            "moments": lambda: raw.moments(x, d, False),
            "cross_moments": lambda: raw.cross_moments(x, x, mean, d),
            "whiten": lambda: raw.whiten(x, mean, W, None, None),
            "stacked_mix": lambda: raw.stacked_mix(x, x, mean, mean, torch.cat((W, W), 2), mean),
            "iter_norm": lambda: raw.iter_norm(x, None, None, d, 5, 1e-5, False, False),
            "iter_norm_backward": lambda: raw.iter_norm_backward(y, x, None, mean, W, S, scale, 5, False, False),
            "pop_norm": lambda: raw.pop_norm(x, None, None, *options),
            "pop_norm_backward": lambda: raw.pop_norm_backward(x, x, None, None, mean, mean, *options),
        }
        for op, call in calls.items():
            looked_up.clear()
            singles = launch.PASSES[op] if op.startswith("pop_norm") else ()
            call()
            found[op] = tuple(looked_up)
    assert found == launch.PASSES


def test_a_group_size_beyond_the_channels_is_one_group() -> None:
    x = gaussian((9, 8))
    with nk.use_backend("triton"):
        assert nk.backend_of("iter_norm", x, group_size=256) == "triton"
        with pytest.raises(ValueError, match="divisor of the 8 channels, got 3"):
            nk.backend_of("iter_norm", x, group_size=3)
        with pytest.raises(ValueError, match="plane: expected at least 1, got 0"):
            nk.backend_of("spectral_filter", x, plane=(0, 4))


# Planes of 56, 28, 14 and 7, an odd start, and channels innermost: how many columns one load can take at a time.
@pytest.mark.parametrize(
    ("x", "run", "layout"),
    [
        (torch.zeros(2, 8, 56, 56), 16, "positions"),
        (torch.zeros(2, 8, 14, 14), 4, "positions"),
        (torch.zeros(2, 8, 7, 7), 1, "odd"),
        (torch.zeros(2, 8, 5, 6)[:, :, 1:4], 2, "odd"),
        (torch.zeros(2, 8, 4, 4).contiguous(memory_format=torch.channels_last), 1, "channels"),
        (torch.zeros(9, 8), 1, "channels"),
    ],
    ids=["56", "14", "7", "cropped", "NHWC", "NC"],
)
def test_how_columns_lie_in_memory(x: Tensor, run: int, layout: str) -> None:
    seen = launch.columns(x)
    assert (seen.run, seen.layout) == (run, layout)
    assert seen.total == x.numel() // 8


@pytest.mark.parametrize("total", [1, 63, 64, 65, 1000, 10**7])
@pytest.mark.parametrize("groups", [1, 7, 1000])
def test_parts_cover_the_columns(total: int, groups: int) -> None:
    parts, chunk = launch.split(total, groups, 64, DEVICE)
    assert chunk % 64 == 0 and (parts - 1) * chunk < total <= parts * chunk


# --- GPUs -----------------------------------------------------------------------------------------------------------

SHAPES = {"56x56": (32, 64, 56, 56), "7x7": (64, 128, 7, 7), "wide": (16, 128, 28, 28), "2d": (4096, 96)}


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_real_sizes_on_a_gpu(shape: str, dtype: torch.dtype, channels_last: bool) -> None:
    """There are many parts for each group, full tiles and several waves of programs; two runs agree bit by bit."""
    from tests.oracles.run import oracle, plain_path
    from tests.tolerances.whitening import assert_iter_norm

    d = 128 if shape == "wide" else 32 if shape == "2d" else 64
    x = inputs.gaussian(SHAPES[shape], dtype=dtype, group_size=d, mean=3.0)
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    dy, config = incoming_gradient(x), Config(group_size=d)
    with nk.use_backend("triton"):
        on_gpu = step(x.cuda(), d)
        assert all(torch.equal(a, b) for a, b in zip(on_gpu, step(x.cuda(), d), strict=True))
    from tests.oracles import run as place

    before, place.device = place.device, DEVICE
    try:
        with nk.use_backend("triton"):
            got = run(nk.ops.iter_norm, config, x, dy)
        assert_iter_norm(got, oracle(config, x, dy), plain_path(config, x, dy), x, dy, None, config)
    finally:
        place.device = before


@pytest.mark.gpu
def test_no_synchronization_and_graph_capture() -> None:
    """The host never waits, and a captured step replays on new data."""
    x = gaussian((32, 64, 14, 14), group_size=64)
    with nk.use_backend("triton"):
        step(x, 64)  # compiles the kernels
        torch.cuda.synchronize()
        grad = torch.randn_like(x)
        leaf = x.clone().requires_grad_()
        torch.cuda.set_sync_debug_mode("error")
        try:
            y = nk.ops.iter_norm(leaf, 64)[0]
            torch.autograd.grad(y, leaf, grad)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                torch.autograd.grad(nk.ops.iter_norm(leaf, 64)[0], leaf, grad)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = nk.ops.iter_norm(leaf, 64)[0]
            (dx,) = torch.autograd.grad(y, leaf, grad)
        with torch.no_grad():
            leaf.copy_(gaussian((32, 64, 14, 14), group_size=64, seed=1))
        graph.replay()
        expected = nk.ops.iter_norm(leaf, 64)[0]
        assert torch.equal(y, expected)
        assert torch.equal(dx, torch.autograd.grad(expected, leaf, grad)[0])


@pytest.mark.gpu
def test_two_streams_at_once() -> None:
    inputs_, streams = (
        [gaussian((64, 64, 14, 14), group_size=64, seed=i) for i in range(2)],
        [torch.cuda.Stream() for _ in range(2)],
    )
    with nk.use_backend("triton"):
        expected = [step(x, 64) for x in inputs_]
        torch.cuda.synchronize()
        for _ in range(10):
            got = []
            for x, stream in zip(inputs_, streams, strict=True):
                with torch.cuda.stream(stream):
                    got.append(step(x, 64))
            torch.cuda.synchronize()
            for a, b in zip(got, expected, strict=True):
                assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device() -> None:
    """The kernels run where the data lies, not on the current device."""
    x = gaussian((64, 64, 14, 14), group_size=64)
    with nk.use_backend("triton"):
        expected = step(x, 64)
        got = step(x.to("cuda:1"), 64)
    assert all(torch.equal(a, b.to(a.device)) for a, b in zip(expected, got, strict=True))


@pytest.mark.gpu
def test_triton_serves_cuda_tensors_by_itself() -> None:
    assert nk.backend_of("iter_norm", torch.empty(2, 8, device="cuda")) == "triton"
