"""RMSNorm with a learned weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fourfold import ops


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., dim]; statistics in float32, result in the dtype of x."""
        return ops.rms_norm(x, self.weight, self.eps)
