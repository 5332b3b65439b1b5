"""Build script: compiles the CUDA extension where that is possible and records why where it is not.

NORMKERNELS_BUILD=auto|cuda|none. auto (the default) always installs, cuda fails with one message when the
extension cannot be compiled, none never compiles. Everything else is declared in pyproject.toml; sources,
flags and architectures are in csrc/build.json. CMakeLists.txt builds what ``describe`` tells it.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import setuptools
from setuptools import Command, Extension, setup
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent


def load_build_module() -> ModuleType:
    """Load normkernels/_build.py by its path: importing it through the package would import torch."""
    spec = importlib.util.spec_from_file_location("normkernels_build", ROOT / "normkernels" / "_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


_build = load_build_module()


def build_configuration() -> dict[str, Any]:
    """Return the contents of csrc/build.json."""
    configuration: dict[str, Any] = json.loads((ROOT / "csrc" / "build.json").read_text(encoding="utf-8"))
    return configuration


def source_files(configuration: dict[str, Any], suffix: str = "") -> list[str]:
    """Return the extension's sources that end in ``suffix``, sorted, relative to the root as setuptools asks."""
    found = (path for pattern in configuration["sources"] for path in (ROOT / "csrc").glob(pattern))
    return sorted(path.relative_to(ROOT).as_posix() for path in found if path.name.endswith(suffix))


def prepare_environment(tools: Any) -> None:
    """Set defaults for what torch's build helper reads from the environment; the user's own settings win."""
    # This comes before torch.utils.cpp_extension is imported, which looks for the toolkit only once.
    os.environ.setdefault("CUDA_HOME", tools.nvcc.home)
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), str(Path(tools.ninja).parent)])
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    os.environ.setdefault("MAX_JOBS", str(_build.default_jobs(cores, memory)))


def cuda_extension(configuration: dict[str, Any], tools: Any) -> Extension:
    """Return the extension module normkernels._C.

    It is not torch's CUDAExtension: that links torch's C++ libraries, whose symbols change from release to release, and
    warnings in torch's headers would count as ours.
    """
    import pybind11
    from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

    defines = [f"-D{define}" for define in configuration["defines"]]
    folders = [f"-I{ROOT / 'csrc' / folder}" for folder in configuration["include"]]
    architectures = _build.architecture_flags(tools.codes)
    headers = (pybind11.get_include(), *include_paths())  # in this order: torch's folders have a pybind11 of their own
    # The standard is left to torch's helper, which follows torch's headers; below 2.13 it takes C++17, too old for us.
    standard = ["-std=c++20"] if _build.parse_version(tools.torch) < (2, 13) else []
    shared = defines + folders + standard
    return Extension(
        "normkernels._C",
        source_files(configuration),
        include_dirs=[tools.cudart.include],
        library_dirs=[TORCH_LIB_PATH, tools.cudart.folder],
        libraries=["torch_cpu", "torch_cuda", tools.cudart.library],
        depends=sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob("**/*.*h")),
        language="c++",
        extra_compile_args={
            "cxx": [
                *shared,
                *configuration["cxx_flags"],
                *(f"-isystem{folder}" for folder in headers),
                *(flag for flag in architectures if flag.startswith("-D")),
            ],
            "nvcc": [
                *shared,
                *configuration["nvcc_flags"],
                *(f"-isystem={folder}" for folder in headers),
                *architectures,
            ],
        },
    )


def build_ext_command(mode: str, record: dict[str, Any]) -> type[Command]:
    """Return torch's build_ext, changed so that in mode auto a failed compilation becomes a record."""
    from torch.utils.cpp_extension import BuildExtension

    class BuildCuda(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                message = f"compiling the CUDA extension failed: {error} (pip -v shows the messages)"
                if mode == "cuda":
                    raise SystemExit(f"normkernels: {message}") from error
                print(f"normkernels: {message}\nnormkernels: going on without it", file=sys.stderr)
                record.update(built=False, reason=message)
                self.extensions: list[Extension] = []  # later steps must not look for a file that does not exist

    return BuildCuda


def commands(record: dict[str, Any]) -> dict[str, type[Command]]:
    """Return the commands that write ``record`` into the built package."""

    class WriteRecord(Command):
        """The last subcommand of build, so that it sees what build_ext wrote into the record."""

        description = "record whether the CUDA extension was built"
        user_options: ClassVar[list[tuple[str, str | None, str | None]]] = []
        build_lib: str
        editable_mode = False

        def initialize_options(self) -> None:
            self.build_lib = ""

        def finalize_options(self) -> None:
            self.build_lib = self.get_finalized_command("build").build_lib

        def run(self) -> None:
            built = Path(self.build_lib) / "normkernels" / _build.RECORD_NAME
            path = ROOT / "normkernels" / _build.RECORD_NAME if self.editable_mode else built
            if self.editable_mode and not record["built"]:
                for stale in path.parent.glob("_C*.so"):  # left by an earlier build in place: it would be imported
                    stale.unlink()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

        def get_source_files(self) -> list[str]:
            return []

        def get_outputs(self) -> list[str]:
            return [f"{self.build_lib}/normkernels/{_build.RECORD_NAME}"]

        def get_output_mapping(self) -> dict[str, str]:
            source = f"normkernels/{_build.RECORD_NAME}"
            return dict.fromkeys(self.get_outputs(), source) if self.editable_mode else {}

    class CleanBuild(build):
        sub_commands: ClassVar[list[tuple[str, Any]]] = [*build.sub_commands, ("write_record", None)]

        def run(self) -> None:
            # pip builds in the source tree and setuptools packs all that lies in build_lib: without this,
            # modules that were since renamed or removed would be installed again.
            shutil.rmtree(Path(self.build_lib) / "normkernels", ignore_errors=True)
            super().run()

    return {"build": CleanBuild, "write_record": WriteRecord}


def describe() -> dict[str, Any]:
    """Return how setup.py would compile the extension here, or why it would not; CMakeLists.txt follows it."""
    configuration = build_configuration()
    probe = functools.cache(functools.partial(_build.probe_toolchain, configuration["architectures"]))
    possible, reason = _build.decide("auto", source_files(configuration, ".cu"), probe)
    if not possible:
        return {"possible": possible, "reason": reason}
    prepare_environment(probe())
    extension = cuda_extension(configuration, probe())
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

    return {
        "possible": possible,
        "reason": reason,
        "sources": extension.sources,
        "include_dirs": extension.include_dirs,
        "library_dirs": extension.library_dirs,
        "libraries": extension.libraries,
        # CMake wrongly takes nvcc's default for C++20, and torch's helper, which would add the flag, is not used.
        "cxx_flags": ["-std=c++20"] + extension.extra_compile_args["cxx"],
        "nvcc_flags": ["-std=c++20"] + COMMON_NVCC_FLAGS + extension.extra_compile_args["nvcc"],
        "nvcc": os.path.join(probe().nvcc.home, "bin", "nvcc"),
        "architectures": probe().codes,
    }


def main() -> None:
    """Decide whether to compile the extension, then hand over to setuptools."""
    configuration = build_configuration()
    probe = functools.cache(functools.partial(_build.probe_toolchain, configuration["architectures"]))
    try:
        _build.check_setuptools(setuptools.__version__)
        mode = _build.build_mode()
        built, reason = _build.decide(mode, source_files(configuration, ".cu"), probe)
    except _build.BuildError as error:
        raise SystemExit(f"normkernels: {error}") from None
    record: dict[str, Any] = {"built": built, "reason": reason, "mode": mode}
    cmdclass = commands(record)
    extensions: list[Extension] = []
    if built:
        tools = probe()
        prepare_environment(tools)
        record |= {
            "torch": tools.torch,
            "torch_cuda": tools.torch_cuda,
            "nvcc": ".".join(map(str, tools.nvcc.version)),
            "architectures": tools.codes,
        }
        extensions.append(cuda_extension(configuration, tools))
        cmdclass["build_ext"] = build_ext_command(mode, record)
    setup(ext_modules=extensions, cmdclass=cmdclass)


if __name__ == "__main__":  # also true under setuptools' build backend
    main()
