"""Documents into rows of one length: best fit, nothing cut, what is left over filled with a document without loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fourfold.data.mixture import Mixture
from fourfold.model.sequence import IGNORE, Document, Packed, pack


def filler(length: int, pad: int) -> Document:
    """``length`` positions of the pad token, none of which is a target."""
    zeros = torch.zeros(length, dtype=torch.int64)
    return Document(torch.full((length,), pad), zeros, zeros, torch.full((length,), IGNORE))


def best_fit(lengths: list[int], row: int) -> list[int]:
    """Which of the waiting documents fill the next row: the first, then always the longest that fits."""
    chosen, room = [0], row - lengths[0]
    left = sorted(range(1, len(lengths)), key=lambda i: -lengths[i])
    for index in left:
        if lengths[index] <= room:
            chosen.append(index)
            room -= lengths[index]
    return chosen


class Batches(Iterator[Packed]):
    """An endless stream of batches of ``rows`` rows of exactly ``row`` positions from a mixture.

    ``waiting`` documents are held to choose from; the oldest goes into every row, so none waits for ever.
    ``state()`` is a few hundred integers; ``restore`` makes the stream go on as if it had never stopped.
    Raises ValueError if a document is longer than a row.
    """

    def __init__(self, mixture: Mixture, row: int, rows: int, waiting: int = 128) -> None:
        if min(row, rows, waiting) < 1:
            raise ValueError("batches: row, rows and waiting must be at least 1")
        self.mixture, self.row, self.rows, self.waiting = mixture, row, rows, waiting
        self.pad = mixture.tokenizer.special("<|pad|>")
        self.next = mixture.position
        self.held: list[tuple[int, Document]] = []

    def __next__(self) -> Packed:
        documents = [document for _ in range(self.rows) for document in self._row()]
        return pack(documents, row=self.row)

    def _row(self) -> list[Document]:
        while len(self.held) < self.waiting:
            self._hold(self.next)
            self.next += 1
        chosen = best_fit([len(document) for _, document in self.held], self.row)
        documents = [self.held[i][1] for i in chosen]
        taken = set(chosen)
        self.held = [entry for i, entry in enumerate(self.held) if i not in taken]
        room = self.row - sum(len(document) for document in documents)
        return [*documents, filler(room, self.pad)] if room else documents

    def _hold(self, number: int) -> None:
        document = self.mixture.document(number)
        if len(document) > self.row:
            raise ValueError(f"batches.row: {self.row} is shorter than document {number} ({len(document)} positions)")
        self.held.append((number, document))

    def state(self) -> dict[str, Any]:
        """JSON-ready: the number of the next document and those that wait."""
        return {"next": self.next, "held": [number for number, _ in self.held]}

    def restore(self, state: dict[str, Any]) -> None:
        self.next, self.held = state["next"], []
        for number in state["held"]:
            self._hold(number)
