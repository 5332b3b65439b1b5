"""A comparison: providers that are measured against each other, interleaved, on one workload."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch

from bench.measure.timing import Measurement, Plan, Timed, clock_for, describe, interleave
from bench.measure.workload import CPU, GraphCall, Inputs, Mode, Provider, Workload, prepare_layer


@dataclass(frozen=True)
class Settings:
    """The choices of the command line."""

    device: torch.device = CPU
    quick: bool = False
    vgg_batch: int | None = None

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def plan(self, budget_s: float = 12.0, rounds: int = 30) -> Plan:
        if self.quick:
            return Plan(rounds=5, min_rounds=3, warmup=1, budget_s=budget_s / 4)
        return Plan(rounds=rounds, min_rounds=7, warmup=2, budget_s=budget_s)


@dataclass(frozen=True)
class Comparison:
    """Providers that are measured against each other on one workload.

    kernel: the suite, first column of the CSV. relative_to: the providers that ratios are formed with.
    host: on a GPU, time what the host needs to queue the work, not what the device needs to do it.
    """

    kernel: str
    work: Workload
    providers: tuple[Provider, ...]
    plan: Plan
    relative_to: tuple[str, ...]
    host: bool = False

    @property
    def key(self) -> str:
        return f"{self.kernel}/{self.work.mode}/{self.work.shape_name}/{self.work.dtype_name}"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(provider.name for provider in self.providers)

    @property
    def ours(self) -> tuple[str, ...]:
        return tuple(provider.name for provider in self.providers if provider.ours)

    def counted_bytes(self, name: str) -> int | None:
        """Count the bytes that an ideal implementation has to move: whole-tensor passes times the bytes of x."""
        provider = self.provider(name)
        passes = provider.passes.get(self.work.mode)
        return passes * self.work.nbytes if passes else None

    def provider(self, name: str) -> Provider:
        return self.providers[self.names.index(name)]

    def preparer(self) -> Callable[[str], Timed]:
        """Return a function that builds and checks one provider by name; what they share is made once."""

        @cache
        def inputs(channels_last: bool) -> Inputs:
            return Inputs(replace(self.work, channels_last=channels_last))

        inputs(self.work.channels_last)  # whether they can be made at all concerns every provider

        def prepare(name: str) -> Timed:
            provider = self.provider(name)
            layout = self.work.channels_last if provider.channels_last is None else provider.channels_last
            call = prepare_layer(provider, inputs(layout))
            return GraphCall(call) if provider.graph else call

        return prepare

    def measure(self, on_round: Callable[[int, int], None] | None = None) -> Measurement:
        """Check every provider, then time those that passed; the failures are recorded."""
        prepare = self.preparer()
        ready: dict[str, Timed] = {}
        failures: dict[str, str] = {}
        for name in self.names:
            try:
                ready[name] = prepare(name)
            except Exception as error:  # an import error, a failed check, a missing kernel: all belong in the report
                failures[name] = describe(error)
        result = interleave(ready, self.plan, clock_for(self.work.device, self.host), on_round)
        result.failures.update(failures)
        return result


def workload(settings: Settings, shape: tuple[int, ...], mode: Mode = "full") -> Workload:
    return Workload(shape, mode=mode, device=settings.device)
