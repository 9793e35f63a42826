"""Which requests a step computes, and which pages they hold.

Requests are taken in as they come, as soon as what is known of them fits: the prompt, not the longest answer. When
pages run out, the youngest gives its own back and returns to the head of the line; what it said stays said, and its
random numbers go on where they were, so that its answer is the same. The oldest is never interrupted, and it fits
alone; so every request ends.
"""

from __future__ import annotations

import threading
from collections import deque

import torch

from fourfold.model.cache import PagePool, SequenceState
from fourfold.model.sequence import TEXT
from fourfold.model.vision import after_image
from fourfold.serve.batch import Chunk
from fourfold.serve.disk import UNIT_PAGES, PageDirectory
from fourfold.serve.prefix import PrefixStore
from fourfold.serve.running import Running

Batch = list[tuple[Running, Chunk]]


class Scheduler:
    """The line of waiting requests and the running ones. Only ``waiting`` is touched by several threads, under
    ``lock``; everything else belongs to the engine's thread.

    whole_images: whether a tower must see each image in one piece.
    """

    def __init__(
        self,
        pool: PagePool,
        prefixes: PrefixStore,
        lock: threading.Condition,
        *,
        max_running: int,
        prefill_tokens: int,
        whole_images: bool,
        disk: PageDirectory | None = None,
    ) -> None:
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []
        self.preemptions = 0
        self.disk = disk
        self._pool, self._prefixes, self._lock = pool, prefixes, lock
        self._max_running, self._prefill_tokens, self._whole_images = max_running, prefill_tokens, whole_images
        self._refused_at = -1  # pages that were available when the head of the line did not fit

    def next_batch(self) -> Batch:
        """The chunks of the next step, with room for all of them."""
        self._drop_cancelled()
        self._admit()
        batch: Batch = [(r, r.chunk(1)) for r in self.running if not r.prefilling]
        left = self._prefill_tokens
        for running in [r for r in self.running if r.prefilling]:
            if left <= 0:
                break
            self._reuse(running)
            chunk = running.chunk(self._portion(running, left))
            left -= len(chunk)
            batch.append((running, chunk))
            self.running.remove(running)  # to the end of the line: prompts take turns
            self.running.append(running)
        return self._make_room(batch)

    def retire(self, running: Running) -> None:
        """The request is over; its pages stay in the cache for others."""
        self._save(running, 1)
        self.running.remove(running)
        self._prefixes.touch(running.keys)
        self._pool.release(running.forget())
        self._refused_at = -1

    def publish(self, running: Running) -> None:
        """Makes the pages that are full by now known to others."""
        size, state = self._pool.page_size, running.state
        full = state.length // size
        for number in range(running.published, full):
            tail = state.tail if (number + 1) * size == state.length else None
            self._prefixes.put(running.key(number, size), state.pages[number], tail)
        running.published = full
        self._save(running, UNIT_PAGES if running.prefilling or len(running.ids) > 1 else 1)

    def _save(self, running: Running, least: int) -> None:
        """Has the pages that are full by now written to disk, once there are ``least`` new ones: so a unit ends with
        the prompt, with the answer, and in between after so many pages."""
        first, last = running.saved, running.published
        if self.disk is None or last - first < least:
            return
        for start in range(first, last, UNIT_PAGES):
            numbers = range(start, min(start + UNIT_PAGES, last))
            keys = [running.key(number, self._pool.page_size) for number in numbers]
            tails = [self._prefixes.tail(key) for key in keys]
            wanted = [n for n, key, tail in zip(numbers, keys, tails, strict=True) if self.disk.wants(key, tail)]
            pages = self._pool.data[self._pool.use_all([running.state.pages[n] for n in wanted])].cpu()
            self.disk.put([(keys[n - start], page, tails[n - start]) for n, page in zip(wanted, pages, strict=True)])
        running.saved = last

    def _drop_cancelled(self) -> None:
        for running in [r for r in self.running if r.handle.cancelled]:
            self.retire(running)
            running.finish("cancelled")
        with self._lock:
            dropped = [r for r in self.waiting if r.handle.cancelled]
            for running in dropped:
                self.waiting.remove(running)
        for running in dropped:
            running.finish("cancelled")

    def _available(self, *more: Running) -> int:
        """Pages that no running request (nor ``more``) holds: free ones, and those that only the prefix store has."""
        return len(self._pool.data) - len({page for r in (*self.running, *more) for page in r.state.pages})

    def _admit(self) -> None:
        """Takes waiting requests in, first come first served, while what is known of all of them fits, with a page to
        grow by for each."""
        while self.waiting and len(self.running) < self._max_running:
            running = self.waiting[0]
            if self.running and self._available() <= self._refused_at:
                return
            cached = running.cached
            self._reuse(running)
            available = self._available(running)
            if self.running and sum(map(self._coming, [*self.running, running])) > available:
                self._pool.release(running.forget())
                running.cached = cached
                self._refused_at = self._available()
                return
            with self._lock:
                self.waiting.popleft()
            self.running.append(running)

    def _coming(self, running: Running) -> int:
        """Pages that a request will soon ask for."""
        return min(running.budget, self._pool.pages_for(running.total) + 1) - len(running.state.pages)

    def _make_room(self, batch: Batch) -> Batch:
        """Frees the pages that a step needs. The youngest requests give way if there are not enough of them."""
        while True:
            wanted = sum(self._pool.missing(r.state, len(chunk)) for r, chunk in batch)
            if wanted <= self._pool.free:
                return batch
            if wanted <= self._available():
                self._prefixes.make_room(wanted)
                return batch
            youngest = max(self.running, key=lambda r: r.order)
            self._preempt(youngest)
            batch = [(r, chunk) for r, chunk in batch if r is not youngest]

    def _preempt(self, running: Running) -> None:
        self.running.remove(running)
        self._prefixes.touch(running.keys)
        self._pool.release(running.interrupt())
        with self._lock:
            self.waiting.appendleft(running)
        self.preemptions += 1

    def _reuse(self, running: Running) -> None:
        """Takes over cached pages that hold the next positions; the last one known is always computed."""
        state, size = running.state, self._pool.page_size
        if state.length % size:
            return
        held: list[int] = []
        usable, tail = 0, None
        while (end := state.length + (len(held) + 1) * size) < running.total:
            key = running.key(state.length // size + len(held), size)
            page = self._page(key)
            if page is None:
                break
            held.append(page)
            if self._cuts_image(running, end):
                continue
            if not self._pool.layout.tail_width:
                usable = len(held)
            elif (known := self._prefixes.tail(key)) is not None:
                usable, tail = len(held), known
        running.known = max(running.known, state.length + len(held) * size)
        self._pool.release(held[usable:])
        if usable:
            content = running.content(state.length, state.length + usable * size)
            history = torch.where(content.modality == TEXT, content.tokens, -1).tolist()
            running.found(usable * size, history, tail, held[:usable])

    def _page(self, key: bytes) -> int | None:
        """The page with this key, held for the caller: from the store, or from disk if there is room for it."""
        page = self._prefixes.get(key)
        if page is not None:
            self._pool.retain([page])
            return page
        if self.disk is None or key not in self.disk:
            return None
        self._prefixes.make_room(1)
        if not self._pool.free or (found := self.disk.read(key)) is None:
            return None
        fresh = SequenceState()
        self._pool.reserve(fresh, 1)
        numbers, tail = found
        self._pool.data[self._pool.use_all(fresh.pages)[0]] = numbers.to(self._pool.data.device)
        self._prefixes.put(key, fresh.pages[0], tail)
        return fresh.pages[0]

    def _portion(self, running: Running, limit: int) -> int:
        """How much of a prompt to compute now: to the end of a page where there is a tail, so that it can be kept, and
        past the end of an image that a tower must see whole."""
        start, prompt = running.state.length, running.request.prompt
        stop = min(start + limit, running.total)
        if self._pool.layout.tail_width:
            if start < running.known < stop:  # others began like this: the tail there is worth having
                stop = running.known
            size = self._pool.page_size
            ends = range(stop - stop % size, start, -size)
            stop = next((end for end in ends if not self._cuts_image(running, end)), stop)
        return (after_image(prompt, stop) if self._cuts_image(running, stop) else stop) - start

    def _cuts_image(self, running: Running, position: int) -> bool:
        """Whether a chunk that ends before ``position`` would hold a part of an image, which a tower cannot see."""
        return self._whole_images and after_image(running.request.prompt, position) != position
