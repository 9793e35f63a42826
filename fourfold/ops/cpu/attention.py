"""Attention that never holds the [L, S] probabilities of all queries.

Training, and anything with sinks, goes block by block of queries: a block reads only the keys that some query of it
sees (a causal past, a window, a document, a selection), in float32, and its probabilities are computed again in the
backward pass. So does bfloat16 that nobody learns from, by the matrix unit where there is one. The rest is the fused
kernel of torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fourfold.ops import reference
from fourfold.ops.cpu import native
from fourfold.ops.cpu.linear import HALF, product
from fourfold.ops.cpu.threads import team
from fourfold.ops.reference.norm import at_least_float32

BLOCK = 128  # queries
STEP = 64  # keys of a block are filled up to a multiple of it: oneDNN compiles each new shape


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, sinks: Tensor | None = None) -> Tensor:
    """See :func:`fourfold.ops.reference.attention`."""
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, sinks) if t is not None)
    several = q.shape[1] >= BLOCK // 2
    half = all(t.dtype == torch.bfloat16 for t in (q, k, v))
    if half and not learns and (several or sinks is not None) and q.numel() and native.matrix_unit():
        return _half_attention(q, k, v, visible, scale, sinks)
    if (learns or sinks is not None) and several:
        compiled = q.dtype != torch.float64 and native.library() is not None
        way = _Native if compiled else _Attention
        out: Tensor = way.apply(q, k, v, visible, scale, sinks)  # type: ignore[no-untyped-call]
        return out
    if half and not learns and not HALF:
        return attention(q.float(), k.float(), v.float(), visible, scale, sinks).to(q.dtype)
    if sinks is not None:  # the fused kernel knows no sink
        return reference.attention(q, k, v, visible, scale, sinks)
    narrow, width = v.shape[-1], q.shape[-1]
    if narrow < width:  # the fused kernel wants one head dimension
        v = F.pad(v, (0, width - narrow))
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=visible[:, None],
        scale=scale,
        enable_gqa=True,
    )
    return o.transpose(1, 2)[..., :narrow]


def _half_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, sinks: Tensor | None) -> Tensor:
    """By the matrix unit, which takes bfloat16 as it is."""
    given = [t.detach().contiguous() for t in (q, k, v)]
    visible = visible if visible.stride(-1) == 1 else visible.contiguous()
    fine = None if sinks is None else sinks.detach().float().contiguous()
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    library = native.library()
    assert library is not None
    library.ff_half_attention(
        *(t.data_ptr() for t in given),
        *_where(visible),
        None if fine is None else fine.data_ptr(),
        out.data_ptr(),
        *_sizes(q, k, v),
        scale,
        team(),
    )
    return out


def attention_mass(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Tensor:
    """See :func:`fourfold.ops.reference.attention_mass`; without a gradient, as the reference."""
    with torch.no_grad():
        q, k = at_least_float32(q), at_least_float32(k)
        mass = q.new_zeros(visible.shape)
        for batch, queries, keys, hidden in _blocks(visible):
            for group, heads in _groups(q, k):
                rows = q[batch, queries, heads].flatten(0, 1)
                scores = _scores(rows, k[batch, keys, group], hidden, scale)
                mass[batch, queries].index_add_(-1, keys, _softmax(scores, None)[0].sum(1))
        return mass


def _blocks(visible: Tensor) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """Batch, queries, the keys int64 [C] that some of them see, and bool [n, 1, C] what each does not see."""
    for batch in range(visible.shape[0]):
        for start in range(0, visible.shape[1], BLOCK):
            seen = visible[batch, start : start + BLOCK]
            keys = seen.any(0).nonzero()[:, 0]
            if len(keys):
                count = len(keys)
                keys = F.pad(keys, (0, -count % STEP))
                hidden = ~seen[:, keys]
                hidden[:, count:] = True
                yield batch, slice(start, start + len(seen)), keys, hidden[:, None]


def _groups(q: Tensor, k: Tensor) -> Iterator[tuple[int, slice]]:
    """The heads of q [B, L, H, D] that share each of k [B, S, G, D]."""
    share = q.shape[2] // k.shape[2]
    for group in range(k.shape[2]):
        yield group, slice(group * share, (group + 1) * share)


def _scores(q: Tensor, k: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """[n, R, C], -inf where hidden. q: [n R, D]; k: [C, D]."""
    return product(q, k).view(len(hidden), -1, len(k)).mul_(scale).masked_fill_(hidden, -torch.inf)


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities, 0 for a query that sees nothing, and the logarithm of what they were divided by, [n, R, 1]."""
    top = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    if sinks is not None:
        top = top.maximum(sinks[:, None])
    probs = scores.sub_(top).exp_()
    total = probs.sum(-1, keepdim=True)
    if sinks is not None:
        total += (sinks[:, None] - top).exp()
    total.clamp_min_(torch.finfo(scores.dtype).tiny)
    return probs.div_(total), top + total.log()


class _Native(torch.autograd.Function):
    """The compiled kernels, float32."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, sinks: Tensor | None
    ) -> Tensor:
        wide = [t.float().contiguous() for t in (q, k, v)]
        visible = visible if visible.stride(-1) == 1 else visible.contiguous()
        out = torch.empty(*q.shape[:3], v.shape[-1])
        logs = torch.empty(q.shape[:3])
        fine = None if sinks is None else sinks.detach().float().contiguous()
        library = native.library()
        assert library is not None
        library.ff_attention(
            *(t.data_ptr() for t in wide),
            *_where(visible),
            None if fine is None else fine.data_ptr(),
            *(t.data_ptr() for t in (out, logs)),
            *_sizes(q, k, v),
            scale,
            team(),
        )
        ctx.save_for_backward(q, k, v, visible, sinks, out, logs)
        ctx.scale = scale
        return out.to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *saved, visible, sinks, out, logs = ctx.saved_tensors
        q, k, v, g = (t.float().contiguous() for t in (*saved, grads[0]))
        inner, dq, (dk, dv) = (
            torch.empty_like(logs),
            torch.empty_like(q),
            (torch.zeros(*t.shape[:2], q.shape[2], t.shape[3]) for t in (k, v)),
        )
        library = native.library()
        assert library is not None
        library.ff_attention_backward(
            *(t.data_ptr() for t in (q, k, v)),
            *_where(visible),
            *(t.data_ptr() for t in (out, logs, g, inner, dq, dk, dv)),
            *_sizes(q, k, v),
            ctx.scale,
            team(),
        )
        if k.shape[2] < q.shape[2]:
            dk, dv = (d.unflatten(2, (k.shape[2], -1)).sum(3) for d in (dk, dv))
        dq, dk, dv = (d.to(t.dtype) for d, t in zip((dq, dk, dv), saved, strict=True))
        return dq, dk, dv, None, None, _sink_gradient(sinks, logs, inner)


def _where(visible: Tensor) -> tuple[int, int, int]:
    return visible.data_ptr(), visible.stride(0), visible.stride(1)


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    """Batch, queries, keys, heads, groups of heads, features of a key and of a value."""
    return (*q.shape[:2], k.shape[1], q.shape[2], *k.shape[2:], v.shape[-1])


def _sink_gradient(sinks: Tensor | None, logs: Tensor, inner: Tensor) -> Tensor | None:
    if sinks is None:
        return None
    return -((sinks.to(logs.dtype) - logs).exp() * inner).sum((0, 1)).to(sinks.dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, sinks: Tensor | None
    ) -> Tensor:
        wide = [at_least_float32(t) for t in (q, k, v)]
        out, logs = wide[0].new_zeros(*q.shape[:3], v.shape[-1]), wide[0].new_zeros(q.shape[:3])
        fine = None if sinks is None else sinks.to(out.dtype)
        for batch, queries, keys, hidden in _blocks(visible):
            for group, heads in _groups(q, k):
                rows = wide[0][batch, queries, heads].flatten(0, 1)
                scores = _scores(rows, wide[1][batch, keys, group], hidden, scale)
                probs, log = _softmax(scores, None if fine is None else fine[heads])
                values = product(probs.flatten(0, 1), wide[2][batch, keys, group].T)
                out[batch, queries, heads] = values.view(*probs.shape[:2], -1)
                logs[batch, queries, heads] = log[..., 0]
        ctx.save_for_backward(q, k, v, visible, sinks, out.to(v.dtype), logs)
        ctx.scale = scale
        return out.to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *saved, visible, sinks, out, logs = ctx.saved_tensors
        q, k, v, out, g = (at_least_float32(t) for t in (*saved, out, grads[0]))
        dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        inner = (g * out).sum(-1)  # [B, L, H]
        for batch, queries, keys, hidden in _blocks(visible):
            for group, heads in _groups(q, k):
                rows, g_rows = q[batch, queries, heads].flatten(0, 1), g[batch, queries, heads].flatten(0, 1)
                some_k, some_v = k[batch, keys, group], v[batch, keys, group]
                probs = _scores(rows, some_k, hidden, ctx.scale).sub_(logs[batch, queries, heads, None]).exp_()
                dscores = product(g_rows, some_v).view_as(probs).sub_(inner[batch, queries, heads, None])
                dscores = dscores.mul_(probs).mul_(ctx.scale).flatten(0, 1)
                dq[batch, queries, heads] = product(dscores, some_k.T).view(*probs.shape[:2], -1)
                dk[batch, :, group].index_add_(0, keys, product(dscores.T, rows.T))
                dv[batch, :, group].index_add_(0, keys, product(probs.flatten(0, 1).T, g_rows.T))
        dq, dk, dv = (d.to(t.dtype) for d, t in zip((dq, dk, dv), saved, strict=True))
        return dq, dk, dv, None, None, _sink_gradient(sinks, logs, inner)
