"""The CUDA kernels: that they are there, and how they cut and merge.

On a CPU as C++ (``--simt``, see tests/simt), on a GPU as the compiled extension. Their values are tested where every
backend's are (fixture ``backend``); here is what those tests do not reach: many tiles, wide groups, several parts.
test_cuda_layouts is about strides, digits and the order of threads, test_cuda_refusals about what they refuse and hand
on, test_cuda_gpu about what needs a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import normkernels as nk
from normkernels.dispatch import record
from tests.ops import test_inverse_sqrt, test_iter_norm, test_moments, test_pop_norm, test_precondition, test_whiten
from tests.ops.cuda_calls import ANYWHERE, SERVED, SIMT, TYPES, WIDTHS, equal, given, many_columns, name, raw, step
from tests.ops.test_precondition import Layer
from tests.ops.test_spectral_kernels import check as check_filter
from tests.ops.test_spectral_kernels import values
from tests.oracles import inputs
from tests.oracles import run as place
from tests.oracles.run import Config, back, incoming_gradient, leaf, moved, oracle, plain_path, run
from tests.tolerances import assert_agree, largest
from tests.tolerances.bnp import precondition_floors
from tests.tolerances.whitening import assert_iter_norm

pytestmark = pytest.mark.usefixtures("backend")

# --- what is there --------------------------------------------------------------------------------------------------


@SIMT
def test_every_op_is_registered() -> None:
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    assert {op for op in record.OPS if registered(f"normkernels_simt::{op}", "CPU")} == set(SERVED)
    assert {op for op in record.OPS if "cuda" in record.IMPLEMENTATIONS[op]} == set(SERVED)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "IterNorm": lambda: nk.IterNorm2d(8, group_size=4, device=place.device),
    "ConvNorm": lambda: nk.ConvNorm2d(8, 8, 3, padding=1, device=place.device),
    "POPNorm": lambda: nk.POPNorm2d(8, device=place.device),
}


@ANYWHERE
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_trains_a_step(layer: str) -> None:
    """Output, gradients and the layer afterwards are as with plain PyTorch, in evaluation too."""
    results = []
    for backend in ("cuda", "eager"):
        torch.manual_seed(0)
        with nk.use_backend(backend):
            model = LAYERS[layer]()
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            x = leaf(inputs.gaussian((6, 8, 6, 6), dtype=torch.float32))
            y = model(x)
            y.backward(incoming_gradient(y.detach()))
            optimizer.step()
            evaluated = model.eval()(x).detach()
        results.append([y.detach(), x.grad, evaluated, *model.state_dict().values()])  # type: ignore[union-attr]
    assert_agree(*results)


@ANYWHERE
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
@pytest.mark.parametrize("op", SERVED)
def test_opcheck(op: str) -> None:
    torch.library.opcheck(raw(op), tuple(given(op)))


@ANYWHERE
@pytest.mark.parametrize(
    "op", ["whiten", "stacked_mix", "iter_norm", "iter_norm_backward", "pop_norm", "pop_norm_backward"]
)
def test_a_copied_input_has_an_output_of_its_own_layout(op: str) -> None:
    """It is channels_last, cut in width: the spatial dimensions do not collapse, and the kernels get a copy."""
    found = given(op)
    for i, value in enumerate(found):
        if isinstance(value, Tensor) and value.dim() == 4:
            wide = torch.cat((value, value), 3).contiguous(memory_format=torch.channels_last)
            found[i] = wide[..., : value.shape[3]]
    torch.library.opcheck(raw(op), tuple(found), test_utils="test_faketensor")


@ANYWHERE
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
@pytest.mark.parametrize("layer", LAYERS)
def test_compiles_whole(layer: str) -> None:
    x = moved(inputs.gaussian((6, 8, 6, 6), dtype=torch.float32))
    model = LAYERS[layer]()
    expected = model(x)
    torch._dynamo.reset()
    assert_agree(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


# --- tiles, parts, merging ------------------------------------------------------------------------------------------


@ANYWHERE
@pytest.mark.parametrize("dtype", TYPES, ids=name)
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("d", WIDTHS)
def test_several_parts(d: int, groups: int, dtype: torch.dtype) -> None:
    """Channels are innermost, or there is one sample of that many positions, which are not a multiple of anything."""
    x = many_columns(d, groups, dtype)
    test_iter_norm.check(x if groups % 2 else x.T.contiguous()[None], Config(group_size=d))


# For moments the gradient is tested, too, which is a mix; for whiten the gradient is the cross moments.
@ANYWHERE
@pytest.mark.parametrize("d", [20, 128])
def test_several_parts_of_the_primitives(d: int) -> None:
    test_moments.check(many_columns(d, 1, torch.float32, mean=100.0), d)
    test_whiten.check(test_whiten.arguments(many_columns(d, 1, torch.float32), d))


# Four, five and six parts, in sets of two or three, the last set with fewer or the last part with less.
@ANYWHERE
@pytest.mark.parametrize("columns", [1, 127, 128, 129, 385, 513, 640, 769, 1409])
def test_every_number_of_parts(columns: int) -> None:
    x = inputs.gaussian((columns, 16), dtype=torch.float32, group_size=16)
    test_moments.check(x, 16)
    test_iter_norm.check(x, Config(group_size=16), stable=True)


@ANYWHERE
@pytest.mark.parametrize("d", [33, 100, 128])
def test_a_single_column(d: int) -> None:
    """m = 1: nothing is left of x, whatever the padding of the tile holds."""
    x = inputs.gaussian((1, d), dtype=torch.float32, group_size=d)
    y, mean, W, dx, _, dbias = map(back, step(x, d))
    bias = test_iter_norm.affine(d, torch.float32)[1]
    assert torch.equal(y[0], bias) and torch.equal(mean, x[0])  # type: ignore[index, arg-type]
    assert W.isfinite().all() and not dx.any()  # type: ignore[union-attr]
    assert torch.equal(dbias, incoming_gradient(x)[0])  # type: ignore[arg-type]


@ANYWHERE
@pytest.mark.parametrize("given_affine", [(False, False), (True, False), (False, True)], ids=str)
def test_without_weight_or_bias(given_affine: tuple[bool, bool]) -> None:
    x, config = inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32), Config()
    weight, bias = (value if asked else None for value, asked in
                    zip(test_iter_norm.affine(8, x.dtype), given_affine, strict=True))  # fmt: skip
    problem = config, x, incoming_gradient(x), weight, bias
    got = run(nk.ops.iter_norm, *problem)
    assert_iter_norm(got, oracle(*problem), plain_path(*problem), *problem[1:4], config)


# A single channel or two have up to nine blocks. They take 1024 columns at a time in float32 and 2048 in half types
# where the positions are next to each other, and 128 or 256 where the channels are; 256 where nothing is aligned. One
# column more than a multiple of that, or one access, makes a last part that is as short as can be.
CHANNELS = {
    "positions": ((1, 2, 6152), torch.Tensor.contiguous),
    "positions-of-samples": ((3, 1, 4, 1028), torch.Tensor.contiguous),
    "odd-planes": ((27, 2, 7, 7), torch.Tensor.contiguous),
    "channels": ((1537, 8), torch.Tensor.contiguous),
    "one-more-channel": ((1537, 9), torch.Tensor.contiguous),
    "many-channels": ((65, 104), torch.Tensor.contiguous),
    "one-channel": ((513, 1), torch.Tensor.contiguous),
    "samples": ((1537, 3, 1, 2), inputs.LAYOUTS["CHWN"][1]),
}


@ANYWHERE
@pytest.mark.parametrize("dtype", TYPES, ids=name)
@pytest.mark.parametrize("case", CHANNELS)
def test_several_parts_of_channels(case: str, dtype: torch.dtype) -> None:
    """Channels are alone in their groups. Each part has a mean of its own, which is what merging is about."""
    shape, lay_out = CHANNELS[case]
    x = inputs.gaussian(shape, group_size=1, mean=3.0)
    x = lay_out((x + torch.linspace(-2, 2, len(x), dtype=x.dtype).view(-1, *[1] * (x.dim() - 1))).to(dtype))
    test_pop_norm.check(x)
    test_moments.check(x, 1)
    test_whiten.check(test_whiten.arguments(x, 1))


@ANYWHERE
@pytest.mark.parametrize("columns", [1, 255, 256, 257, 1025, 2303, 2305])
def test_every_number_of_parts_of_channels(columns: int) -> None:
    x = inputs.gaussian((1, 1, columns), dtype=torch.float32, group_size=1)
    test_pop_norm.check(x)
    test_moments.check(x, 1)


@ANYWHERE
@pytest.mark.parametrize("layout", ["NC", "NCL"])
def test_a_single_value_of_a_channel(layout: str) -> None:
    """m = 1: nothing is left of x but beta, and no gradient of x."""
    x = leaf(inputs.gaussian((1, 37) if layout == "NC" else (1, 37, 1), dtype=torch.float32, group_size=1))
    bias = leaf(torch.linspace(-1, 2, 37))
    y, mean, var = nk.ops.pop_norm(x, None, bias, 1.0, 0.0)  # type: ignore[arg-type]
    assert torch.equal(mean, x.detach().flatten()) and not var.any()  # type: ignore[union-attr]
    torch.testing.assert_close(y.detach().flatten(), bias.detach().sign())  # type: ignore[union-attr]
    (dx,) = torch.autograd.grad(y, x, incoming_gradient(y.detach()).to(y.device))  # type: ignore[arg-type]
    assert largest(dx) <= 1e-6


# 2048 values or more are a row of a block, fewer of a warp; in accesses of 16 bytes where all rows are aligned.
ROWS = {
    "long": ((3, 2600), 1, True),
    "long-odd": ((3, 2049), 1, False),
    "long-kernel": ((4, 256, 3, 3), 2, True),
    "long-kernel-odd": ((2, 231, 3, 3), 1, True),
    "short": ((17, 48), 1, True),
    "short-kernel": ((9, 16, 3, 2), 3, True),
}


@ANYWHERE
@pytest.mark.parametrize("dtype", TYPES, ids=name)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", ROWS)
def test_rows_of_gradients(case: str, channels_last: bool, dtype: torch.dtype) -> None:
    layer = Layer(*ROWS[case], dtype)
    if channels_last and layer.Gw.dim() == 4:
        layer.Gw = layer.Gw.contiguous(memory_format=torch.channels_last)
    ((Gw, Gb),), left = test_precondition.run([layer])
    exact, tensors = Layer(*ROWS[case], torch.float64), (layer.Gw, layer.Gb, layer.mean, layer.var)
    exact.Gw, exact.Gb, exact.mean, exact.var = (None if t is None else t.double() for t in tensors)  # type: ignore[assignment]
    with nk.use_backend("eager"):  # test_precondition has the paper's matrix instead, which is large here
        ((Gw_ref, Gb_ref),), _ = test_precondition.run([exact])
    assert left == [0] and Gw.stride() == layer.Gw.stride()
    floor_w, floor_b = precondition_floors(*tensors, layer.q2, Gw_ref, Gb_ref)
    assert ((Gw.double() - Gw_ref).abs() <= floor_w).all()
    if Gb is not None:
        assert ((Gb.double() - Gb_ref).abs() <= floor_b).all()


@ANYWHERE
def test_a_long_row_that_is_not_finite_is_left() -> None:
    layer = Layer((3, 2600), 1, True, torch.float32)
    layer.Gw[1, 2599] = float("nan")
    ((Gw, Gb),), left = test_precondition.run([layer])
    assert left == [1]
    torch.testing.assert_close(Gw[1], layer.Gw[1], rtol=0, atol=0, equal_nan=True)
    assert layer.Gb is not None and Gb[1] == layer.Gb[1]
    assert Gw[[0, 2]].isfinite().all() and not torch.equal(Gw[2], layer.Gw[2])


@ANYWHERE
def test_lists_keep_nothing() -> None:
    """LibTorch leaks strings, but it must not leak lists and their tensors."""
    arguments = given("precondition")
    before = [t._use_count() for each in arguments[:4] for t in each]
    for _ in range(3):
        raw("precondition")(*arguments)
    assert [t._use_count() for each in arguments[:4] for t in each] == before


# The last has more planes than the simulated device filters at once: three blocks on each of three processors.
@ANYWHERE
@pytest.mark.parametrize("shape", [(11, 3, 5, 6), (2, 100, 1, 4), (3, 5, 64, 64)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_numbers_of_planes(shape: tuple[int, ...], channels_last: bool) -> None:
    z, v = values(shape), values(shape[1:], seed=1)
    check_filter(z.contiguous(memory_format=torch.channels_last) if channels_last else z, v)


# 99 KiB: sm_86, sm_89 and sm_120, where one matrix of d = 128 fits into shared memory. 163 KiB: sm_80, two of them.
@SIMT
@pytest.mark.parametrize("shared_bytes", [99 * 1024, 163 * 1024])
def test_matrices_that_shared_memory_has_no_room_for(shared_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They lie in global memory, and nothing else changes.

    A launch that asks for more shared memory fails, so some matrices do lie there.
    """
    x = many_columns(128, 2, torch.float32)
    cov = torch.stack([inputs.covariance(inputs.spectrum(128, 10.0), seed) for seed in range(2)])

    def results() -> list[Tensor]:
        given = cov.float().requires_grad_()
        W = nk.ops.inverse_sqrt(given)
        return [*step(x, 128), W.detach(), *torch.autograd.grad(W, given, torch.cos(cov.float()))]

    expected = results()
    monkeypatch.setenv("NORMKERNELS_SIMT_SHARED_BYTES", str(shared_bytes))
    assert equal(results(), expected)
    test_inverse_sqrt.check(cov, Config(), torch.float32)
