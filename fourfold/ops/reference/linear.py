"""Matrix products with weights."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fourfold.ops.reference.norm import at_least_float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``. x: [..., in]; weight: [out, in]; bias: [out] or None. Returns [..., out]."""
    return F.linear(x, weight, bias)


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """:func:`linear` of x [..., in] and weight [out, in] in float32 (float64, where x is that)."""
    wide = at_least_float32(x)
    return F.linear(wide, weight.to(wide.dtype))
