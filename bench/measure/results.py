"""The findings of a run: one record per figure, one per ratio, and the failures; read from and written to CSV."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from bench.measure.environment import commit, device_name, versions
from bench.measure.timing import Measurement, Quantiles

if TYPE_CHECKING:
    from bench.measure.comparison import Comparison
    from bench.measure.memory import MemoryUse

MIB = 1 << 20


@dataclass(frozen=True)
class Record:
    """One figure. mode: forward, backward, full (both) or inference; metric: time_ms, gbytes_per_s, ..."""

    kernel: str
    provider: str
    mode: str
    metric: str
    shape: str
    dtype: str
    p50: float
    p20: float
    p80: float
    device: str
    versions: str
    commit: str


@dataclass(frozen=True)
class Ratio:
    """Time of one provider over another's: the quantiles of the ratios formed inside the rounds."""

    kernel: str
    provider: str
    relative_to: str
    mode: str
    shape: str
    dtype: str
    p50: float
    p20: float
    p80: float
    rounds: int
    ours: bool
    device: str
    versions: str
    commit: str


@dataclass(frozen=True)
class Failure:
    kernel: str
    provider: str
    mode: str
    shape: str
    dtype: str
    error: str


Row = TypeVar("Row", bound=Any)  # any dataclass


@dataclass
class Results:
    """Everything one run found on one device."""

    device: str
    versions: str
    commit: str
    device_type: str = "cpu"
    records: list[Record] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def start(cls, device: torch.device) -> Results:
        return cls(device_name(device), versions(device), commit(), device.type)

    @classmethod
    def load(cls, folder: Path, device_type: str) -> Results:
        """Read what `save` wrote there, if anything; notes are not kept.

        The device itself is not asked: it may be gone.
        """
        records = read_csv(folder / "records.csv", Record)
        origin = (
            (records[0].device, records[0].versions, records[0].commit) if records else ("none", "unknown", "unknown")
        )
        ratios, failures = read_csv(folder / "ratios.csv", Ratio), read_csv(folder / "failures.csv", Failure)
        return cls(*origin, device_type, records, ratios, failures)

    def save(self, folder: Path, before: Results | None = None) -> list[Path]:
        """Write records.csv, ratios.csv and, if anything failed, failures.csv; `before`: rows that come first."""
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        for name, row_type in (("records", Record), ("ratios", Ratio), ("failures", Failure)):
            rows = [*(getattr(before, name) if before else []), *getattr(self, name)]
            path = folder / f"{name}.csv"
            if rows or row_type is not Failure:
                write_csv(path, row_type, rows)
                files.append(path)
            else:
                path.unlink(missing_ok=True)
        return files

    def _origin(self) -> dict[str, str]:
        return {"device": self.device, "versions": self.versions, "commit": self.commit}

    def add_times(self, comparison: Comparison, measurement: Measurement) -> None:
        """Add times, GB/s where bytes are counted, ratios, and failures of one measured comparison."""
        where = _where(comparison)
        for name in comparison.names:
            if name in measurement.failures:
                self.add_failure(comparison, name, measurement.failures[name])
                continue
            seconds = measurement.quantiles(name)
            self._add(where, name, "time_ms", seconds.scaled(1e3))
            counted = comparison.counted_bytes(name)
            if counted:
                rate = Quantiles.of(counted / value / 1e9 for value in measurement.seconds(name))
                self._add(where, name, "counted_bytes", Quantiles(counted, counted, counted, 1))
                self._add(where, name, "gbytes_per_s", rate)
            for other in comparison.relative_to:
                ratio = measurement.ratio(name, other)
                if other == name or other in measurement.failures or ratio is None:
                    continue
                self.ratios.append(
                    Ratio(
                        provider=name,
                        relative_to=other,
                        p50=ratio.p50,
                        p20=ratio.p20,
                        p80=ratio.p80,
                        rounds=ratio.count,
                        ours=name in comparison.ours,
                        **where,
                        **self._origin(),
                    )
                )

    def add_memory(self, comparison: Comparison, provider: str, use: MemoryUse) -> None:
        where = _where(comparison)
        for metric, value in (
            ("saved_MiB", use.saved / MIB),
            ("saved_over_input", use.saved / use.input),
            ("peak_MiB", use.peak / MIB),
            ("peak_over_input", use.peak / use.input),
        ):
            self._add(where, provider, metric, Quantiles(value, value, value, 1))

    def add_failure(self, comparison: Comparison, provider: str, error: str) -> None:
        self.failures.append(Failure(provider=provider, error=error, **_where(comparison)))

    def _add(self, where: dict[str, str], provider: str, metric: str, q: Quantiles) -> None:
        self.records.append(
            Record(provider=provider, metric=metric, p50=q.p50, p20=q.p20, p80=q.p80, **where, **self._origin())
        )

    def find(self, kernel: str, metric: str = "time_ms", mode: str | None = None) -> list[Record]:
        return [r for r in self.records if r.kernel == kernel and r.metric == metric and mode in (None, r.mode)]

    def ratio(self, kernel: str, provider: str, relative_to: str, mode: str, shape: str, dtype: str) -> Ratio | None:
        wanted = (kernel, provider, relative_to, mode, shape, dtype)
        for r in self.ratios:
            if (r.kernel, r.provider, r.relative_to, r.mode, r.shape, r.dtype) == wanted:
                return r
        return None


def _where(comparison: Comparison) -> dict[str, Any]:
    work = comparison.work
    return {
        "kernel": comparison.kernel,
        "mode": work.mode,
        "shape": work.shape_name,
        "dtype": work.dtype_name,
    }


def write_csv(path: Path, row_type: type[Row], rows: Iterable[Row]) -> None:
    """Write one line per row, columns in the order of the fields; six digits are more than a timer resolves."""
    names = [f.name for f in fields(row_type)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = asdict(row)
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()})


def read_csv(path: Path, row_type: type[Row]) -> list[Row]:
    """Read the rows that `write_csv` wrote; none if there is no such file."""
    if not path.exists():
        return []
    parse: dict[str, Callable[[str], Any]] = {
        "float": lambda text: int(text) if text.isdigit() else float(text),  # counts keep all their digits
        "int": int,
        "bool": lambda text: text == "True",
    }
    with path.open(newline="", encoding="utf-8") as file:
        return [
            row_type(**{f.name: parse.get(str(f.type), str)(row[f.name]) for f in fields(row_type)})
            for row in csv.DictReader(file)
        ]
