"""One request while the engine works on it: what was computed, sampled and said so far."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.model.cache import SequenceState
from fourfold.model.sequence import Document
from fourfold.model.vision import after_image
from fourfold.serve.batch import Chunk
from fourfold.serve.prefix import extend_with_text, page_key, root_key, text_key
from fourfold.serve.request import Delta, Finished, Handle, Request, Usage
from fourfold.serve.sampler import Choice, StopFilter, draw, make_generator
from fourfold.text.formats import ChatFormat
from fourfold.text.stream import Channel


class Grammar:
    """Which special tokens may come next: the few that the chat format allows there, and never a role or medium."""

    def __init__(self, chat: ChatFormat, vocab_size: int) -> None:
        self.chat = chat
        self.stops = chat.stops
        tokenizer = chat.tokenizer
        unused = {id for id in range(vocab_size) if not tokenizer.has(id)}  # rows of the head without a token
        self._special = unused | {id for id in tokenizer.marks.values() if id < vocab_size}
        self._banned: dict[tuple[Channel, bool], Tensor] = {}

    def banned(self, channel: Channel, tools: bool) -> Tensor:
        """int64 [k]: the ids that may not come next in ``channel``."""
        if (channel, tools) not in self._banned:
            left = sorted(self._special - self.chat.allowed(channel, tools))
            self._banned[channel, tools] = torch.tensor(left, dtype=torch.int64)
        return self._banned[channel, tools]


class Running:
    """The live state of a request.

    ``order``: of arrival; ``budget``: pages it may come to hold; ``cached``: positions that were found in the cache,
    and not because the request itself had computed them; ``published``: pages that the cache knows already;
    ``saved``: pages that were offered to the disk; ``known``: positions from 0 on that the cache was found to hold;
    ``keys``: those of its full pages, as far as they were asked for; ``ids``: the answer so far; ``draft``: a guess
    of the token after it, one of ``drafted``, of which ``accepted`` were right.
    """

    def __init__(
        self, request: Request, handle: Handle, max_tokens: int, budget: int, grammar: Grammar, order: int = 0
    ) -> None:
        self.request = request
        self.handle = handle
        self.max_tokens = max_tokens
        self.budget = budget
        self.order = order
        self.state = SequenceState()
        self.cached = 0
        self.published = 0
        self.saved = 0
        self.known = 0
        self.keys: list[bytes] = []
        self.ids: list[int] = []
        self.draft: int | None = None
        self.drafted = self.accepted = 0
        self._computed = 0
        self._grammar = grammar
        self._generator = make_generator(request.sampling)
        self._point: float | None = None
        self._parser = grammar.chat.parser(request.thinking, request.tools)
        self._stops = StopFilter(request.stop)
        self._reasoning = 0
        self._called = False

    @property
    def total(self) -> int:
        """Positions known so far, those of the answer included; the last ones may not be computed yet."""
        return len(self.request.prompt) + len(self.ids)

    @property
    def prefilling(self) -> bool:
        """Whether there is more to compute than the token sampled last."""
        return not self.ids or self.state.length < self.total - 1

    def chunk(self, limit: int) -> Chunk:
        """The next positions to compute: at most ``limit`` of those known, or the last token with the guess."""
        if not self.prefilling:
            return self.ids[-1:] if self.draft is None else [self.ids[-1], self.draft]
        return self.content(self.state.length, min(self.state.length + limit, self.total))

    def content(self, start: int, stop: int) -> Document:
        """Positions start..stop-1 of prompt and answer."""
        prompt = self.request.prompt
        part = prompt.slice(min(start, len(prompt)), min(stop, len(prompt)))
        generated = self.ids[max(start - len(prompt), 0) : max(stop - len(prompt), 0)]
        return extend_with_text(part, generated) if generated else part

    def key(self, page: int, page_size: int) -> bytes:
        """The key of the full page number ``page``; its positions must be known."""
        prompt = self.request.prompt
        while len(self.keys) <= page:
            start, stop = len(self.keys) * page_size, (len(self.keys) + 1) * page_size
            previous = self.keys[-1] if self.keys else root_key(self.request.salt)
            if start >= len(prompt):
                self.keys.append(text_key(previous, self.ids[start - len(prompt) : stop - len(prompt)]))
            else:  # what a page holds of an image may depend on all of it
                self.keys.append(page_key(previous, self.content(start, after_image(prompt, stop))))
        return self.keys[page]

    def found(self, positions: int, history: list[int], tail: Tensor | None, pages: list[int]) -> None:
        """Takes over ``pages`` that hold the next ``positions``."""
        state = self.state
        state.pages += pages
        state.history += history
        state.tail = tail
        self.cached += max(0, state.length + positions - max(state.length, self._computed))
        state.length += positions
        self.published += len(pages)

    def tokens(self, start: int, stop: int) -> list[int]:
        """The ids at positions start..stop-1."""
        prompt = self.request.prompt.tokens
        generated = self.ids[max(start - len(prompt), 0) : max(stop - len(prompt), 0)]
        return prompt[start:stop].tolist() + generated if start < len(prompt) else generated

    def computed(self, start: int) -> Chunk:
        """What the positions from ``start`` to the last computed one hold."""
        stop = self.state.length
        return self.tokens(start, stop) if start >= len(self.request.prompt) else self.content(start, stop)

    def settle_draft(self) -> bool:
        """Whether the token sampled last is the guess; if not, what was computed for the guess is taken back."""
        right = self.ids[-1] == self.draft
        if not right:
            self.state.length -= 1
            self.state.history.pop()
        self.drafted, self.accepted = self.drafted + 1, self.accepted + right
        self.draft = None
        return right

    def forget(self) -> list[int]:
        """Drops all that was computed, but nothing that was said; returns the pages, still held."""
        pages = self.state.pages
        self.state = SequenceState()
        self.published, self.saved, self.draft = 0, 0, None
        return pages

    def interrupt(self) -> list[int]:
        """As :meth:`forget`; finding again what the request itself computed is no cache hit."""
        self._computed = max(self._computed, self.state.length)
        return self.forget()

    def forced(self) -> int | None:
        """The token that must come next, if nothing is to be sampled: the end of a reasoning over its budget."""
        end = self._grammar.chat.end_of_thinking
        over = self._parser.channel == "reasoning" and self._reasoning == self.request.thinking_budget
        return end if over else None

    def choice(self) -> Choice:
        """How to sample the next token. Its point stays the same until :meth:`accept`, so a guess may look at it."""
        sampling = self.request.sampling
        if self._point is None:
            self._point = draw(self._generator) if sampling.temperature else 0.0
        return Choice(sampling, self._grammar.banned(self._parser.channel, self.request.tools), self._point)

    def accept(self, id: int, forced: bool = False) -> str | None:
        """Goes on with the token ``id``, tells the client, and returns why it was the last, or None."""
        if not forced:
            self._point = None
        self.ids.append(id)
        self._reasoning += self._parser.channel == "reasoning"
        if id in self._grammar.stops:
            self._say_rest()
            return "tool_calls" if self._called else "stop"
        if self._say(self._parser.feed(id)):
            return "stop"
        if len(self.ids) == self.max_tokens:
            self._say_rest()
            return "length"
        return None

    def finish(self, reason: str) -> None:
        """The last event; to be sent when all that the request held is given back."""
        usage = Usage.of(self.request.prompt, len(self.ids), self.cached, self._reasoning)
        self.handle.put(Finished(reason, usage))

    def _say(self, events: list[tuple[str, str]]) -> bool:
        """Passes events on; True if a stop string ended the answer."""
        for kind, text in events:
            stopped = False
            if kind == "content":
                text, stopped = self._stops.feed(text)
            self._called |= kind == "tool_call"
            if text:
                self.handle.put(Delta(kind, text))
            if stopped:
                return True
        return False

    def _say_rest(self) -> None:
        if not self._say(self._parser.finish()):
            rest = self._stops.flush()
            if rest:
                self.handle.put(Delta("content", rest))
