"""Deployment: normalizations are folded away, the network is exported, both are compared with the original."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import normkernels as nk
from bench.experiments.cifar.data import Images
from normkernels.layers._base import BatchStatisticsLayer

BATCH = 256
EXACT = 1e-9  # in float64: the merge changes the order of sums only, and 9 digits leave 7 to ill-conditioned whitening
CLOSE = 1e-3  # in float32, as far as the folded weights' rounding goes through 20 layers; above it something is wrong


@dataclass(frozen=True)
class Deployed:
    """The outcome of a deployment. Differences are the largest of a logit, over the largest logit.

    ``norms_left``: the norms that folding could not merge; ``exact_difference``: of float64 copies on the first images.
    """

    norms_left: int
    accuracy: float
    folded_accuracy: float
    exact_difference: float
    folded_difference: float
    exported_difference: float


def deploy(model: nn.Module, data: Images, path: Path) -> Deployed:
    """Fold and export ``model`` to ``path``.

    Raises:
        RuntimeError: logits of the folded network, or of the exported one as loaded again, are others.
        ValueError: a norm cannot be folded.
    """
    model.eval()
    folded = nk.convert.fold(model)
    norms_left = sum(isinstance(m, (BatchStatisticsLayer, nn.modules.batchnorm._BatchNorm)) for m in folded.modules())
    x = data.standardized(data.test_x)
    before, after = logits(model, x), logits(folded, x)
    wide, few = copy.deepcopy(model).double(), x[:BATCH].double()
    exact = difference(logits(nk.convert.fold(wide), few), logits(wide, few))

    program = torch.export.export(folded, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)
    exported = torch.export.load(path).module()
    result = Deployed(
        norms_left=norms_left,
        accuracy=accuracy(before, data.test_y),
        folded_accuracy=accuracy(after, data.test_y),
        exact_difference=exact,
        folded_difference=difference(after, before),
        exported_difference=difference(logits(exported, x), after),
    )
    for name, bound in (("exact_difference", EXACT), ("folded_difference", CLOSE), ("exported_difference", CLOSE)):
        if not getattr(result, name) <= bound:  # NaN as well
            raise RuntimeError(f"{name}: expected at most {bound} of the largest logit, got {getattr(result, name)}")
    return result


@torch.no_grad()
def logits(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in x.split(BATCH)])


def difference(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(1) == labels).double().mean())
