"""Samples out of shards: JSON lines, Parquet, tar of grouped files, Hugging Face datasets.

A shard is read from any sample on. What is wrong with one sample comes to light when it is loaded, what is wrong
with the rest of a shard as :class:`ShardError`. Nothing is extracted, unpickled or fetched by a name in the data.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fourfold.data.records import MODALITY, Record, RecordError

SUFFIXES = {
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    "parquet": (".parquet",),
    "tar": (".tar", ".tar.gz", ".tgz"),
}
MAX_LINE = 64 << 20  # bytes of one line
MAX_GROUP = 256 << 20  # bytes of the files of one sample
MAX_FILES = 64  # of one sample
MAX_ROW_GROUP = 4 << 30  # bytes, unpacked
MAX_EXPANSION = 200  # unpacked bytes for each packed one ...
EXPANSION_SLACK = 64 << 20  # ... beyond these
CHUNK = 1 << 20


class ShardError(ValueError):
    """The rest of a shard cannot be read."""


@dataclass(frozen=True)
class Item:
    """Sample ``index`` of a shard. ``offset``: where reading goes on after it, as bytes (0 where index is enough);
    ``load`` makes the record and raises ValueError if it is broken."""

    index: int
    offset: int
    load: Callable[[], Record]


@dataclass(frozen=True)
class Shard:
    """``read(index, offset, wanted)`` yields the items from ``index`` on, those that are not ``wanted`` unloaded."""

    name: str
    size: int
    read: Callable[[int, int, Callable[[int], bool]], Iterator[Item]]


def find_shards(kind: str, path: str, split: str = "train", subset: str = "") -> list[Shard]:
    """The shards of a file, a folder (searched through), a glob, or for ``hf`` a data set's name or folder, in order.

    Raises ValueError if there is none.
    """
    if kind == "hf":
        return _hf_shards(path, split, subset)
    if kind not in READERS:
        raise ValueError(f"kind: is {kind!r}; choose one of {', '.join((*READERS, 'hf'))}")
    root = Path(path)
    if root.is_dir():
        files = sorted(p for p in root.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES[kind]))
        names = [p.relative_to(root).as_posix() for p in files]
    else:
        files = [root] if root.is_file() else [Path(p) for p in sorted(glob.glob(path, recursive=True))]
        files = [p for p in files if p.is_file()]
        names = [p.as_posix() for p in files] if len({p.name for p in files}) < len(files) else [p.name for p in files]
    if not files:
        raise ValueError(f"path: no {' or '.join(SUFFIXES[kind])} in {path!r}")
    return [
        Shard(name, file.stat().st_size, _guard(READERS[kind], file)) for name, file in zip(names, files, strict=True)
    ]


def fingerprint(shards: list[Shard]) -> str:
    """Changes when a shard comes, goes, or changes its size."""
    return hashlib.sha256(json.dumps([(s.name, s.size) for s in shards]).encode()).hexdigest()[:16]


def _guard(reader: Callable[..., Iterator[Item]], *first: Any) -> Callable[..., Iterator[Item]]:
    """``reader`` with its first arguments given and its errors made one kind."""

    def read(index: int, offset: int, wanted: Callable[[int], bool]) -> Iterator[Item]:
        try:
            yield from reader(*first, index, offset, wanted)
        except ShardError:
            raise
        except Exception as error:  # readers of damaged files raise anything
            raise ShardError(f"{type(error).__name__}: {error}") from error

    return read


class Unpacked(io.RawIOBase):
    """A file as it reads once unpacked, forwards only; it refuses to expand without end."""

    def __init__(self, path: Path) -> None:
        self._plain = path.suffix not in (".gz", ".tgz", ".zst")
        self._file: BinaryIO = _open(path)
        self._at = 0
        self.block = b""  # what was read last
        self._most = path.stat().st_size * MAX_EXPANSION + EXPANSION_SLACK

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_GROUP:
            raise ShardError(f"asks for {size} bytes at once; at most {MAX_GROUP}")
        self.block = self._count(self._file.read(size))
        return self.block

    def readline(self, size: int | None = -1) -> bytes:
        return self._count(self._file.readline(size))

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence or offset < self._at and not self._plain:
            raise ShardError("cannot be read backwards")
        if self._plain:
            self._at = self._file.seek(offset)
        while self._at < offset and self.read(min(CHUNK, offset - self._at)):
            pass
        return self._at

    def close(self) -> None:
        self._file.close()
        super().close()

    def _count(self, data: bytes) -> bytes:
        self._at += len(data)
        if self._at > self._most and not self._plain:
            raise ShardError(f"unpacks to more than {MAX_EXPANSION} times its size: a bomb")
        return data


def _open(path: Path) -> BinaryIO:
    if path.suffix in (".gz", ".tgz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        return io.BufferedReader(_arrow("pyarrow").input_stream(str(path), compression="zstd"))
    return open(path, "rb")


# ---------------------------------------------------------------- JSON lines


def read_jsonl(path: Path, index: int, offset: int, wanted: Callable[[int], bool]) -> Iterator[Item]:
    with Unpacked(path) as file:
        file.seek(offset)
        while line := file.readline(MAX_LINE):
            long = len(line) == MAX_LINE and not line.endswith(b"\n")
            rest = line
            while long and rest and not rest.endswith(b"\n"):
                rest = file.readline(CHUNK)
            if line.strip():
                yield Item(index, file.tell(), _refuse_line if long else _parser(line))
                index += 1


def _refuse_line() -> Record:
    raise RecordError(f"too long: a line of more than {MAX_LINE} bytes")


def _parser(line: bytes) -> Callable[[], Record]:
    return lambda: Record(_object(line))


def _object(data: bytes) -> Any:
    try:
        return json.loads(data)
    except RecursionError:
        raise RecordError("is JSON of too many levels") from None
    except ValueError as error:
        raise RecordError(f"is not JSON ({error})") from error


# ---------------------------------------------------------------- Parquet


def _arrow(module: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("kind: this data needs pyarrow; pip install 'fourfold[train]'") from error
    return pyarrow if module == "pyarrow" else pyarrow.parquet


def read_parquet(path: Path, index: int, offset: int, wanted: Callable[[int], bool]) -> Iterator[Item]:
    with _arrow("parquet").ParquetFile(path) as file:
        first = 0
        for group in range(file.metadata.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            if end > index:
                yield from _row_group(file, group, first, max(index, first), end, wanted)
            first = end


def _row_group(
    file: Any, group: int, first: int, index: int, end: int, wanted: Callable[[int], bool]
) -> Iterator[Item]:
    """Rows index..end-1 of a row group that begins with row ``first``. One that is damaged costs its rows alone."""
    try:
        if (size := file.metadata.row_group(group).total_byte_size) > MAX_ROW_GROUP:
            raise RecordError(f"row group {group} unpacks to {size} bytes; at most {MAX_ROW_GROUP}")
        at = first
        for batch in file.iter_batches(batch_size=64, row_groups=[group]):
            for row in range(max(index - at, 0), batch.num_rows):
                keep = batch.slice(row, 1) if wanted(at + row) else None
                yield Item(at + row, 0, lambda keep=keep: Record(keep.to_pylist()[0]))
                index = at + row + 1
            at += batch.num_rows
    except Exception as error:  # decoders of damaged pages raise anything
        why = RecordError(f"rows {index} to {end - 1} cannot be read ({error})")
        for lost in range(index, end):
            yield Item(lost, 0, _raiser(why))


def _raiser(error: ValueError) -> Callable[[], Record]:
    def load() -> Record:
        raise error

    return load


# ---------------------------------------------------------------- tar


def read_tar(path: Path, index: int, offset: int, wanted: Callable[[int], bool]) -> Iterator[Item]:
    """Consecutive files whose paths agree up to the first dot of the name are one sample: a.json, a.0.jpg, a.txt."""
    with Unpacked(path) as file:
        file.seek(offset)
        group: Group | None = None
        members, error = _members(file), None
        while True:
            try:
                member = next(members, None)
            except Exception as found:  # what came before is whole
                member, error = None, found
            if member is None:
                break
            folder, _, name = member.name.removeprefix("./").rpartition("/")
            stem, _, extension = name.partition(".")
            if group is not None and group.key != (folder, stem):
                yield Item(index, member.offset, group.record)
                index, group = index + 1, None
            group = group or Group((folder, stem))
            if wanted(index):
                group.add(member, extension, file)
        if group is not None:
            yield Item(index, file.tell(), group.record)
        if error is not None:
            raise error


def _members(file: Unpacked) -> Iterator[tarfile.TarInfo]:
    """What is not a folder. tarfile takes a damaged header for the end, and a negative size for a size."""
    archive = tarfile.open(fileobj=file, mode="r:")  # type: ignore[arg-type]
    while (member := archive.next()) is not None:
        archive.members = []  # it would keep them all
        if member.size < 0:
            raise ShardError(f"{member.name[:80]!r} has {member.size} bytes")
        if not member.isdir():
            yield member
    if any(file.block):
        raise ShardError(f"is damaged at byte {file.tell()}")


class Group:
    """The files of one sample of a tar, in memory alone; the first thing wrong with them is kept."""

    def __init__(self, key: tuple[str, str]) -> None:
        self.key = key
        self.files: dict[str, bytes] = {}
        self.size = 0
        self.error = ""

    def add(self, member: tarfile.TarInfo, extension: str, file: Unpacked) -> None:
        name, kind = member.name.removeprefix("./"), extension.rpartition(".")[2].lower()
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            self.error = self.error or f"path: {name[:80]!r} leads out of the archive"
        elif not member.isreg() or member.issparse():
            self.error = self.error or f"path: {name[:80]!r} is a link, a device or sparse, not a plain file"
        elif kind in ("json", "txt") or kind in MODALITY:
            self.size += member.size
            if self.size > MAX_GROUP or len(self.files) >= MAX_FILES:
                self.error = self.error or f"too long: more than {MAX_GROUP} bytes or {MAX_FILES} files"
            if not self.error:
                file.seek(member.offset_data)
                self.files[name] = file.read(member.size)
                if len(self.files[name]) < member.size:
                    self.error = f"{name[:80]!r} is cut off"

    def record(self) -> Record:
        if self.error:
            raise RecordError(self.error)
        values: dict[str, Any] = {}
        media: dict[str, bytes] = {}
        for name, data in self.files.items():
            if name.lower().endswith(".json"):
                found = _object(data)
                if not isinstance(found, dict):
                    raise RecordError(f"{name[:80]!r} is a {type(found).__name__}, not an object with fields")
                values = found | values
            elif name.lower().endswith(".txt"):
                values["text"] = data.decode()
            else:
                media[name] = data
        return Record(values, media)


# ---------------------------------------------------------------- Hugging Face


def _hf_shards(path: str, split: str, subset: str) -> list[Shard]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError("kind: hf needs datasets; pip install 'fourfold[train]'") from error
    folder = Path(path)
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):  # of save_to_disk
        data = datasets.load_from_disk(path)
        data = data[split] if isinstance(data, datasets.DatasetDict) else data
        data = data.to_iterable_dataset(num_shards=max(1, min(len(data), 64)))
    else:
        data = datasets.load_dataset(path, subset or None, split=split, streaming=True)
    if data.features:
        data = data.decode(False)  # media stay bytes: they are decoded within our limits
    count = data.num_shards

    def shard(number: int) -> Shard:
        def read(index: int, offset: int, wanted: Callable[[int], bool]) -> Iterator[Item]:
            for at, row in enumerate(data.shard(num_shards=count, index=number).skip(index), index):
                yield Item(at, 0, lambda row=row: Record(row))

        return Shard(f"{number}-of-{count}", 0, _guard(read))

    return [shard(number) for number in range(count)]


READERS = {"jsonl": read_jsonl, "parquet": read_parquet, "tar": read_tar}
