"""The latent cache: a list of pages, and a short tail.

A page holds ``page_size`` positions of all layers in one contiguous block, so that the same bytes can lie in
VRAM, in RAM or on disk: latent, rotary key and index key, or k and v, of each position; or one entry for every
``ratio`` positions where a layer compresses. Its dtype is the format of all these rows: floating numbers, or int8 or
fp8 with scales (see ``ops/reference/rows.py``). A full page never changes again and may be shared by all sequences
with the same prefix. What compressing layers need of the last few positions alone (their window, and what they
have not pooled yet) is the tail, one flat row per sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fourfold import ops
from fourfold.config import ModelConfig
from fourfold.counts import kv_parts


class CacheFull(RuntimeError):
    """No free page is left; the message says how many were wanted."""


@dataclass(frozen=True)
class Slot:
    """Where a page keeps one kind of row: ``width`` elements for every ``ratio`` positions, scales included.

    They begin at element ``start * page_size``: ``start`` counts elements per position, so it may be a fraction.
    ``parts``: the numbers in each part of a row.
    """

    start: float
    width: int
    ratio: int
    parts: tuple[int, ...]


@dataclass(frozen=True)
class Tail:
    """Where a sequence's tail keeps ``rows`` rows of ``width`` numbers: those of its last positions."""

    start: int
    width: int
    rows: int


@dataclass
class Layout:
    """What is kept of a sequence, by name.

    slots: "layers.N.kv", "layers.N.index" and "layers.N.summary"; tails: "layers.N.window", "layers.N.pool" and
    "layers.N.index_pool".
    ``dtype``: of what is in the slots; ``multiple``: what page_size must be a multiple of.
    """

    dtype: torch.dtype = torch.float32
    slots: dict[str, Slot] = field(default_factory=dict)
    tails: dict[str, Tail] = field(default_factory=dict)
    multiple: int = 1
    per_position: float = 0.0  # elements of a page for each position
    tail_width: int = 0

    def add_slot(self, name: str, parts: tuple[int, ...], ratio: int = 1) -> None:
        width = ops.row_width(parts, self.dtype)
        self.slots[name] = Slot(self.per_position, width, ratio, parts)
        self.per_position += width / ratio
        self.multiple = math.lcm(self.multiple, ratio)

    def add_tail(self, name: str, width: int, rows: int) -> None:
        self.tails[name] = Tail(self.tail_width, width, rows)
        self.tail_width += width * rows


def layout(cfg: ModelConfig, mtp: bool = False, dtype: torch.dtype = torch.float32) -> Layout:
    """The cache layout of a model: plain slots for ``mla`` and ``gqa``, entries and tails for the others.

    mtp: with slots for the block past the trunk, where that has plain ones; dtype: the format of rows.
    """
    kept, key = Layout(dtype), (cfg.indexer.head_dim,)
    if cfg.attention.is_compressed:
        _lay_out_compressed(cfg, kept)
        return kept
    past = [cfg.num_hidden_layers] if mtp else []
    for layer in [*range(cfg.num_hidden_layers), *past]:
        kept.add_slot(f"layers.{layer}.kv", kv_parts(cfg))
    for layer in [*indexer_layers(cfg), *(past if cfg.indexer.mode != "off" else ())]:
        kept.add_slot(f"layers.{layer}.index", key)
        if cfg.indexer.candidate_blocks:
            kept.add_slot(f"layers.{layer}.summary", key, cfg.indexer.block_size)
    return kept


def _lay_out_compressed(cfg: ModelConfig, kept: Layout) -> None:
    a, index = cfg.attention, cfg.indexer
    for layer, ratio in enumerate(a.compress_ratios):
        kept.add_tail(f"layers.{layer}.window", a.head_dim, a.sliding_window - 1)
        if not ratio or (a.kind == "csa2" and layer not in a.kv_source_layer_ids):
            continue
        kept.add_slot(f"layers.{layer}.kv", kv_parts(cfg), ratio)
        overlaps = a.kind == "compressed" and ratio == a.csa_ratio
        pending = 2 * ratio - 1 if overlaps else ratio - 1
        kept.add_tail(f"layers.{layer}.pool", (4 if overlaps else 2) * a.head_dim, pending)
        if index.mode != "off" and (overlaps or a.kind == "csa2"):
            kept.add_slot(f"layers.{layer}.index", (index.head_dim,), ratio)
            if overlaps:
                kept.add_tail(f"layers.{layer}.index_pool", 4 * index.head_dim, pending)


def attention_width(cfg: ModelConfig) -> int:
    """Numbers cached per position by one ``mla`` or ``gqa`` layer."""
    return sum(kv_parts(cfg))


def indexer_layers(cfg: ModelConfig) -> list[int]:
    """The layers that own an indexer; the others of a group reuse its selection."""
    return list(filter(cfg.indexer.owned_by, range(cfg.num_hidden_layers)))


@dataclass
class SequenceState:
    """One sequence in the cache: its pages in order, how many positions they hold, and which tokens.

    history: the token id of each cached position, -1 where it is not text (n-grams do not cross those);
    tail: float32 [tail_width], None before the first position.
    """

    pages: list[int] = field(default_factory=list)
    length: int = 0
    history: list[int] = field(default_factory=list)
    tail: Tensor | None = field(default=None, compare=False)


def page_elements(kept: Layout, page_size: int) -> int:
    """Elements of a page."""
    return round(kept.per_position * page_size)


class Backing(Protocol):
    """Memory of pages that are not always there: ``data``, uint8 [n_pages, bytes of a page], may be read and written
    after its slot ``name`` in ``pages`` was brought in by ``use``, which may take others out."""

    data: Tensor

    def use(self, name: str, pages: Tensor) -> None: ...
    def use_all(self, pages: list[int]) -> None: ...


class PagePool:
    """``n_pages`` pages of ``page_size`` positions; pages are counted by reference and given out on demand.

    ``dtype``: the format of their rows, one of ``ops.ROW_FORMATS``; ``backing``: where they lie, if not in memory.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        n_pages: int,
        page_size: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        mtp: bool = False,
        backing: Backing | None = None,
    ) -> None:
        self.layout = layout(cfg, mtp, dtype)
        if n_pages < 1 or page_size < 1 or page_size % self.layout.multiple:
            raise ValueError(
                f"PagePool: n_pages ({n_pages}) must be at least 1, "
                f"page_size ({page_size}) a multiple of {self.layout.multiple}"
            )
        self.page_size = page_size
        self.backing = backing
        if backing is None:
            self.data = torch.zeros(n_pages, page_elements(self.layout, page_size), dtype=dtype, device=device)
        else:
            self.data = backing.data.view(dtype)
        self._references = [0] * n_pages
        self._free = list(range(n_pages - 1, -1, -1))

    def view(self, name: str) -> Tensor:
        """The rows of one slot in all pages: [n_pages, page_size / ratio, width]."""
        slot = self.layout.slots[name]
        rows = self.page_size // slot.ratio
        start = round(slot.start * self.page_size)
        return self.data[:, start : start + rows * slot.width].unflatten(1, (rows, slot.width))

    def use(self, name: str, pages: Tensor) -> None:
        """To be called before the rows of a slot in ``pages``, int64 of any shape, are read or written."""
        if self.backing is not None:
            self.backing.use(name, pages)

    def use_all(self, pages: list[int]) -> list[int]:
        """The same of all slots. Returns ``pages``."""
        if self.backing is not None:
            self.backing.use_all(pages)
        return pages

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def references(self, page: int) -> int:
        """How many sequences and prefixes hold a page."""
        return self._references[page]

    def pages_for(self, positions: int) -> int:
        return -(-positions // self.page_size)

    def missing(self, state: SequenceState, n_new: int) -> int:
        """Pages that ``state`` lacks to hold ``n_new`` more positions."""
        return max(0, self.pages_for(state.length + n_new) - len(state.pages))

    def require(self, pages: int) -> None:
        if pages > len(self._free):
            raise CacheFull(f"{pages} cache pages of {self.page_size} positions wanted, {len(self._free)} free")

    def reserve(self, state: SequenceState, n_new: int) -> None:
        """Gives ``state`` room for ``n_new`` more positions, or raises :class:`CacheFull` and gives none."""
        wanted = self.missing(state, n_new)
        self.require(wanted)
        for _ in range(wanted):
            page = self._free.pop()
            self._references[page] = 1
            state.pages.append(page)

    def retain(self, pages: list[int]) -> None:
        for page in pages:
            if self._references[page] == 0:
                raise ValueError(f"page {page} is free and cannot be retained")
            self._references[page] += 1

    def release(self, pages: list[int]) -> None:
        for page in pages:
            if self._references[page] == 0:
                raise ValueError(f"page {page} was released more often than held")
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)


class Cache:
    """The cache as one forward pass sees it: sequences that each grow by the positions of one packed document."""

    def __init__(self, pool: PagePool, states: list[SequenceState]) -> None:
        self.pool, self.states = pool, states
        self._tails: Tensor | None = None
        self._new_tails: Tensor | None = None

    def begin(self, lengths: list[int]) -> None:
        """Fixes where the new positions go; called by the model with the length of each document.

        Raises CacheFull before any state has changed.
        """
        if len(lengths) != len(self.states):
            raise ValueError(f"cache: {len(lengths)} sequences in the batch, {len(self.states)} in the cache")
        self.pool.require(sum(self.pool.missing(state, n) for state, n in zip(self.states, lengths, strict=True)))
        for state, n in zip(self.states, lengths, strict=True):
            self.pool.reserve(state, n)
        size, device = self.pool.page_size, self.pool.data.device
        grown = [(s, p) for s, n in zip(self.states, lengths, strict=True) for p in range(s.length, s.length + n)]
        self._pages = torch.tensor([s.pages[p // size] for s, p in grown], dtype=torch.int64, device=device)
        self._rows = torch.tensor([p % size for _, p in grown], dtype=torch.int64, device=device)
        self._lengths = lengths
        longest = max(len(s.pages) for s in self.states)
        self._tables = torch.tensor(
            [s.pages + (s.pages or [0])[:1] * (longest - len(s.pages)) for s in self.states],
            dtype=torch.int64,
            device=device,
        )
        self._tails = self._new_tails = None

    @property
    def single(self) -> bool:
        """Whether every sequence has one new position."""
        return all(n == 1 for n in self._lengths)

    @property
    def tables(self) -> Tensor:
        """int64 [N, m]: the pages of each sequence; a shorter one is filled up with other pages."""
        return self._tables

    def tails(self) -> list[Tensor]:
        """float32 [tail_width] of each sequence before the new positions, zeros where there are none."""
        width, device = self.pool.layout.tail_width, self.pool.data.device
        return [torch.zeros(width, device=device) if s.tail is None else s.tail for s in self.states]

    def replace_tails(self) -> Tensor:
        """float32 [N, tail_width]: what all tails will be, for the caller to fill."""
        shape = len(self.states), self.pool.layout.tail_width
        self._new_tails = torch.empty(shape, device=self.pool.data.device)
        return self._new_tails

    def write(self, name: str, values: Tensor) -> None:
        """Stores ``values`` [T, w] of the new positions in a slot of ratio 1."""
        self.pool.use(name, self._pages)
        self.pool.view(name)[self._pages, self._rows] = self._encoded(name, values)

    def write_entries(self, name: str, values: Tensor, sequences: Tensor, entries: Tensor) -> None:
        """Stores ``values`` [M, w], the entries number ``entries`` [M] of ``sequences`` [M]."""
        per_page = self.pool.page_size // self.pool.layout.slots[name].ratio
        pages = self._tables[sequences, entries // per_page]
        self.pool.use(name, pages)
        self.pool.view(name)[pages, entries % per_page] = self._encoded(name, values)

    def _encoded(self, name: str, values: Tensor) -> Tensor:
        return ops.encode_rows(values.detach(), self.pool.layout.slots[name].parts, self.pool.data.dtype)

    def _decoded(self, name: str, rows: Tensor) -> Tensor:
        return ops.decode_rows(rows, self.pool.layout.slots[name].parts)

    def read(self, name: str, sequences: Tensor, count: int) -> Tensor:
        """The numbers in the first ``count`` rows (or entries) of ``sequences`` [B]: [B, count, w].

        A shorter sequence is filled up with other pages' numbers, which the caller masks.
        """
        per_page = self.pool.page_size // self.pool.layout.slots[name].ratio
        tables = self._tables[sequences, : -(-count // per_page)]
        self.pool.use(name, tables)
        return self._decoded(name, self.pool.view(name)[tables].flatten(1, 2)[:, :count])

    def read_blocks(self, name: str, sequences: Tensor, blocks: Tensor, size: int) -> Tensor:
        """Rows ``size`` by ``size``, of a size that divides a page: those of the blocks with numbers ``blocks`` [M] of
        ``sequences`` [M]. Returns [M, size, w]."""
        pages = self._tables[sequences, blocks * size // self.pool.page_size]
        self.pool.use(name, pages)
        rows = self.pool.view(name).unflatten(1, (-1, size))[pages, blocks % (self.pool.page_size // size)]
        return self._decoded(name, rows)

    def lie(self, name: str, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """Where the rows of a slot lie, in their format: those of all pages, see :meth:`PagePool.view`, and int64
        [B, m] the pages of ``sequences`` [B]; a shorter sequence is filled up with other pages."""
        return self.pool.view(name), self._tables[sequences]

    def expect(self, name: str, pages: Tensor, valid: Tensor, indices: Tensor | None) -> None:
        """Announces a read where the rows lie: the arguments of ``ops.latent_attention``."""
        if self.pool.backing is None:
            return
        if indices is None:
            indices = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
        self.pool.use(name, pages.gather(1, indices // self.pool.page_size)[valid])

    def tail(self, name: str, sequences: Tensor) -> Tensor:
        """float32 [B, rows, width]: what ``keep`` stored for ``sequences`` [B], zeros where nothing was."""
        t = self.pool.layout.tails[name]
        return self._before()[sequences, t.start : t.start + t.rows * t.width].unflatten(1, (t.rows, t.width))

    def _before(self) -> Tensor:
        """float32 [N, tail_width], stacked once a forward, where it is wanted."""
        if self._tails is None:
            self._tails = torch.stack(self.tails())
        return self._tails

    def keep(self, name: str, sequences: Tensor, values: Tensor) -> None:
        """What ``tail`` will give from the next forward on. values: [B, rows, width]."""
        t = self.pool.layout.tails[name]
        if self._new_tails is None:
            self._new_tails = self._before().clone()
        self._new_tails[sequences, t.start : t.start + t.rows * t.width] = values.detach().float().flatten(1)

    def history(self, sequence: int, n: int) -> list[int]:
        """The last ``n`` token ids before the new positions of a sequence; fewer at its start."""
        return self.states[sequence].history[-n:] if n else []

    def commit(self, tokens: list[list[int]]) -> None:
        """The new positions now count; ``tokens``: their ids per sequence, -1 where not text."""
        for number, (state, n, ids) in enumerate(zip(self.states, self._lengths, tokens, strict=True)):
            state.length += n
            state.history += ids
            if self._new_tails is not None:
                state.tail = self._new_tails[number]
