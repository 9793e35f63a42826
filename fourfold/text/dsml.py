"""What the encodings of DeepSeek-V4 and V4.1 are made of: their special tokens, their tags, and their sentences."""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Formatter
from typing import Any

from fourfold.text.chat import ChatError
from fourfold.text.tokenizer import Tokenizer

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT, REMINDER = "<｜User｜>", "<｜Assistant｜>", "<｜latest_reminder｜>"
THINK, END_THINK, DSML = "<think>", "</think>", "｜DSML｜"
TASKS = ("action", "query", "authority", "domain", "title", "read_url")
# Marks inside an answer: what a model that reads images points at, and tables.
SPOKEN = tuple(f"<｜{end}{n}｜>" for n in ("ref", "box", "point", "polygon", "table", "tr", "td") for end in ("", "/"))
MAX_ENCODING = 1 << 20  # bytes of a file in a checkpoint's encoding/ folder


@dataclass(frozen=True)
class Dialect:
    """Tag names after ``｜DSML｜``; ``system``: the mark before system text, which V4 lacks; ``image``: its place."""

    calls: str
    invoke: str
    parameter: str
    system: str | None = None
    image: str = "<｜deepseek_image｜>"

    @property
    def tags(self) -> dict[str, str]:
        """What a checkpoint's sentences may call the tokens and tags by."""
        return {
            "dsml_token": DSML,
            "thinking_start_token": THINK,
            "thinking_end_token": END_THINK,
            "tc_block_name": self.calls,
            "tool_call_tag_name": self.invoke,
            "tool_parameter_tag_name": self.parameter,
        }


V4 = Dialect("tool_calls", "invoke", "parameter")
V41 = Dialect(" calls", " invoke", " parameter", system="<｜System｜>")


def speaks(tokenizer: Tokenizer, dialect: Dialect) -> bool:
    """Whether the tokenizer has the tokens of the dialect."""
    needed = {BOS, EOS, USER, ASSISTANT, THINK, END_THINK, DSML} | ({dialect.system} if dialect.system else set())
    return needed <= tokenizer.marks.keys()


@dataclass(frozen=True)
class Wording:
    """The sentences around what people write, with ``{fields}``; special tokens stand in them by name.

    ``tools`` has ``{tool_schemas}``, ``response_format`` has ``{schema}``; ``effort`` has ``{budget}`` if efforts are
    numbers (``budgets``: by name, ``default`` where none is asked for), else it is what the effort ``max`` says.
    """

    tools: str
    response_format: str
    effort: str
    budgets: Mapping[str, int] = field(default_factory=dict)
    default: str = "high"

    @staticmethod
    def of(dialect: Dialect) -> Wording:
        """Our own words."""
        tools = TOOLS.replace("CALLS", dialect.calls).replace("INVOKE", dialect.invoke)
        tools = tools.replace("PARAMETER", dialect.parameter)
        if dialect.system is None:
            return Wording(tools, RESPONSE_FORMAT, EFFORT_MAX)
        return Wording(tools, RESPONSE_FORMAT, EFFORT_NUMBER, {"low": 25, "high": 50, "xhigh": 75, "max": 100})

    @staticmethod
    def load(directory: Path, dialect: Dialect) -> Wording:
        """The words that the model was trained with, if the directory has its ``encoding/`` folder; else our own.

        The program in that folder is not executed: only the texts that it assigns to the known names are read.
        """
        wording = Wording.of(dialect)
        wanted = {"TOOLS_TEMPLATE": "tools", "response_format_template": "response_format"}
        wanted["REASONING_EFFORT_TEMPLATE" if dialect.system else "REASONING_EFFORT_MAX"] = "effort"
        if dialect.system:
            wanted |= {"REASONING_EFFORT_MAPPINGS": "budgets", "DEFAULT_REASONING_EFFORT": "default"}
        for path in sorted((directory / "encoding").glob("*.py")):
            found = {wanted[name]: value for name, value in _constants(path).items() if name in wanted}
            wording = replace(wording, **found)
        wording._check(dialect, f"{directory / 'encoding'}")
        return wording

    def _check(self, dialect: Dialect, name: str) -> None:
        for key, own in (("tools", "tool_schemas"), ("response_format", "schema"), ("effort", "budget")):
            template = getattr(self, key)
            if not isinstance(template, str):
                raise ChatError(f"{name}: {key} must be text")
            fields(template, {own, *dialect.tags}, f"{name}: {key}")
        numbers = isinstance(self.budgets, Mapping) and all(1 <= n <= 100 for n in self.budgets.values())
        if dialect.system and not (numbers and self.default in self.budgets):
            raise ChatError(f"{name}: efforts must be numbers from 1 to 100, and the default one of them")


TOOLS = """## Tools

These functions can be called, one or several at a time, at the end of an answer and in this form:

<｜DSML｜CALLS>
<｜DSML｜INVOKE name="FUNCTION">
<｜DSML｜PARAMETER name="ARGUMENT" string="true|false">VALUE</｜DSML｜PARAMETER>
</｜DSML｜INVOKE>
</｜DSML｜CALLS>

A value that is a string is written as it is, with string="true"; any other value is written as JSON, with \
string="false". Reasoning, where there is one, comes before.

The schema of each function:

{tool_schemas}

Names and arguments of calls follow these schemas."""
RESPONSE_FORMAT = "## Response Format\n\nThe answer is JSON that follows this schema:\n{schema}"
EFFORT_MAX = (
    "Reasoning Effort: max. Think for as long as the problem deserves: take it apart, try every way that may lead to "
    "an answer, check each step against odd cases, and write all of it down before answering.\n\n"
)
EFFORT_NUMBER = "Reasoning Effort: {budget} (range 1-100, more means to think longer)\n\n"


def fields(template: str, known: Collection[str], name: str) -> list[tuple[str, str | None]]:
    """(text, name of the field after it) of a format string. Raises :class:`ChatError` for a field not ``known``."""
    try:
        parts = [(text, key) for text, key, *_ in Formatter().parse(template)]
    except (TypeError, ValueError) as error:
        raise ChatError(f"{name}: {error}") from None
    for _, key in parts:
        if key is not None and key not in known:
            raise ChatError(f"{name}: has an unknown field {key!r}")
    return parts


def _constants(path: Path) -> dict[str, Any]:
    """Names and values of the texts and tables of numbers that a program assigns at its top level."""
    try:
        if path.stat().st_size > MAX_ENCODING:
            raise ChatError(f"{path}: is larger than {MAX_ENCODING} bytes")
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, ChatError):
            raise
        raise ChatError(f"{path}: cannot be read: {error}") from None
    found: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            target = node.targets[0]
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            target = node.target
        else:
            continue
        try:
            value = ast.literal_eval(node.value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue  # computed
        table = isinstance(value, dict) and all(type(n) is int for n in value.values())
        if isinstance(target, ast.Name) and (isinstance(value, str) or table):
            found[target.id] = value
    return found
