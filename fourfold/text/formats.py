"""Which chat format a model speaks: the native one, a Jinja template, or the encoding of DeepSeek-V4 and V4.1."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from fourfold.text.base import ChatFormat, refuse_schema
from fourfold.text.chat import ChatError, Message, Piece, encode_chat
from fourfold.text.chat_dsml import DsmlChat
from fourfold.text.chat_jinja import JinjaChat
from fourfold.text.dsml import V4, V41, Wording, speaks
from fourfold.text.stream import Channel, Parser, StreamParser
from fourfold.text.tokenizer import SPECIALS, Tokenizer

MAX_FILE = 64 << 20  # bytes of a JSON file beside the weights

# reasoning_effort -> tokens after which the native models' reasoning is closed
BUDGETS = {"minimal": 64, "low": 256, "medium": 1024, "high": 4096}

__all__ = ["ChatFormat", "NativeChat", "NoChat", "default_chat", "load_chat", "make_chat"]


class NativeChat(ChatFormat):
    """The format of the models that are trained here, as ``text.chat`` describes it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, tokenizer.special("<|bos|>"), [tokenizer.special("<|eos|>")])
        self.end_of_thinking = tokenizer.special("</think>")

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool = False,
        effort: str | int | None = None,
        add_generation_prompt: bool = True,
        response_format: dict[str, Any] | None = None,
    ) -> list[Piece]:
        refuse_schema(response_format)
        return encode_chat(messages, self.tokenizer, tools, thinking, add_generation_prompt)

    def parser(self, thinking: bool = False, tools: bool = False) -> Parser:
        return StreamParser(self.tokenizer, thinking)

    def allowed(self, channel: Channel, tools: bool) -> frozenset[int]:
        if channel == "tool_call":
            return self._ids("</tool_call>")
        return self.stops | self._ids("</think>" if channel == "reasoning" else "<tool_call>" if tools else "")

    def budget(self, effort: str | int | None) -> int | None:
        return BUDGETS.get(effort) if isinstance(effort, str) else None


class NoChat(ChatFormat):
    """A model that was published without a chat format: it continues plain text."""

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool = False,
        effort: str | int | None = None,
        add_generation_prompt: bool = True,
        response_format: dict[str, Any] | None = None,
    ) -> list[Piece]:
        raise ChatError("messages: this model has no chat template; it can only continue plain text")

    def parser(self, thinking: bool = False, tools: bool = False) -> Parser:
        return StreamParser(self.tokenizer)

    def allowed(self, channel: Channel, tools: bool) -> frozenset[int]:
        return self.stops


def default_chat(tokenizer: Tokenizer) -> ChatFormat:
    """The native format if the tokenizer has its tokens; else none."""
    return NativeChat(tokenizer) if set(SPECIALS) <= tokenizer.marks.keys() else NoChat(tokenizer, None, [])


def make_chat(
    tokenizer: Tokenizer,
    templates: dict[str, str],
    names: dict[str, str | None],
    stops: Collection[int],
    add_bos: bool = True,
) -> ChatFormat:
    """The format of a Jinja template (``templates["default"]``, perhaps ``["tool_use"]``), or of none.

    ``names``: what templates call by ``bos_token``, ``eos_token`` and so on; a None has no value. ``add_bos``: plain
    text begins with the ``bos_token``, if there is one.
    """
    known = {key: name for key, name in names.items() if name is not None}
    bos = tokenizer.marks.get(known.get("bos_token", "")) if add_bos else None
    if not templates:
        return NoChat(tokenizer, bos, stops)
    return JinjaChat(tokenizer, bos, stops, templates, known)


def load_chat(directory: str | Path, model_type: str | None, tokenizer: Tokenizer) -> ChatFormat:
    """The chat format of the model in ``directory``, of the type ``model_type`` (None: what its ``config.json`` says).

    Nothing in the directory is executed but Jinja templates, in a sandbox. Raises :class:`ChatError`.
    """
    directory = Path(directory)
    if set(SPECIALS) <= tokenizer.marks.keys():
        return NativeChat(tokenizer)
    config = _read(directory / "config.json")
    generation = _read(directory / "generation_config.json")
    about = _read(directory / "tokenizer_config.json")
    ids = _ids(config.get("eos_token_id", _nested(config, "eos_token_id"))) | _ids(generation.get("eos_token_id"))
    names = {key: _name(about.get(key)) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    for key in ("bos_token", "eos_token"):
        if key not in about:
            known = _ids(generation.get(f"{key}_id")) or _ids(config.get(f"{key}_id", _nested(config, f"{key}_id")))
            names[key] = next((name for id in sorted(known) if (name := tokenizer.mark(id))), None)
    if names["eos_token"] in tokenizer.marks:
        ids |= {tokenizer.marks[names["eos_token"]]}
    stops = {id for id in ids if tokenizer.has(id)}
    kind = str(config.get("model_type") if model_type is None else model_type)
    templates = _templates(directory, about)
    dialects = [V41] if kind.startswith("deepseek_v41") else [V4] if kind.startswith("deepseek_v4") else []
    if kind in ("fourfold", "None") and not templates:  # converted to our own format, it still has its tokens
        dialects = [V41, V4]
    for dialect in dialects:
        if speaks(tokenizer, dialect):
            return DsmlChat(tokenizer, stops, dialect, Wording.load(directory, dialect))
    return make_chat(tokenizer, templates, names, stops)


def _templates(directory: Path, about: dict[str, Any]) -> dict[str, str]:
    """A file of its own counts more than the entry of ``tokenizer_config.json``."""
    path = directory / "chat_template.jinja"
    found = about.get("chat_template")
    if path.is_file():
        found = _text(path)
    if isinstance(found, list):
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        return {name: text for name, text in named.items() if isinstance(name, str) and isinstance(text, str)}
    return {"default": found} if isinstance(found, str) else {}


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE:
            raise ChatError(f"{path}: is larger than {MAX_FILE} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ChatError(f"{path}: cannot be read: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ChatError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ChatError(f"{path}: must hold a JSON object")
    return value


def _nested(config: dict[str, Any], key: str) -> Any:
    """Models that also see keep what concerns their text apart."""
    inner = config.get("text_config")
    return inner.get(key) if isinstance(inner, dict) else None


def _name(token: Any) -> str | None:
    """A token's name, which files write as a string or as ``{"content": ...}``."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def _ids(value: Any) -> set[int]:
    values = value if isinstance(value, list) else [value]
    return {id for id in values if isinstance(id, int) and not isinstance(id, bool)}
