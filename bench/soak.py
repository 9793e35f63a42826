"""Random clients on one engine for a while: nothing may fail, and memory must stay where it is.

Conversations that go on, cold prompts, images, seeds, stops, tiny and huge budgets, cancellations and refused requests,
in a cache too small for all, with prefixes on disk and guesses ahead. After a warm-up the resident memory is watched.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np

import fourfold
from fourfold.serve.engine import Engine
from fourfold.serve.request import EngineBusy, Finished, Request, RequestError, Sampling
from fourfold.text.chat import Media, Message

WORDS = "the quick brown fox jumps over a lazy dog and counts 12 red squares then 7 blue ones".split()
GROWTH = 0.05  # of the memory after warming up, or 32 MiB if that is more


def resident() -> int:
    """Bytes of this process in memory."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


class Client:
    """One user: asks, reads (or leaves), and asks again, often in the same conversation."""

    def __init__(self, engine: Engine, number: int, counts: Counter[str]) -> None:
        self.engine, self.counts = engine, counts
        self.rng = random.Random(number)
        self.salt = str(number % 3)
        self.messages: list[Message] = []

    def question(self) -> list[str | Media]:
        rng = self.rng
        parts: list[str | Media] = [" ".join(rng.choices(WORDS, k=rng.choice([1, 5, 30, 150])))]
        if "image" in self.engine.config.media.modalities and rng.random() < 0.2:
            side = rng.choice([8, 24, 40])
            pixels = np.random.default_rng(rng.randrange(4)).integers(0, 256, (side, side, 3)).astype(np.uint8)
            parts.insert(0, Media("image", pixels))
        return parts

    def turn(self) -> None:
        rng, counts = self.rng, self.counts
        if rng.random() < 0.3:
            self.messages = []
        self.messages.append(Message("user", self.question()))
        sampling = Sampling(
            rng.choice([0.0, 0.7, 1.0, 1.5]), rng.choice([1.0, 0.9]), rng.choice([0, 40]), rng.choice([None, 7])
        )
        limit = rng.choice([1, 8, 32, 200, 400, 10**6])
        prompt = self.engine.encode(self.messages, thinking=(thinking := rng.random() < 0.2))
        try:
            handle = self.engine.submit(
                Request(prompt, sampling, limit, ("dog",) if rng.random() < 0.2 else (), thinking, salt=self.salt)
            )
        except (RequestError, EngineBusy) as refused:
            counts[type(refused).__name__] += 1
            self.messages = []
            return
        patience = rng.choice([0, 3, 10, 10**6, 10**6, 10**6])
        text = ""
        for seen, event in enumerate(handle):
            if isinstance(event, Finished):
                counts[event.reason] += 1
                counts["tokens"] += event.usage.completion_tokens
                counts["prompt"] += event.usage.prompt_tokens
                counts["cached"] += event.usage.cached_tokens
            else:
                text += event.text if event.kind == "content" else ""
                if seen == patience:
                    handle.cancel()
        self.messages.append(Message("assistant", text))


def soak(engine: Engine, minutes: float, clients: int) -> dict[str, object]:
    """Runs ``clients`` threads for ``minutes``, and says what they saw and how the memory went."""
    counts: Counter[str] = Counter()
    errors: list[str] = []
    end = time.monotonic() + 60 * minutes

    def run(number: int) -> None:
        client = Client(engine, number, counts)
        while time.monotonic() < end and not errors:
            try:
                client.turn()
            except Exception as error:
                errors.append(repr(error))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    memory = []
    while any(thread.is_alive() for thread in threads):
        time.sleep(min(5.0, 6 * minutes))
        gc.collect()
        memory.append(resident())
    for thread in threads:
        thread.join()
    stats = engine.stats()
    if not engine.alive:
        errors.append("the engine has stopped")
    if stats["running"] or stats["waiting"] or stats["free_pages"] + stats["cached_pages"] != stats["pages"]:
        errors.append(f"pages are lost: {stats}")
    half = len(memory) // 2
    grown = max(memory[half:]) - max(memory[: half or 1])
    if grown > max(GROWTH * memory[half], 32 * 2**20):
        errors.append(f"memory grew by {grown} bytes in the second half")
    return {"errors": errors, "counts": dict(counts), "stats": stats, "memory": memory, "grown": grown}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--pages", type=int, default=120, help="cache pages of 16 positions; few, so that it is hard")
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args()
    model = fourfold.load(args.model)
    with tempfile.TemporaryDirectory() as directory:
        options = {"pages": args.pages, "context_cache": directory, "context_cache_size": 32 * 2**20}
        with Engine(model.model, model.tokenizer, model.chat, speculate="auto", **options) as engine:
            report = soak(engine, args.minutes, args.clients)
    text = json.dumps({"minutes": args.minutes, "clients": args.clients, **report}, indent=1)
    if args.json:
        args.json.write_text(text + "\n")
    print(text)
    return 1 if report["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
