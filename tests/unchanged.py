"""Compare outputs and gradients of every op and layer with those of another commit, bit by bit.

    python -m tests.unchanged before.json                     # in a checkout of the commit before
    python -m tests.unchanged after.json --against before.json

For changes of the package's structure, which may change no result. Every public op, layer and optimizer runs in
several types and memory layouts, with plain PyTorch, with the Triton kernels in Triton's interpreter, and with the
CUDA kernels compiled for the CPU where there is a C++ compiler. The file has a hash for each tensor. It holds for one
machine and one version of torch, whose sums depend on the instruction set, and so it is not kept in the repository.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # read by Triton when it is imported

import torch
import torch.distributed as dist
from torch import Tensor, nn

import normkernels as nk
from tests.interpreter import behave_as_gpus_do
from tests.simt import build
from tests.test_saved import LAYERS as SAVED_LAYERS

Values = dict[str, Tensor]

TYPES = (torch.float64, torch.float32, torch.bfloat16)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "cropped": lambda x: nn.functional.pad(x, (1, 2))[..., 1:-2],
}
SHAPES = ((6, 8, 3, 5), (2, 24, 7, 4))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def images() -> Iterator[tuple[str, Tensor]]:
    for shape, dtype, (layout, lay_out) in product(SHAPES, TYPES, LAYOUTS.items()):
        x = normal(*shape).roll(1, 1) * torch.linspace(0.5, 2, shape[1]).view(-1, 1, 1).double() + 0.75
        yield f"{'x'.join(map(str, shape))} {str(dtype)[6:]} {layout}", lay_out(x.to(dtype))


def differentiated(outputs: Any, **inputs: Tensor | None) -> Values:
    """Return the tensors among the outputs, and the gradients of a fixed combination of them."""
    found = (outputs,) if isinstance(outputs, Tensor) else outputs
    tensors = [value for value in found if isinstance(value, Tensor)]
    result = {f"output {i}": value.detach() for i, value in enumerate(tensors)}
    leaves = {name: value for name, value in inputs.items() if value is not None and value.requires_grad}
    total = sum(
        ((value * normal(*value.shape).to(value)).sum().double() for value in tensors if value.requires_grad),
        torch.zeros((), dtype=torch.float64),
    )
    if leaves:
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        result |= {f"d{name}": value for name, value in zip(leaves, gradients, strict=True) if value is not None}
    return result


# --- ops ------------------------------------------------------------------------------------------------------------


def ops() -> Iterator[tuple[str, Callable[[], Values]]]:
    for name, image in images():
        yield from ((f"{op} {name}", run) for op, run in ops_of(image))
    for d, dtype, method in product((1, 3, 17, 40), TYPES[:2], ("newton", "eigh")):
        for T, scaling in product((0, 5, 20), ("trace", "frobenius")) if method == "newton" else [(5, "trace")]:

            def small(
                d: int = d, dtype: Any = dtype, method: str = method, T: int = T, scaling: str = scaling
            ) -> Values:
                a = normal(2, d, d + 2)
                cov = (a @ a.mT / d).to(dtype).requires_grad_()
                return differentiated(nk.ops.inverse_sqrt(cov, T, 1e-3, scaling, method), cov=cov)

            yield f"inverse_sqrt {d} {str(dtype)[6:]} {method} {T} {scaling}", small


def ops_of(image: Tensor) -> Iterator[tuple[str, Callable[[], Values]]]:
    channels = image.shape[1]
    statistics = torch.float64 if image.dtype == torch.float64 else torch.float32
    mean = torch.linspace(-1, 1, channels, dtype=statistics)

    def leaves() -> tuple[Tensor, Tensor, Tensor]:
        x = image.detach()
        weight, bias = (torch.linspace(-1, 2, channels, dtype=image.dtype) + shift for shift in (0.0, 0.3))
        return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()

    def moments(d: int) -> Values:
        x, _, _ = leaves()
        return differentiated(nk.ops.moments(x, d), x=x)

    def cross_moments(d: int) -> Values:
        x, _, _ = leaves()
        return differentiated(nk.ops.cross_moments(x.detach().flip(0), x.detach(), mean, d))

    def whiten(d: int) -> Values:
        x, weight, bias = leaves()
        W = normal(channels // d, d, d).to(statistics).requires_grad_()
        return differentiated(nk.ops.whiten(x, mean, W, weight, bias), x=x, W=W, weight=weight, bias=bias)

    def iter_norm(d: int, method: str, affine: bool) -> Values:
        x, weight, bias = leaves()
        given = {"weight": weight, "bias": bias} if affine else {}
        return differentiated(nk.ops.iter_norm(x, d, method=method, eps=1e-3, **given), x=x, **given)

    def pop_norm(center: bool, scale: bool) -> Values:
        x, *affine = leaves()
        weight, bias = (value if used else None for value, used in zip(affine, (scale, center), strict=True))
        output = nk.ops.pop_norm(x, weight, bias, center=center, scale=scale)
        return differentiated(output, x=x, weight=weight, bias=bias)

    def spectral() -> Values:
        x, _, _ = leaves()
        kernel = normal(channels, 2, 3, 2).to(image.dtype).requires_grad_()
        v = nk.ops.kernel_spectrum(kernel, [max(side, 3) for side in image.shape[2:]])
        return {"v": v.detach()} | differentiated(nk.ops.spectral_filter(x, v), x=x, kernel=kernel)

    for d in (1, 4, channels):
        yield f"moments {d}", lambda d=d: moments(d)
        yield f"cross_moments {d}", lambda d=d: cross_moments(d)
        yield f"whiten {d}", lambda d=d: whiten(d)
        for method, affine in (("newton", True), ("newton", False), ("eigh", True)):
            yield f"iter_norm {d} {method} {affine}", lambda d=d, m=method, a=affine: iter_norm(d, m, a)
    for center, scale in ((True, True), (True, False), (False, True)):
        yield f"pop_norm {center} {scale}", lambda c=center, s=scale: pop_norm(c, s)
    yield "spectral_filter", spectral


# --- layers ---------------------------------------------------------------------------------------------------------

LAYERS = SAVED_LAYERS | {
    "SyncIterNorm": (lambda: nk.SyncIterNorm(8, 4), (6, 8, 3, 5)),  # in a group of one process
    "SyncDBN": (lambda: nk.SyncDBN(8, 4), (6, 8, 3, 5)),
    "ConvNorm2d-spectrum": (lambda: nk.ConvNorm2d(4, 6, (3, 2), groups=2, detach_spectrum=False), (5, 4, 9, 8)),
}


def trained(make: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype) -> Values:
    """Run two training steps, then evaluation."""
    torch.manual_seed(0)
    layer = make().to(dtype)
    result: Values = {}
    for turn in range(2):
        x = (normal(*shape) + turn).to(dtype).requires_grad_()
        result |= {
            f"{turn} {name}": value for name, value in differentiated(layer(x), x=x, **parameters(layer)).items()
        }
    with torch.no_grad():
        result["evaluated"] = layer.eval()(normal(*shape).to(dtype))
    return result | {name: value.clone() for name, value in layer.state_dict().items()}


def parameters(layer: nn.Module) -> dict[str, Tensor]:
    return {name.replace(".", "_"): value for name, value in layer.named_parameters()}


def layers() -> Iterator[tuple[str, Callable[[], Values]]]:
    for (name, (make, shape)), dtype in product(LAYERS.items(), TYPES):
        yield f"{name} {str(dtype)[6:]}", lambda m=make, s=shape, t=dtype: trained(m, s, t)  # type: ignore[misc]
    yield "BNP", preconditioned


def preconditioned() -> Values:
    """Run three steps of a small network."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, groups=1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 2)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bnp = nk.optim.BNP(model)
    for turn in range(3):
        optimizer.zero_grad()
        model(normal(7, 3, 5, 5).float() + turn).square().mean().backward()
        bnp.step()
        optimizer.step()
    return {name: value.detach() for name, value in model.named_parameters()}


# --- hashes ---------------------------------------------------------------------------------------------------------


def digest(value: Tensor) -> str:
    """Return a hash of a tensor's type, shape, strides and bits, with all NaNs alike."""
    values = value.detach().contiguous()
    if values.is_complex():
        values = torch.view_as_real(values)
    values = torch.where(values.isnan(), torch.nan, values) if values.is_floating_point() else values
    data = values.reshape(-1).view(torch.uint8).numpy().tobytes()
    shape = f"{value.dtype} {tuple(value.shape)} {value.stride()}"
    return hashlib.sha256(shape.encode() + data).hexdigest()[:16]


def hashes(backend: str) -> dict[str, str]:
    found: dict[str, str] = {}
    with nk.use_backend("cuda" if backend == "simt" else backend):
        for name, run in (*ops(), *layers()):
            found |= {f"{backend} {name}: {key}": digest(value) for key, value in run().items()}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="JSON file of hashes to write")
    parser.add_argument("--against", type=Path, help="JSON file of another commit, from this machine")
    parser.add_argument(
        "--backends", nargs="+", default=["eager", "triton", "simt"], choices=["eager", "triton", "simt"]
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*instead of the")  # a backend warns of what it leaves to plain PyTorch
    behave_as_gpus_do()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found: dict[str, str] = {}
    for backend in options.backends:
        if backend == "simt":
            if reason := build.missing():
                print(f"simt: left out, {reason}", file=sys.stderr)
                continue
            build.install(build.build())
        found |= hashes(backend)
        print(f"{backend}: {len(found)} tensors so far", flush=True)
    options.out.write_text(json.dumps(found, indent=0))
    if options.against is None:
        return 0
    before: dict[str, str] = json.loads(options.against.read_text())
    before = {name: value for name, value in before.items() if name.split()[0] in options.backends}
    changed = [name for name in {**before, **found} if before.get(name) != found.get(name)]
    print("\n".join(changed) if changed else f"All {len(found)} tensors are the same bits as before.")
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main())
