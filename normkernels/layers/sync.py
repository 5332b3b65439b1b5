"""IterNorm and DBN with the statistics of a whole process group, as SyncBatchNorm is to BatchNorm."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from normkernels.layers.whitening import _DBN, _IterNorm, _Whitening
from normkernels.ops._compile import constant
from normkernels.ops.iter_norm.sync import sync_iter_norm

_agreed: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # layers that all ranks have found to be the same


def _name_of(group: Any) -> str | None:
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group: expected a torch.distributed.ProcessGroup or None, got {group!r}")
    return None if group is None else group.group_name


def _named(name: str | None) -> Any:
    resolve: Any = dist.distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    return None if name is None else resolve(name)


@constant  # Dynamo cannot look groups up, and their size does not change
def _size_of(name: str | None) -> int:
    return dist.get_world_size(_named(name))


class _Sync(_Whitening):
    """What SyncIterNorm and SyncDBN add: the statistics of all ranks while training."""

    _ranks = (2, 3, 4, 5)
    _group_name: str | None = None  # of the process group: a name can be copied and pickled

    def __init__(self, *args: Any, process_group: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.process_group = process_group

    @property
    def process_group(self) -> Any:
        """A torch.distributed.ProcessGroup, or None for the default one."""
        return _named(self._group_name)

    @process_group.setter
    def process_group(self, group: Any) -> None:
        self._group_name = _name_of(group)

    def _whitened(self, x: Tensor) -> tuple[Tensor, ...]:
        if not self.training:  # and without running statistics: this rank's own, as in SyncBatchNorm
            return super()._whitened(x)
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                f"{self}: expected torch.distributed.init_process_group(...) before the first forward pass in training "
                f"mode, got no process group"
            )
        if _size_of(self._group_name) == 1:
            return super()._whitened(x)
        if not torch.compiler.is_compiling() and self not in _agreed:
            self._check_agreement(self.process_group)
        group = self._group_name or dist.group.WORLD
        y, mean, W, count = sync_iter_norm(
            x, group, self.group_size, eps=self.eps, weight=self.weight, bias=self.bias, **self._op_options()
        )
        # One sample or none has no statistics. NaN leaves the running ones alone, and the host does not wait.
        return y, mean, torch.where(count > 1, W, torch.nan)

    def _check_agreement(self, group: Any) -> None:
        """Once, on the first forward pass: ranks whose layers differ would wait for each other, or add unlike sums."""
        layers: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(layers, repr(self), group)
        for rank, layer in enumerate(layers):
            if layer != layers[0]:
                raise ValueError(f"{self}: expected one layer on all ranks, got {layers[0]} on 0 and {layer} on {rank}")
        _agreed.add(self)

    @classmethod
    def _converted(cls, module: nn.Module, process_group: Any) -> nn.Module:
        """Layers keep their identity, and with it names, parameters, hooks and who shares them."""
        name = _name_of(process_group)
        found: list[Any] = [layer for layer in module.modules() if isinstance(layer, _IterNorm | _DBN)]
        if not found:
            raise ValueError(f"module: expected IterNorm or DBN layers in it, got none in {type(module).__name__}")
        for layer in found:
            layer.__class__ = SyncIterNorm if isinstance(layer, _IterNorm) else SyncDBN
            layer._group_name = name
        return module


class SyncIterNorm(_Sync, _IterNorm):
    r"""IterNorm that whitens with the samples of all ranks of a process group while it trains.

    .. math:: y = \mathrm{diag}(\gamma)\, W (x - \mu) + \beta \quad \text{on each rank, with } \mu, \Sigma
              \text{ of the samples of all ranks}

    Ranks may have different numbers of samples, or none: the result is that of one process with the whole batch. One
    all-reduce forward, of 1 + C + C (d + 1) / 2 float64 numbers, and one backward, of C + C (d + 1) / 2 float32 numbers
    (docs/distributed.md). Every rank must call the layer equally often, forward and backward; a rank whose batch is
    empty calls it with an empty one. In evaluation, and with one rank, it is IterNorm.

    Args:
        process_group: the ranks to share statistics with; None for all.
        num_features, ...: as in :class:`normkernels.IterNorm2d`.

    Shape: (N, C, *) of 2 to 5 dimensions; y as x, in x's type and layout.

    State: IterNorm's, the same on all ranks. The first forward pass in training mode compares the ranks' layers, in one
    more small collective (compiled code does not).

    Raises:
        RuntimeError: there is no process group in training mode.
        ValueError: the ranks' layers differ, or as in IterNorm.
        TypeError: process_group is no ProcessGroup, or as in IterNorm.
        NotImplementedError: double backward.
    """

    @classmethod
    def convert_sync_iternorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Turn all IterNorm and DBN layers of ``module`` into SyncIterNorm and SyncDBN, in place.

        As torch.nn.SyncBatchNorm.convert_sync_batchnorm; call it before DistributedDataParallel. Parameters,
        statistics, names, hooks and shared layers stay. For a network with BatchNorm see
        :func:`normkernels.convert.replace`.

        Returns: ``module``. Raises ValueError if there is no such layer.
        """
        return cls._converted(module, process_group)


class SyncDBN(_Sync, _DBN):
    """DBN that whitens with the samples of all ranks while it trains; see :class:`normkernels.SyncIterNorm`.

    ``SyncIterNorm.convert_sync_iternorm`` makes it of the DBN layers of a network.
    """
