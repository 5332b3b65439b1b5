"""`make gpu-check` on a CPU, where the same program can be tried; and the GPU's goals."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.gpu import gpu_check
from bench.gpu.gpu_check import Step, introduction
from bench.measure.comparison import Comparison, Settings
from bench.measure.environment import precision
from bench.measure.results import Record, Results
from bench.measure.timing import HostClock, Measurement, Plan, clock_for
from bench.measure.workload import Inputs, Workload, prepare_layer
from bench.providers import catalogue as cat
from bench.providers.names import BATCHNORM, ITERNORM
from bench.report import order
from bench.report.page import goals_table
from bench.suites import gradients
from bench.suites.goals import evaluate
from bench.suites.gpu_suite import FLOOR, ITERNORM_CL, gpu
from normkernels.dispatch import choose
from normkernels.dispatch.record import OPS

ROOT = Path(__file__).resolve().parent.parent.parent
CUDA = Settings(torch.device("cuda"))
ORIGIN = {"device": "a GPU", "versions": "torch 2; cuDNN TF32 on", "commit": "abc1234", "device_type": "cuda"}


def test_a_dry_run_end_to_end(tmp_path):
    (tmp_path / "failures.csv").write_text("of an earlier run")
    options = ["--device", "cpu", "--quick", "--kernel", "gpu_newton", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "bench.gpu.gpu_check", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"log.txt", "README.md", "records.csv", "ratios.csv"}
    with (tmp_path / "records.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["provider"] for row in rows} >= {"inverse_sqrt", "inverse_sqrt (eager)", "plain autograd Newton"}
    page, log = (tmp_path / "README.md").read_text(), (tmp_path / "log.txt").read_text()
    for step in ("environment", "self-test", "GPU tests", "gpu_newton"):
        assert f"=== {step}: succeeded" in log and f"| {step} " in page
    assert log in done.stdout
    assert "Newton's iteration alone" in page


def run(tmp_path, *steps, seconds=100.0):
    with (tmp_path / "log.txt").open("w") as log:
        outcomes = [gpu_check.run(step, seconds, log) for step in steps]
    return outcomes, (tmp_path / "log.txt").read_text()


def test_a_failed_step_is_recorded_and_the_next_one_runs(tmp_path):
    bad = Step("bad", ("-c", "print('so far'); raise SystemExit(3)"), 1.0)
    allowed = replace(bad, name="allowed", succeeded=(0, 3))
    good = Step("good", ("-c", "import sys; print('a | b', file=sys.stderr)"), 1.0)
    outcomes, log = run(tmp_path, bad, allowed, good)
    assert [(o.step, o.failed, o.last_line) for o in outcomes] == [
        ("bad", True, "so far"),
        ("allowed", False, "so far"),
        ("good", False, "a | b"),
    ]
    assert "=== bad: failed, exit code 3" in log
    table = introduction(outcomes, [bad, allowed, good, Step("late", (), 1.0)])[2]
    assert "failed, exit code 3" in table and "a / b" in table and "not run" in table.splitlines()[-1]


def test_a_step_that_overruns_is_stopped_with_what_it_started(tmp_path):
    child = "import time; print('begun', flush=True); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    (outcome,), log = run(tmp_path, Step("slow", ("-c", code), 1.0), seconds=2.0)
    assert outcome.failed and outcome.result == "stopped after 2 s" and outcome.seconds < 30
    assert "begun" in log


def test_without_time_nothing_is_started(tmp_path, capsys):
    """Without time only the report is written."""
    options = ["--device", "cpu", "--minutes", "0.1", "--kernel", "gpu_newton", "--out", str(tmp_path)]
    assert gpu_check.main(options) == 1
    assert (tmp_path / "README.md").read_text().count("no time left") == 4
    assert "no time left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--out"),
        (("--out", "x", "--device", "cpu", "--minutes", "0"), "expected a positive number, got 0"),
        (("--out", "x", "--device", "cpu", "--kernel", "conv"), "invalid choice"),
        pytest.param(
            ("--out", "x"),
            "expected a CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_wrong_calls(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as raised:
        gpu_check.main(list(arguments))
    assert raised.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_make_wants_a_folder():
    done = subprocess.run(["make", "gpu-check", "OUT="], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "expected OUT=dir" in done.stderr


def test_each_kernel_of_the_suite_has_a_step():
    assert {comparison.kernel for comparison in gpu(CUDA)} == gpu_check.KERNELS.keys()


def record(backend, milliseconds, shape="2x64", kernel="gpu_norm"):
    origin = {"device": "a GPU", "versions": "torch 2", "commit": "abc1234"}
    where = {"mode": "full", "metric": "time_ms", "shape": shape, "dtype": "float32"}
    return Record(kernel, f"IterNorm T=5 ({backend})", **where, p50=milliseconds, p20=1.0, p80=1.0, **origin)


def test_gradients_are_checked_and_measured(monkeypatch):
    monkeypatch.setattr(gradients, "resnet50", lambda: [(4, 3, 2, 2), (5, 4)])
    for comparison in gradients.gradients(Settings()):
        measured = replace(comparison, plan=Plan(rounds=2, min_rounds=1, warmup=0, budget_s=0.0)).measure()
        assert not measured.failures and measured.samples.keys() == set(comparison.names)
    monkeypatch.setattr(gradients, "exact", lambda layers: [g.double() for g in layers.gradients()])
    assert "precondition: expected a gradient within" in comparison.measure().failures["precondition"]


def test_the_order_of_the_backends_is_that_of_their_times():
    """A backend slower than eager is of no use; one that has failed somewhere is not ranked."""
    results = Results("a GPU", "torch 2", "abc1234", "cuda")
    results.records = [record("cuda", 2.0), record("triton", 1.0), record("eager", 8.0)]
    results.records += [record("cuda", 2.0, "9x64"), record("triton", 8.0, "9x64"), record("eager", 4.0, "9x64")]
    assert order.slowness(results, "gpu_norm") == pytest.approx({"cuda": 2**0.5, "triton": 2.0, "eager": 4.0})
    results.records += [record("cuda", 9.0, kernel="gpu_filter"), record("eager", 3.0, kernel="gpu_filter")]
    found = order.order(results)
    assert found["whiten"] == ["cuda", "triton", "eager"] and found["spectral_filter"] == ["eager"]
    assert set(found) == {*order.ops_of("gpu_norm"), *order.ops_of("gpu_filter")}
    results.records += [record("eager", 1.0, "1x64"), record("cuda", 2.0, "1x64")]
    assert list(order.slowness(results, "gpu_norm")) == ["cuda", "eager"]
    page = "\n".join(order.section(results))
    assert json.loads(page.partition("```json")[2].partition("```")[0]) == order.order(results)


def test_every_op_is_ranked_by_some_comparison():
    ranked = [op for comparison in order.PRIMITIVES for op in order.ops_of(comparison)]
    assert sorted(ranked) == sorted(OPS)
    assert order.BACKENDS == choose.BACKENDS


def test_the_host_is_timed_where_that_is_asked_for(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(0))
    assert HostClock().time(lambda: waits.append(1)) > 0 and waits == [0, 1]  # no wait for what the call has queued
    assert isinstance(clock_for(torch.device("cuda"), host=True), HostClock)
    assert {comparison.kernel for comparison in gpu(CUDA) if comparison.host} == {"gpu_overhead"}


def test_backends_of_a_cpu_leave_the_interpreter_out():
    assert cat.backends(torch.device("cpu")) == ("eager",)


@pytest.mark.parametrize(
    "provider",
    [
        cat.byte_floor(),
        cat.on_backend(cat.iter_norm(group_size=8), "eager"),
        cat.in_tf32(cat.iter_norm(group_size=8)),
        cat.without_tf32(cat.conv3x3()),
    ],
    ids=lambda p: p.name,
)
def test_providers_pass_their_check_and_run(provider):
    before = precision(torch.device("cuda"))
    call = prepare_layer(provider, Inputs(Workload((4, 16, 6, 6))))
    with call.context():
        call.prepare(1)
        call.run()
        call.finish()
    assert precision(torch.device("cuda")) == before


def test_the_precision_of_every_side_is_stated():
    text = "fp32 matmul ieee; cuDNN TF32 {}; normkernels TF32 {}"
    assert precision(torch.device("cuda")) == text.format("on", "off")
    with cat.exact_convolutions():
        assert precision(torch.device("cuda")) == text.format("off", "off")
    with cat.own_tf32():
        assert precision(torch.device("cuda")) == "fp32 matmul tf32; cuDNN TF32 on; normkernels TF32 on"


@pytest.mark.parametrize("provider", cat.roots(), ids=lambda p: p.name)
def test_roots_of_covariances(provider):
    prepare_layer(provider, Inputs(Workload((3, 16, 16), covariance=True)))


def test_a_provider_may_have_a_layout_of_its_own():
    seen = {}

    def noting(provider):
        def build(work):
            seen[provider.name] = work.channels_last
            return provider.build(work)

        return replace(provider, build=build)

    plan = Plan(rounds=2, min_rounds=1, warmup=0, budget_s=0.0)
    providers = (noting(cat.batch_norm()), noting(cat.as_channels_last(cat.batch_norm())))
    measured = Comparison("t", Workload((4, 4, 3, 3)), providers, plan, (BATCHNORM,)).measure()
    assert not measured.failures
    assert seen == {BATCHNORM: False, f"{BATCHNORM} channels_last": True}


def test_a_context_is_around_every_call_and_is_left_after_a_failure():
    inside = []

    class Noting:
        def __enter__(self):
            inside.append(True)

        def __exit__(self, *_):
            inside.pop()

    class Careless(torch.nn.BatchNorm2d):
        def forward(self, x):
            assert inside == [True]
            return super().forward(x)

    provider = cat.batch_norm()
    within = replace(provider, build=lambda work: Careless(work.channels), context=Noting)
    plan = Plan(rounds=2, min_rounds=1, warmup=0, budget_s=0.0)
    measured = Comparison("t", Workload((4, 4, 3, 3)), (within,), plan, ()).measure()
    assert not measured.failures and inside == []


def gpu_results(samples):
    """Return what a run would find, with these seconds for the first comparison of the suite."""
    comparison = gpu(CUDA)[0]
    found = Results(**ORIGIN)
    left_out = {name: "not in this test" for name in comparison.names if name not in samples}
    found.add_times(comparison, Measurement({name: [s] * 3 for name, s in samples.items()}, left_out))
    return found


def states(found, *sides):
    return [v.state for v in evaluate(found) if v.goal.dtype == "float32" and v.goal.shape == "256x64x56x56"
            and v.goal.sides == sides]  # fmt: skip


def test_the_best_layout_of_both_sides_counts():
    both = (ITERNORM, ITERNORM_CL), (BATCHNORM, f"{BATCHNORM} channels_last")
    times = {ITERNORM: 3e-4, ITERNORM_CL: 9e-4, BATCHNORM: 8e-4, f"{BATCHNORM} channels_last": 3.5e-4, FLOOR: 2.5e-4}
    assert states(gpu_results(times), *both) == ["met"]
    assert states(gpu_results(times), (ITERNORM,), (FLOOR,)) == ["met"]
    assert states(gpu_results(times | {ITERNORM: 2.7e-4}), *both) == ["met, and its stretch"]
    assert states(gpu_results(times | {ITERNORM: 4e-4}), *both) == ["missed"]


def test_a_side_without_a_figure_is_not_assumed():
    """One figure of ours is enough, as the fastest can only be faster. The others must all be there."""
    both = (ITERNORM, ITERNORM_CL), (BATCHNORM, f"{BATCHNORM} channels_last")
    assert states(gpu_results({ITERNORM: 1e-4, BATCHNORM: 3e-4}), *both) == ["not measured"]
    complete = {ITERNORM: 1e-4, BATCHNORM: 3e-4, f"{BATCHNORM} channels_last": 4e-4}
    assert states(gpu_results(complete), *both) == ["met, and its stretch"]
    assert {v.state for v in evaluate(gpu_results({}))} == {"not measured"}


def test_a_goal_may_be_a_time():
    comparison = next(c for c in gpu(CUDA) if c.kernel == "gpu_newton")
    found = Results(**ORIGIN)
    left_out = dict.fromkeys(comparison.names[1:], "not in this test")
    found.add_times(comparison, Measurement({comparison.names[0]: [11e-6] * 3}, left_out))
    (verdict,) = [v for v in evaluate(found) if v.goal.kernel == "gpu_newton"]
    assert verdict.state == "met"
    (row,) = goals_table([verdict]).splitlines()[2:]
    assert "inverse_sqrt or inverse_sqrt (graph), us" in row and "12.0 (7.50)" in row and "11.0 [11.0, 11.0]" in row


def test_results_are_read_as_they_were_written_and_added_to(tmp_path):
    first, second = gpu_results({ITERNORM: 1e-4, BATCHNORM: 4e-4}), gpu_results({ITERNORM: 2e-4})
    texts = [path.read_text() for path in first.save(tmp_path)]
    read = Results.load(tmp_path, "cpu")
    assert [path.read_text() for path in read.save(tmp_path)] == texts
    assert read.ratios == first.ratios and read.failures == first.failures
    assert [r.p50 for r in read.records] == pytest.approx([r.p50 for r in first.records], rel=1e-5)
    assert (read.device, read.versions) == (first.device, first.versions)
    second.save(tmp_path, before=read)
    both = Results.load(tmp_path, "cpu")
    assert [r.provider for r in both.records] == [r.provider for r in first.records + second.records]
    assert both.failures == first.failures + second.failures
