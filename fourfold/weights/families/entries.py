"""Where our tensors lie on disk, as data: one description serves loading, writing and counting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A tensor on disk, or its slice ``start:stop`` along ``dim``."""

    name: str
    dim: int = 0
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Cat:
    """Equal parts below one another, along the rows."""

    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Stack:
    """Equal parts along a new leading axis."""

    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Zeros:
    """Not on disk: zero in this family."""


Entry = Part | Cat | Stack | Zeros
Plan = dict[str, Entry]


@dataclass(frozen=True)
class Leaf:
    """Rows ``start : start + shape[0]`` of ``tensor[leading]`` are ``part``."""

    leading: tuple[int, ...]
    start: int
    shape: tuple[int, ...]
    part: Part | Zeros


def leaves(entry: Entry, shape: tuple[int, ...]) -> Iterator[Leaf]:
    """The parts of a tensor of ``shape``, in order."""
    if isinstance(entry, Stack):
        if len(entry.entries) != shape[0]:
            raise ValueError(f"{len(entry.entries)} entries for shape {shape}")
        for index, part in enumerate(entry.entries):
            for leaf in leaves(part, shape[1:]):
                yield Leaf((index, *leaf.leading), leaf.start, leaf.shape, leaf.part)
    elif isinstance(entry, Cat):
        rows = shape[0] // len(entry.entries)
        for index, part in enumerate(entry.entries):
            for leaf in leaves(part, (rows, *shape[1:])):
                yield Leaf(leaf.leading, index * rows + leaf.start, leaf.shape, leaf.part)
    else:
        yield Leaf((), 0, shape, entry)


@dataclass(frozen=True)
class Piece:
    """A leaf of one of our tensors, seen from the disk."""

    ours: str
    leaf: Leaf


def by_disk_name(plan: Plan, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Piece]]:
    """Disk name -> what it is made of, in the order of its slices."""
    found: dict[str, list[Piece]] = {}
    for ours, entry in plan.items():
        for leaf in leaves(entry, shapes[ours]):
            if isinstance(leaf.part, Part):
                found.setdefault(leaf.part.name, []).append(Piece(ours, leaf))
    for pieces in found.values():
        pieces.sort(key=lambda piece: piece.leaf.part.start)
    return found


def disk_shape(pieces: list[Piece]) -> tuple[int, ...]:
    """The shape of the disk tensor that consists of ``pieces``."""
    leaf = pieces[0].leaf
    if leaf.part.stop is None:
        return leaf.shape
    dim = leaf.part.dim
    size = max(piece.leaf.part.stop for piece in pieces)
    return (*leaf.shape[:dim], size, *leaf.shape[dim + 1 :])


def disk_shapes(plan: Plan, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint of this plan has, before any number format is applied."""
    return {name: disk_shape(pieces) for name, pieces in by_disk_name(plan, shapes).items()}
