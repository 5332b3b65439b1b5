"""Mutations drawn at random from the operators and constants of the package: ``python -m tests.mutations.draw``.

What is drawn once stays in drawn.json while it applies. What has lost its place is replaced by what the same generator
draws next, so that a change of the package changes few entries of the list.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator

from tests.mutations.notice import GROUPS
from tests.mutations.source import DRAWN, ROOT, Mutation, drawn, mutated, span, write_drawn

SEED = 15
EACH = 8  # mutations of every group of modules

OPERATORS = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"),
    ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"), ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"), ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.And: ("and", "or"), ast.Or: ("or", "and"),
}  # fmt: skip
NAMES = {
    "maximum": "minimum",
    "minimum": "maximum",
    "max": "min",
    "min": "max",
    "amax": "amin",
    "cos": "sin",
    "sin": "cos",
}


def sites(text: str) -> Iterator[tuple[str, int, int, str]]:
    """Yield every place to change: symbol, start and stop in the source, and what comes there instead.

    Left out are docstrings, annotations, messages of errors, and what only a GPU executes: there nothing can notice.
    """
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def at(line: int | None, column: int | None) -> int:
        """Return the offset in the text; columns count bytes."""
        assert line is not None and column is not None
        line_text = text[starts[line - 1] : starts[line]]
        return starts[line - 1] + len(line_text.encode()[:column].decode())

    def bounds(node: ast.expr) -> tuple[int, int]:
        return at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset)

    def between(left: ast.expr, right: ast.expr, operator: ast.AST) -> Iterator[tuple[int, int, str]]:
        if type(operator) in OPERATORS:
            old, new = OPERATORS[type(operator)]
            place = text.index(old, bounds(left)[1], bounds(right)[0])
            yield place, place + len(old), new

    def changes(node: ast.AST) -> Iterator[tuple[int, int, str]]:
        if isinstance(node, ast.BinOp):
            yield from between(node.left, node.right, node.op)
        elif isinstance(node, ast.AugAssign):
            yield from between(node.target, node.value, node.op)
        elif isinstance(node, ast.Compare):
            yield from between(node.left, node.comparators[0], node.ops[0])
        elif isinstance(node, ast.BoolOp):
            yield from between(node.values[0], node.values[1], node.op)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
            start, _ = bounds(node)
            yield start, bounds(node.operand)[0], ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            new = (not node.value) if isinstance(node.value, bool) else node.value + 1
            if isinstance(node.value, float) and node.value:
                new = 2 * node.value
            yield *bounds(node), repr(new)
        elif isinstance(node, ast.Attribute) and node.attr in NAMES:
            stop = bounds(node)[1]
            yield stop - len(node.attr), stop, NAMES[node.attr]
        elif isinstance(node, ast.Name) and node.id in NAMES:
            yield *bounds(node), NAMES[node.id]

    def walk(node: ast.AST, symbol: str) -> Iterator[tuple[str, int, int, str]]:
        if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr) or of_gpus(node):
            return
        for change in changes(node):
            yield symbol, *change
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from walk(child, symbol)

    def of_gpus(node: ast.AST) -> bool:
        if not isinstance(node, ast.stmt) or isinstance(node, ast.FunctionDef | ast.ClassDef):
            return False
        condition = node.test if isinstance(node, ast.If | ast.While) else node if not hasattr(node, "body") else None
        return condition is not None and any(word in ast.unparse(condition) for word in ("cuda", "is_compiling"))

    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            yield from walk(node, node.name)
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    yield from walk(method, f"{node.name}.{method.name}")


def as_mutation(module: str, text: str, symbol: str, start: int, stop: int, new: str) -> Mutation:
    """Return the change in whole lines, as many as make the text unique in the symbol."""
    first, last = span(text, symbol)
    end = text.find("\n", stop)
    end = last if end < 0 else min(end, last)
    begin = start
    while True:
        begin = text.rfind("\n", first, begin) + 1 if "\n" in text[first:begin] else first
        lead = len(text[begin:end]) - len(text[begin:end].lstrip())
        right = text[begin + lead : end]
        if text[first:last].count(right) == 1 or begin <= first:
            break
        begin -= 1
    return Mutation(f"{module}:{symbol}", right, text[begin + lead : start] + new + text[stop:end])


def candidates(modules: tuple[str, ...], generator: random.Random) -> Iterator[Mutation]:
    """Yield mutations without end, every module as likely as another one, and so is every place in it."""
    places = {}
    for module in modules:
        text = (ROOT / f"normkernels/{module.replace('.', '/')}.py").read_text()
        found = list(sites(text))
        if found:
            places[module] = text, found
    while True:
        module = generator.choice(list(places))
        text, found = places[module]
        yield as_mutation(module, text, *generator.choice(found))


def applied(mutation: Mutation) -> str | None:
    """Return the module's source with the mistake, None where the mistake has no place or is no Python."""
    try:
        text = mutated(mutation, (ROOT / mutation.file).read_text())
        ast.parse(text)
    except (OSError, ValueError, SyntaxError):
        return None
    return text


def draw(kept: list[Mutation]) -> list[Mutation]:
    """Return EACH mutations of every group: those of ``kept`` that still apply, and new ones in place of the others."""
    from tests.mutations.by_hand import BY_HAND

    result: list[Mutation] = []
    for group, modules in GROUPS.items():
        generator = random.Random(f"{SEED} {group}")
        chosen = [each for each in kept if each.module in modules and applied(each) is not None]
        known = {applied(each) for each in (*chosen, *BY_HAND) if each.module in modules}
        drawing = candidates(modules, generator)
        while len(chosen) < EACH:
            candidate = next(drawing)
            text = applied(candidate)
            if text is not None and text not in known:
                known.add(text)
                chosen.append(candidate)
        result += chosen
    return result


if __name__ == "__main__":
    write_drawn(draw(drawn() if DRAWN.exists() else []))
