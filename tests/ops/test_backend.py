"""Which backend serves an op, and how to choose one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import normkernels as nk
from normkernels import _warnings
from normkernels.dispatch import choose, compiled, fallback
from normkernels.dispatch.record import IMPLEMENTATIONS, OPS
from normkernels.triton import support
from tests.oracles import inputs
from tests.oracles.run import Config, incoming_gradient, run

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
    implementations = IMPLEMENTATIONS["iter_norm"]

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
    monkeypatch.delitem(IMPLEMENTATIONS["moments"], "triton")
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
    for device, table in choose.ORDER.items():
        assert device in choose.KEYS and "default" in table
        for op, backends in table.items():
            assert op in ("default", *OPS) and set(backends) <= set(choose.BACKENDS) and backends[-1] == "eager"
    assert sorted(choose.ORDER["cuda"]["default"]) == sorted(choose.BACKENDS)


def test_an_order_of_ones_own(ordered: Callable[[str], None]) -> None:
    table = '{"whiten": ["triton", "cuda", "eager"], "default": ["cuda", "eager"]}'
    for text in (table, f'{{"cuda": {table}}}'):
        ordered(text)
        with nk.use_backend("auto"):
            assert choose.candidates("whiten", "cuda") == ("triton", "cuda", "eager")
            assert choose.candidates("moments", "cuda") == ("cuda", "eager")
            assert choose.candidates("whiten", "cpu") == choose.candidates("whiten", "xpu") == ("eager",)


def test_an_order_for_a_cpu(ordered: Callable[[str], None], x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device's own order decides there, as it will for kernels that are compiled for it."""
    ordered('{"cpu": {"iter_norm": ["triton", "eager"]}}')
    calls = served_by(monkeypatch)
    with nk.use_backend("auto"):
        nk.ops.iter_norm(x, 8)
        assert nk.backend_of("iter_norm", x) == "triton" and nk.backend_of("moments", x) == "eager"
    assert calls == ["iter_norm"]


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
        ('{"cpu": ["eager"]}', "a list for a device"),
        ('{"cpu": {"whiten": "eager"}}', "'eager' for whiten"),
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
    monkeypatch.setattr(compiled, "refusal", lambda op, request: refusals[-1])
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
def refused(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that gives the reason why the compiled kernels serve no call."""
    monkeypatch.setattr(_warnings, "warned", set())
    monkeypatch.setattr(compiled, "compiled_for", lambda device: True)
    return lambda reason: monkeypatch.setattr(compiled, "refusal", lambda op, request: reason)


def test_every_op_has_a_next_one() -> None:
    for op in OPS:
        schema = str(getattr(torch.ops.normkernels, op).default._schema)
        next_schema = str(getattr(torch.ops.normkernels_next, op).default._schema)
        assert next_schema == schema.replace("normkernels::", "normkernels_next::")


def test_it_warns_once_for_each_reason(refused: Callable[[str], None], x: Tensor) -> None:
    for reason in ("expected smaller groups", "expected a newer GPU"):
        refused(reason)
        with pytest.warns(UserWarning, match=f"^moments: plain PyTorch instead of the CUDA kernels: {reason}$"):
            mean, _, cov = torch.ops.normkernels_next.moments(x, 8, False)
        torch.ops.normkernels_next.moments(x, 8, False)
    expected = nk.ops.moments(x, 8)
    assert torch.equal(mean.float(), expected[1]) and torch.equal(cov, expected[2])


def test_a_gpu_that_was_not_compiled_for_is_one_reason(
    refused: Callable[[str], None], x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused("expected sm_80, got sm_75")
    monkeypatch.setattr(compiled, "compiled_for", lambda device: False)
    with pytest.warns(UserWarning, match="^plain PyTorch instead of the CUDA kernels: expected sm_80, got sm_75$"):
        torch.ops.normkernels_next.moments(x, 8, False)
    torch.ops.normkernels_next.cross_moments(x, x, torch.zeros(8), 8)


def test_without_a_reason_nothing_is_said(refused: Callable[[str], None], x: Tensor) -> None:
    refused("")
    torch.ops.normkernels_next.moments(x, 8, False)


@pytest.mark.parametrize("reason", ["expected smaller groups", ""])
def test_triton_is_next_on_a_gpu(
    reason: str, refused: Callable[[str], None], x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it cannot serve either, one warning says so."""
    refused(reason)
    unsupported = [""]

    def check_supported(tensor: Tensor, **_: object) -> None:
        if unsupported[-1]:
            raise support.Unsupported(unsupported[-1])

    def served_by(backend: str) -> Callable[..., str]:
        return lambda *args: backend

    monkeypatch.setattr(choose, "candidates", lambda op, device: choose.BACKENDS)  # as on a GPU
    monkeypatch.setattr(choose, "availability", lambda backend: (True, ""))
    monkeypatch.setattr(choose, "_chosen", "triton")  # it serves a CPU tensor only then
    monkeypatch.setattr(support, "check_supported", check_supported)
    for backend in ("triton", "eager"):
        monkeypatch.setitem(IMPLEMENTATIONS["moments"], backend, served_by(backend))
    serve = fallback.from_compiled(OPS["moments"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert serve(x, 8, False) == "triton"
        unsupported.append("expected another type")
        assert serve(x, 8, False) == "eager"
    said = [str(warning.message) for warning in caught]
    assert said == [
        f"moments: {who} instead of the CUDA kernels: {reason}" for who in ("Triton", "plain PyTorch") if reason
    ]
