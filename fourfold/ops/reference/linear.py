"""Matrix products with weights."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``. x: [..., in]; weight: [out, in]; bias: [out] or None. Returns [..., out]."""
    return F.linear(x, weight, bias)
