"""Show what is installed here, which backend serves which op and why: ``python -m normkernels.info``.

--json prints the same as one JSON object. --selftest runs every op on every device and backend that can be
used here, against the papers' equations in float64, and exits with 1 when one of them is wrong.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import normkernels as nk
from normkernels import _build, _selftest
from normkernels.dispatch import choose, compiled
from normkernels.dispatch.record import OPS
from normkernels.eager.devices import has_float64

Report = dict[str, Any]


def collect(selftest: bool = False) -> Report:
    """Return everything that this command shows, as plain data."""
    nvcc = _build.find_nvcc()
    types = _device_types()
    report: Report = {
        "normkernels": nk.__version__,
        "torch": str(torch.__version__),
        "triton": _installed_version("triton"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch_cuda": torch.version.cuda,
        "nvcc": None if nvcc is None else {"path": nvcc.path, "version": ".".join(map(str, nvcc.version))},
        "build": _build.build_record(),
        "extension": _extension(),
        "cpu": {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "no_float64": {
            "variable": os.environ.get("NORMKERNELS_NO_FLOAT64"),
            "devices": [type for type in types if not has_float64(torch.device(type))],
        },
        "devices": [device for type in types for device in _devices(type)],
        "backends": {name: _backend(name) for name in choose.BACKENDS},
        "ops": [row for type in types for op in OPS for row in _op_rows(op, type)],
    }
    if selftest:
        report["selftest"] = [row for type in types for row in _selftest.run(torch.device(type))]
        report["passed"] = all(row["passed"] for row in report["selftest"])
    return report


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_types() -> list[str]:
    """Return "cpu", and the type of the accelerator that torch sees, if there is one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def _devices(type: str) -> Iterator[Report]:
    if type == "cuda":
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            yield {
                "device": f"cuda:{i}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
    elif type != "cpu":
        yield from ({"device": f"{type}:{i}"} for i in range(torch.accelerator.device_count()))


def _extension() -> Report:
    """Return whether the extension is loaded, and what it says of itself: the record may be that of another build."""
    module, reason = compiled.load()
    if module is None:
        return {"loaded": False, "reason": reason}
    return {"loaded": True, **module.build, "launches": _launches()}


PLANNED_SHAPE = (64, 64, 32, 32)


def _launches() -> Report:
    """Return what each op with compiled kernels launches, for example; nothing if the build does not serve the GPU.

    The activations have PLANNED_SHAPE, the groups 64 channels.
    """
    x = torch.empty(PLANNED_SHAPE, device="meta")
    try:
        return {
            name: compiled.launch_plan(name, *next(iter(op.samples(x, 64))))
            for name, op in OPS.items()
            if compiled.has_kernels(name)
        }
    except RuntimeError:
        return {}


def _backend(name: str) -> Report:
    available, reason = choose.availability(name)
    return {"available": available, "reason": reason}


def _op_rows(op: str, device: str) -> Iterator[Report]:
    """Yield one row for each backend: whether it serves the op on this type of device, and why (not)."""
    serving, why = choose.explain(op, torch.empty(0, device=device))
    for name in choose.BACKENDS:
        available, reason = choose.availability(name)
        yield {
            "op": op,
            "device": device,
            "backend": name,
            "available": available,
            "serves": name == serving,
            "reason": why if name == serving else reason,
        }


def render(report: Report) -> str:
    """Return the report as text for a terminal."""
    build, cpu, nvcc, extension = report["build"], report["cpu"], report["nvcc"], report["extension"]
    lines = [
        f"normkernels  {report['normkernels']}",
        f"torch        {report['torch']}, CUDA {report['torch_cuda'] or 'none'}",
        f"triton       {report['triton'] or 'not installed'}",
        f"python       {report['python']}, {report['platform']}",
        f"nvcc         {'none' if nvcc is None else nvcc['version'] + ', ' + nvcc['path']}",
        f"extension    {'built' if build['built'] else 'not built'}: {build['reason']}",
        *([f"             {_loaded(extension)}"] if build["built"] or extension["loaded"] else []),
        *(f"             {line}" for line in _planned(extension.get("launches", {}))),
        f"cpu          {cpu['capability']}, {cpu['cores']} cores, {cpu['threads']} threads",
    ]
    for device in report["devices"]:
        lines.append(f"{device['device']:12} {device.get('name', '')} {device.get('capability', '')}".rstrip())
    lacking, variable = report["no_float64"]["devices"], report["no_float64"]["variable"]
    lines.append(
        f"no float64   {', '.join(lacking) or 'none'} (NORMKERNELS_NO_FLOAT64 "
        f"{'is not set' if variable is None else '= ' + variable})"
    )
    lines += ["", "backends, fastest first"]
    for name, backend in report["backends"].items():
        lines.append(f"  {name:8} {'available' if backend['available'] else 'not available'}: {backend['reason']}")
    lines += ["", f"  {'op':24} {'device':8} " + " ".join(f"{name:14}" for name in report["backends"])]
    served: dict[tuple[str, str], list[str]] = {}
    for row in report["ops"]:
        state = "in use" if row["serves"] else "available" if row["available"] else "not available"
        served.setdefault((row["op"], row["device"]), []).append(f"{state:14}")
    lines += [f"  {op:24} {device:8} {' '.join(states)}".rstrip() for (op, device), states in served.items()]
    reasons = dict.fromkeys((row["backend"], row["reason"]) for row in report["ops"] if row["serves"])
    lines += [f"  why {name}: {reason}" for name, reason in reasons]
    if "selftest" in report:
        lines += ["", "self-test: error relative to float64, and its tolerance"]
        for row in report["selftest"]:
            detail = row.get("message") or f"{row['error']:.1e} <= {row['tolerance']:.1e}"
            verdict = "pass" if row["passed"] else "FAIL"
            lines.append(f"  {verdict} {row['op']:24} {row['device']:8} {row['backend']:8} {detail}")
        lines.append("self-test passed" if report["passed"] else "self-test FAILED")
    return "\n".join(lines)


def _planned(launches: Report) -> Iterator[str]:
    for op, plan in launches.items():
        kernels = (f"{one['kernel']} {one['grid'][0]} x {one['threads']}" for one in plan)
        yield f"launches of {op} on {PLANNED_SHAPE} float32, blocks x threads: {', '.join(kernels)}"


def _loaded(extension: Report) -> str:
    if not extension["loaded"]:
        return f"not loaded: {extension['reason']}"
    made = "compiled with torch {torch} (runs from {target} on), CUDA {cuda}, {compiler}".format(**extension)
    return f"loaded: {', '.join(extension['architectures'])}; {made}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 1 when a self-test failed."""
    parser = argparse.ArgumentParser(prog="python -m normkernels.info", description="What is installed, and why.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--selftest", action="store_true", help="run every op against float64 equations")
    options = parser.parse_args(arguments)
    report = collect(options.selftest)
    print(json.dumps(report, indent=2) if options.json else render(report))
    return 0 if report.get("passed", True) else 1


if __name__ == "__main__":
    sys.exit(main())
