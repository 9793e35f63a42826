"""Rotary embedding in one call: of a few rows, and of half types that nobody learns from."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.ops import reference
from fourfold.ops.cpu import native
from fourfold.ops.cpu.threads import team

FEW = 1 << 16  # float32 numbers: more are worth torch's threads


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = True) -> Tensor:
    """See :func:`fourfold.ops.reference.apply_rope`."""
    library = native.library()
    half = x.dtype == torch.bfloat16
    usable = (half or (x.dtype == torch.float32 and x.numel() <= FEW)) and cos.dtype == torch.float32
    learns = torch.is_grad_enabled() and x.requires_grad
    fits = x.dim() in (2, 3) and x.numel() and x.shape[-1] >= 2 * cos.shape[-1]
    if library is None or not usable or learns or not fits:
        return reference.apply_rope(x, cos, sin, interleaved)
    rows = x if x.dim() == 3 else x[:, None]
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    library.ff_rope(
        half,
        rows.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        out.data_ptr(),
        *rows.shape,
        2 * cos.shape[-1],
        *rows.stride()[:2],
        interleaved,
        team(),
    )
    return out
