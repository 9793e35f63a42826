"""Training data of any size as one endless stream: weighted sources, in an order that the seed decides.

What rank r of n reads is a function of (seed, r, n). Each source's shards are cut into parts, by sample number, until
the ranks share them evenly, and dealt out anew in each epoch; so the ranks read disjoint samples, and all of them
together read every sample once in each epoch of a source, whatever n is. For batches that are the same on any number
of ranks, :func:`open_batches` gives every row of a batch a stream of its own.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fourfold.config_media import MediaConfig
from fourfold.data import corpus as corpora
from fourfold.data.lessons import Lessons
from fourfold.data.mixture import Mixture
from fourfold.data.pack import Lanes
from fourfold.data.records import Reader
from fourfold.data.sharded import READERS, Shard, ShardError, find_shards, fingerprint
from fourfold.data.skills import SKILLS
from fourfold.model.sequence import Document
from fourfold.text.tokenizer import Tokenizer

KINDS = (*READERS, "hf", "skills", "recall")
MADE = ("skills", "recall")  # from nothing, or nearly
KEPT_BAD = 1000  # samples left out that are remembered until somebody asks


class StreamError(ValueError):
    """Data that cannot be read at all, or not gone on with; the message names the source."""


@dataclass(frozen=True)
class SourceSpec:
    """One source of samples.

    kind: jsonl, parquet, tar, hf (a data set of Hugging Face), skills (the generated ones of ``data.mixture``) or
    recall (documents with hidden answers, ``data.lessons``).
    path: a file, a folder, a glob; of hf a name or a folder; of skills the built corpus (empty: the default place).
    weight: share of samples, any positive scale. name: what the order, states and messages know it by (default: kind
    and path, so give one to data that may move). text, messages: the fields to read (of a tar, a .txt is ``text``).
    long: what becomes of plain text that is longer than a row, skip or split. split, subset: of hf and skills.
    skills: skill or task -> share, of kinds skills and recall.
    """

    kind: str
    path: str = ""
    weight: float = 1.0
    name: str = ""
    text: str = "text"
    messages: str = "messages"
    split: str = "train"
    subset: str = ""
    long: str = "skip"
    skills: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise StreamError(f"sources.kind: is {self.kind!r}; choose one of {', '.join(KINDS)}")
        if not (self.weight >= 0 and math.isfinite(self.weight)):
            raise StreamError(f"sources.weight: must be >= 0, not {self.weight}")
        if self.long not in ("skip", "split"):
            raise StreamError(f"sources.long: is {self.long!r}; choose skip or split")
        if not self.path and self.kind not in MADE:
            raise StreamError("sources.path: must be given")
        if (self.kind in MADE) != bool(self.skills):
            raise StreamError(f"sources.skills: belong to the kinds {' and '.join(MADE)}, which need them")

    @property
    def label(self) -> str:
        return self.name or f"{self.kind}:{self.path}"


@dataclass(frozen=True)
class Bad:
    """A sample that was left out. ``index`` is its number in the shard; with a shard's error, all from there on."""

    source: str
    shard: str
    index: int
    reason: str


class Exhausted(Exception):
    """A source without one good sample."""


def chance(*key: Any) -> float:
    """A number in [0, 1) that depends on the key alone: on no library's generator, for good."""
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little") / 2**56


class Sharded:
    """This rank's samples of one source. Its place: epoch, number of the part, sample, byte, piece of the sample."""

    def __init__(
        self,
        label: str,
        shards: list[Shard],
        reader: Reader,
        seed: int,
        rank: int,
        world: int,
        note: Callable[[Bad], None],
    ) -> None:
        self.label, self.shards, self.reader, self.note = label, shards, reader, note
        self.seed, self.rank, self.world = seed, rank, world
        self.fingerprint = fingerprint(shards)
        # Ranks share a few shards sample by sample, in equal parts; of many, each reads its own whole.
        count = len(shards)
        self.parts = 1 if count >= world else world // math.gcd(count, world)
        self.place = {"epoch": 0, "part": 0, "index": 0, "offset": 0, "piece": 0, "good": 0}
        self._walk = self._documents()

    def draw(self) -> tuple[list[int], Document]:
        """(ticket, document); a ticket is [shard, sample, byte where it begins, piece]. Raises Exhausted."""
        return next(self._walk)

    def again(self, tickets: Sequence[Sequence[int]]) -> list[Document]:
        """Each shard is opened once. Raises StreamError if a sample is not what it was."""
        found: dict[tuple[int, ...], Document] = {}
        for number in {ticket[0] for ticket in tickets}:
            wanted = {ticket[1] for ticket in tickets if ticket[0] == number}
            index, offset = min((ticket[1], ticket[2]) for ticket in tickets if ticket[0] == number)
            try:
                for item in self.shards[number].read(index, offset, wanted.__contains__):
                    if item.index in wanted:
                        for piece, document in enumerate(self.reader.documents(item.load())):
                            found[number, item.index, piece] = document
                        wanted.remove(item.index)
                    if not wanted:
                        break
            except Exception as error:
                raise StreamError(f"{self.label}: {self.shards[number].name} has changed ({error})") from error
        try:
            return [found[ticket[0], ticket[1], ticket[3]] for ticket in tickets]
        except KeyError as error:
            raise StreamError(f"{self.label}: a sample that was waiting is gone: {error}") from error

    def state(self) -> dict[str, Any]:
        return {**self.place, "shards": self.fingerprint}

    def restore(self, state: dict[str, Any]) -> None:
        if state["shards"] != self.fingerprint:
            raise StreamError(f"{self.label}: its shards are not those of the state: names or sizes have changed")
        self.place = {key: state[key] for key in self.place}
        self._walk = self._documents()

    def order(self, epoch: int) -> list[tuple[int, int]]:
        """(shard, part) in the order in which this rank reads them in an epoch."""
        parts = [(shard, part) for shard in range(len(self.shards)) for part in range(self.parts)]
        parts.sort(key=lambda unit: (chance(self.seed, self.label, epoch, *unit), unit))
        return parts[self.rank :: self.world]

    def _documents(self) -> Iterator[tuple[list[int], Document]]:
        place = self.place
        while True:
            order = self.order(place["epoch"])
            while place["part"] < len(order):
                yield from self._part(*order[place["part"]])
                place |= {"part": place["part"] + 1, "index": 0, "offset": 0, "piece": 0}
            if not place["good"] and not self._has_good():
                raise Exhausted
            place |= {"epoch": place["epoch"] + 1, "part": 0, "good": 0}

    def _part(self, number: int, part: int) -> Iterator[tuple[list[int], Document]]:
        """The documents of one part from the place on, which is past each before it is given out."""
        place, shard = self.place, self.shards[number]

        def ours(index: int) -> bool:
            return index % self.parts == part

        try:
            for item in shard.read(place["index"], place["offset"], ours):
                begin, documents = place["offset"], []
                if ours(item.index):
                    try:
                        documents = self.reader.documents(item.load())
                    except Exception as error:  # hostile data reaches many a library: no sample may end the run
                        self.note(Bad(self.label, shard.name, item.index, f"{type(error).__name__}: {error}"))
                for piece in range(place["piece"], len(documents)):
                    if piece == len(documents) - 1:
                        place |= {"index": item.index + 1, "offset": item.offset, "piece": 0}
                    else:
                        place |= {"index": item.index, "piece": piece + 1}
                    place["good"] += 1
                    yield [number, item.index, begin, piece], documents[piece]
                place |= {"index": item.index + 1, "offset": item.offset, "piece": 0}
        except ShardError as error:
            self.note(Bad(self.label, shard.name, place["index"], f"the rest of the shard: {error}"))

    def _has_good(self) -> bool:
        """Whether there is a good sample for anybody: this rank's may all have been bad by chance."""
        return any(self._good(number) for number in range(len(self.shards)))

    def _good(self, number: int) -> bool:
        try:
            for item in self.shards[number].read(0, 0, lambda index: True):
                try:
                    if self.reader.documents(item.load()):
                        return True
                except Exception:  # noted where it was read
                    continue
        except ShardError:
            pass
        return False


class Generated:
    """Every ``world``-th generated document, as a source."""

    def __init__(
        self, label: str, mixture: Mixture | Lessons, most: int, rank: int, world: int, note: Callable[[Bad], None]
    ) -> None:
        self.label, self.mixture, self.most, self.world, self.note = label, mixture, most, world, note
        self.next = rank

    def draw(self) -> tuple[list[int], Document]:
        for _ in range(10_000):
            number, self.next = self.next, self.next + self.world
            document = self.mixture.document(number)
            if len(document) <= self.most:
                return [number], document
            reason = f"too long: {len(document)} positions, at most {self.most} fit a row"
            self.note(Bad(self.label, self.mixture.skill(number), number, reason))
        raise Exhausted

    def again(self, tickets: Sequence[Sequence[int]]) -> list[Document]:
        return [self.mixture.document(ticket[0]) for ticket in tickets]

    def state(self) -> dict[str, Any]:
        return {"next": self.next}

    def restore(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


@dataclass(frozen=True)
class Opened:
    """What the streams of all ranks have in common. sources: label -> what was found, and what reads it."""

    sources: dict[str, tuple[list[Shard] | Mixture | Lessons, Reader]]
    weights: dict[str, float]
    tokenizer: Tokenizer
    seed: int

    @staticmethod
    def of(specs: Sequence[SourceSpec], tokenizer: Tokenizer, media: MediaConfig, seed: int, max_tokens: int) -> Opened:
        """Raises StreamError for what cannot be read at all."""
        if max_tokens < 2:
            raise StreamError(f"max_tokens: must be at least 2, not {max_tokens}")
        labels = [spec.label for spec in specs]
        if len(set(labels)) < len(labels):
            raise StreamError(f"sources.name: {max(labels, key=labels.count)!r} is there twice; give them names")
        weights = {spec.label: spec.weight for spec in specs if spec.weight}
        if not weights:
            raise StreamError("sources: needs at least one positive weight")
        sources: dict[str, tuple[list[Shard] | Mixture | Lessons, Reader]] = {}
        for spec in specs:
            if not spec.weight:
                continue
            reader = Reader(tokenizer, media, max_tokens, spec.text, spec.messages, spec.long == "split")
            try:
                if spec.kind == "skills":
                    found: Any = Mixture(spec.skills, skills_corpus(spec), tokenizer, media, spec.split, seed)
                elif spec.kind == "recall":
                    found = Lessons(spec.skills, tokenizer, max_tokens, seed)
                else:
                    found = find_shards(spec.kind, spec.path, spec.split, spec.subset)
            except Exception as error:  # of Hugging Face's hub, too
                raise StreamError(f"source {spec.label}: {error}") from error
            sources[spec.label] = found, reader
        return Opened(sources, weights, tokenizer, seed)


def skills_corpus(spec: SourceSpec) -> corpora.Corpus:
    """The built corpus; an empty one where every skill makes its documents from nothing."""
    if not spec.path and not any(SKILLS[name].shards for name in spec.skills.keys() & SKILLS.keys()):
        return corpora.Corpus(Path(), {})
    return corpora.load(Path(spec.path) if spec.path else None)


class Stream(Iterator[Document]):
    """The documents of all sources, one rank's, without end. Made by :func:`open_stream`.

    ``bad`` counts the samples left out, by source; :meth:`take_bad` names them. A source without one good sample is
    left out and its weight falls to the others; StreamError when none is left.
    """

    def __init__(self, opened: Opened, rank: int, world: int) -> None:
        if not 0 <= rank < world:
            raise StreamError(f"rank: {rank} is not one of {world}")
        self.tokenizer, self.seed, self.rank, self.weights = opened.tokenizer, opened.seed, rank, opened.weights
        self.sources: dict[str, Sharded | Generated] = {}
        for label, (found, reader) in opened.sources.items():
            if isinstance(found, Mixture | Lessons):
                self.sources[label] = Generated(label, found, reader.max_tokens, rank, world, self._note)
            else:
                self.sources[label] = Sharded(label, found, reader, opened.seed, rank, world, self._note)
        self.drawn = 0
        self.dead: list[str] = []
        self.bad: Counter[str] = Counter()
        self._named: deque[Bad] = deque(maxlen=KEPT_BAD)

    def __next__(self) -> Document:
        return self.draw()[1]

    def draw(self) -> tuple[list[Any], Document]:
        """(ticket, document)."""
        while True:
            label = self._choose()
            try:
                ticket, document = self.sources[label].draw()
            except Exhausted:
                self.dead.append(label)
                continue
            self.drawn += 1
            return [label, *ticket], document

    def again(self, tickets: Sequence[Sequence[Any]]) -> list[Document]:
        """The documents of earlier tickets. Raises StreamError if one cannot be had."""
        found: dict[int, Document] = {}
        for label in {ticket[0] for ticket in tickets}:
            if label not in self.sources:
                raise StreamError(f"source {label}: is gone, but documents of it wait")
            places = [n for n, ticket in enumerate(tickets) if ticket[0] == label]
            documents = self.sources[label].again([tickets[n][1:] for n in places])
            found |= dict(zip(places, documents, strict=True))
        return [found[n] for n in range(len(tickets))]

    def state(self) -> dict[str, Any]:
        """JSON-ready: how many were drawn, and the place in each source."""
        return {
            "drawn": self.drawn,
            "sources": {label: source.state() for label, source in self.sources.items()},
            "dead": list(self.dead),
            "bad": dict(self.bad),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a state; a source that is not in it begins at its beginning. Raises StreamError."""
        self.drawn, self.bad = state["drawn"], Counter(state["bad"])
        self.dead = [label for label in state["dead"] if label in self.sources]
        self._named.clear()
        for label, source in self.sources.items():
            if label in state["sources"]:
                source.restore(state["sources"][label])

    def take_bad(self) -> list[Bad]:
        """The samples left out since the last call, at most the last ``KEPT_BAD``."""
        named = list(self._named)
        self._named.clear()
        return named

    def _note(self, bad: Bad) -> None:
        self.bad[bad.source] += 1
        self._named.append(bad)

    def _choose(self) -> str:
        alive = {label: weight for label, weight in self.weights.items() if label not in self.dead}
        if not alive:
            why = "; ".join(f"{b.source}, {b.shard}, {b.index}: {b.reason}" for b in list(self._named)[-3:])
            raise StreamError(f"sources: not one good sample in any ({sum(self.bad.values())} bad; the last: {why})")
        left = chance(self.seed, "source", self.rank, self.drawn) * sum(alive.values())
        for label, weight in alive.items():
            left -= weight
            if left < 0:
                return label
        return label


def open_stream(
    specs: Sequence[SourceSpec],
    tokenizer: Tokenizer,
    media: MediaConfig,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    max_tokens: int = 4096,
) -> Stream:
    """What rank ``rank`` of ``world`` reads of the sources, in documents of at most ``max_tokens`` positions.

    Raises StreamError, which names the source, for one that is missing or cannot be read at all.
    """
    return Stream(Opened.of(specs, tokenizer, media, seed, max_tokens), rank, world)


def open_batches(
    specs: Sequence[SourceSpec],
    tokenizer: Tokenizer,
    media: MediaConfig,
    row: int,
    rows: int,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    parts: int = 1,
    waiting: int = 64,
) -> Lanes:
    """Packed batches of ``rows`` rows over all ranks, of which this rank makes ``rows / world`` in ``parts`` packs.

    The same rows for every ``world`` that divides them. Raises StreamError or ValueError.
    """

    opened = Opened.of(specs, tokenizer, media, seed, row)
    return Lanes(lambda lane, lanes: Stream(opened, lane, lanes), row, rows, rank, world, parts, waiting)


def take_bad(batches: Lanes) -> list[Bad]:
    """The samples that this rank left out since the last call."""
    feeds = [lane.feed for lane in batches.lanes.values()]
    return [bad for feed in feeds if isinstance(feed, Stream) for bad in feed.take_bad()]
