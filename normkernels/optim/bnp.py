"""Batch Normalization Preconditioning: BatchNorm's effect on the gradients, without a layer of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.hooks import RemovableHandle

from normkernels._checks import check_integer, check_number, check_tensor, statistics_dtype
from normkernels._torch import in_backward, is_exporting, is_transformed, not_traced
from normkernels.optim._batch import Batch
from normkernels.optim._layers import Layer, find_layers, listed
from normkernels.optim._running import Running, merge_ranks
from normkernels.primitives.precondition.op import precondition


class BNP:
    r"""Batch Normalization Preconditioning (Lange, Helfrich and Ye, 2022): Algorithms 2 and 3.

    For a layer with input h of mean mu and variance sigma^2, loss gradients G_w (O, I / groups, *k) and G_b (O,), and
    for each input channel j, in this order:

    .. math::
        \mu &\leftarrow \rho \mu + (1 - \rho) \mu_H, \quad
        \sigma^2 \leftarrow \rho \sigma^2 + (1 - \rho) \sigma_H^2, \\
        \tilde\sigma^2 &= \sigma^2 + \epsilon_1 \max \sigma^2 + \epsilon_2, \quad
        q^2 = \max(\textrm{fan-in} / N, \sqrt{rs}), \\
        G_w &\leftarrow (G_w - \mu_j G_b) / (q^2 \tilde\sigma_j^2), \\
        G_b &\leftarrow G_b / q^2 - \textstyle\sum \mu_j G_w,

    the last with the new G_w. That is (1/q^2) P P^T times the gradient (eq. 15 and 23): gradient descent in variables
    for which the layer's input is centred and of unit variance. mu_H and sigma_H are those of the mini-batch, over N
    samples (the first dimension) and all positions of the input (eq. 21 and 22), and r s is the number of output
    positions. A Linear on (N, *, in) is a 1x1 convolution; on (N, in), r s = 1 (Proposition 5). mu starts as 0 and
    sigma^2 as 1. A step of SGD on weights behind a BatchNorm, with no gradient through its statistics, is one step with
    BNP, rho = 0 and q = 1 on the two merged into one layer (Proposition 7).

    With the optimizer's every step::

        bnp = nk.optim.BNP(model)
        bnp.attach(optimizer)
        loss(model(x)).backward()
        optimizer.step()            # preconditions the gradients first

    or by hand: without ``attach``, ``bnp.step()`` between backward and ``optimizer.step()``.

    Layers: every Linear, Conv1d, Conv2d and Conv3d, grouped (each group with its own maximum and fan-in), strided,
    dilated, with any padding. Without a bias, or with a frozen one, G_w is only scaled, as mu has nothing to act on.
    Frozen weights are left alone. Modules that share weight and bias are one layer, their inputs are merged.
    A layer whose module is never called (the out_proj of nn.MultiheadAttention, whose weight is used directly) has no
    statistics, and its gradients stay as they are.

    Statistics are gathered when a layer has been called, in training mode only, in float32 (float64 for float64), on
    the activations' device; autocast does not matter. They add up until the next step: calls of one layer,
    micro-batches of gradient accumulation; then N is the sum and r s the average over samples. A forward pass under
    no_grad counts, too, unless in evaluation mode; recomputation under activation checkpointing, torch.func's
    transforms, functional_call with other weights and torch.export do not. A layer with one row (N = 1, r s = 1) takes
    (h - mu)^2 for its variance (section 3.3). If a layer's statistics are not finite, its running ones stay as they
    are. A layer without gradient only updates statistics; one with a gradient but not called since the last step is
    preconditioned with the running statistics and its last N and r s.

    Orders:
        Gradient accumulation: one step, after the last micro-batch.
        AMP: attach, and ``scaler.step(optimizer)`` as always. The change is linear in (G_w, G_b), so it does not matter
            whether ``scaler.unscale_`` comes first. When the scaler skips a step, its statistics are dropped with
            the gradients by ``zero_grad()``; with ``set_to_none=False`` they count for the next step. A fused optimizer
            skips by itself, after BNP: then the running statistics have taken them in.
        Clipping: before ``optimizer.step()`` it bounds the loss's gradients if attached. To bound the
            preconditioned ones instead: ``bnp.step()``, clip, ``optimizer.step()``.
        Weight decay of the optimizer is added after, and not preconditioned.
        Learning rate: q^2 divides the gradients (by fan-in / N, or sqrt(r s) in a convolution), so tune it again.
        Distributed: when torch.distributed is initialized, the ranks' statistics are merged in one collective per
            step; so every rank steps equally often. With DDP replicas stay equal, as if one process had the whole
            batch. It waits for the device once.
        torch.compile: make BNP before the first call of the compiled model; its hooks are graph breaks.
        Saving: state_dict between steps. Names of layers are those of the module that was given: with BNP(ddp) they
            begin with "module.". A deepcopy or pickle of the model has hooks that do nothing.
        Not supported: nn.DataParallel, parameters sharded by FSDP, capture of a whole step in a CUDA graph.

    Residual networks: BNP does not make a network invariant to the scale of its weights, which is what lets BatchNorm
    gain when the learning rate decays. Take a network whose BatchNorm layers are replaced by GroupNorm, which does
    (section 5; groups of 4 channels for CIFAR, momentum 0.9, a learning rate of 0.1 after one or two epochs of
    warmup)::

        model = resnet(norm_layer=lambda channels: nn.GroupNorm(channels // 4, channels))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1.5e-4)
        nk.optim.BNP(model).attach(optimizer)

    Args:
        model: the model whose layers to precondition.
        rho: weight of the past in the running averages, in [0, 1].
        eps1: times the largest variance of the layer is added to all, without unit.
        eps2: added to all variances, in the units of the input squared. With both 0 a layer with a channel of
            variance 0 has no preconditioner, and its gradients are left alone as not finite.
        skip: layers to leave alone, by name (as in ``model.named_modules()``) or as modules; a container stands for
            all layers in it.
        process_group: the group whose ranks to merge, None for all; False to merge none.

    A row of a gradient (all weights of one output, and its bias) that is not finite is left as it is, with one warning
    that names the layers; on a GPU it comes a step or more later, as nothing waits for the device.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an option is out of range, skip names what is not there, no layer is left, or a layer cannot be
            preconditioned: its weight or bias is computed from others (parametrized), shared with another kind of
            module, uninitialized or complex, or there is another BNP on it.
    """

    def __init__(
        self,
        model: nn.Module,
        rho: float = 0.99,
        eps1: float = 1e-2,
        eps2: float = 1e-4,
        skip: Sequence[str | nn.Module] = (),
        *,
        process_group: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        check_number("rho", rho, maximum=1.0)
        check_number("eps1", eps1)
        check_number("eps2", eps2)
        if not (process_group is None or process_group is False or isinstance(process_group, dist.ProcessGroup)):
            raise TypeError(f"process_group: expected a ProcessGroup, None or False, got {process_group!r}")
        self.rho, self.eps1, self.eps2 = rho, eps1, eps2
        self.process_group = process_group
        self._layers = find_layers(model, skip)
        for layer in self._layers:
            for module in layer.modules:
                if any(isinstance(hook, _Hook) and hook.gather for hook in module._forward_hooks.values()):
                    raise ValueError(f"model: expected layers without BNP, got one on {layer.label}; remove() it first")
        self._hooks = [
            # It is the first of the hooks, before one of them changes the output. It is no pre-hook, so that it gets
            # the input that all of these have left, can read r s off the output, and leaves no trace of a failed call.
            module.register_forward_hook(_Hook(self._gather, layer), prepend=True, with_kwargs=True)
            for layer in self._layers
            for module in layer.modules
        ]
        self._attached: RemovableHandle | None = None
        self._running: list[Running] = []
        self._places: list[tuple[torch.device, torch.dtype]] = []
        self._seen = False  # a forward pass in training since the last step that had nothing to gather
        self._warned = False
        self._left: list[_Left] = []

    def step(self) -> None:
        """Update the statistics and precondition the gradients, in place.

        Call it once between backward and ``optimizer.step()``.

        Raises:
            RuntimeError: no layer was called in training mode since the last step (on any rank), or BNP is attached.
            ValueError: a layer's weight has come to be computed from others, or has other input channels.
        """
        if self.attached:
            raise RuntimeError("step: expected a BNP that is not attached, got one that steps with the optimizer")
        self._step()

    @property
    def attached(self) -> bool:
        """Whether it steps with an optimizer."""
        if self._attached is None:
            return False
        hooks = self._attached.hooks_dict_ref()
        return hooks is not None and self._attached.id in hooks

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Step at the beginning of each ``optimizer.step()``, until the handle's ``remove()``.

        Raises:
            RuntimeError: it is attached already, or removed; and from optimizer.step(): it was given a closure, in
                which gradients would be computed after they are preconditioned.
            ValueError: the optimizer does not hold a layer's trainable weight or bias.
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if self.attached:
            raise RuntimeError("attach: expected a BNP that is not attached, got one that is; remove its handle first")
        if not self._hooks:
            raise RuntimeError("attach: expected a BNP with hooks, got one after remove(); make another")
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [
            layer.label
            for layer in self._layers
            for parameter in (layer.weight, layer.bias)
            if parameter is not None and parameter.requires_grad and id(parameter) not in held
        ]
        if missing:
            raise ValueError(
                f"optimizer: expected one that holds weight and bias of all layers, got one without those of "
                f"{', '.join(dict.fromkeys(missing))}; put the layers in skip"
            )
        self._attached = optimizer.register_step_pre_hook(self._before_optimizer)
        return self._attached

    def remove(self) -> None:
        """Take all hooks off model and optimizer. The state stays readable."""
        for handle in (*self._hooks, *filter(None, [self._attached])):
            handle.remove()
        for layer in self._layers:
            layer.unwatch()
            layer.forget()
        self._hooks, self._attached, self._seen = [], None, False

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return, by layers' names, running mean and variance (I,), samples N and positions r s of the last step."""
        return {
            layer.name: {
                "mean": layer.mean.clone(),
                "variance": layer.variance.clone(),
                "samples": layer.samples,
                "positions": layer.positions,
            }
            for layer in self._layers
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over a state_dict; what was gathered since the last step is dropped.

        Raises:
            ValueError: it is of other layers or shapes, a number is not finite, or a variance is negative.
            TypeError: a value has the wrong type.

        Nothing is changed where it raises.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: expected a mapping, got {type(state_dict).__name__}")
        names = [layer.name for layer in self._layers]
        if set(names) != set(state_dict):
            missing, unexpected = set(names) - set(state_dict), set(state_dict) - set(names)
            raise ValueError(
                f"state_dict: expected the layers {listed(names)}, got one that lacks "
                f"{listed(sorted(missing))} and has {listed(sorted(map(str, unexpected)))} besides"
            )
        for layer in self._layers:
            _check_state(layer, state_dict[layer.name])
        for layer in self._layers:
            state = state_dict[layer.name]
            layer.mean.copy_(state["mean"])
            layer.variance.copy_(state["variance"])
            layer.samples, layer.positions = int(state["samples"]), float(state["positions"])
            layer.forget()
        self._seen = False

    def __reduce__(self) -> NoReturn:
        raise TypeError("BNP: it belongs to its model; make one for the copy of the model and load the state_dict")

    def _gather(self, layer: Layer, module: nn.Module, x: Any, output: Any) -> None:
        # In the middle of a backward pass, activation checkpointing calls the layer a second time.
        if not module.training or in_backward() or is_transformed():
            return
        layer.check()
        weight = module.weight
        # Under functional_call the weight is not the module's own, and neither will be the gradient.
        if not isinstance(weight, nn.Parameter):
            return
        if not weight.requires_grad:
            self._seen = True
            return
        layer.check_call(x, output)
        if x.numel() == 0:
            self._seen = True
            return
        with forward_ad._set_fwd_grad_enabled(False):
            batch = Batch.of(x, output, weight)
        if len(batch.mean) != len(layer.mean):
            raise ValueError(
                f"{layer.label}: expected an input of {len(layer.mean)} channels, got shape {tuple(x.shape)}; put the "
                f"layer in skip"
            )
        layer.gather(batch, weight)

    def _before_optimizer(self, optimizer: torch.optim.Optimizer, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:
            raise RuntimeError(
                "closure: expected none while BNP is attached, got one; it would compute gradients that are not "
                "preconditioned. Call BNP's step() at the end of the closure instead"
            )
        # GradScaler leaves it to fused optimizers to skip a step. Then gradients that are not finite need no warning.
        self._step(skipped=getattr(optimizer, "found_inf", None))

    @not_traced
    @torch.no_grad()
    def _step(self, skipped: Tensor | None = None) -> None:
        owners: dict[int, Layer] = {}
        for layer in self._layers:
            layer.check()
            owner = owners.setdefault(id(layer.weight), layer)
            if owner is not layer:  # its gradient would be preconditioned twice
                raise ValueError(
                    f"{layer.label}: expected a weight of its own, got that of {owner.label}; make another BNP after "
                    f"weights are tied"
                )
            if layer.watched is not layer.weight:  # from a functional_call with another module's parameters
                layer.forget()
        self._arrange()
        seen = self._seen or any(layer.batch is not None for layer in self._layers)
        world_size = 1
        if self.process_group is not False and dist.is_available() and dist.is_initialized():
            world_size = dist.get_world_size(self.process_group)
        if world_size > 1:
            seen = merge_ranks(self._layers, seen, self.process_group, world_size)
        if not seen:
            raise RuntimeError(
                "step: expected a forward pass in training mode since the last step, got none through any layer"
            )
        for running in self._running:
            running.update(self.rho)
        for layer in self._layers:
            if layer.batch is not None:
                layer.samples = layer.batch.samples
                layer.positions = layer.batch.outputs / layer.batch.samples
            layer.forget()
        self._seen = False
        self._precondition(skipped)

    @torch.inference_mode(False)  # a step inside of inference mode would make tensors that no other step may change
    def _arrange(self) -> None:
        """Put running statistics where the weights are, in their statistics' type: the model may have moved."""
        places = [(layer.weight.device, statistics_dtype(layer.weight.dtype)) for layer in self._layers]
        if places != self._places:
            self._running = [
                Running([layer for layer, at in zip(self._layers, places, strict=True) if at == place], *place)
                for place in dict.fromkeys(places)
            ]
            self._places = places

    def _precondition(self, skipped: Tensor | None) -> None:
        layers = [
            layer
            for layer in self._layers
            if layer.samples > 0 and layer.weight.requires_grad and layer.weight.grad is not None
        ]
        left = precondition(
            [layer.weight.grad for layer in layers],  # type: ignore[misc]
            [None if (b := layer.bias) is None or not b.requires_grad else b.grad for layer in layers],
            [layer.mean for layer in layers],
            [layer.variance for layer in layers],
            [layer.groups for layer in layers],
            [layer.q2 for layer in layers],
            self.eps1,
            self.eps2,
        )
        if not self._warned:
            self._report([layer.label for layer in layers], left, skipped)

    def _report(self, names: Sequence[str], left: Sequence[Tensor], skipped: Tensor | None) -> None:
        """Warn, once, of rows that were left alone; those on a GPU are looked at when their numbers have arrived."""
        for device in dict.fromkeys(rows.device for rows in left):
            here = [i for i, rows in enumerate(left) if rows.device == device]
            rows = torch.stack([left[i] for i in here])
            if skipped is not None:
                rows = rows * (skipped.to(device) == 0)
            self._left.append(_Left([names[i] for i in here], rows))
        arrived = [waiting for waiting in self._left if waiting.arrived()]
        self._left = [waiting for waiting in self._left if waiting not in arrived]
        bad = [name for waiting in arrived for name in waiting.layers()]
        if bad:
            self._warned, self._left = True, []
            where = ", ".join(dict.fromkeys(bad))
            warnings.warn(f"BNP: left gradients that are not finite as they are in {where}; said once", stacklevel=2)


class _Left:
    """The numbers of rows of some layers that were left alone, on their way to the host."""

    def __init__(self, names: Sequence[str], rows: Tensor) -> None:
        self.names = names
        self.event: torch.cuda.Event | None = None
        if rows.is_cuda:
            self.rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(rows.device))
        else:
            self.rows = rows

    def arrived(self) -> bool:
        return self.event is None or self.event.query()

    def layers(self) -> list[str]:
        return [name for name, rows in zip(self.names, self.rows.tolist(), strict=True) if rows]


class _Hook:
    """A layer's forward hook. A copy does nothing: the copied model's statistics are not those that BNP is for."""

    def __init__(self, gather: Callable[[Layer, nn.Module, Any, Any], None] | None, layer: Layer | None) -> None:
        self.gather, self.layer = gather, layer

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None, None)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # torch.export(strict=True) traces this, and allows no graph breaks.
        if not is_exporting():
            self._gather(module, args, kwargs, output)

    # If Dynamo traced it, it would guard on the gathered values and compile again for steps and micro-batches.
    @not_traced
    @torch.no_grad()
    def _gather(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.gather is not None and self.layer is not None:
            self.gather(self.layer, module, next(iter((*args, *kwargs.values())), None), output)


def _check_state(layer: Layer, state: object) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(f"{layer.label}: expected a mapping as its state, got {type(state).__name__}")
    for key in ("mean", "variance", "samples", "positions"):
        if key not in state:
            raise ValueError(f"{layer.label}: expected {key} in its state, got {', '.join(state) or 'nothing'}")
    for key, minimum in (("mean", float("-inf")), ("variance", 0.0)):
        name, value = f"{layer.label}.{key}", state[key]
        check_tensor(name, value)
        if value.shape != layer.mean.shape:
            raise ValueError(f"{name}: expected shape {tuple(layer.mean.shape)}, got {tuple(value.shape)}")
        if value.is_complex():
            raise TypeError(f"{name}: expected real numbers, got {value.dtype}")
        value = value.to(layer.mean.dtype)  # it may overflow in this type
        if not (value.isfinite() & (value >= minimum)).all():
            bounds = "at least 0" if minimum == 0 else "only"
            raise ValueError(f"{name}: expected finite numbers {bounds}, got {value.tolist()}")
    check_integer(f"{layer.label}.samples", state["samples"], minimum=0)
    check_number(f"{layer.label}.positions", state["positions"])
