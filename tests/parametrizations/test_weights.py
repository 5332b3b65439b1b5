"""ONI, weight standardization and centered weight normalization: values, gradients, every layer, torch's machinery."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkernels import parametrizations
from normkernels.parametrizations import centered_weight_norm, oni, weight_standardization

# torch.compile's own warnings, about torch's own code.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")

Parametrize = Callable[..., nn.Module]

# Every rank, tuple kernels, groups, depthwise, and the layouts with the output channels in dimension 1.
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "linear": lambda **k: nn.Linear(7, 4, **k),
    "linear-tall": lambda **k: nn.Linear(3, 8, **k),
    "conv1d": lambda **k: nn.Conv1d(3, 4, 5, **k),
    "conv2d": lambda **k: nn.Conv2d(3, 4, (3, 2), stride=2, **k),
    "conv2d-groups": lambda **k: nn.Conv2d(4, 6, (1, 3), groups=2, **k),
    "conv2d-depthwise": lambda **k: nn.Conv2d(6, 12, (2, 2), groups=6, **k),
    "conv3d": lambda **k: nn.Conv3d(2, 3, (1, 2, 3), **k),
    "transpose1d": lambda **k: nn.ConvTranspose1d(4, 3, 3, **k),
    "transpose2d-groups": lambda **k: nn.ConvTranspose2d(4, 6, (3, 2), groups=2, **k),
    "transpose3d": lambda **k: nn.ConvTranspose3d(2, 5, (1, 2, 2), **k),
}
EVERY_LAYER = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
ALL: dict[str, Parametrize] = {"oni": oni, "ws": weight_standardization, "cwn": centered_weight_norm}
EACH = pytest.mark.parametrize("normalize", ALL.values(), ids=ALL.keys())
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


def rows(module: Any, weight: Tensor) -> Tensor:
    """Return one row for each output channel; in a grouped ConvTranspose it has the inputs of its group."""
    if not getattr(module, "transposed", False):
        return weight.reshape(weight.shape[0], -1)
    c_in, n = weight.shape[0] // module.groups, weight.shape[1]
    return torch.stack([
        weight[g * c_in : (g + 1) * c_in, o].reshape(-1) for g in range(module.groups) for o in range(n)
    ])  # fmt: skip


def oni_oracle(Z: Tensor, num_iterations: int) -> Tensor:
    """Return ONI's recursion as it is written, on the (n, n) Gram matrix whatever n, in float64."""
    n, d = Z.shape
    Z = Z.double()
    if n != d:
        Z = Z - Z.mean(1 if n < d else 0, keepdim=True)
    V = Z / (Z @ Z.T).norm().sqrt()
    B = torch.eye(n, dtype=torch.float64)
    for _ in range(num_iterations):
        B = 1.5 * B - 0.5 * B @ B @ B @ (V @ V.T)
    return B @ V


def ws_oracle(Z: Tensor, eps: float = 1e-10) -> Tensor:
    Z = Z.double()
    return torch.stack([(z - z.mean()) / ((z - z.mean()).square().mean() + eps).sqrt() for z in Z])


def cwn_oracle(Z: Tensor, g: Tensor | None = None) -> Tensor:
    centred = Z.double() - Z.double().mean(1, keepdim=True)
    return centred if g is None else g.double().view(-1, 1) * centred / centred.norm(dim=1, keepdim=True)


ORACLES = {oni: lambda Z: oni_oracle(Z, 5), weight_standardization: ws_oracle, centered_weight_norm: cwn_oracle}


# Values and gradients.


@EVERY_LAYER
@EACH
def test_against_the_equation(make: Callable[..., nn.Module], normalize: Parametrize) -> None:
    module = make(dtype=torch.float64)
    before = module.weight.detach().clone()
    assert normalize(module) is module
    assert module.weight.shape == before.shape
    torch.testing.assert_close(rows(module, module.weight), ORACLES[normalize](rows(module, before)))


@EVERY_LAYER
@EACH
def test_gradients(make: Callable[..., nn.Module], normalize: Parametrize) -> None:
    """Gradients of second order are right, too: everything inside is differentiable twice."""
    module = normalize(make(dtype=torch.float64))
    originals = [p.detach().requires_grad_() for p in module.parametrizations.weight.parameters()]
    parametrization = module.parametrizations.weight[0]
    assert torch.autograd.gradcheck(parametrization, originals)
    if sum(p.numel() for p in originals) < 30:
        assert torch.autograd.gradgradcheck(parametrization, originals)


@EACH
@HALF
def test_half_types_are_computed_in_float32(normalize: Parametrize, dtype: torch.dtype) -> None:
    half, single = nn.Conv2d(5, 4, 3, dtype=dtype), nn.Conv2d(5, 4, 3)
    with torch.no_grad():
        half.weight.mul_(100)  # a Gram matrix overflows float16
        single.weight.copy_(half.weight)
    normalize(half)
    normalize(single)
    assert half.weight.dtype == dtype
    if normalize is centered_weight_norm:  # g is stored in the weight's own type, too
        single.parametrizations.weight.original0.data.copy_(half.parametrizations.weight.original0)
    assert torch.equal(half.weight, single.weight.to(dtype))


@EACH
def test_meta_device(normalize: Parametrize) -> None:
    """Models are made there before they have weights; and it has no autocast."""
    assert normalize(nn.Conv2d(5, 4, 3, device="meta")).weight.shape == (4, 5, 3, 3)


@EACH
def test_autocast_does_not_reach_the_weight(normalize: Parametrize) -> None:
    module = normalize(nn.Linear(7, 4))
    expected = module.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.weight, expected)


@pytest.mark.parametrize("normalize", [oni, centered_weight_norm], ids=["oni", "cwn"])
@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e10, 1e25])
def test_any_scale(normalize: Parametrize, scale: float) -> None:
    """The square of 1e-36 is zero in float32, that of 1e25 infinite."""
    module, reference = nn.Conv2d(5, 4, 3), nn.Conv2d(5, 4, 3)
    nn.init.normal_(module.weight)
    with torch.no_grad():
        reference.weight.copy_(module.weight)
        module.weight.mul_(scale)
    normalize(module)
    normalize(reference)
    module.weight.mul(torch.randn_like(module.weight)).sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parametrizations.parameters())
    unit = module.weight if normalize is oni else module.weight / scale
    torch.testing.assert_close(unit, reference.weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-20, 1e10])
def test_weight_standardization_at_other_scales(scale: float) -> None:
    """eps is absolute: far below it there is nothing left, far above it nothing is changed."""
    module, reference = nn.Conv2d(5, 4, 3), nn.Conv2d(5, 4, 3)
    with torch.no_grad():
        reference.weight.copy_(module.weight)
        module.weight.mul_(scale)
    weight_standardization(module).weight.mul(torch.randn_like(module.weight)).sum().backward()
    assert module.parametrizations.weight.original.grad.isfinite().all()
    expected = weight_standardization(reference).weight if scale > 1 else torch.zeros_like(reference.weight)
    torch.testing.assert_close(module.weight, expected, rtol=1e-5, atol=1e-5)


@EACH
@pytest.mark.parametrize("what", ["zeros", "constant", "fan-in of 1", "one zero filter"])
def test_nothing_to_normalize(normalize: Parametrize, what: str) -> None:
    """Filters with nothing left once centred have finite values and gradients."""
    module = nn.Conv2d(4, 4, 1, groups=4) if what == "fan-in of 1" else nn.Conv2d(4, 3, 2)
    with torch.no_grad():
        if what in ("zeros", "constant"):
            module.weight.fill_(0.0 if what == "zeros" else 0.5)
        elif what == "one zero filter":
            module.weight[1] = 0
    normalize(module)
    weight = module.weight
    weight.mul(torch.randn_like(weight)).sum().backward()
    assert weight.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parametrizations.parameters())
    if what in ("zeros", "constant") or (what == "fan-in of 1" and normalize is not oni):
        assert torch.equal(weight, torch.zeros_like(weight))
    if what == "one zero filter":
        assert torch.equal(weight[1], torch.zeros_like(weight[1])) and weight[0].abs().sum() > 0


# ONI.


@EVERY_LAYER
def test_oni_reaches_orthogonality(make: Callable[..., nn.Module]) -> None:
    """Rows become orthonormal if they are fewer than the fan-in, columns else, and the side's mean is zero."""
    module = oni(make(dtype=torch.float64), num_iterations=30)
    W = rows(module, module.weight)
    n, d = W.shape
    gram = W @ W.T if n <= d else W.T @ W
    torch.testing.assert_close(gram, torch.eye(min(n, d), dtype=torch.float64), rtol=0, atol=1e-9)
    if n != d:
        mean = W.mean(1 if n < d else 0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-12)


def test_oni_column_mode() -> None:
    """Columns are orthonormal. ONI's code divides twice in column mode: diag Q^T Q is .07 to .2."""
    for shape in ((64, 16), (64, 3), (100, 30)):
        module = nn.Linear(shape[1], shape[0])
        nn.init.normal_(module.weight)
        W = oni(module, num_iterations=9).weight
        torch.testing.assert_close(W.T @ W, torch.eye(shape[1]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (16, 3, 3, 3), (64, 32, 1, 1), (32, 1, 3, 3), (48, 48, 1, 1)])
def test_oni_of_normal_weights(shape: tuple[int, ...]) -> None:
    """In float32 no singular value exceeds 1 by more than rounding. ONI's code: NaN for N(0, 1) weights."""
    module = nn.Conv2d(shape[1], shape[0], shape[2:])
    nn.init.normal_(module.weight)
    for num_iterations in (5, 9, 40):
        trial = oni(copy.deepcopy(module), num_iterations=num_iterations)
        values = torch.linalg.svdvals(trial.weight.detach().flatten(1))
        trial.weight.square().sum().backward()
        assert values.max() < 1 + 1e-3
        assert trial.parametrizations.weight.original.grad.isfinite().all()
    assert values.min() > 0.99 or shape[2:] == (1, 1)  # a random square matrix loses its smallest one in eps


@pytest.mark.parametrize(("shape", "five", "seven"), [((64, 576), 0.96, 0.9999), ((512, 4608), 0.80, 0.99)])
def test_oni_converges_as_documented(shape: tuple[int, int], five: float, seven: float) -> None:
    for num_iterations, bound in ((5, five), (7, seven)):
        module = nn.Linear(shape[1], shape[0])
        nn.init.normal_(module.weight)
        W = oni(module, num_iterations=num_iterations).weight.detach()
        assert torch.linalg.eigvalsh(W @ W.T).min().sqrt() > bound


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_oni_of_a_rank_deficient_weight(rank: int) -> None:
    """Rounding makes zero eigenvalues negative, from where the iteration diverges: T = 40 would show it."""
    for seed in range(5):
        torch.manual_seed(seed)
        module = nn.Linear(500, 64)
        with torch.no_grad():
            module.weight.copy_(torch.randn(64, rank) @ torch.randn(rank, 500))
        oni(module, num_iterations=40)
        values = torch.linalg.svdvals(module.weight.detach())
        module.weight.square().sum().backward()
        assert module.parametrizations.weight.original.grad.isfinite().all()
        assert values[rank - 1] > 0.99 and values[0] < 1.01
        assert values[rank] < 0.1


def test_oni_scale_and_no_iterations() -> None:
    a, b, c = (nn.Linear(9, 4) for _ in range(3))
    b.load_state_dict(a.state_dict())
    c.load_state_dict(a.state_dict())
    torch.testing.assert_close(oni(a, scale=math.sqrt(2)).weight, math.sqrt(2) * oni(b).weight)
    torch.testing.assert_close(
        oni(c, num_iterations=0).weight.double(), oni_oracle(c.parametrizations.weight.original, 0)
    )


# The other two.


def test_weight_standardization_has_unit_variance_and_an_absolute_eps() -> None:
    conv = weight_standardization(nn.Conv2d(8, 4, 3))
    var, mean = torch.var_mean(conv.weight.flatten(1), 1, correction=0)
    torch.testing.assert_close(var, torch.ones(4), rtol=1e-5, atol=0)
    torch.testing.assert_close(mean, torch.zeros(4), rtol=0, atol=1e-6)
    other = nn.Linear(6, 2, dtype=torch.float64)
    before = other.weight.detach().clone()
    torch.testing.assert_close(weight_standardization(other, eps=0.3).weight, ws_oracle(before, 0.3))


def test_centered_weight_norm_learns_the_length() -> None:
    conv = centered_weight_norm(nn.Conv2d(5, 4, 3, dtype=torch.float64))
    g, v = conv.parametrizations.weight.original0, conv.parametrizations.weight.original1
    assert g.shape == (4, 1, 1, 1) and g.requires_grad and v.shape == (4, 5, 3, 3)
    with torch.no_grad():
        g.copy_(torch.tensor([1.0, -2.0, 3.0, 0.5]).view(4, 1, 1, 1))
        v.mul_(7)
    torch.testing.assert_close(conv.weight.flatten(1), cwn_oracle(v.detach().flatten(1), g.detach()))
    torch.testing.assert_close(conv.weight.flatten(1).norm(dim=1), g.detach().abs().flatten())


# torch's machinery.


@EACH
def test_copy_state_dict_and_removal(normalize: Parametrize) -> None:
    module = normalize(nn.Conv2d(3, 4, (3, 2)))
    twin = copy.deepcopy(module)
    assert torch.equal(twin.weight, module.weight)
    other = normalize(nn.Conv2d(3, 4, (3, 2)))
    assert not torch.equal(other.weight, module.weight)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight, module.weight)
    expected = module.weight.detach().clone()
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    assert torch.equal(module.weight, expected) and isinstance(module.weight, nn.Parameter)


@EACH
def test_assigning_a_weight(normalize: Parametrize) -> None:
    """An assigned weight is normalized, by right_inverse."""
    module = normalize(nn.Linear(7, 4, dtype=torch.float64))
    given = torch.randn(4, 7, dtype=torch.float64)
    module.weight = given
    torch.testing.assert_close(module.weight, ORACLES[normalize](given))


@EACH
@pytest.mark.parametrize("make", [LAYERS["conv2d"], LAYERS["transpose2d-groups"]], ids=["conv2d", "transpose2d"])
def test_compiles_as_one_graph(normalize: Parametrize, make: Callable[..., nn.Module]) -> None:
    module = normalize(make())
    x = torch.randn(2, module.in_channels, 6, 5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    weight = torch.compile(lambda: module.weight.clone(), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(weight(), module.weight)
    gradients = []
    for model in (compiled, module):
        module.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in module.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


@EACH
def test_trains(normalize: Parametrize) -> None:
    """The stored parameter moves, and the loss falls."""
    module = normalize(nn.Linear(12, 4))
    x, y = torch.randn(64, 12), torch.randn(64, 4)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (module(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_other_parameters() -> None:
    attention = oni(nn.MultiheadAttention(8, 2), "in_proj_weight", num_iterations=20)
    W = attention.in_proj_weight
    torch.testing.assert_close(W.T @ W, torch.eye(8), rtol=0, atol=1e-3)


def test_torchs_own_are_re_exported() -> None:
    for name in ("orthogonal", "spectral_norm", "weight_norm"):
        assert getattr(parametrizations, name) is getattr(torch.nn.utils.parametrizations, name)


# Bad input.


@EACH
@pytest.mark.parametrize(
    ("make", "name", "error", "message"),
    [
        (lambda: 3, "weight", TypeError, r"module: expected an nn.Module, got int"),
        (lambda: nn.Linear(2, 3), 7, TypeError, r"name: expected a str, got 7"),
        (lambda: nn.Linear(2, 3), "wieght", ValueError, r"name: expected .*\(weight, bias\), got 'wieght'"),
        (lambda: nn.ReLU(), "weight", ValueError, r"name: expected .*\(none\), got 'weight'"),
        (lambda: nn.Linear(2, 3), "bias", ValueError, r"bias: expected .*\(C_O, C_I / groups, \*k\), got \(3,\)"),
        (lambda: nn.Conv2d(2, 3, 1, dtype=torch.complex64), "weight", TypeError, r"weight: .*got torch.complex64"),
        (lambda: nn.LazyLinear(3), "weight", ValueError, r"weight: expected an initialized parameter"),
    ],
)  # fmt: skip
def test_bad_modules(normalize: Parametrize, make: Any, name: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        normalize(make(), name)


@pytest.mark.parametrize(
    ("normalize", "options", "error", "message"),
    [
        (oni, {"num_iterations": -1}, ValueError, r"num_iterations: expected at least 0, got -1"),
        (oni, {"num_iterations": 2.0}, TypeError, r"num_iterations: expected an int, got 2.0"),
        (oni, {"scale": 0.0}, ValueError, r"scale: expected more than 0, got 0.0"),
        (oni, {"scale": math.nan}, ValueError, r"scale: expected a finite number"),
        (weight_standardization, {"eps": -1e-5}, ValueError, r"eps: expected a finite number at least 0, got -1e-05"),
    ],
)  # fmt: skip
def test_bad_options(normalize: Parametrize, options: dict[str, Any], error: type[Exception], message: str) -> None:
    module = nn.Linear(2, 3)
    with pytest.raises(error, match=message):
        normalize(module, **options)
    assert not parametrize.is_parametrized(module)


def test_repr_shows_the_options() -> None:
    assert "num_iterations=7, scale=2.0" in repr(oni(nn.Linear(2, 3), num_iterations=7, scale=2))
    assert "eps=0.5" in repr(weight_standardization(nn.Linear(2, 3), eps=0.5))
