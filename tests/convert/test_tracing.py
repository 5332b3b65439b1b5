"""No forward ends the interpreter, whatever it does with what it is traced with; what is converted is right."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.proxy import TraceError

from normkernels.convert._graph import Tracer
from tests.convert.forwards import NETWORKS, REFUSED, Block

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="each forward has a process of its own, by os.fork")
WHOLE = ("Factory", "PointNet")  # networks of their own, not forwards in the common network


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.convert.forwards"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=True)
    return {name: result for line in done.stdout.splitlines() for name, result in json.loads(line).items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_conversions(name: str, outcomes: dict[str, Any]) -> None:
    result = outcomes[name]
    assert "error" not in result, result["error"]
    reason = REFUSED[name][1] if name in REFUSED else None
    strict, lenient = result["strict"], result["lenient"]
    assert lenient["norms"] == (["block.bn"] if reason else [])
    if reason:
        said = (
            r"'block\.bn' \(BatchNorm2d\): expected 'block' to have a forward .* torch\.fx can trace, got .*" + reason
        )
        assert strict["norms"] is None
        assert re.search(said, strict["said"])
        assert re.search(said, lenient["said"])
    else:
        assert strict == lenient
        assert strict["said"] == ""
    for key, added in (("pop", "block.conv.norm"), ("features", "fc.norm")):
        converted = result[key]
        assert converted["finite"]
        if reason:
            assert re.search(f"torch.fx can trace.*{reason}", converted["said"])
        elif name in WHOLE:
            assert converted["said"] == "" or "expected an average pooling" in converted["said"]
        else:
            assert converted["said"] == ""
            assert added in converted["modules"]


def trace(forward: Any) -> torch.fx.Graph:
    return Tracer().trace(Block(lambda _, x, y: forward(x)))


def test_torch_is_left_as_it_was() -> None:
    before = dict(vars(torch))
    trace(lambda x: torch.zeros(x.size(0)))
    with pytest.raises(TypeError):
        trace(lambda x: torch.zeros(3, "4"))
    with pytest.raises(KeyError):
        trace(lambda x: {}["missing"])
    assert vars(torch) == before


def past_what_records(x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return torch._C._nn.gelu(x)


def test_what_stands_for_a_tensor_has_no_value() -> None:
    """Its value is an error, and not a number that is made of nothing."""
    with pytest.raises(TraceError, match=r"a call that torch.fx records, got aten\.gelu\.default of a tensor"):
        trace(past_what_records)
