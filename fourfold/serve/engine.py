"""The engine: one thread that serves all requests together, one packed forward a step.

A step computes the next token of every sequence that decodes and, beside them, at most ``prefill_tokens`` positions
of prompts, which take turns; so a long prompt delays nobody by more than one chunk. ``scheduler`` says which.
"""

from __future__ import annotations

import logging
import threading
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from fourfold import ops
from fourfold.media.processor import build_document
from fourfold.model.cache import Cache, PagePool, layout
from fourfold.model.sequence import Document
from fourfold.model.transformer import Model
from fourfold.ops.cpu.threads import without_openmp
from fourfold.serve.batch import pack_step
from fourfold.serve.disk import PageDirectory, fingerprint
from fourfold.serve.memory import make_budget, size
from fourfold.serve.pagefile import PageFile
from fourfold.serve.prefix import PrefixStore
from fourfold.serve.request import EngineBusy, EngineError, Failed, Handle, Request, RequestError
from fourfold.serve.running import Grammar, Running
from fourfold.serve.sampler import sample_rows
from fourfold.serve.scheduler import Batch, Scheduler
from fourfold.serve.speculate import MODES, Speculator, can_speculate
from fourfold.text.chat import Message, Piece
from fourfold.text.formats import ChatFormat, default_chat
from fourfold.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

DISK_CACHE = 10 * 2**30  # bytes
LIGHT = 1 << 28  # products with dense weights in a step: for fewer, a few milliseconds of a core, no threads are woken
WAITING = 32  # rows that a weight is multiplied with while it comes from memory


class Engine:
    """Serves a model to many clients at once, in its ``chat`` format (default: the native one).

    ``memory``: bytes that weights, cache and workspace may take together (default: a cache of four full contexts, if
    1 GiB holds them); ``pages``: size of the cache in pages of ``page_size`` positions, whatever ``memory`` would
    allow; ``cache_format``: of the rows in them, one of ``ops.ROW_FORMATS`` (default: the dtype of the weights);
    ``context_pages``: a directory for a temporary file of at most ``context_pages_size`` bytes that the pages lie in,
    so that ``memory`` bounds how many of them are in RAM and not how many there are; ``context_cache``: a directory
    that keeps prefixes on disk, at most ``context_cache_size`` bytes of them;
    ``speculate``: whether the model's MTP block guesses tokens ahead: "on", "off", or "auto", which is while few
    sequences decode and the guesses are right; ``max_running``: sequences in a step; ``max_waiting``: requests that may
    queue; ``prefill_tokens``: prompt positions computed in a step. Thread-safe; close it (or use it in a ``with``) to
    end its thread.

    Raises MemoryTooSmall if the model does not fit, ValueError or OSError if the directory cannot be used.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        chat: ChatFormat | None = None,
        *,
        memory: int | None = None,
        pages: int | None = None,
        page_size: int = 16,
        cache_format: str | None = None,
        context_pages: Path | None = None,
        context_pages_size: int = DISK_CACHE,
        context_cache: Path | None = None,
        context_cache_size: int = DISK_CACHE,
        speculate: str = "off",
        max_running: int = 32,
        max_waiting: int = 256,
        prefill_tokens: int = 256,
    ) -> None:
        if speculate not in MODES:
            raise ValueError(f"speculate: is {speculate!r}; choose one of {', '.join(MODES)}")
        if speculate == "on" and not can_speculate(model):
            raise ValueError("speculate: this model has no MTP block whose guesses could be taken back")
        if cache_format not in (None, *ops.ROW_FORMATS):
            raise ValueError(f"cache_format: is {cache_format!r}; choose one of {', '.join(ops.ROW_FORMATS)}")
        guesses = speculate != "off" and can_speculate(model)
        parameter = next(model.parameters())
        dtype = ops.ROW_FORMATS[cache_format] if cache_format else parameter.dtype
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.chat = chat or default_chat(tokenizer)
        self.config = model.cfg
        self.budget = make_budget(
            model, memory=memory, pages=pages, page_size=page_size, positions=prefill_tokens + max_running,
            sequences=max_running, mtp=guesses, cache_dtype=dtype,
            file=None if context_pages is None else context_pages_size,
        )  # fmt: skip
        self.pages, self.page_size = self.budget.pages, self.budget.page_size
        self.max_waiting = max_waiting
        self._device = parameter.device
        dense = sum(p.numel() for p in model.parameters() if p.dim() == 2 and p.is_floating_point())
        self._light = LIGHT // max(dense, 1) if self._device.type == "cpu" and dense * WAITING <= LIGHT else 0
        self._file = None
        if context_pages is not None:
            if parameter.device.type != "cpu":
                raise ValueError("context_pages: a file holds the pages of a model on the CPU alone")
            kept = layout(self.config, guesses, dtype)
            self._file = PageFile(Path(context_pages), kept, self.pages, self.page_size, self.budget.rows)
        self._pool = PagePool(
            self.config, self.pages, self.page_size, dtype, parameter.device, guesses, backing=self._file
        )
        self._speculator = Speculator(model, self._pool, speculate) if guesses else None
        self._prefixes = PrefixStore(self._pool, self.budget.max_tails)
        self._disk = None
        if context_cache is not None:
            mark = fingerprint(model, self._pool)
            self._disk = PageDirectory(Path(context_cache), context_cache_size, mark, self._pool)
        self._grammar = Grammar(self.chat, self.config.vocab_size)
        self._changed = threading.Condition()
        self._scheduler = Scheduler(
            self._pool,
            self._prefixes,
            self._changed,
            max_running=max_running,
            prefill_tokens=prefill_tokens,
            whole_images=self.config.media.vision is not None,
            disk=self._disk,
        )
        self._submitted = self._steps = 0
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
        """Requests ``running`` and ``waiting``; pages in all, ``free``, and ``cached`` for prefixes, in memory and on
        disk (with its bytes); since the start: ``steps``, and ``preemptions`` of requests."""
        stats = {
            "running": len(self._scheduler.running),
            "waiting": len(self._scheduler.waiting),
            "pages": self.pages,
            "free_pages": self._pool.free,
            "cached_pages": len(self._prefixes),
            "steps": self._steps,
            "preemptions": self._scheduler.preemptions,
        }
        if self._file is not None:
            stats |= {"resident_bytes": self._file.resident, "evicted_rows": self._file.evicted}
        if self._disk is not None:
            stats |= {"disk_pages": len(self._disk), "disk_bytes": self._disk.used}
        if self._speculator is not None:
            stats |= {"drafted_tokens": self._speculator.drafted, "accepted_tokens": self._speculator.accepted}
        return stats

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
        with self._changed:
            if not self.alive:
                raise EngineError("the engine has stopped")
            waiting = self._scheduler.waiting
            if len(waiting) >= self.max_waiting:
                raise EngineBusy(f"{len(waiting)} requests are waiting already; try again later")
            self._submitted += 1
            waiting.append(Running(request, handle, max_tokens, budget, self._grammar, self._submitted))
            self._changed.notify()
        return handle

    def close(self) -> None:
        """Ends the thread; requests that are not finished fail with EngineError."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        if self._speculator is not None:
            self._speculator.close()
        if self._disk is not None:
            self._disk.close()
            self._disk = self._scheduler.disk = None

    def _measure(self, request: Request) -> tuple[int, int]:
        """How many tokens the answer may have, and how many pages prompt and answer may take."""
        context, prompt = self.config.max_position_embeddings, len(request.prompt)
        if prompt >= context:
            raise RequestError("prompt", f"has {prompt} tokens; the context holds {context}, the answer included")
        held = self.pages * self.page_size  # the last token of an answer is never fed back, so one more is possible
        if prompt > held:
            raise RequestError("prompt", f"has {prompt} tokens; {self._lack(prompt)}")
        max_tokens = request.max_tokens or min(context, held + 1) - prompt
        if prompt + max_tokens > context:
            raise RequestError(
                "max_tokens",
                f"is {max_tokens}; the prompt has {prompt} tokens and the context holds {context}, "
                f"so at most {context - prompt} are possible",
            )
        if prompt + max_tokens - 1 > held:
            raise RequestError(
                "max_tokens",
                f"is {max_tokens}; with a prompt of {prompt} tokens {self._lack(prompt + max_tokens - 1)}, "
                f"so at most {held + 1 - prompt} are possible",
            )
        return max_tokens, self._pool.pages_for(prompt + max_tokens - 1)

    def _lack(self, positions: int) -> str:
        wanted = self._pool.pages_for(positions)
        return (
            f"this takes {wanted} cache pages of {self.page_size} positions, and the cache has {self.pages} "
            f"({size(wanted * self.budget.page)} needed, {size(self.pages * self.budget.page)} available)"
        )

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closing or self._scheduler.waiting or self._scheduler.running)
                if self._closing:
                    return
                if batch := self._scheduler.next_batch():
                    self._steps += 1
                    light = sum(len(chunk) for _, chunk in batch) <= self._light
                    with without_openmp() if light else nullcontext():
                        self._forward(batch)
        except Exception:  # a fault of the engine itself: nothing can be trusted any more
            log.exception("the engine has stopped")
        finally:
            with self._changed:
                self._closing = True
                left = [*self._scheduler.running, *self._scheduler.waiting]
                self._scheduler.running.clear()
                self._scheduler.waiting.clear()
            for running in left:
                running.handle.put(Failed(EngineError("the engine has stopped")))

    def _forward(self, batch: Batch) -> None:
        """Computes the chunks together. If that fails, each one alone, so that only the guilty request fails."""
        before = [(r.state.length, len(r.state.history), r.state.tail) for r, _ in batch]
        try:
            states = [r.state for r, _ in batch]
            packed = pack_step([chunk for _, chunk in batch], [s.length for s in states]).to(self._device)
            with torch.inference_mode():
                logits = self.model(packed, cache=Cache(self._pool, states), logits="target").logits.float().cpu()
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
        self._advance(batch, [length for length, _, _ in before], logits)

    def _advance(self, batch: Batch, starts: list[int], logits: Tensor) -> None:
        """Takes the next tokens of each sequence that is computed so far and publishes the pages that are full now.

        starts: the length of each before; logits: [rows, vocab], a row for each id or for a document's last position.
        """
        finite = logits.isfinite().all(-1).tolist()
        first, row, at, begins = [], 0, 0, []
        for _, chunk in batch:
            first.append(row)
            begins.append(at)
            row += len(chunk) if isinstance(chunk, list) else 1
            at += len(chunk)
        good = []
        for n, (running, _) in enumerate(batch):
            if all(finite[first[n] : first[n + 1] if n + 1 < len(first) else row]):
                good.append(n)
            else:
                self._fail(running, FloatingPointError("the model's output is not finite"))
        ready = [n for n in good if batch[n][0].state.length >= batch[n][0].total]
        ended = self._extend([batch[n][0] for n in ready], logits[[first[n] for n in ready]])
        right = [n for n in ready if batch[n][0].draft is not None and self._settle(batch[n][0], ended)]
        if right:
            ended |= self._extend([batch[n][0] for n in right], logits[[first[n] + 1 for n in right]])
        running_now = set(self._scheduler.running)
        for n in good:
            running = batch[n][0]
            if running in running_now:
                self._scheduler.publish(running)
                if reason := ended.get(running):
                    running_now.discard(running)
                    self._scheduler.retire(running)
                    running.finish(reason)
        if self._speculator is not None:
            left = [(batch[n][0], begins[n], starts[n]) for n in good if batch[n][0] in running_now]
            try:
                self._speculator.guess(left)
            except Exception:  # an answer needs no guesses
                log.exception("guessing tokens ahead failed")

    def _settle(self, running: Running, ended: dict[Running, str]) -> bool:
        """Whether the guess was right, and the answer goes on after it."""
        if running not in self._scheduler.running:  # it has failed
            return False
        right = running.settle_draft()
        assert self._speculator is not None
        self._speculator.settled(right)
        return right and running not in ended

    def _extend(self, batch: list[Running], logits: Tensor) -> dict[Running, str]:
        """Chooses the next token of each sequence. Returns those that end with it, and why.

        logits: [len(batch), vocab].
        """
        forced = [running.forced() for running in batch]
        free = [row for row, id in enumerate(forced) if id is None]
        sampled = sample_rows(logits[free], [batch[row].choice() for row in free]) if free else []
        ids = dict(zip(free, sampled, strict=True))
        ended = {}
        for row, running in enumerate(batch):
            try:
                if reason := running.accept(ids.get(row, forced[row] or 0), forced[row] is not None):
                    ended[running] = reason
            except Exception as error:
                self._fail(running, error)
        return ended

    def _fail(self, running: Running, error: Exception) -> None:
        log.error("a request failed", exc_info=error)
        # Not-finite numbers must not stay behind: masked positions of a page's next owner would spread them.
        own = [page for page in running.state.pages if self._pool.references(page) == 1]
        self._pool.data[self._pool.use_all(own)] = 0
        self._scheduler.retire(running)
        running.handle.put(Failed(EngineError(f"the model failed on this request: {error}")))
