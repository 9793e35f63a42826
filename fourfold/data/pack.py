"""Documents into rows of one length: best fit, nothing cut, what is left over filled with a document without loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch

from fourfold.data.mixture import Mixture
from fourfold.model.sequence import IGNORE, Document, Packed, pack
from fourfold.text.tokenizer import Tokenizer


class Feed(Protocol):
    """An endless stream of documents. A ticket, JSON-ready, finds its document again; so does a state its place."""

    tokenizer: Tokenizer

    def draw(self) -> tuple[Any, Document]: ...

    def again(self, tickets: Sequence[Any]) -> list[Document]: ...

    def state(self) -> Any: ...

    def restore(self, state: Any) -> None: ...


class Numbered:
    """Every ``world``-th document of a mixture from number ``rank`` on, as a feed whose tickets are the numbers."""

    def __init__(self, mixture: Mixture, rank: int = 0, world: int = 1) -> None:
        self.mixture, self.tokenizer, self.world = mixture, mixture.tokenizer, world
        self.next = mixture.position + rank

    def draw(self) -> tuple[int, Document]:
        number, self.next = self.next, self.next + self.world
        return number, self.mixture.document(number)

    def again(self, tickets: Sequence[int]) -> list[Document]:
        return [self.mixture.document(number) for number in tickets]

    def state(self) -> int:
        return self.next

    def restore(self, state: int) -> None:
        self.next = state


def filler(length: int, pad: int) -> Document:
    """``length`` positions of the pad token, none of which is a target."""
    zeros = torch.zeros(length, dtype=torch.int64)
    return Document(torch.full((length,), pad), zeros, zeros, torch.full((length,), IGNORE))


def best_fit(lengths: Sequence[int], row: int) -> list[int]:
    """Which of the waiting documents fill the next row: the first, and those that leave the least room beside it.

    Of the choices that fill it alike, the one with the longest documents, for short ones are easy to place later.
    """
    room = row - lengths[0]
    order = sorted((i for i in range(1, len(lengths)) if lengths[i] <= room), key=lambda i: lengths[i])
    within = (1 << room + 1) - 1
    reach = [1]  # bit s of reach[k]: some of the k shortest come to s positions
    for index in order:
        reach.append((reach[-1] | reach[-1] << lengths[index]) & within)
    left = reach[-1].bit_length() - 1
    chosen = []
    for k in range(len(order), 0, -1):
        length = lengths[order[k - 1]]
        if length <= left and reach[k - 1] >> left - length & 1:
            chosen.append(order[k - 1])
            left -= length
    return [0, *chosen]


class Batches(Iterator[Packed]):
    """An endless stream of batches of ``rows`` rows of exactly ``row`` positions from a mixture or another feed.

    ``waiting`` documents are held to choose from; the oldest goes into every row, so none waits for ever.
    ``state()`` is a place and a ticket for each document held; ``restore`` makes the stream go on as if it had never
    stopped. ``filled`` and ``emitted`` count the positions that hold documents and all positions since the start.
    Raises ValueError if a document is longer than a row.
    """

    def __init__(self, source: Mixture | Feed, row: int, rows: int, waiting: int = 128) -> None:
        if min(row, rows, waiting) < 1:
            raise ValueError("batches: row, rows and waiting must be at least 1")
        self.feed: Feed = Numbered(source) if isinstance(source, Mixture) else source
        self.row, self.rows, self.waiting = row, rows, waiting
        self.pad = self.feed.tokenizer.special("<|pad|>")
        self.held: list[tuple[Any, Document]] = []
        self.filled = self.emitted = 0

    def __next__(self) -> Packed:
        return pack([document for _ in range(self.rows) for document in self.next_row()], row=self.row)

    def next_row(self) -> list[Document]:
        """The documents of one row, the filler included."""
        while len(self.held) < self.waiting:
            self._hold(*self.feed.draw())
        chosen = best_fit([len(document) for _, document in self.held], self.row)
        documents = [self.held[i][1] for i in chosen]
        taken = set(chosen)
        self.held = [entry for i, entry in enumerate(self.held) if i not in taken]
        room = self.row - sum(len(document) for document in documents)
        self.filled, self.emitted = self.filled + self.row - room, self.emitted + self.row
        return [*documents, filler(room, self.pad)] if room else documents

    def _hold(self, ticket: Any, document: Document) -> None:
        if len(document) > self.row:
            raise ValueError(f"batches.row: {self.row} is shorter than document {ticket} ({len(document)} positions)")
        self.held.append((ticket, document))

    @property
    def next(self) -> Any:
        """Where the feed stands: the number of a mixture's next document."""
        return self.feed.state()

    def state(self, held: bool = True) -> dict[str, Any]:
        """JSON-ready: where the feed stands and what waits; without ``held``, what waits is left out for good."""
        return {"next": self.next, "held": [ticket for ticket, _ in self.held] if held else []}

    def restore(self, state: dict[str, Any]) -> None:
        self.feed.restore(state["next"])
        self.held = []
        for ticket, document in zip(state["held"], self.feed.again(state["held"]), strict=True):
            self._hold(ticket, document)


class Lanes(Iterator[Packed]):
    """Batches of ``rows`` rows, of which this rank makes its share, the same rows however many ranks there are.

    Row number l of every batch is lane l: a feed of its own, ``feed(l, rows)``, and its own buffer. Rank r of n packs
    the lanes [r * rows / n, (r + 1) * rows / n), so the batch that all ranks make together, in their order, does not
    depend on n. ``parts``: one batch comes as this many packs, for gradient accumulation. Raises ValueError unless
    the ranks and parts divide the rows.
    """

    def __init__(
        self,
        feed: Callable[[int, int], Feed],
        row: int,
        rows: int,
        rank: int = 0,
        world: int = 1,
        parts: int = 1,
        waiting: int = 64,
    ) -> None:
        if min(rows, world, parts) < 1 or not 0 <= rank < world or rows % (world * parts):
            raise ValueError(f"rows: {rows} cannot be divided among {world} ranks in {parts} parts (rank {rank})")
        share = rows // world
        self.row, self.rows, self.parts, self.part = row, rows, parts, 0
        own = range(rank * share, (rank + 1) * share)
        self.lanes = {lane: Batches(feed(lane, rows), row, 1, waiting) for lane in own}

    def __next__(self) -> Packed:
        size = len(self.lanes) // self.parts
        lanes = list(self.lanes.values())[self.part * size : (self.part + 1) * size]
        self.part = (self.part + 1) % self.parts
        return pack([document for lane in lanes for document in lane.next_row()], row=self.row)

    @property
    def efficiency(self) -> float:
        """Share of the positions made so far that hold documents and no filler."""
        emitted = sum(lane.emitted for lane in self.lanes.values())
        return sum(lane.filled for lane in self.lanes.values()) / max(emitted, 1)

    def state(self, held: bool = True) -> dict[str, Any]:
        """JSON-ready, of this rank's lanes; :func:`merge` makes one of all ranks'. Only between batches."""
        if self.part:
            raise ValueError(f"lanes: {self.part} of {self.parts} parts of a batch are out; save between batches")
        return {"rows": self.rows, "lanes": {str(lane): batches.state(held) for lane, batches in self.lanes.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a state of all ranks, however many they were. Raises ValueError if it is of other rows."""
        if state["rows"] != self.rows:
            raise ValueError(f"rows: {self.rows} cannot go on from a state of {state['rows']} rows")
        for lane, batches in self.lanes.items():
            if str(lane) not in state["lanes"]:
                raise ValueError(f"lanes: lane {lane} is not in the state; merge the states of all ranks")
            batches.restore(state["lanes"][str(lane)])
        self.part = 0


def merge(states: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The state of all lanes from the state of each rank. Raises ValueError unless they are of the same rows."""
    states = list(states)
    if len({state["rows"] for state in states}) != 1:
        raise ValueError("lanes: the states are of different rows")
    return {"rows": states[0]["rows"], "lanes": {k: v for state in states for k, v in state["lanes"].items()}}
