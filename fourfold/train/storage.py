"""What a checkpoint is on the disk: safetensors files of tensors and of pieces of tensors, and their checksums.

The reader is for ``torch.distributed.checkpoint``, whose own unpickles an index; here the files' headers say it all.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader, WriteResult

from fourfold.weights.tensors import DTYPES, NAMES

MODEL = "model/model.safetensors"
PIECES = "pieces"  # in a file's metadata: which of its tensors are parts of larger ones
PROGRESS = {"step", "tokens", "data", "counters"}


class Reader(StorageReader):
    """The tensors of a checkpoint's safetensors files."""

    def __init__(self, path: Path) -> None:
        self.files = sorted(path.glob("*.safetensors")) + [path / MODEL]

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """One reader reads one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return contents(self.files)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        of_file: dict[Path, list[tuple[str, Any]]] = {}
        for item in plan.items:
            file, key = self.places[item.storage_index]
            of_file.setdefault(file, []).append((key, item))
        for file, items in of_file.items():
            with safe_open(file, framework="pt") as opened:
                for key, item in items:
                    where = tuple(
                        slice(start, start + n) for start, n in zip(item.storage_offsets, item.lengths, strict=True)
                    )
                    tensor = opened.get_slice(key)[where] if where else opened.get_tensor(key)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(tensor)
                    planner.commit_tensor(item, target)
        done: torch.futures.Future[None] = torch.futures.Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


def contents(files: Iterable[Path]) -> Metadata:
    """What the files hold: tensors by part and name, and of each of their pieces the file and its name there."""
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, tuple[Path, str]] = {}
    for file in files:
        part = re.split(r"[-.]", file.name)[0]
        with safe_open(file, framework="pt") as opened:
            pieces = json.loads((opened.metadata() or {}).get(PIECES, "{}"))
            for key in opened.keys():
                stored = opened.get_slice(key)
                sizes = torch.Size(stored.get_shape())
                piece = pieces.get(key, {"name": key, "offsets": [0] * len(sizes), "shape": sizes})
                offsets, name = torch.Size(piece["offsets"]), f"{part}/{piece['name']}"
                properties = TensorProperties(dtype=DTYPES[stored.get_dtype()])
                entry = tensors.setdefault(name, TensorStorageMetadata(properties, torch.Size(piece["shape"]), []))
                entry.chunks.append(ChunkStorageMetadata(offsets, sizes))
                places[MetadataIndex(name, offsets)] = file, key
    return Metadata(tensors, storage_data=places)


def merge(files: list[Path], path: Path) -> None:
    """One file of whole tensors from files of pieces, one tensor in memory at a time."""
    found = contents(files)
    entries = {name.split("/", 1)[1]: entry for name, entry in found.state_dict_metadata.items()}
    names = sorted(entries, key=lambda name: (-entries[name].properties.dtype.itemsize, name))  # all aligned
    header, end = {}, 0
    for name in names:
        dtype, start = entries[name].properties.dtype, end
        end += entries[name].size.numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(entries[name].size), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            whole = torch.empty(entries[name].size, dtype=entries[name].properties.dtype)
            for chunk in entries[name].chunks:
                file, key = found.storage_data[MetadataIndex(f"model/{name}", chunk.offsets)]
                where = tuple(slice(start, start + n) for start, n in zip(chunk.offsets, chunk.sizes, strict=True))
                with safe_open(file, framework="pt") as opened:
                    whole[where] = opened.get_tensor(key)
            out.write(whole.flatten().view(torch.uint8).numpy())


def written(folder: Path, file: str) -> WriteResult:
    """A file that is safely on the disk, its size and its checksum."""
    flush(folder / file)
    return WriteResult(MetadataIndex(file), (folder / file).stat().st_size, _checksum(folder / file))


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            value = zlib.crc32(block, value)
    return value


def flush(path: Path) -> None:
    """Makes the system write a file or a directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def damage(path: Path, rank: int, ranks: int) -> list[str]:
    """What is not as it was written; each rank checks the sums of some of the files."""
    try:
        values = json.loads((path / "state.json").read_text())
        files = {str(file): (int(size), int(checksum)) for file, (size, checksum) in values["files"].items()}
        if values["progress"].keys() != PROGRESS or MODEL not in files:
            raise ValueError("a part of it is missing")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return [f"state.json cannot be read: {error}"]
    present = {str(file.relative_to(path)) for file in path.rglob("*.safetensors")}
    faults = [f"{file} is missing" for file in sorted(files.keys() - present)]
    faults += [f"{file} is not one of its files" for file in sorted(present - files.keys())]
    for index, file in enumerate(sorted(files.keys() & present)):
        size = (path / file).stat().st_size
        if size != files[file][0]:
            faults.append(f"{file} has {size} bytes of {files[file][0]}")
        elif index % ranks == rank and _checksum(path / file) != files[file][1]:
            faults.append(f"{file}: its checksum differs")
    if not faults:
        try:
            contents(path / file for file in files)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            faults.append(f"cannot be read: {error}")
    return faults
