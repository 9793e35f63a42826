"""Latent attention of one query a sequence, over cached pages where they lie, by the compiled kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.ops import reference
from fourfold.ops.cpu import native
from fourfold.ops.cpu.quantized import route
from fourfold.ops.cpu.rows import FORMATS
from fourfold.ops.cpu.threads import team

TYPES = (torch.float32, torch.bfloat16)


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
    """See :func:`fourfold.ops.reference.latent_attention`."""
    tensors = (q, q_rope, expansions, entries)
    usable = (
        all(t.dtype in TYPES for t in tensors[:3])
        and entries.dtype in FORMATS
        and entries.stride()[1:] == (entries.shape[-1], 1)
    )
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not usable or learns or route() != "native":
        return reference.latent_attention(q, q_rope, expansions, entries, pages, valid, scale, indices)
    batch, heads, nope = q.shape
    wide, wide_rope, expansions = q.float().contiguous(), q_rope.float().contiguous(), expansions.contiguous()
    valid = valid.contiguous()
    if pages.stride(-1) != 1:
        pages = pages.contiguous()
    indices = None if indices is None else indices.contiguous()
    v = expansions.shape[1] - nope
    out = torch.empty(batch, heads, v)
    library = native.library()
    assert library is not None
    library.ff_latent_attention(
        entries.data_ptr(),
        FORMATS[entries.dtype],
        pages.data_ptr(),
        pages.stride(0),  # 0: all queries are of one sequence
        entries.stride(0),
        entries.shape[1],
        None if indices is None else indices.data_ptr(),
        valid.data_ptr(),
        valid.shape[1],
        wide.data_ptr(),
        wide_rope.data_ptr(),
        expansions.data_ptr(),
        expansions.dtype == torch.bfloat16,
        batch,
        heads,
        nope,
        q_rope.shape[-1],
        v,
        expansions.shape[-1],
        scale,
        out.data_ptr(),
        team(),
    )
    return out.to(q.dtype)
