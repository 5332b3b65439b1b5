"""Attacks, which show what small changes of its inputs do to a classifier: by gradients, as a black box, by noise."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normkernels._checks import check_choice, check_flag, check_integer, check_number, check_tensor, statistics_dtype
from normkernels.analysis._checks import check_callable, check_finite, check_floating
from normkernels.analysis._progress import track
from normkernels.eager.devices import in_float64, widest, with_float64

Model = Callable[[Tensor], Tensor]
Bounds = tuple[float, float]


def bim(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step_size: float,
    num_steps: int,
    bounds: Bounds = (0.0, 1.0),
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    targeted: bool = False,
    batch_size: int | None = None,
    progress: bool = False,
) -> Tensor:
    r"""Attack a classifier with the basic iterative method in an l_inf ball.

    Kurakin et al., 2017, "Adversarial Examples in the Physical World":

    .. math:: x_0 = x, \quad x_{t+1} = \mathrm{clip}_{[x - \epsilon, x + \epsilon] \cap [a, b]}
        \left( x_t + \alpha \, \mathrm{sign} \, \nabla_x L(x_t, y) \right)

    The model is run in eval mode and then gets its modes back; parameters and their gradients stay as they are.

    Ends of the intervals are rounded inward: :math:`\lvert x_t - x \rvert \le \epsilon` holds in float64 for the
    returned values, whatever their type. Steps of half types add up in float32; the model gets x's type.

    Where the gradient is zero there is no step: a sample whose gradient is zero everywhere, as after ``round`` or with
    a saturated loss, comes back as it was, without an error.

    Args:
        model: from (N, *) to logits (N, K), differentiable, or to what another L takes. A module, or any function.
        x: (N, *), any floating-point type, within the bounds.
        y: on x's device: classes (N,), int64, from 0 to K - 1, or probabilities (N, K); or what another L takes.
        eps: the radius, in the units of x, from 0 to b - a.
        step_size: alpha, greater than 0.
        num_steps: at least 1.
        bounds: [a, b], of valid inputs.
        loss: L, from logits and y; a tensor of several values is summed.
        targeted: y are classes to reach, and L is descended.
        batch_size: samples at a time. None: all.
        progress: shows a bar; needs tqdm.

    Returns: The attacked samples, like x, without gradient.

    Raises:
        TypeError: x is no floating-point tensor, y no tensor or no classes, the model or L no function, or an option
            has another type.
        ValueError: x and y differ in length or device, x is not within the bounds, a class is not one of the K, logits
            are not (N, K), an option is out of range, the model is not differentiable in its input, or the gradient is
            not finite.
        RuntimeError: torch.inference_mode is on, which allows no gradients.
    """
    check_callable("model", model)
    check_callable("loss", loss)
    if torch.is_inference_mode_enabled():
        raise RuntimeError("bim: expected a call outside torch.inference_mode, which has no gradients, got it on")
    _check_attack(x, y, bounds)
    check_number("eps", eps, maximum=bounds[1] - bounds[0])
    _check_positive("step_size", step_size)
    check_integer("num_steps", num_steps, minimum=1)
    check_flag("targeted", targeted)
    step = -step_size if targeted else step_size
    chunks = _chunks(x.detach(), y, size=batch_size)
    attacked = []
    with _evaluating(model):
        for clean, label in track(chunks, len(chunks), "BIM", progress):
            low, high = _ends(clean, eps, bounds)
            adversarial = clean.to(statistics_dtype(x.dtype))
            for _ in range(num_steps):
                gradient = _input_gradient(model, loss, adversarial.to(x.dtype), label)
                adversarial = (adversarial + step * gradient.sign()).clamp(low, high)
            attacked.append(adversarial.to(x.dtype))
    return torch.cat(attacked)


def _ends(x: Tensor, eps: float, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """Return the ends of [x - eps, x + eps] within the bounds, in x's type.

    An end that rounds to a number outside the interval is moved one number inward.
    """
    device, x = x.device, with_float64(x)
    exact, largest = in_float64(x), torch.finfo(x.dtype).max
    ends = []
    for end in ((exact - eps).clamp(min=bounds[0]), (exact + eps).clamp(max=bounds[1])):
        nearest = end.clamp(-largest, largest).to(x.dtype)  # not infinite
        outside = (nearest.double() - exact).abs() > (end - exact).abs().clamp(max=eps)
        ends.append(torch.where(outside, torch.nextafter(nearest, x), nearest).to(device))
    return ends[0], ends[1]


def _input_gradient(model: Model, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = model(x)
        gradient = None
        # Integer logits have no gradient, and the default loss does not take them: it must not be called with them.
        if loss is not F.cross_entropy or not isinstance(logits, Tensor) or logits.requires_grad:
            if loss is F.cross_entropy:
                _check_cross_entropy(logits, x, y)
            value = loss(logits, y)
            check_tensor("loss", value)
            if value.requires_grad:
                (gradient,) = torch.autograd.grad(value.sum(), x, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "model: expected a model that is differentiable in its input, got a loss without a gradient there"
        )
    check_finite("gradient of the loss", gradient)  # the sign of NaN is 0
    return gradient


def gaussian_noise(
    x: Tensor, std: float, bounds: Bounds | None = (0.0, 1.0), generator: torch.Generator | None = None
) -> Tensor:
    """Return x plus independent normal noise of this standard deviation, clipped to the bounds (None: not clipped).

    The noise is drawn on the generator's device (None: on x's), in float32 for half types.

    Raises:
        TypeError: x is no floating-point tensor, or std no number.
        ValueError: std is negative or not finite, or the bounds are not in order.
    """
    check_floating("x", x)
    check_number("std", std)
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    device = x.device if generator is None else generator.device
    noise = torch.randn(x.shape, generator=generator, device=device, dtype=dtype).to(x.device)
    noisy = x.to(dtype) + std * noise
    if bounds is not None:
        _check_bounds(bounds)
        noisy = noisy.clamp(*bounds)
    return noisy.to(x.dtype)


@torch.no_grad()
def accuracy(model: Model, x: Tensor, y: Tensor, batch_size: int | None = None, *, progress: bool = False) -> float:
    """Return the share of samples x (N, *) whose largest logit is that of their class y (N,), in eval mode.

    Raises:
        TypeError: the model is no function, x or y no tensor, or y no classes (int64).
        ValueError: there are no samples, x and y differ in length or device, logits are not (N, K) or not finite, a
            class is not one of the K, or batch_size is less than 1.
    """
    check_callable("model", model)
    check_tensor("x", x)
    _check_labelled(x, y)
    _check_classes(x, y)
    chunks = _chunks(x, y, size=batch_size)
    right = []
    with _evaluating(model):
        for samples, label in track(chunks, len(chunks), "accuracy", progress):
            right.append((_logits(model, samples, label).argmax(1) == label).sum())
    return torch.stack(right).sum().item() / len(x)


class SimBAResult(NamedTuple):
    """The result of simba, for N samples."""

    x: Tensor  # like the input
    queries: Tensor  # (N,) int64, how often the model was asked about the sample
    succeeded: Tensor  # (N,) bool


@torch.no_grad()
def simba(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    max_queries: int,
    basis: str = "pixel",
    frequencies: int | None = None,
    bounds: Bounds = (0.0, 1.0),
    targeted: bool = False,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> SimBAResult:
    r"""Attack a classifier with the simple black-box attack (Guo et al., 2019, Algorithm 1): forward passes only.

    Directions q of an orthonormal basis are tried in random order, each once. If the probability of class y falls for
    :math:`x' + \epsilon q`, or else for :math:`x' - \epsilon q`, the step is taken. This goes on until the class is
    another one, queries are spent, or there are no more directions. After k steps :math:`\lVert x' - x \rVert_2` is
    :math:`\epsilon \sqrt k`, less where pixels are clipped.

    Samples are attacked in one batch, each by itself, with an order of its own; the model is run in eval mode and
    then gets its modes back. Its output for a sample must not depend on the other samples.

    Args:
        model: from (N, *) to logits (N, K). A module, or any function; nothing is differentiated.
        x: (N, *), any floating-point type, within the bounds.
        y: (N,), classes on x's device, int64, from 0 to K - 1.
        eps: the length of a step, greater than 0 and at most b - a.
        max_queries: per sample, at least 1; the first one is for x itself.
        basis: "pixel", the entries of x, or "dct", the cosine basis (DCT-II) of each channel of x (N, C, *).
        frequencies: with "dct", only the so many lowest of each axis (28 of 224 in the paper). None: all.
        bounds: [a, b], of valid inputs, to which candidates are clipped.
        targeted: y are classes to reach, whose probability is to rise.
        batch_size: samples at a time; the result does not depend on it. None: all.
        generator: of the orders. None for torch's default.
        progress: shows a bar of the samples' batches; needs tqdm.

    Returns:
        SimBAResult(x, queries, succeeded): like x without gradient, (N,) int64 and (N,) bool. A sample that needs no
        attack has succeeded with one query.

    Raises:
        TypeError: the model is no function, x no floating-point tensor, y no tensor or no classes, or an option has
            another type.
        ValueError: x and y differ in length or device, x is not within the bounds or has no axes for "dct", logits are
            not (N, K) or not finite, a class is not one of the K, or an option is out of range.
    """
    check_callable("model", model)
    _check_attack(x, y, bounds)
    _check_positive("eps", eps, maximum=bounds[1] - bounds[0])
    check_integer("max_queries", max_queries, minimum=1)
    _check_classes(x, y)
    check_choice("basis", basis, ("pixel", "dct"))
    check_flag("targeted", targeted)
    directions = _Directions(x, basis, frequencies)
    device = "cpu" if generator is None else generator.device
    seeds = torch.randint(
        2**62, (len(x),), generator=generator, device=device
    )  # one seed per sample: the result does not depend on batch_size
    chunks = _chunks(x, y, seeds, size=batch_size)
    with _evaluating(model):
        results = [
            _simba(model, clean, label, directions, seed, eps, max_queries, bounds, targeted)
            for clean, label, seed in track(chunks, len(chunks), "SimBA", progress)
        ]
    return SimBAResult(*map(torch.cat, zip(*results, strict=True)))


def _simba(
    model: Model,
    x: Tensor,
    y: Tensor,
    directions: _Directions,
    seeds: Tensor,
    eps: float,
    max_queries: int,
    bounds: Bounds,
    targeted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    def ask(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value that is to rise, and whether the class is as wanted.

        The log odds of the class stand for its probability, with which they rise: they saturate at neither end, so
        float32 is enough where there is nothing wider.
        """
        logits = _logits(model, x, y)
        logits = logits.to(widest(logits))
        others = logits.scatter(1, y[:, None], -math.inf).logsumexp(1)
        gain = logits.gather(1, y[:, None])[:, 0] - others
        return gain if targeted else -gain, (logits.argmax(1) == y) == targeted

    generators = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
    orders = torch.stack([torch.randperm(directions.count, generator=g) for g in generators]).to(x.device)
    x, queries = x.clone(), torch.ones_like(y)
    best, succeeded = ask(x, y)
    for k in range(directions.count):
        left = (~succeeded & (queries < max_queries)).nonzero()[:, 0]
        if not len(left):
            break
        q = directions(orders[left, k])
        for step in (eps, -eps):
            candidate = (x[left] + step * q).clamp(*bounds)
            gain, reached = ask(candidate, y[left])
            queries[left] += 1
            better = gain > best[left]
            taken = left[better]
            x[taken], best[taken], succeeded[taken] = candidate[better], gain[better], reached[better]
            rest = ~better & (queries[left] < max_queries)
            left, q = left[rest], q[rest]
            if not len(left):
                break
    return x, queries, succeeded


class _Directions:
    """An orthonormal basis of samples shaped like x[0]: ``count`` directions, made when they are asked for."""

    def __init__(self, x: Tensor, basis: str, frequencies: int | None) -> None:
        self.like, self.shape = x, x.shape[1:]
        self.waves: list[Tensor] = []  # (frequencies, n) for each axis; none for pixels
        if basis == "pixel":
            if frequencies is not None:
                raise ValueError(f"frequencies: expected None with basis='pixel', got {frequencies}")
            self.sizes: tuple[int, ...] = (self.shape.numel(),)
        else:
            if x.dim() < 3:
                raise ValueError(f"x: expected shape (N, C, *) with basis='dct', got {tuple(x.shape)}")
            smallest = min(self.shape[1:])
            if frequencies is not None and check_integer("frequencies", frequencies, minimum=1) > smallest:
                raise ValueError(
                    f"frequencies: expected at most the {smallest} of the shortest axis, got {frequencies}"
                )
            self.waves = [_cosines(n)[:frequencies].to(widest(x)).to(x.device) for n in self.shape[1:]]
            self.sizes = (self.shape[0], *(len(waves) for waves in self.waves))
        self.count = math.prod(self.sizes)

    def __call__(self, index: Tensor) -> Tensor:
        """Return the directions (n, *shape) of these numbers (n,)."""
        channel, *axes = torch.unravel_index(index, self.sizes)
        q = self.like.new_zeros(len(index), self.shape[0] if axes else self.count, dtype=widest(self.like))
        q.scatter_(1, channel[:, None], 1.0)
        for waves, frequency in zip(self.waves, axes, strict=True):
            q = q.unsqueeze(-1) * waves[frequency].view(len(q), *[1] * (q.dim() - 1), -1)
        return q.view(len(q), *self.shape).to(self.like.dtype)


def _cosines(n: int) -> Tensor:
    """Return the orthonormal DCT-II, (n frequencies, n), float64, on the CPU."""
    i = torch.arange(n, dtype=torch.float64, device="cpu")
    waves = torch.cos(math.pi / n * i[:, None] * (i + 0.5)) * (2 / n) ** 0.5
    waves[0] *= 0.5**0.5
    return waves


@contextlib.contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """Set eval mode; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    try:
        if isinstance(model, nn.Module):
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _chunks(x: Tensor, *others: Tensor, size: int | None) -> list[tuple[Tensor, ...]]:
    size = len(x) if size is None else check_integer("batch_size", size, minimum=1)
    return list(zip(*(t.split(size) for t in (x, *others)), strict=True))


def _check_labelled(x: Tensor, y: object) -> None:
    check_tensor("y", y)
    assert isinstance(y, Tensor)
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"x: expected a non-empty shape (N, *), got {tuple(x.shape)}")
    if y.dim() == 0 or len(y) != len(x):
        raise ValueError(f"y: expected as many as the {len(x)} samples, got shape {tuple(y.shape)}")
    if y.device != x.device:
        raise ValueError(f"y: expected a tensor on {x.device} like x, got one on {y.device}")


def _check_classes(x: Tensor, y: Tensor) -> None:
    if y.dtype != torch.int64:
        raise TypeError(f"y: expected classes of type torch.int64, got {y.dtype}")
    if y.dim() != 1:
        raise ValueError(f"y: expected shape ({len(x)},), got {tuple(y.shape)}")


def _logits(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """Return the logits, which are checked to be finite, because argmax finds a class among NaNs, too."""
    logits = model(x)
    _check_logits(logits, x)
    check_finite("logits", logits)
    _check_range(y, logits)
    return logits


def _check_logits(logits: object, x: Tensor) -> None:
    check_tensor("logits", logits)
    assert isinstance(logits, Tensor)
    if logits.dim() != 2 or len(logits) != len(x) or not logits.numel():
        raise ValueError(f"logits: expected shape (N, K) for the {len(x)} samples, got {tuple(logits.shape)}")


def _check_range(y: Tensor, logits: Tensor) -> None:
    if not ((y >= 0) & (y < logits.shape[1])).all():
        raise ValueError(
            f"y: expected classes from 0 to {logits.shape[1] - 1}, got {y.min().item()} to {y.max().item()}"
        )


def _check_cross_entropy(logits: Tensor, x: Tensor, y: Tensor) -> None:
    """Raise unless F.cross_entropy takes y with these logits: as classes or as probabilities."""
    _check_logits(logits, x)
    if y.is_floating_point() and y.dim() == 2:
        if y.shape != logits.shape:
            raise ValueError(f"y: expected probabilities of shape {tuple(logits.shape)}, got {tuple(y.shape)}")
    else:
        _check_classes(x, y)
        _check_range(y, logits)


def _check_bounds(bounds: Bounds) -> None:
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError(f"bounds: expected two numbers, got {bounds!r}")
    low, high = bounds
    for value in bounds:
        check_number("bounds", value, minimum=-math.inf)
    if not -math.inf < low < high:
        raise ValueError(f"bounds: expected two finite numbers, the lower one first, got {bounds}")


def _check_attack(x: Tensor, y: Tensor, bounds: Bounds) -> None:
    check_floating("x", x)
    _check_labelled(x, y)
    _check_bounds(bounds)
    if not ((x >= bounds[0]) & (x <= bounds[1])).all():  # false for NaN
        raise ValueError(f"x: expected values within the bounds {bounds}, got {x.min().item():g} to {x.max().item():g}")


def _check_positive(name: str, value: float, maximum: float = math.inf) -> None:
    check_number(name, value, maximum=maximum)
    if value == 0:
        raise ValueError(f"{name}: expected more than 0, got 0")
