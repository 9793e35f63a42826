"""The engine: one thread that serves all requests together, one packed forward a step.

A step computes one token of every sequence that decodes and, beside them, at most ``prefill_tokens`` positions
of prompts, which take turns; so a long prompt delays nobody by more than one chunk. A request is admitted when
the pages that it may come to need are free or can be freed, so no running request is ever interrupted.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque

import torch
from torch import Tensor

from fourfold.media.processor import build_document
from fourfold.model.cache import Cache, PagePool, SequenceState, layout, page_numbers
from fourfold.model.sequence import TEXT, Document, pack
from fourfold.model.transformer import Model
from fourfold.model.vision import after_image
from fourfold.serve.prefix import PrefixStore
from fourfold.serve.request import EngineBusy, EngineError, Failed, Handle, Request, RequestError
from fourfold.serve.running import Grammar, Running
from fourfold.text.chat import Message, Piece
from fourfold.text.formats import ChatFormat, default_chat
from fourfold.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

DEFAULT_CACHE = 2**30  # bytes
TAIL_CACHE = 2**28  # bytes that the tails of prefixes may take


class Engine:
    """Serves a model to many clients at once, in its ``chat`` format (default: the native one).

    ``pages``: size of the cache in pages of ``page_size`` positions (default: four full contexts, if 1 GiB holds them);
    ``max_running``: sequences in a step; ``max_waiting``: requests that may queue; ``prefill_tokens``: prompt
    positions computed in a step. Thread-safe; close it (or use it in a ``with``) to end its thread.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        chat: ChatFormat | None = None,
        *,
        pages: int | None = None,
        page_size: int = 16,
        max_running: int = 32,
        max_waiting: int = 256,
        prefill_tokens: int = 256,
    ) -> None:
        parameter = next(model.parameters())
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.chat = chat or default_chat(tokenizer)
        self.config = model.cfg
        kept = layout(self.config)
        page_size = math.lcm(page_size, kept.multiple)
        page_bytes = page_numbers(kept, page_size) * parameter.element_size()
        four_contexts = -(-4 * self.config.max_position_embeddings // page_size)
        self.pages = pages or max(1, min(four_contexts, DEFAULT_CACHE // page_bytes))
        self.page_size = page_size
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.prefill_tokens = prefill_tokens
        self._device = parameter.device
        self._pool = PagePool(self.config, self.pages, page_size, parameter.dtype, parameter.device)
        self._prefixes = PrefixStore(self._pool, max_tails=max(1, TAIL_CACHE // (4 * kept.tail_width or 1)))
        self._grammar = Grammar(self.chat, self.config.vocab_size)
        self._waiting: deque[Running] = deque()
        self._running: list[Running] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="fourfold-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def stats(self) -> dict[str, int]:
        """Requests ``running`` and ``waiting``; pages in all, ``free``, and ``cached`` for prefixes."""
        return {
            "running": len(self._running),
            "waiting": len(self._waiting),
            "pages": self.pages,
            "free_pages": self._pool.free,
            "cached_pages": len(self._prefixes),
        }

    def encode(
        self,
        messages: list[Message],
        tools: list[dict] | None = None,
        thinking: bool = False,
        effort: str | int | None = None,
    ) -> Document:
        """The prompt of a conversation. Raises ValueError (MediaError for media that the model cannot take)."""
        return self._document(self.chat.encode(messages, tools, thinking, effort))

    def encode_text(self, text: str) -> Document:
        """The prompt of a plain text to go on with."""
        return self._document(self.chat.continue_text(text))

    def _document(self, pieces: list[Piece]) -> Document:
        return build_document(pieces, self.config.media, self.tokenizer)

    def submit(self, request: Request) -> Handle:
        """Queues a request. Raises RequestError if it can never fit, EngineBusy or EngineError if it is not taken."""
        max_tokens, budget = self._measure(request)
        handle = Handle()
        running = Running(request, handle, max_tokens, budget, self._grammar)
        with self._changed:
            if not self.alive:
                raise EngineError("the engine has stopped")
            if len(self._waiting) >= self.max_waiting:
                raise EngineBusy(f"{len(self._waiting)} requests are waiting already; try again later")
            self._waiting.append(running)
            self._changed.notify()
        return handle

    def close(self) -> None:
        """Ends the thread; requests that are not finished fail with EngineError."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _measure(self, request: Request) -> tuple[int, int]:
        """How many tokens the answer may have, and how many pages prompt and answer may take."""
        context, prompt = self.config.max_position_embeddings, len(request.prompt)
        if prompt >= context:
            raise RequestError("prompt", f"has {prompt} tokens; the context holds {context}, the answer included")
        max_tokens = request.max_tokens or context - prompt
        if prompt + max_tokens > context:
            raise RequestError(
                "max_tokens",
                f"is {max_tokens}; the prompt has {prompt} tokens and the context holds {context}, "
                f"so at most {context - prompt} are possible",
            )
        budget = self._pool.pages_for(prompt + max_tokens - 1)  # the last token is never fed back
        if budget > self.pages:
            raise RequestError(
                "max_tokens",
                f"is {max_tokens}; with a prompt of {prompt} tokens this takes {budget} cache pages of "
                f"{self.page_size} positions, and the cache has {self.pages}",
            )
        return max_tokens, budget

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closing or self._waiting or self._running)
                if self._closing:
                    return
                self._step()
        except Exception:  # a fault of the engine itself: nothing can be trusted any more
            log.exception("the engine has stopped")
        finally:
            with self._changed:
                self._closing = True
                left = [*self._running, *self._waiting]
                self._running.clear()
                self._waiting.clear()
            for running in left:
                running.handle.put(Failed(EngineError("the engine has stopped")))

    def _step(self) -> None:
        self._drop_cancelled()
        self._admit()
        batch = [(r, r.chunk(1)) for r in self._running if not r.prefilling]
        left = self.prefill_tokens
        prefilling = [r for r in self._running if r.prefilling]
        for running in prefilling:
            if left <= 0:
                break
            self._reuse(running)
            chunk = running.chunk(self._portion(running, left))
            left -= len(chunk)
            batch.append((running, chunk))
            self._running.remove(running)  # to the end of the line: prompts take turns
            self._running.append(running)
        if batch:
            self._forward(batch)

    def _drop_cancelled(self) -> None:
        for running in [r for r in self._running if r.handle.cancelled]:
            running.finish("cancelled")
            self._retire(running)
        with self._changed:
            dropped = [r for r in self._waiting if r.handle.cancelled]
            for running in dropped:
                self._waiting.remove(running)
        for running in dropped:
            running.finish("cancelled")

    def _admit(self) -> None:
        """Takes waiting requests in, first come first served, while every page they may need is sure to be there."""
        while self._waiting and len(self._running) < self.max_running:
            running = self._waiting[0]
            self._reuse(running)
            promised = sum(r.budget - len(r.state.pages) for r in [*self._running, running])
            if promised > self._pool.free + self._prefixes.evictable:
                self._release(running)
                return
            with self._changed:
                self._waiting.popleft()
            self._running.append(running)

    def _reuse(self, running: Running) -> None:
        """Takes over cached pages that hold the next positions of the prompt; the last one is always computed."""
        state, prompt, size = running.state, running.request.prompt, self.page_size
        if state.length % size:
            return
        found: list[int] = []
        usable, tail = 0, None
        while state.length + (len(found) + 1) * size < len(prompt):
            key = running.key(state.length // size + len(found), size)
            page = self._prefixes.get(key)
            if page is None:
                break
            found.append(page)
            if self._cuts_image(prompt, state.length + len(found) * size):
                continue
            if not self._pool.layout.tail_width:
                usable = len(found)
            elif (known := self._prefixes.tail(key)) is not None:
                usable, tail = len(found), known
        if not usable:
            return
        self._pool.retain(found[:usable])
        state.pages += found[:usable]
        content = prompt.slice(state.length, state.length + usable * size)
        state.history += torch.where(content.modality == TEXT, content.tokens, -1).tolist()
        state.length += usable * size
        state.tail = tail
        running.cached += usable * size
        running.published += usable

    def _portion(self, running: Running, limit: int) -> int:
        """How much of a prompt to compute now: to the end of a page where there is a tail, so that it can be kept, and
        past the end of an image that a tower must see whole."""
        start, prompt = running.state.length, running.request.prompt
        stop = min(start + limit, len(prompt))
        if self._pool.layout.tail_width:
            ends = range(stop - stop % self.page_size, start, -self.page_size)
            stop = next((end for end in ends if not self._cuts_image(prompt, end)), stop)
        return (after_image(prompt, stop) if self._cuts_image(prompt, stop) else stop) - start

    def _cuts_image(self, prompt: Document, position: int) -> bool:
        """Whether a chunk that ends before ``position`` would hold a part of an image, which a tower cannot see."""
        return self.config.media.vision is not None and after_image(prompt, position) != position

    def _forward(self, batch: list[tuple[Running, Document]]) -> None:
        """Computes the chunks together. If that fails, each one alone, so that only the guilty request fails."""
        before = [(r.state.length, len(r.state.history), r.state.tail) for r, _ in batch]
        try:
            states = [r.state for r, _ in batch]
            self._prefixes.make_room(sum(self._new_pages(r, chunk) for r, chunk in batch))
            packed = pack([chunk for _, chunk in batch], starts=[s.length for s in states]).to(self._device)
            with torch.inference_mode():
                logits = self.model(packed, cache=Cache(self._pool, states), logits="last").logits.float().cpu()
        except Exception as error:
            for (running, _), (length, history, tail) in zip(batch, before, strict=True):
                running.state.length, running.state.tail = length, tail
                del running.state.history[history:]
            if len(batch) > 1:
                for one in batch:
                    self._forward([one])
            else:
                self._fail(batch[0][0], error)
            return
        for (running, _), row in zip(batch, logits, strict=True):
            self._advance(running, row)

    def _new_pages(self, running: Running, chunk: Document) -> int:
        return self._pool.pages_for(running.state.length + len(chunk)) - len(running.state.pages)

    def _advance(self, running: Running, logits: Tensor) -> None:
        """Publishes the pages that are full now and, once the prompt is computed, takes the next token."""
        try:
            if not torch.isfinite(logits).all():
                raise FloatingPointError("the model's output is not finite")
            full = running.state.length // self.page_size
            for number in range(running.published, full):
                ends_here = (number + 1) * self.page_size == running.state.length
                tail = running.state.tail if ends_here else None
                self._prefixes.put(running.key(number, self.page_size), running.state.pages[number], tail)
            running.published = full
            if not running.prefilling and running.accept(logits):
                self._retire(running)
        except Exception as error:
            self._fail(running, error)

    def _fail(self, running: Running, error: Exception) -> None:
        log.error("a request failed", exc_info=error)
        running.handle.put(Failed(EngineError(f"the model failed on this request: {error}")))
        # Not-finite numbers must not stay behind: masked positions of a page's next owner would spread them.
        own = [page for page in running.state.pages if self._pool.references(page) == 1]
        self._pool.data[own] = 0
        self._retire(running)

    def _retire(self, running: Running) -> None:
        self._running.remove(running)
        self._prefixes.touch(running.keys)
        self._release(running)

    def _release(self, running: Running) -> None:
        """Gives all pages back, as if nothing had been computed."""
        self._pool.release(running.state.pages)
        running.state = SequenceState()
        running.cached = running.published = 0
