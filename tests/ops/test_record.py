"""One record defines an op: a toy op made of nothing else, what records refuse, and that op names stand nowhere else.

The toy is CONTRIBUTING's recipe for adding an op, as code.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import normkernels
import normkernels as nk
from normkernels import _selftest
from normkernels.dispatch.autograd import call
from normkernels.dispatch.define import define
from normkernels.dispatch.record import IMPLEMENTATIONS, OPS, Op, Request
from normkernels.triton import configs
from tests.tolerances import assert_agree

PACKAGE = Path(normkernels.__file__).parent

# --- a toy op: y = weight x for each channel ------------------------------------------------------------------------


def eager(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight.view(-1, *[1] * (x.dim() - 2))


def fake(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


def reference(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (torch.einsum("nc...,c->nc...", x, weight),)


def samples(x: Tensor, group_size: int) -> Iterator[tuple[Any, ...]]:
    yield x, torch.linspace(1, 2, x.shape[1], dtype=x.dtype, device=x.device)


class Toy(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        result: Tensor = OPS["toy"].raw(x, weight)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        return toy(grad, weight), (grad * x).flatten(2).sum((0, 2))


TOY = Op(
    schema="toy(Tensor x, Tensor weight) -> Tensor",
    eager=eager,
    fake=fake,
    autograd=Toy,
    channels=((1, 0), (1,)),
    request=lambda x, weight: Request(x),
    reference=reference,
    tolerance=lambda x, weight: 2.0**-24,  # one product, rounded once
    samples=samples,
    flops=lambda x, weight: math.prod(x),
)


def toy(x: Tensor, weight: Tensor) -> Tensor:
    result: Tensor = call(TOY, x, weight)
    return result


@pytest.fixture(scope="module")
def x() -> Iterator[Tensor]:
    define(TOY)
    yield _selftest.activations(torch.device("cpu"))
    # The dispatcher keeps the op; the tables forget it.
    del OPS["toy"], IMPLEMENTATIONS["toy"]


@pytest.mark.filterwarnings("ignore:.*instead of the CUDA kernels")
def test_the_dispatcher_has_it(x: Tensor) -> None:
    weight = torch.rand(8)
    assert torch.equal(torch.ops.normkernels.toy(x, weight), eager(x, weight))
    assert torch.equal(torch.ops.normkernels_next.toy(x, weight), eager(x, weight))
    assert nk.backend_of("toy", x) == "eager"


def test_it_is_exact_under_autocast(x: Tensor) -> None:
    """As every op, the toy runs without autocast."""
    seen = []

    def watching(x: Tensor, weight: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return eager(x, weight)

    define(replace(TOY, schema=TOY.schema.replace("toy", "toy_watched"), eager=watching, autograd=None))
    try:
        with torch.autocast("cpu", torch.bfloat16):
            torch.ops.normkernels.toy_watched(x, torch.ones(8))
    finally:
        del OPS["toy_watched"], IMPLEMENTATIONS["toy_watched"]
    assert seen == [False]


def test_opcheck(x: Tensor) -> None:
    """Schema, fake, gradient and symbolic shapes."""
    for given in TOY.samples(x, 4):
        torch.library.opcheck(TOY.raw, tuple(value.detach().requires_grad_() for value in given))


def test_gradient(x: Tensor) -> None:
    weight = torch.linspace(1, 2, 8, dtype=torch.float64)
    leaves = x[:, :, :2, :2].double().requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(toy, leaves)


def test_vmap(x: Tensor) -> None:
    weights = torch.stack((torch.ones(8), torch.rand(8)))
    expected = torch.stack([toy(x, weight) for weight in weights])
    assert_agree(torch.vmap(toy, (None, 0))(x, weights), expected)
    assert_agree(torch.vmap(torch.ops.normkernels.toy, (None, 0))(x, weights), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
def test_compiles_whole(x: Tensor) -> None:
    compiled = torch.compile(toy, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, torch.ones(8)), x)


@pytest.mark.parametrize("factor", [1.0, 1.001])
def test_the_selftest_checks_it(x: Tensor, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(IMPLEMENTATIONS["toy"], "eager", lambda x, weight: factor * eager(x, weight))
    (row,) = (row for row in _selftest.run(x.device) if row["op"] == "toy")
    assert row["passed"] == (factor == 1)


# --- records that are wrong -----------------------------------------------------------------------------------------

ONE_ARGUMENT = r"expected a function of x, weight, got \(x.*"


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("schema", "toy", r"schema: expected name\(Type argument, ...\) -> Type, got 'toy'"),
        ("schema", "toy(Tensor x, str mode) -> Tensor", r"toy: schema: expected arguments that are no strings"),
        ("schema", "toy(Tensor(a!) x, Tensor weight) -> Tensor", "toy: schema: expected no changed arguments"),
        ("schema", "toy(Tensor x, Tensor weight) -> (Tensor, Tensor)", r"toy: channels: .* 2 returned, got"),
        ("eager", lambda x: x, f"toy: eager: {ONE_ARGUMENT}"),
        ("eager", None, "toy: eager: expected a function of x, weight, got None"),
        ("fake", lambda x: x, f"toy: fake: {ONE_ARGUMENT}"),
        ("request", lambda x: Request(x), f"toy: request: {ONE_ARGUMENT}"),
        ("reference", lambda x: x, f"toy: reference: {ONE_ARGUMENT}"),
        ("tolerance", 1e-5, "toy: tolerance: expected a function of x, weight, got 1e-05"),
        ("flops", lambda x: 1, f"toy: flops: {ONE_ARGUMENT}"),
        ("samples", None, "toy: samples: expected a function of activations and a group size, got None"),
        ("channels", ((1,), (1,)), r"toy: channels: expected dimensions of 2 tensors taken and 1 returned, got"),
        ("onnx", lambda x: x, f"toy: onnx: {ONE_ARGUMENT}"),
        ("kernels", ("mix",), r"toy: kernels: expected none without tests\.ops\.triton, got \('mix',\)"),
    ],
)
def test_a_wrong_part_is_named(part: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TOY, **{part: value})


@pytest.mark.parametrize("part", ["eager", "fake", "request", "reference", "tolerance", "samples", "flops"])
def test_a_missing_part_is_named(part: str) -> None:
    parts = {field.name: getattr(TOY, field.name) for field in fields(TOY) if field.name != part}
    with pytest.raises(ValueError, match=rf"^toy: {part}: expected a function of .*, got None$"):
        Op(**parts)


def test_a_record_needs_a_schema() -> None:
    """Without one there is no name of an op."""
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'schema'"):
        Op(eager=eager)


# --- one place for each op's name -----------------------------------------------------------------------------------


def names_in(path: Path) -> set[str]:
    """Return the op names that a module has as strings or raw ops."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and node.value in OPS:
            found.add(node.value)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.ops.normkernels":
            found.add(node.attr)
    return found


def test_an_ops_name_stands_in_its_folder_only() -> None:
    """Everything else finds ops by their records, or calls public functions. Folders of primitives may call others."""
    kernels = {key[0] for key in configs.table()}  # some of Triton's kernels have the name of an op
    elsewhere = {
        str(path.relative_to(PACKAGE)): names - (kernels if path.parent.name == "triton" else set())
        for path in PACKAGE.rglob("*.py")
        if "primitives" not in path.parts and path.name != "ops.py" and (names := names_in(path))
    }
    assert {module: names for module, names in elsewhere.items() if names} == {}
