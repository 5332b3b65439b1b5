"""Exported programs hold raw ops, so the schemas of these stay what they are, and an old program keeps running.

``python -m tests.test_saved_programs`` writes schemas.json and program.pt2 in tests/saved. They were made once; a new
op may add its schema, and nothing else may change.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import normkernels as nk
from normkernels.dispatch.record import OPS
from tests.tolerances import assert_agree

FOLDER = Path(__file__).parent / "saved"
SCHEMAS, PROGRAM = FOLDER / "schemas.json", FOLDER / "program.pt2"


class Network(nn.Module):
    """Every public op that a program may hold, with options that are not the defaults."""

    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        gamma, beta = weight[:, 0, 0, 0], weight[:, 0, 0, 1]
        _, mean, cov = nk.ops.moments(x, 4)
        roots = [nk.ops.inverse_sqrt(cov, 3, 1e-3, scaling="frobenius"), nk.ops.inverse_sqrt(cov, method="eigh")]
        mixed = [nk.ops.whiten(x, mean, root, gamma, beta) for root in roots]
        cross, _ = nk.ops.cross_moments(mixed[0], x, mean, 4)
        fused, _, _ = nk.ops.iter_norm(x, 4, 3, 1e-3, gamma, beta, scaling="frobenius")
        diagonal, _, _ = nk.ops.pop_norm(x, gamma, None, kappa=2.0, center=False)
        v = nk.ops.kernel_spectrum(weight, x.shape[2:], dilation=1)
        filtered = nk.ops.spectral_filter(x, v, target=[slice(1, None, 2), slice(None)])
        return (*mixed, cross, fused, diagonal, filtered)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 8, 5, 6, generator=generator), torch.randn(8, 2, 3, 2, generator=generator)


def schemas() -> dict[str, str]:
    return {name: str(op.raw._schema) for name, op in OPS.items()}


def test_schemas_are_what_they_were() -> None:
    assert schemas() == json.loads(SCHEMAS.read_text())


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="the program was saved by torch 2.13")
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_a_saved_program_runs() -> None:
    program = torch.export.load(PROGRAM)
    targets = {str(node.target).split(".")[1] for node in program.graph.nodes if "normkernels" in str(node.target)}
    in_backward_only = {name for name in OPS if name.endswith("_backward")} | {"stacked_mix", "cross_spectrum"}
    assert targets == OPS.keys() - in_backward_only - {"precondition"}
    assert_agree(list(program.module()(*inputs())), list(Network()(*inputs())))


def main() -> None:
    SCHEMAS.write_text(json.dumps(schemas(), indent=1) + "\n")
    torch.export.save(torch.export.export(Network(), inputs()), PROGRAM)


if __name__ == "__main__":
    main()
