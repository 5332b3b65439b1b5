"""torch.onnx.export of networks in evaluation mode, as any user calls it, run by onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkernels as nk
from tests.tolerances import assert_agree

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

# torch's own exporting code touches deprecated parts of torch, also through copyreg.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

N = torch.export.Dim("n", min=2)
STANDARD = {"", "ai.onnx"}  # names of the domain of ONNX's own operators


def export(model: nn.Module, x: Tensor, dynamic: dict[int, Any] | None = None) -> Any:
    """Export a model after a step of training."""
    model(x)
    return torch.onnx.export(
        model.eval(), (x,), dynamo=True, dynamic_shapes=({0: N} if dynamic is None else dynamic,), verbose=False
    )


def check(program: Any, model: nn.Module, *batches: Tensor) -> None:
    """Check that a program has standard operators only, and gives eager's values."""
    assert not program.model_proto.functions
    assert {node.domain for node in program.model_proto.graph.node} <= STANDARD
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for x in batches:
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            assert_agree(torch.from_numpy(got), model(x))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "IterNorm2d-DBN2d": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nk.IterNorm2d(8, 4), nn.ReLU(), nk.DBN2d(8, 8, affine=False)),
        (4, 3, 6, 6),
    ),
    "IterNorm1d": (lambda: nn.Sequential(nn.Linear(3, 8), nk.IterNorm1d(8, 4)), (8, 3)),
    "POPNorm2d": (lambda: nn.Sequential(nk.POPNorm2d(8), nn.Conv2d(8, 4, 3)), (4, 8, 5, 5)),
    "ConvNorm2d": (
        lambda: nn.Sequential(
            nk.ConvNorm2d(3, 8, 3, padding=1, stride=2), nn.ReLU(), nk.ConvNorm2d(8, 8, 2, dilation=2, groups=2)
        ),
        (4, 3, 9, 12),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_evaluation_with_any_batch(name: str) -> None:
    build, shape = NETWORKS[name]
    model = build()
    program = export(model, torch.randn(shape) + 1)
    check(program, model, *(torch.randn(n, *shape[1:]) + 1 for n in (2, 7)))


def test_planes_of_any_size() -> None:
    """The spectrum of a kernel is computed in the graph where it is not constant."""
    model = nk.ConvNorm2d(3, 4, 3, padding=1, stride=2)
    sizes = {0: N, 2: torch.export.Dim("h", min=8), 3: torch.export.Dim("w", min=8)}
    program = export(model, torch.randn(4, 3, 12, 16), sizes)
    check(program, model, torch.randn(2, 3, 9, 34), torch.randn(5, 3, 16, 17))


def test_batch_statistics_are_refused() -> None:
    """Our message is part of the exporter's."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nk.IterNorm2d(8, 4, track_running_stats=False))
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"(?s)running statistics, got .*call model\.eval\(\)"):
        export(model, torch.randn(4, 3, 6, 6))


def test_an_exported_program_still_has_the_ops() -> None:
    """torch.export keeps the ops, whatever was exported to ONNX before; so ONNX takes modules, not these programs."""
    model = nk.IterNorm2d(8, 4)
    x = torch.randn(4, 8, 3, 3)
    export(model, x)
    program = torch.export.export(model, (x,))
    assert any(str(node.target).startswith("normkernels.whiten") for node in program.graph.nodes)
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"No ONNX function found for .*normkernels\.whiten"):
        torch.onnx.export(program, dynamo=True, verbose=False)
