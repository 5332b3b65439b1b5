"""inverse_sqrt against eq. 2, 14, 15 and 17; and the references against each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import normkernels as nk
from tests.oracles import dbn, highprec, inputs, iternorm, plain
from tests.oracles.run import STABLE, Config, back, leaf, moved
from tests.tolerances import assert_within, row_sum
from tests.tolerances.whitening import dcov_floor, w_floor

# The kernels leave float64 and the second derivatives' small products to plain PyTorch, and say so once.
pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.filterwarnings("ignore:.*plain PyTorch instead of the Triton kernels"),
]

OPTIONS = {"newton-trace": ("trace", "newton"), "newton-frobenius": ("frobenius", "newton"), "eigh": ("trace", "eigh")}
METHODS = pytest.mark.parametrize(("scaling", "method"), OPTIONS.values(), ids=OPTIONS.keys())
FULL = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def sym(a: Tensor) -> Tensor:
    return (a + a.mT) / 2


def check(cov: Tensor, config: Config, dtype: torch.dtype) -> None:
    """Check W and sym dL/dcov for cov (G, d, d), by the rule of tests/tolerances."""
    cov = cov.to(dtype)
    grad = torch.randn(cov.shape, dtype=torch.float64, generator=inputs.generator(3)).to(dtype)
    options = (config.num_iterations, config.eps, config.scaling)

    def run(path, cov: Tensor, method: str) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        given = leaf(cov)
        w = path(given, *options, method)
        (dcov,) = torch.autograd.grad(w, given, moved(grad).to(w.dtype), allow_unused=True, materialize_grads=True)
        return back(w), back(dcov)

    w, dcov = run(nk.ops.inverse_sqrt, cov, config.method)
    assert w.dtype == dcov.dtype == dtype
    w_ref, dcov_ref = run(iternorm.inverse_sqrt, cov.double(), STABLE[config.method])
    w_plain, dcov_plain = run(plain.inverse_sqrt, cov, config.method)
    assert_within("W", w, w_ref, w_plain, w_floor(cov, w_ref, config), row_sum(w_ref))
    floor = dcov_floor(cov, w_ref, grad, config)
    # A covariance is symmetric: only the symmetric part of the gradient has an effect, and it is what we return.
    assert torch.equal(dcov, dcov.mT)
    assert_within("dcov", dcov, sym(dcov_ref), sym(dcov_plain), floor, dcov_ref.abs().max().item())


# d: one channel, two, an odd number, DBN's default, IterNorm's. 1e6: float32 keeps one digit of the last direction.
@METHODS
@FULL
@pytest.mark.parametrize(
    ("d", "condition"), [(1, 1.0), *((d, c) for d in (2, 7, 16, 64) for c in (1.0, 10.0, 1e4, 1e6))]
)
def test_widths_and_condition_numbers(d: int, condition: float, dtype: torch.dtype, scaling: str, method: str) -> None:
    cov = torch.stack([inputs.covariance(inputs.spectrum(d, condition), seed) for seed in range(2)])
    check(cov, Config(eps=0.0, scaling=scaling, method=method), dtype)


# 0: W = I / sqrt(scale). From T=9 on eq. 17 as written diverges in float32, from T=12 on in float64, at 1e4.
@FULL
@pytest.mark.parametrize("scaling", ["trace", "frobenius"])
@pytest.mark.parametrize("condition", [10.0, 1e4], ids="cond{:g}".format)
@pytest.mark.parametrize("num_iterations", [0, 1, 2, 3, 4, 5, 6, 8, 9, 12, 15, 20])
def test_iterations(num_iterations: int, condition: float, scaling: str, dtype: torch.dtype) -> None:
    cov = inputs.covariance(inputs.spectrum(6, condition))[None]
    check(cov, Config(num_iterations=num_iterations, eps=0.0, scaling=scaling), dtype)


# 1e-12: far below eps, so W is I / sqrt(eps) nearly. 1e8: where eps disappears.
@METHODS
@FULL
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e8], ids="scale{:g}".format)
@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e-1], ids="eps{:g}".format)
def test_scales_and_eps(scale: float, eps: float, dtype: torch.dtype, scaling: str, method: str) -> None:
    cov = scale * inputs.covariance(inputs.spectrum(5, 30.0))[None]
    check(cov, Config(eps=eps, scaling=scaling, method=method), dtype)


SPECTRA = {
    "equal": [1.0, 1.0, 1.0, 1.0],
    "two-pairs": [2.0, 2.0, 0.5, 0.5],
    "nearly-equal": [1.0, 1.0 + 1e-9, 1.0 - 1e-9, 0.5],
    "one-dominant": [1e4, 1.0, 1.0, 1.0],
    "rank-one": [1.0, 0.0, 0.0, 0.0],
    "zero": [0.0, 0.0, 0.0, 0.0],
}


@METHODS
@FULL
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_degenerate_spectra(spectrum: str, dtype: torch.dtype, scaling: str, method: str) -> None:
    """Autograd through eigh is NaN in all of these but "nearly-equal", where it is noise."""
    eigenvalues = torch.tensor(SPECTRA[spectrum], dtype=torch.float64)
    for cov in (torch.diag(eigenvalues), inputs.covariance(eigenvalues)):
        check(cov[None], Config(eps=1e-3, scaling=scaling, method=method), dtype)


@METHODS
@pytest.mark.on_cpu
def test_groups_do_not_mix(scaling: str, method: str) -> None:
    """Each group alone gives the same matrix, whatever the others hold, at very different scales."""
    cov = torch.stack([inputs.covariance(inputs.spectrum(4, c), i) * 10.0**i for i, c in enumerate((1.0, 1e3, 9.0))])
    together = nk.ops.inverse_sqrt(cov, scaling=scaling, method=method)
    for group, w in zip(cov, together, strict=True):
        alone = nk.ops.inverse_sqrt(group[None], scaling=scaling, method=method)
        assert_within("W", w[None], alone, None, w_floor(group[None], alone, Config(method=method)), row_sum(alone))


@METHODS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.on_cpu
def test_a_bad_group_is_nan_and_raises_nothing(bad: float, scaling: str, method: str) -> None:
    cov = inputs.covariance(inputs.spectrum(4, 10.0)).repeat(3, 1, 1)
    expected = nk.ops.inverse_sqrt(cov, scaling=scaling, method=method)
    cov[1, 2, 0] = cov[1, 0, 2] = bad
    cov.requires_grad_()
    w = nk.ops.inverse_sqrt(cov, scaling=scaling, method=method)
    assert w[1].isnan().all()
    assert torch.equal(w[[0, 2]], expected[[0, 2]])
    w[[0, 2]].sum().backward()
    assert cov.grad is not None and cov.grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("scaling", ["trace", "frobenius"])
@pytest.mark.parametrize("num_iterations", [0, 1, 2])
def test_nan_on_the_diagonal_without_iterations(num_iterations: int, scaling: str) -> None:
    """Nothing but the scale tells the other entries. A maximum that drops NaN, as GPUs have it, would hide it."""
    cov = inputs.covariance(inputs.spectrum(4, 10.0)).float()[None]
    cov[0, 2, 2] = float("nan")
    assert back(nk.ops.inverse_sqrt(moved(cov), num_iterations, scaling=scaling)).isnan().all()  # type: ignore[union-attr]


@METHODS
@pytest.mark.parametrize("groups", [0, 1, 3])
@pytest.mark.on_cpu
def test_number_of_groups(groups: int, scaling: str, method: str) -> None:
    cov = inputs.covariance(inputs.spectrum(4, 10.0)).repeat(groups, 1, 1)
    assert nk.ops.inverse_sqrt(cov, scaling=scaling, method=method).shape == (groups, 4, 4)


@pytest.mark.on_cpu
def test_defaults_are_the_papers() -> None:
    cov = inputs.covariance(inputs.spectrum(4, 10.0))[None]
    explicit = nk.ops.inverse_sqrt(cov, num_iterations=5, eps=1e-5, scaling="trace", method="newton")
    assert torch.equal(nk.ops.inverse_sqrt(cov), explicit)


@METHODS
@pytest.mark.parametrize("num_iterations", [0, 1, 2, 5])
def test_gradcheck(num_iterations: int, scaling: str, method: str) -> None:
    """Gradients are taken through cov = A A^T, so that gradcheck's perturbations stay symmetric."""
    a = torch.randn(2, 3, 3, dtype=torch.float64, generator=inputs.generator(1), requires_grad=True)

    def f(a: Tensor) -> Tensor:
        return nk.ops.inverse_sqrt(a @ a.mT, num_iterations, 0.1, scaling, method)

    assert gradcheck(f, a)
    if method == "newton":
        assert gradgradcheck(f, a)
    else:
        first = torch.autograd.grad
        with pytest.raises(NotImplementedError, match="newton"):
            first(f(a).sum(), a, create_graph=True)


# The references. Each test above stands on these.


@pytest.mark.parametrize("condition", [3.0, 1e4, 1e6], ids="cond{:g}".format)
@pytest.mark.parametrize("num_iterations", [0, 1, 3, 5, 7, 12, 20])
def test_reference_on_eigenvalues_is_the_papers_recursion(num_iterations: int, condition: float) -> None:
    """eigenbasis.py agrees with eq. 6, 7 and 17 as written, in 200 digits."""
    cov = inputs.covariance(inputs.spectrum(5, condition)).requires_grad_()
    grad = torch.randn(5, 5, dtype=torch.float64, generator=inputs.generator(3))
    w_exact, dcov_exact = highprec.inverse_sqrt(cov.detach(), num_iterations, 1e-9, grad)
    config = Config(num_iterations=num_iterations, eps=1e-9)
    w = iternorm.inverse_sqrt(cov[None], num_iterations, 1e-9, method="eigenbasis")
    (dcov,) = torch.autograd.grad(w, cov, grad[None])
    assert_within("W", w[0].detach(), w_exact, None, w_floor(cov[None].detach(), w.detach(), config), 1.0)
    floor = dcov_floor(cov[None].detach(), w.detach(), grad, config)
    assert_within("dcov", sym(dcov), sym(dcov_exact), None, floor, 1.0)


@pytest.mark.parametrize("num_iterations", range(iternorm.LARGEST_PAPER_T + 1))
def test_reference_recursion_by_autograd(num_iterations: int) -> None:
    """Plain autograd through eq. 17 agrees with the paper's own eq. 6 and 7."""
    cov = inputs.covariance(inputs.spectrum(4, 10.0)).requires_grad_()
    grad = torch.randn(4, 4, dtype=torch.float64, generator=inputs.generator(3))
    w_exact, dcov_exact = highprec.inverse_sqrt(cov.detach(), num_iterations, 1e-5, grad)
    w = iternorm.inverse_sqrt(cov[None], num_iterations, 1e-5)
    (dcov,) = torch.autograd.grad(w, cov, grad[None])
    config = Config(num_iterations=num_iterations)
    assert_within("W", w[0].detach(), w_exact, None, w_floor(cov[None].detach(), w.detach(), config), 1.0)
    floor = dcov_floor(cov[None].detach(), w.detach(), grad, config)
    assert_within("dcov", dcov, dcov_exact, None, floor, 1.0)


def test_reference_by_inverses_is_eq_2() -> None:
    """Where the eigenvalues are distinct both references hold."""
    sigma = inputs.covariance(inputs.spectrum(5, 100.0))[None].requires_grad_()
    grad = torch.randn(1, 5, 5, dtype=torch.float64, generator=inputs.generator(3))
    results = []
    for path in (dbn.zca, dbn.zca_by_inverses):
        w = path(sigma)
        results.append((w.detach(), sym(torch.autograd.grad(w, sigma, grad)[0])))
    config = Config(eps=0.0, method="eigh")
    floors = (w_floor(sigma.detach(), results[0][0], config), dcov_floor(sigma.detach(), results[0][0], grad, config))
    for label, one, other, floor in zip(("W", "dcov"), *results, floors, strict=True):
        assert_within(label, other, one, None, floor, 1.0)


COV = torch.eye(3).repeat(2, 1, 1)


@pytest.mark.parametrize(
    ("cov", "options", "error", "expected", "got"),
    [
        ([1.0], {}, TypeError, "torch.Tensor", "list"),
        (COV.half(), {}, TypeError, "float32 or float64", "float16"),
        (COV.long(), {}, TypeError, "float32 or float64", "int64"),
        (COV[0], {}, ValueError, "(G, d, d)", "(3, 3)"),
        (COV[:, :2], {}, ValueError, "(G, d, d)", "(2, 2, 3)"),
        (COV, {"num_iterations": -1}, ValueError, "at least 0", "-1"),
        (COV, {"num_iterations": 2.5}, TypeError, "int", "2.5"),
        (COV, {"eps": -1e-5}, ValueError, "at least 0", "-1e-05"),
        (COV, {"eps": float("nan")}, ValueError, "at least 0", "nan"),
        (COV, {"eps": float("inf")}, ValueError, "finite", "inf"),
        (COV, {"eps": "1"}, TypeError, "number", "'1'"),
        (COV, {"scaling": "det"}, ValueError, "trace, frobenius", "'det'"),
        (COV, {"method": "svd"}, ValueError, "newton, eigh", "'svd'"),
        (COV, {"method": None}, ValueError, "newton, eigh", "None"),
    ],
    ids=["list", "half", "integer", "rank", "not-square", "negative-T", "fractional-T", "negative-eps", "nan-eps",
         "infinite-eps", "string-eps", "scaling", "method", "no-method"],
)  # fmt: skip
def test_wrong_arguments(
    cov: object, options: dict[str, object], error: type[Exception], expected: str, got: str
) -> None:
    with pytest.raises(error) as raised:
        nk.ops.inverse_sqrt(cov, **options)  # type: ignore[arg-type]
    assert expected in str(raised.value) and got in str(raised.value)
