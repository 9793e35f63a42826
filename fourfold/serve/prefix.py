"""Reuse of cached pages between requests that begin alike.

A page is known by a chain of hashes: over the salt, over every page before it and over all that the model
sees at its own positions. So equal keys mean equal cache contents, and a key can be looked up without
comparing anything else.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from itertools import islice

import torch

from fourfold.model.cache import PagePool
from fourfold.model.sequence import MODALITIES, Document


def root_key(salt: str) -> bytes:
    """The start of a chain; requests with different salts never share a page."""
    return hashlib.sha256(salt.encode()).digest()


def page_key(previous: bytes, page: Document) -> bytes:
    """The key of the page that holds ``page`` after the pages that ``previous`` stands for."""
    digest = hashlib.sha256(previous)
    for part in (page.tokens, page.modality, page.marks):
        digest.update(part.numpy().tobytes())
    for name in MODALITIES[1:]:
        if name in page.patches:
            patches = page.patches[name]
            digest.update(f"{name} {len(patches.index)} ".encode())
            for part in (patches.index, patches.values, patches.coords):
                digest.update(part.contiguous().numpy().tobytes())
    return digest.digest()


def text_key(previous: bytes, ids: list[int]) -> bytes:
    """As :func:`page_key` of ``Document.text(ids)``, without making one."""
    digest = hashlib.sha256(previous)
    digest.update(array("q", ids).tobytes())
    digest.update(bytes(16 * len(ids)))  # the modality is text and there are no marks: zeros
    return digest.digest()


def extend_with_text(document: Document, ids: list[int]) -> Document:
    """``document`` followed by text tokens (without targets: nothing is learnt from it here)."""
    tail = Document.text(ids)
    join = [torch.cat(pair) for pair in zip(_axes(document), _axes(tail), strict=True)]
    return Document(*join, document.patches)


def _axes(document: Document) -> tuple[torch.Tensor, ...]:
    return document.tokens, document.modality, document.marks, document.targets


class PrefixStore:
    """Full pages that outlive their requests, the least recently used given up first.

    The store holds one reference to each page. A page that requests use as well is never given up. Where a model
    keeps a tail, a sequence can go on only after a page whose tail is known; the ``max_tails`` newest are.
    """

    def __init__(self, pool: PagePool, max_tails: int = 0) -> None:
        self._pool = pool
        self._pages: OrderedDict[bytes, int] = OrderedDict()
        self._tails: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._max_tails = max_tails

    def __len__(self) -> int:
        return len(self._pages)

    @property
    def evictable(self) -> int:
        """Pages that only the store holds."""
        return sum(self._pool.references(page) == 1 for page in self._pages.values())

    def get(self, key: bytes) -> int | None:
        """The page with this key; the caller must retain it before anything else is evicted."""
        page = self._pages.get(key)
        if page is not None:
            self._pages.move_to_end(key)
        return page

    def tail(self, key: bytes) -> torch.Tensor | None:
        """The tail of a sequence that ends with the page of this key."""
        return self._tails.get(key)

    def put(self, key: bytes, page: int, tail: torch.Tensor | None = None) -> None:
        if key not in self._pages:
            self._pool.retain([page])
            self._pages[key] = page
        if tail is not None:
            self._tails[key] = tail.clone()  # of its own: it may be a row of all the tails of a step
            self._tails.move_to_end(key)
            while len(self._tails) > self._max_tails:
                self._tails.popitem(last=False)

    def touch(self, keys: list[bytes]) -> None:
        """Marks a chain as used just now, its end as older than its beginning: ends are given up first."""
        for key in reversed(keys):
            if key in self._pages:
                self._pages.move_to_end(key)

    def make_room(self, pages: int) -> None:
        """Gives pages up until the pool has ``pages`` free ones, or none is left to give."""
        wanted = pages - self._pool.free
        if wanted <= 0:
            return
        victims = islice(((k, p) for k, p in self._pages.items() if self._pool.references(p) == 1), wanted)
        for key, page in list(victims):
            del self._pages[key]
            self._tails.pop(key, None)
            self._pool.release([page])
