"""Evaluation in operators that ONNX has: torch.onnx.export traces these functions instead of the opaque ops.

Rejected: these functions in torch._decomp's table, where torch's exporter looks, too. With an entry there Inductor
refuses an op wherever the environment has CI set, and its fake with symbolic sizes is no longer the op's own.
"""

from __future__ import annotations

from typing import NoReturn

import torch

from normkernels._torch import constant


@constant  # while Dynamo traces, with which torch.onnx.export tries a second time, the answer would be no
def exporting() -> bool:
    """Return whether torch.onnx.export traces. The first test costs 20 ns, the second a microsecond."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def refuse_batch_statistics(*_: object) -> NoReturn:
    """Raise in place of an op that uses a batch's statistics; an export of it would fail later."""
    raise ValueError(
        "torch.onnx.export: expected layers in evaluation mode with running statistics, got one that uses the "
        "batch's; call model.eval(), and leave track_running_stats=True"
    )
