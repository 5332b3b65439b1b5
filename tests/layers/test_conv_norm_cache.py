"""ConvNorm in evaluation: the spectrum is remembered, and never stale."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import normkernels as nk
from normkernels.layers.conv_norm import CACHED_SIZES, _Spectra
from tests.layers.conv_norm_checks import (
    DETACH,
    NAMES,
    build,
    check,
    edit_data,
    edit_in_place,
    plane,
    result,
)
from tests.oracles.convnorm import Config
from tests.oracles.run import incoming_gradient
from tests.tolerances import largest
from tests.tolerances.spectral import inverse_root_error

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")


class Spectra(TorchDispatchMode):
    """Counts the calls of kernel_spectrum."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))

    def count(self) -> int:
        return sum(n for name, n in self.calls.items() if "kernel_spectrum" in name and "backward" not in name)


def test_spectrum_is_cached_in_evaluation() -> None:
    layer, x = build(3, 4, 3, Config(padding=1)), plane(2, 3, 9, 8)

    def spectra() -> int:
        with torch.no_grad(), Spectra() as seen:
            layer(x)
        return seen.count()

    assert [spectra(), spectra()] == [1, 1]
    layer.eval()
    spectra()
    assert spectra() == spectra() == 0
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] += 1
    assert spectra() == 1 and spectra() == 0
    assert not layer.train()(x).isnan().any() and spectra() == 1


def edit_numpy(layer: Any) -> None:
    layer.weight.detach().numpy()[1, 0] += 2


def replace_data(layer: Any) -> None:
    layer.weight.data = torch.randn_like(layer.weight)


def replace_parameter(layer: Any) -> None:
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def edit_in_inference_mode(layer: Any) -> None:
    with torch.inference_mode():
        layer.weight[:, 1].mul_(-3).add_(1)


def optimizer_step(layer: Any) -> None:
    layer(plane(2, 3, 9, 8)).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def fused_step(layer: Any) -> None:
    layer(plane(2, 3, 9, 8)).square().sum().backward()
    torch.optim.Adam(layer.parameters(), lr=0.1, fused=True).step()


def load(layer: Any, assign: bool = False) -> None:
    layer.load_state_dict({k: torch.randn_like(v) for k, v in layer.state_dict().items()}, assign=assign)


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(1, 3, 1, 1))

    def forward(self, w: Tensor) -> Tensor:
        return w + self.shift


def parametrization(layer: Any) -> None:
    parametrize.register_parametrization(layer, "weight", Shifted())


def edit_parametrization(layer: Any) -> None:
    parametrization(layer)
    layer(plane(2, 3, 9, 8))
    with torch.no_grad():
        layer.parametrizations.weight[0].shift[0, 1] = 5


def reset(layer: Any) -> None:
    layer.reset_parameters()


EDITS: dict[str, Callable[[Any], None]] = {
    f.__name__: f
    for f in (edit_numpy, edit_data, replace_data, replace_parameter, edit_in_place, edit_in_inference_mode,
              optimizer_step, fused_step, load, parametrization, edit_parametrization, reset)
}  # fmt: skip
EDITS["load-assign"] = lambda layer: load(layer, assign=True)


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference_mode"])
@pytest.mark.parametrize("edit", EDITS)
def test_cache_is_never_stale(edit: str, mode: str) -> None:
    """The cache sees each change of a weight between two evaluations; autograd's version counter misses two of them."""
    config = Config(padding=1)
    layer, x = build(3, 4, 3, config).eval(), plane(2, 3, 9, 8)
    context = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[mode]
    with context():
        before = layer(x), layer(x)
    EDITS[edit](layer)
    with context():
        after = layer(x)
    assert torch.equal(*before) and not torch.allclose(before[0], after)
    fresh = nk.ConvNorm2d(3, 4, 3, padding=1)
    fresh.load_state_dict({name: getattr(layer, name).detach() for name in NAMES})
    assert torch.equal(fresh(x), after)


def test_cache_follows_the_type_and_the_plane() -> None:
    config = Config(padding=1)
    layer = build(3, 4, 3, config).eval()
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        layer.to(dtype)
        for size in ((9, 8), (8, 9)):
            check(layer, plane(2, 3, *size, dtype=dtype), config)


@DETACH
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda c: c.__name__)
def test_gradients_in_evaluation(context: Any, detach: bool) -> None:
    """Gradients are as in training, also after the spectrum was remembered without a graph, and twice in a row."""
    config = Config(stride=2, padding=1, detach_spectrum=detach)
    layer, x = build(3, 4, 3, config), plane(2, 3, 9, 8)
    dy = incoming_gradient(layer(x))
    expected = result(layer, x, dy)
    layer.eval()
    with context():
        layer(x)
    for _ in range(2):
        got = result(layer, x, dy)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_frozen_in_evaluation() -> None:
    """Fine-tuning goes through a frozen layer: x still gets its gradient."""
    config = Config(padding=1)
    layer = build(3, 4, 3, config).eval().requires_grad_(False)
    x = plane(2, 3, 9, 8).requires_grad_()
    y = layer(x)
    y.backward(torch.ones_like(y))
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_functional_call_in_evaluation() -> None:
    """As in model averaging, weights from elsewhere are not the remembered ones."""
    layer, other = build(3, 4, 3).eval(), nk.ConvNorm2d(3, 4, 3)
    x = plane(2, 3, 9, 8)
    own = layer(x)
    assert torch.equal(torch.func.functional_call(layer, dict(other.named_parameters()), (x,)), other(x))
    assert torch.equal(layer(x), own)


# Where threads, replicas, transforms and options meet the cache.


@pytest.fixture
def _eager_switching() -> Iterator[None]:
    """Make threads switch a thousand times as often as they do by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def layer(**options: object) -> nk.ConvNorm2d:
    torch.manual_seed(0)
    made: nk.ConvNorm2d = nk.ConvNorm2d(3, 4, 3, padding=1, **options).eval()  # type: ignore[arg-type]
    return made


def fresh(module: nn.Module, x: Tensor) -> Tensor:
    """Return the output of a copy, whose cache is empty."""
    torch.manual_seed(0)
    copy = nk.ConvNorm2d(3, 4, 3, padding=1).eval()
    copy.load_state_dict({name: value.detach() for name, value in module.state_dict().items()})
    with torch.no_grad():
        result: Tensor = copy(x)
    return result


def in_threads(runs: list[Callable[[], None]]) -> None:
    failures: list[BaseException] = []

    def guarded(run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.usefixtures("_eager_switching")
def test_replicas_have_their_own_spectra() -> None:
    """DataParallel's replicas share what is no parameter. Different weights make a wrong spectrum visible."""
    module = layer()
    x = torch.randn(1, 3, 6, 6)
    replicas = []
    for scale in (1.0, -3.0):
        replica = module._replicate_for_data_parallel()
        for name, parameter in module.named_parameters():
            value = parameter.detach().clone()
            replica.__dict__[name] = (
                value + scale * torch.arange(value.numel()).view_as(value) if value.dim() == 4 else value
            )
        replicas.append(replica)
    expected = []
    for replica in replicas:
        module.load_state_dict({name: replica.__dict__[name] for name in ("weight", "bias", "affine_weight")})
        expected.append(fresh(module, x))

    def run(replica: nn.Module, wanted: Tensor) -> Callable[[], None]:
        def repeat() -> None:
            with torch.no_grad():
                for _ in range(150):
                    assert torch.equal(replica(x), wanted)

        return repeat

    in_threads([run(replica, wanted) for replica, wanted in zip(replicas, expected, strict=True)])


@pytest.mark.usefixtures("_eager_switching")
def test_one_layer_serves_threads_with_more_sizes_than_it_keeps() -> None:
    module = layer()
    sizes = range(3, 3 + 2 * CACHED_SIZES)
    inputs = {n: torch.randn(1, 3, n, n) for n in sizes}
    expected = {n: fresh(module, x) for n, x in inputs.items()}

    def run(order: list[int]) -> Callable[[], None]:
        def repeat() -> None:
            with torch.no_grad():
                for n in order * 5:
                    assert torch.equal(module(inputs[n]), expected[n])

        return repeat

    in_threads([run(list(sizes)), run(list(reversed(sizes))), run([*sizes][::2])])


def test_a_few_sizes_are_kept() -> None:
    module = layer()
    with torch.no_grad():
        for n in range(3, 3 + 2 * CACHED_SIZES):
            module(torch.randn(1, 3, n, n))
    assert len(module._spectra._kept[1]) == CACHED_SIZES


@pytest.mark.parametrize(("option", "value", "size"), [("eps", 1.0, 9), ("dilation", (2, 2), 7)])
def test_options_are_part_of_the_key(option: str, value: object, size: int) -> None:
    """With a reach of 2 planes of 9 are circles of 11, and with one of 4 those of 7 are."""
    module, x = layer(), torch.randn(2, 3, size, size)
    module(torch.randn(2, 3, 9, 9))
    setattr(module, option, value)
    other = layer()  # the same seed; train() would empty the cache
    setattr(other, option, value)
    assert torch.equal(module(x), other(x))


def test_only_plain_cpu_tensors_are_compared() -> None:
    assert _Spectra.can_keep(torch.ones(3))
    assert not _Spectra.can_keep(torch.ones(3, device="meta"))


@pytest.mark.parametrize("detach", [True, False], ids=["detached", "full-gradient"])
def test_torch_func_in_evaluation(detach: bool) -> None:
    module, x = layer(detach_spectrum=detach), torch.randn(2, 3, 6, 6)
    parameters = dict(module.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        result: Tensor = torch.func.functional_call(module, parameters, (x,)).square().sum()
        return result

    got = torch.func.grad(loss)(parameters)
    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    # torch.func asks for a graph, so its gradient of v, a cube of v, is that of float64 whatever the device has.
    of_v = 3 * inverse_root_error(module.weight)
    for name, gradient in zip(parameters, expected, strict=True):
        assert torch.allclose(got[name], gradient, atol=1e-8 + of_v * largest(gradient))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_convolutions_checkpoint_brings_type_and_device(dtype: torch.dtype) -> None:
    """assign=True takes what the checkpoint has, for the identity, too."""
    checkpoint = nn.Conv2d(3, 4, 3, padding=1, dtype=dtype).state_dict()
    with torch.device("meta"):
        module = nk.ConvNorm2d(3, 4, 3, padding=1)
    module.load_state_dict(checkpoint, assign=True)
    assert {p.device.type for p in module.parameters()} == {"cpu"}
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert module(torch.randn(2, 3, 5, 5, dtype=dtype)).isfinite().all()
    assert torch.equal(module.affine_weight.detach().sum((1, 2, 3)), torch.ones(4, dtype=dtype))
