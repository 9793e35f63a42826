"""What the Engram study reads: prose as bytes, and recall documents with needles hidden in that prose.

Prose is ASCII, so the upper half of the bytes is free for names: 64 keys and 64 values of one byte each. What the test
split holds apart is pairs, as in the library's MQAR: a needle of a test document never stood in a lesson.
"""

from __future__ import annotations

import ast
from itertools import pairwise
from pathlib import Path

import numpy as np

from fourfold.data.corpus import is_test
from fourfold.data.fetch import cache_folder, fetch
from fourfold.data.recall import Query, Recall

PACKAGE = "networkx==3.5"  # whose docstrings are read, always of this version
KEYS, VALUES = np.arange(128, 192), np.arange(192, 256)
MOST = {"mq": (6, 1), "mv": (2, 3), "vt": (2, 3)}  # keys or chains that are asked, needles of each
TASKS = tuple(MOST)
MARKS = {"mq": "?", "mv": "?", "vt": "!"}  # of a question
Prose = dict[str, np.ndarray]


def prose(folder: Path | None = None) -> Prose:
    """Split -> uint8 [n]: the docstrings of ``PACKAGE``, or of a folder of Python; whole files are held out."""
    root = folder or fetch("pip", PACKAGE, cache_folder() / "cache")
    parts: dict[str, list[str]] = {"train": [], "test": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "tests" not in name:
            parts["test" if is_test(name) else "train"] += docstrings(path.read_text(encoding="utf-8"))
    return {
        split: np.frombuffer("\n\n".join(found).encode("ascii", "ignore"), np.uint8) for split, found in parts.items()
    }


def docstrings(source: str) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
    return [text for text in found if text]


def held_apart() -> np.ndarray:
    """bool [256, 256]: the pairs of the test split, for every key a quarter of all keys and a quarter of all values."""
    apart, rng = np.zeros((256, 256), bool), np.random.default_rng(0)
    for key in KEYS:
        for names in (KEYS, VALUES):
            apart[key, rng.permutation(names)[: len(names) // 4]] = True
    return apart


APART = held_apart()


def document(
    task: str, length: int, rng: np.random.Generator, split: str, text: np.ndarray, fewer: bool = False
) -> Recall:
    """A document of ``length`` bytes, questions and answers included, whose needles ``[xy]`` lie at random places.

    mq: 6 keys with a value each. mv: 2 keys with 3 values each, all to be said in order. vt: 2 chains of 3 needles,
    ``[ab] [bc] [cd]``, told in order; all that a leads to are to be said. Every key and every chain is asked.
    split: that of the pairs; fewer: any number of needles up to these that fits.
    """
    keys, values = rng.permutation(KEYS).tolist(), rng.permutation(VALUES).tolist()
    fits = APART == (split == "test")
    count, each = MOST[task]
    if fewer:
        ways = [(c, e) for c in range(1, count + 1) for e in range(1, each + 1) if c * (2 + 5 * e) <= length]
        count, each = ways[int(rng.integers(len(ways)))]
    if task == "vt":
        held = [[*pairwise(_chain(keys, each + 1, fits))] for _ in range(count)]
    else:
        held = [[(key, value) for value in _taken(values, each, fits[key])] for key in keys[:count]]
    queries = [_query(MARKS[task], pairs[0][0], [second for _, second in pairs]) for pairs in held]
    turns = rng.permutation([number for number, pairs in enumerate(held) for _ in pairs]).tolist()
    rest = [iter(pairs) for pairs in held]
    needles = [next(rest[turn]) for turn in turns]  # all of them, those that belong together in their order
    room = length - 4 * len(needles) - sum(len(q.tokens) + len(q.answer) for q in queries)
    start = rng.integers(0, len(text) - room)
    hay = text[start : start + room]
    cuts = [0, *np.sort(rng.integers(0, room + 1, len(needles))).tolist()]
    parts: list[int] = []
    for (first, second), begin, end in zip(needles, cuts, cuts[1:], strict=False):
        parts += [*hay[begin:end].tolist(), ord("["), first, second, ord("]")]
    return Recall(task, np.array([*parts, *hay[cuts[-1] :].tolist()]), queries)


def copy(length: int, rng: np.random.Generator) -> Recall:
    """Names in no order and the same names again, all but the first to be said: the densest lesson in looking back.

    None is said behind a name with which it is a needle of the test split.
    """
    chain = _chain(rng.permutation([*KEYS, *VALUES]).tolist(), length // 2, ~APART)
    return Recall("copy", np.array(chain), [Query([chain[0]], chain[1:], ())])


def _query(mark: str, name: int, answer: list[int]) -> Query:
    return Query([ord(mark), name], answer, tuple(map(str, answer)))


def _taken(names: list[int], count: int, fit: np.ndarray) -> list[int]:
    """The first ``count`` names that fit, which leave the list. fit: bool [256]."""
    found = [name for name in names if fit[name]][:count]
    for name in found:
        names.remove(name)
    return found


def _chain(names: list[int], count: int, fits: np.ndarray) -> list[int]:
    """Names of which each fits behind the one before, which leave the list. fits: bool [256, 256]."""
    chain = [names.pop()]
    while len(chain) < count:
        chain += _taken(names, 1, fits[chain[-1]])
    return chain
