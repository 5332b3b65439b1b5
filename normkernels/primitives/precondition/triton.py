"""Triton implementation of BNP's change of the gradients: one launch for all layers, whatever their number.

The kernel gets a table of the layers, a row of numbers for each: addresses, sizes, and where the layer's programs
begin, by which a program finds its layer. A program has ROWS rows of one group's weight gradients. It reads them twice:
for step 5 and the test whether all is finite, and again, from the cache, for the values that it writes.

Rejected: kernel arguments instead of a table. They would be compiled for every model, and are at most 4 KiB, some 100
layers.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from normkernels.eager.layouts import channels_innermost
from normkernels.triton.configs import configuration
from normkernels.triton.launch import launch
from normkernels.triton.support import Unsupported, architecture, check_supported

LONGEST_ROW = 2**30  # the longest row whose entries can be divided by a multiplication in 32 bits
SEARCH = 128  # layers that are searched at a time
# A layer's row of the table has, in this order: the number of the layer's first program; addresses of its weight and
# bias gradients (0: no bias), means and variances; outputs of a group, its inputs, and entries of a row, inputs times
# taps; multiplier and shift that divide by ``period`` (see below); whether channels are innermost; q^2 as the bits of a
# float64.
FIELDS = ("first", "weight", "bias", "mean", "var", "outputs", "inputs", "entries", "multiplier", "shift", "last", "q2")
FIRST, WEIGHT, BIAS, MEAN, VAR, OUTPUTS, INPUTS, ENTRIES, MULTIPLIER, SHIFT, LAST, Q2 = map(
    tl.constexpr, range(len(FIELDS))
)
WIDTH = tl.constexpr(len(FIELDS))
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def layer_of(table, layers, program, SEARCH: tl.constexpr):
    """Return the last layer whose first program is not after this one."""
    found = 0
    for start in range(0, layers, SEARCH):
        layer = start + tl.arange(0, SEARCH)
        first = tl.load(table + layer * WIDTH + FIRST, mask=layer < layers, other=2**62)
        found += tl.sum((first <= program).to(tl.int32), 0)
    return found - 1


@triton.jit
def input_of(entry, inputs, multiplier, shift, last):
    """Return the input channel, within its group, of an entry of a row in memory: entry // taps or entry % inputs.

    (2 entry multiplier) >> (32 + shift) is the quotient, exactly; a division would take five times the instructions.
    """
    quotient = (tl.umulhi((2 * entry).to(tl.uint32), multiplier) >> shift).to(tl.int32)
    return tl.where(last != 0, entry - quotient * inputs, quotient)


@triton.jit
def preconditioned(weight, at, within, entry, entries, mean, var, inputs, multiplier, shift, last, Gb, damping, q2):
    """Return (G_w - mu G_b) / (q^2 v~) of a tile, before it is rounded, and mu (BLOCK)."""
    j = input_of(entry, inputs, multiplier, shift, last)
    mu = tl.load(mean + j, mask=entry < entries, other=0.0)
    factor = 1.0 / (q2 * (tl.load(var + j, mask=entry < entries, other=1.0) + damping))
    Gw = tl.load(weight + at, mask=within, other=0.0).to(tl.float32)
    return (Gw - mu[None, :] * Gb[:, None]) * factor[None, :], mu


@triton.jit
def precondition_kernel(
    like, table, layers, eps1, eps2, left, ROWS: tl.constexpr, BLOCK: tl.constexpr, SEARCH: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """Change ROWS rows of one layer's gradients in place.

    like: any of the gradients, for their type, whose largest number is MOST.
    """
    program = tl.program_id(0)
    layer = layer_of(table, layers, program, SEARCH)
    fields = table + layer.to(tl.int64) * WIDTH
    gradient: tl.constexpr = tl.pointer_type(like.dtype.element_ty)
    weight, bias = tl.load(fields + WEIGHT).to(gradient), tl.load(fields + BIAS).to(gradient)
    mean = tl.load(fields + MEAN).to(tl.pointer_type(tl.float32))
    var = tl.load(fields + VAR).to(tl.pointer_type(tl.float32))
    outputs, inputs = tl.load(fields + OUTPUTS).to(tl.int32), tl.load(fields + INPUTS).to(tl.int32)
    entries = tl.load(fields + ENTRIES).to(tl.int32)
    multiplier, shift = tl.load(fields + MULTIPLIER).to(tl.uint32), tl.load(fields + SHIFT).to(tl.uint32)
    last, q2 = tl.load(fields + LAST), tl.load(fields + Q2).to(tl.float64, bitcast=True).to(tl.float32)

    block = program - tl.load(fields + FIRST).to(tl.int32)
    blocks = tl.cdiv(outputs, ROWS)
    group = block // blocks
    output = (block - group * blocks) * ROWS + tl.arange(0, ROWS)
    real = output < outputs
    row = group.to(tl.int64) * outputs + output
    mean += group.to(tl.int64) * inputs
    var += group.to(tl.int64) * inputs
    offset = tl.arange(0, BLOCK)

    has_bias = real & (tl.load(fields + BIAS) != 0)
    Gb = tl.load(bias + row, mask=has_bias, other=0.0).to(tl.float32)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, inputs, BLOCK):
        j = start + offset
        largest = tl.maximum(largest, tl.load(var + j, mask=j < inputs, other=0.0))
    damping = eps1 * tl.max(largest, 0) + eps2

    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, entries, BLOCK):
        entry = start + offset
        at, within = row[:, None] * entries + entry[None, :], real[:, None] & (entry < entries)[None, :]
        new, mu = preconditioned(
            weight, at, within, entry, entries, mean, var, inputs, multiplier, shift, last, Gb, damping, q2
        )  # fmt: skip
        term = tl.where(tl.abs(new) <= MOST, mu[None, :] * new, float("inf"))
        total += tl.where(within, term, 0.0)
    product = tl.where(has_bias, Gb / q2, 0.0) - tl.sum(total, 1)
    finite = tl.abs(product) <= tl.where(has_bias, MOST, LARGEST)
    tl.debug_barrier()  # in place: all threads have read

    for start in range(0, entries, BLOCK):
        entry = start + offset
        at, within = row[:, None] * entries + entry[None, :], (real & finite)[:, None] & (entry < entries)[None, :]
        new, mu = preconditioned(
            weight, at, within, entry, entries, mean, var, inputs, multiplier, shift, last, Gb, damping, q2
        )  # fmt: skip
        tl.store(weight + at, new.to(like.dtype.element_ty), mask=within)
    tl.store(bias + row, product.to(like.dtype.element_ty), mask=has_bias & finite)
    refused = tl.sum((real & (finite == 0)).to(tl.int32), 0)
    if refused > 0:
        tl.atomic_add(left + layer, refused, sem="relaxed")  # an integer: any order gives the same


# --- launcher -------------------------------------------------------------------------------------------------------


def division(period: int) -> tuple[int, int]:
    """Return multiplier and shift with entry // period = (2 entry multiplier) >> (32 + shift) for any entry < 2^30."""
    shift = period.bit_length() - 1
    return -(-(1 << (31 + shift)) // period), shift


def in_rows(grad: Tensor) -> tuple[Tensor, bool]:
    """Return the gradient with dense rows one after the other, and whether its channels are innermost.

    It is not copied where its rows are so already. Channels are innermost in channels_last.
    """
    if grad.is_contiguous():
        return grad, False
    if channels_innermost(grad) and grad.movedim(1, -1).is_contiguous():
        return grad, True
    return grad.contiguous(), False


Numbers = tuple[tuple[int, ...], ...]
_tables: dict[tuple[torch.device, int], tuple[Numbers, Tensor]] = {}  # the last one of each device and stream
_captured: list[Tensor] = []  # tables that a CUDA graph may read again


def table_of(numbers: Numbers, device: torch.device) -> Tensor:
    """Return the table, (L, fields) int64 on the device, that of the last call where nothing has changed.

    The copy from pinned memory does not make the host wait. A CUDA graph would repeat it at each replay, from memory
    that holds other values by then: while a graph is captured, only a table that exists already is used.
    """
    if device.type != "cuda":
        return torch.tensor(numbers, device=device)
    if torch.cuda.is_current_stream_capturing():
        for (where, _), (known, table) in _tables.items():
            if where == device and known == numbers:
                _captured.append(table)
                return table
        raise Unsupported("expected gradients that a call before the capture has seen in the same place, got others")
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _tables or _tables[key][0] != numbers:
        _tables[key] = numbers, torch.tensor(numbers, device="cpu").pin_memory().to(device, non_blocking=True)
    return _tables[key][1]


def precondition(
    weight_grads: Sequence[Tensor],
    bias_grads: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    groups: Sequence[int],
    q2: Sequence[float],
    eps1: float,
    eps2: float,
) -> Tensor:
    if not weight_grads:
        return torch.empty(0, dtype=torch.int32)
    like = weight_grads[0]
    check_supported(like)
    config = configuration("precondition", 1, "", like.dtype, architecture(like.device))
    dense = [in_rows(grad) for grad in weight_grads]
    biases = [grad.contiguous() for grad in bias_grads]
    statistics = [(mean.contiguous(), var.contiguous()) for mean, var in zip(means, variances, strict=True)]
    numbers, first = [], 0
    for (grad, last), bias, (mean, var), number, each in zip(dense, biases, statistics, groups, q2, strict=True):
        outputs, inputs, entries = len(grad) // number, grad.shape[1], grad[0].numel()
        if entries > LONGEST_ROW:
            raise Unsupported(f"expected rows of at most 2^30 weights, got {entries}")
        addresses = (grad.data_ptr(), bias.data_ptr() if len(bias) else 0, mean.data_ptr(), var.data_ptr())
        period = inputs if last else entries // inputs
        bits = struct.unpack("<q", struct.pack("<d", each))
        numbers.append((first, *addresses, outputs, inputs, entries, *division(period), int(last), *bits))
        first += number * triton.cdiv(outputs, config.rows)
    left = torch.zeros(len(dense), dtype=torch.int32, device=like.device)
    launch(
        precondition_kernel, (first,), like, table_of(tuple(numbers), like.device), len(dense), eps1, eps2, left,
        ROWS=config.rows, BLOCK=config.block, SEARCH=SEARCH, MOST=torch.finfo(like.dtype).max,
        config=config, device=like.device,
    )  # fmt: skip
    copies = [*zip(weight_grads, (grad for grad, _ in dense), strict=True), *zip(bias_grads, biases, strict=True)]
    for given, copy in copies:
        if copy is not given:
            given.copy_(copy)
    return left
