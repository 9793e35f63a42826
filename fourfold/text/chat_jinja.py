"""Chat formats that a checkpoint ships as a Jinja template: DeepSeek-V1 to V3.1, R1 and its distillations, Qwen2.

A template mixes its own special tokens with what people wrote. So that their text never becomes a special token, a
character that occurs nowhere else is put inside all that looks like one before rendering, and taken out after the
template's own tokens were found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fourfold.text.base import ChatFormat, refuse_schema
from fourfold.text.chat import (
    ChatError,
    Media,
    Message,
    Piece,
    Text,
    ToolCall,
    Writer,
    call_arguments,
    check_messages,
    content_parts,
    dump_json,
    order_results,
    schemas,
)
from fourfold.text.stream import Channel, FencedCalls, Parser, StreamParser
from fourfold.text.tokenizer import Tokenizer

# Told to models whose template writes calls but has no place for schemas (DeepSeek-V3, R1, V3.1).
TOOL_NOTE = """## Tools

These functions can be called. Each line is the schema of one:

{schemas}

To call, end the answer with a block of one or more calls, the arguments as one JSON object:

{call}"""
FENCED_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\nARGUMENTS\n```"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
PLAIN_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
CUTS_REASONING = re.compile(r"""split\(\s*['"]</think>""")  # a template that drops it from earlier answers


class JinjaChat(ChatFormat):
    """``templates``: name -> source, with a ``default``; ``names``: ``bos_token`` and the like, as templates call them.

    Nothing of a prompt is marked to be learnt: a template does not tell who says what. Raises :class:`ChatError` for
    a template that cannot be compiled.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        bos: int | None,
        stops: Collection[int],
        templates: Mapping[str, str],
        names: Mapping[str, str],
    ) -> None:
        super().__init__(tokenizer, bos, stops)
        if "default" not in templates:
            raise ChatError(f"chat_template: has no 'default', only {', '.join(map(repr, templates)) or 'nothing'}")
        environment = _environment()
        self._source = "\n".join(templates.values())
        try:
            self._templates = {name: environment.from_string(source) for name, source in templates.items()}
            reads = jinja2.meta.find_undeclared_variables(environment.parse(self._source))
        except jinja2.TemplateError as error:
            raise ChatError(f"chat_template: {error}") from None
        self._names = dict(names)
        self._takes_tools = "tools" in reads
        self._fenced = self._knows(*FencedCalls.MARKS)
        self._json = not self._fenced and self._knows("<tool_call>", "</tool_call>")
        if {"<think>", "</think>"} <= tokenizer.marks.keys():
            self.end_of_thinking = tokenizer.marks["</think>"]
        self._ends = {thinking: self._last_mark(thinking) for thinking in (False, True)}

    def _knows(self, *marks: str) -> bool:
        return all(mark in self.tokenizer.marks and mark in self._source for mark in marks)

    def _last_mark(self, thinking: bool) -> str | None:
        """The special token that ends a prompt: whether the answer begins inside a reasoning is the template's say."""
        try:
            last = self.encode([Message("user", "-")], thinking=thinking)[-1]
        except ChatError:  # a template that wants more than one message
            return None
        marks = [self.tokenizer.mark(id) for id in last.ids] if isinstance(last, Text) else []
        return next((mark for mark in reversed(marks) if mark), None)

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
        check_messages(messages)
        if tools and not (self._fenced or self._json):
            raise ChatError("tools: this model's chat template knows no tool calls")
        functions = [dump_json(schema, f"tools[{n}]") for n, schema in schemas(tools or ())]
        guard = _Guard(self.tokenizer, [self._source, *functions, *_written(messages)])
        turns = [self._turn(m, f"messages[{n}]", guard) for n, m in order_results(list(enumerate(messages)))]
        listed = [{"type": "function", "function": guard.all(json.loads(text))} for text in functions]
        if tools and not self._takes_tools:
            call = FENCED_CALL if "```json" in self._source else PLAIN_CALL
            note = TOOL_NOTE.format(schemas="\n".join(map(guard.put, functions)), call=call)
            system = turns.pop(0)["content"] + "\n\n" if turns[0]["role"] == "system" else ""
            turns.insert(0, {"role": "system", "content": system + note})
        text = self._render(
            self._templates["tool_use" if tools and "tool_use" in self._templates else "default"],
            turns,
            tools=listed or None,
            add_generation_prompt=add_generation_prompt,
            thinking=thinking,
            enable_thinking=thinking,
            **({} if effort is None else {"reasoning_effort": effort}),
        )
        out = Writer(self.tokenizer)
        for index, part in enumerate(self.tokenizer.split_marks(text)):
            out.mark(part) if index % 2 else out.text(guard.remove(part))
        return out.done()

    def _turn(self, message: Message, name: str, guard: _Guard) -> dict[str, Any]:
        """The message as templates expect it: OpenAI's form, ``content`` None for a call without words."""
        parts = content_parts(message)
        for part in parts:
            if isinstance(part, Media):
                raise ChatError(f"{name}.content: this model's chat format has no place for {part.modality}")
        content = "".join(map(str, parts))
        if message.role == "assistant" and CUTS_REASONING.search(self._source):
            content = content.rpartition("</think>")[2]
        turn: dict[str, Any] = {"role": message.role, "content": guard.put(content)}
        if message.reasoning:
            turn["reasoning_content"] = guard.put(message.reasoning)
        if message.tool_call_id is not None:
            turn["tool_call_id"] = guard.put(message.tool_call_id)
        if message.tool_calls:
            turn["content"] = turn["content"] or None
            where = f"{name}.tool_calls"
            turn["tool_calls"] = [_call(c, f"{where}[{n}]", guard) for n, c in enumerate(message.tool_calls)]
        return turn

    def _render(self, template: jinja2.Template, turns: list[dict[str, Any]], **values: Any) -> str:
        values |= {"documents": None, **self._names}
        worded = [{**turn, "content": turn["content"] or ""} for turn in turns]
        try:
            try:
                return template.render(messages=turns, **values)
            except TypeError:  # most templates want None for a call without words, some a text
                return template.render(messages=worded, **values)
        except Exception as error:  # a template is a program, and fails like one
            raise ChatError(f"messages: the chat template refuses them: {error}") from error

    def parser(self, thinking: bool = False, tools: bool = False) -> Parser:
        return (FencedCalls if self._fenced else StreamParser)(self.tokenizer, self._ends[thinking] == "<think>")

    def allowed(self, channel: Channel, tools: bool) -> frozenset[int]:
        names: list[str] = []
        if channel == "reasoning":
            names = ["</think>"]
        elif channel == "tool_call":
            names = [*FencedCalls.MARKS[1:]] if self._fenced else ["</tool_call>"]
        elif tools:
            names = [FencedCalls.BLOCK] if self._fenced else ["<tool_call>"]
        if channel == "content" and not set(self._ends.values()) <= {"<think>", "</think>"}:
            names.append("<think>")  # the prompt leaves it to the model to begin
        return self.stops | self._ids(*names)


class _JsonText(str):
    """Arguments of a call: templates join them as a text, or dump them as the object that they are."""


class _Guard:
    """Puts a character into text wherever it could be taken for a special token, alone or beside a template's text."""

    def __init__(self, tokenizer: Tokenizer, texts: Iterable[str]) -> None:
        used = set().union(*map(set, texts))
        self._wedge = next(c for c in map(chr, range(0xFDD0, 0x110000)) if c not in used)
        self._tokenizer = tokenizer

    def put(self, text: str) -> str:
        parts = self._tokenizer.split_marks(text)
        parts[1::2] = [mark[0] + self._wedge + mark[1:] for mark in parts[1::2]]
        return re.sub("[<|｜]", rf"\g<0>{self._wedge}", "".join(parts))

    def all(self, value: Any) -> Any:
        """Every text inside a JSON value."""
        if isinstance(value, dict):
            return {self.put(key): self.all(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.all(inner) for inner in value]
        return self.put(value) if isinstance(value, str) else value

    def remove(self, text: str) -> str:
        return text.replace(self._wedge, "")


def _call(call: ToolCall, name: str, guard: _Guard) -> dict[str, Any]:
    call_arguments(call, name)
    function = {"name": guard.put(call.name), "arguments": _JsonText(guard.put(call.arguments))}
    return {"id": guard.put(call.id), "type": "function", "function": function}


def _written(messages: Sequence[Message]) -> Iterable[str]:
    for message in messages:
        yield from (part for part in content_parts(message) if isinstance(part, str))
        yield from (message.reasoning or "", message.tool_call_id or "")
        for call in message.tool_calls:
            yield from (call.id, call.name, str(call.arguments))


def _environment() -> jinja2.Environment:
    """What templates may count on: the settings, filters and functions that ``transformers`` gives them."""

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
        # Unlike Jinja's own, without HTML escapes.
        return json.dumps(_plain(value), ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _plain(value: Any) -> Any:
    if isinstance(value, _JsonText):
        return json.loads(value)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
