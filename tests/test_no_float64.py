"""Devices without float64: every public op, layer and measure runs on a pretended one, and agrees with the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import normkernels as nk
from normkernels import _warnings
from normkernels.dispatch import record
from normkernels.eager import devices
from normkernels.eager.devices import has_float64
from normkernels.primitives.kernel_spectrum.onnx import kernel_spectrum
from normkernels.primitives.spectral_filter.onnx import spectral_filter
from tests.oracles import inputs
from tests.pretended import DEVICE, LACKING, PretendedTensor, pretended
from tests.tolerances import assert_agree

CPU = torch.device("cpu")
Results = Sequence[Tensor]
Case = Callable[[torch.device], Results]


def data(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32, mean: float = 1.0) -> Tensor:
    values = torch.randn(shape, dtype=torch.float32, generator=inputs.generator(len(shape) + sum(shape))) + mean
    return values.to(dtype).to(device)


def leaf(device: torch.device, *shape: int, **options: Any) -> Tensor:
    return data(device, *shape, **options).requires_grad_()


def with_gradients(result: Tensor | Sequence[Tensor], *leaves: Tensor) -> Results:
    """Return the results, and the gradients of the first one."""
    results = [result] if isinstance(result, Tensor) else [*result]
    # Flipped, because unflipped it may be x itself, to which a normalization is blind: all of dx would cancel.
    gradient = data(results[0].device, *results[0].shape, dtype=results[0].dtype, mean=0.0).flip(0)
    return [*(r.detach() for r in results), *torch.autograd.grad(results[0], leaves, gradient)]


def twice(function: Callable[..., Tensor], *leaves: Tensor) -> Results:
    y = function(*leaves)
    first = torch.autograd.grad(y, leaves, data(y.device, *y.shape, mean=0.0), create_graph=True)
    second = torch.autograd.grad([(g * data(g.device, *g.shape)).sum() for g in first], leaves)
    return [*(g.detach() for g in first), *second]


def trained(make: Callable[[], nn.Module], *shape: int, dtype: torch.dtype = torch.float32) -> Case:
    """Return a case with a layer in training, its gradients and buffers, and what it gives in evaluation."""

    def case(device: torch.device) -> Results:
        torch.manual_seed(0)
        layer = make().to(dtype).to(device)
        x = leaf(device, *shape, dtype=dtype)
        results = with_gradients(layer(x), x, *layer.parameters())
        return [*results, *layer.buffers(), layer.eval()(x).detach()]

    return case


def bnp(device: torch.device) -> Results:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 9, 2)).to(device)
    preconditioner = nk.optim.BNP(net)
    for _ in range(2):
        net.zero_grad()
        net(data(device, 6, 3, 5, 5)).square().sum().backward()
        preconditioner.step()
    state = [value for layer in preconditioner.state_dict().values() for value in layer.values()]
    return [*(p.grad for p in net.parameters() if p.grad is not None), *(v for v in state if isinstance(v, Tensor))]


def parametrized(make: Callable[..., nn.Module]) -> Case:
    return trained(lambda: make(nn.Conv2d(4, 6, 3)), 3, 4, 6, 6)


def orthogonality(device: torch.device) -> Results:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3).to(device)
    return with_gradients(nk.penalties.orthogonality(conv), conv.weight)


def classifier(device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network, samples in [0, 1] and their classes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 16, 3)).to(device)
    x = data(CPU, 5, 2, 6, 6).sigmoid().to(device)
    return net, x, net.eval()(x).argmax(1)


def hessian(device: torch.device) -> Results:
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 2).to(device), data(device, 50, 4)
    condition = nk.analysis.hessian_condition(
        lambda: layer(x).square().mean(), layer, mean=x.mean(0), variance=x.var(0, correction=0)
    )
    return [torch.tensor(value) for value in condition]


def gaps(device: torch.device) -> Results:
    net, x, _ = classifier(device)
    loss = net.train()(x).square().mean()
    rows = nk.analysis.scale_invariance_gap(net, loss, per_row=True)
    return [row.cpu() for row in rows.values()]


def attacked(basis: str) -> Case:
    def case(device: torch.device) -> Results:
        options = {"eps": 0.3, "max_queries": 40, "basis": basis, "generator": inputs.generator(1)}
        return nk.analysis.simba(*classifier(device), **options)  # type: ignore[arg-type]

    return case


def tracked(device: torch.device) -> Results:
    net, _, _ = classifier(device)
    measures = {"norm": nk.analysis.weight_norms, "gap": nk.analysis.batch_norm_gaps}
    tracker = nk.analysis.Tracker(net, measures)  # type: ignore[arg-type]
    tracker.record(0)
    return [torch.tensor(row["value"], dtype=torch.float64) for row in tracker.rows]


def pruned(device: torch.device) -> Results:
    net, _, _ = classifier(device)
    return [torch.tensor(c.value) for c in nk.analysis.pruning_candidates(net, gamma_below=2.0, similar_within=1.0)]


def noisy(device: torch.device) -> Results:
    return [nk.analysis.gaussian_noise(classifier(device)[1], 0.1, generator=inputs.generator(1))]


def disturbance(device: torch.device) -> Results:
    return [nk.analysis.snd(lambda x: x - x.mean(0), data(device, 9, 4), 4, 3, generator=inputs.generator(1))]


def convolution(measure: Callable[..., Tensor], **options: Any) -> Case:
    def case(device: torch.device) -> Results:
        spectrum = data(device, 4, 9, 8, mean=5.0)
        return [measure(data(device, 4, 3, 3, 2), (9, 8), spectrum=spectrum, **options)]

    return case


def synchronized(make: Callable[[], nn.Module]) -> Case:
    def case(device: torch.device) -> Results:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            return trained(make, 6, 8, 4, 4)(device)
        finally:
            dist.destroy_process_group()

    return case


def mixed(d: torch.device) -> Results:
    W = data(d, 2, 4, 4).requires_grad_()
    x, mean, weight, bias = leaf(d, 6, 8, 3, 3), leaf(d, 8), leaf(d, 8, mean=2.0), leaf(d, 8, mean=3.0)
    return with_gradients(nk.ops.whiten(x, mean, W, weight, bias), x, mean, W, weight, bias)


def preconditioned(d: torch.device) -> Results:
    weights, biases = [data(d, 4, 3, 3, 3), data(d, 5, 4)], [data(d, 4), None]
    variances = [data(d, 3).square(), data(d, 4).square()]
    return [*nk.ops.precondition(weights, biases, [data(d, 3), data(d, 4)], variances, [1, 1], [2.0, 3.0]), *weights]


def covariances(d: torch.device) -> Tensor:
    x = data(CPU, 2, 4, 40)
    return (x @ x.mT / 40).to(d).requires_grad_()


def filtered(z: Tensor, v: Tensor) -> Tensor:
    return nk.ops.spectral_filter(z, v, (slice(1, 9), slice(0, 8, 2)))


def spectrum_near_zero(weight: Tensor) -> Tensor:
    """Return the spectrum of a kernel whose power vanishes at frequency 0, where float32 alone has no digit."""
    return nk.ops.kernel_spectrum(weight - weight.detach().mean((2, 3), keepdim=True), (9, 8))


CASES: dict[str, Case] = {
    "ops.moments": lambda d: with_gradients(nk.ops.moments(x := leaf(d, 6, 8, 3, 3), 4)[2], x),
    "ops.cross_moments": lambda d: list(nk.ops.cross_moments(data(d, 6, 8, 3, 3), data(d, 6, 8, 3, 3), data(d, 8), 4)),
    "ops.inverse_sqrt": lambda d: with_gradients(nk.ops.inverse_sqrt(c := covariances(d)), c),
    "ops.inverse_sqrt: eigh": lambda d: with_gradients(nk.ops.inverse_sqrt(c := covariances(d), method="eigh"), c),
    "ops.whiten": mixed,
    "ops.iter_norm": lambda d: with_gradients(nk.ops.iter_norm(x := leaf(d, 6, 8, 3, 3), 4, 5, 1e-5), x),
    "ops.pop_norm": lambda d: with_gradients(nk.ops.pop_norm(x := leaf(d, 6, 8, 3, 3), None, None, 4.0, 1e-5), x),
    "ops.precondition": preconditioned,
    "ops.kernel_spectrum": lambda d: with_gradients(nk.ops.kernel_spectrum(w := leaf(d, 4, 3, 3, 2), (9, 8)), w),
    "ops.kernel_spectrum: twice": lambda d: twice(spectrum_near_zero, leaf(d, 4, 3, 3, 2)),
    "ops.spectral_filter": lambda d: with_gradients(filtered(z := leaf(d, 2, 4, 9, 8), v := leaf(d, 4, 9, 8)), z, v),
    "ops.spectral_filter: twice": lambda d: twice(filtered, leaf(d, 2, 4, 9, 8), leaf(d, 4, 9, 8)),
    "layers.IterNorm1d": trained(lambda: nk.IterNorm1d(8, 4), 40, 8),
    "layers.IterNorm2d": trained(lambda: nk.IterNorm2d(8, 4), 6, 8, 4, 4),
    "layers.IterNorm2d: bfloat16": trained(lambda: nk.IterNorm2d(8, 4), 6, 8, 4, 4, dtype=torch.bfloat16),
    "layers.IterNorm3d": trained(lambda: nk.IterNorm3d(8, 4), 6, 8, 2, 3, 3),
    "layers.DBN1d": trained(lambda: nk.DBN1d(8, 4), 40, 8),
    "layers.DBN2d": trained(lambda: nk.DBN2d(8, 4), 6, 8, 4, 4),
    "layers.DBN3d": trained(lambda: nk.DBN3d(8, 4), 6, 8, 2, 3, 3),
    "layers.POPNorm1d": trained(lambda: nk.POPNorm1d(8), 40, 8),
    "layers.POPNorm2d": trained(lambda: nk.POPNorm2d(8), 6, 8, 4, 4),
    "layers.POPNorm2d: float16": trained(lambda: nk.POPNorm2d(8), 6, 8, 4, 4, dtype=torch.float16),
    "layers.POPNorm3d": trained(lambda: nk.POPNorm3d(8), 6, 8, 2, 3, 3),
    "layers.ConvNorm1d": trained(lambda: nk.ConvNorm1d(4, 6, 3, detach_spectrum=False), 5, 4, 9),
    "layers.ConvNorm2d": trained(lambda: nk.ConvNorm2d(4, 6, 3, detach_spectrum=False), 3, 4, 6, 7),
    "layers.ConvNorm2d: bfloat16": trained(lambda: nk.ConvNorm2d(4, 6, 3, 2, 1), 3, 4, 6, 7, dtype=torch.bfloat16),
    "layers.SyncIterNorm": synchronized(lambda: nk.SyncIterNorm(8, 4)),
    "layers.SyncDBN": synchronized(lambda: nk.SyncDBN(8, 4)),
    "optim.BNP": bnp,
    "parametrizations.oni": parametrized(nk.parametrizations.oni),
    "parametrizations.weight_standardization": parametrized(nk.parametrizations.weight_standardization),
    "parametrizations.centered_weight_norm": parametrized(nk.parametrizations.centered_weight_norm),
    "parametrizations.spectral_norm": parametrized(nk.parametrizations.spectral_norm),
    "parametrizations.weight_norm": parametrized(nk.parametrizations.weight_norm),
    "penalties.orthogonality": orthogonality,
    "analysis.Tracker": tracked,
    "analysis.accuracy": lambda d: [torch.tensor(nk.analysis.accuracy(*classifier(d)))],
    "analysis.batch_norm_gaps": lambda d: [
        t.detach() for gap in nk.analysis.batch_norm_gaps(classifier(d)[0]).values() for t in gap
    ],
    "analysis.bim": lambda d: [nk.analysis.bim(*classifier(d), eps=0.1, step_size=0.03, num_steps=3)],
    "analysis.channel_condition": convolution(nk.analysis.channel_condition),
    "analysis.conv_singular_values": convolution(nk.analysis.conv_singular_values, groups=2),
    "analysis.covariance_condition": lambda d: [nk.analysis.covariance_condition(data(d, 50, 4))],
    "analysis.decompose": lambda d: nk.analysis.decompose(data(d, 5, 7)),
    "analysis.gaussian_noise": noisy,
    "analysis.hessian_condition": hessian,
    "analysis.layer_spectral_norm": convolution(nk.analysis.layer_spectral_norm),
    "analysis.pruning_candidates": pruned,
    "analysis.scale_invariance_gap": gaps,
    "analysis.simba: pixel": attacked("pixel"),
    "analysis.simba: dct": attacked("dct"),
    "analysis.snd": disturbance,
    "analysis.weight_norms": lambda d: [
        torch.tensor(norm) for norm in nk.analysis.weight_norms(classifier(d)[0]).values()
    ],
}
# Results of measures, named tuples of numbers and of what lies beside them, which nothing computes with; and torch's
# own parametrization under our name.
RESULTS = {"orthogonal", "BatchNormGap", "Decomposition", "HessianCondition", "PruningCandidate", "SimBAResult"}
NO_TENSORS = {"flop_formulas"}


def cases(*, of: Callable[[str], bool] = lambda _: True) -> list[str]:
    return [name for name in CASES if of(name)]


@pytest.fixture
def _warned_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_warnings, "warned", set())


def on_pretended_device(case: Case) -> Results:
    with pretended():
        return [t.held if isinstance(t, PretendedTensor) else t for t in case(DEVICE)]


@pytest.mark.filterwarnings("ignore:what needs float64 is computed on the CPU")
@pytest.mark.parametrize("name", cases())
def test_nothing_is_float64_and_the_result_is_right(name: str) -> None:
    """pretended() raises where an operator, inside of an op or not, makes float64 there or mixes devices."""
    assert_agree([t.detach() for t in on_pretended_device(CASES[name])], [t.detach() for t in CASES[name](CPU)])


@pytest.mark.filterwarnings("ignore:what needs float64 is computed on the CPU")
def test_what_is_exported_to_onnx() -> None:
    """torch.onnx.export traces these in the place of the ops, where the model is."""

    def case(device: torch.device) -> Results:
        v = kernel_spectrum(data(device, 4, 3, 3, 2), [9, 8], 1e-8, [1, 1])
        return [v, spectral_filter(data(device, 2, 4, 9, 8), v, [0, 1, 0, 1], [1, 1, 8, 0, 2, 4])]

    assert_agree(on_pretended_device(case), case(CPU))
    with pretended():
        assert {t.device for t in case(DEVICE)} == {DEVICE}


def test_every_public_name_has_a_case() -> None:
    public = {
        f"{module.__name__.removeprefix('normkernels.')}.{name}"
        for module in (nk.ops, nk.layers, nk.optim, nk.parametrizations, nk.penalties, nk.analysis)
        for name in getattr(module, "__all__", ["orthogonality"])
        if name not in RESULTS | NO_TENSORS
    }
    assert public == {name.partition(":")[0] for name in CASES}


class Watch(TorchDispatchMode):
    """Collects the operators that make float64, on any device, those inside of ops, too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "normkernels":
            with self:
                return record.IMPLEMENTATIONS[func._schema.name.partition("::")[2]]["eager"](*args, **kwargs or {})
        result = func(*args, **kwargs or {})
        self.seen += [str(func) for t in tree_leaves(result) if isinstance(t, Tensor) and t.dtype in LACKING]
        return result


def trains_without_the_host(name: str) -> bool:
    """Return whether a case is part of a training step that does not wait for the CPU.

    Eigendecompositions do wait for it.
    """
    return not name.startswith("analysis.") and "eigh" not in name and "DBN" not in name and name != WAITS


WAITS = "ops.kernel_spectrum: twice"


@pytest.mark.parametrize("name", cases(of=trains_without_the_host))
def test_a_training_step_needs_no_float64_on_the_cpu_either(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMKERNELS_NO_FLOAT64", "1")
    with Watch() as watch:
        CASES[name](CPU)
    assert not watch.seen
    monkeypatch.setenv("NORMKERNELS_NO_FLOAT64", "0")


def test_the_watch_sees_inside_of_ops() -> None:
    with Watch() as watch:
        nk.ops.kernel_spectrum(data(CPU, 4, 3, 3, 2), (9, 8))
    assert any("bmm" in name for name in watch.seen)


def test_float64_data_stays_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMKERNELS_NO_FLOAT64", "1")
    weight = data(CPU, 4, 3, 3, 2, dtype=torch.float64)
    pretended = nk.ops.kernel_spectrum(weight, (9, 8))
    monkeypatch.setenv("NORMKERNELS_NO_FLOAT64", "0")
    assert torch.equal(pretended, nk.ops.kernel_spectrum(weight, (9, 8))) and pretended.dtype == torch.float64


def test_a_default_device_without_float64() -> None:
    """torch.set_default_device reaches into ops: what they make on the CPU must say so."""
    with pretended(), torch.device(DEVICE):
        layer = nk.ConvNorm2d(3, 4, 3)
        y = layer(torch.ones(2, 3, 17, 17, device=CPU).to(DEVICE))
        on_cpu = nk.ConvNorm2d(3, 4, 3, device=CPU)(torch.ones(2, 3, 17, 17, device=CPU))
    assert y.device == DEVICE and on_cpu.device == CPU


@pytest.mark.usefixtures("_warned_anew")
def test_the_cpu_is_taken_with_one_warning() -> None:
    x = data(CPU, 50, 4)
    with pretended(), pytest.warns(UserWarning, match="computed on the CPU: mps has no float64") as warned:
        for _ in range(2):
            nk.analysis.covariance_condition(x.to(DEVICE))
    assert len(warned) == 1


@pytest.mark.usefixtures("_warned_anew")
@pytest.mark.parametrize("name", ["ops.spectral_filter: twice", "layers.ConvNorm1d", "layers.ConvNorm2d: bfloat16"])
def test_without_fourier_transforms_they_take_the_cpu_with_one_warning(name: str) -> None:
    expected = CASES[name](CPU)
    devices._transforms.cache_clear()
    with pretended("_fft_r2c"), pytest.warns(UserWarning) as warned:
        results = CASES[name](DEVICE)
    devices._transforms.cache_clear()
    assert all(isinstance(t, PretendedTensor) for t in results)
    assert_agree([t.held for t in results], [t.detach() for t in expected])  # type: ignore[attr-defined]
    about_filter = [w for w in warned if "torch.fft does not work on mps" in str(w.message)]
    assert len(about_filter) == 1


@pytest.mark.parametrize(("value", "expected"), [("1", False), ("0", True), (None, True)])
def test_the_environment_decides(value: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is None:
        monkeypatch.delenv("NORMKERNELS_NO_FLOAT64", raising=False)
    else:
        monkeypatch.setenv("NORMKERNELS_NO_FLOAT64", value)
    assert has_float64(CPU) is expected
    assert has_float64(DEVICE) is False


# The pretended device itself.


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda x: x.double(), TypeError),
        (lambda x: torch.zeros(2, dtype=torch.float64, device=x.device), TypeError),
        (lambda x: x + torch.ones(3, dtype=torch.float64), RuntimeError),
        (lambda x: x @ torch.eye(3), RuntimeError),
        (lambda x: torch.linalg.eigvalsh(x), NotImplementedError),
        (lambda x: torch.linalg.svdvals(x), NotImplementedError),
    ],
)
def test_the_pretended_device_refuses(call: Callable[[Tensor], Tensor], error: type[Exception]) -> None:
    with pretended(), pytest.raises(error):
        call(torch.ones(3, 3).to(DEVICE))
