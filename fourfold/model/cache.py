"""The latent cache: a list of pages.

A page holds ``page_size`` positions of all layers (latent, rotary key and index key, or k and v) in one
contiguous block, so that the same bytes can lie in VRAM, in RAM or on disk. A full page never changes again
and may be shared by all sequences with the same prefix.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fourfold.config import ModelConfig


class CacheFull(RuntimeError):
    """No free page is left; the message says how many were wanted."""


def attention_width(cfg: ModelConfig) -> int:
    """Numbers cached per position by one attention layer."""
    a = cfg.attention
    return a.kv_lora_rank + a.qk_rope_head_dim if a.kind == "mla" else 2 * a.num_key_value_heads * a.head_dim


def indexer_layers(cfg: ModelConfig) -> list[int]:
    """The layers that own an indexer; the others of a group reuse its selection."""
    return [] if cfg.indexer.mode == "off" else list(range(0, cfg.num_hidden_layers, cfg.indexer.layers_per_indexer))


def token_width(cfg: ModelConfig) -> int:
    """Numbers cached per position by the whole model."""
    return cfg.num_hidden_layers * attention_width(cfg) + len(indexer_layers(cfg)) * cfg.indexer.head_dim


@dataclass
class SequenceState:
    """One sequence in the cache: its pages in order, how many positions they hold, and which tokens.

    history: the token id of each cached position, -1 where it is not text (n-grams do not cross those).
    """

    pages: list[int] = field(default_factory=list)
    length: int = 0
    history: list[int] = field(default_factory=list)


class PagePool:
    """``n_pages`` pages of ``page_size`` positions; pages are counted by reference and given out on demand."""

    def __init__(
        self,
        cfg: ModelConfig,
        n_pages: int,
        page_size: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if n_pages < 1 or page_size < 1:
            raise ValueError(f"PagePool: n_pages ({n_pages}) and page_size ({page_size}) must be at least 1")
        self.page_size = page_size
        self.data = torch.zeros(n_pages, page_size, token_width(cfg), dtype=dtype, device=device)
        self._references = [0] * n_pages
        self._free = list(range(n_pages - 1, -1, -1))

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

    def begin(self, lengths: list[int]) -> None:
        """Fixes where the new positions go; called by the model with the length of each document.

        Raises CacheFull before any state has changed.
        """
        if len(lengths) != len(self.states):
            raise ValueError(f"cache: {len(lengths)} sequences in the batch, {len(self.states)} in the cache")
        self.pool.require(sum(self.pool.missing(state, n) for state, n in zip(self.states, lengths, strict=True)))
        size = self.pool.page_size
        slots = []
        for state, n in zip(self.states, lengths, strict=True):
            self.pool.reserve(state, n)
            slots += [state.pages[p // size] * size + p % size for p in range(state.length, state.length + n)]
        device = self.pool.data.device
        self._slots = torch.tensor(slots, dtype=torch.int64, device=device)
        self._lengths = lengths
        longest = max(len(s.pages) for s in self.states)
        self._tables = torch.tensor(
            [s.pages + (s.pages or [0])[:1] * (longest - len(s.pages)) for s in self.states], device=device
        )

    def write(self, offset: int, values: Tensor) -> None:
        """Stores ``values`` [T, w] of the new positions at columns offset..offset+w."""
        flat = self.pool.data.view(-1, self.pool.data.shape[-1])
        flat[self._slots, offset : offset + values.shape[1]] = values.detach().to(flat.dtype)

    def read(self, sequences: Tensor, length: int, offset: int, width: int) -> Tensor:
        """Columns offset..offset+width of the first ``length`` positions of ``sequences`` [B]: [B, length, width].

        A shorter sequence is filled up with other pages' numbers, which the caller masks.
        """
        tables = self._tables[sequences, : self.pool.pages_for(length)]
        return self.pool.data[tables, :, offset : offset + width].flatten(1, 2)[:, :length]

    def history(self, sequence: int, n: int) -> list[int]:
        """The last ``n`` token ids before the new positions of a sequence; fewer at its start."""
        return self.states[sequence].history[-n:] if n else []

    def commit(self, tokens: list[list[int]]) -> None:
        """The new positions now count; ``tokens``: their ids per sequence, -1 where not text."""
        for state, n, ids in zip(self.states, self._lengths, tokens, strict=True):
            state.length += n
            state.history += ids
