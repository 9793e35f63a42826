"""Built data on disk: shards of arrays with their labels, memory-mapped; and the one rule that splits it.

A shard is ``NAME.safetensors`` (arrays) beside ``NAME.json`` (one column per label, licence, tier, hashes).
The JSON is written last, so a shard with a JSON is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from fourfold.data.fetch import cache_folder

DTYPES = {"U8": np.uint8, "I16": np.int16, "I32": np.int32, "I64": np.int64, "F32": np.float32}


class CorpusError(ValueError):
    """Data that is not built, or not what was asked for; the message says which."""


def is_test(key: str) -> bool:
    """The split rule everywhere: a tenth of the concepts, by hash of the concept's key, is never trained."""
    return int(hashlib.sha1(key.encode()).hexdigest()[:8], 16) % 10 == 0


def split_of(key: str) -> str:
    return "test" if is_test(key) else "train"


@dataclass
class Shard:
    """N items.

    arrays: either indexed by item, or flat with ``offsets`` int64 [N+1] saying where each item lies;
    columns: label name -> N values; ``split`` is always there and holds train or test.
    tier: A (may be trained for release) or B (test only). hashes: extracted item -> sha256.
    """

    name: str
    arrays: dict[str, np.ndarray]
    columns: dict[str, np.ndarray]
    licence: str
    tier: str
    version: int = 1
    hashes: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.columns["split"])

    def rows(self, **where: Any) -> np.ndarray:
        """int64 indices of the items whose columns have these values: ``shard.rows(split="train")``."""
        keep = np.ones(len(self), bool)
        for column, value in where.items():
            keep &= np.isin(self.columns[column], value)
        return np.flatnonzero(keep)

    def piece(self, array: str, item: int) -> np.ndarray:
        """Item number ``item`` of a flat array."""
        offsets = self.arrays["offsets"]
        return self.arrays[array][offsets[item] : offsets[item + 1]]

    def text(self, item: int) -> str:
        return bytes(self.piece("text", item)).decode()


@dataclass(frozen=True)
class Corpus:
    root: Path
    shards: dict[str, Shard]

    def __contains__(self, name: str) -> bool:
        return name in self.shards

    def __getitem__(self, name: str) -> Shard:
        if name not in self.shards:
            raise CorpusError(f"corpus: shard {name!r} is not built in {self.root}; run `fourfold data build smoke`")
        return self.shards[name]

    def texts(self, split: str = "train") -> list[str]:
        """All prose of a split, for a tokenizer to learn from."""
        shard = self["text"]
        return [shard.text(int(i)) for i in shard.rows(split=split)]


def flatten(items: list[np.ndarray], dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Ragged items -> one flat array and int64 offsets [N+1]."""
    offsets = np.zeros(len(items) + 1, np.int64)
    offsets[1:] = np.cumsum([len(item) for item in items])
    return (np.concatenate(items) if items else np.zeros(0)).astype(dtype), offsets


def write_atomically(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_shard(shard: Shard, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    labels = {
        "version": shard.version,
        "licence": shard.licence,
        "tier": shard.tier,
        "hashes": shard.hashes,
        "columns": {name: np.asarray(values).tolist() for name, values in shard.columns.items()},
    }
    (folder / f"{shard.name}.json").unlink(missing_ok=True)
    write_atomically(
        folder / f"{shard.name}.safetensors", save({k: np.ascontiguousarray(v) for k, v in shard.arrays.items()})
    )
    write_atomically(folder / f"{shard.name}.json", json.dumps(labels).encode())


def map_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, mapped rather than read."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    arrays = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, shape, dtype = 8 + size + entry["data_offsets"][0], tuple(entry["shape"]), DTYPES[entry["dtype"]]
            empty = 0 in shape  # a map cannot be empty
            arrays[name] = np.zeros(shape, dtype) if empty else np.memmap(path, dtype, "r", start, shape)
    return arrays


def read_shard(folder: Path, name: str) -> Shard:
    labels = json.loads((folder / f"{name}.json").read_text())
    columns = {column: np.array(values) for column, values in labels["columns"].items()}
    arrays = map_arrays(folder / f"{name}.safetensors")
    return Shard(name, arrays, columns, labels["licence"], labels["tier"], labels["version"], labels["hashes"])


def load(out_dir: str | Path | None = None) -> Corpus:
    """Everything built in a folder (default: what ``build`` fills), memory-mapped. Raises CorpusError if nothing is."""
    root = Path(out_dir) if out_dir is not None else cache_folder() / "smoke"
    names = sorted(path.stem for path in root.glob("*.json") if path.with_suffix(".safetensors").is_file())
    if not names:
        raise CorpusError(f"corpus: nothing is built in {root}; run `fourfold data build smoke`")
    return Corpus(root, {name: read_shard(root, name) for name in names})
