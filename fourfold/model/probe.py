"""What happened inside one forward pass: the blocks write here, telemetry and x-ray read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Probe:
    """Collected per layer index, detached.

    stream_maps: site number -> comb maps [T, n, n]; experts: layer -> chosen experts [T, K];
    engram_gates: layer -> gates [T, n]; selected: layer -> list of bool [B, L, S], one per window; kept: layer of a
    two-level indexer -> list of float [B, L], the share of the flat choice among cached keys that it makes too.
    """

    stream_maps: dict[int, Tensor] = field(default_factory=dict)
    experts: dict[int, Tensor] = field(default_factory=dict)
    engram_gates: dict[int, Tensor] = field(default_factory=dict)
    selected: dict[int, list[Tensor]] = field(default_factory=dict)
    kept: dict[int, list[Tensor]] = field(default_factory=dict)

    def composite_gain(self) -> tuple[float, float]:
        """Amax gain of the product of all residual maps: (forward, backward), averaged over tokens.

        Forward is the largest absolute row sum of the map from first to last streams, backward the
        largest column sum (arXiv 2512.24880, section 3); doubly stochastic maps keep both at 1.
        """
        product: Tensor | None = None
        for _, comb in sorted(self.stream_maps.items()):
            step = comb.transpose(1, 2).double()  # new streams = comb^T old streams
            product = step if product is None else step @ product
        if product is None:
            return 1.0, 1.0
        sums = product.abs()
        return float(sums.sum(-1).amax(-1).mean()), float(sums.sum(-2).amax(-1).mean())


def expert_load(chosen: Tensor, n_experts: int) -> Tensor:
    """How often each expert was chosen, int64 [E], from indices of any shape."""
    return torch.bincount(chosen.flatten(), minlength=n_experts)
