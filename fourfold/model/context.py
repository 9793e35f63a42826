"""What all layers of one forward pass share: where sequences lie, rotary tables, cache, probe, losses."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fourfold.model.cache import Cache
from fourfold.model.probe import Probe
from fourfold.model.sequence import Packed


@dataclass
class Window:
    """B groups of L queries each that attend together.

    rows: int64 [B, L] on the packed axis; visible: bool [B, L, S]; sequences: int64 [B] when the keys come
    from the cache (S positions of it), else None and the keys are the rows themselves (S = L).
    """

    rows: Tensor
    visible: Tensor
    sequences: Tensor | None = None


@dataclass
class Selection:
    """What an indexer chose for each window: scores float32 [B, L, S] and chosen bool [B, L, S]."""

    scores: list[Tensor]
    chosen: list[Tensor]


@dataclass
class Context:
    """One forward pass. ``selection`` is set by the layer that owns an indexer and read by its group."""

    packed: Packed
    windows: list[Window]
    cos: Tensor
    sin: Tensor
    cache: Cache | None = None
    probe: Probe | None = None
    balance: bool = False  # whether the sequence-wise balance loss is wanted
    selection: Selection | None = None
    index_losses: list[Tensor] = field(default_factory=list)
    index_recalls: list[Tensor] = field(default_factory=list)
    loads: dict[str, Tensor] = field(default_factory=dict)
    balance_losses: list[Tensor] = field(default_factory=list)


def windows(packed: Packed, cache: Cache | None) -> list[Window]:
    """Groups the packed axis for attention: rows of equal length together, each query seeing its own past."""
    total, device = len(packed), packed.tokens.device
    if cache is None and packed.row is not None:
        rows = torch.arange(total, device=device).view(-1, packed.row)
        ids = packed.sequence_ids[rows]
        causal = torch.ones(packed.row, packed.row, dtype=torch.bool, device=device).tril()
        return [Window(rows, (ids[:, :, None] == ids[:, None, :]) & causal)]
    starts, lengths = packed.cu_seqlens[:-1].tolist(), packed.cu_seqlens.diff().tolist()
    groups: dict[int, list[int]] = {}
    for sequence, length in enumerate(lengths):
        if length:
            groups.setdefault(length, []).append(sequence)
    result = []
    for length, members in groups.items():
        sequences = torch.tensor(members, device=device)
        rows = torch.tensor([starts[s] for s in members], device=device)[:, None] + torch.arange(length, device=device)
        past = torch.zeros(len(members), dtype=torch.int64, device=device)
        if cache is not None:
            past = torch.tensor([cache.states[s].length for s in members], device=device)
        keys = torch.arange(int(past.max()) + length, device=device)
        last = past[:, None] + torch.arange(length, device=device)
        result.append(Window(rows, keys <= last[:, :, None], sequences if cache is not None else None))
    return result
