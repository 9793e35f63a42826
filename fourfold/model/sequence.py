"""The batch: one :class:`Document` is one sequence, :class:`Packed` is many laid end to end.

There is no padding and no attention mask; where a sequence starts is all that attention needs to know.
Text, image, video and audio positions share one token axis. A continuous position holds its modality's
placeholder id in ``tokens`` and its numbers in ``patches``; the rows that open, break and close a span are
learned and named by ``marks``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

TEXT, IMAGE, VIDEO, AUDIO = range(4)
MODALITIES = ("text", "image", "video", "audio")
NO_MARK, START, NEWLINE, END = range(4)
IGNORE = -100  # target of a position without loss


@dataclass(frozen=True)
class Patches:
    """Continuous inputs of one modality.

    index: int64 [M], position on the token axis; values: float32 [M, features];
    coords: float32 [M, 3], time in seconds, row and column of the patch (0 where the modality has none); for an image
    tower the patch rows and columns of the picture and the number of the token in it.
    """

    index: Tensor
    values: Tensor
    coords: Tensor

    def to(self, device: torch.device | str) -> Patches:
        return Patches(self.index.to(device), self.values.to(device), self.coords.to(device))


def join_patches(parts: Sequence[tuple[int, Patches]]) -> Patches:
    """Concatenates patches, shifting each part's index by its offset."""
    return Patches(
        torch.cat([p.index + offset for offset, p in parts]),
        torch.cat([p.values for _, p in parts]),
        torch.cat([p.coords for _, p in parts]),
    )


@dataclass(frozen=True)
class Document:
    """One sequence of T positions.

    tokens: int64 [T]; modality: int64 [T], one of ``TEXT, IMAGE, VIDEO, AUDIO``; marks: int64 [T], one of
    ``NO_MARK, START, NEWLINE, END``; targets: int64 [T], the next token or ``IGNORE``;
    patches: modality name -> :class:`Patches`.
    """

    tokens: Tensor
    modality: Tensor
    marks: Tensor
    targets: Tensor
    patches: dict[str, Patches] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def slice(self, start: int, stop: int) -> Document:
        """Positions start..stop-1, with their patches: a chunk of a prefill."""
        patches = {}
        for name, p in self.patches.items():
            inside = (p.index >= start) & (p.index < stop)
            if inside.any():
                patches[name] = Patches(p.index[inside] - start, p.values[inside], p.coords[inside])
        cut = slice(start, stop)
        return Document(self.tokens[cut], self.modality[cut], self.marks[cut], self.targets[cut], patches)

    @staticmethod
    def text(tokens: Iterable[int]) -> Document:
        """A sequence of text alone, every token but the first a target."""
        ids = torch.tensor(list(tokens), dtype=torch.int64)
        targets = torch.cat([ids[1:], torch.full((1,), IGNORE)]) if len(ids) else ids
        zeros = torch.zeros_like(ids)
        return Document(ids, zeros, zeros, targets)


@dataclass(frozen=True)
class Packed:
    """N sequences of T positions together: the only batch type.

    tokens, positions, modality, marks, targets: int64 [T]; cu_seqlens: int64 [N+1], where each sequence
    starts, and T. ``row``: if set, T is a multiple of it and no sequence crosses a multiple of it, so
    attention may run as a [T/row, row] batch.
    """

    tokens: Tensor
    positions: Tensor
    modality: Tensor
    marks: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    patches: dict[str, Patches] = field(default_factory=dict)
    row: int | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def all_text(self) -> bool:
        """Whether every position is text."""
        return not bool(self.modality.any())  # TEXT is 0

    @cached_property
    def sequence_ids(self) -> Tensor:
        """int64 [T]: the number of the sequence each position belongs to."""
        lengths = self.cu_seqlens.diff()
        return torch.repeat_interleave(
            torch.arange(len(lengths), device=lengths.device), lengths, output_size=len(self)
        )

    def to(self, device: torch.device | str) -> Packed:
        return Packed(
            self.tokens.to(device),
            self.positions.to(device),
            self.modality.to(device),
            self.marks.to(device),
            self.targets.to(device),
            self.cu_seqlens.to(device),
            {name: p.to(device) for name, p in self.patches.items()},
            self.row,
        )


def pack(documents: Sequence[Document], *, starts: Sequence[int] | None = None, row: int | None = None) -> Packed:
    """Lays documents end to end. ``starts``: the position of each one's first token (0 unless it continues a cache).

    Raises ValueError if there is none, or if one would cross a multiple of ``row``.
    """
    if not documents:
        raise ValueError("pack: needs at least one document")
    lengths = torch.tensor([len(d) for d in documents])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    offsets = cu_seqlens[:-1].tolist()
    if row is not None:
        total = int(cu_seqlens[-1])
        if total % row or any(
            o // row != (o + len(d) - 1) // row for o, d in zip(offsets, documents, strict=True) if len(d)
        ):
            raise ValueError(f"pack: documents do not fill rows of {row} positions exactly")
    positions = torch.cat(
        [torch.arange(len(d)) + s for d, s in zip(documents, starts or [0] * len(documents), strict=True)]
    )
    patches = {}
    for name in MODALITIES[1:]:
        parts = [(offset, d.patches[name]) for offset, d in zip(offsets, documents, strict=True) if name in d.patches]
        if parts:
            patches[name] = join_patches(parts)
    return Packed(
        tokens=torch.cat([d.tokens for d in documents]),
        positions=positions,
        modality=torch.cat([d.modality for d in documents]),
        marks=torch.cat([d.marks for d in documents]),
        targets=torch.cat([d.targets for d in documents]),
        cu_seqlens=cu_seqlens,
        patches=patches,
        row=row,
    )
