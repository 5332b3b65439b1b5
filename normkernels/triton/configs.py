"""The configurations with which the Triton kernels are compiled, from configs.json."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from normkernels.triton.support import Unsupported, first_line, interpreted, recorder

TABLE = Path(__file__).with_name("configs.json")


@dataclass(frozen=True)
class Config:
    """The options with which a kernel is compiled.

    block: columns of a tile, or the step of a product of small matrices. rows: the most rows of a result that one
    program computes; for single channels, the rows of a tile. precision: Triton's name of the products' precision.
    """

    block: int
    warps: int
    stages: int
    precision: str
    rows: int = 64


Key = tuple[str, int, str, str, int]


def read_table(path: Path) -> dict[Key, Config]:
    names = ("kernel", "size", "layout", "type", "arch")
    try:
        rows = json.loads(path.read_text())
        return {tuple(row.pop(name) for name in names): Config(**row) for row in rows}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        expected = ", ".join((*names, *(field.name for field in fields(Config))))
        raise ValueError(f"{path}: expected a JSON list of objects with {expected}, got {first_line(error)}") from None


@functools.cache
def table() -> dict[Key, Config]:
    """Return the package's table, changed by the entries of NORMKERNELS_TRITON_CONFIGS (see bench/gpu/tune.py)."""
    chosen = read_table(TABLE)
    if extra := os.environ.get("NORMKERNELS_TRITON_CONFIGS"):
        chosen |= read_table(Path(extra))
    return chosen


@contextmanager
def replaced(entries: Mapping[Key, Config]) -> Iterator[None]:
    """Use these entries in place of the table's inside the ``with`` block, in the whole process."""
    global _replaced
    before, _replaced = _replaced, dict(entries)
    _entry.cache_clear()
    try:
        yield
    finally:
        _replaced = before
        _entry.cache_clear()


_replaced: dict[Key, Config] = {}


def configuration(kernel: str, size: int, layout: str, dtype: torch.dtype, arch: int) -> Config:
    """Return the entry for this architecture, or for the newest older one of its kind.

    GPUs for desktops have less shared memory: from sm_120 on they use what sm_80 does, not sm_90's or sm_100's entries.

    size: the padded group size or plane, 1 for single channels and for gradients; layout as Columns.layout, "" where a
    kernel does not read activations or does not care.
    """
    return _entry(kernel, size, layout, dtype, arch, interpreted() and recorder() is None)


@functools.cache
def _entry(kernel: str, size: int, layout: str, dtype: torch.dtype, arch: int, small: bool) -> Config:
    """Return the entry, which in the interpreter is a small one."""
    kind = "float32" if dtype == torch.float32 else "half"
    older = [
        (key[4], config)
        for key, config in (table() | _replaced).items()
        if key[:4] == (kernel, size, layout, kind) and key[4] <= arch and not 90 <= key[4] < 120 <= arch
    ]
    if not older:
        entry = f"{kernel}, size {size}, {layout or 'any layout'}, {kind}, sm_{arch}"
        raise Unsupported(f"expected an entry for {entry} in {TABLE.name}, got none")
    config = max(older, key=lambda entry: entry[0])[1]
    if small:
        # The interpreter knows no split products. Its tiles are small, so that the small tensors of tests are cut, too.
        return replace(config, block=min(config.block, 16), precision="ieee")
    return config


@functools.cache
def passes_over_data() -> frozenset[str]:
    """Return the kernels whose configurations depend on the layout of the data."""
    return frozenset(kernel for kernel, _, layout, _, _ in read_table(TABLE) if layout)


def padded(size: int) -> int:
    """Return the side of a tile: a power of two, at least 16, the smallest that tensor cores multiply."""
    return max(16, 1 << (size - 1).bit_length())


def single_channels(group_size: int) -> bool:
    """Return whether groups have one channel: their matrices are numbers, and diagonal.py has kernels for them."""
    return group_size == 1


def tile_size(group_size: int) -> int:
    """Return the size by which the table knows a pass: 1 for single channels, which no tensor core multiplies."""
    return 1 if single_channels(group_size) else padded(group_size)
