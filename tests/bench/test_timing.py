"""Interleaved timing with a clock that is told what to say; no real time is looked at."""

import itertools
import math
from collections import Counter

import pytest
import torch

from bench.measure import timing
from bench.measure.timing import (
    CudaClock,
    Measurement,
    Plan,
    Quantiles,
    Timed,
    interleave,
    order,
    poison,
    require_alive,
)


class Fake(Timed):
    """Takes the given number of seconds; notes who was called."""

    def __init__(self, name, log, seconds, fail_at=None):
        self.name, self.log, self.seconds, self.fail_at = name, log, seconds, fail_at
        self.calls = 0

    def prepare(self, turn):
        self.turn = turn

    def run(self):
        if self.calls == self.fail_at:
            raise RuntimeError("out of  memory\nsomewhere")
        self.log.append(self.name)
        self.calls += 1

    def finish(self):
        pass


class FakeClock:
    """Reads the duration from the provider that runs, times a drift that grows with every call."""

    name = "fake"

    def __init__(self, drift=1.0):
        self.factor, self.drift = 1.0, drift

    def time(self, run):
        run()
        self.factor *= self.drift
        return run.__self__.seconds * self.factor


def measure(names, rounds=6, warmup=0, drift=1.0, fail=None, **seconds):
    log = []
    fakes = {n: Fake(n, log, seconds.get(n, 1.0), (fail or {}).get(n)) for n in names}
    plan = Plan(rounds=rounds, min_rounds=1, warmup=warmup, budget_s=math.inf)
    return interleave(fakes, plan, FakeClock(drift)), log


def test_every_round_has_every_provider_once_and_the_order_changes():
    _, log = measure("abc", rounds=6)
    rounds = [log[i : i + 3] for i in range(0, 18, 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len({tuple(r) for r in rounds}) == 6
    assert Counter(r[0] for r in rounds) == {"a": 2, "b": 2, "c": 2}, "each must go first equally often"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_first_place_and_predecessors_are_shared_out(count):
    names = [str(i) for i in range(count)]
    rounds = [order(names, turn) for turn in range(2 * count)]
    assert set(Counter(r[0] for r in rounds).values()) == {2}
    predecessors = {(b, a) for r in rounds for a, b in itertools.pairwise(r)}
    assert len(predecessors) == {1: 0, 2: 2}.get(count, 2 * count), "two neighbours each, not always the same one"
    assert order([], 3) == []


def test_medians_and_ratios_of_known_durations():
    result, _ = measure("ab", a=0.2, b=0.5)
    assert result.quantiles("a") == Quantiles(0.2, 0.2, 0.2, 6)
    ratio = result.ratio("b", "a")
    assert ratio is not None
    assert ratio.p50 == pytest.approx(2.5)


def test_quantiles_interpolate_between_samples():
    q = Quantiles.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (q.p20, q.p50, q.p80, q.count) == (2.0, 3.5, 5.0, 6)
    assert q.scaled(2) == Quantiles(7.0, 4.0, 10.0, 6)
    with pytest.raises(ValueError, match="at least one"):
        Quantiles.of([])


def test_the_ratio_is_the_median_of_round_ratios_not_the_ratio_of_medians():
    m = Measurement({"a": [1.0, 10.0, 100.0], "b": [2.0, 10.0, 50.0]})
    ratio = m.ratio("a", "b")
    assert ratio is not None
    assert (ratio.p50, ratio.count) == (1.0, 3)
    m = Measurement({"a": [1.0, None, 9.0, 100.0], "b": [2.0, 10.0, 3.0, None]})
    ratio = m.ratio("a", "b")
    assert ratio is not None
    assert (ratio.p50, ratio.count) == (1.75, 2), "only rounds in which both ran count"
    assert Measurement({"a": [1.0], "b": []}).ratio("a", "b") is None


def test_drift_hardly_moves_a_ratio():
    result, _ = measure("ab", rounds=20, drift=1.05, a=1.0, b=2.0)
    ratio = result.ratio("b", "a")
    assert ratio is not None
    assert max(result.seconds("a")) > 5 * min(result.seconds("a"))
    assert ratio.p50 == pytest.approx(2.0, rel=0.06)


def test_a_provider_that_raises_is_recorded_and_the_others_go_on():
    result, log = measure("abc", rounds=5, fail={"b": 2})
    assert result.failures == {"b": "RuntimeError: out of memory somewhere"}
    assert log.count("b") == 2
    assert log.count("a") == log.count("c") == 5
    assert len(result.seconds("b")) == 2
    assert len(result.samples["b"]) == 5


def test_a_failure_while_warming_up_gives_no_samples():
    result, log = measure("ab", rounds=3, warmup=1, fail={"a": 0})
    assert "a" in result.failures
    assert result.seconds("a") == []
    assert log.count("b") == 4


def test_the_time_limit_keeps_the_minimum_number_of_rounds():
    fake = Fake("a", [], 1.0)
    result = interleave({"a": fake}, Plan(rounds=50, min_rounds=4, warmup=3, budget_s=-1.0), FakeClock())
    assert len(result.seconds("a")) == 4
    assert fake.calls == 7
    with pytest.raises(ValueError, match="min_rounds"):
        Plan(rounds=2, min_rounds=3)


def test_dead_outputs_are_refused():
    require_alive("y", torch.ones(3, 2))
    require_alive("loss", torch.tensor(2.0))
    with pytest.raises(ValueError, match="zeros in sample 0"):
        require_alive("y", torch.zeros(3, 2))
    with pytest.raises(ValueError, match="NaN or infinity in sample -1"):
        require_alive("y", torch.tensor([[1.0], [math.nan]]))
    with pytest.raises(ValueError, match="empty"):
        require_alive("y", torch.ones(0, 2))


def test_poisoned_memory_is_nan_even_where_a_gradient_is_needed():
    y = torch.ones(2, requires_grad=True) * 2
    poison(y)
    assert y.isnan().all()


@pytest.mark.parametrize(("late", "cycles"), [([False, False], [1, 1]), ([True, True, True, True], [1, 2, 4, 5])])
def test_a_gpu_is_kept_busy_until_the_work_is_queued(monkeypatch, late, cycles):
    """The spin gets longer, up to a limit, when the device came to the work before all was queued (`late`)."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def query(self):
            return late[len(spins) - 1]

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, end):
            return 250.0

    log, spins = [], []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", spins.append)
    monkeypatch.setattr(timing, "SPIN_CYCLES", 1)
    monkeypatch.setattr(timing, "LONGEST_SPIN", 5)
    clock = CudaClock()
    assert [clock.time(lambda: log.append("run")) for _ in late] == [0.25] * len(late)
    assert spins == cycles
    assert log == ["record", "run", "record", "synchronize"] * len(late)
