"""Convert one architecture, train it, fold it, and print as JSON what came of it.

python -m bench.networks.trial "torchvision resnet18"
"""

from __future__ import annotations

import copy
import json
import re
import sys
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

import normkernels as nk
from bench.networks.catalogue import NETWORKS
from normkernels.layers._base import BatchStatisticsLayer

BATCH = 4
STEPS = 3
GROUP_SIZE = 16
AGREEMENT = 1e-9  # relative to the largest of the float64 outputs: fold itself asks for as much with example inputs


def norms(model: nn.Module) -> list[str]:
    """Return the names of the norms of batches that are in a network, frozen ones as well."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm | BatchStatisticsLayer) or type(module).__name__ == "FrozenBatchNorm2d"
    ]


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(model(x)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def convert(model: nn.Module) -> dict[str, Any]:
    """Replace every BatchNorm, and none of a subclass, by IterNorm, in place."""
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    before = norms(model)
    some = any(type(model.get_submodule(name)) in plain for name in before)
    try:
        where = (lambda _, module: type(module) in plain) if some else "all"
        nk.convert.replace(model, "IterNorm", where, group_size=GROUP_SIZE)
    except (TypeError, ValueError) as error:
        return {"replaced": 0, "refused": without_names(str(error).partition("\n")[0])}
    return {"replaced": sum(type(model.get_submodule(name)).__name__.startswith("IterNorm") for name in before)}


def train(model: nn.Module, x: Tensor, autocast: bool) -> list[float]:
    """Return the losses of a few steps, the mean square of all outputs."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = outputs(model, x)
        loss = torch.stack([each.float().square().mean() for each in y]).sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def unlike(model: nn.Module, x: Tensor) -> None:
    """Give a network statistics, scales and shifts of its own, so that no norm is the identity."""
    with torch.no_grad():
        model.train()
        for _ in range(2):
            model(x)
        for name in norms(model):
            norm = model.get_submodule(name)
            for value in norm.parameters() if isinstance(norm, _BatchNorm) else norm.buffers():
                value.add_(0.1 * torch.rand_like(value))
    model.eval()


def named_pairs(model: nn.Module, pair: tuple[str, str] | None) -> list[tuple[str, str]]:
    """Return the full names of a layer and a norm wherever one module has both under these names."""
    modules = dict(model.named_modules())
    both = [[f"{name}.{each}".lstrip(".") for each in pair or ()] for name in modules]
    return [(names[0], names[1]) for names in both if names and all(name in modules for name in names)]


def folded(model: nn.Module, x: Tensor, pair: tuple[str, str] | None) -> dict[str, Any]:
    """Fold a network in float64, compare its outputs, and return what came of it."""
    model, x = copy.deepcopy(model).double().eval(), x.double()
    before = norms(model)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        started = time.monotonic()
        result = nk.convert.fold(
            model, strict=False, example_inputs=x, grouped="append", pairs=named_pairs(model, pair)
        )
        seconds = time.monotonic() - started
        expected, got = outputs(model, x), outputs(result, x)
    off = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected, got, strict=True))
    said = "".join(str(warning.message) for warning in caught if "norms that" in str(warning.message))
    return {
        "norms": len(before),
        "kept": len(norms(result)),
        "off": off,
        "seconds": seconds,
        "reasons": reasons(said),
    }


def reasons(said: str) -> dict[str, list[str]]:
    """Return the reasons in fold's warning, without the names that are in them, each with the names of its norms."""
    found: dict[str, list[str]] = {}
    for line in said.splitlines()[1:]:
        named = re.match(r"  ((?:'[^']*' \(\w+\)(?:, )?)+): (.*)", line)
        if named:
            found.setdefault(without_names(named[2]), []).extend(re.findall(r"'([^']*)' \(\w+\)", named[1]))
    return found


def without_names(message: str) -> str:
    """Return a message with the classes of modules instead of their names, and the last module instead of several."""
    last = re.sub(r"(?:'[^']*'(?: \(\w+\))?, )+(?=')", "", message)
    return re.sub(r"'[^']*'", "it", re.sub(r"'[^']*' \((\w+)\)", r"\1", last))


def trial(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    network = NETWORKS[name]
    model = network.make()
    x = torch.randn(BATCH, *network.shape)
    unlike(model, x)
    result: dict[str, Any] = {"norms": len(norms(model)), "fold": folded(model, x, network.pairs)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result |= convert(model)
    if result["replaced"]:
        result["float32"], result["bfloat16"] = train(model, x, autocast=False), train(model, x, autocast=True)
        result["converted"] = folded(model, x, network.pairs)
    return result


if __name__ == "__main__":
    print(json.dumps(trial(sys.argv[1])))
