"""The environment that stands beside every figure: device, versions, precision modes, commit.

`python -m bench.measure.environment --device cuda` prints it, with the state of the GPU.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import platform
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_CACHE = 32 << 20


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if match:
            return " ".join(match.group(1).split())
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    threads = torch.get_num_threads()
    return f"{cpu_model()}, {threads} thread{'s' if threads > 1 else ''}"


def device_slug(device: torch.device) -> str:
    name = device_name(device) if device.type == "cuda" else f"cpu {device_name(device)}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@cache
def cache_bytes(device: torch.device) -> int:
    """Return the size of the last-level cache, which the input sets together have to exceed."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KM]?)", path.read_text().strip())
        if match:
            sizes.append(int(match.group(1)) * {"": 1, "K": 1 << 10, "M": 1 << 20}[match.group(2)])
    return max(sizes, default=DEFAULT_CACHE)


def package_version() -> str:
    try:
        return str(importlib.import_module("normkernels").__version__)
    except ImportError:
        return "not importable"


def active_backend(device: torch.device) -> str:
    """Return the backend that runs the training op here, for the reader of the figures."""
    try:
        package = importlib.import_module("normkernels")
    except ImportError:
        return "none"
    return str(package.backend_of("iter_norm", torch.empty(2, 4, 2, 2, device=device)))


def versions(device: torch.device) -> str:
    parts = [
        f"normkernels {package_version()} ({active_backend(device)})",
        f"torch {torch.__version__}",
        f"python {platform.python_version()}",
        f"threads {torch.get_num_threads()}",
    ]
    if device.type == "cuda":
        parts += [
            f"triton {triton_version()}",
            f"cuda {torch.version.cuda}",
            f"driver {driver_version()}",
            f"cudnn {torch.backends.cudnn.version()}",
        ]
    return "; ".join([*parts, precision(device)])


def triton_version() -> str:
    try:
        return str(importlib.import_module("triton").__version__)
    except ImportError:
        return "missing"


def driver_version() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def precision(device: torch.device) -> str:
    """Return the float32 precision of matrix products, convolutions and this package, which have separate switches."""
    matmul: Any = torch.backends.cuda.matmul  # torch.get_float32_matmul_precision raises where this has been used
    text = f"fp32 matmul {'tf32' if matmul.fp32_precision == 'tf32' else 'ieee'}"
    if device.type == "cuda":
        text += f"; cuDNN TF32 {on_or_off(convolutions_in_tf32())}; normkernels TF32 {on_or_off(own_tf32())}"
    return text


def convolutions_in_tf32() -> bool:
    """Return whether cuDNN's convolutions may use TF32, as they may by default.

    cudnn.allow_tf32 raises where this newer switch has been used.
    """
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return bool(conv.fp32_precision == "tf32")


def on_or_off(state: bool) -> str:
    return "on" if state else "off"


def own_tf32() -> bool:
    """Return whether the package's own products may run in TF32, which is off unless it is asked for."""
    try:
        return bool(importlib.import_module("normkernels.triton.support").tf32_allowed())
    except ImportError:
        return False


@cache
def commit() -> str:
    """Return the short hash of the checkout, with -dirty when tracked or new source files differ from it."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":!bench/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changed else head


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description="Device, versions and precision modes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = torch.device(parser.parse_args().device)
    print(device_name(device), versions(device), f"commit {commit()}", sep="\n")
    for name in ("triton", "numpy", "scipy", "hypothesis", "pytest", "pytest_benchmark", "matplotlib", "tqdm"):
        module = importlib.import_module(name) if importlib.util.find_spec(name) else None
        print(f"{name} {getattr(module, '__version__', 'without a version') if module else 'missing'}")
    if device.type == "cuda" and shutil.which("nvidia-smi"):
        print(subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout)


if __name__ == "__main__":
    main()
