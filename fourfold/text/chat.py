"""A conversation, and the native way to write it as one token stream.

``<|bos|>`` then, with nothing between: ``<|system|>text<|tools|>schemas</|tools|>``, ``<|user|>text and media``,
``<|assistant|><think>reasoning</think>answer<tool_call>{...}</tool_call><|eos|>``, ``<|tool|>result``.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fourfold.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")


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
    """One turn. Only a user's ``content`` may hold media; ``reasoning`` and ``tool_calls`` are the assistant's.

    ``tools`` declared in the middle of a conversation and ``task`` (a question that one token asks, such as
    ``title``) are known to the encodings of DeepSeek-V4 alone.
    """

    role: str
    content: str | list[str | Media]
    reasoning: str | None = None
    tool_calls: Sequence[ToolCall] = ()
    tool_call_id: str | None = None
    tools: Sequence[dict[str, Any]] = ()
    task: str | None = None


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
    check_messages(messages)
    turns = list(enumerate(messages))
    if tools and messages[0].role != "system":
        turns.insert(0, (0, Message("system", "")))
    last_user = max((index for index, message in turns if message.role == "user"), default=-1)
    out = Writer(tokenizer)
    out.mark("<|bos|>")
    for place, (index, message) in enumerate(order_results(turns)):
        out.mark(f"<|{message.role}|>")
        if message.role == "assistant":
            reasoning = message.reasoning if tools or index > last_user else None
            _encode_assistant(out, message, reasoning, f"messages[{index}]")
            continue
        for part in content_parts(message):
            if isinstance(part, Media):
                out.media(part)
            else:
                out.text(part)
        if place == 0 and tools:
            out.mark("<|tools|>")
            out.text("\n".join(dump_json(schema, f"tools[{n}]", compact=True) for n, schema in schemas(tools)))
            out.mark("</|tools|>")
    if add_generation_prompt:
        out.mark("<|assistant|>")
        out.mark("<think>" if thinking else "</think>")
    return out.done()


def _encode_assistant(out: Writer, message: Message, reasoning: str | None, name: str) -> None:
    # The first mark is the mode, which the prompt sets; all that follows is what the assistant says.
    if reasoning:
        out.mark("<think>")
        out.text(reasoning, learn=True)
        out.mark("</think>", learn=True)
    else:
        out.mark("</think>")
    for part in content_parts(message):
        out.text(str(part), learn=True)
    for index, call in enumerate(message.tool_calls):
        where = f"{name}.tool_calls[{index}]"
        out.mark("<tool_call>", learn=True)
        out.text(dump_json({"name": call.name, "arguments": call_arguments(call, where)}, where, compact=True), True)
        out.mark("</tool_call>", learn=True)
    out.mark("<|eos|>", learn=True)


class Writer:
    """Collects pieces. Text that nothing divides is tokenised as a whole, whoever wrote the parts of it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._pieces: list[Piece] = []
        self._held = ""
        self._learn = False

    def text(self, text: str, learn: bool = False) -> None:
        """Text of any origin: nothing in it becomes a special token."""
        if learn != self._learn:
            self._flush()
        self._learn = learn
        self._held += text

    def mark(self, name: str, learn: bool = False) -> None:
        """A special token by its name."""
        self.token(self.tokenizer.special(name), learn)

    def token(self, token: int, learn: bool = False) -> None:
        self._flush()
        self._append([token], learn)

    def markup(self, text: str) -> None:
        """Trusted text, in which names of special tokens mean these tokens."""
        for index, part in enumerate(self.tokenizer.split_marks(text)):
            self.mark(part) if index % 2 else self.text(part)

    def media(self, media: Media) -> None:
        self._flush()
        self._pieces.append(media)

    def done(self) -> list[Piece]:
        self._flush()
        return self._pieces

    def _flush(self) -> None:
        text, self._held = self._held, ""
        if text:
            self._append(self.tokenizer.encode(text), self._learn)

    def _append(self, ids: list[int], learn: bool) -> None:
        last = self._pieces[-1] if self._pieces else None
        if isinstance(last, Text) and last.learn == learn:
            last.ids.extend(ids)
        else:
            self._pieces.append(Text(ids, learn))


# ---------------------------------------------------------------- what all formats share


def check_messages(messages: Sequence[Message], roles: Sequence[str] = ROLES, v4: bool = False) -> None:
    """Raises :class:`ChatError` unless each message holds what its role may hold; ``v4``: tools and tasks too."""
    if not messages:
        raise ChatError("messages: needs at least one message")
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if message.role not in roles:
            raise ChatError(f"{name}.role: is {message.role!r}; choose one of {', '.join(roles)}")
        parts = content_parts(message)
        if not isinstance(parts, (list, tuple)) or not all(isinstance(part, (str, Media)) for part in parts):
            raise ChatError(f"{name}.content: must be text or a list of text and media")
        if message.role != "user" and any(isinstance(part, Media) for part in parts):
            raise ChatError(f"{name}.content: media belong to the user role, not {message.role}")
        if message.role != "assistant" and (message.tool_calls or message.reasoning):
            raise ChatError(f"{name}: only the assistant role has tool_calls and reasoning")
        if not v4 and (message.tools or message.task):
            raise ChatError(f"{name}: this model's chat format knows no tools and no task of a single message")


def content_parts(message: Message) -> list[str | Media]:
    return [message.content] if isinstance(message.content, str) else message.content


def order_results(turns: list[tuple[int, Message]]) -> list[tuple[int, Message]]:
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


def schemas(tools: Sequence[dict[str, Any]]) -> list[tuple[int, Any]]:
    """(number, schema) of each tool, whether it stands in OpenAI's ``{"type": "function", "function": ...}`` or not."""
    return [(n, tool.get("function", tool)) for n, tool in enumerate(tools)]


def dump_json(value: Any, name: str, compact: bool = False) -> str:
    """Raises :class:`ChatError` for what JSON cannot say."""
    try:
        separators = (",", ":") if compact else (", ", ": ")
        return json.dumps(value, ensure_ascii=False, separators=separators, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatError(f"{name}: is not JSON ({error})") from error


def call_arguments(call: ToolCall, name: str) -> dict[str, Any]:
    """Raises :class:`ChatError` unless the arguments are the text of a JSON object."""
    arguments = load_object(call.arguments)
    if arguments is None:
        raise ChatError(f"{name}.arguments: must be the text of a JSON object")
    return arguments


def load_object(text: str) -> dict[str, Any] | None:
    """The JSON object of this text; None if it is anything else."""
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def parse_tool_call(text: str) -> ToolCall | None:
    """The call that ``{"name": ..., "arguments": {...}}`` makes, with a fresh id; None if it is anything else."""
    call = load_object(text) or {}
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return ToolCall(f"call_{uuid.uuid4().hex}", name, json.dumps(arguments, ensure_ascii=False, separators=(",", ":")))
