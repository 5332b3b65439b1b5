"""Put the mistakes into copies of the repository and run the tests: `make mutations`.

A mistake is killed if a test fails or does not end. What was found is kept in build/mutations.json, and holds while
the module with the mistake and the files of the tests are what they were; ``--again`` forgets it. survivors.md lists
everything that is known.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.mutations.notice import tests_for
from tests.mutations.source import ROOT, Mutation, everything, mutated

COPIED = ("normkernels", "tests", "bench", "pyproject.toml")
RESULTS = ROOT / "build" / "mutations.json"
SURVIVORS = Path(__file__).with_name("survivors.md")
SHORTEST_LIMIT, SLOWER = 60.0, 4.0  # seconds, and how much longer than without the mistake the tests may take
LONGEST_LIMIT = 600.0  # where the time without it is not known

FROM_OUTSIDE = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)  # a person's, or the kernel's where memory is short
KILLED, SURVIVED = "killed", "survived"
PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "--benchmark-disable", "-p", "no:cacheprovider", "-p", "no:xdist"]


class Copy:
    """A copy of the repository, as far as the tests need it, in which one file at a time is changed."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        self.changes = 0
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(ROOT / name, folder / name)

    @contextmanager
    def changed(self, mutation: Mutation) -> Iterator[None]:
        file = self.root / mutation.file
        before = file.read_text()
        try:
            self._write(file, mutated(mutation, before))
            yield
        finally:
            self._write(file, before)

    def _write(self, file: Path, text: str) -> None:
        """Write with a time of its own: Python takes a file of the same size and second for the one it has compiled."""
        self.changes += 1
        file.write_text(text)
        os.utime(file, (file.stat().st_atime, time.time() - 1e6 + self.changes))

    def run(self, tests: Sequence[str], limit: float | None = None) -> tuple[int | None, float, str]:
        """Return pytest's exit status, None where it did not end within the limit, the seconds and what it printed."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        started = time.monotonic()
        process = subprocess.Popen(
            [*PYTEST, *tests],
            cwd=self.root,
            env={**inherited, "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # ranks that wait for each other end with it
        )
        try:
            printed, _ = process.communicate(timeout=limit)
            status: int | None = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed, status = process.communicate()[0], None
        except BaseException:  # as Ctrl-C, which does not reach a session of its own
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return status, time.monotonic() - started, printed


@dataclass
class Record:
    """A file of what is known of each mistake, and of how long the tests take without one."""

    file: Path
    found: dict[str, dict[str, object]]
    lock: threading.Lock

    @staticmethod
    def read(file: Path, again: bool) -> Record:
        found = json.loads(file.read_text()) if file.exists() and not again else {}
        return Record(file, found, threading.Lock())

    def add(self, key: str, entry: dict[str, object]) -> None:
        with self.lock:
            self.found[key] = entry
            self.file.parent.mkdir(parents=True, exist_ok=True)
            partial = self.file.with_suffix(".partial")
            partial.write_text(json.dumps(self.found, indent=1))
            partial.replace(self.file)


def digest(mutation: Mutation | None, tests: Sequence[str]) -> str:
    """Return a hash of what a result depends on: the mistake, the module and the files of the tests."""
    files = [ROOT / name for name in tests if (ROOT / name).exists()]
    found = [path for each in files for path in (sorted(each.rglob("*.py")) if each.is_dir() else [each])]
    parts = [" ".join(tests), *(path.read_text() for path in found)]
    if mutation is not None:
        parts += [mutation.symbol, mutation.right, mutation.wrong, (ROOT / mutation.file).read_text()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def seconds_without_mistake(copy: Copy, tests: tuple[str, ...], record: Record) -> float:
    """Return how long the tests take where nothing is wrong; there they have to pass."""
    key = f"none {digest(None, tests)}"
    if key not in record.found:
        status, seconds, printed = copy.run(tests)
        if status != 0:
            raise RuntimeError(f"{' '.join(tests)}: expected tests that pass without a mistake, got\n{printed}")
        record.add(key, {"tests": " ".join(tests), "seconds": round(seconds, 1)})
    return float(str(record.found[key]["seconds"]))


def outcome(copy: Copy, mutation: Mutation, record: Record, trusted: bool = False) -> dict[str, object]:
    """Return whether the tests notice the mistake, from the record where it is known.

    trusted: the tests are known to pass without it.
    """
    tests = tests_for(mutation)
    key = digest(mutation, tests)
    if key not in record.found:
        limit = LONGEST_LIMIT
        if not trusted:
            limit = max(SHORTEST_LIMIT, SLOWER * seconds_without_mistake(copy, tests, record))
        with copy.changed(mutation):
            status, seconds, printed = copy.run(tests, limit)
        if status in (3, 4, 5, *(-each for each in FROM_OUTSIDE)):  # pytest's own errors; 5: no test has these names
            raise RuntimeError(f"{mutation}: expected tests that run, got exit status {status}\n{printed}")
        failed = next((line for line in printed.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
        how = "time" if status is None else failed.removesuffix("...")[:200] or f"exit status {status}"
        entry = {"mutation": str(mutation), "result": SURVIVED, "seconds": round(seconds, 1)}
        record.add(key, entry if status == 0 else {**entry, "result": KILLED, "by": how})
    return record.found[key]


def report(results: dict[Mutation, dict[str, object]], total: int) -> str:
    """Return survivors.md."""
    survived = [mutation for mutation, entry in results.items() if entry["result"] == SURVIVED]
    harmless = [mutation for mutation in survived if mutation.harmless]
    by_time = sum(entry.get("by") == "time" for entry in results.values())
    lines = [
        "# Mistakes that no test notices",
        "",
        f"`make mutations` has put {len(results)} of {total} mistakes into the package: {len(results) - len(survived)} "
        f"were noticed ({by_time} of them because the tests did not end), {len(survived)} were not, of which "
        f"{len(harmless)} cannot be.",
    ]
    for mutation in survived:
        lines += ["", f"`{mutation.symbol}`: {mutation.harmless or 'not shown to be harmless.'}", "", "```diff"]
        lines += [
            f"{sign}{line}"
            for sign, text in (("-", mutation.right), ("+", mutation.wrong))
            for line in text.splitlines()
        ]
        lines += ["```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[""], help="those with one of these words in symbol or text")
    parser.add_argument("--part", default="1/1", help="k/n: only every n-th, from the k-th on")
    parser.add_argument("--jobs", type=int, default=2, help="how many at the same time")
    parser.add_argument("--again", action="store_true", help="also what is known from before")
    parser.add_argument("--trust", action="store_true", help="do not run the tests without a mistake first")
    chosen = parser.parse_args()
    part, parts = map(int, chosen.part.split("/"))
    every = everything()
    for mutation in every:
        mutated(mutation, (ROOT / mutation.file).read_text())  # an error before anything runs
    asked = [each for i, each in enumerate(every) if i % parts == part - 1 and any(w in str(each) for w in chosen.only)]
    record = Record.read(RESULTS, chosen.again)
    results: dict[Mutation, dict[str, object]] = {}
    own = threading.local()
    with tempfile.TemporaryDirectory(prefix="normkernels-mutations-") as folder:

        def one(mutation: Mutation) -> tuple[Mutation, dict[str, object]]:
            if not hasattr(own, "copy"):
                own.copy = Copy(Path(tempfile.mkdtemp(dir=folder)))
            return mutation, outcome(own.copy, mutation, record, chosen.trust)

        with ThreadPoolExecutor(chosen.jobs) as pool:
            for mutation, entry in pool.map(one, asked):
                results[mutation] = entry
                print(f"{entry['result']:8} {entry['seconds']:6} s  {mutation}  {entry.get('by', '')}", flush=True)
    keys = {mutation: digest(mutation, tests_for(mutation)) for mutation in every}
    known = {mutation: record.found[key] for mutation, key in keys.items() if key in record.found}
    SURVIVORS.write_text(report(known, len(every)))  # with what other parts and earlier runs have found
    bad = [each for each, entry in results.items() if (entry["result"] == SURVIVED) != bool(each.harmless)]
    for mutation in bad:
        print(
            f"{mutation}: " + ("a test notices what is called harmless" if mutation.harmless else "no test notices it")
        )
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
