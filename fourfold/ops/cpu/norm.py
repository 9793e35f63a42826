"""RMSNorm of a few rows in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.ops import reference
from fourfold.ops.cpu import native

TYPES = (torch.float32, torch.bfloat16)
FEW = 16  # rows, of decoding: more are worth torch's threads


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See :func:`fourfold.ops.reference.rms_norm`."""
    library = native.library()
    width = x.shape[-1]
    usable = x.dtype in TYPES and (weight is None or (weight.dtype in TYPES and weight.dim() == 1))
    learns = torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad))
    if library is None or not usable or learns or x.numel() > FEW * width or not x.numel():
        return reference.rms_norm(x, weight, eps)
    wide, weight = x.float().contiguous(), None if weight is None else weight.float().contiguous()
    out = torch.empty_like(wide)
    library.ff_rms_norm(
        wide.data_ptr(),
        None,
        None if weight is None else weight.data_ptr(),
        out.data_ptr(),
        x.numel() // width,
        width,
        eps,
    )
    return out.to(x.dtype)
