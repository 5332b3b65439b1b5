"""Which backend serves an op, and how to choose one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import normkernels as nk
import tests.oracles.run
from normkernels.ops import _library, _triton
from tests.oracles import inputs
from tests.oracles.run import Config, incoming_gradient, oracle, plain_path, run
from tests.tolerances import assert_iter_norm

OPS = _library.ops()
MISSING = [name for name in _library.BACKENDS if not _library.availability(name)[0]]


@pytest.fixture
def x() -> Tensor:
    return inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32)


def test_the_names() -> None:
    """Fastest first; eager serves everything everywhere, so it is last."""
    assert _library.BACKENDS == ("cuda", "triton", "eager")


@pytest.mark.parametrize("op", OPS)
def test_eager_serves_every_op_on_a_cpu(op: str, x: Tensor) -> None:
    assert nk.backend_of(op, x) == "eager"
    backend, reason = _library.explain(op, x)
    assert backend == "eager" and reason


def test_the_reason_names_each_faster_backend(x: Tensor) -> None:
    """'Why is it slow here?' is answered for every backend that was passed over."""
    reason = _library.explain("iter_norm", x)[1]
    assert all(name in reason for name in MISSING)


def test_a_choice_is_a_reason(x: Tensor) -> None:
    with nk.use_backend("eager"):
        assert "use_backend" in _library.explain("iter_norm", x)[1]


def test_unknown_op(x: Tensor) -> None:
    with pytest.raises(ValueError, match="iter_norm") as raised:
        nk.backend_of("iternorm", x)
    assert "'iternorm'" in str(raised.value)


def test_backend_of_wants_a_tensor() -> None:
    with pytest.raises(TypeError, match=r"torch\.Tensor.*str"):
        nk.backend_of("iter_norm", "cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["auto", "eager"])
def test_use_backend_gives_the_same_bits(name: str, x: Tensor) -> None:
    expected = run(nk.ops.iter_norm, Config(), x, incoming_gradient(x))
    with nk.use_backend(name):
        got = run(nk.ops.iter_norm, Config(), x, incoming_gradient(x))
        assert nk.backend_of("iter_norm", x) == "eager"
    assert torch.equal(got.y, expected.y) and torch.equal(got.dx, expected.dx)


@pytest.mark.parametrize("name", ["cudnn", "EAGER", "", None])
def test_unknown_backend(name: object) -> None:
    with pytest.raises(ValueError, match=r"cuda.*triton.*eager") as raised, nk.use_backend(name):  # type: ignore[arg-type]
        pytest.fail("the block must not run")
    assert repr(name) in str(raised.value)


@pytest.mark.skipif(not MISSING, reason="every backend is available here")
@pytest.mark.parametrize("name", MISSING)
def test_backend_that_cannot_run_here(name: str) -> None:
    """RuntimeError with the reason, not a silent fallback."""
    _, reason = _library.availability(name)
    assert reason
    with pytest.raises(RuntimeError) as raised, nk.use_backend(name):
        pytest.fail("the block must not run")
    assert name in str(raised.value) and reason in str(raised.value)


def served_by(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes a backend available that notes which ops it served, and gives eager's results."""
    calls: list[str] = []
    monkeypatch.setattr(_triton, "installed", lambda: True)
    monkeypatch.setattr(_triton, "interpreted", lambda: True)
    implementations = _library._IMPLEMENTATIONS["iter_norm"]

    def noting(*args: object) -> object:
        calls.append("iter_norm")
        return implementations["eager"](*args)

    monkeypatch.setitem(implementations, "triton", noting)
    return calls


def test_another_backend_takes_over_inside_the_block_only(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    """Through PyTorch's own dispatcher: the raw op changes hands, and is given back, after an error too."""
    calls = served_by(monkeypatch)
    nk.ops.iter_norm(x, 8)
    assert calls == []
    with nk.use_backend("triton"):
        y = nk.ops.iter_norm(x, 8)[0]
        assert calls == ["iter_norm"] and nk.backend_of("iter_norm", x) == "triton"
    with pytest.raises(KeyError), nk.use_backend("triton"):
        raise KeyError
    assert torch.equal(nk.ops.iter_norm(x, 8)[0], y)
    assert calls == ["iter_norm"] and nk.backend_of("iter_norm", x) == "eager"


def test_backend_without_an_op_leaves_it_to_eager(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    """A backend may implement one op only; backend_of must say who really serves the others."""
    served_by(monkeypatch)
    monkeypatch.delitem(_library._IMPLEMENTATIONS["moments"], "triton")
    with nk.use_backend("triton"):
        count, mean, _ = nk.ops.moments(x, 8)
        assert nk.backend_of("moments", x) == "eager"
        assert nk.backend_of("iter_norm", x) == "triton"
    assert count == x.numel() // 8 and torch.equal(mean, nk.ops.moments(x, 8)[1])


def test_nested(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    """The innermost block wins, without a warning about overridden kernels, and the outer one holds again after it."""
    calls = served_by(monkeypatch)
    with nk.use_backend("triton"):
        with nk.use_backend("eager"):
            nk.ops.iter_norm(x, 8)
            assert calls == [] and nk.backend_of("iter_norm", x) == "eager"
        nk.ops.iter_norm(x, 8)
        assert calls == ["iter_norm"] and nk.backend_of("iter_norm", x) == "triton"
    assert nk.backend_of("iter_norm", x) == "eager"


def test_auto_inside_a_choice(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    """The default order, inside of another choice too: backend_of and the op agree on it."""
    calls = served_by(monkeypatch)
    with nk.use_backend("triton"), nk.use_backend("auto"):
        nk.ops.iter_norm(x, 8)
        assert (calls == ["iter_norm"]) == (nk.backend_of("iter_norm", x) == "triton")


PROGRAM = """
import torch, normkernels as nk
x = torch.randn(9, 4)
with nk.use_backend("eager"):
    nk.ops.iter_norm(x)
print(nk.backend_of("iter_norm", nk.ops.iter_norm(x)[0]))
"""


def import_with(backend: str | None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "NORMKERNELS_BACKEND"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    if backend is not None:
        environment["NORMKERNELS_BACKEND"] = backend
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("backend", [None, "eager"])
def test_environment(backend: str | None) -> None:
    """Also with a use_backend block inside of that choice, and without a word on stderr."""
    done = import_with(backend)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "eager", "")


def test_unknown_backend_in_the_environment() -> None:
    done = import_with("fast")
    assert done.returncode != 0
    assert "ValueError: NORMKERNELS_BACKEND" in done.stderr and "eager" in done.stderr and "'fast'" in done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("layout", inputs.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["newton", "eigh"])
def test_eager_on_cuda(layout: str, dtype: torch.dtype, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fallback runs on every device unchanged, and TF32 does not reach it."""
    shape, lay_out = inputs.LAYOUTS[layout]
    config = Config(method=method, eps=1e-3)
    x = lay_out(inputs.gaussian(shape, dtype=dtype))
    dy = incoming_gradient(x)
    expected = oracle(config, x, dy), plain_path(config, x, dy)
    monkeypatch.setattr(tests.oracles.run, "device", torch.device("cuda", 0))
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with nk.use_backend("eager"):
            got = run(nk.ops.iter_norm, config, x, dy)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
    assert_iter_norm(got, *expected, x, dy, None, config)
