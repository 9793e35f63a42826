"""The chat format of DeepSeek-V4 and V4.1, which ship no template: conversations to tokens and completions back.

``<｜begin▁of▁sentence｜>``, system text, ``<｜User｜>text``, ``<｜Assistant｜><think>reasoning</think>answer`` (or
``</think>answer``) ``<｜end▁of▁sentence｜>``, with nothing between. Calls are elements of a markup whose tags hold the
token ``｜DSML｜``; their results stand in the next user turn. V4.1 marks system text and says the effort as a number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fourfold.text.base import ChatFormat
from fourfold.text.chat import (
    ROLES,
    ChatError,
    Media,
    Message,
    Piece,
    ToolCall,
    Writer,
    call_arguments,
    check_messages,
    content_parts,
    dump_json,
    schemas,
)
from fourfold.text.dsml import (
    ASSISTANT,
    BOS,
    DSML,
    END_THINK,
    EOS,
    REMINDER,
    SPOKEN,
    TASKS,
    THINK,
    USER,
    Dialect,
    Wording,
    fields,
)
from fourfold.text.stream import Channel, Event, Parser, StreamParser
from fourfold.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class _Result:
    """What a tool gave, inside a user turn."""

    call_id: str | None
    text: str


@dataclass(frozen=True)
class _Turn:
    """A message, or several that were merged; ``name`` tells where they began, a blank line parts the ``parts``."""

    name: str
    role: str
    parts: list[str | Media | _Result]
    message: Message
    response_format: dict[str, Any] | None = None


class DsmlChat(ChatFormat):
    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Collection[int],
        dialect: Dialect,
        wording: Wording | None = None,
    ) -> None:
        marks = tokenizer.marks
        super().__init__(tokenizer, marks[BOS], {marks[EOS], *stops})
        self.dialect = dialect
        self.wording = wording or Wording.of(dialect)
        self.end_of_thinking = marks[END_THINK]
        self.spoken = self._ids(*SPOKEN)

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool = False,
        effort: str | int | None = None,
        add_generation_prompt: bool = True,
        response_format: dict[str, Any] | None = None,
    ) -> list[Piece]:
        """As :meth:`ChatFormat.encode`. ``tools`` and ``response_format`` are said in the first system message.

        With ``thinking``, reasoning before the last user turn (and what a developer said there) is dropped unless
        some message declares tools; without, there is none. ``add_generation_prompt`` opens an answer only after a
        turn that asks for one: never after an assistant's.
        """
        check_messages(messages, (*ROLES, "developer", "latest_reminder"), v4=True)
        turns = self._turns(messages, list(tools or ()), response_format)
        drop = thinking and not any(turn.message.tools for turn in turns)
        if drop:
            last = self._last_question(turns)
            turns = [t for i, t in enumerate(turns) if i >= last or t.role != "developer"]
        last = self._last_question(turns)
        out = Writer(self.tokenizer)
        out.mark(BOS)
        said_effort = self._effort(effort) if thinking else ""
        for i, turn in enumerate(turns):
            if self.dialect.system and (turn.role == "system" or (i == 0 and said_effort)):
                out.mark(self.dialect.system)
            if i == 0:
                out.markup(said_effort)
            if turn.role == "assistant":
                after_task = i > 0 and turns[i - 1].message.task is not None
                self._answer(out, turn, thinking and not after_task and (not drop or i > last))
            else:
                self._ask(out, turn)
            following = turns[i + 1].role if i + 1 < len(turns) else None
            if following in ("assistant", "latest_reminder") or (following is None and add_generation_prompt):
                self._open(out, turn, self._asks(turns, i), thinking, thinking and (not drop or i >= last))
        return out.done()

    # ------------------------------------------------------------ which turns there are

    def _turns(
        self, messages: Sequence[Message], tools: list[dict[str, Any]], response_format: dict[str, Any] | None
    ) -> list[_Turn]:
        """Results join the user turn before or after them, in the order of their calls; users in a row are one turn."""
        turns: list[_Turn] = []
        if (tools or response_format is not None) and messages[0].role != "system":
            turns.append(_Turn("tools", "system", [], Message("system", "", tools=tools), response_format))
        rank: dict[str, int] = {}
        for index, message in enumerate(messages):
            name = f"messages[{index}]"
            parts = self._parts(message, name)
            previous = turns[-1] if turns and turns[-1].role == "user" else None
            if message.role == "tool":
                result = _Result(message.tool_call_id, "\n\n".join(map(str, parts)))
                if previous:
                    previous.parts.append(result)
                else:
                    turns.append(_Turn(name, "user", [result], replace(message, role="user")))
            elif message.role == "user" and previous and previous.message.task is None:
                previous.parts.extend(parts)
            elif index == 0 and message.role == "system":
                declared = replace(message, tools=[*message.tools, *tools])
                turns.append(_Turn(name, "system", parts, declared, response_format))
            else:
                turns.append(_Turn(name, message.role, parts, message))
        for turn in turns:
            if turn.message.tool_calls:
                rank = {call.id: n for n, call in enumerate(turn.message.tool_calls) if call.id}
            elif turn.role == "user":
                places = [n for n, part in enumerate(turn.parts) if isinstance(part, _Result)]
                results = [turn.parts[n] for n in places]
                results.sort(key=lambda result: rank.get(result.call_id or "", 0))
                for n, result in zip(places, results, strict=True):
                    turn.parts[n] = result
        return turns

    def _parts(self, message: Message, name: str) -> list[str | Media | _Result]:
        """A copy of the content, checked for what this encoding refuses."""
        if message.task is not None and (message.task not in TASKS or message.role in ("assistant", "tool")):
            raise ChatError(f"{name}.task: is {message.task!r}; a question may ask {', '.join(TASKS)}")
        if message.tools and message.role not in ("system", "developer"):
            raise ChatError(f"{name}.tools: are declared by the system or developer role, not {message.role}")
        parts = list(content_parts(message))
        texts = [part for part in parts if isinstance(part, str)]
        if message.role == "developer" and not any(texts):
            raise ChatError(f"{name}.content: a developer message needs text")
        if self.dialect.system and any(self.dialect.image in text for text in [*texts, message.reasoning or ""]):
            raise ChatError(f"{name}: holds the literal {self.dialect.image}; send the image as a part of the content")
        return parts

    def _asks(self, turns: list[_Turn], i: int) -> bool:
        """Whether an answer may follow: in V4.1 a system message in the middle asks as a user does."""
        role = turns[i].role
        return role in ("user", "developer") or (role == "system" and i > 0 and self.dialect.system is not None)

    def _last_question(self, turns: list[_Turn]) -> int:
        return max((i for i in range(len(turns)) if self._asks(turns, i)), default=-1)

    # ------------------------------------------------------------ what is written

    def _effort(self, effort: str | int | None) -> str:
        """The sentence about it. What a model has no name for means the nearest: minimal is low, medium the default."""
        names = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
        number = type(effort) is int and bool(self.wording.budgets) and 1 <= effort <= 100
        if not number and effort is not None and effort not in names:
            choices = ", ".join(names) + (" or a number from 1 to 100" if self.wording.budgets else "")
            raise ChatError(f"effort: is {effort!r}; choose one of {choices}")
        if self.dialect.system is None:
            return self.wording.effort if effort in ("max", "xhigh") else ""
        budgets = self.wording.budgets
        nearest = {"minimal": "low", "xhigh": "max"}.get(str(effort), self.wording.default)
        budget = effort if number else budgets.get(str(effort), budgets.get(nearest, budgets[self.wording.default]))
        parts = fields(self.wording.effort, {"budget"}, "effort")
        return "".join(text + ("" if key is None else str(budget)) for text, key in parts)

    def _ask(self, out: Writer, turn: _Turn) -> None:
        if turn.role in ("user", "developer"):
            out.mark(USER)
        elif turn.role == "latest_reminder":
            out.mark(REMINDER)
        for n, part in enumerate(turn.parts):
            out.text("\n\n" if n else "")
            if isinstance(part, Media):
                out.media(part)
            else:
                out.text(part if isinstance(part, str) else f"<tool_result>{part.text}</tool_result>")
        if turn.message.tools:
            name = "tools" if turn.name == "tools" else f"{turn.name}.tools"
            listed = "\n".join(dump_json(schema, f"{name}[{n}]") for n, schema in schemas(turn.message.tools))
            self._sentence(out, self.wording.tools, "tool_schemas", listed)
        if turn.response_format is not None:
            schema = dump_json(turn.response_format, "response_format")
            self._sentence(out, self.wording.response_format, "schema", schema)

    def _sentence(self, out: Writer, template: str, name: str, value: str) -> None:
        out.text("\n\n")
        for text, key in fields(template, {name, *self.dialect.tags}, name):
            out.markup(text)
            if key == name:
                out.text(value)
            elif key is not None:
                out.markup(self.dialect.tags[key])

    def _answer(self, out: Writer, turn: _Turn, reasoning: bool) -> None:
        if reasoning:
            out.text(turn.message.reasoning or "", learn=True)
            out.mark(END_THINK, learn=True)
        out.text("\n\n".join(map(str, turn.parts)), learn=True)
        calls = turn.message.tool_calls
        if calls:
            out.text("\n\n", learn=True)
            self._tag(out, self.dialect.calls, "\n")
            for n, call in enumerate(calls):
                self._call(out, call, f"{turn.name}.tool_calls[{n}]")
            self._tag(out, self.dialect.calls, "", close=True)
        out.mark(EOS, learn=True)

    def _call(self, out: Writer, call: ToolCall, name: str) -> None:
        arguments = call_arguments(call, name)
        self._tag(out, self.dialect.invoke, "\n", f' name="{call.name}"')
        for n, (key, value) in enumerate(arguments.items()):
            out.text("\n" if n else "", learn=True)
            kind = "true" if isinstance(value, str) else "false"
            self._tag(out, self.dialect.parameter, "", f' name="{key}" string="{kind}"')
            out.text(value if isinstance(value, str) else dump_json(value, f"{name}.arguments"), learn=True)
            self._tag(out, self.dialect.parameter, "", close=True)
        out.text("\n", learn=True)
        self._tag(out, self.dialect.invoke, "\n", close=True)

    def _tag(self, out: Writer, name: str, after: str, attributes: str = "", close: bool = False) -> None:
        out.text("</" if close else "<", learn=True)
        out.mark(DSML, learn=True)
        out.text(f"{name}{attributes}>{after}", learn=True)

    def _open(self, out: Writer, turn: _Turn, asks: bool, thinking: bool, think: bool) -> None:
        """The head of the answer to ``turn``; a task is answered by what follows its token, without a reasoning."""
        task = turn.message.task
        if task not in (None, "action"):
            out.mark(f"<｜{task}｜>")
        elif task or asks:
            out.mark(ASSISTANT)
            out.mark(THINK if (thinking if task else think) else END_THINK)
            if task:
                out.mark(f"<｜{task}｜>")

    # ------------------------------------------------------------ what comes back

    def parser(self, thinking: bool = False, tools: bool = False) -> Parser:
        return DsmlParser(self.tokenizer, self.dialect, thinking, tools, self.spoken)

    def allowed(self, channel: Channel, tools: bool) -> frozenset[int]:
        if channel == "reasoning":
            return self.stops | self._ids(END_THINK)
        if channel == "tool_call":
            return self.stops | self._ids(DSML)
        return self.stops | self.spoken | self._ids(DSML if tools else "")


class DsmlParser(StreamParser):
    """Reads calls written as elements. Only the token ``｜DSML｜`` makes a tag; the same name spelled out is text."""

    def __init__(
        self, tokenizer: Tokenizer, dialect: Dialect, thinking: bool, tools: bool, spoken: Collection[int] = ()
    ) -> None:
        super().__init__(tokenizer, thinking)
        self._tools = tools
        self._spoken = {tokenizer.mark(id) for id in spoken}
        self._held = ""  # the end of the answer so far, where a call could begin
        self._segments: list[str] = []  # of an open block of calls: the text after each mark
        self._close = f"{dialect.calls}>"
        self._patterns = [
            re.compile(pattern, re.DOTALL)
            for pattern in (
                rf"{dialect.calls}>\s*<",
                rf'{dialect.invoke} name="(.*?)">\s*(</?)',
                rf'{dialect.parameter} name="(.*?)" string="(true|false)">(.*)</',
                rf"{dialect.parameter}>\s*(</?)",
                rf"{dialect.invoke}>\s*(</?)",
            )
        ]

    def _hears(self, name: str) -> bool:
        if name == DSML:
            return self.channel == "tool_call" or (self.channel == "content" and self._held.endswith("<"))
        return name in (THINK, END_THINK) or name in self._spoken

    def _mark(self, name: str) -> list[Event]:
        if name == DSML:
            self.channel = "tool_call"
            self._segments.append("")
            return []
        if name in self._spoken:
            return self._text(name)
        events = self._leave()
        self.channel = "reasoning" if name == THINK else "content"
        return events

    def _text(self, text: str) -> list[Event]:
        if self.channel == "tool_call":
            self._segments[-1] += text
            opened = len(self._segments) > 1 and self._segments[-2].endswith("</")
            return self._leave() if opened and self._segments[-1].startswith(self._close) else []
        if self.channel == "reasoning" or not self._tools:
            return super()._text(text)
        text = self._held + text
        cut = re.search(r"\n{0,2}<?\Z", text).start()  # type: ignore[union-attr]
        self._held = text[cut:]
        return super()._text(text[:cut])

    def _leave(self, closed: bool = False) -> list[Event]:
        held, self._held = self._held, ""
        segments, self._segments = self._segments, []
        if segments:
            self.channel = "content"
            calls = self._calls(segments)
            if calls is not None:
                return [("tool_call", json.dumps(call, ensure_ascii=False)) for call in calls]
        text = DSML.join([held, *segments])
        return [("content", text)] if text else []

    def _calls(self, segments: list[str]) -> list[dict[str, Any]] | None:
        """The calls of a closed block; None if anything in it is out of place."""
        block, invoke, parameter, after_parameter, after_invoke = self._patterns
        rest = iter(segments)
        if not block.fullmatch(next(rest)):
            return None
        calls: list[dict[str, Any]] = []
        while opened := invoke.fullmatch(next(rest, "")):
            name, bracket = opened.groups()
            arguments: dict[str, Any] = {}
            while bracket == "<":
                found, end = parameter.fullmatch(next(rest, "")), after_parameter.fullmatch(next(rest, ""))
                if not found or not end or found[1] in arguments:
                    return None
                try:
                    arguments[found[1]] = found[3] if found[2] == "true" else json.loads(found[3])
                except (ValueError, RecursionError):
                    return None
                bracket = end[1]
            end = after_invoke.fullmatch(next(rest, ""))
            if not end:
                return None
            calls.append({"name": name, "arguments": arguments})
            if end[1] == "</":
                return calls if next(rest, "").startswith(self._close) else None
        return None
