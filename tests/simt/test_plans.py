"""Launches are recorded from the code that runs, on tensors without memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from normkernels.dispatch import compiled
from tests.ops.cuda_calls import SERVED, SIMT, given

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.simt]
A100 = (80, 108, 166912)

KERNELS = {
    "moments": ["moments"],
    "cross_moments": ["cross_moments"],
    "inverse_sqrt": ["inverse_sqrt"],
    "inverse_sqrt_backward": ["inverse_sqrt_backward"],
    "whiten": ["mix"],
    "stacked_mix": ["stacked_mix"],
    "iter_norm": ["iter_norm", "mix"],
    "iter_norm_backward": ["iter_norm_backward", "stacked_mix"],
    "spectral_filter": ["spectral_coefficients", "spectral_filter"],
    "pop_norm": ["pop_norm", "scale"],
    "pop_norm_backward": ["pop_norm_backward", "stacked_scale"],
    "precondition": ["precondition"],
}


def without_memory(value: Any) -> Any:
    if isinstance(value, list):
        return [without_memory(each) for each in value]
    return value.to("meta") if isinstance(value, Tensor) else value


@SIMT
@pytest.mark.parametrize("op", SERVED)
def test_launches_of_each_op(op: str) -> None:
    launches = compiled.launches_on(A100, op, *without_memory(given(op)))
    assert [launch["kernel"] for launch in launches] == KERNELS[op]
    for launch in launches:
        assert launch["threads"] % 32 == 0 and launch["shared_bytes"] <= A100[2]
        assert min(*launch["grid"], launch["read_bytes"], launch["written_bytes"]) >= 1


@SIMT
def test_more_processors_get_more_blocks() -> None:
    """Where there are none, as here, the recording says how many."""
    x = torch.empty(256, 64, 56, 56, device="meta")
    few, many = (compiled.launches_on((80, count, 166912), "moments", x, 64, False) for count in (10, 100))
    assert many[0]["grid"][0] > 9 * few[0]["grid"][0]


@SIMT
def test_a_call_without_a_recording_is_refused() -> None:
    x = torch.empty(4, 8, 3, 3, device="meta")
    assert compiled.launches_on(A100, "moments", x, 4, False)
    with pytest.raises(RuntimeError, match="moments: expected launches to be recorded, got a call on the device meta"):
        torch.ops.normkernels_launches.moments(x, 4, False)


@SIMT
def test_a_refused_call_has_no_launches() -> None:
    with pytest.raises(RuntimeError, match="moments: expected groups of at most 128 channels, got 129"):
        compiled.launches_on(A100, "moments", torch.empty(4, 258, device="meta"), 129, False)
    assert compiled.load()[0].recorded() == []


@SIMT
def test_a_plan_takes_no_memory() -> None:
    (launch,) = compiled.launches_on(A100, "moments", torch.empty(2**20, 2**10, 2**10, device="meta"), 64, False)
    assert launch["read_bytes"] == 2**42
