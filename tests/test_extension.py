"""The compiled CUDA extension, without a GPU: run by `make check-cuda`, skipped where it is not installed."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import normkernels as nk
from normkernels import _build, info
from normkernels.dispatch import choose, compiled
from tests.oracles import inputs

extension, reason = compiled.load()
if extension is None:
    pytest.skip(reason, allow_module_level=True)

REDUCE = ("moments", "cross_moments")
MATRIX = ("inverse_sqrt", "inverse_sqrt_backward")
MIX = ("whiten", "stacked_mix", "iter_norm", "iter_norm_backward")
POP = ("pop_norm", "pop_norm_backward")
SERVED = (*REDUCE, *MATRIX, *MIX, *POP, "spectral_filter", "precondition")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")

# Architecture -> multiprocessors, and the most shared memory of a block: A100, RTX 4090, H100, B200, RTX 5090.
DEVICES = {80: (108, 166912), 89: (128, 101376), 90: (132, 232448), 100: (148, 232448), 120: (170, 101376)}
COMPILED = [arch for arch in DEVICES if not extension.refusal("moments", "float32", 0, [], arch)]


def plan(op, *arguments, architecture=COMPILED[0]):
    return compiled.launches_on((architecture, *DEVICES[architecture]), op, *arguments)


def meta(*shape, dtype=torch.float32):
    """Return a tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def arguments(op, x, d=1):
    """Return arguments for x (N, C, *) and groups of d channels."""
    channels = x.shape[1]
    groups = channels // d
    vector, matrix, scale = meta(channels), meta(groups, d, d), meta(groups, 1)
    return {
        "moments": (x, d, False),
        "cross_moments": (x, x, vector, d),
        "inverse_sqrt": (matrix, 5, 1e-5, False, False),
        "inverse_sqrt_backward": (matrix, matrix, matrix, scale, 5, False, False),
        "whiten": (x, vector, matrix, vector, vector),
        "stacked_mix": (x, x, vector, vector, meta(groups, d, 2 * d), vector),
        "iter_norm": (x, vector, vector, d, 5, 1e-5, False, False),
        "iter_norm_backward": (x, x, vector, vector, matrix, matrix, scale, 5, False, False),
        "pop_norm": (x, vector, vector, 4.0, 1e-5, True, True),
        "pop_norm_backward": (x, x, vector, vector, vector, vector, 4.0, 1e-5, True, True),
    }[op]


# --- what was built ---------------------------------------------------------------------------------------


def test_the_record_in_the_extension_is_that_of_the_build():
    record, build = _build.build_record(compiled.PACKAGE), extension.build
    assert record["built"] is True
    assert build["architectures"] == extension.architectures() == record["architectures"]
    assert record["torch"].startswith(build["torch"])
    assert build["cuda"] == record["nvcc"]
    assert _build.parse_version(build["target"]) == _build.MINIMUM_TORCH
    assert re.match(r"(GCC|Clang) \d+", build["compiler"])


def test_it_registers_what_it_serves_for_cuda_and_nothing_else():
    assert choose._compiled == {(op, "cuda") for op in SERVED}


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
def test_it_needs_nothing_of_torch_but_the_stable_interface():
    """One build then runs with every later torch. Symbols of its C++ classes, or its Python binding, would end that."""
    foreign = re.compile(r"c10|\bat::|torch::|caffe2|pybind11::")
    stable = re.compile(
        r"(aoti_torch|torch|cuda|_?Py|__cuda)[A-Za-z_]|.*@(GLIBC|GLIBCXX|CXXABI|GCC)|_ITM_|__gmon_start__"
    )
    text = subprocess.run(
        ["nm", "-DC", "--undefined-only", extension.__file__], capture_output=True, text=True, check=True
    )
    names = [line.split(maxsplit=1)[1] for line in text.stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert [name for name in names if foreign.search(name)] == []
    standard = re.compile(r"(std|operator|typeinfo|vtable|VTT|__cxa|__gxx|__dynamic_cast|_Unwind)\b")
    assert [name for name in names if not stable.match(name) and not standard.match(name)] == []


# --- plans and refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "d"),
    [
        ((256, 64, 56, 56), 64),
        ((3, 8, 5, 3), 8),
        ((1, 128, 7, 7), 128),
        ((2, 50, 31), 25),
        ((9, 16), 16),
        ((256, 512, 7, 7), 1),
        ((9, 5), 1),
    ],
)
@pytest.mark.parametrize("op", [*REDUCE, *MIX, *POP])
def test_launches_of_a_pass(op, shape, d, dtype, architecture):
    """They fit the device, and move at least the data that the op is about."""
    given = arguments(op, meta(*shape, dtype=dtype), d)
    if op == "stacked_mix" and d == 1:
        with pytest.raises(RuntimeError, match="stacked_mix: expected groups of at least 2 channels, got 1"):
            plan(op, *given, architecture=architecture)
        return
    launches = plan(op, *given, architecture=architecture)
    assert launches
    for launch in launches:
        assert launch["kernel"]
        assert all(
            1 <= blocks <= limit for blocks, limit in zip(launch["grid"], (2**31 - 1, 65535, 65535), strict=True)
        )
        assert 32 <= launch["threads"] <= 1024 and launch["threads"] % 32 == 0
        assert 0 <= launch["shared_bytes"] <= DEVICES[architecture][1]
        assert launch["read_bytes"] >= 0 and launch["written_bytes"] >= 0
    nbytes = math.prod(shape) * dtype.itemsize
    reads = {"moments": 1, "cross_moments": 2, "whiten": 1}.get(op, 4 if op.endswith("backward") else 2)
    assert sum(launch["read_bytes"] for launch in launches) >= reads * nbytes
    assert sum(launch["written_bytes"] for launch in launches) >= nbytes * (op in (*MIX, *POP))


@pytest.mark.parametrize("op", ["iter_norm", "iter_norm_backward"])
def test_a_layer_takes_two_launches_in_each_direction(op):
    assert len(plan(op, *arguments(op, meta(64, 64, 32, 32), 64))) == 2


@pytest.mark.parametrize("shape", [(256, 64, 56, 56), (256, 512, 7, 7), (16384, 96)])
def test_pop_norm_moves_the_bytes_of_batch_norm(shape):
    """Two launches in each direction do 2 reads and 1 write forward, 4 and 1 backward, and a thousandth for vectors."""
    nbytes = math.prod(shape) * 4
    for op, reads in (("pop_norm", 2), ("pop_norm_backward", 4)):
        launches = plan(op, *arguments(op, meta(*shape)))
        assert len(launches) == 2
        read, written = (sum(launch[key] for launch in launches) for key in ("read_bytes", "written_bytes"))
        assert reads * nbytes <= read <= 1.001 * reads * nbytes
        assert nbytes <= written <= 1.001 * nbytes


def test_a_launch_for_the_gradients_of_layers():
    def of_layer(*shape):
        inputs = [meta(shape[1])]
        return plan("precondition", [meta(*shape)], [meta(0)], inputs, inputs, [1], [1.0], 1e-2, 1e-4)

    (launch,) = of_layer(64, 16, 3, 3)
    assert launch["grid"] == (8, 1, 1)  # a row for each warp
    assert launch["written_bytes"] == 64 * 16 * 9 * 4
    (launch,) = of_layer(100, 4096)
    assert launch["grid"] == (100, 1, 1)


@pytest.mark.parametrize("architecture", COMPILED)
@pytest.mark.parametrize("d", [1, 16, 25, 64, 128])
@pytest.mark.parametrize("op", MATRIX)
def test_launches_of_small_matrices(op, d, architecture):
    (launch,) = plan(op, *arguments(op, meta(1, 8 * d), d), architecture=architecture)
    assert launch["shared_bytes"] <= DEVICES[architecture][1]


@pytest.mark.parametrize("architecture", COMPILED)
@pytest.mark.parametrize("side", [7, 34, 58, 64])
def test_launches_of_a_filter(side, architecture):
    z, v, whole = meta(32, 64, side, side), meta(64, side, side), [0, 1, 0, 1]
    launches = plan("spectral_filter", z, v, whole, [0, 1, side, 0, 1, side], architecture=architecture)
    assert all(launch["shared_bytes"] <= DEVICES[architecture][1] for launch in launches)
    assert sum(launch["read_bytes"] for launch in launches) >= 32 * 64 * side * side * 4


REFUSED = [
    (("moments", "float64", 8, []), "float64"),
    (("moments", "float32", 129, []), "at most 128 channels, got 129"),
    (("spectral_filter", "float32", 0, [65, 8]), "at most 64 x 64, got 65 x 8"),
    (("inverse_sqrt", "float16", 8, []), "expected float32, got float16"),
    (("stacked_mix", "float32", 1, []), "at least 2 channels, got 1"),
    (("kernel_spectrum", "float32", 0, []), "expected an op with CUDA kernels, got kernel_spectrum"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_refusals_say_what_was_expected_and_what_came(arguments, message):
    answer = extension.refusal(*arguments, COMPILED[0])
    assert answer.startswith("expected ") and message in answer


def test_an_architecture_that_was_not_compiled_is_named():
    answer = extension.refusal("moments", "float32", 8, [], 75)
    assert "sm_75" in answer and extension.architectures()[0] in answer
    assert [extension.compiled_for(architecture) for architecture in (75, COMPILED[0])] == [False, True]
    with pytest.raises(RuntimeError, match="sm_75"):
        compiled.launches_on((75, 40, 65536), "moments", meta(4, 8), 8, False)


def test_what_is_served_is_not_refused():
    for op in SERVED:
        for dtype in ("float32",) if op in MATRIX else ("float32", "float16", "bfloat16"):
            assert extension.refusal(op, dtype, 0, [], COMPILED[0]) == ""


def test_a_refused_call_has_no_plan():
    with pytest.raises(RuntimeError, match="moments: expected groups of at most 128 channels, got 129"):
        plan("moments", meta(4, 258, 3, 3), 129, False)
    assert extension.recorded() == []  # the recording has ended all the same


def test_without_a_recording_a_call_is_refused():
    plan("moments", meta(4, 8, 3, 3), 4, False)
    with pytest.raises(RuntimeError, match="moments: expected launches to be recorded, got a call on the device meta"):
        torch.ops.normkernels_launches.moments(meta(4, 8, 3, 3), 4, False)


def test_a_plan_takes_no_memory():
    (launch,) = plan("moments", meta(2**20, 2**10, 2**10), 64, False)
    assert launch["read_bytes"] == 2**42


# --- in PyTorch's dispatcher ------------------------------------------------------------------------------


def test_shapes_on_a_fake_gpu():
    with FakeTensorMode():
        x = torch.empty(4, 8, 5, 3, device="cuda", dtype=torch.bfloat16)
        y, mean, W = nk.ops.iter_norm(x, group_size=4)
        _, _, cov = nk.ops.moments(x, 4)
        z = nk.ops.spectral_filter(x, torch.empty(8, 5, 3, device="cuda"))
    assert (y.shape, y.dtype, y.device.type) == (x.shape, x.dtype, "cuda")
    assert mean.shape == (8,) and W.shape == cov.shape == (2, 4, 4) and W.dtype == torch.float32
    assert z.shape == x.shape


def test_a_cpu_tensor_does_not_reach_the_kernels():
    x = inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32)
    backend, why = choose.explain("iter_norm", x)
    assert backend == "eager" and "cuda: " in why
    assert torch.isfinite(nk.ops.iter_norm(x, 8)[0]).all()


@without_gpu
def test_without_a_gpu_the_backend_is_refused_with_the_reason():
    available, why = choose.availability("cuda")
    assert not available and "no CUDA device" in why and extension.architectures()[0] in why
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: no CUDA device"), nk.use_backend("cuda"):
        pytest.fail("the block must not run")


def registered(op: str) -> str:
    """Return where the kernel that serves CUDA tensors was registered."""
    found = re.search(r"^CUDA: registered at (\S+)", torch._C._dispatch_dump(f"normkernels::{op}"), re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("op", SERVED)
def test_another_backend_covers_the_kernels_inside_the_block_only(op):
    assert "csrc/ops/" in registered(op)
    with nk.use_backend("eager"):
        assert "choose.py" in registered(op)
        with nk.use_backend("auto"):
            assert "csrc/ops/" in registered(op)
    assert "csrc/ops/" in registered(op)


PROGRAM = """
import normkernels as nk
from normkernels.dispatch import choose
with nk.use_backend("eager"), nk.use_backend("auto"):
    print(len(choose._compiled))
"""


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_covering_a_kernel_is_no_warning(backend, monkeypatch):
    """PyTorch would warn of it, once for each process."""
    monkeypatch.setenv("NORMKERNELS_BACKEND", backend)
    command = [sys.executable, "-P", "-W", "error", "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(len(SERVED)), "")


def handed_on(x, group_size):
    """Call the compiled function itself, which leaves data that is not there to the next backend."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return torch.ops.normkernels.moments.default.redispatch(keys, x, group_size, False)


def test_a_call_is_handed_on_through_the_dispatcher():
    x = torch.empty(0, 8, 3, 3)
    mean, remainder, cov = handed_on(x, 4)
    assert mean.shape == remainder.shape == (8,) and cov.shape == (2, 4, 4)


def test_data_on_a_cpu_is_refused():
    """It comes here where only another argument is on a GPU, which is enough for the dispatcher."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError, match="moments: expected data on a CUDA device, got data on a CPU"):
        torch.ops.normkernels.moments.default.redispatch(keys, torch.ones(2, 8, 3, 3), 4, False)


def test_the_text_of_an_error_comes_back():
    """From torch 2.13 on; before, the stable interface tells only that there was one, and torch prints it."""

    def broken(*args):
        raise ValueError("expected better, got this")

    kept = _build.parse_version(torch.__version__) >= (2, 13)
    message = "ValueError: expected better, got this" if kept else "moments: the next backend raised an error"
    with torch.library._scoped_library("normkernels_next", "IMPL") as library:
        library.impl("moments", broken, "CPU")
        with pytest.raises(RuntimeError, match=message):
            handed_on(torch.empty(0, 8, 3, 3), 4)


# --- what the user is told --------------------------------------------------------------------------------


def test_info_shows_it(capsys):
    report = info.collect()
    launches = report["extension"].pop("launches")
    assert report["extension"] == {"loaded": True, **extension.build}
    assert set(launches) == set(SERVED) and all(launches.values())
    assert len(launches["iter_norm"]) == len(launches["iter_norm_backward"]) == 2
    assert report["build"]["built"] is True
    assert info.main([]) == 0
    text = capsys.readouterr().out
    assert f"loaded: {', '.join(extension.architectures())}" in text
    assert extension.build["compiler"] in text
    (first, second) = launches["iter_norm"]
    assert f"{first['kernel']} {first['grid'][0]} x {first['threads']}, {second['kernel']}" in text
