"""Find the linear layer that the features of a network go to: there the paper decorrelates them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from normkernels.convert._graph import WITHOUT_EFFECT
from normkernels.convert._ways import ways

# Modules stand here by class, functions by themselves, methods of a tensor by name.
POOLINGS = {
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
}  # fmt: skip
MEANS = {torch.mean, "mean"}
SPATIAL = ({2}, {2, 3}, {2, 3, 4}, {-1}, {-1, -2}, {-1, -2, -3})
KEEPS_CHANNELS = {
    *WITHOUT_EFFECT, nn.Flatten, torch.flatten, torch.reshape, torch.squeeze, F.dropout,
    "flatten", "reshape", "view", "squeeze", "contiguous",
}  # fmt: skip


def features_linear(model: nn.Module) -> str:
    """Return the name of the last linear layer, if it is the only one that the last average pooling's output goes to.

    This must hold on every way through the forward, whatever optional arguments and conditions on shapes decide.
    """
    if isinstance(model, nn.DataParallel):  # its forward's *inputs cannot be traced
        return f"module.{features_linear(model.module)}"
    before = set(vars(model))
    try:
        graphs = [way.graph for way in ways(model, ())]
    except Exception as error:  # whatever the model's code raises on a proxy
        raise RuntimeError(
            f"decorrelate_features: expected a model that torch.fx can trace, or the name of its last linear layer, "
            f"got {type(error).__name__}: {error}"
        ) from error
    finally:
        for constant in set(vars(model)) - before:  # tensors that the model's code made while it was traced
            delattr(model, constant)
    names = {_last_linear(model, graph) for graph in graphs}
    if len(names) > 1:
        raise ValueError(
            f"decorrelate_features: expected one last linear layer whatever optional arguments and shapes are, or its "
            f"name; got {', '.join(map(repr, sorted(names)))}"
        )
    return names.pop()


def _last_linear(model: nn.Module, graph: fx.Graph) -> str:
    poolings = [node for node in graph.nodes if _averages(model, node)]
    linears = [node for node in graph.nodes if node.op == "call_module" and _is_linear(model, node)]
    reached = list(dict.fromkeys(_followed(model, poolings[-1]))) if poolings else []
    calls = [node.target for node in linears]
    if len(reached) != 1 or reached[0] is not linears[-1] or calls.count(reached[0].target) > 1:
        names = [", ".join(repr(node.target) for node in nodes) or "none" for nodes in (linears, reached)]
        raise ValueError(
            f"decorrelate_features: expected an average pooling whose output goes to the last linear layer and to no "
            f"other, by flattening and dropout alone, or that layer's name; got linear layers {names[0]}, and of "
            f"{len(poolings)} poolings the last one leads to {names[1]}"
        )
    return str(reached[0].target)


def _key(model: nn.Module, node: fx.Node) -> Any:
    return type(model.get_submodule(str(node.target))) if node.op == "call_module" else node.target


def _is_linear(model: nn.Module, node: fx.Node) -> bool:
    return isinstance(model.get_submodule(str(node.target)), nn.Linear)


def _averages(model: nn.Module, node: fx.Node) -> bool:
    key = _key(model, node)
    if key not in MEANS:
        return key in POOLINGS
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else ())
    return set(dims if isinstance(dims, tuple | list) else (dims,)) in SPATIAL


def _followed(model: nn.Module, node: fx.Node) -> Iterator[fx.Node]:
    """Yield the linear layers that this node's values reach as they are, but for their shape and dropout."""
    for user in node.users:
        if user.op == "call_module" and _is_linear(model, user):
            yield user
        elif _key(model, user) in KEEPS_CHANNELS:
            yield from _followed(model, user)
