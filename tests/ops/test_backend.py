"""Which backend serves an op, and how to choose one."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import normkernels as nk
import tests.oracles.run
from normkernels import _warnings
from normkernels.dispatch import choose, compiled, define, fallback, record
from normkernels.triton import support
from tests.oracles import inputs
from tests.oracles.run import Config, incoming_gradient, oracle, plain_path, run
from tests.tolerances.whitening import assert_iter_norm

OPS = define.ops()
MISSING = [name for name in choose.BACKENDS if not choose.availability(name)[0]]


@pytest.fixture
def x() -> Tensor:
    return inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32)


def test_the_names() -> None:
    """The fastest is first; eager serves everything everywhere, so it is last."""
    assert choose.BACKENDS == ("cuda", "triton", "eager")


@pytest.mark.parametrize("op", OPS)
def test_eager_serves_every_op_on_a_cpu(op: str, x: Tensor) -> None:
    assert nk.backend_of(op, x) == "eager"
    backend, reason = choose.explain(op, x)
    assert backend == "eager" and reason


def test_the_reason_names_each_faster_backend(x: Tensor) -> None:
    """'Why is it slow here?' is answered for every backend that was passed over."""
    reason = choose.explain("iter_norm", x)[1]
    assert all(name in reason for name in MISSING)


def test_a_choice_is_a_reason(x: Tensor) -> None:
    with nk.use_backend("eager"):
        assert "use_backend" in choose.explain("iter_norm", x)[1]


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
    """There is a RuntimeError with the reason, not a silent fallback."""
    _, reason = choose.availability(name)
    assert reason
    with pytest.raises(RuntimeError) as raised, nk.use_backend(name):
        pytest.fail("the block must not run")
    assert name in str(raised.value) and reason in str(raised.value)


def served_by(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make a backend available that notes which ops it served, and gives eager's results."""
    calls: list[str] = []
    monkeypatch.setattr(support, "installed", lambda: True)
    monkeypatch.setattr(support, "interpreted", lambda: True)
    implementations = record._IMPLEMENTATIONS["iter_norm"]

    def noting(*args: object) -> object:
        calls.append("iter_norm")
        return implementations["eager"](*args)

    monkeypatch.setitem(implementations, "triton", noting)
    return calls


def test_another_backend_takes_over_inside_the_block_only(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    """PyTorch's own dispatcher does it: the raw op changes hands, and is given back, after an error too."""
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
    monkeypatch.delitem(record._IMPLEMENTATIONS["moments"], "triton")
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
    """It is the default order, inside of another choice too: backend_of and the op agree on it."""
    calls = served_by(monkeypatch)
    with nk.use_backend("triton"), nk.use_backend("auto"):
        nk.ops.iter_norm(x, 8)
        assert (calls == ["iter_norm"]) == (nk.backend_of("iter_norm", x) == "triton")


# --- the order ------------------------------------------------------------------------------------------------------


@pytest.fixture
def ordered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Yield a function that sets NORMKERNELS_BACKEND_ORDER to a file with its text."""

    def order(text: str) -> None:
        path = tmp_path / "order.json"
        path.write_text(text)
        monkeypatch.setenv("NORMKERNELS_BACKEND_ORDER", str(path))
        choose.order.cache_clear()

    yield order
    choose.order.cache_clear()


def test_the_order_names_every_backend_and_ends_with_eager() -> None:
    for op, backends in choose.ORDER.items():
        assert op in ("default", *OPS)
        assert sorted(backends) == sorted(choose.BACKENDS) and backends[-1] == "eager"


def test_an_order_of_ones_own(ordered: Callable[[str], None]) -> None:
    ordered('{"whiten": ["triton", "cuda", "eager"], "default": ["cuda", "eager"]}')
    assert choose._candidates("whiten") == ("triton", "cuda")
    assert choose._candidates("moments") == ("cuda",)
    assert choose._next_backends("whiten") == ("eager",)
    assert choose._next_backends("moments") == ("eager",)


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ('["cuda", "eager"]', "a list"),
        ('{"whitening": ["eager"]}', "the op 'whitening'"),
        ('{"whiten": ["eager", "cuda"]}', "['eager', 'cuda'] for whiten"),
        ('{"whiten": ["cuda", "cuda", "eager"]}', "['cuda', 'cuda', 'eager'] for whiten"),
        ('{"whiten": ["cpu", "eager"]}', "['cpu', 'eager'] for whiten"),
        ('{"whiten": "eager"}', "'eager' for whiten"),
        ('{"whiten": [1, "eager"]}', "[1, 'eager'] for whiten"),
        ("{", "Expecting"),
    ],
)
def test_a_bad_order_is_named(text: str, got: str, ordered: Callable[[str], None]) -> None:
    ordered(text)
    with pytest.raises(
        ValueError, match=r"NORMKERNELS_BACKEND_ORDER: expected .*order\.json to be a JSON object"
    ) as raised:
        choose.order()
    assert got in str(raised.value)


# --- compiled kernels -----------------------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pretend that the extension has registered a kernel for iter_norm, and serves CPU tensors."""
    monkeypatch.setattr(compiled, "availability", lambda: (True, "compiled CUDA kernels for sm_0"))
    monkeypatch.setattr(compiled, "registered", lambda op, key: op == "iter_norm")
    yield
    monkeypatch.undo()
    choose._choose("auto")


def registered_by_python(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"normkernels::{op}", key)


def test_a_compiled_kernel_shows_through(served: None) -> None:
    """Python has nothing in its place, unless another backend is chosen, or on a CPU in the default order."""
    with nk.use_backend("cuda"):
        assert not registered_by_python("iter_norm", "CPU") and not registered_by_python("iter_norm", "CUDA")
        assert registered_by_python("moments", "CPU") and registered_by_python("moments", "CUDA")
        with nk.use_backend("eager"):
            assert registered_by_python("iter_norm", "CPU") and registered_by_python("iter_norm", "CUDA")
        with nk.use_backend("auto"):
            assert registered_by_python("iter_norm", "CPU") and not registered_by_python("iter_norm", "CUDA")


def test_the_order_decides(served: None, ordered: Callable[[str], None]) -> None:
    ordered('{"iter_norm": ["triton", "cuda", "eager"]}')
    with nk.use_backend("auto"):
        assert registered_by_python("iter_norm", "CUDA") == support.installed()
    ordered('{"iter_norm": ["eager"]}')
    with nk.use_backend("auto"):
        assert registered_by_python("iter_norm", "CUDA")


class OnGpu:
    """A stand-in with as much of a CUDA tensor as there can be without a GPU."""

    is_cuda = True
    device, dtype = torch.device("cuda", 0), torch.float32


def test_who_serves_and_why(served: None, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = []
    monkeypatch.setattr(compiled, "refusal", lambda op, device, dtype, **_: refusals[-1])
    monkeypatch.setattr(support, "check_supported", lambda tensor, **_: None)
    monkeypatch.setattr(support, "installed", lambda: True)
    monkeypatch.setattr(support, "interpreted", lambda: True)
    monkeypatch.setattr(choose, "isinstance", lambda *_: True, raising=False)
    with nk.use_backend("auto"):
        refusals.append("")
        assert choose.explain("iter_norm", OnGpu()) == ("cuda", "compiled CUDA kernels for sm_0")  # type: ignore[arg-type]
        assert choose.explain("moments", OnGpu())[0] == "triton"  # type: ignore[arg-type]
        refusals.append("expected another group")
        assert choose.explain("iter_norm", OnGpu())[0] == "triton"  # type: ignore[arg-type]
    with nk.use_backend("triton"), nk.use_backend("cuda"):
        assert choose.explain("iter_norm", OnGpu())[0] == "triton"  # type: ignore[arg-type]
        refusals.append("")
        assert choose.explain("iter_norm", OnGpu()) == ("cuda", "chosen by use_backend or NORMKERNELS_BACKEND")  # type: ignore[arg-type]


def test_the_extension_is_not_tried_without_cuda() -> None:
    """A torch without CUDA lacks the libraries that the extension is linked with."""
    if torch.version.cuda is None:
        assert compiled.load() == (None, f"torch {torch.__version__} is built without CUDA")


# --- what a compiled kernel hands on --------------------------------------------------------------------------------


@pytest.fixture
def handed_on(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> Callable[..., Any]:
    """Return a function that calls moments of x as C++ does, with a reason."""
    monkeypatch.setattr(_warnings, "warned", set())
    return lambda reason, x=x: torch.ops.normkernels_next.moments(x, 8, False, list(reason.encode()))


def test_every_op_has_a_next_one() -> None:
    for op in OPS:
        schema = str(getattr(torch.ops.normkernels, op).default._schema)
        expected = schema.replace("normkernels::", "normkernels_next::").replace("str ", "int[] ")
        expected = expected.replace(") ->", ", int[] reason) ->")
        assert str(getattr(torch.ops.normkernels_next, op).default._schema) == expected


def test_it_warns_once_for_each_reason(handed_on: Callable[..., Any], x: Tensor) -> None:
    for reason in ("expected smaller groups", "expected a newer GPU"):
        with pytest.warns(UserWarning, match=f"^moments: plain PyTorch instead of the CUDA kernels: {reason}$"):
            mean, _, cov = handed_on(reason)
        handed_on(reason)
    expected = nk.ops.moments(x, 8)
    assert torch.equal(mean.float(), expected[1]) and torch.equal(cov, expected[2])


def test_without_a_reason_nothing_is_said(handed_on: Callable[..., Any]) -> None:
    handed_on("")


@pytest.mark.parametrize("reason", ["expected smaller groups", ""])
def test_triton_is_next_on_a_gpu(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it cannot serve either, one warning says so, whichever of the two has something to say."""
    monkeypatch.setattr(support, "installed", lambda: True)
    monkeypatch.setattr(fallback, "device_of", lambda args: torch.device("cuda"))
    monkeypatch.setattr(_warnings, "warned", set())
    refusals = [""]

    def kernels(*args: object) -> str:
        if refusals[-1]:
            raise support.Unsupported(refusals[-1])
        return "triton"

    serve = fallback.handed_on("moments", kernels, lambda *args: ("eager", *args[1:]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert serve(None, 8, reason.encode()) == "triton"
        refusals.append("expected another type")
        assert serve(None, 8, reason.encode()) == ("eager", 8)
    said = [str(warning.message) for warning in caught]
    if reason:
        assert said == [f"moments: {who} instead of the CUDA kernels: {reason}" for who in ("Triton", "plain PyTorch")]
    else:
        assert said == ["moments: plain PyTorch instead of the Triton kernels: expected another type"]


def test_an_error_leaves_its_text_for_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    extension = type("Extension", (), {"set_error": staticmethod(texts.append)})
    monkeypatch.setattr(compiled, "load", lambda: (extension, ""))

    def broken(*args: object) -> object:
        raise ValueError("expected better")

    with pytest.raises(ValueError, match="expected better"):
        fallback.reporting(broken)()
    assert texts == ["ValueError: expected better"]


# --- from the outside -----------------------------------------------------------------------------------------------


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
    """A use_backend block works inside of that choice, too, and nothing is written to stderr."""
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
