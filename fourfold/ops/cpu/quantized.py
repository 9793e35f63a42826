"""Products with quantised weights that read the codes once, at the speed of memory.

Three routes with the same packed weights and the same numbers: the compiled kernels, Numba's where those are missing,
and the reference, which dequantises. Activations are rounded to int8 in groups of 32, each row by itself, so that a
row's result does not depend on the rows beside it. ``FOURFOLD_KERNELS`` = native, numba or torch picks a route.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.ops import reference
from fourfold.ops.cpu import native
from fourfold.ops.cpu.buffers import huge_empty
from fourfold.ops.cpu.threads import team
from fourfold.ops.reference.quantized import COLUMNS, Quantized

ROUTES = ("native", "numba", "torch")
Shared = tuple[Quantized, Quantized, Quantized]  # gate, up and down of the expert that all tokens have


@cache
def _route(wanted: str | None) -> str:
    if wanted not in (None, *ROUTES):
        raise ValueError(f"FOURFOLD_KERNELS: {wanted!r} is unknown; choose one of {', '.join(ROUTES)}")
    if wanted in (None, "native") and native.library() is not None:
        return "native"
    if wanted in (None, "numba") and _numba() is not None:
        return "numba"
    return "torch"


def route() -> str:
    """The route in use: that of FOURFOLD_KERNELS if it can be had, else the best one."""
    return _route(os.environ.get("FOURFOLD_KERNELS"))


@cache
def _numba() -> Any:
    """The kernels of Numba, compiled; None on a processor without their instruction."""
    from fourfold.ops.cpu import numba_blocks

    return numba_blocks if numba_blocks.usable() else None


def _library() -> Any:
    return native.library()


def pack_weight(codes: Tensor, weight: Quantized) -> Quantized:
    """See :func:`fourfold.ops.reference.pack_weight`: packed, unless nothing here could use it."""
    awkward = weight.kind == "fp8" or (weight.kind == "int4" and weight.group % COLUMNS)
    if weight.packed or awkward or route() == "torch":
        return weight
    if route() == "numba":
        _numba().compile_for(weight.kind)  # now rather than when a request waits
    if len(weight.shape) == 2:
        packed = weight.to_packed()
        return Quantized(_huge(packed.codes), _huge(packed.scales), weight.shape, weight.kind, weight.group, True)
    first = weight[0].to_packed()  # one matrix at a time: the rest of the stack needs no temporaries
    codes = huge_empty((weight.shape[0], *first.codes.shape), first.codes.dtype)
    scales = huge_empty((weight.shape[0], *first.scales.shape), first.scales.dtype)
    for i in range(weight.shape[0]):
        packed = weight[i].to_packed()
        codes[i], scales[i] = packed.codes, packed.scales
    return Quantized(codes, scales, weight.shape, weight.kind, weight.group, True)


def _huge(tensor: Tensor) -> Tensor:
    return huge_empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def _usable(x: Tensor, *weights: Quantized) -> bool:
    """Whether a kernel can take these: packed, nothing to differentiate, no dtype wider than it computes in."""
    if x.dtype == torch.float64 or (x.requires_grad and torch.is_grad_enabled()) or route() == "torch":
        return False
    return all(w.packed and w.codes.is_cpu for w in weights)


_known: WeakKeyDictionary[Quantized, tuple[Any, tuple[int, ...]]] = WeakKeyDictionary()


def _matmul(weight: Quantized) -> tuple[Any, tuple[int, ...]]:
    """The kernel and what it is told about ``weight``, looked up once: decoding calls it for every layer."""
    if (known := _known.get(weight)) is None:
        where = weight.codes.data_ptr(), weight.scales.data_ptr()
        known = _known[weight] = _library().ff_matmul, (*_bits_and_span(weight), *where, *weight.shape)
    return known


def _bits_and_span(weight: Quantized) -> tuple[int, int]:
    return (4, weight.group // COLUMNS) if weight.kind == "int4" else (8, 1)


def quantized_linear(x: Tensor, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    """See :func:`fourfold.ops.reference.quantized_linear`."""
    if not _usable(x, weight):
        return reference.quantized_linear(x, weight, bias)
    n, k = weight.shape
    rows = x.detach().reshape(-1, k).float().contiguous()
    y = torch.empty(len(rows), n)
    if route() == "native":
        matmul, arguments = _matmul(weight)
        matmul(*arguments, rows.data_ptr(), len(rows), y.data_ptr(), team())
    else:
        _numba().matmul(rows, weight, y)
    y = y.view(*x.shape[:-1], n)
    return (y if bias is None else y.add_(bias.detach())).to(x.dtype)


_tables: WeakKeyDictionary[Quantized, tuple[Quantized, Shared | None, Tensor]] = WeakKeyDictionary()


def _table(gate_up: Quantized, down: Quantized, shared: Shared | None) -> Tensor:
    """int64 [E, 7]: where each expert's gate, up and down lie, codes and scales, and its width; then the shared one."""
    if (known := _tables.get(gate_up)) is not None and known[0] is down and known[1] == shared:
        return known[2]
    n, width = down.shape[0], down.shape[-1]
    rows = []
    for tensor in (gate_up.codes, gate_up.scales, down.codes, down.scales):
        start = tensor.data_ptr() + torch.arange(n) * (tensor.stride(0) * tensor.element_size())
        rows.append(start)
    half = [t.stride(0) * t.element_size() // 2 for t in (gate_up.codes, gate_up.scales)]
    gate, gate_scales, down_codes, down_scales = rows
    columns = [gate, gate_scales, gate + half[0], gate_scales + half[1], down_codes, down_scales]
    table = torch.stack([*columns, torch.full((n,), width)], dim=1)
    if shared is not None:
        pointers = [t.data_ptr() for weight in shared for t in (weight.codes, weight.scales)]
        table = torch.cat([table, torch.tensor([[*pointers, shared[0].shape[0]]])])
    _tables[gate_up] = (down, shared, table.contiguous())
    return _tables[gate_up][2]


def quantized_experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Quantized,
    down: Quantized,
    limit: float = 0.0,
    shared: Shared | None = None,
) -> Tensor:
    """See :func:`fourfold.ops.reference.quantized_experts`."""
    all_weights = (gate_up, down, *(shared or ()))
    if not _usable(x, *all_weights) or (torch.is_grad_enabled() and weights.requires_grad):
        return reference.quantized_experts(x, indices, weights, gate_up, down, limit, shared)
    unlike = len({(weight.kind, weight.group) for weight in all_weights}) > 1
    if unlike or route() == "numba" or down.shape[-1] % 16:  # the last: up begins inside a block of gate
        return _expert_by_expert(x, indices, weights, gate_up, down, limit, shared)
    rows, chosen, shares = x.detach().float().contiguous(), indices.contiguous(), weights.detach().float().contiguous()
    y = torch.empty_like(rows)
    _library().ff_experts(
        *_bits_and_span(gate_up),
        _table(gate_up, down, shared).data_ptr(),
        gate_up.shape[0],
        rows.data_ptr(),
        len(rows),
        rows.shape[1],
        chosen.data_ptr(),
        shares.data_ptr(),
        chosen.shape[1],
        limit,
        y.data_ptr(),
        shared is not None,
        team(),
    )
    return y.to(x.dtype)


def _expert_by_expert(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Quantized,
    down: Quantized,
    limit: float,
    shared: Shared | None,
) -> Tensor:
    def multiply(hidden: Tensor, by: Quantized) -> Tensor:
        return quantized_linear(hidden, by) + quantized_linear(_lost(hidden), by)

    out = torch.zeros(x.shape, dtype=torch.float32)
    for expert in indices.unique().tolist():
        token, slot = (indices == expert).nonzero(as_tuple=True)
        gate, up = quantized_linear(x[token].float(), gate_up[expert]).chunk(2, dim=-1)
        y = multiply(reference.swiglu(gate, up, limit), down[expert])
        out.index_add_(0, token, y * weights[token, slot, None].float())
    if shared is not None:
        gate, up = (quantized_linear(x.float(), weight) for weight in shared[:2])
        out += multiply(reference.swiglu(gate, up, limit), shared[2])
    return out.to(x.dtype)


def _lost(x: Tensor) -> Tensor:
    """What the kernels' rounding of activations [M, K] takes away."""
    groups = F.pad(x, (0, -x.shape[1] % COLUMNS)).unflatten(1, (-1, COLUMNS))
    scales = groups.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return (groups - (groups / scales).round() * scales).flatten(1)[:, : x.shape[1]]
