"""Long documents with answers hidden in them, made to a number of tokens: needles, variables, words, token pairs.

A document is a context and questions about it, so that a reader can take the context in once. Pieces of text are
encoded once and laid end to end as tokens. Keys and values of the test split are never drawn for training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from fourfold.data.corpus import split_of
from fourfold.data.items import pick
from fourfold.data.synthetic import FILLERS, NAMES, NOUNS, Rng
from fourfold.model.sequence import IGNORE, Document
from fourfold.text.tokenizer import Tokenizer

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
# Words that are one token each of the bundled tokenizer.
ADJECTIVES = (
    "able ancient automatic available bad basic best better black blue bright broad broken brown burnt capable "
    "central certain chief clean clear close common complete complex current dark dead deep different difficult "
    "direct double dry early eastern edible electric empty entire equal evergreen evil exact false far fast fat final "
    "fine first fixed flat former free fresh full future general global good great green grey half hard heavy high "
    "holy hot human important individual kind known large last left legal light little living local long low lower "
    "main military narrow natural near necessary negative new next normal northern old open original own particular "
    "perennial physical pink political poor possible present proper public purple quick random real recent red "
    "regular relative right righteous round same secret sharp short similar simple single slow small social soft "
    "southern special specific spoken standard static straight strong sudden sweet thick thin third tropical true "
    "underlying upper useful valid warm weak western white whole wicked wide wild worn yellow young"
).split()
THINGS = (
    "account act action address age agent air animal application area argument arm art attack attempt author ball "
    "band bank bar base battle bear bed bird blood body bone book border bow box branch bread brother buffer bug "
    "building bus business call camp car card care case cat cause cell center century change character child city "
    "class client cloth cloud coast collection color column command company computer copy corn corner country course "
    "court cover cross daughter day death degree design device disease display doctor dog door dress drug ear earth "
    "effect email energy engine event example eye face fact failure family father feeling field file fire fish flag "
    "flesh flower food foot form frame fruit function game gas gate glass god gold grass group hair hand head heart "
    "heat heaven herb home horn horse host hour house husband image index instrument iron item job judgment key king "
    "kingdom land language law leaf leg letter level library life line list log machine mail manager mark matter "
    "meaning meat member memory message metal method milk mill mind mine money month mother motion mountain mouth "
    "muscle music name nature neck network night note number object office oil order organ package pain pair paper "
    "parent part party path pattern peace pen people performance period person pie piece pig place plan plane plant "
    "platform point policy port post pot power pressure priest process product program project property purpose "
    "quality quest queue race range record region rest result rice river rock room root rose salt sand school science "
    "script sea search season seat section seed servant server shape sheep shell ship shrub side sign silver site "
    "skin sleep son sort soul sound source south space species speech speed spirit stack star statement step stock "
    "stone store stream string structure success sun surface sword system table tail task test text thread time "
    "tissue town tree trust truth turn turtle unit usage value variety vein version vine voice wall war water way "
    "weight well wife wilderness wind window wine woman wood work world worship writer year"
).split()
VERBS = "sees finds leaves paints moves carries".split()
SPARE = 8  # tokens left after the longest answer


class RecallError(ValueError):
    """A task that is unknown, or a document too short for it; the message names the field and the limit."""


@dataclass(frozen=True)
class Query:
    """tokens: what is appended to the context; answer: the tokens that should follow; values: what must be given."""

    tokens: list[int]
    answer: list[int]
    values: tuple[str, ...]


@dataclass(frozen=True)
class Recall:
    """context: int64 [n]; places: first token of each needle in it; depths: those as shares of the context."""

    task: str
    context: np.ndarray
    queries: list[Query]
    places: tuple[int, ...] = ()

    @property
    def depths(self) -> tuple[float, ...]:
        return tuple(place / max(1, len(self.context)) for place in self.places)


@dataclass(frozen=True)
class Needles:
    """hay: noise, prose or lines (other needles); key, value: pair, number or hex; asked: how many keys are."""

    hay: str
    key: str = "pair"
    value: str = "number"
    keys: int = 1
    values: int = 1
    asked: int = 1


NEEDLES = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("prose"),
    "niah_single_3": Needles("prose", value="hex"),
    "niah_multikey_1": Needles("prose", keys=4),
    "niah_multikey_2": Needles("lines"),
    "niah_multikey_3": Needles("lines", key="hex", value="hex"),
    "niah_multivalue": Needles("prose", values=4),
    "niah_multiquery": Needles("prose", keys=4, asked=4),
}


def name(rng: Rng, kind: str, split: str, role: str) -> str:
    """An adjective and a noun (pair), a made-up word of four syllables, a number of seven digits, one of no more than
    three different ones (alike) or a short one of two, or 16 hexadecimal digits, of ``split``."""
    while True:
        if kind == "pair":
            text = f"{pick(rng, ADJECTIVES)} {pick(rng, THINGS)}"
        elif kind == "word":
            drawn = rng.integers(0, (len(CONSONANTS), len(VOWELS)), (4, 2))
            text = "".join(CONSONANTS[c] + VOWELS[v] for c, v in drawn)
        elif kind == "number":
            text = str(int(rng.integers(1_000_000, 10_000_000)))
        elif kind == "alike":
            few = rng.permutation(10)[:3]
            text = "".join(str(few[i]) for i in rng.integers(0, 3, 7))
        elif kind == "short":
            text = str(int(rng.integers(10, 100)))
        else:
            text = f"{int(rng.integers(2**63)):016x}"
        if split_of(f"{role} {text}") == split:
            return text


def names(rng: Rng, kind: str, split: str, role: str, count: int) -> list[str]:
    """``count`` different ones, in the order drawn."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[name(rng, kind, split, role)] = None
    return list(found)


def document(
    task: str, tokenizer: Tokenizer, length: int, seed: int, split: str = "test", depth: float | None = None
) -> Recall:
    """The document of a task and seed: context, the longest question and its answer fit into ``length`` tokens.

    depth: where the asked needle lies, 0 the beginning and 1 the end (of several, the first); None draws all places.
    Raises RecallError for an unknown task or split, a depth outside 0..1, or a length that cannot hold the needles.
    """
    if task not in TASKS:
        raise RecallError(f"task: {task!r} is unknown; choose one of {', '.join(TASKS)}")
    if split not in ("train", "test"):
        raise RecallError(f"split: is {split!r}; must be train or test")
    if depth is not None and not 0 <= depth <= 1:
        raise RecallError(f"depth: is {depth}; must be between 0 and 1")
    rng = np.random.default_rng([seed, list(TASKS).index(task), length, split == "test"])
    return TASKS[task](task, tokenizer, length, rng, split, depth)


def lesson(made: Recall, prefix: Sequence[int] = ()) -> Document:
    """The context with all questions and answers behind it, to train on. Targets are the answers alone, but of a
    rehearsal the questions too: what they repeat is learnt first, and the answer is how it goes on."""
    ids, learn = [*prefix, *made.context.tolist()], [False] * (len(prefix) + len(made.context))
    for query in made.queries:
        ids += query.tokens + query.answer
        learn += [made.task == "rehearsal"] * len(query.tokens) + [True] * len(query.answer)
    whole = Document.text(ids)
    following = torch.tensor([*learn[1:], False])
    return Document(whole.tokens, whole.modality, whole.marks, whole.targets.masked_fill(~following, IGNORE))


def _needles(task: str, tokenizer: Tokenizer, length: int, rng: Rng, split: str, depth: float | None) -> Recall:
    spec = NEEDLES[task]
    keys = names(rng, spec.key, split, "key", spec.keys)
    values = names(rng, spec.value, split, "value", spec.keys * spec.values)
    held = {key: values[i * spec.values : (i + 1) * spec.values] for i, key in enumerate(keys)}
    lines = [_line(key, value) for key in keys for value in held[key]]
    queries = [_query(tokenizer, _question(key), held[key]) for key in keys[: spec.asked]]
    room = _room(length, queries)
    encoded = [tokenizer.encode(line) for line in lines]
    rest = room - sum(map(len, encoded))
    if rest < 0:
        raise RecallError(f"length: {length} tokens cannot hold {task}; {length - rest} are needed")
    if spec.hay == "lines":
        hay = _fill(rest, (tokenizer.encode(_line(*pair)) for pair in _others(rng, spec, split, set(keys))))
    else:
        sentences = [f" {text}" for text in FILLERS] if spec.hay == "noise" else _prose(rng)
        encode = cache(tokenizer.encode)  # a short document uses few of them, a long one each many times
        hay = _fill(rest, (encode(pick(rng, sentences)) for _ in iter(int, 1)))
    depths = rng.random(len(lines))
    if depth is not None:
        depths[0] = depth
    return _insert(task, hay, encoded, depths, queries)


def _line(key: str, value: str) -> str:
    return f"{_beginning(key)}{value}."


def _beginning(key: str) -> str:
    return f" The code of {key}="


def _question(key: str) -> str:
    return f"\nWhat is the code of {key}?{_beginning(key)}"


def _others(rng: Rng, spec: Needles, split: str, taken: set[str]) -> Iterable[tuple[str, str]]:
    """Keys that are not in ``taken``; a million tokens of them tell some twice."""
    while True:
        key = name(rng, spec.key, split, "key")
        if key not in taken:
            yield key, name(rng, spec.value, split, "value")


def _prose(rng: Rng, count: int = 512) -> list[str]:
    return [
        f" {pick(rng, NAMES)} {pick(rng, VERBS)} the {pick(rng, NOUNS)} near the {pick(rng, NOUNS)}."
        for _ in range(count)
    ]


def _query(tokenizer: Tokenizer, question: str, values: Sequence[str], before: str = "") -> Query:
    return Query(tokenizer.encode(question), tokenizer.encode(before + ", ".join(values) + ".\n"), tuple(values))


def _room(length: int, queries: Sequence[Query]) -> int:
    return length - max(len(query.tokens) + len(query.answer) for query in queries) - SPARE


def _fill(count: int, pieces: Iterable[list[int]]) -> list[list[int]]:
    """Pieces of ``count`` tokens together; the last one is cut."""
    taken: list[list[int]] = []
    for piece in pieces:
        if count <= 0:
            break
        taken.append(piece[:count])
        count -= len(piece)
    return taken


def _insert(
    task: str, hay: list[list[int]], needles: list[list[int]], depths: np.ndarray, queries: list[Query]
) -> Recall:
    """Needles between whole pieces of hay, each at its share of the tokens of the hay."""
    ends = np.cumsum([0, *map(len, hay)])
    gaps = [int(np.abs(ends - depth * ends[-1]).argmin()) for depth in depths]
    parts: list[list[int]] = []
    places = [0] * len(needles)
    start = before = 0
    for number in np.argsort(gaps, kind="stable").tolist():
        parts += hay[start : gaps[number]]
        start = gaps[number]
        places[number] = int(ends[start]) + before
        parts.append(needles[number])
        before += len(needles[number])
    parts += hay[start:]
    return Recall(task, _join(parts), queries, tuple(places))


def _join(parts: list[list[int]]) -> np.ndarray:
    return np.fromiter((token for part in parts for token in part), np.int64, sum(map(len, parts)))


def _variables(
    task: str, tokenizer: Tokenizer, length: int, rng: Rng, split: str, depth: float | None, hops: int = 4
) -> Recall:
    """One value goes through a chain of variables, told in order; all of them are asked."""
    chain = names(rng, "word", split, "key", hops + 1)
    value = name(rng, "number", split, "value")
    lines = [f" VAR {chain[0]} = {value}."]
    lines += [f" VAR {after} = VAR {before}." for before, after in zip(chain, chain[1:], strict=False)]
    queries = [_query(tokenizer, f"\nWhich variables are {value}? They are", chain, " ")]
    encoded = [tokenizer.encode(line) for line in lines]
    rest = _room(length, queries) - sum(map(len, encoded))
    if rest < 0:
        raise RecallError(f"length: {length} tokens cannot hold {task}; {length - rest} are needed")
    pool = [tokenizer.encode(f" {text}") for text in FILLERS]
    depths = np.sort(rng.random(len(lines)))
    if depth is not None:
        depths = depth + (1 - depth) * depths
        depths[0] = depth
    return _insert(task, _fill(rest, (pick(rng, pool) for _ in iter(int, 1))), encoded, depths, queries)


def _words(task: str, tokenizer: Tokenizer, length: int, rng: Rng, split: str, depth: float | None) -> Recall:
    """A list of made-up words, of which some come more often: ten alike (cwe), or the first three by Zipf (fwe)."""
    asked = 10 if task == "cwe" else 3
    common = names(rng, "word", split, "key", asked)
    question = f"\nWhat are the {asked} most frequent words? They are"
    queries = [_query(tokenizer, question, common, " ")]
    room, encoded = _room(length, queries), [tokenizer.encode(f" {word}") for word in common]
    width = max(map(len, encoded)) + 1
    words = room // width
    if words < asked * 8:
        raise RecallError(
            f"length: {length} tokens cannot hold {task}; {length + (asked * 8 - words) * width} are needed"
        )
    often = [min(30, words // (2 * asked))] * asked if task == "cwe" else [words // (2 * 2**i) for i in range(asked)]
    repeats = max(1, often[-1] // 10)
    parts = [piece for piece, count in zip(encoded, often, strict=True) for _ in range(count)]
    rest = room - sum(map(len, parts))
    taken = set(common)
    while rest >= width * repeats:
        word = name(rng, "word", split, "key")
        piece = tokenizer.encode(f" {word}")
        if word not in taken and len(piece) * repeats <= rest:
            taken.add(word)
            parts += [piece] * repeats
            rest -= len(piece) * repeats
    return Recall(task, _join([parts[i] for i in rng.permutation(len(parts))]), queries)


def _drill(task: str, tokenizer: Tokenizer, length: int, rng: Rng, split: str, depth: float | None) -> Recall:
    """Nothing but needles, all asked, within the length: much to look up in few tokens, to learn.

    A rehearsal asks as the other tasks do; copying is learnt, from numbers of few digits also what comes next where the
    last ones stand twice. A drill asks in the words of the needle, for a short number: one target of three says where
    to look. A copy leaves those words out and says every needle twice more, all but its first token to be learnt: the
    densest lesson in where to look, without which drills do not teach it.
    """
    parts: list[list[int]] = []
    queries: list[Query] = []
    room = length - SPARE
    spec = Needles("lines", value=pick(rng, ["short", "number", "alike"]) if task == "rehearsal" else "short")
    times = 2 if task == "copy" else 1
    taken: set[str] = set()
    for key, value in _others(rng, spec, split, taken):
        taken.add(key)
        line, query = tokenizer.encode(_line(key, value)), _query(tokenizer, _question(key), [value])
        if task == "drill":
            query = Query(tokenizer.encode(_beginning(key)), tokenizer.encode(f"{value}."), (value,))
        elif task == "copy":
            line = tokenizer.encode(f" {key}={value}.")
            query = Query(line[:1], line[1:], (value,))
        room -= len(line) + times * (len(query.tokens) + len(query.answer))
        if room < 0:
            break
        parts.append(line)
        queries.append(query)
    if not queries:
        raise RecallError(f"length: {length} tokens cannot hold {task}; {length - room} are needed")
    places = np.cumsum([0, *map(len, parts[:-1])]).tolist()
    order = [i for _ in range(times) for i in rng.permutation(len(queries)).tolist()]
    return Recall(task, _join(parts), [queries[i] for i in order], tuple(places[i] for i in order))


def _pairs(task: str, tokenizer: Tokenizer, length: int, rng: Rng, split: str, depth: float | None) -> Recall:
    """Token pairs, key and value, in noise; pairs, not single tokens, are what the split holds apart."""
    ids = [id for id in range(tokenizer.vocab_size) if tokenizer.has(id) and not tokenizer.is_special(id)]
    half = len(ids) // 2
    count = min(64, half // 2, (length - 3) // 2)
    if count < 1:
        raise RecallError(f"length: {length} tokens cannot hold mqar; 5 are needed")
    keys = [ids[i] for i in rng.permutation(half)[:count]]
    held = {key: _paired(rng, ids[half:], key, split) for key in keys}
    context = np.array([ids[half:][i] for i in rng.integers(0, len(ids) - half, length - 3)], np.int64)
    slots = np.sort(rng.permutation((length - 3) // 2)[:count]) * 2
    if depth is not None:
        slots[0] = min(int(depth * (length - 5)) // 2 * 2, (length - 5) // 2 * 2)
        slots[1:] = [s for s in (rng.permutation((length - 3) // 2) * 2).tolist() if s != slots[0]][: count - 1]
    context[slots], context[slots + 1] = keys, [held[key] for key in keys]
    queries = [Query([key], [held[key]], (str(held[key]),)) for key in keys[:4]]
    return Recall(task, context, queries, tuple(slots.tolist()))


def _paired(rng: Rng, values: list[int], key: int, split: str) -> int:
    while True:
        value = pick(rng, values)
        if split_of(f"pair {key} {value}") == split:
            return value


Maker = Callable[[str, Tokenizer, int, Rng, str, float | None], Recall]
TASKS: dict[str, Maker] = {
    **dict.fromkeys(NEEDLES, _needles),
    "vt": _variables,
    "cwe": _words,
    "fwe": _words,
    "mqar": _pairs,
    "drill": _drill,
    "rehearsal": _drill,
    "copy": _drill,
}
RULER = tuple(task for task, make in TASKS.items() if make not in (_pairs, _drill))
