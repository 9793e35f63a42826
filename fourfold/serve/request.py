"""What goes into the engine and what comes out of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue

from fourfold.model.sequence import AUDIO, IMAGE, TEXT, VIDEO, Document

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256


class RequestError(ValueError):
    """A request that can never be served as it is; ``field`` names what to change."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class EngineBusy(RuntimeError):
    """Too many requests wait already; the same request may be served later."""


class EngineError(RuntimeError):
    """The engine accepted the request and could not finish it."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 takes the likeliest; ``top_k`` 0 means no limit.

    One ``seed`` gives one answer, whatever else the engine does; without one each answer is new.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise RequestError("temperature", f"is {self.temperature}; must be between 0 and 2")
        if not 0 < self.top_p <= 1:
            raise RequestError("top_p", f"is {self.top_p}; must be above 0 and at most 1")
        if self.top_k < 0:
            raise RequestError("top_k", f"is {self.top_k}; must be 0 (no limit) or more")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise RequestError("seed", "must fit 64 bits")


@dataclass(frozen=True)
class Request:
    """One prompt (as positions) and how to go on from it.

    ``max_tokens`` None: up to the end of the context. ``thinking``: the prompt ends inside a reasoning, of
    at most ``thinking_budget`` tokens. ``tools``: tool calls may be emitted. ``stop`` strings end the answer
    (not the reasoning) and are left out of it. Requests share cached pages only if they have the same ``salt``.
    """

    prompt: Document
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    thinking: bool = False
    thinking_budget: int | None = None
    tools: bool = False
    salt: str = ""

    def __post_init__(self) -> None:
        if not len(self.prompt):
            raise RequestError("prompt", "is empty")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RequestError("max_tokens", f"is {self.max_tokens}; must be at least 1")
        if self.thinking_budget is not None and self.thinking_budget < 1:
            raise RequestError("thinking_budget", f"is {self.thinking_budget}; must be at least 1")
        if len(self.stop) > MAX_STOPS:
            raise RequestError("stop", f"has {len(self.stop)} strings; at most {MAX_STOPS} are allowed")
        if any(not 1 <= len(text) <= MAX_STOP_CHARACTERS for text in self.stop):
            raise RequestError("stop", f"strings must have 1 to {MAX_STOP_CHARACTERS} characters")


@dataclass(frozen=True)
class Usage:
    """Counts of positions. The prompt splits into cache hits and misses, and also by modality."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    text_tokens: int
    image_tokens: int
    video_tokens: int
    audio_tokens: int

    @staticmethod
    def of(prompt: Document, completion: int, cached: int, reasoning: int) -> Usage:
        counts = [int((prompt.modality == kind).sum()) for kind in (TEXT, IMAGE, VIDEO, AUDIO)]
        return Usage(len(prompt), completion, cached, reasoning, *counts)


@dataclass(frozen=True)
class Delta:
    """New text. ``kind``: ``reasoning``, ``content``, or ``tool_call`` (the JSON of a whole call)."""

    kind: str
    text: str


@dataclass(frozen=True)
class Finished:
    """The last event. ``reason``: ``stop``, ``length``, ``tool_calls`` or ``cancelled``."""

    reason: str
    usage: Usage


@dataclass(frozen=True)
class Failed:
    """The last event of a request that the engine had to give up."""

    error: EngineError


Event = Delta | Finished | Failed


class Handle:
    """The answer to one request, for one consumer: iterate it in a thread or in asyncio.

    Iterating yields :class:`Delta` events and ends with one :class:`Finished`; it raises
    :class:`EngineError` if the engine gave the request up.
    """

    def __init__(self) -> None:
        self.cancelled = False
        self._events: SimpleQueue[Event] = SimpleQueue()  # the engine never waits for a consumer that holds a lock
        self._wake: Callable[[], None] | None = None

    def cancel(self) -> None:
        """Nobody wants the answer any more; the engine ends it at its next step."""
        self.cancelled = True

    def put(self, event: Event) -> None:
        """Called by the engine, from its thread."""
        self._events.put(event)
        if wake := self._wake:
            try:
                wake()
            except RuntimeError:  # the consumer's event loop is closed
                self.cancelled = True

    def __iter__(self) -> Iterator[Delta | Finished]:
        while True:
            event = self._events.get()
            yield _checked(event)
            if isinstance(event, Finished):
                return

    async def __aiter__(self) -> AsyncIterator[Delta | Finished]:
        while True:
            for event in await self.next_events():
                yield event
                if isinstance(event, Finished):
                    return

    async def next_events(self, timeout: float | None = None) -> list[Delta | Finished]:
        """All events since the last call, at least one; none at all if ``timeout`` seconds passed without any."""
        loop, signal = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(signal.set)
        if not self._events.empty():  # asked after that, so that no event goes unnoticed
            signal.set()
        try:
            await asyncio.wait_for(signal.wait(), timeout)
        except TimeoutError:
            pass
        self._wake = None
        events = [self._events.get() for _ in range(self._events.qsize())]  # no one else takes any
        return [_checked(event) for event in events]


def _checked(event: Event) -> Delta | Finished:
    if isinstance(event, Failed):
        raise event.error
    return event
