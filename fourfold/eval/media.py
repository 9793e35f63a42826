"""What the model can do with text, images, sound and video it has never met, beside what needs no model.

Every task prints the accuracy of greedy answers (exact match) with a 95 % interval, and next to it: chance; the
simple baselines (nearest neighbour, linear, commonest answer to the question); the model with the medium blanked;
and the swap test, in which each item gets another item's medium: how often the answer changes, and how often it is
then the right one for the new medium.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fourfold.data import corpus as corpora
from fourfold.data.baselines import baseline
from fourfold.data.items import Item
from fourfold.data.suites import SUITES, suite
from fourfold.eval import Subject
from fourfold.text.chat import Media

MAX_ANSWER = 160  # tokens; the longest right answer has fewer
TOGETHER = 128  # items that wait in the engine


def run(model: Subject, settings: dict[str, Any]) -> dict[str, Any]:
    """settings: samples (default 500 a task), seed, task (default: all). Raises ValueError for an unknown task."""
    samples, seed = settings.get("samples", 500), settings.get("seed", 0)
    names = [settings["task"]] if "task" in settings else list(SUITES)
    corpus = corpora.load(None)
    scores: dict[str, dict[str, float]] = {}
    for name in names:
        items = suite(name, corpus, samples, seed)
        answers = answer(model, items)
        right = accuracy(items, answers)
        low, high = wilson(right, len(items))
        scores[name] = {"n": len(items), "accuracy": right, "ci95": (high - low) / 2}
        if items[0].choices:
            scores[name]["chance"] = float(np.mean([1 / len(item.choices) for item in items]))
        scores[name] |= baseline(name, corpus, samples, seed)
        if medium(items[0]) is not None:
            scores[name] |= controls(model, items, answers)
    return {"suite": "media", "model": model.name, "scores": scores, "settings": {"samples": samples, "seed": seed}}


def controls(model: Subject, items: list[Item], answers: list[str]) -> dict[str, float]:
    """The model without its medium, and with that of another item whose answer differs (to the same question kind)."""
    blanked = answer(model, [with_medium(item, blank(medium(item))) for item in items])
    donors = [_donor(items, index) for index in range(len(items))]
    pairs = [(index, donor) for index, donor in enumerate(donors) if donor is not None]
    swapped = answer(model, [with_medium(items[i], medium(items[d])) for i, d in pairs])
    changed = [text != answers[i] for (i, _), text in zip(pairs, swapped, strict=True)]
    followed = [text == items[d].answer for (_, d), text in zip(pairs, swapped, strict=True)]
    return {
        "blanked": accuracy(items, blanked),
        "swap_changed": float(np.mean(changed)),
        "swap_followed": float(np.mean(followed)),
    }


def _donor(items: list[Item], index: int) -> int | None:
    """The next item with the same question's choices and another answer."""
    own = items[index]
    for step in range(1, len(items)):
        other = (index + step) % len(items)
        if items[other].answer != own.answer and set(items[other].choices) == set(own.choices):
            return other
    return None


def answer(model: Subject, items: Sequence[Item]) -> list[str]:
    """Greedy answers, many items at a time."""
    answers = []
    for start in range(0, len(items), TOGETHER):
        some = items[start : start + TOGETHER]
        answers += model.answers([item.messages for item in some], some[0].reasoning is not None, MAX_ANSWER)
    return [text.strip() for text in answers]


def accuracy(items: Sequence[Item], answers: Sequence[str]) -> float:
    return float(np.mean([item.answer == text for item, text in zip(items, answers, strict=True)]))


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927)."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return centre - half, centre + half


def medium(item: Item) -> Media | None:
    """The image, sound or video of the last message."""
    content = item.messages[-1].content
    return next((part for part in content if isinstance(part, Media)), None) if not isinstance(content, str) else None


def with_medium(item: Item, new: Media | None) -> Item:
    """The same question about another medium."""
    last = item.messages[-1]
    content = [new if isinstance(part, Media) else part for part in last.content]
    return replace(item, messages=[*item.messages[:-1], replace(last, content=content)])


def blank(old: Media | None) -> Media | None:
    """A medium of the same size that shows nothing: mid-grey pixels, silence."""
    if old is None:
        return None
    if old.modality == "image":
        return Media("image", np.full_like(old.value, 128))
    if old.modality == "audio":
        return Media("audio", np.zeros_like(old.value))
    frames, seconds, sound = old.value
    return Media("video", (np.full_like(frames, 128), seconds, None if sound is None else np.zeros_like(sound)))
