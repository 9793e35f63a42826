"""A conversation as one token stream, and a completion back into reasoning, answer and tool calls.

``<|bos|>`` then, with nothing between: ``<|system|>text<|tools|>schemas</|tools|>``, ``<|user|>text and media``,
``<|assistant|><think>reasoning</think>answer<tool_call>{...}</tool_call><|eos|>``, ``<|tool|>result``.
"""

from __future__ import annotations

import codecs
import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fourfold.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
Channel = Literal["reasoning", "content", "tool_call"]
Event = tuple[Channel, str]


class ChatError(ValueError):
    """A message that cannot be encoded; the text names the field."""


@dataclass(frozen=True)
class Media:
    """A decoded input: uint8 [H, W, 3] (image), (frames, seconds, sound or None) (video), float32 [S] (audio)."""

    modality: Literal["image", "video", "audio"]
    value: Any


@dataclass(frozen=True)
class ToolCall:
    """``arguments`` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One turn. Only a user's ``content`` may hold media; ``reasoning`` and ``tool_calls`` are the assistant's."""

    role: str
    content: str | list[str | Media]
    reasoning: str | None = None
    tool_calls: Sequence[ToolCall] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True)
class Text:
    """Token ids; ``learn`` marks those that a model is trained to say."""

    ids: list[int]
    learn: bool


Piece = Text | Media


def encode_chat(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    tools: Sequence[dict[str, Any]] | None = None,
    thinking: bool = False,
    add_generation_prompt: bool = True,
) -> list[Piece]:
    """The conversation as pieces of text and media, ready for ``build_document``.

    Reasoning before the last user message is left out unless there are ``tools``; tool results follow the order
    of the calls they answer. ``thinking`` opens the answer with ``<think>``. Raises :class:`ChatError`.
    """
    if not messages:
        raise ChatError("messages: needs at least one message")
    for index, message in enumerate(messages):
        _check(message, f"messages[{index}]")
    turns = list(enumerate(messages))
    if tools and messages[0].role != "system":
        turns.insert(0, (0, Message("system", "")))
    last_user = max((index for index, message in turns if message.role == "user"), default=-1)
    out = _Writer(tokenizer)
    out.special("<|bos|>")
    for place, (index, message) in enumerate(_order_results(turns)):
        out.special(f"<|{message.role}|>")
        if message.role == "assistant":
            reasoning = message.reasoning if tools or index > last_user else None
            _encode_assistant(out, message, reasoning, f"messages[{index}]")
            continue
        for part in _parts(message):
            if isinstance(part, Media):
                out.pieces.append(part)
            else:
                out.text(part)
        if place == 0 and tools:
            out.special("<|tools|>")
            out.text("\n".join(_dump(tool.get("function", tool), f"tools[{n}]") for n, tool in enumerate(tools)))
            out.special("</|tools|>")
    if add_generation_prompt:
        out.special("<|assistant|>")
        out.special("<think>" if thinking else "</think>")
    return out.pieces


class _Writer:
    """Collects pieces; text next to text of the same ``learn`` becomes one piece."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.pieces: list[Piece] = []

    def ids(self, ids: list[int], learn: bool) -> None:
        last = self.pieces[-1] if self.pieces else None
        if isinstance(last, Text) and last.learn == learn:
            last.ids.extend(ids)
        else:
            self.pieces.append(Text(list(ids), learn))

    def special(self, name: str, learn: bool = False) -> None:
        self.ids([self.tokenizer.special(name)], learn)

    def text(self, text: str, learn: bool = False) -> None:
        self.ids(self.tokenizer.encode(text), learn)


def _encode_assistant(out: _Writer, message: Message, reasoning: str | None, name: str) -> None:
    # The first mark is the mode, which the prompt sets; all that follows is what the assistant says.
    if reasoning:
        out.special("<think>")
        out.text(reasoning, learn=True)
        out.special("</think>", learn=True)
    else:
        out.special("</think>")
    for part in _parts(message):
        out.text(str(part), learn=True)
    for index, call in enumerate(message.tool_calls):
        out.special("<tool_call>", learn=True)
        out.text(_dump_call(call, f"{name}.tool_calls[{index}]"), learn=True)
        out.special("</tool_call>", learn=True)
    out.special("<|eos|>", learn=True)


def _parts(message: Message) -> list[str | Media]:
    return [message.content] if isinstance(message.content, str) else message.content


def _check(message: Message, name: str) -> None:
    if message.role not in ROLES:
        raise ChatError(f"{name}.role: is {message.role!r}; choose one of {', '.join(ROLES)}")
    parts = _parts(message)
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, (str, Media)) for part in parts):
        raise ChatError(f"{name}.content: must be text or a list of text and media")
    if message.role != "user" and any(isinstance(part, Media) for part in parts):
        raise ChatError(f"{name}.content: media belong to the user role, not {message.role}")
    if message.role != "assistant" and (message.tool_calls or message.reasoning):
        raise ChatError(f"{name}: only the assistant role has tool_calls and reasoning")


def _order_results(turns: list[tuple[int, Message]]) -> list[tuple[int, Message]]:
    """Results carry no id in the stream, so those that follow one turn are put in the order of its calls."""
    ordered: list[tuple[int, Message]] = []
    rank: dict[str | None, int] = {}
    results: list[tuple[int, Message]] = []
    for turn in turns:
        if turn[1].role == "tool":
            results.append(turn)
            continue
        ordered += sorted(results, key=lambda result: rank.get(result[1].tool_call_id, len(rank)))
        results = []
        rank = {call.id: n for n, call in enumerate(turn[1].tool_calls)}
        ordered.append(turn)
    return ordered + sorted(results, key=lambda result: rank.get(result[1].tool_call_id, len(rank)))


def _dump(value: Any, name: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatError(f"{name}: is not JSON ({error})") from error


def _load_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _dump_call(call: ToolCall, name: str) -> str:
    arguments = _load_object(call.arguments)
    if arguments is None:
        raise ChatError(f"{name}.arguments: must be the text of a JSON object")
    return _dump({"name": call.name, "arguments": arguments}, name)


def parse_tool_call(text: str) -> ToolCall | None:
    """The call that ``{"name": ..., "arguments": {...}}`` makes, with a fresh id; None if it is anything else."""
    call = _load_object(text) or {}
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return ToolCall(f"call_{uuid.uuid4().hex}", name, json.dumps(arguments, ensure_ascii=False, separators=(",", ":")))


class StreamParser:
    """Turns sampled ids into events, one by one: ``reasoning`` and ``content`` as soon as a character is whole,
    ``tool_call`` (the JSON text) when its call is closed. A call that is broken off or is no call becomes content.

    ``channel`` is where the next token goes; other special tokens are left out.
    """

    def __init__(self, tokenizer: Tokenizer, thinking: bool = False) -> None:
        self.tokenizer = tokenizer
        self.channel: Channel = "reasoning" if thinking else "content"
        self._next: dict[int, Channel] = {
            tokenizer.special("<think>"): "reasoning",
            tokenizer.special("</think>"): "content",
            tokenizer.special("<tool_call>"): "tool_call",
            tokenizer.special("</tool_call>"): "content",
        }
        self._close = tokenizer.special("</tool_call>")
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._call = ""

    def feed(self, token: int) -> list[Event]:
        stray = token == self._close and self.channel != "tool_call"
        if token in self._next and not stray:
            events = self._leave(closed=token == self._close)
            self.channel = self._next[token]
            return events
        if self.tokenizer.is_special(token):
            return []
        return self._say(self._utf8.decode(self.tokenizer.token_bytes(token)))

    def finish(self) -> list[Event]:
        """What is still held back when no token follows."""
        return self._leave(closed=False)

    def _say(self, text: str) -> list[Event]:
        if self.channel == "tool_call":
            self._call += text
            return []
        return [(self.channel, text)] if text else []

    def _leave(self, closed: bool) -> list[Event]:
        events = self._say(self._utf8.decode(b"", final=True))
        self._utf8.reset()
        call, self._call = self._call, ""
        if call:
            events.append(("tool_call" if closed and parse_tool_call(call) else "content", call))
        return events


def parse_completion(
    ids: Iterable[int], tokenizer: Tokenizer, thinking: bool = False
) -> tuple[str | None, str, list[ToolCall]]:
    """(reasoning or None, answer, tool calls) of a whole completion, as :class:`StreamParser` reads it."""
    parser = StreamParser(tokenizer, thinking)
    events = [event for token in ids for event in parser.feed(token)] + parser.finish()
    reasoning = "".join(text for channel, text in events if channel == "reasoning")
    content = "".join(text for channel, text in events if channel == "content")
    calls = [call for channel, text in events if channel == "tool_call" and (call := parse_tool_call(text))]
    return reasoning or None, content, calls
