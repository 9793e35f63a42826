"""Suites: each module has ``run(model, settings) -> {"suite", "model", "scores", "settings"}``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from fourfold.model.transformer import Model
from fourfold.text.base import ChatFormat
from fourfold.text.chat import Message
from fourfold.text.tokenizer import Tokenizer


class Subject(Protocol):
    """What is measured: a model that answers; ``fourfold.load`` gives one."""

    name: str
    path: Path | None  # where it was loaded from
    model: Model
    tokenizer: Tokenizer
    chat: ChatFormat

    def answers(self, conversations: Sequence[Sequence[Message]], thinking: bool, max_tokens: int) -> list[str]: ...
