"""`make figures` in tiny: what it writes, that it repeats, and that measuring changes nothing of what is measured."""

from __future__ import annotations

import csv
import math
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

pytest.importorskip("sklearn")  # before what imports it
pytest.importorskip("matplotlib")

from bench.experiments.digits import digits_split
from bench.figures import __main__ as program
from bench.figures import gaussian, hessian, summary, weight_growth
from normkernels.analysis import stochasticity
from normkernels.optim import BNP

TABLES = {
    "iternorm_figure_4": gaussian.Point,
    "iternorm_figure_a2": gaussian.Point,
    "iternorm_figure_5": gaussian.Point,
    "bnp_figure_8": hessian.Step,
    "new_interpretations_figure_3": weight_growth.Step,
}


def run(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stochasticity, "KEPT_BYTES", stochasticity.KEPT_BYTES)  # put back what main sets
        return program.main(arguments)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figures") / "new"
    assert run("--quick", "--out", str(folder)) == 0
    return folder


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_figure_has_its_table(out: Path) -> None:
    assert {path.name for path in out.iterdir()} == {name + end for name in TABLES for end in (".csv", ".png")}
    for name, row_type in TABLES.items():
        assert list(read(out / f"{name}.csv")[0]) == [field.name for field in fields(row_type)]
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_are_fixed(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(1234)  # it has no effect
    assert run("--quick", "--out", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    for name in TABLES:
        assert (tmp_path / f"{name}.csv").read_bytes() == (out / f"{name}.csv").read_bytes()
        assert f"{name}.csv" in printed and f"{name}.png" in printed


def test_normalizations_and_dimensions_of_the_figures(out: Path) -> None:
    few, many = {"BN", "DBN", "IterNorm T=5"}, {"BN", "DBN", *(f"IterNorm T={T}" for T in (1, 3, 5, 7, 9))}
    cells = {(s, n, str(d)) for s in ("isotropic", "decaying") for n in few for d in gaussian.QUICK.dimensions}
    four, a2 = read(out / "iternorm_figure_4.csv"), read(out / "iternorm_figure_a2.csv")
    assert {(p["spectrum"], p["norm"], p["d"]) for p in four} == cells
    assert {p["norm"] for p in a2} == many
    five = read(out / "iternorm_figure_5.csv")
    assert {int(p["batch_size"]) for p in five} == set(gaussian.QUICK.batch_sizes)
    assert {int(p["d"]) for p in five if p["batch_size"] == "2"} == set(gaussian.QUICK.dimensions)
    assert gaussian.FULL.dimensions == (2, 4, 8, 16, 32, 64, 128, 256, 512)
    assert (gaussian.FULL.samples, gaussian.FULL.batch_size, gaussian.FULL.draws) == (60_000, 1024, 10)
    assert gaussian.FULL.dimension == 128


def test_points_are_what_they_say() -> None:
    """DBN leaves the identity but for eps; a pair has outputs of length sqrt(d) from BN, of length 1 from whitening."""
    points = {name: gaussian.measure("decaying", name, 8, 512, 64, 3) for name in gaussian.COLOURS}
    # eigenvalues lambda / (lambda + eps) for lambda from about 1/8 to 1
    assert 1 < points["DBN"].condition < 1 + 2 * 8 * gaussian.EPS
    conditions = [points[name].condition for name in ("BN", *(f"IterNorm T={T}" for T in gaussian.ITERATIONS))]
    assert conditions == sorted(conditions, reverse=True) and conditions[0] > 4
    for point in points.values():
        assert point.relative_snd == point.snd / point.output_norm
    pairs = {name: gaussian.measure("isotropic", name, 16, 64, 2, 3) for name in ("BN", "IterNorm T=5")}
    assert pairs["BN"].output_norm == pytest.approx(4, rel=1e-2)  # eps beside variances of about 1/2
    assert pairs["IterNorm T=5"].output_norm == pytest.approx(1, rel=1e-3)
    assert math.isinf(pairs["BN"].condition)


def test_spectra() -> None:
    """Eigenvalues of 40,000 samples have a relative standard error of sqrt(2 / 40,000) = 0.7%; five of these pass."""
    for spectrum, expected in (("isotropic", (1, 1, 1, 1)), ("decaying", (1, 1 / 2, 1 / 3, 1 / 4))):
        x = gaussian.samples(spectrum, 40_000, 4)
        values = torch.linalg.eigvalsh(x.T.cov()).flip(0)
        assert torch.allclose(values, torch.tensor(expected, dtype=torch.float32), rtol=0.035)
    assert x.T.cov().fill_diagonal_(0).abs().max() > 0.05  # in a random basis
    assert torch.equal(x, gaussian.samples("decaying", 40_000, 4))
    assert not torch.equal(x, gaussian.samples("decaying", 40_000, 4, seed=1))


@pytest.mark.parametrize("method", [hessian.VANILLA, hessian.PRECONDITIONED])
def test_measuring_does_not_change_the_training(method: str) -> None:
    split = hessian.in_float64(digits_split())
    sizes = hessian.Sizes(1, 1, batch_size=200)  # four steps: statistics tell in the loss of the third
    measured, plain = (list(hessian.train(method, 0.1, 0, split, sizes, full)) for full in (True, False))
    assert [s.train_loss for s in measured] == [s.train_loss for s in plain]
    assert all(math.isfinite(s.hessian) and math.isnan(t.hessian) for s, t in zip(measured, plain, strict=True))
    assert all(math.isnan(s.scaling) == (method == hessian.VANILLA) for s in measured)


def test_preconditioner_is_bnps() -> None:
    """One step gives mu = .01 mu_H and sigma^2 = .99 + .01 sigma_H^2, with the epsilons of step 3 of Algorithm 2."""
    model = hessian.network(0)
    bnp = BNP(model)
    x = torch.randn(60, 64, dtype=torch.float64)
    torch.nn.functional.cross_entropy(model(x), torch.arange(60) % 10).backward()
    bnp.step()
    with torch.no_grad():
        hidden = model[:5](x)
    variance = 0.99 + 0.01 * hidden.var(0, correction=0)
    mean, regularized = hessian.running(bnp)
    torch.testing.assert_close(mean, 0.01 * hidden.mean(0))
    torch.testing.assert_close(regularized, variance + 0.01 * variance.max() + 1e-4)


def test_learning_rate_with_the_smallest_loss_is_taken() -> None:
    split = hessian.in_float64(digits_split())
    sizes = hessian.Sizes(1, 1, learning_rates=(1e200, 1e-3, 0.1), batch_size=300)
    with tqdm(disable=True) as bar:
        assert hessian.best_learning_rate(hessian.VANILLA, split, sizes, bar) == 0.1


@pytest.mark.parametrize("norm", list(weight_growth.NORMS))
def test_weights_grow_as_lemma_3_says(norm: str) -> None:
    sizes = weight_growth.Sizes(epochs=1)
    with tqdm(disable=True) as bar:
        without, decayed = (weight_growth.train(norm, d, digits_split(), sizes, bar) for d in (0.0, 0.01))
    norms = [s.weight_norm for s in without]
    assert all(after > before for before, after in pairwise(norms))
    # Exact but for rounding and for the eps of the norms, some 1e-5 of the variance.
    assert norms[-1] - norms[0] == pytest.approx(without[-1].lemma_3 - without[0].lemma_3, rel=0.02)
    assert decayed[-1].weight_norm < norms[-1]


def test_summary_is_of_the_tables(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert summary.main([str(out)]) == 0
    printed = capsys.readouterr().out
    rows = read(out / "iternorm_figure_5.csv")
    pair = next(r for r in rows if (r["norm"], r["d"], r["batch_size"]) == ("BN", "8", "2"))
    assert all(name in printed for name in TABLES)
    assert summary.short(float(pair["snd"])) in summary.tables(out)["iternorm_figure_5"]
    last = read(out / "new_interpretations_figure_3.csv")[-1]
    assert f"{float(last['weight_norm']):.2f}" in summary.tables(out)["new_interpretations_figure_3"].splitlines()[-1]
    assert [summary.short(v) for v in (1.234e9, 0.1234, 1.5e-5)] == ["1.23e9", "0.123", "1.5e-5"]
    with pytest.raises(SystemExit):
        summary.main([str(tmp_path)])
    assert "expected CSV files of `make figures`" in capsys.readouterr().err


def test_page_has_the_tables_of_the_committed_results() -> None:
    page = (program.ROOT / "docs" / "figures.md").read_text(encoding="utf-8")
    found = summary.tables(program.ROOT / "bench" / "results" / "figures")
    assert set(found) == set(TABLES)
    for name, text in found.items():
        assert text in page, f"{name}: paste what python -m bench.figures.summary prints into docs/figures.md"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "figure_0"), "invalid choice: 'figure_0'"),
        (("--out", __file__), "--out: expected a folder, got the file"),
        (("--seed", "1"), "unrecognized arguments"),
    ],
)
def test_wrong_calls(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("--quick", *arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_quick_and_partial_runs_leave_the_committed_results_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "ROOT", tmp_path)
    monkeypatch.setitem(program.FIGURES, "bnp_8", lambda out, quick: [out / f"quick {quick}"])
    assert run("--only", "bnp_8") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
