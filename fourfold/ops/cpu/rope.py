"""Rotary embedding of a few rows in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.ops import reference
from fourfold.ops.cpu import native

FEW = 1 << 16  # numbers: more are worth torch's threads


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = True) -> Tensor:
    """See :func:`fourfold.ops.reference.apply_rope`."""
    library = native.library()
    single = x.dtype == cos.dtype == torch.float32 and x.shape[-1] == 2 * cos.shape[-1]
    learns = torch.is_grad_enabled() and x.requires_grad
    if library is None or not single or learns or not 0 < x.numel() <= FEW or x.dim() not in (2, 3):
        return reference.apply_rope(x, cos, sin, interleaved)
    rows = x if x.dim() == 3 else x[:, None]
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty(x.shape)
    library.ff_rope(
        rows.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        out.data_ptr(),
        *rows.shape,
        *rows.stride()[:2],
        interleaved,
    )
    return out
