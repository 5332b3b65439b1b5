"""Whether the CUDA extension can be compiled here, and the record of what the build did.

Shared by setup.py, which loads this file by its path because importing the package would import torch, and by
``python -m normkernels.info``. Only the standard library is imported; torch is probed inside a function.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODES = ("auto", "cuda", "none")
MINIMUM_TORCH = (2, 11)  # the first release whose stable ABI has all that the extension needs
MINIMUM_SETUPTOOLS = (77, 0)  # the first that understands pyproject.toml's license expression
RECORD_NAME = "_build_record.json"
GIB = 1 << 30
BYTES_PER_JOB = 4 * GIB  # what one nvcc process compiling torch's headers for several architectures may take


class BuildError(Exception):
    """The build that was demanded is impossible; the message is all that the user needs to see."""


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler: the command, its (major, minor) version and the toolkit it belongs to."""

    path: str
    version: tuple[int, int]
    home: str


@dataclass(frozen=True)
class Toolchain:
    """What a machine offers for compiling the extension; None and False mean absent."""

    torch: str | None = None
    torch_error: str = "torch not importable while building (build isolation?)"
    torch_cuda: str | None = None
    nvcc: Nvcc | None = None
    ninja: str | None = None
    pybind11: bool = False


def check_setuptools(version: str) -> None:
    """Raises BuildError for a setuptools that pyproject.toml would fail in, with a far less clear message.

    Without build isolation pip uses the environment's own, and a fresh venv of Python 3.10 or 3.11 has 65.
    """
    if _version(version) < MINIMUM_SETUPTOOLS:
        raise BuildError(
            f"setuptools: expected {_dotted(MINIMUM_SETUPTOOLS)} or newer, got {version}; "
            "`pip install --upgrade setuptools` first"
        )


def build_mode(environment: Mapping[str, str] = os.environ) -> str:
    """NORMKERNELS_BUILD, checked. Raises BuildError for an unknown value."""
    mode = environment.get("NORMKERNELS_BUILD") or "auto"
    if mode not in MODES:
        raise BuildError(f"NORMKERNELS_BUILD: expected one of {', '.join(MODES)}, got {mode!r}")
    return mode


def decide(mode: str, cuda_sources: Sequence[object], probe: Callable[[], Toolchain]) -> tuple[bool, str]:
    """(compile?, reason) for a build mode; ``probe`` is asked only when the answer depends on it.

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
    """The first reason why the extension cannot be compiled, None when nothing stands in the way."""
    if tools.torch is None:
        return tools.torch_error
    if _version(tools.torch) < MINIMUM_TORCH:
        return f"torch {tools.torch} is older than {_dotted(MINIMUM_TORCH)}"
    if tools.torch_cuda is None:
        return f"torch {tools.torch} is built without CUDA (torch.version.cuda is None)"
    if tools.nvcc is None:
        return "no nvcc found (looked in CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda)"
    if tools.nvcc.version[0] != _version(tools.torch_cuda)[0]:
        return (
            f"nvcc {_dotted(tools.nvcc.version)} ({tools.nvcc.path}) does not match torch's CUDA "
            f"{tools.torch_cuda}: the major versions must be equal"
        )
    if not tools.ninja:
        return "ninja not found (pip install ninja)"
    if not tools.pybind11:
        # torch's own copy of pybind11 refuses to be included beside TORCH_TARGET_VERSION.
        return "pybind11 not importable (pip install pybind11)"
    return None


def probe_toolchain() -> Toolchain:
    """Look for everything that the extension needs. Imports torch."""
    import importlib.util

    found: dict[str, Any] = {
        "nvcc": find_nvcc(),
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
    return Toolchain(**found)


def find_nvcc(environment: Mapping[str, str] = os.environ) -> Nvcc | None:
    """The nvcc that a build here would use, in torch's order: CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda."""
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
    # The command on PATH may be a wrapper far from the toolkit, so nvcc itself is asked where that is.
    plan = _output([path, "--dryrun", "-c", "-x", "cu", os.devnull])
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    home = os.path.realpath(top[1].strip()) if top else str(Path(path).resolve().parent.parent)
    return Nvcc(path, (int(release[1]), int(release[2])), home)


def default_architectures(known: Sequence[Mapping[str, str]], nvcc_version: tuple[int, int]) -> str:
    """TORCH_CUDA_ARCH_LIST for a machine without a GPU: all that this nvcc knows, the newest also as PTX."""
    usable = [entry["capability"] for entry in known if _version(entry["since_nvcc"]) <= nvcc_version]
    return ";".join(usable) + "+PTX"


def default_jobs(cores: int, memory: int) -> int:
    """MAX_JOBS: one per core, as far as ``memory`` (bytes) goes, at least one."""
    return max(1, min(cores, memory // BYTES_PER_JOB))


def build_record(folder: Path = Path(__file__).parent) -> dict[str, Any]:
    """What the build of the package in ``folder`` recorded: keys "built", "reason" and more."""
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


def _version(text: str) -> tuple[int, int]:
    """(major, minor) of a version such as "2.13.0+cpu"."""
    match = re.match(r"(\d+)\.(\d+)", text)
    if match is None:
        raise BuildError(f"version: expected MAJOR.MINOR..., got {text!r}")
    return int(match[1]), int(match[2])


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _output(command: list[str]) -> str:
    """Both streams of a command (nvcc --dryrun writes to stderr), "" when it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr
