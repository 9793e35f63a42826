"""Engram's hashing, a position a lane."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.ops import reference
from fourfold.ops.triton.common import fits

BLOCK = 128  # positions of a program


@triton.jit
def _rows(grams, multipliers, primes, offsets, out, count, N: tl.constexpr, J: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = at < count
    mixed = tl.load(grams + at * N, inside, 0) * tl.load(multipliers)
    for order in tl.static_range(1, N):
        mixed = mixed ^ (tl.load(grams + at * N + order, inside, 0) * tl.load(multipliers + order))
        for head in tl.static_range(J):
            column = (order - 1) * J + head
            prime = tl.load(primes + column)
            row = mixed % prime
            row = tl.where(row < 0, row + prime, row)  # the remainder has the sign of the prime
            tl.store(out + at * (N - 1) * J + column, row + tl.load(offsets + column), inside)


def ngram_rows(grams: Tensor, multipliers: Tensor, primes: Tensor, offsets: Tensor) -> Tensor:
    """See :func:`fourfold.ops.reference.ngram_rows`."""
    if not fits(grams, multipliers, primes, offsets) or grams.dtype != torch.int64:
        return reference.ngram_rows(grams, multipliers, primes, offsets)
    grams, multipliers, primes, offsets = (t.contiguous() for t in (grams, multipliers, primes, offsets))
    count, (orders, heads) = len(grams), primes.shape
    out = torch.empty(count, orders * heads, dtype=torch.int64, device=grams.device)
    _rows[(triton.cdiv(count, BLOCK),)](
        grams, multipliers, primes, offsets, out, count, N=orders + 1, J=heads, SIZE=BLOCK
    )
    return out
