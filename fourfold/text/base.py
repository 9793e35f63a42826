"""What a model's chat format answers for: its prompts, its completions, and the tokens that are allowed in them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

from fourfold.text.chat import ChatError, Message, Piece, Writer
from fourfold.text.stream import Channel, Parser
from fourfold.text.tokenizer import Tokenizer


class ChatFormat(ABC):
    """How one model writes conversations.

    ``bos``: what begins a text, or None; ``stops``: ids that end an answer; ``end_of_thinking``: the id that closes a
    reasoning, None in a model without.
    """

    end_of_thinking: int | None = None

    def __init__(self, tokenizer: Tokenizer, bos: int | None, stops: Collection[int]) -> None:
        self.tokenizer = tokenizer
        self.bos = bos
        self.stops = frozenset(stops)

    @abstractmethod
    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool = False,
        effort: str | int | None = None,
        add_generation_prompt: bool = True,
        response_format: dict[str, Any] | None = None,
    ) -> list[Piece]:
        """The conversation as pieces, ready for ``build_document``. Raises :class:`ChatError`.

        ``effort`` is how long to think, ``response_format`` the JSON schema of the answer; a format that has no words
        for an effort leaves it out, one that has none for a schema refuses it.
        """

    @abstractmethod
    def parser(self, thinking: bool = False, tools: bool = False) -> Parser:
        """What reads the answer to a prompt that was encoded with ``thinking`` and, if ``tools``, with tools."""

    @abstractmethod
    def allowed(self, channel: Channel, tools: bool) -> frozenset[int]:
        """The special tokens that the model may say in ``channel``, the ends of the answer included."""

    def budget(self, effort: str | int | None) -> int | None:
        """Tokens after which a reasoning is closed for the model; None where ``effort`` is said in the prompt."""
        return None

    def continue_text(self, text: str) -> list[Piece]:
        """The prompt of a plain text that the model is to go on with."""
        out = Writer(self.tokenizer)
        if self.bos is not None:
            out.token(self.bos)
        out.text(text)
        return out.done()

    def _ids(self, *names: str) -> frozenset[int]:
        return frozenset(self.tokenizer.marks[name] for name in names if name in self.tokenizer.marks)


def refuse_schema(response_format: dict[str, Any] | None) -> None:
    """For formats that have no words for a schema."""
    if response_format is not None:
        raise ChatError("response_format: this model's chat format has no words for it")
