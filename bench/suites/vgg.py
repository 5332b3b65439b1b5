"""The VGG of the paper's Table A2 (arXiv 1904.03441, appendix D) and its timed training step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.measure.comparison import Comparison, Settings, workload
from bench.measure.environment import convolutions_in_tf32
from bench.measure.timing import Timed, poison, require_alive
from bench.measure.workload import GateError
from bench.providers import catalogue as cat
from bench.providers.baselines import EighDBN, PlainIterNorm
from bench.providers.names import BATCHNORM, VGG_ITERNORM

NormFactory = Callable[[int], nn.Module]

# output channels of the 3x3 convolutions, each followed by normalization and ReLU; "M" max pooling, "A"
# average pooling
LAYERS: tuple[int | str, ...] = (
    *(64, 64, "M"),
    *(128, 128, "M"),
    *(256, 256, 256, 256, "M"),
    *(512, 512, 512, 512, "M"),
    *(512, 512, 512, 512, "A"),
)
NUM_CLASSES = 10
IMAGE = (3, 32, 32)
LOSS_TOLERANCE = 1e-3  # float32 rounding after 16 whitened layers; a wrong layer moves the loss in the first digit
TF32_LOSS_TOLERANCE = 2e-2


def build_vgg(norm: NormFactory) -> nn.Sequential:
    """Build a network (N, 3, 32, 32) -> (N, 10).

    Convolutions have no bias: the normalization that follows removes it.
    """
    layers: list[nn.Module] = []
    channels = IMAGE[0]
    for item in LAYERS:
        if item == "M":
            layers.append(nn.MaxPool2d(2, 2))
        elif item == "A":
            layers.append(nn.AvgPool2d(2, 2))
        else:
            width = int(item)
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                norm(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, NUM_CLASSES))


def seeded_vgg(norm: NormFactory, seed: int = 0) -> nn.Sequential:
    """Build the VGG, with the same weights for every norm: norm layers draw no random numbers."""
    torch.manual_seed(seed)
    return build_vgg(norm)


def make_batches(batch: int, device: torch.device, count: int = 2, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(batch, *IMAGE, generator=generator).to(device),
            torch.randint(NUM_CLASSES, (batch,), generator=generator).to(device),
        )
        for _ in range(count)
    ]


def check_vgg(name: str, model: nn.Sequential, plain: nn.Sequential, batch: tuple[Tensor, Tensor]) -> None:
    """Compare the training loss of one batch with the same network in float64 with the plain norm.

    Both networks are changed (statistics, type): pass copies. Raises GateError if the losses differ.
    """
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()}, strict=False)
    images, labels = batch
    with torch.no_grad():
        got = float(F.cross_entropy(model(images), labels))
        expected = float(F.cross_entropy(plain.double()(images.double()), labels))
    tf32 = images.is_cuda and convolutions_in_tf32()
    tolerance = TF32_LOSS_TOLERANCE if tf32 else LOSS_TOLERANCE
    if not abs(got - expected) <= tolerance * abs(expected):
        raise GateError(f"{name}: expected a loss of {expected:.6f} within {tolerance:.0e}, got {got:.6f}")


class TrainingStep(Timed):
    """Forward, cross entropy, backward and an SGD step with momentum."""

    def __init__(self, model: nn.Sequential, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.model, self.batches = model, batches
        # small steps: the random labels are only there to be timed, and the loss must stay finite over all
        # rounds
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        self.current = batches[0]
        self.logits: Tensor | None = None

    def prepare(self, turn: int) -> None:
        self.current = self.batches[turn % len(self.batches)]
        self.optimizer.zero_grad(set_to_none=True)

    def run(self) -> None:
        images, labels = self.current
        self.logits = self.model(images)
        F.cross_entropy(self.logits, labels).backward()
        self.optimizer.step()

    def finish(self) -> None:
        assert self.logits is not None
        require_alive("logits", self.logits)
        poison(self.logits)
        self.logits = None
        for name, parameter in self.model.named_parameters():
            if parameter.grad is None:
                raise ValueError(f"expected a gradient for every parameter, got none for {name}")
        first = next(self.model.parameters()).grad
        assert first is not None
        require_alive("gradient of the first convolution", first)


def prepare_vgg(
    name: str,
    norm: NormFactory,
    plain: NormFactory,
    batch: int,
    device: torch.device,
) -> TrainingStep:
    """Build the network, check its loss against float64 and return the timed step."""
    model = seeded_vgg(norm).to(device)
    batches = make_batches(batch, device)
    check_vgg(name, copy.deepcopy(model), seeded_vgg(plain).to(device), batches[0])
    return TrainingStep(model, batches)


@dataclass(frozen=True)
class VggEntry:
    norm: NormFactory
    plain: NormFactory
    ours: bool


@dataclass(frozen=True)
class VggComparison(Comparison):
    """One training step of the VGG of Table A2 for several norms."""

    entries: dict[str, VggEntry] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.entries)

    @property
    def ours(self) -> tuple[str, ...]:
        return tuple(name for name, entry in self.entries.items() if entry.ours)

    def counted_bytes(self, name: str) -> int | None:
        return None  # a whole network: no single byte count says anything

    def preparer(self) -> Callable[[str], Timed]:
        def prepare(name: str) -> Timed:
            entry = self.entries[name]
            return prepare_vgg(name, entry.norm, entry.plain, self.work.shape[0], self.work.device)

        return prepare


def vgg(settings: Settings) -> list[Comparison]:
    """Return the comparison of one training step of the VGG of Table A2. The paper's batch is 256."""
    batch = settings.vgg_batch or (256 if settings.cuda else 8 if settings.quick else 32)
    entries = {
        BATCHNORM: VggEntry(nn.BatchNorm2d, nn.BatchNorm2d, False),
        VGG_ITERNORM: VggEntry(
            lambda c: cat.package().IterNorm2d(c, group_size=64), lambda c: PlainIterNorm(c, 64), True
        ),
        "DBN(16)": VggEntry(lambda c: cat.package().DBN2d(c, group_size=16), lambda c: EighDBN(c, 16), True),
        "plain autograd IterNorm(64)": VggEntry(lambda c: PlainIterNorm(c, 64), lambda c: PlainIterNorm(c, 64), False),
    }
    work = workload(settings, (batch, 3, 32, 32))
    plan = settings.plan(budget_s=60, rounds=15)
    return [VggComparison("vgg_step", work, (), plan, (BATCHNORM, VGG_ITERNORM), entries=entries)]
