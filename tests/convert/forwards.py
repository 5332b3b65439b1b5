"""Forwards that use what a network is traced with in every way: as a size, a shape, a type, a number, inside C++.

    python -m tests.convert.forwards factory pe     # convert these networks, each in a process of its own

prints a line of JSON for each network: what became of every conversion, or which signal ended the process.
"""

from __future__ import annotations

import copy
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkernels as nk
from tests.tolerances.folding import assert_folded_network

Use = Callable[[Any, Tensor, Tensor], Any]


class Block(nn.Module):
    """A block of conv and bn; a forward uses their output y and the input x."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        self.use, self.conv, self.bn = use, nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.embedding = nn.Parameter(torch.randn(1, 8, 9, 9))
        self.register_buffer("pe", torch.randn(1, 8, 9, 9))
        self.cache: dict[Any, Tensor] = {}

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x, self.bn(self.conv(x)))


class Net(nn.Module):
    def __init__(self, use: Use) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.block, self.fc = Block(use), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(F.relu(self.bn(self.stem(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *dy: Any) -> Any:
        return 2 * dy[0]


def rows_added(x: Tensor, rows: int) -> Tensor:
    return x + torch.zeros(rows, 1, 1, 1, dtype=x.dtype)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # networks have them still
    scripted = torch.jit.script(rows_added)


@torch.library.custom_op("normkernels_tests::scaled", mutates_args=())
def scaled(x: Tensor, factor: int) -> Tensor:
    return x * factor


def written(x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        torch.add(y, 1, out=x)
    y = 1 * y
    y[:, : x.size(1) // 2] *= 2
    y.mul_(x.size(0))
    return x + y


def looped(y: Tensor) -> Tensor:
    for i in range(y.size(0)):
        y = y + i
    return y


def quietly(y: Tensor) -> Tensor:
    with torch.no_grad():
        mask = torch.ones(y.size(0), 1, 1, 1, dtype=y.dtype)
    return y * mask


def placed(x: Tensor, y: Tensor) -> Tensor:
    mask = torch.ones(x.size(0), 1, 1, 1)
    return y * (mask.cuda() if x.is_cuda else mask)


def cached(block: Any, y: Tensor) -> Tensor:
    if y.shape not in block.cache:
        block.cache[y.shape] = torch.zeros(y.shape)
    return y + block.cache[y.shape]


def unpacked(y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    return y.view(n, 2, c // 2, h * w).transpose(1, 2).reshape(n, c, h, w)


def grid(y: Tensor) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(y.size(2)), torch.arange(y.size(3)), indexing="ij")
    return y + torch.stack([rows, columns]).sum(0).to(y)


def attended(y: Tensor) -> Tensor:
    tokens = y.flatten(2).transpose(1, 2)
    hidden = torch.finfo(torch.float32).min * torch.finfo(y.dtype).eps
    mask = torch.full((tokens.size(1), tokens.size(1)), hidden).triu(diagonal=1)
    out = F.scaled_dot_product_attention(tokens, tokens, tokens, mask.to(tokens))
    return out.transpose(1, 2).reshape(y.shape)


def warped(y: Tensor) -> Tensor:
    theta = torch.eye(2, 3, dtype=torch.float64).unsqueeze(0).repeat(y.size(0), 1, 1)
    return F.grid_sample(y, F.affine_grid(theta, y.size(), False))


# With these forwards the network converts completely.
TRACED: dict[str, Use] = {
    "nothing": lambda _, x, y: y,
    "factory": lambda _, x, y: y + torch.zeros(x.size(0), 8, 1, 1),
    "factories": lambda _, x, y: y + torch.ones(8, 1, 1) + torch.empty(x.shape[0], 8, 1, 1).fill_(x.dim()),
    "device-dtype": lambda _, x, y: y + torch.zeros(x.size(0), 8, 1, 1, device=x.device, dtype=x.dtype),
    "shape": lambda _, x, y: y + torch.zeros(y.shape, dtype=y.dtype) + torch.ones(y.size()),
    "full": lambda _, x, y: y + torch.full((y.size(0), 1, 1, 1), 0.5),
    "like": lambda _, x, y: y + torch.empty_like(y).fill_(1) + torch.full_like(y, y.size(1)),
    "new": lambda _, x, y: y + y.new_zeros(y.size(0), 1, 1, 1) + y.new_tensor(3.0),
    "arange": lambda _, x, y: y + torch.arange(y.size(-1), device=y.device),
    "linspace": lambda _, x, y: y + torch.linspace(0, 1, y.size(-1)),
    "eye": lambda _, x, y: y @ torch.eye(y.size(-1), dtype=y.dtype),
    "meshgrid": lambda _, x, y: grid(y),
    "random": lambda _, x, y: y + 0 * torch.rand(y.size(0), 1, 1, 1, generator=torch.Generator().manual_seed(0)),
    "tensor": lambda _, x, y: y * torch.tensor(y.shape[0]) + torch.tensor([y.size(1), 2]).sum(),
    "one-hot": lambda _, x, y: y + F.one_hot(torch.arange(3), y.size(-1))[0],
    "constant-repeat": lambda _, x, y: y + torch.eye(9).view(1, 9, 9).repeat(x.size(0), 1, 1).unsqueeze(1),
    "constant-slice": lambda _, x, y: y + torch.eye(9)[: y.size(2), : y.size(3)],
    "constant-resized": lambda _, x, y: y + F.interpolate(torch.eye(3)[None, None], size=y.shape[2:]),
    "resized": lambda _, x, y: F.interpolate(y.max(1, True)[0], size=(x.size(2), x.size(3)), mode="bilinear") + y,
    "buffer": lambda self, x, y: y + self.pe[:, :, : x.size(2), : x.shape[3]],
    "parameter": lambda self, x, y: y + self.embedding.expand(x.size(0), -1, -1, -1)[..., : x.size(2), : x.size(3)],
    "unpacked": lambda _, x, y: unpacked(y),
    "view": lambda _, x, y: y.view(y.size(0), -1).reshape(y.shape[0], y.shape[1], *[y.size(2), y.size(3)]),
    "roll": lambda _, x, y: torch.roll(y, (y.size(2) // 2, y.size(3) // 2), (2, 3)) + y.roll(y.dim(), 1),
    "pad": lambda _, x, y: F.pad(y, (0, 9 - y.size(3), 0, y.size(2) % 2))[..., : y.size(2), : y.size(3)],
    "parts": lambda _, x, y: torch.cat(y.chunk(2, 1), y.dim() - 3),
    "narrow": lambda _, x, y: torch.narrow(y, 1, 0, y.size(1) // 2).repeat(1, 2, 1, 1) + y.select(1, y.ndim)[:, None],
    "gather": lambda _, x, y: y.index_select(0, torch.arange(y.size(0))) + y[torch.arange(x.size(0)), :, :1],
    "arithmetic": lambda _, x, y: y * (x.size(1) ** -0.5) / math.sqrt(y.numel()) + -y.size(0) % 3 + 2 / y.size(1),
    "text": lambda _, x, y: y if f"{x.size(0)} of {x.shape}, {y}" else x,
    "asserted": lambda _, x, y: (torch._assert(x.size(1) == y.size(1), f"expected 8, got {x.shape}"), y)[1],
    "where": lambda _, x, y: torch.where(y > x.size(0), y, 0.0) + torch.where(y > 0, y, x),
    "stack": lambda _, x, y: torch.stack([x, y, torch.zeros(y.shape, dtype=y.dtype)]).sum(0),
    "in-place": lambda _, x, y: written(x, y),
    "no-grad": lambda _, x, y: quietly(y),
    "type-info": lambda _, x, y: attended(y),
    "grid-sample": lambda _, x, y: warped(y),
    "function": lambda _, x, y: Double.apply(y),
    "operator": lambda _, x, y: torch.ops.normkernels_tests.scaled(y, 2) + torch.ops.aten.mul.Tensor(y, x),
    "method": lambda _, x, y: torch.Tensor.view(y, torch.Tensor.size(y)) + torch.einsum("nchw,nchw->nchw", x, y),
    "kind": lambda _, x, y: y if isinstance(x, Tensor) and not isinstance(x.size(0), Tensor) else x,
    "kind-of-view": lambda _, x, y: y if torch.is_tensor(y.mT) and not isinstance(y, nn.Parameter) else x,
    "spectrum": lambda _, x, y: y + torch.fft.fftfreq(y.size(-1)),
    "comparison": lambda _, x, y: y if x.size(0) > 2 else x,
    "max": lambda _, x, y: y * max(y.size(2), y.size(3)),
    "place": lambda _, x, y: placed(x, y),
}  # fmt: skip

# With these forwards the block cannot be traced, for this reason; the rest of the network converts.
REFUSED: dict[str, tuple[Use, str]] = {
    "range": (lambda _, x, y: looped(y), "not known while the network is traced"),
    "int": (lambda _, x, y: y + torch.zeros(int(x.size(0)), 1, 1, 1), "trace"),
    "value": (lambda _, x, y: y * float(y.sum()), "not known while"),
    "truth": (lambda _, x, y: y if y.sum() else x, "control flow"),
    "set": (lambda _, x, y: y if x.size(1) in {8, 16} else x, "not known while"),
    "dict": (lambda _, x, y: y * {8: 2.0}.get(x.size(1), 1.0), "not known while"),
    "cache": (lambda self, x, y: cached(self, y), "not known while"),
    "iterated": (lambda _, x, y: y + sum(x.shape), "iterated"),
    "len": (lambda _, x, y: y + len(x), "'len'"),
    "old-constructor": (lambda _, x, y: y + torch.Tensor(x.size(0), 1, 1, 1).zero_(), "new"),
    "size": (lambda _, x, y: y + torch.zeros(torch.Size([x.size(0), 1, 1, 1])), "Size"),
    "numpy": (lambda _, x, y: y + torch.from_numpy(np.zeros(x.size(0)))[:, None, None, None], "Error"),
    "numpy-shape": (lambda _, x, y: y * np.array(x.shape).prod(), "Error"),
    "numpy-tensor": (lambda _, x, y: y * np.asarray(y.detach()).mean(), "not known while|Error"),
    "scripted": (lambda _, x, y: scripted(y, y.size(0)), "Error"),
    "autocast": (lambda _, x, y: torch.autocast(x.device.type).__enter__() and y, "device_type"),
    "grad": (lambda _, x, y: torch.func.grad(lambda z: z.sum())(y) * y, "Error"),
    "checkpoint": (lambda _, x, y: torch.utils.checkpoint.checkpoint(lambda z: z * 2, y, use_reentrant=True), "Error"),
    "storage": (lambda _, x, y: y + torch.zeros(9).double().set_(y.detach()).sum(), "Error"),
    "layer": (lambda _, x, y: y + 0 * nn.Linear(y.size(-1), 9).double()(y), "Error"),
}  # fmt: skip


class Factory(nn.Module):
    """A forward that hands a size to a factory."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.linear(x)) + torch.zeros(x.size(0), 4)


class Transform(nn.Module):
    """PointNet's T-net: a matrix for each cloud of points, near the identity."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        self.conv1, self.bn1 = nn.Conv1d(k, 8, 1), nn.BatchNorm1d(8)
        self.fc1, self.bn2, self.fc2 = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, k * k)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.size(0)
        x = torch.max(F.relu(self.bn1(self.conv1(x))), 2, keepdim=True)[0].view(-1, 8)
        x = self.fc2(F.relu(self.bn2(self.fc1(x))))
        identity = torch.from_numpy(np.eye(self.k, dtype=np.float32).flatten()).view(1, self.k**2).repeat(batch, 1)
        if x.is_cuda:
            identity = identity.cuda()
        return (x + identity).view(-1, self.k, self.k)


class PointNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transform, self.conv, self.bn = Transform(3), nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        points = x.size(2)
        x = torch.bmm(x.transpose(2, 1), self.transform(x)).transpose(2, 1)
        x = F.relu(self.bn(self.conv(x)))
        return self.fc(F.avg_pool1d(x, points).flatten(1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Factory": (Factory, (4,)),
    "PointNet": (PointNet, (3, 16)),
    **{
        name: (lambda use=use: Net(use), (3, 11, 11))
        for name, use in {**TRACED, **{name: use for name, (use, _) in REFUSED.items()}}.items()
    },
}


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def attempt(convert: Callable[[], Any]) -> Any:
    """Return what a conversion returns or, as text, the error that stands for a refusal."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return convert(), "".join(str(each.message) for each in caught)
        except (ValueError, RuntimeError) as error:
            return None, f"{type(error).__name__}: {error}"


def conversions(name: str) -> dict[str, Any]:
    """Return what became of each conversion: the norms that stay, and what was said."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    net, x = make().double(), torch.randn(4, *shape, dtype=torch.float64)
    net(x)  # statistics
    net.eval()
    expected = net(x)
    results: dict[str, Any] = {}
    for key, strict in (("strict", True), ("lenient", False)):
        folded, said = attempt(lambda strict=strict: nk.convert.fold(net, strict=strict))
        if folded is not None:
            assert_folded_network(folded(x), expected, layers=3, terms=8 * 9, d=1)
        results[key] = {"said": said, "norms": None if folded is None else norms(folded)}
    rewritten = {
        "pop": nk.convert.to_pop_norm,
        "features": lambda net: nk.convert.replace(net, "IterNorm", decorrelate_features=True, group_size=4),
    }
    for key, convert in rewritten.items():
        changed = copy.deepcopy(net).train()
        done, said = attempt(lambda convert=convert, changed=changed: convert(changed))
        finite = done is None or bool(changed(x).isfinite().all())
        modules = [name for name, _ in changed.named_modules()]
        results[key] = {"said": said, "finite": finite, "norms": norms(changed), "modules": modules}
    return results


def in_its_own_process(name: str) -> dict[str, Any]:
    """Return ``conversions`` of a network, or how their process ended."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            result = conversions(name)
        except BaseException as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        os.write(writer, json.dumps(result).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as text:
        answer = text.read()
    status = os.waitpid(child, 0)[1]
    return json.loads(answer) if status == 0 and answer else {"error": f"the process ended with status {status}"}


def main(names: list[str]) -> Iterator[str]:
    torch.set_num_threads(1)  # the threads of a pool do not survive a fork
    conversions("nothing")  # so that what is made once is not made in every process
    for name in names or NETWORKS:
        yield json.dumps({name: in_its_own_process(name)})


if __name__ == "__main__":
    for line in main(sys.argv[1:]):
        print(line, flush=True)
