"""Training for length on short windows: positions are skipped, so that they reach far (as PoSE, arXiv 2309.10400)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

from fourfold.model.sequence import Packed

PIECES = 8  # at most, that a sequence is cut into


def skip_positions(packed: Packed, span: int, *key: int) -> Packed:
    """The same tokens at positions with gaps between them; order, and what each may see, stay.

    Each sequence of n positions is cut into a few pieces, and the gaps before them stretch it to a length drawn between
    n and ``span``, every doubling as often, so that near and far are both learnt. key: what the draw depends on.
    """
    rng = np.random.default_rng([span, *key])
    positions = packed.positions.clone()
    bounds = packed.cu_seqlens.tolist()
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        n = end - start
        if not 1 < n < span:
            continue
        free = int(n * math.exp(rng.uniform(0, math.log(span / n)))) - n
        cuts = np.sort(rng.integers(0, n, rng.integers(1, PIECES + 1)))
        gaps = np.zeros(n, dtype=np.int64)
        np.add.at(gaps, cuts, (rng.dirichlet(np.ones(len(cuts))) * free).astype(np.int64))
        positions[start:end] += torch.from_numpy(gaps.cumsum()).to(positions.device)
    return dataclasses.replace(packed, positions=positions)
