"""A training step of BNP's small network (BNP, section 5.1, Table 1 and Figure 9): BNP, BatchNorm and neither.

`python -m bench.suites.bnp` prints the operations that Proposition 6 counts for it.

The network of the paper's time measurement: inputs of CIFAR's 3 x 32 x 32, two hidden layers of 100, 10 outputs;
BatchNorm after the activations (eq. 2), at the two hidden layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.measure.comparison import Comparison, Settings, workload
from bench.measure.timing import Timed, poison, require_alive
from bench.measure.workload import GateError, Provider, Workload
from bench.providers.catalogue import package
from bench.providers.conv_catalogue import same_layer
from bench.suites.vgg import TrainingStep

INPUTS, HIDDEN, CLASSES = 3072, 100, 10
VANILLA, BATCH_NORM, LAYER_NORM, BNP = "no normalization", "BatchNorm1d", "LayerNorm", "BNP"
NORMS: dict[str, Callable[[int], nn.Module]] = {BATCH_NORM: nn.BatchNorm1d, LAYER_NORM: nn.LayerNorm}
MINI_BATCHES = (1, 16, 64, 256, 512)
EPS1, EPS2 = 1e-2, 1e-4
TOLERANCE = 1e-4  # float32: a product of 3072 terms, divided by variances that are not small here


def network(norm: Callable[[int], nn.Module] | None) -> nn.Sequential:
    """Build the network, with the same weights for every norm: norm layers draw no random numbers."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for width in (INPUTS, HIDDEN):
        layers += [nn.Linear(width, HIDDEN), nn.ReLU(), *([] if norm is None else [norm(HIDDEN)])]
    return nn.Sequential(*layers, nn.Linear(HIDDEN, CLASSES))


def make_batches(batch: int, device: torch.device, count: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            (torch.randn(batch, INPUTS, generator=generator) + 0.5).to(device),
            torch.randint(CLASSES, (batch,), generator=generator).to(device),
        )
        for _ in range(count)
    ]


class Step(TrainingStep):
    def finish(self) -> None:
        """Check that the logits are alive and all gradients finite, and poison the logits.

        TrainingStep's check asks for rows of a gradient that are not zero, but a unit that a small mini-batch does not
        reach has none.
        """
        assert self.logits is not None
        require_alive("logits", self.logits)
        poison(self.logits)
        self.logits = None
        for name, parameter in self.model.named_parameters():
            if parameter.grad is None or not parameter.grad.isfinite().all():
                raise ValueError(f"expected a finite gradient for every parameter, got {parameter.grad} for {name}")


class PreconditionedStep(Step):
    """A training step with BNP between backward and the optimizer's step."""

    def __init__(self, model: nn.Sequential, batches: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__(model, batches)
        self.bnp: Any = package().optim.BNP(model, eps1=EPS1, eps2=EPS2)
        self.bnp.attach(self.optimizer)


def check_bnp(model: nn.Sequential, batch: tuple[Tensor, Tensor]) -> None:
    """Compare the gradients of a first step with Algorithm 2 written out in float64. Changes the model: pass a copy.

    Raises GateError if they differ.
    """
    exact = copy.deepcopy(model).double()
    inputs: list[Tensor] = []
    linear = [m for m in exact if isinstance(m, nn.Linear)]
    for module in linear:
        module.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach()))
    F.cross_entropy(exact(batch[0].double()), batch[1]).backward()
    bnp = package().optim.BNP(model, eps1=EPS1, eps2=EPS2)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    bnp.step()
    for h, module, ours in zip(inputs, linear, (m for m in model if isinstance(m, nn.Linear)), strict=True):
        mean_h = h.mean(0)
        var_h = (h - mean_h).square().mean(0) if len(h) > 1 else h[0].square()  # the running mean is 0 at first
        mean, var = 0.01 * mean_h, 0.99 + 0.01 * var_h
        q2 = max(h.shape[1] / len(h), 1.0)
        assert module.weight.grad is not None and module.bias.grad is not None
        Gw = (module.weight.grad - mean * module.bias.grad[:, None]) / (var + EPS1 * var.max() + EPS2) / q2
        Gb = module.bias.grad / q2 - Gw @ mean
        for got, expected in ((ours.weight.grad, Gw), (ours.bias.grad, Gb)):
            assert got is not None
            error = float((got - expected).norm() / expected.norm())
            if not error <= TOLERANCE:
                raise GateError(f"BNP: expected Algorithm 2's gradients within {TOLERANCE:.0e}, got {error:.1e}")


def prepare(name: str, batch: int, device: torch.device) -> TrainingStep:
    model = network(NORMS.get(name)).to(device)
    batches = make_batches(batch, device)
    if name != BNP:
        return Step(model, batches)
    check_bnp(copy.deepcopy(model), batches[0])
    return PreconditionedStep(model, batches)


@dataclass(frozen=True)
class BnpComparison(Comparison):
    """One training step of the same network, normalized in different ways."""

    entries: tuple[str, ...] = field(default=())

    @property
    def names(self) -> tuple[str, ...]:
        return self.entries

    @property
    def ours(self) -> tuple[str, ...]:
        return (BNP,)

    def counted_bytes(self, name: str) -> int | None:
        return None  # a whole network: no single byte count says anything

    def preparer(self) -> Callable[[str], Timed]:
        return lambda name: prepare(name, self.work.shape[0], self.work.device)


def bnp(settings: Settings) -> list[Comparison]:
    """Return the comparisons for mini-batches of 1 to 512. BatchNorm cannot train on one sample."""
    return [
        BnpComparison(
            "bnp_step",
            workload(settings, (batch, INPUTS)),
            (),
            settings.plan(budget_s=6, rounds=200),
            (VANILLA, BATCH_NORM),
            entries=(VANILLA, *([BATCH_NORM] if batch > 1 else []), LAYER_NORM, BNP),
        )
        for batch in MINI_BATCHES
    ]


def memory(settings: Settings) -> list[Comparison]:
    """Return comparisons of the memory of the same networks, forward and backward.

    BNP has its hooks there, but not its step, which works in place.
    """

    def provider(name: str) -> Provider:
        def build(work: Workload) -> nn.Module:
            model = nn.Sequential(nn.Flatten(), *network(NORMS.get(name)))
            if name == BNP:
                package().optim.BNP(model)
            return model

        return Provider(name, build, same_layer, {}, ours=name == BNP)

    providers = tuple(provider(name) for name in (VANILLA, BATCH_NORM, LAYER_NORM, BNP))
    works = [replace(workload(settings, (batch, INPUTS, 1)), output=(batch, CLASSES)) for batch in (16, 512)]
    return [Comparison("memory", work, providers, settings.plan(), (VANILLA,)) for work in works]


def operations(batch: int) -> dict[str, int]:
    """Count operations as Proposition 6 does for BNP, and as the text after it does for BatchNorm."""
    sizes = (INPUTS, HIDDEN, HIDDEN, CLASSES)
    pairs = list(pairwise(sizes))
    return {
        BNP: sum(4 * n * batch + 6 * n * out + 2 * out + 8 * n for n, out in pairs),
        BATCH_NORM: sum(32 * n * batch + 4 * n for n in sizes[1:-1]),
        "forward and backward of the layers": sum(6 * n * out * batch for n, out in pairs),
    }


def main() -> None:
    columns = list(operations(1))
    print(f"| mini-batch | {' | '.join(columns)} |\n|{'---:|' * (len(columns) + 1)}")
    for batch in MINI_BATCHES:
        print(f"| {batch} | {' | '.join(f'{count / 1e6:.2f} M' for count in operations(batch).values())} |")


if __name__ == "__main__":
    main()
