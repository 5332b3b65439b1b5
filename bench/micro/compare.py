"""`make bench-compare BASE=ref`: run the micro benchmarks of two versions in turn, and tell what has become slower.

The version BASE is checked out in a temporary folder and gets this version's benchmarks; both are built. Every round
runs all benchmarks of both, each version in a process of its own; which one goes first changes from round to round. A
ratio is new / BASE of the two medians of one round, so that drift of the machine cancels, and the figure of a benchmark
is the median of its ratios.

The interval around it is from the k-th smallest to the k-th largest ratio, with the largest k for which it has the true
median in at least 90 % of all cases. Whatever the noise is like, a ratio is as often above its true median as below,
and all of the interval is on one side of it with probability 2 P(Binomial(rounds, 1/2) < k): 6 % for the smallest to
the largest of 5 ratios. With fewer than 5 there is no such interval.

A benchmark counts as slower where the whole interval is above 1 + threshold. If it is not slower, that happens in
at most 5 % of all cases, and hardly ever where the noise of a round is smaller than the threshold. On a machine that is
noisier, some of many benchmarks will be found to be slower by chance: repeat these with -k and more --rounds. Faster is
the same below 1 / (1 + threshold). A benchmark that does not run on BASE is new.

Exit code: 0 if nothing has become slower, 1 if something has, 2 for a wrong call or a benchmark that fails.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench.measure.environment import ROOT
from bench.report.tables import number, table

CONFIDENCE = 0.9
MIN_ROUNDS = 5
Medians = dict[str, float]  # benchmark -> seconds


class Ratio(NamedTuple):
    """The median of paired ratios new / base, and the interval that has the true one."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Ratio:
        found, n = sorted(ratios), len(ratios)
        if n < MIN_ROUNDS:
            raise ValueError(f"expected at least {MIN_ROUNDS} ratios, got {n}")
        k = 1
        while 1 - 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n >= CONFIDENCE:
            k += 1
        return cls(median(found), found[k - 1], found[-k])

    def verdict(self, threshold: float) -> str:
        return "slower" if self.low > 1 + threshold else "faster" if self.high < 1 / (1 + threshold) else ""


def pair(base: Sequence[Mapping[str, float]], new: Sequence[Mapping[str, float]]) -> dict[str, Ratio | None]:
    """Return the ratio of every benchmark that both versions have in all rounds, and None for one that is new."""
    return {
        name: Ratio.of([n[name] / b[name] for b, n in zip(base, new, strict=True)])
        if all(name in b for b in base)
        else None
        for name in new[0]
    }


class CompareError(Exception):
    """A message for the user: something is wrong with the call or with a benchmark, not with its speed."""


def git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompareError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def checked_out(root: Path, ref: str) -> Iterator[Path]:
    """Make a git worktree of a version, with the benchmarks of the version in `root`, and remove it at the end."""
    try:
        commit = git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
    except CompareError:
        raise CompareError(f"--base: expected a commit, branch or tag of this repository, got {ref!r}") from None
    with tempfile.TemporaryDirectory(prefix="bench-compare-") as folder:
        tree = Path(folder).resolve() / "base"
        git(root, "worktree", "add", "--detach", str(tree), commit)
        try:
            shutil.rmtree(tree / "bench", ignore_errors=True)
            shutil.copytree(root / "bench", tree / "bench", ignore=shutil.ignore_patterns("results", "__pycache__"))
            yield tree
        finally:
            git(root, "worktree", "remove", "--force", str(tree))


def python(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run python in a version's folder, where its modules are found before any that is installed."""
    # pytest-benchmark switches itself off in what it takes for a worker of pytest-xdist, and no other plugin is needed
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = kept | {"PYTHONPATH": str(tree), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


def build(tree: Path) -> None:
    """Compile the extension in place where that is possible, and see that it is this version that will be measured."""
    if (tree / "setup.py").exists():
        done = python(tree, "setup.py", "--quiet", "build_ext", "--inplace")
        if done.returncode:
            raise CompareError(
                f"{tree}: expected the build to succeed, it said:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
    found = python(tree, "-c", "import normkernels; print(normkernels.__file__)").stdout.strip()
    if not Path(found).is_relative_to(tree):
        raise CompareError(f"expected to import normkernels from {tree}, found {found or 'none'}")


def measure(tree: Path, options: argparse.Namespace, all_must_pass: bool) -> Medians:
    """Run the micro benchmarks once and return their medians; those that fail are left out, or are an error."""
    files = sorted(str(path.relative_to(tree)) for path in (tree / "bench" / "micro").glob("bench_*.py"))
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "benchmarks.json"
        done = python(
            tree, "-m", "pytest", "-q", "-p", "pytest_benchmark.plugin", "-p", "no:cacheprovider",
            "-o", "addopts=", "-o", "filterwarnings=default", f"--rootdir={tree}", "-k", options.k,
            f"--benchmark-json={written}", f"--benchmark-max-time={options.max_time}", *files,
        )  # fmt: skip
        text = written.read_text() if written.exists() else ""
    if done.returncode and all_must_pass:
        raise CompareError(
            f"{tree}: expected benchmarks that succeed, got:\n{done.stdout[-3000:]}{done.stderr[-1000:]}"
        )
    return {b["fullname"]: b["stats"]["median"] for b in json.loads(text)["benchmarks"]} if text else {}


def report(
    base: Sequence[Medians], new: Sequence[Medians], ratios: Mapping[str, Ratio | None], threshold: float
) -> str:
    """Return the table of all benchmarks: times of both versions, ratio, interval and verdict."""
    rows = []
    for name, ratio in ratios.items():
        before = f"{1e3 * median(b[name] for b in base):.4g}" if ratio else "-"
        interval = f"{number(ratio.median)} [{number(ratio.low)}, {number(ratio.high)}]" if ratio else "-"
        verdict = ratio.verdict(threshold) if ratio else "new"
        rows.append([name.partition("::")[2], before, f"{1e3 * median(n[name] for n in new):.4g}", interval, verdict])
    return table(["benchmark", "base, ms", "new, ms", f"new / base [{CONFIDENCE:.0%} or more]", "verdict"], rows)


def compare(root: Path, options: argparse.Namespace) -> int:
    """Measure both versions in turn, print the table and return the exit code."""
    base: list[Medians] = []
    new: list[Medians] = []
    with checked_out(root, options.base) as tree:
        build(tree)
        build(root)
        for index in range(options.rounds):
            print(f"round {index + 1}/{options.rounds}", file=sys.stderr, flush=True)
            for version in (("base", "new"), ("new", "base"))[index % 2]:
                if version == "base":
                    base.append(measure(tree, options, all_must_pass=False))
                else:
                    new.append(measure(root, options, all_must_pass=True))
    ratios = pair(base, new)
    threshold = options.threshold / 100
    slower = [name for name, ratio in ratios.items() if ratio and ratio.verdict(threshold) == "slower"]
    print(report(base, new, ratios, threshold))
    counted = f"{len(slower)} of {len(ratios)} benchmarks are more than {options.threshold:g} % slower than"
    print(f"\n{counted} {options.base}, {list(ratios.values()).count(None)} are new.")
    return 1 if slower else 0


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.micro.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", required=True, metavar="REF", help="commit, branch or tag to compare with")
    parser.add_argument("--rounds", type=int, default=6, help=f"at least {MIN_ROUNDS} (default: 6)")
    parser.add_argument("--threshold", type=float, default=5.0, help="percent that count as slower (default: 5)")
    parser.add_argument("--max-time", type=float, default=0.1, help="seconds per benchmark and round (default: .1)")
    parser.add_argument("-k", metavar="EXPR", default="", help="only some benchmarks, as in pytest")
    options = parser.parse_args(arguments)
    if options.rounds < MIN_ROUNDS:
        parser.error(f"--rounds: expected at least {MIN_ROUNDS}, got {options.rounds}")
    if options.threshold < 0 or options.max_time <= 0:
        parser.error("expected --threshold of at least 0 and a positive --max-time")
    try:
        return compare(root.resolve(), options)
    except CompareError as error:
        print(f"bench-compare: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
