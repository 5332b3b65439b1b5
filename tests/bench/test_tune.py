"""The parts of bench/gpu/tune.py that need no GPU: candidates, choice, the table, and what it calls for each kernel."""

from dataclasses import replace

import pytest
import torch

import normkernels as nk
from bench.gpu import tune
from bench.gpu.tune import Case, candidates, cases, fastest, write_table
from normkernels.triton import configs, launch, support
from normkernels.triton.configs import Config

BASE = Config(64, 4, 3, "tf32x3")
MIX = Case("mix", 64, "positions", "float32")


KERNELS = sorted({key[0] for key in configs.read_table(configs.TABLE)})


def test_cases_are_the_rows_without_the_architecture():
    rows = [(*MIX, 80), (*MIX, 90), (*MIX._replace(size=16), 80), (*MIX._replace(kernel="merge"), 80)]
    assert cases(rows, (), ()) == [MIX, MIX._replace(size=16), MIX._replace(kernel="merge")]
    assert cases(rows, ["mix"], [64]) == [MIX]


@pytest.mark.parametrize(
    ("case", "base", "blocks", "warps", "stages"),
    [
        (MIX, BASE, {32, 64, 128}, {2, 4, 8}, {2, 3, 4}),
        (MIX, Config(16, 16, 4, "ieee"), {16, 32}, {8, 16}, {3, 4}),
        (MIX, Config(256, 1, 1, "ieee"), {128, 256}, {1, 2}, {1, 2}),
        (Case("newton", 32, "", "float32"), Config(32, 4, 2, "tf32x3"), {16, 32}, {2, 4, 8}, {1, 2, 3}),
        (Case("mix", 1, "positions", "half"), Config(1024, 8, 1, "ieee", 4), {512, 1024, 2048}, {4, 8, 16}, {1, 2}),
        (Case("merge", 16, "", "float32"), Config(1, 4, 1, "ieee"), {1, 2}, {2, 4, 8}, {1, 2}),
    ],
)
def test_candidates_surround_the_configuration_within_limits(case, base, blocks, warps, stages):
    found = candidates(case, base)
    assert found[0] == base and len(set(found)) == len(found) == len(blocks) * len(warps) * len(stages)
    assert {c.block for c in found} == blocks
    assert {c.warps for c in found} == warps
    assert {c.stages for c in found} == stages
    assert {c.precision for c in found} == {base.precision}


def test_the_fastest_that_works_is_kept():
    def seconds(config):
        if config.warps == 2:
            raise RuntimeError("out of resources")  # it would be the fastest
        return config.block * config.warps

    best, times = fastest(candidates(MIX, BASE), seconds)
    assert (best.block, best.warps) == (32, 4)
    assert all(config.warps != 2 for config in times) and times[BASE] == 256


def test_the_configuration_in_force_wins_a_tie():
    assert fastest(candidates(MIX, BASE), lambda config: 1.0)[0] == BASE


def test_nothing_works():
    def seconds(config):
        raise ValueError("no kernel image")

    with pytest.raises(RuntimeError, match=r"one configuration that works.*no kernel image"):
        fastest([BASE], seconds)


def test_the_table_is_read_as_it_was_written_and_overrides_the_packages(tmp_path, monkeypatch):
    path = tmp_path / "new" / "configs.json"
    table = {(*MIX, 90): Config(128, 8, 2, "tf32x3"), ("newton", 16, "", "float32", 90): Config(16, 1, 1, "ieee")}
    write_table(path, table)
    assert configs.read_table(path) == table
    package = configs.read_table(configs.TABLE)
    monkeypatch.setenv("NORMKERNELS_TRITON_CONFIGS", str(path))
    configs.table.cache_clear()
    configs._entry.cache_clear()
    try:
        assert configs.table() == package | table
        with support.recording(90, lambda *_: None):  # otherwise the configuration would be the interpreter's
            assert configs.configuration(*MIX[:3], torch.float32, 90) == table[(*MIX, 90)]
            assert configs.configuration(*MIX[:3], torch.float32, 80) == package[(*MIX, 80)]
    finally:
        monkeypatch.undo()
        configs.table.cache_clear()
        configs._entry.cache_clear()


def test_a_candidate_is_in_force_inside_its_block_only():
    now = configs.configuration(*MIX[:3], torch.float32, 99)
    other = Config(16, 1, 1, "ieee")
    with pytest.raises(KeyError), configs.replaced({(*MIX, 99): other}):
        assert configs.configuration(*MIX[:3], torch.float32, 99) == other
        raise KeyError
    assert configs.configuration(*MIX[:3], torch.float32, 99) == now


def test_data_is_laid_out_as_the_row_says(monkeypatch):
    monkeypatch.setattr(tune, "CHANNELS", 16)
    monkeypatch.setattr(tune, "POSITIONS", 30 * 30 * 4)
    for case in tune.cases(configs.table(), ["moments", "cross_moments", "mix", "stacked_mix"], [16]):
        assert launch.columns(case.activations(torch.device("cpu"))).layout == case.layout


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_timed_runs_and_gives_numbers(kernel, monkeypatch):
    """The arguments fit the ops' schemas, on the eager backend and little data."""
    monkeypatch.setattr(tune, "CHANNELS", 16)
    monkeypatch.setattr(tune, "POSITIONS", 30 * 30 * 4)
    with nk.use_backend("eager"):
        call = tune.call_of(Case(kernel, 16, "channels", "half"), torch.device("cpu"))
        results = call()
    assert results and all(result.isfinite().all() for result in results)
    assert any(result.any() for result in results)
    assert all(map(torch.equal, results, call()))  # also where an op changes its arguments


@pytest.mark.skipif(not support.installed() or not support.interpreted(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("kernel", ["mix", "newton"])
def test_a_kernel_is_tuned_in_the_interpreter(kernel, monkeypatch):
    """All but the GPU is tried: each candidate is launched, compared with eager and timed."""
    for name, value in {"CHANNELS": 16, "POSITIONS": 2 * 32 * 32, "ROUNDS": 1, "WARMUP": 0}.items():
        monkeypatch.setattr(tune, name, value)
    case = Case(kernel, 16, "" if kernel == "newton" else "positions", "float32")
    base = configs.configuration(*case[:3], torch.float32, 80)
    seconds = tune.measurer(case, 80, torch.device("cpu"))
    broken = replace(base, block=7)  # no power of two
    best, times = fastest([base, broken, replace(base, warps=2)], seconds)
    assert len(times) == 2 and best in times and broken not in times


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_needs_a_gpu(tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        tune.main(["--out", str(tmp_path / "configs.json")])
    assert raised.value.code == 2
    assert "expected a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "configs.json").exists()
