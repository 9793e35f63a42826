"""What a score must beat: guesses, nearest neighbours and linear models from the same training data."""

from __future__ import annotations

import gzip
import lzma
import re
from collections import Counter
from collections.abc import Callable

import numpy as np
from PIL import Image

from fourfold.config_media import AudioConfig
from fourfold.data.corpus import Corpus
from fourfold.data.items import Item
from fourfold.data.suites import SUITES, suite, texts
from fourfold.media.audio import log_mel
from fourfold.text.chat import Media

TRAIN_ITEMS = 10000
Method = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def baseline(
    name: str, corpus: Corpus, n: int = 200, seed: int = 0, train_items: int = TRAIN_ITEMS
) -> dict[str, float]:
    """Accuracies on ``suite(name, corpus, n, seed)``.

    majority: the commonest training answer; blind: the commonest to this very question, media unseen;
    nearest and linear: from pixels or mel frames; first_frame: linear on a video's first frame alone;
    last_fact: of a passage to recall from, the last thing said.
    """
    test = suite(name, corpus, n, seed)
    make = SUITES[name].train
    train = (
        make(corpus, np.random.default_rng([seed, 1]), train_items if _media(test[0]) is not None else 3000)
        if make
        else []
    )
    scores = {"majority": _score(test, [_commonest(train)] * len(test)), "blind": _score(test, _blind(train, test))}
    if _media(test[0]) is not None:
        scores |= {"nearest": 0.0, "linear": 0.0}
        x, y = features(train), features(test)
        scores["nearest"] = _score(test, _by_kind(train, test, x, y, nearest))
        scores["linear"] = _score(test, _by_kind(train, test, x, y, linear))
        if test[0].task == "motion":
            size = x.shape[1] // 8
            scores["first_frame"] = _score(test, _by_kind(train, test, x[:, :size], y[:, :size], linear))
    if test[0].task == "recall":
        scores["last_fact"] = _score(
            test, [re.findall(r"(?:is|likes) (\w+)\.", str(item.messages[-1].content))[-1] for item in test]
        )
    return scores


def _score(items: list[Item], guesses: list[str]) -> float:
    return sum(item.answer == guess for item, guess in zip(items, guesses, strict=True)) / len(items)


def _commonest(items: list[Item]) -> str:
    return Counter(item.answer for item in items).most_common(1)[0][0]


def _question(item: Item) -> str:
    """The words of the question; of a text task, without what it is about."""
    content = item.messages[-1].content
    return (
        content.split(":")[0]
        if isinstance(content, str)
        else " ".join(part for part in content if isinstance(part, str))
    )


def _blind(train: list[Item], test: list[Item]) -> list[str]:
    """The commonest answer to the same question, else to one with the same choices, else of all."""
    by_question: dict[object, list[Item]] = {}
    for item in train:
        by_question.setdefault(_question(item), []).append(item)
        by_question.setdefault(item.choices, []).append(item)
    known = [by_question.get(_question(item)) or by_question.get(item.choices) or train for item in test]
    return [
        _commonest([i for i in items if not item.choices or i.answer in item.choices] or items)
        for item, items in zip(test, known, strict=True)
    ]


def _media(item: Item) -> Media | None:
    content = item.messages[-1].content
    return next((part for part in content if isinstance(part, Media)), None)


def features(items: list[Item], size: int = 16, frames: int = 32) -> np.ndarray:
    """float32 [N, F], zero mean: pictures and frames at 16x16, log-mel squeezed to 32 frames.

    A picture's colours are kept; every item must be of the same modality.
    """
    config = AudioConfig()
    rows = []
    for item in items:
        media = _media(item)
        assert media is not None
        if media.modality == "audio":
            mel = log_mel(media.value, config)
            at = np.linspace(0, len(mel) - 1, frames)
            low = np.floor(at).astype(int)
            high, part = np.minimum(low + 1, len(mel) - 1), (at - low)[:, None]
            rows.append((mel[low] * (1 - part) + mel[high] * part).ravel())
        else:
            pictures = [media.value] if media.modality == "image" else media.value[0]
            small = [np.asarray(Image.fromarray(p).resize((size, size), Image.Resampling.BOX)) for p in pictures]
            rows.append(np.stack(small).ravel() / 127.5 - 1)
    return np.array(rows, np.float32)


def _by_kind(train: list[Item], test: list[Item], x: np.ndarray, y: np.ndarray, method: Method) -> list[str]:
    """Applies ``method`` to the items of each set of choices apart: they answer different questions."""
    guesses = [""] * len(test)
    shared = {item.choices for item in train}
    for choices in {item.choices if item.choices in shared else () for item in test}:
        of_train = [i for i, item in enumerate(train) if item.choices == choices or not choices]
        of_test = [
            i for i, item in enumerate(test) if item.choices == choices or (not choices and item.choices not in shared)
        ]
        names = sorted({train[i].answer for i in of_train})
        target = np.array([names.index(train[i].answer) for i in of_train])
        scores = method(x[of_train], target, y[of_test])
        for row, i in zip(scores, of_test, strict=True):
            allowed = [k for k, name in enumerate(names) if not test[i].choices or name in test[i].choices]
            guesses[i] = names[allowed[int(np.argmax(row[allowed]))]] if allowed else ""
    return guesses


def nearest(x: np.ndarray, target: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[N, F], classes int [N], [M, F] -> [M, C]: minus the squared distance to the nearest item of each class."""
    scores = np.full((len(y), target.max() + 1), -np.inf, np.float32)
    for c in range(scores.shape[1]):
        own = x[target == c]
        if len(own):
            distance = (own**2).sum(1) - 2 * (y @ own.T)
            scores[:, c] = -distance.min(1)
    return scores


def linear(x: np.ndarray, target: np.ndarray, y: np.ndarray, penalty: float = 0.03) -> np.ndarray:
    """Ridge regression to one-hot classes on standardised features; solved on whichever side is smaller. -> [M, C]."""
    mean, deviation = x.mean(0), x.std(0) + 1e-3
    x, y = (x - mean) / deviation, (y - mean) / deviation
    hot = np.eye(target.max() + 1, dtype=np.float32)[target]
    centre = hot.mean(0)
    if x.shape[0] > x.shape[1]:
        gram = x.T @ x
        gram[np.diag_indices_from(gram)] += penalty * len(x)
        return y @ np.linalg.solve(gram, x.T @ (hot - centre)) + centre
    kernel = x @ x.T
    kernel[np.diag_indices_from(kernel)] += penalty * len(x)
    return (y @ x.T) @ np.linalg.solve(kernel, hot - centre) + centre


def text_baseline(source: str, corpus: Corpus, n: int = 100, characters: int = 1500, seed: int = 0) -> dict[str, float]:
    """Bits per byte on ``texts(source, ...)``: unigram (bytes counted in the training text), gzip, xz."""
    data = "\n".join(texts(source, corpus, n, characters, seed)).encode()
    shard = corpus["text"]
    sample = shard.rows(split="train")[:: max(len(shard) // 20000, 1)]
    counts = np.bincount(np.concatenate([shard.piece("text", int(row)) for row in sample]), minlength=256) + 1.0
    bits = -np.log2(counts / counts.sum())
    return {
        "unigram": float(bits[np.frombuffer(data, np.uint8)].mean()),
        "gzip": 8 * len(gzip.compress(data, 9)) / len(data),
        "xz": 8 * len(lzma.compress(data, preset=9)) / len(data),
    }
