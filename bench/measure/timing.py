"""Interleaved timing of several providers with one piece of code for CPU and CUDA.

A shared or throttling machine drifts while it is measured. So nothing is timed on its own: in every round
each provider runs once, in an order that changes from round to round, and a ratio is the median of the ratios
inside the rounds. Drift then hits both sides of a ratio alike.

The timed part is `Timed.run` and nothing else. `Timed.prepare` clears the old gradients and picks another
input set, so that no call finds its input in the cache or adds to a gradient; `Timed.finish` checks that the
outputs are alive and overwrites them with NaN, so that memory which is handed out again cannot hold the right
answer by accident.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

# Cycles that keep a GPU busy while the host queues the work, about 1 ms and 5 ms: at first, and at most.
SPIN_CYCLES, LONGEST_SPIN = 2_000_000, 10_000_000


class Timed(Protocol):
    """One provider bound to its inputs; only `run` is timed. All three are called inside `context`."""

    def context(self) -> AbstractContextManager[object]:
        return nullcontext()

    def prepare(self, turn: int) -> None: ...

    def run(self) -> None: ...

    def finish(self) -> None: ...


class Clock(Protocol):
    """Times one call, in seconds."""

    name: str

    def time(self, run: Callable[[], None]) -> float: ...


class CpuClock:
    """Wall time of a call that is done when it returns."""

    name = "perf_counter"

    def time(self, run: Callable[[], None]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


class CudaClock:
    """Device time between two CUDA events.

    The device is kept busy while the host queues the work, so the time between the events has no launch gaps
    in it as long as the call itself does not wait for the device. A call that does wait is charged for the
    wait. Work that was not queued in time makes the next calls' spin longer: the warm-up rounds find its length.
    """

    name = "CUDA events"

    def __init__(self) -> None:
        self.cycles = SPIN_CYCLES

    def time(self, run: Callable[[], None]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(self.cycles)
        start.record()
        run()
        late = start.query()  # the device has come to the work before all of it was queued
        end.record()
        end.synchronize()
        if late:
            self.cycles = min(2 * self.cycles, LONGEST_SPIN)
        return start.elapsed_time(end) / 1e3


class HostClock(CpuClock):
    """Time until a call returns, not until the device is done: what the host needs to queue the work."""

    name = "perf_counter, without waiting for the device"

    def time(self, run: Callable[[], None]) -> float:
        torch.cuda.synchronize()
        return super().time(run)


def clock_for(device: torch.device, host: bool = False) -> Clock:
    return CpuClock() if device.type != "cuda" else HostClock() if host else CudaClock()


def settle_allocator() -> None:
    """Free one block of just under 32 MiB, the largest that moves glibc's thresholds for mmap and trim.

    They follow the largest block freed so far, and below them memory is kept instead of being given back and faulted
    in again, at about 1 us a page. A training process has freed such a block after its first step; here it would depend
    on which suites ran before.
    """
    large = torch.empty(2**23 - 2**14)
    del large


@dataclass(frozen=True)
class Plan:
    """`rounds` rounds, or fewer once `budget_s` seconds are over, but never fewer than `min_rounds`."""

    rounds: int = 30
    min_rounds: int = 7
    warmup: int = 2
    budget_s: float = 15.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_rounds <= self.rounds or self.warmup < 0:
            raise ValueError(f"expected 1 <= min_rounds <= rounds and warmup >= 0, got {self}")


@dataclass(frozen=True)
class Quantiles:
    p50: float
    p20: float
    p80: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Quantiles:
        data = sorted(values)
        if not data:
            raise ValueError("expected at least one sample, got none")
        return cls(_quantile(data, 0.5), _quantile(data, 0.2), _quantile(data, 0.8), len(data))

    def scaled(self, factor: float) -> Quantiles:
        return Quantiles(self.p50 * factor, self.p20 * factor, self.p80 * factor, self.count)


def _quantile(data: Sequence[float], q: float) -> float:
    """Interpolate linearly between the order statistics of sorted `data`."""
    position = q * (len(data) - 1)
    low = int(position)
    high = min(low + 1, len(data) - 1)
    return data[low] + (position - low) * (data[high] - data[low])


@dataclass
class Measurement:
    """Seconds per round and provider (None where a provider has failed), and why the failed ones failed."""

    samples: dict[str, list[float | None]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def seconds(self, name: str) -> list[float]:
        return [value for value in self.samples.get(name, []) if value is not None]

    def quantiles(self, name: str) -> Quantiles:
        return Quantiles.of(self.seconds(name))

    def ratio(self, name: str, relative_to: str) -> Quantiles | None:
        """Return quantiles of the per-round ratios; None if the two have no round in common."""
        pairs = zip(self.samples.get(name, []), self.samples.get(relative_to, []), strict=False)
        ratios = [a / b for a, b in pairs if a is not None and b is not None and b > 0]
        return Quantiles.of(ratios) if ratios else None


def order(names: Sequence[str], turn: int) -> list[str]:
    """Return the order of round `turn`: rotated every second round, reversed in between.

    Rotation alone would give everyone the same predecessor for ever, and with it the same state of cache and
    allocator.
    """
    if not names:
        return []
    shift = (turn // 2) % len(names)
    rotated = [*names[shift:], *names[:shift]]
    return rotated[::-1] if turn % 2 else rotated


def interleave(
    providers: Mapping[str, Timed],
    plan: Plan,
    clock: Clock,
    on_round: Callable[[int, int], None] | None = None,
) -> Measurement:
    """Measure all providers round by round. One that raises is recorded and left out; the others go on.

    Args:
        providers: name -> what to time.
        plan: number of rounds, warm-up and time limit.
        clock: times one call.
        on_round: called with (round, rounds) before each timed round, for a progress display.
    """
    result = Measurement({name: [] for name in providers}, {})
    turn = 0

    def call(name: str) -> float | None:
        nonlocal turn
        turn += 1
        try:
            with providers[name].context():
                providers[name].prepare(turn)
                seconds = clock.time(providers[name].run)
                providers[name].finish()
        except Exception as error:  # any failure of one provider must not cost the others their figures
            result.failures[name] = describe(error)
            return None
        return seconds

    for index in range(plan.warmup):
        for name in order(list(providers), index):
            if name not in result.failures:
                call(name)

    started = time.perf_counter()
    collecting = gc.isenabled()
    gc.disable()  # a collection inside one timed call would be charged to whoever runs then
    try:
        for index in range(plan.rounds):
            if index >= plan.min_rounds and time.perf_counter() - started > plan.budget_s:
                break
            if on_round is not None:
                on_round(index, plan.rounds)
            taken = {name: None if name in result.failures else call(name) for name in order(list(providers), index)}
            for name, seconds in taken.items():
                result.samples[name].append(seconds)
            gc.collect(0)
    finally:
        if collecting:
            gc.enable()
    return result


def describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def require_alive(name: str, tensor: Tensor) -> None:
    """Raise if the first or the last sample of a tensor is not finite or is all zero.

    Looking at two samples costs next to nothing, and a kernel that wrote nothing shows the NaN it was
    poisoned with.
    """
    if tensor.numel() == 0:
        raise ValueError(f"{name}: expected values, got an empty tensor of shape {tuple(tensor.shape)}")
    for index in (0, -1):
        sample = tensor.detach() if tensor.dim() == 0 else tensor.detach()[index]
        if not torch.isfinite(sample).all():
            raise ValueError(f"{name}: expected finite values, got NaN or infinity in sample {index}")
        if not sample.any():
            raise ValueError(f"{name}: expected values that are not all zero, got zeros in sample {index}")


def poison(tensor: Tensor) -> None:
    """Overwrite a tensor that is no longer needed with NaN."""
    tensor.detach().fill_(float("nan"))
