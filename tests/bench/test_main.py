"""The command line as a user runs it, on the smallest suite."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__ as program
from bench.__main__ import main
from bench.measure.comparison import Settings
from bench.suites.run import SUITES, matches, select

ROOT = Path(__file__).resolve().parent.parent.parent


def bench(*arguments):
    return run("-m", "bench", *arguments)


def run(*arguments):
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


def test_one_suite_end_to_end(tmp_path):
    done = bench("--quick", "--out", str(tmp_path), "-k", "inference_d16")
    assert done.returncode == 0, done.stderr
    assert "grouped conv1x1" in done.stdout
    assert "Goals" in done.stdout
    assert str(tmp_path / "README.md") in done.stdout
    with (tmp_path / "records.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {r["provider"] for r in rows} == {"DBN(16)", "grouped conv1x1", "BatchNorm2d"}
    assert {r["mode"] for r in rows} == {"inference"}
    assert (tmp_path / "ratios.csv").exists()


def test_a_selection_of_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path / "new"), "-k", "no_such_suite"])
    assert stop.value.code == 2
    assert "expected to select something" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--vgg-batch", "0"), "expected at least 1, got 0"),
        (("--device", "abacus"), "invalid choice"),
        (("-k", "vgg or"), "-k: expected words with and, or, not and parentheses, got 'vgg or'"),
    ],
)
def test_wrong_calls(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path / "new"), *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_broken_package_is_reported_and_the_baselines_are_measured(tmp_path):
    code = (
        "import sys; sys.modules['normkernels'] = None; from bench.__main__ import main;"
        f"sys.exit(main(['--quick', '--out', {str(tmp_path)!r}, '-k', 'inference_d16']))"
    )
    done = run("-c", code)
    assert done.returncode == 1
    assert "== Failed" in done.stdout
    with (tmp_path / "failures.csv").open(newline="") as file:
        (failure,) = csv.DictReader(file)
    assert failure["provider"] == "DBN(16)"
    assert "normkernels" in failure["error"]
    with (tmp_path / "records.csv").open(newline="") as file:
        assert {r["provider"] for r in csv.DictReader(file)} == {"grouped conv1x1", "BatchNorm2d"}


@pytest.mark.parametrize(
    ("expression", "expected"),
    [("", True), ("VGG", True), ("vgg and not full", False), ("(conv or gg_s) and full", True), ("not vgg", False)],
)
def test_expressions(expression, expected):
    assert matches(expression, "vgg vgg_step/full/8x3x32x32/float32") == expected


@pytest.mark.parametrize("expression", ["and", "vgg full", "vgg (full)", "not", "(vgg", "vgg and not"])
def test_expressions_that_have_no_meaning(expression):
    with pytest.raises(ValueError, match="expected words with and, or, not and parentheses, got '"):
        matches(expression, "vgg")


def test_a_selection_is_by_suite_key_or_provider():
    settings = Settings(torch.device("cpu"), quick=True)
    assert len(select(settings, SUITES)) == sum(len(suite(settings)) for suite in SUITES.values())
    assert {c.kernel for c in select(settings, SUITES, "conv_norm")} == {
        "conv_norm",
        "spectral_filter",
        "kernel_spectrum",
    }
    assert [c.key for c in select(settings, ["table_a1"], "x64x and full")] == ["table_a1/full/64x64x32x32/float32"]
    assert {c.kernel for c in select(settings, SUITES, "LayerNorm")} == {"bnp_step", "memory"}


def test_an_interrupted_run_reports_what_it_has(tmp_path, monkeypatch, capsys):
    def measure(comparison, *_):
        if comparison.kernel != "vgg_step":
            raise KeyboardInterrupt
        raise ValueError("no luck")

    monkeypatch.setattr("bench.measure.comparison.Comparison.measure", measure)
    assert program.main(["--quick", "--out", str(tmp_path), "--suite", "vgg", "--suite", "inference"]) == 1
    page = (tmp_path / "README.md").read_text()
    assert "**Note:** Interrupted: only a part was measured." in page and "ValueError: no luck" in page
    assert "Interrupted" in capsys.readouterr().out
