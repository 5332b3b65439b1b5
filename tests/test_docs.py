"""The code in the documentation runs, page by page, each block with the names of those before it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Those of docs/distributed.md need processes: tests/layers/test_sync.py.
PAGES = sorted(
    page for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
    if page.name != "distributed.md" and BLOCK.search(page.read_text(encoding="utf-8"))
)  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code(page: Path) -> None:
    names: dict[str, object] = {}
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        exec(compile(block, str(page), "exec"), names)
