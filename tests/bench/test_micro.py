"""The micro benchmarks' checks, and the comparison of two versions: its statistics, and the whole program."""

import itertools
import subprocess
from collections import Counter

import pytest
import torch

import normkernels as nk
from bench.measure.workload import GateError
from bench.micro import compare
from bench.micro.cases import LAYERS, OPS
from bench.micro.compare import Ratio, pair

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", [*OPS, *LAYERS], ids=str)
def test_cases_pass_their_check_and_run(case):
    call = case.prepare(CPU)
    for call.mode in ("forward", "backward", "full"):
        call.prepare(0)
        call.run()
        call.finish()


def test_names_of_cases_are_unique():
    assert Counter(map(str, [*OPS, *LAYERS])).most_common(1)[0][1] == 1


def test_a_wrong_result_is_not_timed(monkeypatch):
    right = nk.ops.moments
    monkeypatch.setattr("normkernels.ops.moments", lambda x, group_size: (1, 0, 1.01 * right(x, group_size)[2]))
    with pytest.raises(GateError, match="moments: expected y within"):
        OPS[0].prepare(CPU)


@pytest.mark.parametrize(("rounds", "k"), [(5, 1), (7, 1), (8, 2), (10, 2), (11, 3), (20, 6)])
def test_the_interval_has_the_median_as_often_as_it_says(rounds, k):
    """Every pattern of ratios below and above the true median is as likely as any other."""
    ratio = Ratio.of([float(i) for i in range(rounds)])
    assert (ratio.low, ratio.high) == (k - 1, rounds - k) and ratio.median == (rounds - 1) / 2
    if rounds <= 11:
        patterns = [sum(p) for p in itertools.product((0, 1), repeat=rounds)]
        assert sum(k <= below <= rounds - k for below in patterns) / len(patterns) >= compare.CONFIDENCE
        assert sum(k + 1 <= below <= rounds - k - 1 for below in patterns) / len(patterns) < compare.CONFIDENCE


def test_too_few_rounds_have_no_interval():
    with pytest.raises(ValueError, match="expected at least 5 ratios, got 4"):
        Ratio.of([1.0] * 4)


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([1.06, 1.2, 1.1, 1.07, 1.3], "slower"),
        ([1.04, 1.2, 1.1, 1.07, 1.3], ""),  # one round is within the threshold
        ([1.04] * 5, ""),
        ([0.94, 0.9, 0.8, 0.7, 0.9], "faster"),
        ([0.96, 0.9, 0.8, 0.7, 0.9], ""),
        ([0.5, 2.0, 1.0, 0.7, 1.4], ""),
    ],
)
def test_verdicts(ratios, verdict):
    assert Ratio.of(ratios).verdict(0.05) == verdict


def test_ratios_are_those_inside_of_the_rounds():
    """A machine that becomes ten times slower from round to round changes no ratio."""
    base = [{"a": 10.0**i, "b": 1.0} for i in range(5)]
    new = [{"a": 2 * 10.0**i, "b": 1.0, "c": 1.0} for i in range(5)]
    assert pair(base, new) == {"a": (2.0, 2.0, 2.0), "b": (1.0, 1.0, 1.0), "c": None}
    del base[3]["b"]
    assert pair(base, new)["b"] is None


BENCHMARKS = """
import time
from pathlib import Path
import normkernels

def test_sleep(benchmark):
    benchmark.pedantic(time.sleep, (float(Path("seconds.txt").read_text()),), rounds=3)

def test_later(benchmark):
    benchmark.pedantic(normkernels.later, rounds=3)
"""


@pytest.fixture
def repository(tmp_path):
    """Make a repository whose package and micro benchmarks are made up; its version `old` sleeps for 20 ms."""
    files = {
        "seconds.txt": ".02", "normkernels/__init__.py": "def later(): pass", "bench/__init__.py": "",
        "bench/micro/__init__.py": "", "bench/micro/bench_fake.py": BENCHMARKS,
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    commit(tmp_path, "old")
    return tmp_path


def commit(repository, tag):
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for command in (("add", "."), (*who, "commit", "-qm", tag), ("tag", tag)):
        subprocess.run(["git", *command], cwd=repository, check=True)


def worktrees(repository):
    listed = subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


def run(repository, *options):
    return compare.main(["--base", "old", "--rounds", "5", "-k", "sleep", *options], repository)


def test_a_version_is_not_slower_than_itself(repository, capsys):
    assert run(repository, "--threshold", "100") == 0
    assert "0 of 1 benchmarks" in capsys.readouterr().out
    assert len(worktrees(repository)) == 1


def test_a_version_that_takes_three_times_as_long_is_slower(repository, capsys):
    (repository / "seconds.txt").write_text(".06")
    assert run(repository, "--threshold", "50") == 1
    found = capsys.readouterr().out
    assert "slower" in found and "1 of 1 benchmarks are more than 50 % slower than old" in found
    (repository / "normkernels" / "__init__.py").write_text("raise ImportError")
    assert run(repository) == 2
    assert "expected to import normkernels from" in capsys.readouterr().err


def test_what_the_base_does_not_have_is_new(repository, capsys):
    (repository / "normkernels" / "__init__.py").write_text("")
    commit(repository, "without")
    (repository / "normkernels" / "__init__.py").write_text("def later(): pass")
    assert compare.main(["--base", "without", "--rounds", "5", "-k", "later"], repository) == 0
    assert "1 are new" in capsys.readouterr().out
    assert compare.main(["--base", "old", "--rounds", "5", "-k", "nothing"], repository) == 2
    assert "expected benchmarks that succeed" in capsys.readouterr().err
    assert len(worktrees(repository)) == 1


def test_wrong_calls(repository, capsys):
    assert compare.main(["--base", "no-such-ref"], repository) == 2
    assert "--base: expected a commit, branch or tag of this repository, got 'no-such-ref'" in capsys.readouterr().err
    for options, message in ((("--rounds", "4"), "expected at least 5, got 4"), (("--max-time", "0"), "positive")):
        with pytest.raises(SystemExit) as stop:
            run(repository, *options)
        assert stop.value.code == 2 and message in capsys.readouterr().err
