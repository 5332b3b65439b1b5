"""Mistakes, put into a copy of the kernels one at a time, and what must catch each: the tests, or a sanitizer.

``python -m tests.simt.mutations [WORD ...]`` tries those with one of the words in their names, test_mutations.py all.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.simt import build

COPIED = ("csrc", "normkernels", "tests", "build/simt", "pyproject.toml")

WRONG_RESULT = "AssertionError"
OUT_OF_BOUNDS = "AddressSanitizer: heap-buffer-overflow"


@dataclass(frozen=True)
class Mutation:
    """In ``file``, ``right`` becomes ``wrong``; ``tests`` must fail.

    tests: arguments of pytest.
    shows_as: a pattern, found in what they print.
    order: of the threads of a block; a missing barrier may show in one only.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: Sequence[str]
    shows_as: str
    sanitize: bool = False
    order: str = "ascending"


MUTATIONS = (
    Mutation(
        "whiten: no barrier between the copies and the product",
        "csrc/cuda/whiten.cu",
        "__syncthreads();  // this tile is here, and all have left the one that the next load overwrites",
        "",
        ["tests/ops/test_whiten.py", "-k", "test_every_layout_and_type"],
        WRONG_RESULT,
    ),
    Mutation(
        "whiten: waits for one group of copies too few",
        "csrc/cuda/whiten.cu",
        "wait_for_copies<Shape::STAGES - 2>();",
        "wait_for_copies<Shape::STAGES - 1>();",
        ["tests/ops/test_whiten.py", "-k", "test_every_layout_and_type"],
        WRONG_RESULT,
    ),
    Mutation(
        "whiten: one column too many",
        "csrc/cuda/whiten.cu",
        "if (at >= stop) continue;",
        "if (at > stop) continue;",
        ["tests/ops/test_whiten.py", "-k", "test_every_layout_and_type"],
        OUT_OF_BOUNDS,
        sanitize=True,
    ),
    Mutation(
        "inverse_sqrt: no barrier before eps is added",
        "csrc/cuda/inverse_sqrt.cu",
        "__syncthreads();\n  whitening_matrix<",
        "whitening_matrix<",
        ["tests/ops/test_inverse_sqrt.py", "-k", "test_scales_and_eps"],
        WRONG_RESULT,
    ),
    Mutation(
        "inverse_sqrt: one row too many",
        "csrc/cuda/inverse_sqrt.cu",
        "M(i, j) = i < how.d &&",
        "M(i, j) = i <= how.d &&",
        ["tests/ops/test_inverse_sqrt.py", "-k", "test_widths_and_condition_numbers"],
        OUT_OF_BOUNDS,
        sanitize=True,
    ),
    Mutation(
        "iter_norm: no barrier before the adjoint",
        "csrc/cuda/iter_norm.cu",
        "__syncthreads();\n  covariance_adjoint<",
        "covariance_adjoint<",
        ["tests/ops/test_iter_norm.py", "-k", "test_every_layout_and_type"],
        WRONG_RESULT,
    ),
    Mutation(
        "spectral_filter: no barrier between the two sides",
        "csrc/cuda/spectral_filter.cu",
        "__syncthreads();\n    transform<false>(second, first, w_waves + 2",
        "transform<false>(second, first, w_waves + 2",
        ["tests/ops/test_spectral_kernels.py", "-k", "test_every_plane"],
        WRONG_RESULT,
    ),
    Mutation(
        "pop_norm: no barrier before the sums of warps are read",
        "csrc/cuda/diagonal.cuh",
        "__syncthreads();  // every warp's sums are there",
        "",
        ["tests/ops/test_pop_norm.py", "-k", "test_every_layout_and_type"],
        WRONG_RESULT,
    ),
    Mutation(
        "pop_norm: the last block but one of a channel goes on",
        "csrc/cuda/diagonal.cuh",
        "comes_last(workspace.tickets + tile, sweep.cut.parts,",
        "comes_last(workspace.tickets + tile, sweep.cut.parts - 1,",
        ["tests/ops/test_cuda.py", "-k", "test_several_parts_of_channels"],
        WRONG_RESULT,
    ),
    Mutation(
        "pop_norm: one access too many",
        "csrc/cuda/whiten.cu",
        "if (k * sweep.row < left) a_values",
        "if (k * sweep.row <= left) a_values",
        ["tests/ops/test_pop_norm.py", "-k", "test_channel_counts"],
        OUT_OF_BOUNDS,
        sanitize=True,
    ),
    Mutation(
        "precondition: no barrier before the values of warps are read",
        "csrc/cuda/precondition.cu",
        "__syncthreads();  // every warp's value is there",
        "",
        ["tests/ops/test_cuda.py", "-k", "test_rows_of_gradients"],
        WRONG_RESULT,
    ),
    Mutation(
        "precondition: no barrier before the next value of a warp",
        "csrc/cuda/precondition.cu",
        "__syncthreads();  // and read, before the next takes its place",
        "",
        ["tests/ops/test_cuda.py", "-k", "test_rows_of_gradients"],
        WRONG_RESULT,
    ),
    Mutation(
        "precondition: step 5 with the weights of before step 4",
        "csrc/cuda/precondition.cu",
        "? mean[channel[k]] * value : INFINITY",
        "? mean[channel[k]] * values.get(k, all.bfloat) : INFINITY",
        ["tests/ops/test_precondition.py", "-k", "test_each_kind_of_layer"],
        WRONG_RESULT,
    ),
    Mutation(
        "precondition: one row too many",
        "csrc/cuda/precondition.cu",
        "if (row >= layer.rows) return;",
        "if (row > layer.rows) return;",
        ["tests/ops/test_precondition.py", "-k", "test_each_kind_of_layer"],
        OUT_OF_BOUNDS,
        sanitize=True,
    ),
    Mutation(
        "moments: no barrier between the copies and the product",
        "csrc/cuda/reduce.cuh",
        "__syncthreads();  // this tile is here, and all have left the one that the next load overwrites",
        "",
        ["tests/ops/test_moments.py", "-k", "test_every_layout_and_type"],
        WRONG_RESULT,
    ),
)


def survives(mutation: Mutation) -> str:
    """Return why the mistake was not caught as it should, with what the tests printed; else an empty string."""
    with mutated(mutation) as root:
        mode = "sanitized" if mutation.sanitize else "plain"
        # Without pytest's capture, which would take along what a sanitizer says when it ends the process.
        options = ["-x", "-q", "-s", "-p", "no:cacheprovider", f"--simt={mode}"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *mutation.tests],
            cwd=root,
            env=environment(root, mutation.order),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    if done.returncode == 0:
        return f"{mutation.name}: the tests pass all the same\n{done.stdout}"
    if not re.search(mutation.shows_as, done.stdout):
        return f"{mutation.name}: expected a failure that says {mutation.shows_as!r}, got\n{done.stdout}"
    return ""


@contextmanager
def mutated(mutation: Mutation) -> Iterator[Path]:
    """Make a copy of the repository, as far as the tests need it, with the mistake."""
    with tempfile.TemporaryDirectory(prefix="normkernels-mutation-") as folder:
        root = Path(folder)
        for name in COPIED:
            source, target = build.ROOT / name, root / name
            if source.is_dir():
                # Links to the objects, which nothing writes to: only what is mutated is compiled.
                copy = os.symlink if name.startswith("build") else shutil.copy2
                ignored = shutil.ignore_patterns("__pycache__", "*.partial", "*.lock", "lib*.so")
                shutil.copytree(source, target, ignore=ignored, copy_function=copy)
            else:
                shutil.copy2(source, target)
        file = root / mutation.file
        text = file.read_text()
        if text.count(mutation.right) != 1:
            count = text.count(mutation.right)
            raise ValueError(f"{mutation.name}: expected the text once in {mutation.file}, got it {count} times")
        file.write_text(text.replace(mutation.right, mutation.wrong))
        yield root


def environment(root: Path, order: str) -> dict[str, str]:
    """Return this process's variables without those of sanitizers and pytest's workers, and with the copy to import."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "LD_PRELOAD"))}
    return {**inherited, "PYTHONPATH": str(root), "NORMKERNELS_SIMT_THREADS": order}


if __name__ == "__main__":
    chosen = [one for one in MUTATIONS if not sys.argv[1:] or any(word in one.name for word in sys.argv[1:])]
    survivors = 0
    for mutation in chosen:
        reason = survives(mutation)
        survivors += bool(reason)
        print(reason or f"{mutation.name}: caught", flush=True)
    sys.exit(survivors > 0)
