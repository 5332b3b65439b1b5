"""IterNorm and DBN with the statistics of a whole process group, as SyncBatchNorm is to BatchNorm."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from normkernels._torch import constant, process_group_of
from normkernels.layers.whitening import (
    _DBN,
    DBN1d,
    DBN2d,
    DBN3d,
    IterNorm1d,
    IterNorm2d,
    IterNorm3d,
    _IterNorm,
    _Whitening,
)
from normkernels.primitives.iter_norm.sync import sync_iter_norm


class _Sync(_Whitening):
    """Base class of SyncIterNorm and SyncDBN: while training, they use the statistics of all ranks."""

    _ranks = (2, 3, 4, 5)
    _group_name: str | None = None  # the process group's: a name can be copied and pickled
    _traced = False  # whether it has run in compiled code, where its ranks have compared layers of its kind
    _kind: str  # the string that ranks compare: with dynamic=True Dynamo would take numbers for variables

    @property
    def process_group(self) -> Any:
        """A torch.distributed.ProcessGroup, or None for the default one."""
        return None if self._group_name is None else process_group_of(self._group_name)

    @process_group.setter
    def process_group(self, group: Any) -> None:
        self._synchronize(_name_of(group))

    def _synchronize(self, group_name: str | None) -> None:
        self._group_name, self._traced, self._kind = group_name, False, repr(self)

    def _whitened(self, x: Tensor) -> tuple[Tensor, ...]:
        if not self.training:  # evaluation without running statistics: this rank's own, as in SyncBatchNorm
            return super()._whitened(x)
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                f"{self}: expected torch.distributed.init_process_group(...) before the first forward pass in training "
                f"mode, got no process group"
            )
        group = self._group_name or dist.group.WORLD  # a name, as Dynamo cannot look the group up; it guards WORLD
        data = (self._kind, x.dtype, x.requires_grad)
        if torch.compiler.is_compiling():
            self._traced = True  # not read here: Dynamo would compile again for its other value
            size = _size_of_group(self._group_name, *data)
        else:
            size = _size_of_group(self._group_name, *data, layer=None if self._traced else self)
        if size == 1:
            return super()._whitened(x)
        y, mean, W, count = sync_iter_norm(
            x, group, self.group_size, eps=self.eps, weight=self.weight, bias=self.bias, **self._op_options()
        )
        # One sample or none has no statistics. NaN leaves the running ones alone, and the host does not wait.
        return y, mean, torch.where(count > 1, W, torch.nan)


def _name_of(group: Any) -> str | None:
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"process_group: expected None or a torch.distributed.ProcessGroup of which this rank is a member, "
            f"got {group!r}"
        )
    return None if group is None else group.group_name


class _Agreement:
    """The layers and kinds of layers that the ranks of a group have found to be the same on all of them."""

    def __init__(self) -> None:
        self.layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.kinds: set[str] = set()


_agreements: weakref.WeakKeyDictionary[Any, _Agreement] = weakref.WeakKeyDictionary()


@constant  # Dynamo calls it while it traces, and keeps the result
def _size_of_group(
    group_name: str | None, kind: str, dtype: torch.dtype, differentiated: bool, layer: nn.Module | None = None
) -> int:
    """Return the number of ranks, after these have compared their layers.

    They compare each layer once; in compiled code, which layers of one kind may share, they compare each kind once.
    Ranks whose layers differ would wait for each other for ever, or add unlike sums. So would ranks of which some
    compare and others do not: a layer that has run in compiled code is not compared when a rank falls back to eager.
    """
    group = dist.group.WORLD if group_name is None else process_group_of(group_name)
    size = dist.get_world_size(group)
    agreement = _agreements.setdefault(group, _Agreement())
    own = f"{kind} on {dtype}, gradient {'needed' if differentiated else 'not needed'}"
    if size > 1 and (own not in agreement.kinds if layer is None else layer not in agreement.layers):
        said: list[Any] = [None] * size
        dist.all_gather_object(said, own, group)
        for rank, other in enumerate(said):
            if other != said[0]:
                raise ValueError(f"{kind}: expected the same on all ranks, got {said[0]} on 0 and {other} on {rank}")
        agreement.kinds.add(own)
        if layer is not None:
            agreement.layers.add(layer)
    return size


class SyncIterNorm(_Sync, _IterNorm):
    r"""IterNorm that whitens with the samples of all ranks of a process group while it trains.

    .. math:: y = \mathrm{diag}(\gamma)\, W (x - \mu) + \beta \quad \text{on each rank, with } \mu, \Sigma
              \text{ of the samples of all ranks}

    Ranks may have different numbers of samples, or none: the result is that of one process with the whole batch. It
    takes one all-reduce forward, of 1 + C + C (d + 1) / 2 float64 numbers, and one backward, of C + C (d + 1) / 2
    float32 numbers (docs/distributed.md). Every rank must call the layer equally often, forward and backward; a rank
    whose batch is empty calls it with an empty one. In evaluation, and with one rank, it is IterNorm.

    Args:
        process_group: the ranks to share statistics with; None for all.
        num_features, ...: as in :class:`normkernels.IterNorm2d`.

    Shape: (N, C, *) of 2 to 5 dimensions; y as x, in x's type and layout.

    State: IterNorm's, the same on all ranks. The first forward pass in training mode compares the ranks' layers, in one
    more small collective.

    Raises:
        RuntimeError: there is no process group in training mode.
        ValueError: the ranks' layers differ, or as in IterNorm.
        TypeError: process_group is no ProcessGroup, or as in IterNorm.
        NotImplementedError: double backward.
    """

    def __init__(
        self,
        num_features: int,
        group_size: int = 64,
        num_iterations: int = 5,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scaling: str = "trace",
        process_group: Any = None,
    ) -> None:
        super().__init__(
            num_features, group_size, num_iterations, eps, momentum, affine, track_running_stats, device, dtype,
            scaling=scaling,
        )  # fmt: skip
        self.process_group = process_group

    @classmethod
    def convert_sync_iternorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Turn all IterNorm and DBN layers of ``module`` into SyncIterNorm and SyncDBN, in place.

        It is to these what torch.nn.SyncBatchNorm.convert_sync_batchnorm is to BatchNorm; call it before
        DistributedDataParallel and fully_shard. The layers stay the same objects, with their names, parameters,
        statistics and hooks, and stay shared where they are shared. Layers that are synchronized already get
        ``process_group``, unless it is None. For a network with BatchNorm see :func:`normkernels.convert.replace`.

        Returns: ``module``.

        Raises:
            ValueError: there is no such layer, or one, which is named, is of a subclass (also by a parametrization or
                by fully_shard), of which the new class would lose what it adds. The module is as it was.
            TypeError: ``module`` is no module or ``process_group`` no ProcessGroup.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"module: expected nn.Module, got {type(module).__name__}")
        group_name = _name_of(process_group)
        found: dict[Any, str] = {
            layer: name for name, layer in module.named_modules() if isinstance(layer, _IterNorm | _DBN)
        }
        if not found:
            raise ValueError(f"module: expected IterNorm or DBN layers in it, got none in {type(module).__name__}")
        for layer, name in found.items():
            if type(layer) not in SYNCHRONIZED:
                raise ValueError(
                    f"{name or 'module'!r}: expected {', '.join(kind.__name__ for kind in SYNCHRONIZED)}, got "
                    f"{type(layer).__name__}, which may do more, which would be lost"
                )
        for layer in found:
            layer.__class__ = SYNCHRONIZED[type(layer)]
            layer._synchronize(group_name or layer._group_name)
        return module


class SyncDBN(_Sync, _DBN):
    """DBN that whitens with the samples of all ranks while it trains; see :class:`normkernels.SyncIterNorm`.

    ``SyncIterNorm.convert_sync_iternorm`` turns the DBN layers of a network into it.
    """

    def __init__(
        self,
        num_features: int,
        group_size: int = 16,
        eps: float = 1e-3,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        process_group: Any = None,
    ) -> None:
        super().__init__(num_features, group_size, eps, momentum, affine, track_running_stats, device, dtype)
        self.process_group = process_group


SYNCHRONIZED: dict[type[nn.Module], type[nn.Module]] = {
    **dict.fromkeys((IterNorm1d, IterNorm2d, IterNorm3d, SyncIterNorm), SyncIterNorm),
    **dict.fromkeys((DBN1d, DBN2d, DBN3d, SyncDBN), SyncDBN),
}
