"""The list of mutations stays true: every mistake has its place in the package, and tests that have to notice it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from tests.mutations import draw, notice, run, source
from tests.mutations.source import Mutation

TEXT = '''"""Text."""

EPS = 1e-5


class Norm:
    def forward(self, x):
        """At most 2 of them."""
        return x * 2 + EPS

    def backward(self, y):
        return y * 2
'''


def test_every_mutation_applies() -> None:
    """A mistake whose place is gone is an error that names it; python -m tests.mutations.draw replaces drawn ones."""
    every = source.everything()
    for mutation in every:
        ast.parse(source.mutated(mutation, (source.ROOT / mutation.file).read_text()))
        assert mutation.right != mutation.wrong, mutation
    assert len({(each.symbol, each.right, each.wrong) for each in every}) == len(every)


def test_every_group_has_its_share() -> None:
    count = {group: sum(each.module in modules for each in source.drawn()) for group, modules in notice.GROUPS.items()}
    assert set(count.values()) == {draw.EACH}


def test_the_tests_that_have_to_notice_are_there() -> None:
    for mutation in source.everything():
        paths = [name for name in notice.tests_for(mutation) if name.startswith("tests/")]
        assert paths and all((source.ROOT / path.partition("::")[0]).exists() for path in paths), mutation


def test_the_place_is_that_of_the_symbol() -> None:
    wrong = source.mutated(Mutation("m:Norm.forward", "* 2", "* 3"), TEXT)
    assert wrong == TEXT.replace("x * 2", "x * 3")
    assert "EPS = 2" in source.mutated(Mutation("m:EPS", "1e-5", "2"), TEXT)


@pytest.mark.parametrize(
    ("symbol", "right", "message"),
    [
        ("m:Norm", "* 2", r"m:Norm: '\* 2' -> '!': expected the text once in the symbol, got it 2 times"),
        ("m:Norm.forward", "* 4", r"m:Norm.forward: .*once in the symbol, got it 0 times"),
        ("m:Norm.inference", "* 2", r"expected one Norm.inference in the module, got 0"),
    ],
)
def test_a_place_that_is_gone_is_named(symbol: str, right: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source.mutated(Mutation(symbol, right, "!"), TEXT)


def test_what_can_be_drawn() -> None:
    """Operators and constants of functions can be drawn, docstrings cannot."""
    found = [draw.as_mutation("m", TEXT, *site) for site in draw.sites(TEXT)]
    assert [(each.symbol, each.wrong) for each in found] == [
        ("m:Norm.forward", "return x * 2 - EPS"),
        ("m:Norm.forward", "return x / 2 + EPS"),
        ("m:Norm.forward", "return x * 3 + EPS"),
        ("m:Norm.backward", "return y / 2"),
        ("m:Norm.backward", "return y * 3"),
    ]
    assert all(source.mutated(each, TEXT) != TEXT for each in found)


def test_what_was_drawn_stays() -> None:
    kept = source.drawn()
    assert draw.draw(kept) == kept


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a package of one function and its test, a program that is spared pytest's start."""
    (tmp_path / "normkernels").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "normkernels" / "m.py").write_text(
        "def f(x):\n    while x > 9:\n        x -= 1\n    return x + 0 * x\n"
    )
    (tmp_path / "tests" / "of_m.py").write_text(
        "from normkernels.m import f\n\nassert f(12) == 9, print('FAILED of_m')\n"
    )
    (tmp_path / "tests" / "fails.py").write_text("assert False\n")
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "COPIED", ("normkernels", "tests", "pyproject.toml"))
    monkeypatch.setattr(run, "PYTEST", [sys.executable, "-S"])
    monkeypatch.setattr(run, "SHORTEST_LIMIT", 2.0)
    monkeypatch.setattr(run, "SLOWER", 0.0)
    return tmp_path


def test_a_run(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Mistakes are killed by a test, by time, and not at all; the project and the copy are as before."""
    before = (project / "normkernels" / "m.py").read_text()
    copy = run.Copy(tmp_path_factory.mktemp("copy"))
    record = run.Record.read(project / "build" / "mutations.json", again=False)
    tests = ("tests/of_m.py",)
    mistakes = [
        Mutation("m:f", "x > 9", "x > 8", tests),
        Mutation("m:f", "x -= 1", "x -= 0", tests),
        Mutation("m:f", "x + 0 * x", "x - 0 * x", tests),
        Mutation("m:f", "def f(x):", "def g(x):", tests),
    ]
    found = {mistake: run.outcome(copy, mistake, record) for mistake in mistakes}
    assert [entry["result"] for entry in found.values()] == ["killed", "killed", "survived", "killed"]
    assert [entry.get("by") for entry in found.values()] == ["FAILED of_m", "time", None, "exit status 1"]
    assert (copy.root / "normkernels" / "m.py").read_text() == before == (project / "normkernels" / "m.py").read_text()
    text = run.report(found, 9)
    assert "4 of 9" in text and "3 were noticed (1 of them" in text and "+x - 0 * x" in text

    known = run.Record.read(project / "build" / "mutations.json", again=False)
    copy.run = None  # type: ignore[method-assign,assignment]
    assert run.outcome(copy, mistakes[0], known) == found[mistakes[0]]


@pytest.mark.parametrize("name", ["fails", "nowhere"])
def test_tests_that_cannot_notice(name: str, project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """They fail without a mistake, or there are none of that name."""
    copy = run.Copy(tmp_path_factory.mktemp("copy"))
    mistake = Mutation("m:f", "x > 9", "x > 8", (f"tests/{name}.py",))
    with pytest.raises(RuntimeError, match=rf"tests/{name}.py: expected tests that pass without a mistake, got"):
        run.outcome(copy, mistake, run.Record.read(project / "record.json", again=False))
