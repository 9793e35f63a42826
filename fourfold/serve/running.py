"""One request while the engine works on it: what was computed, sampled and said so far."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.model.cache import SequenceState
from fourfold.model.sequence import Document
from fourfold.model.vision import after_image
from fourfold.serve.prefix import extend_with_text, page_key, root_key
from fourfold.serve.request import Delta, Finished, Handle, Request, Usage
from fourfold.serve.sampler import StopFilter, make_generator, sample
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

    ``budget``: pages it may come to hold; ``cached``: positions that were found in the cache; ``published``: pages
    that the cache knows already; ``keys``: those of its full pages, as far as they were asked for.
    """

    def __init__(self, request: Request, handle: Handle, max_tokens: int, budget: int, grammar: Grammar) -> None:
        self.request = request
        self.handle = handle
        self.max_tokens = max_tokens
        self.budget = budget
        self.state = SequenceState()
        self.cached = 0
        self.published = 0
        self.keys: list[bytes] = []
        self._grammar = grammar
        self._generator = make_generator(request.sampling)
        self._parser = grammar.chat.parser(request.thinking, request.tools)
        self._stops = StopFilter(request.stop)
        self._ids: list[int] = []
        self._reasoning = 0
        self._called = False

    @property
    def prefilling(self) -> bool:
        return self.state.length < len(self.request.prompt)

    def chunk(self, limit: int) -> Document:
        """The next positions to compute: at most ``limit`` of the prompt, or the token sampled last."""
        if not self.prefilling:
            return Document.text(self._ids[-1:])
        return self.request.prompt.slice(self.state.length, min(self.state.length + limit, len(self.request.prompt)))

    def key(self, page: int, page_size: int) -> bytes:
        """The key of the full page number ``page``; its positions must be known."""
        prompt = self.request.prompt
        while len(self.keys) <= page:
            start, stop = len(self.keys) * page_size, (len(self.keys) + 1) * page_size
            # what a page holds of an image may depend on all of it
            content = prompt.slice(min(start, len(prompt)), after_image(prompt, min(stop, len(prompt))))
            generated = self._ids[max(start - len(prompt), 0) : max(stop - len(prompt), 0)]
            previous = self.keys[-1] if self.keys else root_key(self.request.salt)
            self.keys.append(page_key(previous, extend_with_text(content, generated)))
        return self.keys[page]

    def accept(self, logits: Tensor) -> bool:
        """Samples a token from ``logits`` (float [vocab]), tells the client, and returns whether it was the last."""
        id = self._next(logits)
        self._ids.append(id)
        self._reasoning += self._parser.channel == "reasoning"
        if id in self._grammar.stops:
            self._say_rest()
            self.finish("tool_calls" if self._called else "stop")
            return True
        if self._say(self._parser.feed(id)):
            self.finish("stop")
            return True
        if len(self._ids) == self.max_tokens:
            self._say_rest()
            self.finish("length")
            return True
        return False

    def finish(self, reason: str) -> None:
        usage = Usage.of(self.request.prompt, len(self._ids), self.cached, self._reasoning)
        self.handle.put(Finished(reason, usage))

    def _next(self, logits: Tensor) -> int:
        channel = self._parser.channel
        end = self._grammar.chat.end_of_thinking
        if channel == "reasoning" and end is not None and self._reasoning == self.request.thinking_budget:
            return end
        banned = self._grammar.banned(channel, self.request.tools)
        return sample(logits, self.request.sampling, self._generator, banned)

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
