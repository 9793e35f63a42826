"""RMSNorm in one call: of a few rows, and of half types that nobody learns from."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.ops import reference
from fourfold.ops.cpu import native
from fourfold.ops.cpu.threads import team

TYPES = (torch.float32, torch.bfloat16)
FEW = 16  # float32 rows, of decoding: more are worth torch's threads


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See :func:`fourfold.ops.reference.rms_norm`."""
    library = native.library()
    width = x.shape[-1]
    usable = x.dtype in TYPES and (weight is None or (weight.dtype in TYPES and weight.dim() == 1))
    learns = torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad))
    half = x.dtype == torch.bfloat16
    if library is None or not usable or learns or not x.numel() or (x.numel() > FEW * width and not half):
        return reference.rms_norm(x, weight, eps)
    x, weight = x.contiguous(), None if weight is None else weight.float().contiguous()
    out, at = torch.empty_like(x), None if weight is None else weight.data_ptr()
    rows = x.numel() // width
    if half:
        library.ff_half_rms_norm(x.data_ptr(), at, out.data_ptr(), rows, width, eps, team())
    else:
        library.ff_rms_norm(x.data_ptr(), None, at, out.data_ptr(), rows, width, eps)
    return out
