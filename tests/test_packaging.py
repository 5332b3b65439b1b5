"""The package as it is built and installed: one version, the build decision, what a wheel holds."""

from __future__ import annotations

import importlib.resources
import importlib.util
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import normkernels as nk
from normkernels import _build

ROOT = Path(__file__).resolve().parent.parent
NVCC = _build.Nvcc("/opt/cuda/bin/nvcc", (13, 0), "/opt/cuda")
COMPLETE = _build.Toolchain(
    torch="2.13.0+cu130",
    torch_cuda="13.0",
    nvcc=NVCC,
    cudart=_build.Cudart("/opt/cuda/include", "/opt/cuda/lib64", "cudart"),
    ninja="/opt/bin/ninja",
    pybind11=True,
    codes=("sm_80", "sm_90", "compute_80"),
)
SOURCES = ["csrc/cuda/moments.cu"]


def changed(**fields):
    return lambda: _build.Toolchain(**{**vars(COMPLETE), **fields})


@pytest.fixture(scope="module")
def setup_module_():
    """Import setup.py without running it."""
    spec = importlib.util.spec_from_file_location("normkernels_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- metadata ---------------------------------------------------------------------------------------------


def test_the_version_is_the_same_everywhere():
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert citation is not None and citation[1] == nk.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", nk.__version__)


def test_the_version_is_written_down_once():
    """pyproject.toml and CMakeLists.txt read it; only CITATION.cff, whose format cannot, repeats it."""
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "normkernels/__init__.py"):
        assert nk.__version__ not in (ROOT / name).read_text(), name


def test_py_typed_is_part_of_the_package():
    assert importlib.resources.files("normkernels").joinpath("py.typed").is_file()


def requirements(name):
    """Return the packages and versions of a requirements file."""
    lines = [line.partition("#")[0].partition(";")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    found = [re.fullmatch(r"([a-z0-9-]+)={2,3}([0-9.]+)", line) for line in lines if line]
    assert all(found), lines
    return dict(match.groups() for match in found if match)


def test_development_requirements_are_pinned():
    assert len(requirements("requirements-dev.txt")) > 10
    assert requirements("requirements-dev.txt")["torch"] == "2.13.0"


def test_the_extension_is_checked_with_what_it_is_developed_with():
    assert requirements("requirements-cuda.txt").items() <= requirements("requirements-dev.txt").items()


def test_an_old_setuptools_is_named():
    requires = re.search(r'requires = \["setuptools>=(\d+)"\]', (ROOT / "pyproject.toml").read_text())
    assert requires is not None
    oldest = int(requires[1])
    _build.check_setuptools(f"{oldest}.0.0")
    with pytest.raises(_build.BuildError, match=rf"expected {oldest}.0 or newer, got {oldest - 1}.5.1"):
        _build.check_setuptools(f"{oldest - 1}.5.1")


def test_ci_is_executable():
    assert os.stat(ROOT / ".ci" / "run").st_mode & stat.S_IXUSR


# --- the build decision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "cuda"])
def test_a_complete_toolchain_builds(mode):
    assert _build.decide(mode, SOURCES, lambda: COMPLETE)[0] is True


OBSTACLES = [
    ({"platform": "win32"}, "the extension is for Linux (under Windows in WSL), got win32"),
    ({"torch": None}, "torch not importable while building (build isolation?)"),
    ({"torch": "2.10.1"}, "torch 2.10.1 is older than 2.11"),
    ({"torch": "2.13.0+cpu", "torch_cuda": None}, "torch 2.13.0+cpu is built without CUDA"),
    ({"nvcc": None}, "no nvcc found"),
    ({"torch_cuda": "12.8"}, "nvcc 13.0 (/opt/cuda/bin/nvcc) does not match torch's CUDA 12.8"),
    ({"cudart": None}, "no cuda_runtime.h and libcudart found for /opt/cuda/bin/nvcc"),
    ({"codes_error": "architectures: expected better"}, "architectures: expected better"),
    ({"ninja": None}, "ninja not found"),
    ({"pybind11": False}, "pybind11 not importable"),
]


@pytest.mark.parametrize(("missing", "message"), OBSTACLES)
def test_auto_records_what_is_missing(missing, message):
    built, reason = _build.decide("auto", SOURCES, changed(**missing))
    assert built is False
    assert message in reason


@pytest.mark.parametrize(("missing", "message"), OBSTACLES)
def test_cuda_fails_with_what_is_missing_and_what_to_do(missing, message):
    with pytest.raises(_build.BuildError) as raised:
        _build.decide("cuda", SOURCES, changed(**missing))
    assert message in str(raised.value)
    assert "pip install --no-build-isolation ." in str(raised.value)


def test_a_minor_version_of_nvcc_may_differ():
    assert _build.decide("auto", SOURCES, changed(torch_cuda="13.2"))[0] is True
    assert _build.decide("auto", SOURCES, changed(torch="2.9.1"))[0] is False  # 2.9 < 2.11, as numbers


def test_a_tree_without_cuda_sources_is_not_probed():
    assert _build.decide("auto", [], pytest.fail) == (False, "this source tree has no CUDA sources")
    with pytest.raises(_build.BuildError, match="no CUDA sources"):
        _build.decide("cuda", [], pytest.fail)


def test_none_builds_nothing_and_probes_nothing():
    built, reason = _build.decide("none", SOURCES, pytest.fail)
    assert built is False
    assert "NORMKERNELS_BUILD=none" in reason


@pytest.mark.parametrize("environment", [{}, {"NORMKERNELS_BUILD": ""}, {"NORMKERNELS_BUILD": "auto"}])
def test_auto_is_the_default(environment):
    assert _build.build_mode(environment) == "auto"


@pytest.mark.parametrize("value", ["yes", "CUDA", "1", "auto "])
def test_an_unknown_build_mode_is_refused(value):
    with pytest.raises(_build.BuildError, match=re.escape(f"expected one of auto, cuda, none, got {value!r}")):
        _build.build_mode({"NORMKERNELS_BUILD": value})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("yes", "expected one of auto, cuda, none, got 'yes'"),
        ("cuda", "NORMKERNELS_BUILD=cuda cannot be honoured"),
    ],
)
def test_setup_exits_with_one_line_and_no_traceback(value, message, tmp_path):
    # CUDA_HOME leads nowhere, so that "cuda" fails on every machine.
    environment = os.environ | {"NORMKERNELS_BUILD": value, "CUDA_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("normkernels: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


# --- the build's defaults ---------------------------------------------------------------------------------


def test_default_architectures(setup_module_):
    known = setup_module_.build_configuration()["architectures"]
    assert _build.default_architectures(known, (13, 0)) == "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
    assert _build.default_architectures(known, (12, 6)) == "8.0;8.6;8.9;9.0+PTX"  # knows nothing newer


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ([(9, 0), (9, 0)], "9.0+PTX"),
        ([(12, 0), (8, 0)], "8.0;12.0+PTX"),
        ([(8, 7)], "8.6+PTX"),  # its machine code runs there
        ([(10, 3)], "10.0+PTX"),
        ([(11, 0)], "10.0+PTX"),  # its machine code does not run there, but the PTX does
        ([(7, 5)], "7.5+PTX"),  # refused, with its number in the message
    ],
)
def test_architectures_of_the_gpus_that_are_there(setup_module_, gpus, expected):
    known = setup_module_.build_configuration()["architectures"]
    assert _build.default_architectures(known, (13, 0), gpus) == expected


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("8.0;9.0+PTX", ["sm_80", "sm_90", "compute_80"]),
        ("9.0 8.0", ["sm_80", "sm_90"]),
        ("7.5;8.6+PTX;", ["sm_86", "compute_80"]),  # a list that other packages are built for, too
        ("9.0a,12.0f+PTX", ["sm_90", "sm_120", "compute_80"]),
        ("10.0;9.0", ["sm_90", "sm_100"]),
    ],
)
def test_architectures_as_nvcc_calls_them(text, codes):
    assert _build.architecture_codes(text) == codes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Hopper", "expected versions as in \"8.0;9.0+PTX\", got 'Hopper'"),
        ("8.0;sm_90", "got 'sm_90'"),
        ("7.5+PTX", "expected one of compute capability 8.0 or newer, got 7.5+PTX"),
    ],
)
def test_architectures_that_cannot_be_compiled(text, message):
    with pytest.raises(_build.BuildError, match=re.escape(message)):
        _build.architecture_codes(text)


def test_flags_for_the_architectures():
    assert _build.architecture_flags(["sm_80", "sm_90", "compute_80"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=sm_90",
        "-gencode=arch=compute_80,code=compute_80",
        "-DNORMKERNELS_ARCHITECTURES=_80_90",
        "-DNORMKERNELS_PTX=80",
    ]
    assert _build.architecture_flags(["sm_86"])[1:] == ["-DNORMKERNELS_ARCHITECTURES=_86", "-DNORMKERNELS_PTX=0"]


def test_objects_of_the_extension_have_names_of_their_own(setup_module_):
    """Without them a.cpp and a.cu of a folder would both become a.o."""
    names = [Path(source).with_suffix("") for source in setup_module_.source_files(setup_module_.build_configuration())]
    assert len(set(names)) == len(names) > 1


@pytest.mark.parametrize(
    ("cores", "gibibytes", "jobs"), [(2, 24, 2), (64, 128, 32), (16, 6, 1), (8, 1, 1), (1, 999, 1)]
)
def test_default_jobs(cores, gibibytes, jobs):
    assert _build.default_jobs(cores, gibibytes * _build.GIB) == jobs


def fake_nvcc(folder: Path, version: str, home: str = "") -> Path:
    """Write a command that answers as nvcc does; ``home`` is a toolkit that lies elsewhere, as for a wrapper."""
    command = folder / "bin" / "nvcc"
    command.parent.mkdir(parents=True)
    top = f"echo '#$ TOP={home}' >&2" if home else ":"
    command.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = --version ]; then echo "Cuda compilation tools, release {version}, V{version}.1"; '
        f"else {top}; fi\n"
    )
    command.chmod(0o755)
    return command


def test_nvcc_is_asked_for_its_version_and_home(tmp_path):
    command = fake_nvcc(tmp_path / "tools", "12.8", str(tmp_path / "cuda-12.8"))
    nvcc = _build.find_nvcc({"PATH": f"{command.parent}:/usr/bin:/bin"})
    assert nvcc == _build.Nvcc(str(command), (12, 8), str(tmp_path / "cuda-12.8"))


def test_cuda_home_wins_over_the_path(tmp_path):
    on_path = fake_nvcc(tmp_path / "a", "12.8")
    in_home = fake_nvcc(tmp_path / "b", "13.0")
    nvcc = _build.find_nvcc({"PATH": f"{on_path.parent}:/usr/bin:/bin", "CUDA_HOME": str(tmp_path / "b")})
    assert nvcc == _build.Nvcc(str(in_home), (13, 0), str((tmp_path / "b").resolve()))


def test_a_cuda_home_without_nvcc_is_not_replaced_by_another(tmp_path):
    on_path = fake_nvcc(tmp_path / "a", "12.8")
    environment = {"PATH": f"{on_path.parent}:/usr/bin:/bin", "CUDA_HOME": str(tmp_path)}
    assert _build.find_nvcc(environment) is None


def test_something_else_called_nvcc_is_not_taken(tmp_path):
    command = tmp_path / "bin" / "nvcc"
    command.parent.mkdir()
    command.write_text("#!/bin/sh\necho hello\n")
    command.chmod(0o755)
    assert _build.find_nvcc({"CUDA_HOME": str(tmp_path)}) is None


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("include/cuda_runtime.h", "lib64/libcudart.so"), ("include", "lib64", "cudart")),
        (
            ("targets/x/include/cuda_runtime.h", "targets/x/lib/libcudart.so"),
            ("targets/x/include", "targets/x/lib", "cudart"),
        ),
        (("include/cuda_runtime.h", "lib/libcudart.so.13"), ("include", "lib", ":libcudart.so.13")),  # NVIDIA's wheels
        (("include/cuda_runtime.h", "lib/libcudart.so.12"), None),
        (("lib64/libcudart.so",), None),
    ],
)
def test_the_runtime_is_found_in_every_layout(files, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(_build.sysconfig, "get_path", lambda name: str(tmp_path / "site-packages"))
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    found = _build.find_cudart(_build.Nvcc("nvcc", (13, 0), str(tmp_path)))
    if expected is None:
        assert found is None
    else:
        include, folder, library = expected
        assert found == _build.Cudart(str(tmp_path / include), str(tmp_path / folder), library)


def test_the_runtime_may_come_from_a_wheel(tmp_path, monkeypatch):
    monkeypatch.setattr(_build.sysconfig, "get_path", lambda name: str(tmp_path))
    wheel = tmp_path / "nvidia" / "cu13"
    for file in ("include/cuda_runtime.h", "lib/libcudart.so.13"):
        (wheel / file).parent.mkdir(parents=True)
        (wheel / file).touch()
    found = _build.find_cudart(_build.Nvcc("nvcc", (13, 0), str(tmp_path / "nothing")))
    assert found == _build.Cudart(str(wheel / "include"), str(wheel / "lib"), ":libcudart.so.13")


# --- the record -------------------------------------------------------------------------------------------


def test_the_record_is_read_back(tmp_path):
    (tmp_path / _build.RECORD_NAME).write_text(json.dumps({"built": True, "reason": "because"}))
    assert _build.build_record(tmp_path) == {"built": True, "reason": "because"}


def test_a_missing_or_damaged_record_means_not_built(tmp_path):
    assert _build.build_record(tmp_path)["built"] is False
    (tmp_path / _build.RECORD_NAME).write_text("{")
    record = _build.build_record(tmp_path)
    assert record["built"] is False
    assert "unreadable" in record["reason"]


def test_a_build_writes_record_types_and_derivations(tmp_path):
    """The build has what `pip install` copies; build_lib and egg_base keep it out of the source tree."""
    environment = os.environ | {"NORMKERNELS_BUILD": "none"}
    arguments = ["egg_info", "--egg-base", str(tmp_path), "build", "--build-base", str(tmp_path / "build")]
    subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
    )
    built = tmp_path / "build" / "lib"
    record = json.loads((built / "normkernels" / _build.RECORD_NAME).read_text())
    assert record == {"built": False, "reason": "switched off by NORMKERNELS_BUILD=none", "mode": "none"}
    assert [folder.name for folder in built.iterdir()] == ["normkernels"]
    shipped = {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()}
    wanted = ("*.py", "py.typed", "_C.pyi", "DERIVATION.md", "configs.json")
    source = {p.relative_to(ROOT).as_posix() for name in wanted for p in (ROOT / "normkernels").rglob(name)}
    assert shipped == source | {f"normkernels/{_build.RECORD_NAME}"}
