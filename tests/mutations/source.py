"""A mutation, and the source of the symbol that it changes."""

from __future__ import annotations

import ast
import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DRAWN = Path(__file__).with_name("drawn.json")


@dataclass(frozen=True)
class Mutation:
    """In ``symbol``, ``right`` becomes ``wrong``, and the tests that notice.py names for the module must fail.

    symbol: "module:name" within the package, the name that of a function, of a class, of a method with its class, or of
        what a statement at the top level of the module assigns to.
    right: text that is in the symbol's source once. It is what keeps the mutation in its place when lines move.
    tests: arguments of pytest in place of those of notice.py.
    harmless: the reason why no test can fail, where there is one.
    """

    symbol: str
    right: str
    wrong: str
    tests: tuple[str, ...] = ()
    harmless: str = ""

    def __str__(self) -> str:
        return f"{self.symbol}: {self.right!r} -> {self.wrong!r}"

    @property
    def module(self) -> str:
        return self.symbol.partition(":")[0]

    @property
    def file(self) -> str:
        """The path of the module in the repository."""
        return f"normkernels/{self.module.replace('.', '/')}.py"


def mutated(mutation: Mutation, text: str) -> str:
    """Return the module's source ``text`` with the mistake in it."""
    start, stop = span(text, mutation.symbol.partition(":")[2], mutation)
    inside = text[start:stop]
    if inside.count(mutation.right) != 1:
        raise ValueError(
            f"{mutation}: expected the text once in the symbol, got it {inside.count(mutation.right)} times"
        )
    return text[:start] + inside.replace(mutation.right, mutation.wrong) + text[stop:]


def span(text: str, name: str, mutation: object = "") -> tuple[int, int]:
    """Return where the source of a symbol begins and ends, decorators included."""
    parts = name.split(".")
    body = parsed(text).body
    for part in parts:
        found = [node for node in body if part in names(node)]
        if len(found) != 1:
            raise ValueError(f"{mutation}: expected one {name} in the module, got {len(found)}")
        body = getattr(found[0], "body", [])
    lines = text.splitlines(keepends=True)
    node = found[0]
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    assert node.end_lineno is not None
    return sum(map(len, lines[: first - 1])), sum(map(len, lines[: node.end_lineno]))


@functools.lru_cache
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


def names(node: ast.stmt) -> list[str]:
    """Return the names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]


def drawn() -> list[Mutation]:
    """Return the mutations that draw.py has drawn."""
    return [Mutation(**row) for row in json.loads(DRAWN.read_text())]


def write_drawn(mutations: list[Mutation]) -> None:
    rows = [{key: value for key, value in asdict(each).items() if value} for each in mutations]
    DRAWN.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")


def everything() -> list[Mutation]:
    """Return the whole list of mutations, in its order."""
    from tests.mutations.by_hand import BY_HAND

    return [*BY_HAND, *drawn()]
