"""What all layers of one forward pass share: where sequences lie, rotary tables, cache, probe, losses."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fourfold import ops
from fourfold.config import RopeConfig
from fourfold.model.cache import Cache
from fourfold.model.probe import Probe
from fourfold.model.sequence import Packed


@dataclass
class Window:
    """B groups of L queries each that attend together; each group continues its own past.

    rows: int64 [B, L] on the packed axis; past: int64 [B], positions before the first row; sequences: int64 [B]
    when the past comes from the cache, else None; ids: int64 [B, L] where a row of the batch holds several
    sequences, else None; whole: whether the rows are all positions in their order; made: masks that layers share.
    """

    rows: Tensor
    past: Tensor
    sequences: Tensor | None = None
    ids: Tensor | None = None
    whole: bool = False
    made: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def take(self, x: Tensor) -> Tensor:
        """The rows of x [T, ...] as [B, L, ...]."""
        return x.unflatten(0, self.rows.shape) if self.whole else x[self.rows]

    @cached_property
    def length(self) -> int:
        """S: keys that the longest group may see."""
        return int(self.past.max()) + self.rows.shape[1]

    @cached_property
    def positions(self) -> Tensor:
        """int64 [B, L]: how far into its group each query is."""
        return self.past[:, None] + torch.arange(self.rows.shape[1], device=self.rows.device)

    @cached_property
    def visible(self) -> Tensor:
        """bool [B, L, S]: each query sees its own past and itself."""
        causal = torch.arange(self.length, device=self.rows.device) <= self.positions[..., None]
        return causal if self.ids is None else causal & (self.ids[:, :, None] == self.ids[:, None, :])

    def recent(self, kept: int, reach: int) -> Tensor:
        """bool [B, L, kept + L]: the last ``reach`` positions of a query, among ``kept`` of its past and its group."""
        if (kept, reach) not in self.made:
            positions = self.positions.int()
            number = torch.arange(kept + self.rows.shape[1], device=self.rows.device, dtype=torch.int32)
            place = (number + (self.past.int()[:, None] - kept))[:, None]  # [B, 1, kept + L]
            newest, oldest = positions[..., None], (positions - reach).clamp_min(-1)[..., None]
            self.made[kept, reach] = (place <= newest) & (place > oldest)
        return self.made[kept, reach]

    def entries(self, ratio: int) -> Tensor:
        """bool [B, L, n]: a query sees the entries whose positions all lie at or before it."""
        if (ratio,) not in self.made:
            numbers = torch.arange(self.length // ratio, device=self.rows.device)
            self.made[ratio,] = numbers < (self.positions[..., None] + 1) // ratio
        return self.made[ratio,]


@dataclass
class Selection:
    """What an indexer chose for each window: scores float32 [B, L, S] (not of entries in the cache) and chosen bool
    [B, L, S]; or, of keys that lie in the cache, their positions int64 [B, L, topk] alone, ascending, -1 after the
    last. While it learns to work in two levels, also the scores of whole blocks, float32 [B, L, S // block_size]."""

    scores: list[Tensor]
    chosen: list[Tensor]
    positions: list[Tensor] = field(default_factory=list)
    block_scores: list[Tensor] = field(default_factory=list)

    def kept(self, number: int, topk: int) -> Tensor:
        """int64 [B, L, topk], the same as positions whatever there is."""
        return self.positions[number] if self.positions else ops.chosen_positions(self.chosen[number], topk)

    def mask(self, number: int, window: Window) -> Tensor:
        """bool [B, L, S], what was chosen for the window of this number."""
        return self.chosen[number] if self.chosen else chosen_mask(self.positions[number], window.length)


def nearest(ctx: Context, count: int) -> Selection:
    """The last ``count`` positions of each query, its own among them."""
    selection = Selection([], [])
    for window in ctx.windows:
        back = torch.arange(count - 1, -1, -1, device=window.rows.device)
        positions = window.positions[..., None] - back
        if ctx.cache is not None and window.sequences is not None:
            missing = (-positions[..., :1]).clamp_min(0)  # before the first; what is there moves to the front
            selection.positions.append((positions + missing).where(back >= missing, -1))
        else:
            number = torch.arange(window.length, device=window.rows.device)
            selection.chosen.append(window.visible & (number >= positions[..., :1]))
    return selection


def chosen_mask(positions: Tensor, count: int) -> Tensor:
    """bool [B, L, count]: the keys at ``positions`` int64 [B, L, k], -1 is none."""
    mask = positions.new_zeros(*positions.shape[:2], count + 1, dtype=torch.bool)
    return mask.scatter_(-1, torch.where(positions < 0, count, positions), True)[..., :-1]


@dataclass
class SharedEntries:
    """What a source layer of CSA2 leaves to those after it, for each window: its entries [B, n, D], their index keys
    [B, n, d], and bool [B, L, n] the candidates, none as long as all entries are."""

    values: list[Tensor]
    keys: list[Tensor]
    candidates: list[Tensor] = field(default_factory=list)


@dataclass
class Rotary:
    """Rotary tables of the packed positions, and of any others; made where they are wanted."""

    positions: Tensor
    dim: int
    rope: RopeConfig

    @cached_property
    def frequencies(self) -> Tensor:
        return ops.rope_frequencies(self.dim, self.rope).to(self.positions.device)

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        return ops.rope_tables(self.positions, self.frequencies, self.rope.attention_factor)

    @property
    def cos(self) -> Tensor:
        """float32 [T, dim/2]."""
        return self.tables[0]

    @property
    def sin(self) -> Tensor:
        """float32 [T, dim/2]."""
        return self.tables[1]

    def turn(self, x: Tensor, back: bool = False) -> Tensor:
        """The last dimensions of x [T, ..., D] turned by their positions, or ``back``, as interleaved pairs."""
        out: Tensor = ops.apply_rope(x, self.cos, -self.sin if back else self.sin)
        return out

    def turn_at(self, x: Tensor, positions: Tensor) -> Tensor:
        """The last dimensions of x [..., D] turned by ``positions`` [...]."""
        cos, sin = ops.rope_tables(positions.flatten(), self.frequencies, self.rope.attention_factor)
        out: Tensor = ops.apply_rope(x.flatten(0, -2), cos, sin)
        return out.view_as(x)


@dataclass
class Context:
    """One forward pass.

    ``selection`` is set by the layer that owns an indexer and read by its group, as ``shared`` by a source of entries;
    ``read_weights`` [T, n] by a site of the single-pass residual for the next one, None before the first;
    ``decoding`` by the model where all layers of a step are one call.
    """

    packed: Packed
    rotary: Rotary
    compress_rotary: Rotary
    cache: Cache | None = None
    probe: Probe | None = None
    by_sequence: bool = False  # whether windows are never rows of a batch
    balance: bool = False  # whether the sequence-wise balance loss is wanted
    selection: Selection | None = None
    shared: SharedEntries | None = None
    read_weights: Tensor | None = None
    decoding: ops.DecodeState | None = None
    index_losses: list[Tensor] = field(default_factory=list)
    index_recalls: list[Tensor] = field(default_factory=list)
    loads: dict[str, Tensor] = field(default_factory=dict)
    balance_losses: list[Tensor] = field(default_factory=list)

    @cached_property
    def windows(self) -> list[Window]:
        return windows(self.packed, self.cache, self.by_sequence)


def join(windows: list[Window], parts: list[Tensor]) -> Tensor:
    """What each window gave, [B, L, ...], laid back on the packed axis: [T, ...]."""
    flat = torch.cat([part.flatten(0, 1) for part in parts])
    if windows[0].whole:
        return flat
    return torch.empty_like(flat).index_copy(0, torch.cat([window.rows.flatten() for window in windows]), flat)


def windows(packed: Packed, cache: Cache | None, by_sequence: bool = False) -> list[Window]:
    """Groups the packed axis for attention: sequences of equal length together.

    Without a cache, rows of a batch may stand for the sequences in them, unless they are wanted ``by_sequence``.
    """
    total, device = len(packed), packed.tokens.device
    if cache is None and packed.row is not None and not by_sequence:
        rows = torch.arange(total, device=device).view(-1, packed.row)
        alone = len(packed.cu_seqlens) - 1 == len(rows)  # then each row is one sequence
        return [Window(rows, torch.zeros_like(rows[:, 0]), None, None if alone else packed.sequence_ids[rows], True)]
    starts, lengths = packed.cu_seqlens[:-1].tolist(), packed.cu_seqlens.diff().tolist()
    groups: dict[int, list[int]] = {}
    for sequence, length in enumerate(lengths):
        if length:
            groups.setdefault(length, []).append(sequence)
    result = []
    for length, members in (groups or {0: [0]}).items():  # a batch of nothing is one window of nothing
        sequences = torch.tensor(members, device=device)
        rows = torch.tensor([starts[s] for s in members], device=device)[:, None] + torch.arange(length, device=device)
        past = torch.zeros_like(sequences)
        if cache is not None:
            past = torch.tensor([cache.states[s].length for s in members], device=device)
        result.append(Window(rows, past, sequences if cache is not None else None, whole=len(groups) <= 1))
    return result
