"""A GGUF file: metadata and tensors, mapped into memory and dequantised as they are read.

The header is walked here, with every count and length held against the size of the file, before anything of it is
believed; the number formats of the tensors are those that the ``gguf`` library can dequantise.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from fourfold.weights.tensors import CheckpointError

SCALARS = {  # metadata type -> how it lies in the file
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
STRING, ARRAY = 8, 9
SMALLEST_FIELD, SMALLEST_TENSOR = 13, 32  # bytes; bound the counts of the header by the size of the file
MAX_DIMENSIONS = 4
CHUNK = 1 << 22  # numbers dequantised at a time, which bounds the temporaries


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]  # row-major: the reverse of what the file says
    kind: GGMLQuantizationType
    offset: int  # in the file
    size: int  # bytes


class GgufFile:
    """A tensor reader over one file. ``metadata``: its key-value pairs; floats of 32 bits at their shortest decimal.

    Raises CheckpointError if the file is no GGUF (version 2 or 3, little-endian), ends before one of its tensors,
    or holds a tensor of a type that cannot be dequantised; the message gives the offsets.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise CheckpointError(f"{self.path}: cannot be read: {error}") from None
        self.data = np.frombuffer(self._map, dtype=np.uint8)
        walk = _Walk(self.path, self._map)
        self.metadata = walk.metadata
        self.tensors = walk.tensors
        self._check_kinds()

    def _check_kinds(self) -> None:
        """Asks the library for one block of each type, so that what it lacks is known before loading begins."""
        unable = set()
        for kind in {info.kind for info in self.tensors.values()}:
            try:
                self._decode(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            except NotImplementedError:
                unable.add(kind)
        faults = [f"{n} is of type {i.kind.name}" for n, i in self.tensors.items() if i.kind in unable]
        if faults:
            raise CheckpointError(*(f"{self.path}: {fault}, which cannot be dequantised" for fault in faults))

    @staticmethod
    def _decode(rows: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
        with np.errstate(all="ignore"):  # a scale that overflows becomes inf, which the loader reports by name
            return dequantize(rows, kind)

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> str:
        """Of what lies in the file, e.g. ``Q4_K``; what is read is float32."""
        return self.tensors[name].kind.name

    def read(self, name: str) -> Tensor:
        """float32, of the tensor's shape."""
        info = self.tensors[name]
        return self.read_rows(name, 0, math.prod(info.shape[:-1])).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop-1, float32 [stop - start, columns]; all axes but the last count as one."""
        info = self.tensors[name]
        columns, rows = info.shape[-1], math.prod(info.shape[:-1])
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"{name}: rows {start}..{stop} of {rows}")
        stored = self.data[info.offset : info.offset + info.size].reshape(rows, -1)
        out = torch.empty(stop - start, columns)
        step = max(CHUNK // columns, 1)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            out.numpy()[first - start : last - start] = self._decode(stored[first:last], info.kind)
        return out

    def release(self, name: str) -> None:
        """Lets the system drop the tensor's pages; they are read again when needed."""
        info = self.tensors[name]
        first = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (info.offset + info.size) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, length)


class _Walk:
    """One pass over the header of ``data``; what it finds is checked before it is used."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.end = path, data, 4, len(data)
        if data[:4] != b"GGUF":
            raise self.error("is no GGUF file: it does not begin with those letters")
        version = self.integer(4, "the version")
        if version not in (2, 3):
            swapped = version & 0xFFFF == 0
            raise self.error("is big-endian" if swapped else f"is GGUF version {version}; versions 2 and 3 can be read")
        n_tensors = self.count(SMALLEST_TENSOR, "the number of tensors")
        n_fields = self.count(SMALLEST_FIELD, "the number of metadata fields")
        self.metadata: dict[str, Any] = {}
        for number in range(n_fields):
            key = self.string(f"the name of metadata field {number}")
            if key in self.metadata:
                raise self.error(f"has the metadata field {key!r} twice")
            self.metadata[key] = self.value(self.integer(4, f"the type of {key}"), key)
        if (parts := self.metadata.get("split.count", 1)) not in (0, 1):
            raise self.error(f"is one of {parts} parts; join them into one file first")
        self.tensors = self.tensor_infos(n_tensors)

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")

    def take(self, size: int, what: str) -> bytes:
        end = self.at + size
        if end > self.end:
            raise self.error(
                f"is truncated: the file ends at offset {self.end}, {what} at offset {self.at} wants it to "
                f"reach offset {end}"
            )
        taken, self.at = self.data[self.at : end], end
        return taken

    def integer(self, size: int, what: str) -> int:
        return int.from_bytes(self.take(size, what), "little")

    def count(self, smallest: int, what: str) -> int:
        """A number of items, each at least ``smallest`` bytes long, that are to follow."""
        count = self.integer(8, what)
        left = self.end - self.at
        if count * smallest > left:
            raise self.error(
                f"is truncated or broken: {what} at offset {self.at - 8} is {count}, which takes at least "
                f"{count * smallest} bytes; the file ends at offset {self.end}, {left} bytes further on"
            )
        return count

    def string(self, what: str) -> str:
        raw = self.take(self.integer(8, what), what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.error(f"{what} at offset {self.at - len(raw)} is not UTF-8") from None

    def value(self, kind: int, key: str) -> Any:
        if kind in SCALARS:
            return self.scalars(SCALARS[kind], 1, key)[0]
        if kind == STRING:
            return self.string(key)
        if kind != ARRAY:
            raise self.error(f"{key} at offset {self.at} is of the unknown type {kind}")
        item = self.integer(4, key)
        if item == STRING:
            return [self.string(key) for _ in range(self.count(8, f"the length of {key}"))]
        if item not in SCALARS:
            raise self.error(f"{key} at offset {self.at} is an array of the unsupported type {item}")
        kind_of = SCALARS[item]
        return self.scalars(kind_of, self.count(np.dtype(kind_of).itemsize, f"the length of {key}"), key)

    def scalars(self, kind: str, count: int, key: str) -> list[Any]:
        raw = self.take(np.dtype(kind).itemsize * count, key)
        values = np.frombuffer(raw, "u1" if kind == "?" else kind)
        if kind == "?":
            return [bool(value) for value in values]
        # 1e-6 in 32 bits is 9.99999997e-7 in 64; its shortest decimal is what was meant
        return [float(str(value)) for value in values] if kind == "<f4" else values.tolist()

    def tensor_infos(self, count: int) -> dict[str, TensorInfo]:
        relative: dict[str, TensorInfo] = {}
        for number in range(count):
            name = self.string(f"the name of tensor {number}")
            if name in relative:
                raise self.error(f"has the tensor {name!r} twice")
            relative[name] = self.tensor_info(name)
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise self.error(f"general.alignment is {alignment!r}, must be a power of two")
        base = -(-self.at // alignment) * alignment
        end = max((base + info.offset + info.size for info in relative.values()), default=base)
        tensors = {}
        for name, info in sorted(relative.items(), key=lambda item: item[1].offset):
            if info.offset % alignment:
                raise self.error(f"{name} lies at {info.offset} of the data, which is no multiple of {alignment}")
            offset = base + info.offset
            if offset + info.size > self.end:
                raise self.error(
                    f"is truncated: the file ends at offset {self.end}, {name} wants offsets {offset} to "
                    f"{offset + info.size}; the whole file has {end} bytes"
                )
            tensors[name] = TensorInfo(info.shape, info.kind, offset, info.size)
        return tensors

    def tensor_info(self, name: str) -> TensorInfo:
        """Of the tensor whose name was just read; ``offset`` still counts from the start of the data."""
        dimensions = self.integer(4, name)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self.error(f"{name} has {dimensions} dimensions; 1 to {MAX_DIMENSIONS} are possible")
        shape = tuple(self.integer(8, name) for _ in range(dimensions))[::-1]
        number, offset = self.integer(4, name), self.integer(8, name)
        try:
            kind = GGMLQuantizationType(number)
            block, size = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise self.error(f"{name} is of the unknown type {number}") from None
        if min(shape) == 0 or shape[-1] % block:
            raise self.error(f"{name} has shape {list(shape)}; {kind.name} wants rows of a multiple of {block} numbers")
        return TensorInfo(shape, kind, offset, math.prod(shape) // block * size)
