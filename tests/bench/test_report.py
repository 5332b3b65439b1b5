"""CSV columns, Markdown, goals, plots, and a run."""

import csv
import sys

import pytest
import torch

from bench.measure.comparison import Comparison, Settings
from bench.measure.environment import ROOT
from bench.measure.results import Ratio, Record, Results, write_csv
from bench.measure.timing import Measurement, Plan
from bench.measure.workload import Workload
from bench.providers import catalogue as cat
from bench.report.page import REFERENCES, goals_table, markdown, write_report
from bench.report.tables import number, table
from bench.suites import run
from bench.suites.goals import Goal, evaluate, where_we_lose

SUITES = run.SUITES.values()
ORIGIN = {"device": "a machine, 2 threads", "versions": "torch 2; threads 2", "commit": "abc1234"}
COLUMNS = [
    *("kernel", "provider", "mode", "metric", "shape", "dtype"),
    *("p50", "p20", "p80", "device", "versions", "commit"),
]


def comparison(shape=(64, 64, 32, 32), kernel="table_a1", mode="full"):
    providers = (cat.conv3x3(), cat.batch_norm(), cat.iter_norm(), cat.dbn())
    return Comparison(kernel, Workload(shape, mode=mode), providers, Plan(), ("conv3x3", "BatchNorm2d"))


def results():
    found = Results(**ORIGIN)
    samples = {
        "conv3x3": [0.1, 0.1, 0.1],
        "BatchNorm2d": [0.010, 0.012, 0.011],
        "IterNorm T=5": [0.026, 0.025, 0.024],
        "DBN eigh": [],
    }
    found.add_times(comparison(), Measurement(samples, {"DBN eigh": "RuntimeError: no | luck"}))
    return found


def test_csv_has_the_agreed_columns(tmp_path):
    found = results()
    write_csv(tmp_path / "records.csv", Record, found.records)
    with (tmp_path / "records.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    by_key = {(r["provider"], r["metric"]): r for r in rows}
    row = by_key["IterNorm T=5", "time_ms"]
    assert float(row["p50"]) == pytest.approx(25.0)
    assert float(row["p20"]) < 25.0 < float(row["p80"])
    assert (row["kernel"], row["mode"], row["shape"], row["dtype"]) == (
        "table_a1",
        "full",
        "64x64x32x32",
        "float32",
    )
    assert row["device"] == ORIGIN["device"], "a comma in a field must survive"
    assert ("DBN eigh", "time_ms") not in by_key


def test_counted_bytes_and_rates():
    found = results()
    counted = {r.provider: r.p50 for r in found.find("table_a1", "counted_bytes")}
    tensor = 64 * 64 * 32 * 32 * 4
    assert counted == {"conv3x3": 6 * tensor, "BatchNorm2d": 8 * tensor, "IterNorm T=5": 8 * tensor}
    (rate,) = [r for r in found.find("table_a1", "gbytes_per_s") if r.provider == "IterNorm T=5"]
    assert rate.p50 == pytest.approx(8 * tensor / 0.025 / 1e9)


def test_ratios():
    found = results()
    ratio = found.ratio("table_a1", "IterNorm T=5", "conv3x3", "full", "64x64x32x32", "float32")
    assert ratio is not None
    assert ratio.p50 == pytest.approx(0.25)
    assert ratio.ours
    assert ratio.rounds == 3
    assert found.ratio("table_a1", "DBN eigh", "conv3x3", "full", "64x64x32x32", "float32") is None
    assert found.ratio("table_a1", "conv3x3", "conv3x3", "full", "64x64x32x32", "float32") is None


def test_markdown_shows_ratios_losses_failures_and_notes():
    found = results()
    found.notes.append("a note")
    text = markdown(found, ["table_a1_conv.png", "other.png"])
    assert "| IterNorm T=5 |" in text
    assert "IterNorm T=5 / BatchNorm2d" in text.split("Where we lose")[1]
    assert "RuntimeError: no / luck" in text, "a bar in an error would break the table"
    assert "![Table A1" in text
    assert "other.png" not in text
    assert "**Note:** a note" in text
    assert "\n".join(text.splitlines()[:1]) == "# Benchmark: a machine, 2 threads"


def test_table_is_aligned():
    lines = table(["name", "x"], [["a", "1.00"], ["long name", "2"]]).splitlines()
    assert lines == [
        "| name      |    x |",
        "| --------- | ---: |",
        "| a         | 1.00 |",
        "| long name |    2 |",
    ]
    assert [number(v) for v in (1234.5, 99.94, 9.999, 0.5, 0.0333)] == [
        "1234",
        "99.9",
        "10.00",
        "0.50",
        "0.033",
    ]


def ratio_of(p50, provider="IterNorm T=5", relative_to="conv3x3", ours=True, dtype="float32"):
    return Ratio("table_a1", provider, relative_to, "full", "64x64x32x32", dtype, p50, p50, p50, 9, ours, **ORIGIN)


@pytest.mark.parametrize(("value", "state"), [(0.29, "met"), (0.30, "met"), (0.301, "missed")])
def test_goals_are_met_at_the_limit_and_missed_above(value, state):
    goal = Goal("table_a1", "64x64x32x32", "IterNorm T=5", "conv3x3", 0.30)
    found = Results(**ORIGIN, ratios=[ratio_of(9.0, dtype="bfloat16"), ratio_of(value)])
    (verdict,) = evaluate(found, (goal,))
    assert verdict.state == state
    assert state in goals_table([verdict])


def test_a_goal_without_a_figure_or_of_another_device_is_not_met():
    here = Goal("table_a1", "64x64x32x32", "IterNorm T=5", "conv3x3", 0.30)
    there = Goal("table_a1", "64x64x32x32", "IterNorm T=5", "conv3x3", 0.30, device_type="cuda")
    verdicts = evaluate(Results(**ORIGIN), (here, there))
    assert [v.state for v in verdicts] == ["not measured"]


def test_losses_are_ours_above_one_worst_first():
    ratios = [
        ratio_of(2.0),
        ratio_of(0.9),
        ratio_of(3.0, "DBN eigh"),
        ratio_of(9.0, "plain autograd Newton", ours=False),
    ]
    assert [r.p50 for r in where_we_lose(Results(**ORIGIN, ratios=ratios))] == [3.0, 2.0]


def test_report_writes_its_files_and_drops_an_old_failure_list(tmp_path):
    pytest.importorskip("matplotlib")
    found = results()
    names = {path.name for path in write_report(found, tmp_path / "new")}
    assert {"README.md", "records.csv", "ratios.csv", "failures.csv", "table_a1_conv.png"} <= names
    found.failures.clear()
    write_report(found, tmp_path / "new")
    assert not (tmp_path / "new" / "failures.csv").exists()


def test_goals_name_things_that_the_suites_measure():
    from bench.suites.goals import GOALS

    for device_type in ("cpu", "cuda"):
        settings = Settings(torch.device(device_type))
        known = {
            (c.kernel, c.work.mode, c.work.shape_name, c.work.dtype_name): c
            for suite in SUITES
            for c in suite(settings)
        }
        for goal in (g for g in GOALS if g.device_type == device_type):
            found = known[goal.kernel, goal.mode, goal.shape, goal.dtype]
            ours, others = goal.sides
            assert ours and {*ours} <= {*found.ours}
            assert {*others} <= {*found.relative_to} & {*found.names}


def test_keys_of_comparisons_are_unique():
    for settings in (Settings(), Settings(torch.device("cuda"))):
        for suite in SUITES:
            keys = [c.key for c in suite(settings)]
            assert len(keys) == len(set(keys))


def test_ratio_columns_have_a_place():
    assert {other for suite in SUITES for c in suite(Settings()) for other in c.relative_to} <= {*REFERENCES}


def test_without_matplotlib_the_report_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "bench.report.plots", raising=False)
    names = {path.name for path in write_report(results(), tmp_path)}
    assert names == {"README.md", "records.csv", "ratios.csv", "failures.csv"}
    assert "No plots" in (tmp_path / "README.md").read_text()


def test_figures_are_on_the_disk_after_each_comparison(tmp_path, monkeypatch):
    good = cat.batch_norm()
    plan = Plan(rounds=2, min_rounds=1, warmup=0, budget_s=0.0)

    def measure(kernels, before=None):
        run.run([Comparison(k, Workload((4, 4, 3, 3)), (good,), plan, ()) for k in kernels], begin(), tmp_path, before)

    def begin():
        return run.begin(Settings())

    def kernels():
        with (tmp_path / "records.csv").open(newline="") as file:
            return {row["kernel"] for row in csv.DictReader(file)}

    seen = []
    monkeypatch.setattr(run.Progress, "begin", lambda *_: seen.append(kernels() if seen else set()))
    measure(["first", "second"])
    assert seen == [set(), {"first"}]
    measure(["third"], Results.load(tmp_path, "cpu"))
    assert kernels() == {"first", "second", "third"}


def test_a_failing_provider_costs_the_others_nothing():
    def broken(work):
        raise ImportError("no such package")

    good = cat.batch_norm()
    bad = type(good)("broken", broken, good.reference, good.passes)
    plan = Plan(rounds=2, min_rounds=1, warmup=0, budget_s=0.0)
    measured = Comparison("t", Workload((4, 4, 3, 3)), (bad, good), plan, ()).measure()
    assert measured.failures == {"broken": "ImportError: no such package"}
    assert measured.seconds("BatchNorm2d")


FOLDER = ROOT / "bench" / "results" / "cpu-amd-epyc-2-threads"


def test_the_committed_report_is_that_of_its_results():
    """Every table follows from the CSV files, which do not have the notes."""
    page = (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    added = ("![", "**Note:**", "POP-Norm and BNP, and their memory,")
    tables = [line for line in page if line and not line.startswith(added)]
    assert tables == [line for line in markdown(Results.load(FOLDER, "cpu")).splitlines() if line]
    assert len(tables) > 400
