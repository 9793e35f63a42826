"""Cache pages on disk: prefixes that survive a restart.

A directory holds units, one file each: a few consecutive pages of a prefix with their keys, checksums and tails.
A key stands for all that a page depends on, the salt included (see ``prefix``), so units need no order, and a page is
found whichever unit holds it. Whatever is wrong with a file costs a recomputation and a warning, never an answer.

    magic, 8 bytes | length of the header, 4 bytes | its SHA-256 | header, JSON | page, tail | page, tail | ...
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import queue
import struct
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourfold.model.cache import PagePool
from fourfold.model.transformer import Model

log = logging.getLogger(__name__)

MAGIC = b"ffpages1"
SUFFIX = ".pages"
UNIT_PAGES = 16  # a long text is written in units of so many pages
MAX_HEADER = 2**20  # bytes
MAX_PENDING = 64  # units that may wait to be written; more are not kept
_LEAD = struct.Struct("<8sI32s")

Page = tuple[bytes, Tensor, Tensor | None]  # key, numbers, tail


def fingerprint(model: Model, pool: PagePool) -> str:
    """What makes cached pages those of one model: its config and weights, to the last bit, and the form of a page."""
    form = {
        "config": model.cfg.to_dict(),
        "page_size": pool.page_size,
        "dtype": str(pool.data.dtype),
        "slots": list(pool.layout.slots),
    }
    digest = hashlib.sha256(json.dumps(form, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(memoryview(_bytes(tensor)))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


@dataclass(frozen=True)
class _Unit:
    path: Path
    size: int
    start: int  # where the first page begins
    keys: tuple[bytes, ...]
    tails: tuple[bool, ...]
    sums: tuple[str, ...]


class PageDirectory:
    """The units of ``directory``, at most ``quota`` bytes of them, the least recently used given up first.

    One engine uses a directory at a time; units of other models in it are not read, and are the first to go.
    ``in``, :meth:`read` and :meth:`put` are for the engine's thread; files are written by a thread of its own.
    Raises OSError if the directory cannot be made, ValueError if it is in use.
    """

    def __init__(self, directory: Path, quota: int, model: str, pool: PagePool) -> None:
        self.directory, self.quota, self.model = directory, quota, model
        self._page_bytes = pool.data.shape[1] * pool.data.element_size()
        self._tail_width, self._dtype = pool.layout.tail_width, pool.data.dtype
        self._places: dict[bytes, tuple[_Unit, int]] = {}
        self._units: OrderedDict[Path, _Unit] = OrderedDict()
        self._changed = threading.RLock()
        self._writing = True
        self.used = 0
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise ValueError(f"context cache: {directory} is in use by another engine") from error
        self._scan()
        self._pending: queue.Queue[list[Page] | None] = queue.Queue(MAX_PENDING)
        self._thread = threading.Thread(target=self._write_all, name="fourfold-disk", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Pages on disk."""
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def wants(self, key: bytes, tail: Tensor | None) -> bool:
        """Whether a page with this key and ``tail`` is worth writing."""
        place = self._places.get(key)
        return self._writing and (place is None or (tail is not None and not place[0].tails[place[1]]))

    def read(self, key: bytes) -> tuple[Tensor, Tensor | None] | None:
        """The numbers of a page and its tail if it has one; None if there is no sound file with it."""
        with self._changed:
            place = self._places.get(key)
        if place is None:
            return None
        unit, slot = place
        sizes = [self._page_bytes + self._tail_bytes(tail) for tail in unit.tails]
        try:
            with unit.path.open("rb") as file:
                file.seek(unit.start + sum(sizes[:slot]))
                data = file.read(sizes[slot])
            if len(data) != sizes[slot] or _sum(key, data) != unit.sums[slot]:
                raise ValueError("its content is not what was written")
        except (OSError, ValueError) as error:
            self._drop(unit.path, f"{error}")
            return None
        with self._changed:
            if unit.path in self._units:
                self._units.move_to_end(unit.path)
        with contextlib.suppress(OSError):
            os.utime(unit.path)  # the order of use, for the next start
        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        tail = raw[self._page_bytes :].view(torch.float32) if unit.tails[slot] else None
        return raw[: self._page_bytes].view(self._dtype), tail

    def put(self, pages: list[Page]) -> None:
        """Has ``pages`` written as one unit, if they can still wait in line. Their tensors must not change any more."""
        if pages and self._writing:
            with contextlib.suppress(queue.Full):  # keeping up with the answers is worth more
                self._pending.put_nowait(pages)

    def flush(self) -> None:
        """Waits until all that was put is written."""
        self._pending.join()

    def close(self) -> None:
        """Writes what is pending and lets the directory go."""
        self._pending.put(None)
        self._thread.join()
        os.close(self._lock)

    def _tail_bytes(self, present: bool) -> int:
        return 4 * self._tail_width * present

    def _scan(self) -> None:
        """Takes in what earlier engines left, oldest first."""
        for path in self.directory.glob("*.part"):  # of an engine that was killed
            path.unlink(missing_ok=True)
        found = []
        for path in self.directory.glob(f"*{SUFFIX}"):
            with contextlib.suppress(OSError):
                found.append((path.lstat().st_mtime, path))
        foreign: list[Path] = []
        for _, path in sorted(found):
            try:
                unit, model = self._open(path)
            except (OSError, ValueError, KeyError, TypeError) as error:
                self._drop(path, str(error))
                continue
            self._add(unit if model == self.model else _Unit(path, unit.size, 0, (), (), ()))
            if model != self.model:
                foreign.append(path)
        for path in reversed(foreign):
            self._units.move_to_end(path, last=False)
        self._evict(0)

    def _open(self, path: Path) -> tuple[_Unit, str]:
        """A unit by its header. Raises ValueError for a file that is none, or not all of one."""
        size = path.lstat().st_size
        if not path.is_file() or path.is_symlink():
            raise ValueError("is not a file")
        with path.open("rb") as file:
            lead = file.read(_LEAD.size)
            if len(lead) < _LEAD.size:
                raise ValueError("is cut off")
            magic, length, digest = _LEAD.unpack(lead)
            if magic != MAGIC or length > MAX_HEADER:
                raise ValueError("is not a file of cache pages")
            text = file.read(length)
        if hashlib.sha256(text).digest() != digest:
            raise ValueError("its header is not what was written")
        header = json.loads(text)
        keys = tuple(bytes.fromhex(key) for key in header["keys"])
        tails, sums = tuple(map(bool, header["tails"])), tuple(map(str, header["sums"]))
        start = _LEAD.size + length
        if not len(keys) == len(tails) == len(sums):
            raise ValueError("its header contradicts itself")
        wanted = start + int(header["bytes"])
        if size != wanted:
            raise ValueError(f"has {size} bytes instead of {wanted}")
        if header["model"] == self.model and wanted - start != sum(
            self._page_bytes + self._tail_bytes(tail) for tail in tails
        ):
            raise ValueError("holds pages of another size")
        return _Unit(path, size, start, keys, tails, sums), str(header["model"])

    def _add(self, unit: _Unit) -> None:
        with self._changed:
            self._units[unit.path] = unit
            self.used += unit.size
            self._places |= {key: (unit, slot) for slot, key in enumerate(unit.keys)}

    def _forget(self, path: Path) -> None:
        with self._changed:
            unit = self._units.pop(path, None)
            if unit is None:
                return
            self.used -= unit.size
            for key in unit.keys:
                if self._places.get(key, (None,))[0] is unit:
                    del self._places[key]

    def _drop(self, path: Path, reason: str) -> None:
        log.warning("context cache: %s is dropped: %s", path, reason)
        self._forget(path)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)

    def _evict(self, wanted: int) -> None:
        while self._units and self.used + wanted > self.quota:
            with self._changed:
                path = next(iter(self._units))
            self._forget(path)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _write_all(self) -> None:
        while (pages := self._pending.get()) is not None:
            try:
                if self._writing:
                    self._write(pages)
            except OSError as error:
                self._writing = False
                log.warning("context cache: %s cannot be written, so no more is kept: %s", self.directory, error)
            finally:
                self._pending.task_done()
        self._pending.task_done()

    def _write(self, pages: list[Page]) -> None:
        contents = []
        for _, numbers, tail in pages:
            data = _bytes(numbers).tobytes()
            contents.append(data if tail is None else data + _bytes(tail.float()).tobytes())
        header: dict[str, Any] = {
            "model": self.model,
            "bytes": sum(map(len, contents)),
            "keys": [key.hex() for key, _, _ in pages],
            "tails": [tail is not None for _, _, tail in pages],
            "sums": [_sum(page[0], data) for page, data in zip(pages, contents, strict=True)],
        }
        text = json.dumps(header).encode()
        lead = _LEAD.pack(MAGIC, len(text), hashlib.sha256(text).digest())
        size = len(lead) + len(text) + header["bytes"]
        if size > self.quota:
            return
        self._evict(size)
        path = self.directory / f"{self.model[:12]}-{pages[-1][0].hex()[:32]}-{len(pages)}{SUFFIX}"
        self._forget(path)
        part = path.with_suffix(".part")
        try:
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.writelines([lead, text, *contents])
            part.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise
        unit = _Unit(
            path, size, len(lead) + len(text), tuple(p[0] for p in pages), tuple(header["tails"]), tuple(header["sums"])
        )
        self._add(unit)


def _sum(key: bytes, data: bytes) -> str:
    """The checksum of a page; with its key, so that no page passes for another."""
    return hashlib.blake2b(data, digest_size=16, key=key).hexdigest()
