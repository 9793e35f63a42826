"""Numbers out of a reader, a few rows at a time: decoded, checked, and put where they belong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fourfold.weights.families.entries import Leaf, Part, Plan, by_disk_name, disk_shape, leaves
from fourfold.weights.formats import Block, FormatError, decode_rows, decoded_shape, find_block, scale_name
from fourfold.weights.tensors import DTYPES, NAMES, TensorReader

CHUNK = 1 << 20  # numbers decoded at a time, which bounds the temporaries
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
CODES = (torch.int8, torch.uint8, torch.float8_e4m3fn)  # of quantised weights: read as they are, or not at all


class Sink(Protocol):
    """Takes the rows of one tensor as they come: ``rows`` are rows ``start`` and on of ``tensor[leading]``."""

    def put(self, leading: tuple[int, ...], start: int, rows: Tensor) -> None: ...


class TensorSink:
    """Rows into a tensor of their final type."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def put(self, leading: tuple[int, ...], start: int, rows: Tensor) -> None:
        self.tensor[leading][start : start + len(rows)].copy_(rows)


class Numbers:
    """The numbers of a reader's tensors, whatever their format: scales are folded in, and no tensors of their own.

    block: rows and columns per scale that the config promises. Raises FormatError if a weight has two scales.
    """

    def __init__(self, reader: TensorReader, block: Block | None = None) -> None:
        self.reader, self.block = reader, block
        names = set(reader.names())
        found = {name: scale_name(name, names) for name in names}
        self._scales = {name: scale for name, scale in found.items() if scale is not None}
        self._names = sorted(names - set(self._scales.values()))
        self._decodes_itself = hasattr(reader, "read_rows")

    def names(self) -> list[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        if self._decodes_itself or name not in self._scales:
            return self.reader.shape(name)
        return decoded_shape(self.reader.read(name), self.reader.read(self._scales[name]))

    def fault(self, name: str, wanted: torch.dtype) -> str | None:
        """Why the tensor cannot be read as codes, whole numbers or floating-point ones; None if it can."""
        if self._decodes_itself:
            return None
        dtype = DTYPES[self.reader.dtype(name)]
        if wanted in CODES:
            return (
                None if dtype is wanted else f"{name} is stored as {self.reader.dtype(name)}, must be {NAMES[wanted]}"
            )
        if not wanted.is_floating_point:
            return None if dtype in WHOLE else f"{name} is stored as {self.reader.dtype(name)}, must be whole numbers"
        try:
            if name in self._scales:
                find_block(self.reader.read(name), self.reader.read(self._scales[name]), self.block, name)
            else:
                decode_rows(torch.empty(0, 1, dtype=dtype), None, 0, 0, name=name)
        except FormatError as error:
            scale = f" (its scale: {self._scales[name]})" if name in self._scales else ""
            return f"{error}{scale}"
        return None

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop-1: float32 where there was something to decode, else a view of what is stored."""
        if self._decodes_itself and len(self.reader.shape(name)) == 2:
            return self.reader.read_rows(name, start, stop)
        weight = self.reader.read(name)
        if name not in self._scales:
            return weight[start:stop]
        return decode_rows(weight, self.reader.read(self._scales[name]), start, stop, self.block, name=name)

    def leaf(self, leaf: Leaf, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Rows start..stop-1 of a leaf, in chunks: (first row, rows)."""
        part = leaf.part
        assert isinstance(part, Part)
        sliced_rows = part.start if part.dim == 0 else 0
        step = max(CHUNK // max(self.columns(part.name), 1), 1)
        step = step // 128 * 128 or step  # whole blocks of scales where it can be
        for first in range(start, stop, step):
            last = min(first + step, stop)
            rows = self.rows(part.name, sliced_rows + first, sliced_rows + last)
            yield first, rows.narrow(part.dim, part.start, leaf.shape[part.dim]) if part.dim else rows

    def columns(self, name: str) -> int:
        shape = self.shape(name)
        size = 1
        for n in shape[1:]:
            size *= n
        return size

    def release(self, name: str) -> None:
        if not self._decodes_itself:
            self.reader.release(name)


def missing_and_extra(
    plan: Plan, wanted: Mapping[str, Tensor], numbers: Numbers, ignored: Callable[[str], bool]
) -> tuple[list[str], set[str]]:
    """Faults of names, shapes and types, and the disk names that can be read all the same. Reads no numbers."""
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    pieces = by_disk_name(plan, shapes)
    names = set(numbers.names())
    faults = [f"{name} is missing" for name in sorted(pieces.keys() - names)]
    faults += [f"{name} is not part of this model" for name in sorted(names - pieces.keys()) if not ignored(name)]
    readable = set()
    for name in sorted(pieces.keys() & names):
        fault = numbers.fault(name, wanted[pieces[name][0].ours].dtype)
        if fault is None and (shape := numbers.shape(name)) != (want := disk_shape(pieces[name])):
            fault = f"{name} has shape {list(shape)}, the model's is {list(want)}"
        if fault is None:
            readable.add(name)
        else:
            faults.append(fault)
    return faults, readable


def stream(
    plan: Plan,
    wanted: Mapping[str, Tensor],
    numbers: Numbers,
    readable: set[str],
    sink_of: Callable[[str], Sink | None],
    advance: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """Puts every tensor of the plan into its sink (None: it is only checked). Returns the faults of the numbers.

    Peak memory is what the sinks hold and a chunk; what was read from mapped files is given back tensor by tensor.
    """
    faults: dict[str, None] = {}
    for ours, entry in plan.items():
        meta = wanted[ours]
        sink = sink_of(ours)
        for leaf in leaves(entry, tuple(meta.shape)):
            if not isinstance(leaf.part, Part):
                if sink is not None:
                    sink.put(leaf.leading, leaf.start, torch.zeros(leaf.shape, dtype=meta.dtype))
                continue
            if leaf.part.name not in readable:
                continue
            for first, rows in numbers.leaf(leaf, 0, leaf.shape[0]):
                if meta.is_floating_point() and not finite(rows):
                    faults[f"{leaf.part.name} holds NaN or infinity"] = None
                elif sink is not None:
                    sink.put(leaf.leading, leaf.start + first, rows)
                advance(rows.numel())
            numbers.release(leaf.part.name)
    return list(faults)


def finite(rows: Tensor) -> bool:
    """Without a temporary of the size of ``rows``."""
    if not rows.numel():
        return True
    if rows.dtype is torch.float8_e4m3fn:  # has no infinity, and one NaN of each sign
        return not bool(((rows.view(torch.uint8) & 127) == 127).any())
    low, high = rows.aminmax()
    return bool(low.isfinite() and high.isfinite())


def fold(faults: list[str], where: Path, most: int = 60) -> str:
    """One line that lists faults, the first ``most`` of them by name."""
    more = [f"and {len(faults) - most} more"] if len(faults) > most else []
    return f"{where}: " + "; ".join([*faults[:most], *more])
