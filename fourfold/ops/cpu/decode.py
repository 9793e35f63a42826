"""Layers of one decoded token in one call of the compiled kernels."""

from __future__ import annotations

import ctypes
from itertools import chain
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fourfold.ops import reference
from fourfold.ops.cpu import native
from fourfold.ops.cpu.quantized import route
from fourfold.ops.cpu.threads import team
from fourfold.ops.reference.decode import DecodeLayers, DecodeState, weights_of

TYPES = (torch.float32, torch.bfloat16)
SCORING = ("sigmoid", "sqrtsoftplus", "softmax")
NUMBERS = ("ratio", "overlaps", "window_tail", "pool_tail", "index_tail", "entries", "keys")


class _Step(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("positions", "tokens", "tails", "new_tails")),
        ("tail_width", ctypes.c_int64),
        ("pages", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("half_pages", "page_stride", "page_size")),
        ("tables", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("table_width", "threads", "vectors")),
    ]


class _Known:
    """What the kernels are told about some layers, whose weights stay where they are."""

    def __init__(self, of: DecodeLayers, streams: Tensor) -> None:
        tensors = [t for t in of.tensors if t is not None]
        self.table = torch.zeros(
            len(of.layers), 2 * len(weights_of(of.layers[0])) + len(NUMBERS) + 1, dtype=torch.int64
        )
        for at, layer in zip(self.table, of.layers, strict=True):
            pairs = [(0, 0) if t is None else (t.data_ptr(), t.dtype == torch.bfloat16) for t in weights_of(layer)]
            shared = 0 if layer.shared_gate is None else len(layer.shared_gate)
            numbers = [int(getattr(layer, name)) for name in NUMBERS]
            at.copy_(torch.tensor([*chain.from_iterable(pairs), *numbers[:2], shared, *numbers[2:]]))
        one = of.layers[0]
        index = next((x for x in of.layers if x.index_q is not None), None)
        routed = next((x for x in of.layers if x.router is not None), None)
        sizes = [
            streams.shape[2], streams.shape[1], of.heads, len(one.kv), 2 * of.frequencies.shape[1], len(one.q_a),
            of.groups, len(one.o_a) // of.groups, of.window, of.index_heads,
            0 if index is None or index.index_pool is None else len(index.index_pool.norm), of.topk,
            0 if routed is None or routed.router is None else len(routed.router), of.per_token,
            0 if routed is None or routed.down is None else routed.down.shape[-1], SCORING.index(of.scoring),
            of.normed_shares, of.iterations, streams.dtype == torch.bfloat16,
        ]  # fmt: skip
        self.sizes = torch.tensor(sizes, dtype=torch.int64)
        self.factors = torch.tensor([of.eps, of.stream_eps, len(one.kv) ** -0.5, of.limit, of.share, *of.rope_factors])
        self.frequencies = of.frequencies.float().contiguous()
        self.usable = streams.dtype in TYPES and all(t.dtype in TYPES or t.dtype == torch.int64 for t in tensors)
        self.usable &= all(t.is_contiguous() and t.is_cpu for t in tensors) and streams.shape[1] <= 8
        self.dtype = streams.dtype
        self.fixed = tuple(t.data_ptr() for t in (self.sizes, self.factors))


_known: WeakKeyDictionary[DecodeLayers, _Known] = WeakKeyDictionary()


def decode_layers(streams: Tensor, layers: DecodeLayers, state: DecodeState, first: int, last: int) -> Tensor:
    """See :func:`fourfold.ops.reference.decode_layers`."""
    known = _known.get(layers)
    if known is None or known.dtype != streams.dtype:
        known = _known[layers] = _Known(layers, streams)
    pages = state.pages
    if not known.usable or pages.dtype not in TYPES or pages.stride(1) != 1 or route() != "native":
        return reference.decode_layers(streams, layers, state, first, last)
    library = native.library()
    assert library is not None
    rows, tables = len(streams), state.tables
    out = torch.empty(streams.shape).copy_(streams)
    tails = (ctypes.c_void_p * rows)(*map(Tensor.data_ptr, state.tails))
    step = _Step(
        rows,
        state.positions.data_ptr(),
        state.tokens.data_ptr(),
        ctypes.addressof(tails),
        state.new_tails.data_ptr(),
        state.new_tails.shape[1],
        pages.data_ptr(),
        pages.dtype == torch.bfloat16,
        pages.stride(0),
        state.page_size,
        tables.data_ptr(),
        tables.shape[1],
        team(),
        not native.matrix_unit(),
    )
    table = known.table.data_ptr() + first * known.table.shape[1] * 8
    where = *known.fixed, ctypes.addressof(step), known.frequencies.data_ptr(), out.data_ptr()
    library.ff_decode_layers(table, last - first, *where)
    return out.to(streams.dtype)
