"""A completion back into reasoning, answer and tool calls, token by token."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from typing import Literal, Protocol

from fourfold.text.chat import ToolCall, load_object, parse_tool_call
from fourfold.text.tokenizer import Tokenizer

Channel = Literal["reasoning", "content", "tool_call"]
Event = tuple[Channel, str]


class Parser(Protocol):
    """Turns sampled ids into events: ``reasoning`` and ``content`` as soon as a character is whole, ``tool_call``
    (the JSON text of name and arguments) when its call is closed. A call that is broken off or is none becomes content.

    ``channel`` is where the next token goes.
    """

    channel: Channel

    def feed(self, token: int) -> list[Event]: ...

    def finish(self) -> list[Event]:
        """What is still held back when no token follows."""
        ...


def parse_completion(ids: Iterable[int], parser: Parser) -> tuple[str | None, str, list[ToolCall]]:
    """(reasoning or None, answer, tool calls) of a whole completion."""
    events = [event for token in ids for event in parser.feed(token)] + parser.finish()
    reasoning = "".join(text for channel, text in events if channel == "reasoning")
    content = "".join(text for channel, text in events if channel == "content")
    calls = [call for channel, text in events if channel == "tool_call" and (call := parse_tool_call(text))]
    return reasoning or None, content, calls


class StreamParser:
    """The parser of the native format, of Qwen2's, and of those without tools: JSON between ``<tool_call>`` marks.

    Other special tokens are left out, even inside a character. Subclasses read calls that are written otherwise.
    """

    def __init__(self, tokenizer: Tokenizer, thinking: bool = False) -> None:
        self.tokenizer = tokenizer
        self.channel: Channel = "reasoning" if thinking else "content"
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._call = ""

    def feed(self, token: int) -> list[Event]:
        name = self.tokenizer.mark(token)
        if name is None:
            return self._text(self._utf8.decode(self.tokenizer.token_bytes(token)))
        return self._flush() + self._mark(name) if self._hears(name) else []

    def finish(self) -> list[Event]:
        return self._flush() + self._leave()

    def _flush(self) -> list[Event]:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return self._text(text)

    def _hears(self, name: str) -> bool:
        """Whether this mark means anything here."""
        return name in ("<think>", "</think>", "<tool_call>") or name == "</tool_call>" and self.channel == "tool_call"

    def _mark(self, name: str) -> list[Event]:
        events = self._leave(closed=name == "</tool_call>")
        self.channel = {"<think>": "reasoning", "<tool_call>": "tool_call"}.get(name, "content")  # type: ignore[assignment]
        return events

    def _text(self, text: str) -> list[Event]:
        if self.channel == "tool_call":
            self._call += text
            return []
        return [(self.channel, text)] if text else []

    def _leave(self, closed: bool = False) -> list[Event]:
        """What is left to say of the channel that ends here."""
        call, self._call = self._call, ""
        if not call:
            return []
        return [("tool_call" if closed and parse_tool_call(call) else "content", call)]


class FencedCalls(StreamParser):
    """Calls of DeepSeek-V3, R1 and V3.1: ``begin [type sep] name [newline, fence] arguments [fence] end``."""

    BLOCK, BLOCK_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    CALL, SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
    MARKS = (BLOCK, BLOCK_END, CALL, SEPARATOR, CALL_END)
    FENCED = re.compile(r"(.*?)\n```json\n(.*)\n```\s*", re.DOTALL)

    def __init__(self, tokenizer: Tokenizer, thinking: bool = False) -> None:
        super().__init__(tokenizer, thinking)
        self._parts: list[str] | None = None  # of the open call, between separators

    def _hears(self, name: str) -> bool:
        return name in ("<think>", "</think>") or name in self.MARKS

    def _mark(self, name: str) -> list[Event]:
        if name == self.SEPARATOR:
            if self._parts is not None:
                self._parts.append("")
            return []
        events = self._leave(closed=name == self.CALL_END)
        if name == self.CALL:
            self._parts = [""]
        opened = name in (self.BLOCK, self.CALL, self.CALL_END)
        self.channel = "tool_call" if opened else "reasoning" if name == "<think>" else "content"
        return events

    def _text(self, text: str) -> list[Event]:
        if self._parts is not None:
            self._parts[-1] += text
            return []
        if self.channel == "tool_call" and not text.strip():  # between calls
            return []
        return [("content" if self.channel == "tool_call" else self.channel, text)] if text else []

    def _leave(self, closed: bool = False) -> list[Event]:
        parts, self._parts = self._parts, None
        if not parts or not any(parts):
            return []
        fenced = self.FENCED.fullmatch(parts[-1])
        name, arguments = fenced.groups() if fenced else (parts[0], parts[-1])
        value = load_object(arguments) if closed and len(parts) > 1 else None
        if value is None:
            return [("content", "".join(parts))]
        return [("tool_call", json.dumps({"name": name.strip(), "arguments": value}, ensure_ascii=False))]
