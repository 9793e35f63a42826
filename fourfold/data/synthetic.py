"""Generated tasks: each function takes a numpy Generator and returns data with its true answer.

Text tasks are split by a hash of their content (:func:`fourfold.data.corpus.is_test`): a test item is never trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw

from fourfold.data.corpus import is_test, split_of
from fourfold.data.items import pick

Rng = np.random.Generator
T = TypeVar("T")

LETTERS = "abcdefghijklmnopqrstuvwxyz"
NOUNS = (
    "river stone garden window bridge table paper silver copper winter summer forest island harbor market castle "
    "engine bottle basket candle mirror pocket button ladder hammer pencil ticket letter number circle doctor farmer "
    "baker teacher pilot sailor painter singer dancer hunter north south east west morning evening road field lake hill"
).split()
NAMES = (
    "Anna Ben Clara David Emma Frank Grace Henry Ivy Jack Kate Leo Mia Noah Olga Paul Rose Sam Tina Victor Wendy Zoe "
    "Adam Bella Carl Diana Eric Fiona George Helen"
).split()
LIKES = (
    "tea milk bread apples music books horses chess tennis soup cheese flowers trains maps cats dogs rain snow".split()
)
FILLERS = (
    "The sky is grey today.",
    "Nothing else happened.",
    "The bus came late again.",
    "It was a quiet day.",
    "Someone closed the door.",
    "The water is cold.",
    "Dinner is at seven.",
    "The shop opens soon.",
)


def draw(split: str, make: Callable[[], tuple[str, T]]) -> T:
    """Calls ``make`` until the key of what it made lies in ``split``; returns what was made."""
    while True:
        key, made = make()
        if split_of(key) == split:
            return made


# --- text -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    a: int
    operator: str  # + - or x
    b: int

    @property
    def answer(self) -> int:
        return {"+": self.a + self.b, "-": self.a - self.b, "x": self.a * self.b}[self.operator]

    @property
    def held_out(self) -> bool:
        """Never trained. Two one-digit numbers never are: those are tables, to be learnt by heart."""
        low, high = sorted((self.a, self.b))
        pair = f"{self.a}-{self.b}" if self.operator == "-" else f"{low}{self.operator}{high}"
        return high > 9 and is_test(pair)


def arithmetic(rng: Rng, split: str, digits: int) -> Problem:
    """a + b, or a - b with a >= b, of numbers of up to ``digits`` digits; with one digit, products too.

    Raises ValueError for a test of one digit: those are all trained.
    """
    if split == "test" and digits < 2:
        raise ValueError("arithmetic.digits: must be at least 2 in the test split")
    while True:
        operator = pick(rng, "+-x" if digits == 1 else "+-")
        a, b = (int(rng.integers(10 ** (int(rng.integers(1, digits + 1))))) for _ in range(2))
        problem = Problem(max(a, b), "-", min(a, b)) if operator == "-" else Problem(a, operator, b)
        if problem.held_out == (split == "test"):
            return problem


def work_out(problem: Problem) -> str:
    """A sum or difference written out column by column from the right, as at school, then the result.

    The third number of a column is what was carried or borrowed; a column that borrows begins with 1.
    """
    width = max(len(str(problem.a)), len(str(problem.b)))
    columns = zip(reversed(f"{problem.a:0{width}d}"), reversed(f"{problem.b:0{width}d}"), strict=True)
    lines, carry = [], 0
    for top, bottom in columns:
        if problem.operator == "+":
            total = int(top) + int(bottom) + carry
            lines.append(f"{top}+{bottom}+{carry}={total}")
            carry = total // 10
        else:
            borrow = int(int(top) < int(bottom) + carry)
            total = 10 * borrow + int(top) - int(bottom) - carry
            lines.append(f"{'1' * borrow}{top}-{bottom}-{carry}={total}")
            carry = borrow
    return f"{'; '.join(lines)}; {problem.answer}"


def recall(rng: Rng, split: str, facts: int) -> tuple[str, str, str]:
    """(passage of ``facts`` facts with fillers between some, question about one of them, its answer)."""

    def make() -> tuple[str, tuple[str, str, str]]:
        if rng.random() < 0.7:
            keys = [NOUNS[i] for i in rng.permutation(len(NOUNS))[:facts]]
            values = [str(v) for v in rng.integers(1000, 10000, facts)]
            lines = [f"The code of {k} is {v}." for k, v in zip(keys, values, strict=True)]
            question = "What is the code of {}?"
        else:
            keys = [NAMES[i] for i in rng.permutation(len(NAMES))[:facts]]
            values = [pick(rng, LIKES) for _ in keys]
            lines = [f"{k} likes {v}." for k, v in zip(keys, values, strict=True)]
            question = "What does {} like?"
        asked = int(rng.integers(len(keys)))
        for _ in range(int(rng.integers(0, 1 + facts // 2))):
            lines.insert(int(rng.integers(len(lines) + 1)), pick(rng, FILLERS))
        return " ".join(lines), (" ".join(lines), question.format(keys[asked]), values[asked])

    return draw(split, make)


def text_task(rng: Rng, split: str) -> tuple[str, str, str]:
    """(name, prompt, answer) of one small operation on letters, words or numbers."""
    name = pick(rng, tuple(TEXT_TASKS))

    def make() -> tuple[str, tuple[str, str]]:
        prompt, answer = TEXT_TASKS[name](rng)
        return prompt, (prompt, answer)

    return name, *draw(split, make)


def _letters(rng: Rng, low: int, high: int) -> list[str]:
    return [pick(rng, LETTERS) for _ in range(int(rng.integers(low, high)))]


def _reverse(rng: Rng) -> tuple[str, str]:
    letters = _letters(rng, 2, 7)
    return f"Reverse: {' '.join(letters)}", " ".join(reversed(letters))


def _capitals(rng: Rng) -> tuple[str, str]:
    letters = _letters(rng, 2, 7)
    return f"Write in capitals: {' '.join(letters)}", " ".join(letters).upper()


def _sort(rng: Rng) -> tuple[str, str]:
    digits = [str(d) for d in rng.integers(0, 10, int(rng.integers(2, 7)))]
    return f"Sort: {' '.join(digits)}", " ".join(sorted(digits))


def _count(rng: Rng) -> tuple[str, str]:
    letter, other = (LETTERS[i] for i in rng.permutation(26)[:2])
    letters = [letter if rng.random() < 0.4 else other for _ in range(int(rng.integers(2, 9)))]
    return f"How many times is {letter} in {' '.join(letters)}?", str(letters.count(letter))


def _compare(rng: Rng) -> tuple[str, str]:
    a, b = (int(v) for v in rng.choice(10 ** int(rng.integers(2, 4)), 2, replace=False))
    bigger = rng.random() < 0.5
    return f"Which is {'bigger' if bigger else 'smaller'}, {a} or {b}?", str(max(a, b) if bigger else min(a, b))


def _repeat(rng: Rng) -> tuple[str, str]:
    words = [pick(rng, NOUNS) for _ in range(int(rng.integers(2, 6)))]
    return f"Repeat: {' '.join(words)}", " ".join(words)


def _last_word(rng: Rng) -> tuple[str, str]:
    words = [pick(rng, NOUNS) for _ in range(int(rng.integers(2, 6)))]
    first = rng.random() < 0.5
    return f"What is the {'first' if first else 'last'} word of: {' '.join(words)}?", words[0 if first else -1]


def _next(rng: Rng) -> tuple[str, str]:
    number = int(rng.integers(1, 1000))
    after = rng.random() < 0.5
    return f"What number comes {'after' if after else 'before'} {number}?", str(number + (1 if after else -1))


TEXT_TASKS: dict[str, Callable[[Rng], tuple[str, str]]] = {
    "reverse": _reverse,
    "capitals": _capitals,
    "sort": _sort,
    "count": _count,
    "compare": _compare,
    "repeat": _repeat,
    "first_last": _last_word,
    "next": _next,
}


# --- pictures ---------------------------------------------------------------------------------------------------------

COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 220, 50),
    "green": (40, 160, 70),
    "blue": (50, 90, 220),
    "purple": (140, 60, 180),
    "pink": (245, 150, 190),
    "brown": (120, 75, 40),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")


def unseen_pair(colour: str, shape: str) -> bool:
    """A colour and a shape that are trained apart but never together."""
    return is_test(f"{colour} {shape}")


def shapes(rng: Rng, split: str, count: int, size: int = 48) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """uint8 [size, size, 3] with ``count`` (1-4) shapes, no colour and no kind twice; and their (colour, shape).

    In the test split one of them is a pair that is never trained; in the train split none is.
    """
    while True:
        colours = [list(COLOURS)[i] for i in rng.permutation(len(COLOURS))[:count]]
        kinds = [SHAPES[i] for i in rng.permutation(len(SHAPES))[:count]]
        pairs = list(zip(colours, kinds, strict=True))
        if any(unseen_pair(*pair) for pair in pairs) == (split == "test"):
            break
    grey = int(pick(rng, (0, 25, 60, 200, 230, 255)))
    tint = np.clip(grey + rng.integers(-12, 13, 3), 0, 255)
    scale = 2  # drawn larger, then averaged: smooth edges
    canvas = Image.new("RGB", (size * scale, size * scale), tuple(int(v) for v in tint))
    pen = ImageDraw.Draw(canvas)
    cells = [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)]
    places = [(0.5, 0.5)] if count == 1 else [cells[i] for i in rng.permutation(4)[:count]]
    for (colour, kind), place in zip(pairs, places, strict=True):
        radius = size * scale * (rng.uniform(0.22, 0.42) if count == 1 else rng.uniform(0.15, 0.21))
        x, y = (size * scale * (p + rng.uniform(-0.03, 0.03)) for p in place)
        shade = tuple(int(v) for v in np.clip(np.array(COLOURS[colour]) + rng.integers(-18, 19, 3), 0, 255))
        _draw_shape(pen, kind, x, y, radius, shade)
    return np.asarray(canvas.reduce(scale)), pairs


def _draw_shape(pen: ImageDraw.ImageDraw, kind: str, x: float, y: float, r: float, fill: tuple[int, ...]) -> None:
    if kind == "circle":
        pen.ellipse([x - r, y - r, x + r, y + r], fill=fill)
    elif kind == "square":
        pen.rectangle([x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r], fill=fill)
    elif kind == "cross":
        pen.rectangle([x - r, y - r / 3, x + r, y + r / 3], fill=fill)
        pen.rectangle([x - r / 3, y - r, x + r / 3, y + r], fill=fill)
    else:
        radii = np.array([r] * 3 if kind == "triangle" else [r, 0.42 * r] * 5)
        angles = -np.pi / 2 + np.arange(len(radii)) * 2 * np.pi / len(radii)
        pen.polygon([(x + q * np.cos(t), y + q * np.sin(t)) for q, t in zip(radii, angles, strict=True)], fill=fill)


def background(rng: Rng, height: int, width: int) -> np.ndarray:
    """float32 [height, width, 3] in 0..255: one colour, a gradient, stripes or smooth blobs."""
    first, second = rng.uniform(0, 255, (2, 3)).astype(np.float32)
    kind = int(rng.integers(4))
    if kind == 0:
        return np.broadcast_to(first, (height, width, 3)).copy()
    if kind == 3:
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    along = np.cos(angle) * rows / height + np.sin(angle) * columns / width
    mix = (
        (along - along.min()) / max(float(np.ptp(along)), 1e-6)
        if kind == 1
        else (np.sin(along * rng.uniform(8, 30)) > 0).astype(np.float32)
    )
    return first * (1 - mix[..., None]) + second * mix[..., None]


# --- video ------------------------------------------------------------------------------------------------------------

DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}


def motion(rng: Rng, sprite: np.ndarray, direction: str, frames: int = 8, size: int = 32) -> np.ndarray:
    """uint8 [frames, size, size, 3]: a sprite (RGBA uint8 [S, S, 4]) moves over a still background.

    Where it starts does not depend on where it goes, so the first frame alone says nothing; it may leave the picture.
    """
    side = int(rng.integers(10, 19))
    small = np.asarray(Image.fromarray(sprite).resize((side, side), Image.Resampling.BILINEAR), np.float32)
    behind = background(rng, size, size)
    along, across = rng.uniform(8, 20), rng.uniform(-2, 2)  # pixels from first to last frame
    start = rng.uniform(0.2, 0.8, 2) * size - side / 2
    row, column = DIRECTIONS[direction]
    path = start + np.linspace(0, 1, frames)[:, None] * (
        np.array([row, column]) * along + np.array([column, row]) * across
    )
    canvas = np.tile(behind, (frames, 1, 1, 1))
    for picture, (top, left) in zip(canvas, np.round(path).astype(int), strict=True):
        t0, l0, t1, l1 = max(top, 0), max(left, 0), min(top + side, size), min(left + side, size)
        if t0 < t1 and l0 < l1:
            piece = small[t0 - top : t1 - top, l0 - left : l1 - left]
            alpha = piece[..., 3:] / 255
            picture[t0:t1, l0:l1] = picture[t0:t1, l0:l1] * (1 - alpha) + piece[..., :3] * alpha
    return np.round(canvas).astype(np.uint8)


# --- sound ------------------------------------------------------------------------------------------------------------

TONES = ("rising", "falling", "high", "low")


def tone(rng: Rng, kind: str, rate: int = 16000) -> np.ndarray:
    """float32 [S], 0.4-0.9 s: a sweep by more than a fifth, or a steady note, high (1.2-3 kHz) or low (90-350 Hz)."""
    length = int(rate * rng.uniform(0.4, 0.9))
    if kind in ("high", "low"):
        start = end = rng.uniform(*((1200, 3000) if kind == "high" else (90, 350)))
    else:
        start = np.exp(rng.uniform(np.log(150), np.log(1000)))
        end = start * rng.uniform(1.6, 3.5)
        if kind == "falling":
            start, end = end, start
    phase = 2 * np.pi * np.cumsum(np.geomspace(start, end, length)) / rate
    return _voice(rng, phase) * _fade(length, rate)


def beeps(rng: Rng, count: int, rate: int = 16000) -> np.ndarray:
    """float32 [S]: ``count`` equal beeps with silence between."""
    on, off = int(rate * rng.uniform(0.08, 0.14)), int(rate * rng.uniform(0.08, 0.16))
    beep = _voice(rng, 2 * np.pi * rng.uniform(300, 2000) * np.arange(on) / rate) * _fade(on, rate)
    gap = np.zeros(off, np.float32)
    return np.concatenate([gap, *(part for _ in range(count) for part in (beep, gap))])


def _voice(rng: Rng, phase: np.ndarray) -> np.ndarray:
    """A sine, a soft square or a bright sine of this phase."""
    shape = int(rng.integers(3))
    wave = (
        np.sin(phase)
        if shape == 0
        else np.tanh(4 * np.sin(phase))
        if shape == 1
        else np.sin(phase) + 0.4 * np.sin(2 * phase)
    )
    return (0.5 * wave).astype(np.float32)


def _fade(length: int, rate: int) -> np.ndarray:
    edge = np.minimum(np.arange(length), np.arange(length)[::-1]) / (0.01 * rate)
    return np.minimum(edge, 1).astype(np.float32)
