"""The Triton backend: what it serves, and torch's machinery around it.

Its values are tested where every backend's are (fixture ``backend``): test_moments, test_whiten, test_inverse_sqrt,
test_iter_norm, test_iter_norm_guarantees, test_pop_norm, test_precondition and test_spectral_kernels run once more with
its kernels. test_triton_launches is about how they are launched, test_triton_configs about the table that says how,
test_triton_diagonal about those for single channels and for gradients, test_triton_spectral about the spectrum of
ConvNorm's weights, and test_triton_gpu about all that needs a GPU.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import normkernels as nk
from normkernels import _warnings
from normkernels.dispatch import choose
from normkernels.dispatch.record import OPS
from normkernels.triton import configs, launch, support
from tests.ops.triton_calls import DEVICE, ON_GPU, gaussian, step
from tests.oracles import inputs

pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(not choose.availability("triton")[0], reason="neither a GPU nor TRITON_INTERPRET=1")


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

    monkeypatch.setattr(launch, "interpreted", lambda: False)
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
        monkeypatch.setattr(launch, "architecture", lambda device: 80)
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
        assert {nk.backend_of(op, gaussian((2, 8, 8))) for op in OPS} == {"triton"}


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
    x = gaussian((2, 8, 6, 6))
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
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    """Check what depends on the backend; test_library.py checks gradients and symbolic shapes."""
    x = inputs.LAYOUTS["NHWC"][1](gaussian(inputs.SHAPE_4D, group_size=4))
    with nk.use_backend("triton"):
        given = next(iter(OPS[op].samples(x, 4)))
        torch.library.opcheck(OPS[op].raw, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
@pytest.mark.parametrize("name", LAYERS)
def test_compiles_whole(name: str) -> None:
    x = gaussian((2, 8, 6, 6))
    with nk.use_backend("triton"):
        layer = LAYERS[name]()
        expected = layer(x)
        torch._dynamo.reset()
        got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
