"""Precision and configurations of the Triton kernels: what every product states, and the table of configs.json."""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import normkernels as nk
from normkernels.dispatch import choose
from normkernels.dispatch.record import OPS
from normkernels.triton import configs, launch, support
from tests.ops.triton_calls import DEVICE, gaussian

pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(not choose.availability("triton")[0], reason="neither a GPU nor TRITON_INTERPRET=1")
PACKAGE = Path(nk.__file__).parent


def kernel_sources() -> Iterator[Path]:
    yield from (*PACKAGE.glob("primitives/*/triton.py"), *PACKAGE.glob("triton/*.py"))


def test_every_product_states_its_precision() -> None:
    """tl.dot's own default for float32 is TF32, three digits."""
    products = [
        (path, node)
        for path in kernel_sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "dot"
    ]
    assert len(products) > 4
    for path, node in products:
        assert "input_precision" in [keyword.arg for keyword in node.keywords], f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    ("ours", "torchs", "dtype", "expected"),
    [
        (True, True, torch.float32, "tf32"),
        (True, False, torch.float32, "tf32x3"),
        (False, True, torch.float32, "tf32x3"),
        (True, True, torch.bfloat16, "bf16x3"),
    ],
)
def test_tf32_only_where_both_ask_for_it(ours: bool, torchs: bool, dtype: torch.dtype, expected: str) -> None:
    from normkernels.primitives.iter_norm.triton import iter_norm, iter_norm_backward

    used: dict[str, str] = {}

    def record(kernel: Any, grid: Any, arguments: Any, config: Any, meta: dict[str, Any]) -> None:
        used[kernel.fn.__name__] = meta["PRECISION"]

    setting: Any = torch.backends.cuda.matmul
    setting.fp32_precision = "tf32" if torchs else "ieee"
    x = gaussian((9, 8), dtype)
    try:
        with support.recording(90, record), nk.use_tf32() if ours else contextlib.nullcontext():
            y, mean, W, S, scale = iter_norm(x, None, None, 8, 5, 1e-5, False, False)
            iter_norm_backward(y, x, None, mean, W, S, scale, 5, False, False)
    finally:
        setting.fp32_precision = "none"
    assert not support.tf32_allowed()
    assert used.pop("mix_kernel") == expected
    assert len(used) == 4 and set(used.values()) == {"tf32x3"}  # statistics and Newton's iteration


def test_the_table_serves_every_architecture() -> None:
    """Entries for sm_80 serve all later ones that have no entries of their own."""
    keys = {key[:4] for key in configs.table()}
    on_sm_80 = {key[:4] for key in configs.table() if key[4] == 80}
    # There one kernel spills whatever its configuration, and the other is never reached; see docs/triton.md.
    assert keys - on_sm_80 == {(name, 128, "odd", "float32") for name in ("cross_moments", "stacked_mix")}
    with support.recording(80, lambda *_: None):  # otherwise the interpreter's
        for key in keys:
            dtype = torch.float32 if key[3] == "float32" else torch.float16
            newest = configs.configuration(*key[:3], dtype, 110)
            assert newest.warps in (1, 2, 4, 8, 16) and newest.block & (newest.block - 1) == 0
        assert configs.configuration("moments", 128, "positions", torch.float32, 120) != configs.configuration(
            "moments", 128, "positions", torch.float32, 100
        )
        oldest = configs.configuration("moments", 64, "positions", torch.float32, 86)
        assert oldest == configs.table()["moments", 64, "positions", "float32", 80]
        with pytest.raises(support.Unsupported, match=r"an entry for moments, size 64.*sm_75"):
            configs.configuration("moments", 64, "positions", torch.float32, 75)


def test_a_table_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NORMKERNELS_TRITON_CONFIGS replaces single entries."""
    row = {"kernel": "moments", "size": 16, "layout": "channels", "type": "float32", "arch": 80,
           "block": 16, "warps": 2, "stages": 1, "precision": "ieee"}  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps([row]))
    monkeypatch.setenv("NORMKERNELS_TRITON_CONFIGS", str(tmp_path / "mine.json"))
    own = configs.table.__wrapped__()
    assert own["moments", 16, "channels", "float32", 80] == configs.Config(16, 2, 1, "ieee")
    assert own["moments", 16, "positions", "float32", 80] == configs.table()["moments", 16, "positions", "float32", 80]


@pytest.mark.parametrize("text", ["", "{}}", "[{}]", '[{"kernel": "mix"}]', '["mix"]', None], ids=str)
def test_a_table_that_is_none(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.json: expected a JSON list of objects with kernel, size.*precision"):
        configs.read_table(path)


@pytest.mark.parametrize("op", OPS)
def test_the_record_knows_the_entries_that_an_op_looks_up(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the record the package says which backend serves a call, and benchmarks find what launches a kernel."""
    looked_up: set[str] = set()

    def noting(kernel: str, *key: Any) -> configs.Config:
        looked_up.add(kernel)
        return configs.configuration(kernel, *key)

    for module in [*(record.triton_module for record in OPS.values()), "normkernels.triton.diagonal"]:
        if hasattr(importlib.import_module(module), "configuration"):
            monkeypatch.setattr(importlib.import_module(module), "configuration", noting)
    samples = [arguments for d in (8, 1) for arguments in OPS[op].samples(gaussian((3, 8, 4, 3)), d)]
    with nk.use_backend("triton"), support.recording(90, lambda *_: None):
        for arguments in samples:
            OPS[op].raw(*arguments)
    assert looked_up == {*OPS[op].kernels}


def test_a_group_size_beyond_the_channels_is_one_group() -> None:
    x = gaussian((9, 8))
    with nk.use_backend("triton"):
        assert nk.backend_of("iter_norm", x, group_size=256) == "triton"
        with pytest.raises(ValueError, match="divisor of the 8 channels, got 3"):
            nk.backend_of("iter_norm", x, group_size=3)
        with pytest.raises(ValueError, match="plane: expected at least 1, got 0"):
            nk.backend_of("spectral_filter", x, plane=(0, 4))


# Planes of 56, 28, 14 and 7, an odd start, and channels innermost: how many columns one load can take at a time.
@pytest.mark.parametrize(
    ("x", "run", "layout"),
    [
        (torch.zeros(2, 8, 56, 56), 16, "positions"),
        (torch.zeros(2, 8, 14, 14), 4, "positions"),
        (torch.zeros(2, 8, 7, 7), 1, "odd"),
        (torch.zeros(2, 8, 5, 6)[:, :, 1:4], 2, "odd"),
        (torch.zeros(2, 8, 4, 4).contiguous(memory_format=torch.channels_last), 1, "channels"),
        (torch.zeros(9, 8), 1, "channels"),
    ],
    ids=["56", "14", "7", "cropped", "NHWC", "NC"],
)
def test_how_columns_lie_in_memory(x: Tensor, run: int, layout: str) -> None:
    seen = launch.columns(x)
    assert (seen.run.value, seen.layout) == (run, layout)
    assert seen.total == x.numel() // 8


@pytest.mark.parametrize("total", [1, 63, 64, 65, 1000, 10**7])
@pytest.mark.parametrize("groups", [1, 7, 1000])
def test_parts_cover_the_columns(total: int, groups: int) -> None:
    parts, chunk = launch.split(total, groups, 64, DEVICE)
    assert chunk % 64 == 0 and (parts - 1) * chunk < total <= parts * chunk
