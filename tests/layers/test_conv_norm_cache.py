"""ConvNorm's cache of spectra in evaluation, where threads, replicas, transforms and options meet it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import normkernels as nk
from normkernels.layers.conv_norm import CACHED_SIZES, _Spectra


@pytest.fixture
def _eager_switching() -> Iterator[None]:
    """Threads switch a thousand times as often as they do by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def layer(**options: object) -> nk.ConvNorm2d:
    torch.manual_seed(0)
    made: nk.ConvNorm2d = nk.ConvNorm2d(3, 4, 3, padding=1, **options).eval()  # type: ignore[arg-type]
    return made


def fresh(module: nn.Module, x: Tensor) -> Tensor:
    """The output of a copy, whose cache is empty."""
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


def test_the_second_call_computes_no_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is used at all, and only in evaluation."""
    calls: list[object] = []
    right = nk.ops.kernel_spectrum
    monkeypatch.setattr(nk.ops, "kernel_spectrum", lambda *args: calls.append(args) or right(*args))
    module, x = layer(), torch.randn(1, 3, 6, 6)
    for _ in range(3):
        module(x)
    assert len(calls) == 1
    module.train()
    for _ in range(3):
        module(x)
    assert len(calls) == 4


@pytest.mark.parametrize(("option", "value"), [("eps", 1.0), ("dilation", (2, 2))])
def test_options_are_part_of_the_key(option: str, value: object) -> None:
    module, x = layer(), torch.randn(2, 3, 9, 9)
    module(x)
    setattr(module, option, value)
    expected = module.train()(x)
    assert torch.equal(module.eval()(x), expected)


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
    for name, gradient in zip(parameters, expected, strict=True):
        assert torch.allclose(got[name], gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_convolutions_checkpoint_brings_type_and_device(dtype: torch.dtype) -> None:
    """assign=True takes what it gets, the identity included."""
    checkpoint = nn.Conv2d(3, 4, 3, padding=1, dtype=dtype).state_dict()
    with torch.device("meta"):
        module = nk.ConvNorm2d(3, 4, 3, padding=1)
    module.load_state_dict(checkpoint, assign=True)
    assert {p.device.type for p in module.parameters()} == {"cpu"}
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert module(torch.randn(2, 3, 5, 5, dtype=dtype)).isfinite().all()
    assert torch.equal(module.affine_weight.detach().sum((1, 2, 3)), torch.ones(4, dtype=dtype))
