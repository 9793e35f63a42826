"""A matrix product with learned weights."""

from __future__ import annotations

from torch import Tensor, nn

from fourfold import ops


class Linear(nn.Linear):
    """``nn.Linear`` by the product that is fastest on its device."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in]. Returns [..., out]."""
        out: Tensor = ops.linear(x, self.weight, self.bias)
        return out
