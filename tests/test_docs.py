"""The code in the documentation runs, page by page, each block with the names of those before it."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# The blocks of docs/distributed.md need processes: tests/layers/test_sync_training.py.
PAGES = sorted(
    page for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
    if page.name != "distributed.md" and BLOCK.search(page.read_text(encoding="utf-8"))
)  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code(page: Path) -> None:
    names: dict[str, object] = {}
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        exec(compile(block, str(page), "exec"), names)


ROW = re.compile(r"^\| (?P<what>.+?) \|(?: (?P<cells>.+?) \|)? `(?P<file>[\w/]+\.py)::(?P<test>\w+)` \|$", re.MULTILINE)
SUPPORT = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
ROWS = [pytest.param(row, id=row["test"]) for row in ROW.finditer(SUPPORT)]


@pytest.mark.parametrize("row", ROWS)
def test_support_matrix(row: re.Match[str]) -> None:
    """The test of a row exists, and runs the layers that the row is about: no more, no less."""
    test = getattr(importlib.import_module(f"tests.{row['file'].removesuffix('.py').replace('/', '.')}"), row["test"])
    if row["cells"] is None:
        return
    layers = [name.strip() for name in SUPPORT.split("|---")[0].splitlines()[-1].split("|")[2:-2]]
    cells = dict(zip(layers, row["cells"].split(" | "), strict=True))
    assert set(cells.values()) <= {"yes", "refused", "gpu", "refused, gpu", "–"}
    marks = getattr(test, "pytestmark", [])
    refuses = re.search("refuse|needs_statistics", row["test"]) is not None
    assert any("refused" in cell for cell in cells.values()) == refuses
    assert any("gpu" in cell for cell in cells.values()) == any(mark.name == "gpu" for mark in marks)
    for mark in marks:
        if mark.name == "parametrize" and mark.args[0] in ("name", ("name", "marked")):
            values = [value if isinstance(value, str) else value[0] for value in mark.args[1]]
            run = {name for value in values for name in value.split("-")}
            assert {name for name, cell in cells.items() if cell != "–"} == run & set(layers)


def test_support_matrix_is_read() -> None:
    assert len(ROWS) == SUPPORT.count(".py::")


SOURCES = {".py", ".pyi", ".cpp", ".cu", ".cuh", ".h"}
FRAGMENT = re.compile(r'(?:"""|# |// )(?:Of|What|Those|Whose)\b.*')


def test_comments_are_whole_sentences() -> None:
    """Docstrings and comments that begin so leave out their subject; ruff looks at the first lines of docstrings."""
    folders = ("normkernels", "csrc", "tests", "bench")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.*") if path.suffix in SOURCES]
    assert len(sources) > 300
    found = {path.name: FRAGMENT.findall(path.read_text(encoding="utf-8")) for path in sources}
    assert {name: fragments for name, fragments in found.items() if fragments} == {}


LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md", *(ROOT / "docs").glob("*.md")]


def anchors(page: Path) -> set[str]:
    """Return the names under which a page's headings can be linked."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    """Every link to a file or a heading of the repository leads there."""
    for file, heading in LINK.findall(page.read_text(encoding="utf-8")):
        target = page.parent / file if file else page
        assert target.exists(), file
        assert not heading or heading in anchors(target), f"{file}#{heading}"


def test_the_readme_fits_in_the_head() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120
