"""Multi-head n-gram hashing of Engram (arXiv 2601.07372)."""

from __future__ import annotations

import torch
from torch import Tensor


def ngram_rows(grams: Tensor, multipliers: Tensor, primes: Tensor, offsets: Tensor) -> Tensor:
    """Table rows of the n-grams that end at each position.

    grams: int64 [T, N], compressed id k positions back in column k; multipliers: int64 [N], odd;
    primes, offsets: int64 [N - 1, J], per order 2..N and head. Returns int64 [T, (N - 1) * J].
    """
    products = grams * multipliers
    mixed = products[:, 0]
    rows = []
    for order in range(1, grams.shape[1]):
        mixed = torch.bitwise_xor(mixed, products[:, order])
        rows.append(mixed[:, None] % primes[order - 1] + offsets[order - 1])
    return torch.cat(rows, dim=-1)
