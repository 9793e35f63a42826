"""The lightning indexer's score and its selection (DeepSeek-V3.2, section 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.ops.reference.norm import at_least_float32
from fourfold.ops.reference.rows import decode_rows


def index_scores(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """``I[t, s] = sum_h w[t, h] * relu(q[t, h] . k[s])`` in float32.

    q: [B, L, H, D]; k: [B, S, D]; weights: [B, L, H]. Returns [B, L, S].
    """
    q, k, weights = at_least_float32(q), at_least_float32(k), at_least_float32(weights)
    return torch.einsum("blhs,blh->bls", torch.einsum("blhd,bsd->blhs", q, k).relu(), weights)


def select_topk(scores: Tensor, visible: Tensor, k: int) -> Tensor:
    """The k visible keys with the largest scores; of equal scores the most recent key wins.

    The rule makes prefill, chunked prefill and decode choose alike: relu gives many exact zeros.
    scores: [B, L, S]; visible: bool [B, L, S]. Returns bool [B, L, S] with at most k true per query.
    """
    newest_first = scores.masked_fill(~visible, -torch.inf).flip(-1)
    order = newest_first.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    chosen = torch.zeros_like(visible).scatter(-1, scores.shape[-1] - 1 - order, True)
    return chosen & visible


def block_summaries(k: Tensor, size: int) -> Tensor:
    """The summaries of whole blocks of ``size`` keys: their largest number in each dimension, so that a key worth
    finding is not lost among its neighbours, as it is in a mean. k: [..., S, D]. Returns [..., S // size, D]."""
    blocks = k.shape[-2] // size
    return k[..., : blocks * size, :].unflatten(-2, (blocks, size)).amax(-2)


def candidate_keys(
    q: Tensor,
    summaries: Tensor,
    weights: Tensor,
    positions: Tensor,
    size: int,
    blocks: int,
    count: int,
    k: int,
) -> Tensor:
    """The keys that are worth an exact score: those of the blocks of a query's newest ``k`` keys, which win among equal
    scores, and of the ``blocks - 1`` best blocks before those.

    A query's choice rests on whole blocks before its own, hence on nothing after it, however its sequence is cut.
    q, weights: of :func:`index_scores`; summaries: [B, n, D]; positions: int64 [B, L]. Returns bool [B, L, count].
    """
    own, newest = (positions // size)[..., None], ((positions - k + 1).clamp_min(0) // size)[..., None]
    number = torch.arange(max(summaries.shape[1], -(-count // size)), device=q.device)
    scores = index_scores(q, summaries, weights)
    scores = F.pad(scores, (0, len(number) - scores.shape[-1]))
    best = select_topk(scores, (number < newest) & (number < summaries.shape[1]), blocks - 1)
    return (best | (number >= newest) & (number <= own)).repeat_interleave(size, dim=-1)[..., :count]


def queries_for(dtype: torch.dtype, q: Tensor) -> Tensor:
    """Queries in bfloat16 where keys lie in no more bits: a matrix unit multiplies those, and either loses as much."""
    return q if dtype in (torch.float32, torch.float64) else q.bfloat16().to(q.dtype)


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
    """:func:`select_topk` of :func:`index_scores` of :func:`queries_for` cached pages, as positions.

    q, weights: of :func:`index_scores`; keys: [P, page_size, row_width of D], rows of any format; pages: int64 [B, m],
    those of each sequence; past: int64 [B], positions before the first query; summaries: [P, page_size / size,
    row_width of D], then among the :func:`candidate_keys` alone, by block_q and block_weights, which are like q and
    weights; ratio: positions that a key stands for, which is seen from the last of them on; floor: a key's score
    below counts as it. Returns int64 [B, L, k], ascending, -1 after the last.
    """
    q = queries_for(keys.dtype, q)
    rows = decode_rows(keys[pages].flatten(1, 2), [q.shape[-1]])
    positions = (past[:, None] + torch.arange(1, q.shape[1] + 1, device=q.device)) // ratio - 1  # newest key of each
    number = torch.arange(rows.shape[1], device=q.device)
    visible = number <= positions[..., None]
    if summaries is not None:
        assert block_q is not None and block_weights is not None
        size = keys.shape[1] // summaries.shape[1]
        block_q = queries_for(keys.dtype, block_q)
        lying = decode_rows(summaries[pages].flatten(1, 2), [q.shape[-1]])
        visible = visible & candidate_keys(block_q, lying, block_weights, positions, size, blocks, len(number), k)
    chosen = select_topk(index_scores(q, rows, weights).clamp_min(floor), visible, k)
    return chosen_positions(chosen, k)


def chosen_positions(chosen: Tensor, k: int) -> Tensor:
    """A mask of at most k keys a query as int64 [B, L, k]: ascending positions, -1 after the last."""
    number = torch.arange(chosen.shape[-1], device=chosen.device)
    none = chosen.shape[-1]
    found = torch.where(chosen, number, none).sort(-1).values[..., :k]
    found = F.pad(found, (0, k - found.shape[-1]), value=none)
    return found.masked_fill(found == none, -1)
