"""Recall tasks as a training stream: document number n is a pure function of (seed, n)."""

from __future__ import annotations

import numpy as np

from fourfold.data.recall import TASKS, RecallError, document, lesson
from fourfold.model.sequence import Document
from fourfold.text.tokenizer import Tokenizer

SHORTEST = 40  # tokens; lengths are drawn between it and a row, every doubling as often


class Lessons:
    """weights: recall task -> share of documents, any positive scale; their needles are of the training split.

    Raises ValueError for an unknown task or a weight that is none, RecallError where a row holds no document.
    """

    def __init__(self, weights: dict[str, float], tokenizer: Tokenizer, max_tokens: int, seed: int = 0) -> None:
        for name, weight in weights.items():
            if name not in TASKS:
                raise ValueError(f"recall: {name!r} is no task; choose from {', '.join(TASKS)}")
            if not weight >= 0:
                raise ValueError(f"recall.{name}: weight must be >= 0, not {weight}")
        total = sum(weights.values())
        if not total > 0:
            raise ValueError("recall: needs at least one positive weight")
        self.names, self.tokenizer, self.most, self.seed = tuple(weights), tokenizer, max_tokens, seed
        self.shares = [weights[name] / total for name in self.names]
        for name in self.names:
            self._make(name, max_tokens, 0)

    def skill(self, number: int) -> str:
        """Which task document ``number`` is of."""
        return str(self._generator(number).choice(self.names, p=self.shares))

    def document(self, number: int) -> Document:
        """Document ``number``, the same whenever it is asked for."""
        rng = self._generator(number)
        task = str(rng.choice(self.names, p=self.shares))
        length = int(np.exp(rng.uniform(np.log(min(SHORTEST, self.most)), np.log(self.most))))
        number = int(rng.integers(2**31))
        try:
            return self._make(task, length, number)
        except RecallError:  # too short for its needles
            return self._make(task, self.most, number)

    def _make(self, task: str, length: int, number: int) -> Document:
        """All questions stand behind the context, so it is as much shorter as a row asks for."""
        while True:
            whole = lesson(document(task, self.tokenizer, length, number, "train"), [self.tokenizer.special("<|bos|>")])
            if len(whole) <= self.most:
                return whole
            length -= len(whole) - self.most

    def _generator(self, number: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, number]))
