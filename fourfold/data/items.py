"""One question with its answer, whether to train on or to be tested with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from fourfold.text.chat import Media, Message

T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """messages: the conversation up to the answer; choices: the closed set the answer is from, if there is one;
    reasoning: what is thought before the answer, if this is an item for the thinking mode."""

    task: str
    messages: list[Message]
    answer: str
    choices: tuple[str, ...] = ()
    reasoning: str | None = None

    def conversation(self) -> list[Message]:
        """The messages with the answer as the last one."""
        return [*self.messages, Message("assistant", self.answer, reasoning=self.reasoning)]


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options (a sequence or a one-dimensional array), each as likely."""
    return options[int(rng.integers(len(options)))]


def ask(question: str, *media: Media, media_first: bool = True) -> list[Message]:
    """One user message of the media and the question, in this order or the other."""
    return (
        [Message("user", [*media, question] if media_first else [question, *media])]
        if media
        else [Message("user", question)]
    )
