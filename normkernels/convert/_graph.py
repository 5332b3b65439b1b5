"""Parts that all conversions share: how a network is traced, and how a module takes another one's place."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch.fx
from torch import nn

from normkernels._torch import BatchNormBase, ConvolutionBase
from normkernels.convert._proxies import recording, stand_in

# Modules that change nothing in evaluation.
WITHOUT_EFFECT = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
AFFINE_LAYERS = (nn.Linear, ConvolutionBase)  # transposed convolutions and ConvNorm are among them
CALL_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Tracer(torch.fx.Tracer):
    """Tracer that looks into all modules but affine layers, BatchNorms and this package's own, which check their input.

    closed: further modules that it does not look into.
    """

    proxy_buffer_attributes = True  # so that reads of running statistics are seen

    def __init__(self, closed: Collection[nn.Module] = ()) -> None:
        super().__init__()
        self.closed = closed

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> torch.fx.Graph:
        with recording():
            return super().trace(root, concrete_args)

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return stand_in(node, self)

    def create_arg(self, a: Any) -> Any:
        return a.node if isinstance(a, torch.fx.Proxy) else super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            super().is_leaf_module(m, module_qualified_name)
            or m in self.closed
            or type(m).__module__.startswith("normkernels.")
            or isinstance(m, (*AFFINE_LAYERS, BatchNormBase))
        )


def swap(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module under every name it has: under a name that is left out, the old one would still be called."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
