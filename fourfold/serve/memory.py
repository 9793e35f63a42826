"""How much memory an engine takes, and how many cache pages a given amount leaves room for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fourfold import counts
from fourfold.config import ModelConfig
from fourfold.model.cache import layout, page_elements
from fourfold.model.transformer import Model
from fourfold.serve.pagefile import resident_bytes, spans

DEFAULT_CACHE = 2**30  # bytes
TAIL_CACHE = 2**28  # bytes that the tails of prefixes may take
TAIL_SHARE = 8  # of a limited memory, one part in so many at most goes to tails


class MemoryTooSmall(ValueError):
    """The model cannot be served in the memory given; the message says what would fit."""


@dataclass(frozen=True)
class Budget:
    """Bytes by use. ``tails`` is what the ``max_tails`` tails of prefixes take; the interpreter comes on top.

    ``cache``: what the pages take in memory, of which ``rows`` are rows of attention; less than all that they are
    where they lie in a file.
    """

    weights: int
    workspace: int
    page: int
    pages: int
    max_tails: int
    tails: int
    page_size: int
    cache: int
    rows: int

    @property
    def total(self) -> int:
        return self.weights + self.workspace + self.tails + self.cache


def weight_bytes(model: Model) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def workspace_bytes(cfg: ModelConfig, positions: int, sequences: int, context: int) -> int:
    """An estimate, from above, of what one step needs beside weights and cache.

    It computes ``positions`` positions of ``sequences`` sequences that see up to ``context`` keys: streams, expert and
    attention inputs, the scores of every head and of the indexer, logits and their probabilities.
    """
    a, moe = cfg.attention, cfg.moe
    experts = (moe.num_experts_per_tok + moe.n_shared_experts) * moe.moe_intermediate_size
    row = 6 * cfg.residual.streams * cfg.hidden_size + 4 * max(cfg.intermediate_size, experts)
    keys = 2 * a.num_attention_heads + (cfg.indexer.n_heads if cfg.indexer.mode != "off" else 0)
    scores = positions * keys * context
    expanded = 2 * context * a.num_attention_heads * max(a.head_dim, a.qk_nope_head_dim + a.v_head_dim)
    logits = sequences * cfg.vocab_size * (4 + 6 * 8)  # float32, then float64 for sampling
    return 4 * (positions * row + scores + expanded) + logits


def make_budget(
    model: Model,
    *,
    memory: int | None,
    pages: int | None,
    page_size: int,
    positions: int,
    sequences: int,
    mtp: bool = False,
    cache_dtype: torch.dtype | None = None,
    file: int | None = None,
) -> Budget:
    """How a model is served in ``memory`` bytes (None: as a gigabyte of cache allows), ``pages`` overriding the size.

    ``page_size`` is rounded up to what the layout needs; ``mtp``: whether the cache holds that block too;
    ``cache_dtype``: the format of its rows (None: the dtype of the weights); ``file``: bytes of a file that the pages
    lie in, of which so much is kept in memory as there is room for.
    Raises MemoryTooSmall with the numbers.
    """
    cfg, dtype = model.cfg, cache_dtype or next(model.parameters()).dtype
    kept = layout(cfg, mtp, dtype)
    page_size = math.lcm(page_size, kept.multiple)
    page = page_elements(kept, page_size) * dtype.itemsize
    tail = 4 * kept.tail_width
    context = cfg.max_position_embeddings
    weights = weight_bytes(model)
    # Of a page in a file the rows of one layer are needed at a time, and all else is.
    layers = [stop - start for start, stop in spans(kept, page_size).values()]
    rest = page - sum(layers) if file is not None else 0
    held = page if file is None else min(page, rest + max(map(resident_bytes, layers)))
    most = (DEFAULT_CACHE if file is None else file) // page
    if file is not None and not most:
        raise MemoryTooSmall(f"context_pages_size: is {size(file)}; one page takes {size(page)}")
    if memory is None:
        pages = pages or max(1, min(-(-4 * context // page_size), most))
        workspace = workspace_bytes(cfg, positions, sequences, min(context, pages * page_size))
        max_tails = max(1, TAIL_CACHE // tail) if tail else 0
        rows = (
            pages * (page - rest)
            if file is None
            else min(pages * (page - rest), max(DEFAULT_CACHE, pages * (held - rest)))
        )
        tails = max_tails * tail
        return Budget(weights, workspace, page, pages, max_tails, tails, page_size, pages * rest + rows, rows)
    live = 2 * sequences * tail  # before and after a step
    shortest = min(context, -(-2 * positions // page_size) * page_size)
    fewest = pages or shortest // page_size
    # Longer sequences need more workspace as well as more pages; both are linear in the positions of the cache.
    least = weights + workspace_bytes(cfg, positions, sequences, shortest) + live + tail + fewest * held
    if least > memory:
        raise MemoryTooSmall(too_small(memory, weights, least, shortest))
    max_tails = max(1, min(TAIL_CACHE, (memory - least) // TAIL_SHARE) // tail) if tail else 0
    left = memory - weights - live - max_tails * tail
    if pages is None:
        pages = _most_pages(cfg, left, held, page_size, positions, sequences)
        if file is not None:
            inside = _most_pages(cfg, left, page, page_size, positions, sequences)
            pages = min(pages, most, max(inside, -(-4 * context // page_size)))
    workspace = workspace_bytes(cfg, positions, sequences, min(context, pages * page_size)) + live
    rows = pages * (page - rest)
    if file is not None:
        rows = min(rows, max(pages * (held - rest), left + live - workspace - pages * rest))
    return Budget(weights, workspace, page, pages, max_tails, max_tails * tail, page_size, pages * rest + rows, rows)


def _most_pages(cfg: ModelConfig, left: int, page: int, page_size: int, positions: int, sequences: int) -> int:
    """The most pages whose bytes, and the workspace of a sequence that fills them, fit into ``left``."""
    low, high = 1, max(1, left // page)
    while low < high:
        middle = (low + high + 1) // 2
        context = min(cfg.max_position_embeddings, middle * page_size)
        if middle * page + workspace_bytes(cfg, positions, sequences, context) <= left:
            low = middle
        else:
            high = middle - 1
    return low


def check_weights(cfg: ModelConfig, memory: int, numbers: str) -> None:
    """Refuses a model, before it is loaded, whose weights alone (as ``numbers``: fp32, bf16, int8, int4) are larger.

    Raises MemoryTooSmall with the numbers.
    """
    weights = sum(counts.weight_bytes(cfg, numbers).values())
    if weights > memory:
        fitting = [n for n in counts.WEIGHT_BYTES if sum(counts.weight_bytes(cfg, n).values()) < memory]
        hint = f"; as {fitting[0]} they would fit" if fitting else ""
        raise MemoryTooSmall(f"memory: is {size(memory)}; the weights as {numbers} take {size(weights)}{hint}")


def too_small(memory: int, weights: int, least: int, context: int) -> str:
    return (
        f"memory: is {size(memory)}; {size(least)} are needed at least: {size(weights)} of weights, "
        f"the rest to compute with and to hold {context} positions"
    )


def size(bytes: int) -> str:
    """``bytes`` for people: 1.5 GiB."""
    value = float(bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"
