"""Checkpoints of other implementations."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from normkernels.layers.whitening import _IterNorm

PARAMETERS = ("weight", "bias")
RUNNING = "running_wm"  # the key by which a checkpoint's layer is recognized


def load_iternorm_state(model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
    r"""Load a checkpoint of the original implementation of IterNorm (Huang et al., 2019; IterNorm-pytorch).

    .. math:: y = \gamma\, \big( \mathrm{running\_wm}\, (x - \mathrm{running\_mean}) \big) + \beta

    is what both implementations compute in evaluation, group by group. The keys of each layer become:

        weight, bias    (1, C), (1, C, 1), (1, C, 1, 1) or (1, C, 1, 1, 1), there with affine=True -> (C,)
        running_mean    (G, d, 1)                                                                  -> (C,)
        running_wm      (G, d, d)                                                                  -> running_whitening

    The checkpoint has no counter of batches, so num_batches_tracked keeps its value; a layer with ``momentum=None``
    that has seen none begins its average anew. The number of iterations, eps and momentum are not in it either: give
    the model those it was trained with.

    Args:
        model: a network with IterNorm1d/2d/3d (or SyncIterNorm) under the names that it has in the checkpoint.
        state_dict: of the whole network; it stays as it is. Keys of other modules are loaded as they are.
        strict: as in ``nn.Module.load_state_dict``. False also allows a layer of which the checkpoint has no key.

    Returns:
        The result of ``model.load_state_dict``: the missing and the unexpected keys.

    Raises:
        ValueError: a layer's keys are not those above, their shapes are not the layer's (as with another group size),
            or there is a running_wm where the model has no IterNorm; the module is named and the model as it was.
        TypeError: an entry of those keys is not a tensor, ``model`` is no module, or ``state_dict`` no mapping from
            strings.
        RuntimeError: of ``load_state_dict``, for the other modules.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected nn.Module, got {type(model).__name__}")
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected a mapping from names to tensors, got {type(state_dict).__name__}")
    for key in state_dict:
        if not isinstance(key, str):
            raise TypeError(f"state_dict: expected a mapping from names to tensors, got the key {key!r}")
    modules = dict(model.named_modules(remove_duplicate=False))
    converted = OrderedDict(state_dict)
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:  # versions, by which modules read older checkpoints
        converted._metadata = metadata  # type: ignore[attr-defined]
    for key in state_dict:
        prefix, _, entry = key.rpartition(".")
        if entry == RUNNING and not isinstance(modules.get(prefix), _IterNorm):
            got = type(modules[prefix]).__name__ if prefix in modules else "no module of this name"
            raise ValueError(f"{prefix or 'model'!r}: expected an IterNorm for the checkpoint's {key!r}, got {got}")
    for name, layer in modules.items():
        if isinstance(layer, _IterNorm):
            _convert(name, layer, converted, strict)
    return model.load_state_dict(converted, strict=strict)


def _convert(name: str, layer: _IterNorm, state: OrderedDict[str, Any], strict: bool) -> None:
    """Rename and reshape a layer's entries."""
    prefix = f"{name}." if name else ""
    channels, d = layer.num_features, layer.group_size
    groups = channels // d
    shapes: dict[str, list[tuple[int, ...]]] = {
        **{entry: [(1, channels, *[1] * spatial) for spatial in range(4)] for entry in PARAMETERS},
        "running_mean": [(groups, d, 1)],
        RUNNING: [(groups, d, d)],
    }
    expected = [entry for entry in shapes if (layer.affine if entry in PARAMETERS else layer.track_running_stats)]
    found = [entry for entry in shapes if prefix + entry in state]
    if not found and not strict:
        return
    if found != expected:
        raise ValueError(
            f"{name or 'model'!r}: expected a checkpoint with {', '.join(expected) or 'no keys'} for {layer}, "
            f"got {', '.join(found) or 'none of them'}"
        )
    for entry in expected:
        value = state[prefix + entry]
        if not isinstance(value, Tensor):
            raise TypeError(f"{prefix + entry!r}: expected a torch.Tensor, got {type(value).__name__}")
        if tuple(value.shape) not in shapes[entry]:
            raise ValueError(
                f"{prefix + entry!r}: expected shape {' or '.join(map(str, shapes[entry]))} for {channels} channels "
                f"with group_size={d}, got {tuple(value.shape)}"
            )
        state[prefix + entry] = value if entry == RUNNING else value.flatten()
    if layer.track_running_stats:
        state[prefix + "running_whitening"] = state.pop(prefix + RUNNING)
        state.setdefault(prefix + "num_batches_tracked", layer.num_batches_tracked)
