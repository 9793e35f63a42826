"""One decoded token of layers with compressed attention and hyper-connections (DeepSeek-V4, arXiv 2606.19348).

The same numbers as ``fourfold.model`` computes for the position that follows a cache; a twin does all layers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.ops.reference.attention import attention
from fourfold.ops.reference.experts import experts, swiglu
from fourfold.ops.reference.index import index_scores, select_topk
from fourfold.ops.reference.norm import at_least_float32, rms_norm
from fourfold.ops.reference.pool import pool
from fourfold.ops.reference.rope import apply_rope, rope_tables
from fourfold.ops.reference.streams import hyper_maps, mix_streams, read_streams


@dataclass(frozen=True)
class Site:
    """A hyper-connection, see :func:`hyper_maps`, and the weight [d] of the norm behind it."""

    fn: Tensor
    base: Tensor
    scale: Tensor
    norm: Tensor


@dataclass(frozen=True)
class Pooling:
    """A compressor: kv and gate [out, d], bias [ratio, out], norm [width]; out is 2 width where groups overlap."""

    kv: Tensor
    gate: Tensor | None
    bias: Tensor | None
    norm: Tensor


@dataclass(frozen=True)
class DecodeLayer:
    """The weights of a layer under the names of its modules, and where it keeps what: in numbers, the beginning of its
    rows in a tail and of its slots in a page. ratio 0: the window alone; the index parts are None where nothing
    selects, the router where the layer is dense: that is, has the shared expert alone."""

    attention_site: Site
    q_a: Tensor
    q_a_norm: Tensor
    q_b: Tensor
    kv: Tensor
    kv_norm: Tensor
    o_a: Tensor
    o_b: Tensor
    sinks: Tensor
    pool: Pooling | None
    index_pool: Pooling | None
    index_q: Tensor | None
    index_weights: Tensor | None
    mlp_site: Site
    router: Tensor | None
    router_bias: Tensor | None
    router_table: Tensor | None  # int64 [V, K]: experts by token
    gate_up: Tensor | None
    down: Tensor | None
    shared_gate: Tensor | None
    shared_up: Tensor | None
    shared_down: Tensor | None
    ratio: int
    overlaps: bool
    window_tail: int
    pool_tail: int
    index_tail: int
    entries: int
    keys: int


@dataclass(frozen=True, eq=False)
class DecodeLayers:
    """Layers and what they have in common; to be made anew when weights have moved.

    frequencies: float32 [2, rope / 2], of windows alone and of layers with entries, with their factors; share: what the
    experts' weights are multiplied by.
    """

    layers: tuple[DecodeLayer, ...]
    frequencies: Tensor
    rope_factors: tuple[float, float]
    heads: int
    groups: int
    window: int
    topk: int
    index_heads: int
    per_token: int
    scoring: str
    normed_shares: bool
    share: float
    limit: float
    iterations: int
    eps: float
    stream_eps: float

    @cached_property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All weights, in the order of their fields."""
        return tuple(t for layer in self.layers for t in weights_of(layer))


def weights_of(layer: DecodeLayer) -> list[Tensor | None]:
    """The weights of a layer in the order of its fields, those of its parts in their place."""
    found: list[Tensor | None] = []
    for name in (f.name for f in fields(layer)):
        value = getattr(layer, name)
        if name in ("attention_site", "mlp_site"):
            found += [getattr(value, f.name) for f in fields(Site)]
        elif name in ("pool", "index_pool"):
            found += [None if value is None else getattr(value, f.name) for f in fields(Pooling)]
        elif name == "ratio":
            break  # the rest are numbers
        else:
            found.append(value)
    return found


@dataclass(frozen=True)
class DecodeState:
    """What T sequences keep, see :class:`fourfold.model.cache.Cache`, and where they are.

    positions, tokens: int64 [T], of the new position; tails: float32 [tail width] of each sequence, before; new_tails:
    float32 [T, tail width], to be filled; pages: [P, numbers]; tables: int64 [T, m], the pages of each sequence.
    """

    positions: Tensor
    tokens: Tensor
    tails: list[Tensor]
    new_tails: Tensor
    pages: Tensor
    page_size: int
    tables: Tensor


def decode_layers(streams: Tensor, layers: DecodeLayers, state: DecodeState, first: int, last: int) -> Tensor:
    """Layers ``first`` .. ``last`` - 1 for one new position of each sequence. Changes tails and pages of the state.

    streams: [T, n, d]. Returns [T, n, d].
    """
    for layer in layers.layers[first:last]:
        streams = _site(streams, layer.attention_site, layers, partial(_attention, at=layer, of=layers, state=state))
        streams = _site(streams, layer.mlp_site, layers, partial(_feed_forward, at=layer, of=layers, state=state))
    return streams


def _site(streams: Tensor, site: Site, of: DecodeLayers, f: Callable[[Tensor], Tensor]) -> Tensor:
    maps = (site.fn, site.base, site.scale, True, of.iterations, of.stream_eps, of.eps)
    pre, post, comb = hyper_maps(streams, *maps)
    return mix_streams(streams, f(rms_norm(read_streams(streams, pre), site.norm, of.eps)), post, comb)


def _turn(x: Tensor, positions: Tensor, of: DecodeLayers, kind: int, back: bool = False) -> Tensor:
    """The last dimensions of x [T, ..., D] turned; kind: 1 in layers with entries."""
    cos, sin = rope_tables(positions, of.frequencies[kind], of.rope_factors[kind])
    still, turned = x.split([x.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]], dim=-1)
    return torch.cat([still, apply_rope(turned, cos, -sin if back else sin)], dim=-1)


def _attention(x: Tensor, at: DecodeLayer, of: DecodeLayers, state: DecodeState) -> Tensor:
    kind, head = int(at.ratio > 0), len(at.kv)
    q_latent = rms_norm(F.linear(x, at.q_a), at.q_a_norm, of.eps)
    q = rms_norm(F.linear(q_latent, at.q_b).unflatten(-1, (of.heads, head)), None, of.eps)
    q = _turn(q, state.positions, of, kind)
    kv = _turn(rms_norm(F.linear(x, at.kv), at.kv_norm, of.eps), state.positions, of, kind)
    if at.pool is not None:
        _pool(x, at, at.pool, at.pool_tail, at.entries, kv.dtype, of, state)
    if at.index_pool is not None and at.index_q is not None and at.index_weights is not None:
        _pool(x, at, at.index_pool, at.index_tail, at.keys, torch.float32, of, state)
        index_q = F.linear(at_least_float32(q_latent), at_least_float32(at.index_q)).unflatten(-1, (of.index_heads, -1))
        index_q = _turn(index_q, state.positions, of, kind)
        weights = F.linear(at_least_float32(x), at_least_float32(at.index_weights))
        weights = weights * (of.index_heads * index_q.shape[-1]) ** -0.5
    rows = []
    for t, position in enumerate(state.positions.tolist()):
        kept = state.tails[t][at.window_tail :][: (of.window - 1) * head].view(-1, head)
        state.new_tails[t, at.window_tail :][: kept.numel()] = torch.cat([kept, kv[t, None].float()])[1:].flatten()
        keys = torch.cat([kept[max(0, len(kept) - position) :].to(kv.dtype), kv[t, None]])
        if at.ratio:
            count = (position + 1) // at.ratio
            older = _slot(state, t, at.entries, at.ratio, head)[:count].to(kv.dtype)
            if at.index_q is not None:
                index_keys = _slot(state, t, at.keys, at.ratio, index_q.shape[-1])[:count]
                scores = index_scores(index_q[t, None, None], index_keys[None], weights[t, None, None])
                older = older[select_topk(scores, torch.ones_like(scores, dtype=torch.bool), of.topk)[0, 0]]
            keys = torch.cat([keys, older])
        seen = torch.ones(1, 1, len(keys), dtype=torch.bool, device=x.device)
        shared = keys[None, :, None]
        rows.append(attention(q[t, None, None], shared, shared, seen, head**-0.5, at.sinks)[0, 0])
    o = _turn(torch.stack(rows), state.positions, of, kind, back=True).flatten(1).unflatten(-1, (of.groups, -1))
    grouped = torch.einsum("tgi,goi->tgo", o, at.o_a.unflatten(0, (of.groups, -1)))
    return F.linear(grouped.flatten(1), at.o_b)


def _slot(state: DecodeState, t: int, start: int, ratio: int, width: int) -> Tensor:
    """The entries [n, width] of a slot in all pages of sequence t."""
    per_page = state.page_size // ratio
    pages = state.pages[:, start : start + per_page * width].unflatten(1, (per_page, width))
    return pages[state.tables[t]].flatten(0, 1)


def _pool(
    x: Tensor,
    at: DecodeLayer,
    by: Pooling,
    tail: int,
    slot: int,
    dtype: torch.dtype,
    of: DecodeLayers,
    state: DecodeState,
) -> None:
    """The tail moves on by one row of values and scores; a group that is complete becomes an entry of ``dtype``."""
    wide, width, ratio = at_least_float32(x), len(by.norm), at.ratio
    values = F.linear(wide, by.kv.to(wide.dtype))
    scores = torch.zeros_like(values) if by.gate is None else F.linear(wide, by.gate.to(wide.dtype))
    if by.bias is not None:
        scores = scores + by.bias[state.positions % ratio]
    pending = (2 * ratio if at.overlaps else ratio) - 1
    for t, position in enumerate(state.positions.tolist()):
        new = torch.cat([values[t], scores[t]])
        rows = torch.cat([state.tails[t][tail:][: pending * len(new)].view(-1, len(new)), new[None]])
        state.new_tails[t, tail:][: pending * len(new)] = rows[1:].flatten()
        if (position + 1) % ratio:
            continue
        number = position // ratio
        some, preferred = rows[-ratio:, None].chunk(2, dim=-1)
        if at.overlaps:
            older = [part[:ratio, None, :width] for part in rows.chunk(2, dim=-1)]
            some, preferred = some[..., width:], preferred[..., width:]
            if number:
                some, preferred = torch.cat([older[0], some]), torch.cat([older[1], preferred])
        entry = rms_norm(pool(some[:, 0], preferred[:, 0]), by.norm, of.eps)
        entry = _turn(entry[None], state.positions.new_tensor([number * ratio]), of, 1)[0].to(dtype)
        per_page = state.page_size // ratio
        start = slot + number % per_page * width
        state.pages[state.tables[t, number // per_page], start : start + width] = entry.to(state.pages.dtype)


def _feed_forward(x: Tensor, at: DecodeLayer, of: DecodeLayers, state: DecodeState) -> Tensor:
    parts = []
    if at.router is not None and at.gate_up is not None and at.down is not None:
        logits = F.linear(at_least_float32(x), at_least_float32(at.router))
        if of.scoring == "sqrtsoftplus":
            scores = F.softplus(logits).sqrt()
        else:
            scores = logits.sigmoid() if of.scoring == "sigmoid" else logits.softmax(-1)
        if at.router_table is not None:
            chosen = at.router_table[state.tokens]
        else:
            biased = scores if at.router_bias is None else scores + at.router_bias
            chosen = biased.topk(of.per_token, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if of.normed_shares:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        parts.append(experts(x, chosen, weights * of.share, at.gate_up, at.down, of.limit))
    if at.shared_gate is not None and at.shared_up is not None and at.shared_down is not None:
        hidden = swiglu(F.linear(x, at.shared_gate), F.linear(x, at.shared_up), of.limit)
        parts.append(F.linear(hidden, at.shared_down))
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
