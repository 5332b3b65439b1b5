"""The command line as a user runs it, on the smallest suite."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import main

ROOT = Path(__file__).resolve().parent.parent.parent


def bench(*arguments):
    return run("-m", "bench", *arguments)


def run(*arguments):
    command = [sys.executable, *arguments]
    # pytest-benchmark switches itself off in what it takes for a worker of pytest-xdist
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)


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


def test_a_selection_of_nothing(tmp_path):
    done = bench("--out", str(tmp_path / "new"), "-k", "no_such_suite")
    assert done.returncode == 2
    assert "expected to select something" in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--vgg-batch", "0"), "expected at least 1, got 0"), (("--device", "abacus"), "invalid choice")],
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
