"""``python -m normkernels.info``: what it shows, and that its self-test notices a wrong op."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

import normkernels as nk
from normkernels import _selftest, info
from normkernels.dispatch import choose
from normkernels.dispatch.record import IMPLEMENTATIONS, OPS

BACKENDS = [name for name in choose.BACKENDS if choose.availability(name)[0]]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, without Triton's interpreter, whose kernels a test below covers."""
    command = [sys.executable, "-m", "normkernels.info", *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_the_command_prints_json_with_a_passed_selftest():
    done = run("--json", "--selftest")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["normkernels"] == nk.__version__
    assert report["torch"] == str(torch.__version__)
    assert report["python"] == ".".join(map(str, sys.version_info[:3]))
    assert report["passed"] is True
    assert all(row["error"] <= row["tolerance"] for row in report["selftest"])


def test_an_unknown_flag_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        info.main(["--verbose"])
    assert stop.value.code == 2
    assert "--verbose" in capsys.readouterr().err


def test_the_table_has_every_op_backend_and_device_once():
    rows = info.collect()["ops"]
    expected = set(itertools.product(OPS, info._device_types(), choose.BACKENDS))
    assert {(row["op"], row["device"], row["backend"]) for row in rows} == expected
    assert len(rows) == len(expected)
    assert all(row["reason"] for row in rows)


def test_the_table_agrees_with_the_dispatcher():
    x = torch.empty(0)
    for row in info.collect()["ops"]:
        if row["device"] == "cpu":
            assert row["serves"] == (nk.backend_of(row["op"], x) == row["backend"])
            assert row["available"] == (row["backend"] in BACKENDS)


def test_the_text_shows_versions_reasons_and_every_op(capsys):
    assert info.main([]) == 0
    text = capsys.readouterr().out
    assert nk.__version__ in text
    assert str(torch.__version__) in text
    for op in OPS:
        assert op in text
    for name in choose.BACKENDS:
        assert choose.availability(name)[1] in text
    assert info._build.build_record()["reason"] in text
    assert "self-test" not in text


@pytest.mark.parametrize(("value", "line"), [("1", "cpu (NORMKERNELS_NO_FLOAT64 = 1)"), (None, "none (")])
def test_the_text_shows_which_devices_lack_float64(value, line, monkeypatch, capsys):
    monkeypatch.delenv("NORMKERNELS_NO_FLOAT64", raising=False)
    if value is not None:
        monkeypatch.setenv("NORMKERNELS_NO_FLOAT64", value)
    assert info.main([]) == 0
    assert f"no float64   {line}" in capsys.readouterr().out
    assert info.collect()["no_float64"] == {"variable": value, "devices": ["cpu"] if value else []}


def test_a_device_of_each_kind_is_listed(monkeypatch):
    properties = type("P", (), {"name": "Some GPU", "major": 9, "minor": 0, "total_memory": 1 << 30})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
    devices = list(info._devices("cuda"))
    assert [device["device"] for device in devices] == ["cuda:0", "cuda:1"]
    assert {device["capability"] for device in devices} == {"9.0"}
    assert list(info._devices("cpu")) == []


def test_the_selftest_covers_every_op_on_every_usable_backend():
    rows = list(_selftest.run(torch.device("cpu")))
    assert [(row["op"], row["backend"]) for row in rows] == [(o, b) for b in BACKENDS for o in OPS]
    assert [row for row in rows if not row["passed"]] == []


@pytest.fixture
def eager_alone(monkeypatch):
    """Return a function that puts another eager implementation in the place of an op's, and leave that alone.

    Triton's interpreter is switched off: its kernels are slow, and what fails here is the report.
    """
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield lambda op, function: monkeypatch.setitem(IMPLEMENTATIONS[op], "eager", function)
    monkeypatch.undo()
    choose._choose("auto")  # it registers the right ones again


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_kernel_fails_the_selftest(op, factor, eager_alone, monkeypatch, capsys):
    # .1% is far below what training would show, and far above the tolerances.
    exact = IMPLEMENTATIONS[op]["eager"]

    def broken(*args):
        result = exact(*args)
        if op == "precondition":  # in place; its result is a count
            args[0][0].mul_(factor)
            return result
        return (result[0] * factor, *result[1:]) if isinstance(result, tuple) else result * factor

    eager_alone(op, broken)
    monkeypatch.setattr(_selftest, "OPS", {op: OPS[op]})  # the others' checks are not needed here
    assert info.main(["--selftest", "--json"]) == 1
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # JSON knows no NaN
    assert report["passed"] is False
    assert op in {row["op"] for row in report["selftest"] if not row["passed"]}


def test_the_text_names_the_op_that_failed(eager_alone, capsys):
    eager_alone("whiten", lambda x, *rest: torch.zeros_like(x))
    assert info.main(["--selftest"]) == 1
    text = capsys.readouterr().out
    assert "FAIL whiten" in text
    assert "pass moments" in text
    assert text.endswith("self-test FAILED\n")


def test_an_op_that_raises_is_one_failure_with_its_message(eager_alone, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image")

    eager_alone("whiten", broken)
    assert info.main(["--selftest", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["selftest"]
    failed = [row for row in rows if not row["passed"]]
    usable = [name for name in choose.BACKENDS if choose.availability(name)[0]]
    assert [row["op"] for row in failed] == ["whiten"] * len(usable)
    assert failed[0]["message"] == "RuntimeError: no kernel image"


def test_a_result_of_another_shape_fails(eager_alone):
    eager_alone("whiten", lambda *args: torch.ones(1))
    failed = [row for row in _selftest.run(torch.device("cpu")) if not row["passed"]]
    assert {row["op"] for row in failed} == {"whiten"}
    assert "expected shape" in failed[0]["message"]


@pytest.mark.gpu
def test_the_selftest_passes_on_a_gpu():
    rows = list(_selftest.run(torch.device("cuda")))
    assert [row for row in rows if not row["passed"]] == []
