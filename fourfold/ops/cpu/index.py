"""Top-k selection without sorting all keys, and without holding all scores where they lie in pages."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.ops import reference
from fourfold.ops.cpu import native
from fourfold.ops.cpu.quantized import route
from fourfold.ops.cpu.rows import FORMATS
from fourfold.ops.cpu.threads import team
from fourfold.ops.reference.index import queries_for


def select_topk(scores: Tensor, visible: Tensor, k: int) -> Tensor:
    """See :func:`fourfold.ops.reference.select_topk`: everything above the k-th score, then the newest of its ties."""
    if scores.shape[-1] <= k:
        return visible
    scores = scores.masked_fill(~visible, -torch.inf)
    threshold = scores.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, tied = scores > threshold, scores == threshold
    newer_ties = tied.flip(-1).cumsum(-1).flip(-1)
    return (above | (tied & (newer_ties <= k - above.sum(-1, keepdim=True)))) & visible


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
    """See :func:`fourfold.ops.reference.select_positions`; by the compiled kernel.

    Keys in fewer bits than float32 go through the matrix unit of the processor, if it has one; ``FOURFOLD_MATRIX=off``
    leaves that aside.
    """
    lying = [keys] if summaries is None else [keys, summaries]
    fits = all(t.dtype == keys.dtype and t.stride()[1:] == (t.shape[-1], 1) for t in lying)
    fits = fits and keys.dtype in FORMATS and q.dtype == weights.dtype == torch.float32
    if not fits or route() != "native":
        level = summaries, block_q, block_weights, blocks
        return reference.select_positions(q, weights, keys, pages, past, k, *level, ratio, floor)
    q, weights, pages, past = (t.detach().contiguous() for t in (q, weights, pages, past))
    q = queries_for(keys.dtype, q)
    if summaries is not None:
        assert block_q is not None and block_weights is not None
        block_q, block_weights = (
            queries_for(keys.dtype, block_q.detach()).contiguous(),
            block_weights.detach().contiguous(),
        )
    out = torch.empty(*q.shape[:2], k, dtype=torch.int64)
    library = native.library()
    assert library is not None
    library.ff_select_positions(
        keys.data_ptr(),
        None if summaries is None else summaries.data_ptr(),
        FORMATS[keys.dtype],
        pages.data_ptr(),
        pages.shape[1],
        keys.stride(0),
        0 if summaries is None else summaries.stride(0),
        keys.shape[1],
        1 if summaries is None else keys.shape[1] // summaries.shape[1],
        blocks,
        past.data_ptr(),
        ratio,
        floor,
        q.data_ptr(),
        weights.data_ptr(),
        None if block_q is None else block_q.data_ptr(),
        None if block_weights is None else block_weights.data_ptr(),
        *q.shape,
        k,
        out.data_ptr(),
        not native.matrix_unit(),
        team(),
    )
    return out
