"""Tensors in safetensors files, one or many shards: raw, memory-mapped, never unpickled.

Files come from strangers: headers, offsets and the index are checked before a byte of a tensor is touched.
"""

from __future__ import annotations

import json
import math
import mmap
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HEADER_LIMIT = 100 * 2**20  # bytes; that of the format's own library

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """Files that cannot be loaded or written as a model; the message lists every fault."""

    def __init__(self, *faults: str) -> None:
        super().__init__("; ".join(faults))
        self.faults = list(faults)


class TensorReader(Protocol):
    """Named tensors as they are stored."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> str: ...
    def read(self, name: str) -> Tensor: ...
    def release(self, name: str) -> None: ...


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: bytes ``start`` to ``stop`` of ``path``."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsReader:
    """The tensors of one file, or of all shards that an index names. Reads are views of the mapped file.

    Raises CheckpointError on construction if a file or the index is broken; the message lists all that is wrong.
    """

    def __init__(self, path: Path) -> None:
        path = Path(path)
        faults: list[str] = []
        if path.is_file():
            shards, index = [path], None
        else:
            shards, index = _shards(path, faults)
        self._stored: dict[str, Stored] = {}
        for shard in shards:
            for name, stored in _read_header(shard, faults).items():
                if name in self._stored:
                    faults.append(f"{name} is in {self._stored[name].path.name} and in {shard.name}")
                self._stored[name] = stored
        if index is not None and not faults:
            faults += _compare(index, self._stored, path / INDEX)
        if faults:
            raise CheckpointError(*faults)
        self._maps: dict[Path, mmap.mmap] = {}

    def names(self) -> list[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def dtype(self, name: str) -> str:
        return self._stored[name].dtype

    def read(self, name: str) -> Tensor:
        """The tensor as stored, a view of the file: to be copied from; writing to it ends the process."""
        stored = self._stored[name]
        if stored.start == stored.stop:
            return torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")  # nor shall it be
            data = torch.frombuffer(
                self._map(stored.path), dtype=torch.uint8, count=stored.stop - stored.start, offset=stored.start
            )
        dtype = DTYPES[stored.dtype]
        if stored.start % dtype.itemsize:
            data = data.clone()  # views need aligned bytes
        return data.view(dtype).view(stored.shape)

    def release(self, name: str) -> None:
        """Lets the system drop the tensor's pages; they are read again when needed."""
        stored = self._stored[name]
        first = -(-stored.start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = stored.stop // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0 and stored.path in self._maps and hasattr(mmap, "MADV_DONTNEED"):
            self._maps[stored.path].madvise(mmap.MADV_DONTNEED, first, length)

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            with path.open("rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # takes no memory of its own
        return self._maps[path]


def _shards(directory: Path, faults: list[str]) -> tuple[list[Path], dict[str, str] | None]:
    """The files of a directory's tensors, and the index that names them if there is one."""
    if (directory / INDEX).is_file():
        index = _read_index(directory / INDEX, faults)
        shards = []
        for name in sorted(set(index.values())):
            if "/" in name or "\\" in name or name in ("", ".", ".."):
                # a link is fine, model caches are made of them; a path is not
                faults.append(f"{INDEX}: {name!r} is not the name of a file in this directory")
            elif not name.endswith(".safetensors"):
                faults.append(f"{INDEX}: {name!r} is no safetensors file; nothing else is read")
            elif not (directory / name).is_file():
                faults.append(f"{INDEX}: {name} is missing")
            else:
                shards.append(directory / name)
        return shards, index
    if (directory / SINGLE).is_file():
        return [directory / SINGLE], None
    pickles = sorted(p.name for p in directory.glob("*") if p.suffix in PICKLES)
    if pickles:
        faults.append(
            f"{directory}: holds pickled weights ({', '.join(pickles)}), which are never read; save as safetensors"
        )
    else:
        faults.append(f"{directory / SINGLE}: cannot be read: neither it nor {INDEX} is there")
    return [], None


def _read_index(path: Path, faults: list[str]) -> dict[str, str]:
    try:
        values = json.loads(path.read_bytes(), object_pairs_hook=_no_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        faults.append(f"{path}: cannot be read: {error}")
        return {}
    index = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        faults.append(f"{path}: weight_map must be a table of file names")
        return {}
    return index


def _compare(index: dict[str, str], stored: dict[str, Stored], path: Path) -> Iterable[str]:
    for name, file in index.items():
        if name not in stored:
            yield f"{path.name}: {name} is not in {file}"
        elif stored[name].path.name != file:
            yield f"{path.name}: {name} is in {stored[name].path.name}, not in {file}"
    for name in stored.keys() - index.keys():
        yield f"{path.name}: does not name {name}, which is in {stored[name].path.name}"


def _read_header(path: Path, faults: list[str]) -> dict[str, Stored]:
    """What a file holds. A fault is added for all that is not as the format demands."""
    wrong = f"{path}: cannot be read: "
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, HEADER_LIMIT):
                faults.append(f"{wrong}the header is cut off or none: {size} bytes in all")
                return {}
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        faults.append(f"{wrong}{error}")
        return {}
    if not isinstance(header, dict):
        faults.append(f"{wrong}the header is no table")
        return {}
    header.pop("__metadata__", None)
    stored = {}
    for name, entry in header.items():
        try:
            stored[name] = _entry(path, entry, 8 + length)
        except (KeyError, TypeError, ValueError) as error:
            faults.append(f"{path.name}: {name}: its entry in the header is wrong: {error}")
    end = 8 + length
    for name, found in sorted(stored.items(), key=lambda item: (item[1].start, item[1].stop)):
        if found.start != end:
            faults.append(f"{wrong}{name} starts at byte {found.start}, what is before it ends at {end}")
            break
        end = found.stop
        if end > size:
            faults.append(f"{wrong}it is cut off at byte {size}; {name} lies at {found.start} to {found.stop}")
    if stored and end < size:
        faults.append(f"{wrong}{size - end} bytes after byte {end} belong to no tensor")
    return stored


def _entry(path: Path, entry: Any, base: int) -> Stored:
    dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}")
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError("shape and data_offsets must be whole numbers")
    if stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{stop - start} bytes do not hold {dtype} of shape {shape}")
    return Stored(path, dtype, tuple(shape), base + start, base + stop)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; one with a key twice reads differently elsewhere, so it is refused."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name appears twice")
    return values
