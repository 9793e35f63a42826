"""Aggregate tokens a second of the engine with many streams at once, beside one stream alone.

Each stream has a prompt of its own and a sampled answer that cannot end early; times count from when every stream has
its first token. ``--profile`` says where the time of a step goes.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

from _report import case, finish, median, parser

import fourfold as ff
from fourfold.model.sequence import Document
from fourfold.model.transformer import Model
from fourfold.serve import engine
from fourfold.serve.local import LocalModel
from fourfold.serve.request import Delta, Handle, Request, Sampling
from fourfold.serve.running import Running
from fourfold.serve.scheduler import Scheduler
from fourfold.text.formats import ChatFormat


def endless(chat: ChatFormat) -> ChatFormat:
    """The same format, but no answer may end by itself."""
    made = copy.copy(chat)
    made.allowed = lambda channel, tools: chat.allowed(channel, tools) - chat.stops  # type: ignore[method-assign]
    return made


def rate(model: LocalModel, streams: int, prompt: int, answer: int, run: int) -> float:
    """Tokens a second of all streams together, between the last one's first token and the first one's last."""
    arrivals: list[list[float]] = [[] for _ in range(streams)]

    def listen(n: int) -> None:
        ids = [0, 4, *(((run * 97 + n) * 7919 + i * 31) % 3000 + 300 for i in range(prompt - 4)), 5, 8]
        request = Request(Document.text(ids), Sampling(1.0, seed=n), answer)
        for event in model.engine.submit(request):
            if isinstance(event, Delta):
                arrivals[n].append(time.perf_counter())

    threads = [threading.Thread(target=listen, args=(n,)) for n in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    start, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    return sum(sum(start < t <= end for t in times) for times in arrivals) / (end - start)


class Profile:
    """Milliseconds that each phase of the engine's steps takes, those of the phases inside it left out."""

    PHASES = {
        "schedule": (Scheduler, "next_batch"),
        "pack": (engine, "pack_step"),
        "rest of the model": (Model, "forward"),
        "head": (Model, "head"),
        "sample": (engine, "sample_rows"),
        "parse, say": (Running, "accept"),
        "wake clients": (Handle, "put"),
        "publish pages": (Scheduler, "publish"),
        "rest of the step": (engine.Engine, "_forward"),
    }

    def __init__(self, model: LocalModel) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._inside = 0.0
        for name, (owner, attribute) in self.PHASES.items():
            setattr(owner, attribute, self._timed(name, getattr(owner, attribute)))
        for block in model.model.layers:
            for name, module in (
                ("attention", block.self_attn),
                ("streams", block.attn_residual),
                ("streams", block.mlp_residual),
                ("experts, MLP", block.mlp),
            ):
                module.forward = self._timed(name, module.forward)
        for module in model.model.engrams.values():
            module.forward = self._timed("engram", module.forward)
        self._engine, self._since = model.engine, 0
        self._began = self._burnt = 0.0

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            outside, self._inside = self._inside, 0.0
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - began
                self._seconds[name] += spent - self._inside
                self._inside = outside + spent

        return timed

    def start(self) -> None:
        self._seconds.clear()
        self._since = self._engine.stats()["steps"]
        self._began, self._burnt = time.perf_counter(), time.process_time()

    def show(self, title: str) -> None:
        steps = self._engine.stats()["steps"] - self._since
        wall, burnt = time.perf_counter() - self._began, time.process_time() - self._burnt
        print(f"{title}: {1e3 * wall / steps:.2f} ms a step, {1e3 * burnt / steps:.2f} ms of processors")
        for name, seconds in sorted(self._seconds.items(), key=lambda entry: -entry[1]):
            print(f"  {name:18}{1e3 * seconds / steps:8.3f} ms {seconds / wall:6.1%}")


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--model", default="nano")
    flags.add_argument("--quant", choices=("int8", "int4"))
    flags.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32])
    flags.add_argument("--prompt", type=int, default=64)
    flags.add_argument("--answer", type=int, default=200)
    flags.add_argument("--profile", action="store_true", help="print where the time of a step goes, after the warm-up")
    args = flags.parse_args()
    model = ff.load(args.model, quant=args.quant)
    model.chat = endless(model.chat)
    profile = Profile(model) if args.profile else None
    rates: dict[int, list[float]] = {n: [] for n in args.streams}
    for run in range(args.repeats + 1):
        for streams, found in rates.items():
            if profile:
                profile.start()
            made = rate(model, streams, args.prompt, args.answer, run)
            if run:  # the first warms up
                found.append(made)
                if profile:
                    profile.show(f"{streams} streams")
    model.close()
    alone = median(rates[args.streams[0]])
    cases: dict[str, Any] = {}
    for streams, found in rates.items():
        name = f"{args.model} {args.quant or 'float32'}, {streams} streams"
        cases[name] = case(median(found), alone, None, "tokens/s", found, peer_name=f"{args.streams[0]} stream")
    finish(cases, args.json)


if __name__ == "__main__":
    main()
