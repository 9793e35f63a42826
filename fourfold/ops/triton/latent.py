"""Absorbed latent attention over cached pages: gathered rows, an online softmax, 16 heads of a query a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.ops import reference
from fourfold.ops.triton.common import LEAST, dot, fits, power

KEYS = 32  # gathered at a time


@triton.jit
def _attend(
    folded, q_rope, entries, pages, page_stride, per_page, each, indices, valid, out, heads, count, latent, rope, scale,
    HEADS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    query, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at, turned = tl.arange(0, WIDE), tl.arange(0, TURNED)
    some, inside, there = head < heads, at < latent, turned < rope
    line = query * heads + head
    q = tl.load(folded + line[:, None] * latent + at[None, :], some[:, None] & inside[None, :], 0.0)
    r = tl.load(q_rope + line[:, None] * rope + turned[None, :], some[:, None] & there[None, :], 0.0)
    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    gathered = tl.zeros([HEADS, WIDE], tl.float32)
    for start in range(0, count, COLUMNS):
        s = start + tl.arange(0, COLUMNS)
        counts = tl.load(valid + query * count + s, s < count, 0) != 0
        row = tl.load(indices + query * count + s, counts, 0)
        page = tl.load(pages + query * each + row // per_page, counts, 0)
        place = entries + page * page_stride + row % per_page * (latent + rope)
        k = tl.load(place[:, None] + at[None, :], counts[:, None] & inside[None, :], 0.0)
        k_rope = tl.load(place[:, None] + latent + turned[None, :], counts[:, None] & there[None, :], 0.0)
        k, k_rope = k.to(tl.float32), k_rope.to(tl.float32)
        scores = dot(q, tl.trans(k))
        scores += dot(r, tl.trans(k_rope))
        scores = tl.where(counts[None, :], scores * scale, float("-inf"))
        most = tl.maximum(tl.maximum(top, tl.max(scores, 1)), -1e30)  # finite where nothing counts yet
        shrink, probs = tl.exp(top - most), tl.exp(scores - most[:, None])
        total = total * shrink + tl.sum(probs, 1)
        gathered = gathered * shrink[:, None] + dot(probs, k)
        top = most
    place = out + line[:, None] * latent + at[None, :]
    tl.store(place, gathered / total[:, None], some[:, None] & inside[None, :])


def latent_attention(
    q: Tensor,
    q_rope: Tensor,
    expansions: Tensor,
    entries: Tensor,
    pages: Tensor,
    valid: Tensor,
    scale: float,
    indices: Tensor | None = None,
) -> Tensor:
    """See :func:`fourfold.ops.reference.latent_attention`; folding and unfolding are torch's."""
    if not fits(q, q_rope, expansions, entries, valid) or entries.stride()[1:] != (entries.shape[-1], 1):
        return reference.latent_attention(q, q_rope, expansions, entries, pages, valid, scale, indices)
    batch, heads, nope = q.shape
    latent, rope, count = expansions.shape[-1], q_rope.shape[-1], valid.shape[1]
    w_uk, w_uv = expansions.float().split([nope, expansions.shape[1] - nope], dim=1)
    folded = torch.einsum("bhn,hnr->bhr", q.float(), w_uk).contiguous()
    if indices is None:
        indices = torch.arange(count, device=q.device).expand(batch, -1)
    out = torch.empty_like(folded)
    _attend[(batch, triton.cdiv(heads, LEAST))](
        folded, q_rope.float().contiguous(), entries, pages.contiguous(), entries.stride(0), entries.shape[1],
        pages.shape[1], indices.contiguous(), valid.to(torch.int8).contiguous(), out, heads, count, latent, rope, scale,
        HEADS=LEAST, COLUMNS=KEYS, WIDE=power(latent), TURNED=power(rope),
    )  # fmt: skip
    return torch.einsum("bhr,hvr->bhv", out, w_uv).to(q.dtype)
