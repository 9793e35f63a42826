"""Pages of the cache beyond RAM: all of them lie in a temporary file, and a bounded part of them in memory.

The file is mapped, so kernels read pages where they lie, and whatever the system has dropped comes back as it was.
What is bounded are the rows of attention, the bulk of a page, one layer's of one page at a time: the least recently
used are given back to the file. Index keys and summaries, which every token reads, are left in memory.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fourfold.model.cache import Layout, page_elements

SYSTEM = mmap.PAGESIZE
AHEAD = 2**17  # bytes that the system reads at most when it is told what will be needed


class PageFile:
    """``pages`` pages in a file without a name in ``directory``, which goes when this object does.

    ``memory``: bytes of attention rows that stay in RAM; those of a single step of one layer do in any case.
    data: uint8 [pages, bytes of a page]. Raises OSError if the directory cannot be used or has not so much room.
    """

    def __init__(self, directory: Path, kept: Layout, pages: int, page_size: int, memory: int) -> None:
        self.page_bytes = page_elements(kept, page_size) * kept.dtype.itemsize
        self.memory, self.evicted = memory, 0
        self._spans = spans(kept, page_size)
        self._rows = {name: n for n, name in enumerate(self._spans)}
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=directory)
        size = pages * self.page_bytes
        try:
            os.posix_fallocate(self._file.fileno(), 0, size)
        except OSError as error:
            self._file.close()
            raise OSError(
                error.errno, f"no room for {size} bytes of pages: {error.strerror}", str(directory)
            ) from error
        self._map = mmap.mmap(self._file.fileno(), size)
        self._map.madvise(mmap.MADV_RANDOM)  # what is needed is said
        self.data = torch.frombuffer(self._map, dtype=torch.uint8).view(pages, self.page_bytes)
        self._cost = np.array([resident_bytes(stop - start) for start, stop in self._spans.values()])
        # When a layer's rows of a page were last used, counted in uses; 0: they are out.
        self._used = np.zeros((len(self._spans), pages), dtype=np.int64)
        self._all = pages * sum(stop - start for start, stop in self._spans.values())
        self._now = self.resident = 0
        self._leaving: list[tuple[int, int]] = []

    def use(self, name: str, pages: Tensor) -> None:
        """Has the rows of slot ``name`` in ``pages`` (int64, of any shape) in memory; before a kernel touches them."""
        span = self._rows.get(name)
        if span is None or not pages.numel():
            return
        self._now += 1
        used, wanted = self._used[span], pages.flatten().numpy()
        there = used[wanted] > 0
        used[wanted] = self._now
        if there.all():
            return
        cold = np.unique(wanted[~there])
        self.resident += len(cold) * int(self._cost[span])
        if self.resident > self.memory < self._all:
            self._evict()
        for start, stop in self._ranges(np.full(len(cold), span), cold):
            for at in range(start, stop, AHEAD):
                self._map.madvise(mmap.MADV_WILLNEED, at, min(AHEAD, stop - at))

    def use_all(self, pages: list[int]) -> None:
        """The same of all slots."""
        for name in self._spans:
            self.use(name, torch.tensor(pages, dtype=torch.int64))

    def _evict(self) -> None:
        """Gives back the least recently used, an eighth more than must be: finding them costs a look at all."""
        number = self._used.reshape(-1)
        there = np.flatnonzero((number > 0) & (number < self._now))
        order = there[np.argsort(number[there], kind="stable")]
        freed = self._cost[order // self._used.shape[1]].cumsum()
        count = int(np.searchsorted(freed, self.resident - self.memory + self.memory // 8)) + 1
        victims = order[:count]
        if not len(victims):
            return
        number[victims] = 0
        self.resident -= int(freed[len(victims) - 1])
        self.evicted += len(victims)
        ranges = self._ranges(*np.divmod(victims, self._used.shape[1]))
        for start, stop in ranges:
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)  # of a file: nothing is lost
        for start, stop in self._leaving + ranges:
            # What is still to be written is written now, and dropped the next time.
            os.posix_fadvise(self._file.fileno(), start, stop - start, os.POSIX_FADV_DONTNEED)
        self._leaving = ranges

    def _ranges(self, span: np.ndarray, pages: np.ndarray) -> list[tuple[int, int]]:
        """Where the ``span``-th slot of each of ``pages`` lies, in whole pages of the system, neighbours joined."""
        inside = np.array(list(self._spans.values()))[span]
        start = (pages * self.page_bytes + inside[:, 0]) // SYSTEM * SYSTEM
        stop = -(-(pages * self.page_bytes + inside[:, 1]) // SYSTEM) * SYSTEM
        order = np.argsort(start, kind="stable")
        start, stop = start[order], np.minimum(stop[order], len(self._map))
        first = np.flatnonzero(np.r_[True, start[1:] > np.maximum.accumulate(stop)[:-1]])
        return list(zip(start[first].tolist(), np.maximum.reduceat(stop, first).tolist(), strict=True))


def spans(kept: Layout, page_size: int) -> dict[str, tuple[int, int]]:
    """Where in a page, in bytes, the rows of attention of each layer lie: from and to."""
    size = kept.dtype.itemsize
    found = {}
    for name, slot in kept.slots.items():
        if name.endswith(".kv"):
            start = round(slot.start * page_size) * size
            found[name] = start, start + page_size // slot.ratio * slot.width * size
    return found


def resident_bytes(span: int) -> int:
    """What so many bytes of a page take in memory at most: whole pages of the system, begun at both ends."""
    return -(-span // SYSTEM) * SYSTEM + SYSTEM
