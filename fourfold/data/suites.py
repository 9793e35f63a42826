"""Held-out tests: what no model of ours was trained on, as plain items with their answers.

Each suite has its train side too, for baselines (:mod:`fourfold.data.baselines`): the items that are nearest to how
the skill is trained, without variation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from fourfold.data import augment, skills, synthetic
from fourfold.data.corpus import Corpus
from fourfold.data.items import Item, ask
from fourfold.data.labels import CLOTHES, DIGITS, WORDS
from fourfold.text.chat import Media

Rng = np.random.Generator
Rows = np.ndarray


def _some(rng: Rng, rows: Rows, n: int) -> Rows:
    """At most ``n`` of the rows, none twice."""
    return rng.permutation(rows)[:n]


def _fashion(corpus: Corpus, rows: Rows) -> list[Item]:
    shard = corpus["fashion"]
    pictures = (np.repeat(np.asarray(shard.arrays["images"][row])[..., None], 3, -1) for row in rows)
    labels = shard.columns["label"][rows].tolist()
    return [
        Item("fashion", ask(skills.WHAT_CLOTHES[0], Media("image", p)), a, CLOTHES)
        for p, a in zip(pictures, labels, strict=True)
    ]


def _emoji(corpus: Corpus, name: str, rows: Rows) -> list[Item]:
    shard, names = corpus[name], np.unique(corpus["emoji"].columns["label"][corpus["emoji"].rows(split="train")])
    items = []
    for row in rows:
        rgba = np.asarray(shard.arrays["images"][row])
        message = ask(skills.WHAT[0], Media("image", augment.paste(rgba, rgba.shape[0])))
        items.append(Item("emoji", message, str(shard.columns["label"][row]), tuple(names.tolist())))
    return items


def _speech(corpus: Corpus, name: str, rows: Rows, words: tuple[str, ...]) -> list[Item]:
    shard = corpus[name]
    question = (skills.WHAT_DIGIT if words is DIGITS else skills.WHAT_WORD)[0]
    waves = (shard.piece("wave", int(row)).astype(np.float32) / 32768 for row in rows)
    labels = shard.columns["label"][rows].tolist()
    return [Item("speech", ask(question, Media("audio", w)), a, words) for w, a in zip(waves, labels, strict=True)]


def _made(make: Callable[[Corpus, Rng, str], skills.Made], corpus: Corpus, rng: Rng, n: int, split: str) -> list[Item]:
    made = (make(corpus, rng, split) for _ in range(n))
    return [item for item in made if isinstance(item, Item)]


def _emoji_group(corpus: Corpus, rng: Rng, split: str) -> Item:
    """Without choices on the train side, so that a baseline learns all the groups at once."""
    item = skills.emoji_group(corpus, rng, split)
    assert isinstance(item, Item)
    return item if split == "test" else replace(item, choices=())


def _motion(corpus: Corpus, rng: Rng, split: str) -> Item:
    """Motion without sound: the direction is asked."""
    while True:
        item = skills.motion(corpus, rng, split)
        if isinstance(item, Item) and item.choices == tuple(synthetic.DIRECTIONS):
            return item


@dataclass(frozen=True)
class Suite:
    """test(corpus, rng, n) and train(corpus, rng, n) -> items. unseen: what about the test was never trained.
    train is None where a baseline has nothing to learn from."""

    unseen: str
    test: Callable[[Corpus, Rng, int], list[Item]]
    train: Callable[[Corpus, Rng, int], list[Item]] | None = None


def _generated(unseen: str, make: Callable[[Corpus, Rng, str], skills.Made], test_split: str = "test") -> Suite:
    return Suite(
        unseen,
        lambda corpus, rng, n: _made(make, corpus, rng, n, test_split),
        lambda corpus, rng, n: _made(make, corpus, rng, n, "train"),
    )


def _spoken(unseen: str, name: str, words: tuple[str, ...]) -> Suite:
    return Suite(
        unseen,
        lambda corpus, rng, n: _speech(
            corpus, name, _some(rng, corpus[name].rows(label=words, split="test"), n), words
        ),
        lambda corpus, rng, n: _speech(corpus, "speech", _some(rng, corpus["speech"].rows(label=words), n), words),
    )


SUITES = {
    "fashion": Suite(
        "the pictures (official test set)",
        lambda corpus, rng, n: _fashion(corpus, _some(rng, corpus["fashion"].rows(split="test"), n)),
        lambda corpus, rng, n: _fashion(corpus, _some(rng, corpus["fashion"].rows(split="train"), n)),
    ),
    "emoji_unseen_style": Suite(
        "the drawing style (Twemoji) of known concepts",
        lambda corpus, rng, n: _emoji(corpus, "twemoji", _some(rng, corpus["twemoji"].rows(split="train"), n)),
        lambda corpus, rng, n: _emoji(corpus, "emoji", _some(rng, corpus["emoji"].rows(split="train"), n)),
    ),
    "emoji_group_unseen_concept": _generated("the concepts", _emoji_group),
    "shapes": _generated("the pictures", skills.shapes, "train"),
    "shapes_unseen_pair": _generated("the pair of colour and shape asked about", skills.shapes),
    "motion_unseen_sprites": _generated("the sprites, backgrounds and paths", _motion),
    "tones": _generated("the waves", skills.tones),
    "sounds": Suite(
        "the recordings",
        lambda corpus, rng, n: _sounds(corpus, _some(rng, corpus["sounds"].rows(split="test"), n)),
        lambda corpus, rng, n: _sounds(corpus, _some(rng, corpus["sounds"].rows(split="train"), n)),
    ),
    "spoken_digits_unseen_voice": _spoken("the voices (flite rms, Piper joe)", "unseen_voice", DIGITS),
    "spoken_digits_human": _spoken("the speaker, a human on the telephone", "human_voice", DIGITS),
    "words_unseen_voice": _spoken("the voices (flite rms, Piper joe)", "unseen_voice", WORDS),
    "arithmetic": _generated("the pairs of numbers", skills.arithmetic),
    "arithmetic_thinking": _generated("the pairs of numbers", skills.arithmetic_thinking),
    "recall": _generated("the passages", skills.recall),
    "text_tasks": _generated("the prompts", skills.text_tasks),
}


def _sounds(corpus: Corpus, rows: Rows) -> list[Item]:
    shard = corpus["sounds"]
    names = tuple(np.unique(shard.columns["label"]).tolist())
    waves = (shard.piece("wave", int(row)).astype(np.float32) / 32768 for row in rows)
    labels = shard.columns["label"][rows].tolist()
    return [
        Item("sounds", ask("What sound is this?", Media("audio", w)), a, names)
        for w, a in zip(waves, labels, strict=True)
    ]


def suite(name: str, corpus: Corpus, n: int = 200, seed: int = 0) -> list[Item]:
    """At most ``n`` items (fewer where there are fewer) of one suite. Raises ValueError on an unknown name."""
    if name not in SUITES:
        raise ValueError(f"suite: {name!r} is unknown; choose one of {', '.join(SUITES)}")
    return SUITES[name].test(corpus, np.random.default_rng([seed, 10**9]), n)


TEXTS = {"sqlite": "heldout_text", "wordnet": "text", "python": "text", "kjv": "text"}


def texts(source: str, corpus: Corpus, n: int = 100, characters: int = 1500, seed: int = 0) -> list[str]:
    """Held-out prose for bits per byte: ``sqlite`` is a package never trained, the others held-out items.

    Each text is the middle of one item (its start may be a menu), or neighbouring items where they are lines, at most
    ``characters`` long.
    """
    if source not in TEXTS:
        raise ValueError(f"texts: {source!r} is unknown; choose one of {', '.join(TEXTS)}")
    shard = corpus[TEXTS[source]]
    rows = shard.rows(source=source, split="test")
    step = 12 if source == "wordnet" else 1
    starts = np.random.default_rng(seed).permutation(np.arange(0, len(rows), step))[:n]
    joined = ("\n".join(shard.text(int(row)) for row in rows[at : at + step]) for at in starts)
    return [text[max(len(text) - characters, 0) // 2 :][:characters] for text in joined]
