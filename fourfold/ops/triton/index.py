"""The lightning indexer: scores tile by tile of queries and keys, and a selection that never holds all of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.ops import reference
from fourfold.ops.reference.index import queries_for
from fourfold.ops.triton.common import LEAST, dot, fits, power

KEYS = 64  # of a program
CHUNK = 8192  # keys whose scores are held at a time


@triton.jit
def _scores(
    q, k, weights, out, queries, keys, heads, dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr
):
    batch = tl.program_id(0).to(tl.int64)
    row, column = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    at = tl.arange(0, WIDE)
    some, there, inside = row < queries, column < keys, at < dim
    key = tl.load(k + (batch * keys + column[None, :]) * dim + at[:, None], inside[:, None] & there[None, :], 0.0)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for head in range(heads):
        line = (batch * queries + row) * heads + head
        query = tl.load(q + line[:, None] * dim + at[None, :], some[:, None] & inside[None, :], 0.0)
        total += tl.maximum(dot(query, key), 0.0) * tl.load(weights + line, some, 0.0)[:, None]
    place = out + (batch * queries + row[:, None]) * keys + column[None, :]
    tl.store(place, total, some[:, None] & there[None, :])


def index_scores(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """See :func:`fourfold.ops.reference.index_scores`."""
    if not fits(q, k, weights):
        return reference.index_scores(q, k, weights)
    dtype = q.dtype if q.dtype == k.dtype else torch.float32
    q, k, weights = q.to(dtype).contiguous(), k.to(dtype).contiguous(), weights.float().contiguous()
    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    out = torch.empty(batch, queries, keys, device=q.device)
    _scores[(batch, triton.cdiv(queries, LEAST), triton.cdiv(keys, KEYS))](
        q, k, weights, out, queries, keys, heads, dim, ROWS=LEAST, COLUMNS=KEYS, WIDE=power(dim)
    )
    return out


def select_positions(
    q: Tensor,
    weights: Tensor,
    keys: Tensor,
    pages: Tensor,
    past: Tensor,
    k: int,
    summaries: Tensor | None = None,
    block_q: Tensor | None = None,
    block_weights: Tensor | None = None,
    blocks: int = 0,
    ratio: int = 1,
    floor: float = -torch.inf,
) -> Tensor:
    """See :func:`fourfold.ops.reference.select_positions`. One level; with summaries the reference."""
    if summaries is not None or not fits(q, weights, keys):
        level = summaries, block_q, block_weights, blocks
        return reference.select_positions(q, weights, keys, pages, past, k, *level, ratio, floor)
    q = queries_for(keys.dtype, q)
    size, queries = keys.shape[1], q.shape[1]
    seen = (past[:, None, None] + torch.arange(1, queries + 1, device=q.device)[:, None]) // ratio
    best = torch.full((len(q), queries, k), -torch.inf, device=q.device)
    places = torch.full(best.shape, -1, dtype=torch.int64, device=q.device)
    step = max(1, CHUNK // size)
    for first in range(0, pages.shape[1], step):
        rows = keys[pages[:, first : first + step]].flatten(1, 2)
        number = first * size + torch.arange(rows.shape[1], device=q.device)
        scores = index_scores(q, rows, weights).clamp_min(floor).masked_fill(number >= seen, -torch.inf)
        # newest first, so that a stable sort leaves the newest of equal ones before the others
        scores = torch.cat([scores.flip(-1), best], dim=-1)
        number = torch.cat([number.flip(0).expand(*best.shape[:2], -1), places], dim=-1)
        best, order = scores.sort(dim=-1, descending=True, stable=True)
        best, places = best[..., :k], number.gather(-1, order[..., :k])
    none = pages.shape[1] * size
    found = places.masked_fill(best == -torch.inf, none).sort(-1).values
    return found.masked_fill(found == none, -1)
