"""Decide whether the CUDA extension can be compiled here, and read the record of what the build did.

setup.py and ``python -m normkernels.info`` share this file. setup.py loads it by its path, because importing the
package would import torch: only the standard library is imported here, and torch is probed inside a function.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODES = ("auto", "cuda", "none")
MINIMUM_TORCH = (2, 11)  # the first release whose stable ABI has all that the extension needs
MINIMUM_SETUPTOOLS = (77, 0)  # the first that understands pyproject.toml's license expression
MINIMUM_CAPABILITY = (8, 0)  # the kernels copy asynchronously and multiply bfloat16 on tensor cores
PTX = "compute_{}{}".format(*MINIMUM_CAPABILITY)
RECORD_NAME = "_build_record.json"
GIB = 1 << 30
BYTES_PER_JOB = 4 * GIB  # memory that one nvcc process may need for torch's headers and several architectures


class BuildError(Exception):
    """The build that the user demanded is impossible; the message is all that the user needs to see."""


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler: the command, its (major, minor) version and the toolkit it belongs to."""

    path: str
    version: tuple[int, int]
    home: str


@dataclass(frozen=True)
class Cudart:
    """The CUDA runtime: the folders of its headers and of its library, and the library's name for the linker."""

    include: str
    folder: str
    library: str


@dataclass(frozen=True)
class Toolchain:
    """The tools for compiling the extension that a machine offers; None and False mean absent.

    codes: the code that nvcc is to generate, as in sm_80 and compute_90.
    """

    platform: str = "linux"
    torch: str | None = None
    torch_error: str = "torch not importable while building (build isolation?)"
    torch_cuda: str | None = None
    nvcc: Nvcc | None = None
    ninja: str | None = None
    pybind11: bool = False
    cudart: Cudart | None = None
    codes: tuple[str, ...] = ()
    codes_error: str = ""


def check_setuptools(version: str) -> None:
    """Raise BuildError for a setuptools that cannot read pyproject.toml; its own message is far less clear.

    Without build isolation pip uses the environment's setuptools, which in a fresh venv of Python 3.10 or 3.11 is 65.
    """
    if parse_version(version) < MINIMUM_SETUPTOOLS:
        raise BuildError(
            f"setuptools: expected {_dotted(MINIMUM_SETUPTOOLS)} or newer, got {version}; "
            "`pip install --upgrade setuptools` first"
        )


def build_mode(environment: Mapping[str, str] = os.environ) -> str:
    """Return NORMKERNELS_BUILD, "auto" where it is unset or empty. Raises BuildError for an unknown value."""
    mode = environment.get("NORMKERNELS_BUILD") or "auto"
    if mode not in MODES:
        raise BuildError(f"NORMKERNELS_BUILD: expected one of {', '.join(MODES)}, got {mode!r}")
    return mode


def decide(mode: str, cuda_sources: Sequence[object], probe: Callable[[], Toolchain]) -> tuple[bool, str]:
    """Return (compile?, reason) for a build mode; ``probe`` is called only when the answer depends on it.

    Raises BuildError when the extension is demanded (mode "cuda") and cannot be compiled.
    """
    if mode == "none":
        return False, "switched off by NORMKERNELS_BUILD=none"
    obstacle = _obstacle(probe()) if cuda_sources else "this source tree has no CUDA sources"
    if obstacle is None:
        return True, "everything needed was found"
    if mode == "cuda":
        raise BuildError(
            f"NORMKERNELS_BUILD=cuda cannot be honoured: {obstacle}. First install a CUDA build of torch >= "
            f"{_dotted(MINIMUM_TORCH)}, an nvcc of the same major version, ninja and pybind11; then run "
            "`pip install --no-build-isolation .`. NORMKERNELS_BUILD=auto installs without the extension."
        )
    return False, obstacle


def _obstacle(tools: Toolchain) -> str | None:
    """Return the first reason why the extension cannot be compiled, None when nothing stands in the way."""
    if tools.platform != "linux":
        return f"the extension is for Linux (under Windows in WSL), got {tools.platform}"
    if tools.torch is None:
        return tools.torch_error
    if parse_version(tools.torch) < MINIMUM_TORCH:
        return f"torch {tools.torch} is older than {_dotted(MINIMUM_TORCH)}"
    if tools.torch_cuda is None:
        return f"torch {tools.torch} is built without CUDA (torch.version.cuda is None)"
    if tools.nvcc is None:
        return "no nvcc found (looked in CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda)"
    if tools.nvcc.version[0] != parse_version(tools.torch_cuda)[0]:
        return (
            f"nvcc {_dotted(tools.nvcc.version)} ({tools.nvcc.path}) does not match torch's CUDA "
            f"{tools.torch_cuda}: the major versions must be equal"
        )
    if tools.cudart is None:
        return f"no cuda_runtime.h and libcudart found for {tools.nvcc.path} (pip install nvidia-cuda-runtime)"
    if tools.codes_error:
        return tools.codes_error
    if not tools.ninja:
        return "ninja not found (pip install ninja)"
    if not tools.pybind11:
        # torch's own copy of pybind11 refuses to be included beside TORCH_TARGET_VERSION.
        return "pybind11 not importable (pip install pybind11)"
    return None


def probe_toolchain(known: Sequence[Mapping[str, str]]) -> Toolchain:
    """Look for everything that the extension needs, for ``known`` architectures. This imports torch."""
    import importlib.util

    nvcc = find_nvcc()
    found: dict[str, Any] = {
        "platform": sys.platform,
        "nvcc": nvcc,
        "cudart": nvcc and find_cudart(nvcc),
        # pip runs without its environment's scripts on PATH unless that environment is activated.
        "ninja": shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts")),
        "pybind11": importlib.util.find_spec("pybind11") is not None,
    }
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            found["torch_error"] = f"importing torch failed: {error}"
    except (
        ImportError,
        OSError,
    ) as error:  # a damaged install
        found["torch_error"] = f"importing torch failed: {error}"
    else:
        found |= {"torch": str(torch.__version__), "torch_cuda": torch.version.cuda}
        gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
        if nvcc is not None:
            architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "native")
            if architectures in ("", "native"):
                capabilities = [torch.cuda.get_device_capability(i) for i in gpus]
                architectures = default_architectures(known, nvcc.version, capabilities)
            try:
                found["codes"] = tuple(architecture_codes(architectures))
            except BuildError as error:
                found["codes_error"] = str(error)
    return Toolchain(**found)


def find_nvcc(environment: Mapping[str, str] = os.environ) -> Nvcc | None:
    """Return the nvcc that a build here would use, in torch's order: CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda."""
    homes = [environment[name] for name in ("CUDA_HOME", "CUDA_PATH") if environment.get(name)]
    if homes:
        path = shutil.which(os.path.join(homes[0], "bin", "nvcc"))
    else:
        path = shutil.which("nvcc", path=environment.get("PATH")) or shutil.which("/usr/local/cuda/bin/nvcc")
    if path is None:
        return None
    release = re.search(r"release (\d+)\.(\d+)", _output([path, "--version"]))
    if release is None:
        return None
    # The command on PATH may be a wrapper far from the toolkit, so nvcc itself is asked where the toolkit is.
    plan = _output([path, "--dryrun", "-c", "-x", "cu", os.devnull])
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    home = os.path.realpath(top[1].strip()) if top else str(Path(path).resolve().parent.parent)
    return Nvcc(path, (int(release[1]), int(release[2])), home)


def find_cudart(nvcc: Nvcc) -> Cudart | None:
    """Return the runtime of nvcc's toolkit or of NVIDIA's wheels, None where headers or library are missing.

    The wheels have no libcudart.so without a version in its name.
    """
    wheels = Path(sysconfig.get_path("purelib")) / "nvidia"
    roots = [Path(nvcc.home), *sorted(Path(nvcc.home).glob("targets/*"))]
    roots += [wheels / f"cu{nvcc.version[0]}", wheels / "cuda_runtime"]
    headers = [root / "include" for root in roots if (root / "include" / "cuda_runtime.h").is_file()]
    versioned = f"libcudart.so.{nvcc.version[0]}"
    names = {"libcudart.so": "cudart", versioned: f":{versioned}"}
    places = [(root / lib, name) for root in roots for lib in ("lib64", "lib") for name in names]
    libraries = [(folder, name) for folder, name in places if (folder / name).is_file()]
    if not headers or not libraries:
        return None
    folder, name = libraries[0]
    return Cudart(str(headers[0]), str(folder), names[name])


def default_architectures(
    known: Sequence[Mapping[str, str]], nvcc_version: tuple[int, int], gpus: Sequence[tuple[int, int]] = ()
) -> str:
    """Return the TORCH_CUDA_ARCH_LIST to use where it is not set.

    It names what the GPUs here need; without a GPU, all ``known`` architectures that this nvcc can compile for. A GPU
    newer than these gets the newest older one, whose PTX runs on it.
    """
    usable = [
        parse_version(entry["capability"]) for entry in known if parse_version(entry["since_nvcc"]) <= nvcc_version
    ]
    wanted = {max((each for each in usable if each <= gpu), default=gpu) for gpu in gpus} or usable
    return ";".join(map(_dotted, sorted(wanted))) + "+PTX"


def architecture_codes(architectures: str) -> list[str]:
    """Return the codes that nvcc is to generate for a TORCH_CUDA_ARCH_LIST: sm_80, sm_90, compute_80 for "8.0;9.0+PTX".

    Architectures that are too old for the kernels are left out, because the list may be meant for other packages, too.
    The kernels use nothing that PTX of the minimum lacks, so there is only that PTX, and 9.0a counts as 9.0.
    Raises BuildError for an entry that is no version, and where no architecture is left.
    """
    capabilities: set[tuple[int, int]] = set()
    ptx = False
    for entry in re.split(r"[;,\s]+", architectures.strip(";, \n\t")):
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", entry)
        if match is None:
            raise BuildError(f'TORCH_CUDA_ARCH_LIST: expected versions as in "8.0;9.0+PTX", got {entry!r}')
        capability = int(match[1]), int(match[2])
        if capability >= MINIMUM_CAPABILITY:
            capabilities.add(capability)
            ptx |= match[3] is not None
    if not capabilities:
        least = _dotted(MINIMUM_CAPABILITY)
        raise BuildError(f"architectures: expected one of compute capability {least} or newer, got {architectures}")
    codes = [f"sm_{major}{minor}" for major, minor in sorted(capabilities)]
    return [*codes, PTX] if ptx else codes


def architecture_flags(codes: Sequence[str]) -> list[str]:
    """Return nvcc's flags for these codes, and the macros that tell our code of them.

    All codes are made from the same PTX: nvcc runs its front end once instead of once for each, in half of the time.
    """
    known = "".join(code.removeprefix("sm") for code in codes if code != PTX)  # no commas: nvcc splits macros at them
    ptx = PTX.removeprefix("compute_") if PTX in codes else "0"
    generated = [f"-gencode=arch={PTX},code={code}" for code in codes]
    return [*generated, f"-DNORMKERNELS_ARCHITECTURES={known}", f"-DNORMKERNELS_PTX={ptx}"]


def default_jobs(cores: int, memory: int) -> int:
    """Return MAX_JOBS: one job per core, as far as ``memory`` (bytes) goes, at least one."""
    return max(1, min(cores, memory // BYTES_PER_JOB))


def build_record(folder: Path = Path(__file__).parent) -> dict[str, Any]:
    """Return the record of the package's build in ``folder``: keys "built", "reason" and more."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {
            "built": False,
            "reason": "no build record: this source tree was never built or installed",
        }
    except ValueError as error:
        return {"built": False, "reason": f"unreadable build record {folder / RECORD_NAME}: {error}"}
    return record


def parse_version(text: str) -> tuple[int, int]:
    """Return (major, minor) of a version such as "2.13.0+cpu"."""
    match = re.match(r"(\d+)\.(\d+)", text)
    if match is None:
        raise BuildError(f"version: expected MAJOR.MINOR..., got {text!r}")
    return int(match[1]), int(match[2])


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _output(command: list[str]) -> str:
    """Return both output streams of a command (nvcc --dryrun writes to stderr), "" when it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr
