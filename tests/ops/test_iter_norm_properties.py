"""iter_norm against the float64 oracle on inputs that hypothesis draws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("hypothesis")

from hypothesis import given
from hypothesis import strategies as st

from tests.ops.test_iter_norm import check
from tests.oracles import inputs
from tests.oracles.run import Config

pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.filterwarnings("ignore:.*plain PyTorch instead of the Triton kernels"),
]


@st.composite
def strided_inputs(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Draw x of any rank, group size, order of dimensions in memory, gaps and steps, and a divisor of its channels."""
    group_size, groups = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    positions = draw(st.lists(st.integers(1, 4), max_size=3))
    shape = (draw(st.integers(2, 6)), group_size * groups, *positions)
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.integers(1, 2)) for _ in shape]
    starts = [draw(st.integers(0, 1)) for _ in shape]
    allocated = [start + length * step for start, length, step in zip(starts, shape, steps, strict=True)]
    memory = torch.full([allocated[i] for i in order], float("nan"), dtype=torch.float64)
    view = memory.permute([order.index(i) for i in range(len(shape))])
    view = view[tuple(slice(a, a + n * s, s) for a, n, s in zip(starts, shape, steps, strict=True))]
    view.copy_(inputs.gaussian(shape, group_size=group_size))
    return view, group_size


@given(strided_inputs(), st.integers(0, 6), st.sampled_from(["trace", "frobenius"]))
def test_any_strides(drawn: tuple[Tensor, int], num_iterations: int, scaling: str) -> None:
    x, group_size = drawn
    check(x, Config(group_size=group_size, num_iterations=num_iterations, scaling=scaling), stable=True)
