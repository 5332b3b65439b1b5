"""Time networks in evaluation, whose convolutions have groups: with IterNorm, with it folded, and without any norm.

    .venv-networks/bin/python -m bench.networks.inference

Prints a table for docs/migration.md. Every folded network is compared with the unfolded one, by fold itself, before
anything is timed; calls are interleaved.
"""

from __future__ import annotations

import argparse
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import normkernels as nk
from bench.measure.timing import CpuClock, Plan, interleave
from bench.networks.catalogue import NETWORKS

GROUPED_NETWORKS = (
    "torchvision resnext50_32x4d",
    "torchvision mobilenet_v2",
    "torchvision efficientnet_b0",
    "torchvision regnet_y_400mf",
)
WITHOUT = "without norms"


@dataclass
class Evaluation:
    """One call of a network."""

    model: nn.Module
    x: Tensor

    def context(self) -> AbstractContextManager[object]:
        return torch.inference_mode()

    def prepare(self, turn: int) -> None:
        """Prepare nothing: evaluation changes nothing."""

    def run(self) -> None:
        self.model(self.x)

    def finish(self) -> None:
        """Clear nothing: nothing is kept."""


def versions(name: str, x: Tensor) -> dict[str, nn.Module]:
    """Return a network with IterNorm that has seen a batch, folded in both ways, and without norms."""
    torch.manual_seed(0)
    model = NETWORKS[name].make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of groups that are smaller than asked for
        nk.convert.replace(model, "IterNorm")
    with torch.no_grad():
        model(torch.randn(8, *x.shape[1:]))
    model.eval()
    folded = {way: nk.convert.fold(model, grouped=way, example_inputs=x[:1]) for way in ("append", "widen")}
    bare = NETWORKS[name].make().eval()
    for part, module in list(bare.named_modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            bare.set_submodule(part, nn.Identity())
    return {WITHOUT: bare, **folded, "not folded": model}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    torch.set_flush_denormal(True)  # values may shrink to denormal numbers without norms, and those take longer
    x = torch.randn(options.batch, 3, options.size, options.size)
    print(f"{options.batch} x 3 x {options.size} x {options.size}, float32, {torch.get_num_threads()} threads\n")
    print('| network | without norms | grouped="append" | grouped="widen" | not folded |\n|---|---|---|---|---|')
    for name in GROUPED_NETWORKS:
        timed = {key: Evaluation(model, x) for key, model in versions(name, x).items()}
        measured = interleave(timed, Plan(rounds=options.rounds, min_rounds=min(7, options.rounds)), CpuClock())
        for key, error in measured.failures.items():
            raise RuntimeError(f"{name}, {key}: {error}")
        cells = [f"{1e3 * measured.quantiles(WITHOUT).p50:.1f} ms"]
        for key in list(timed)[1:]:
            ratio = measured.ratio(key, WITHOUT)
            cells.append("" if ratio is None else f"{ratio.p50:.2f}")
        print(f"| {name.partition(' ')[2]} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
