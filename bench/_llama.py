"""llama.cpp as a peer: the xllamacpp wheel on a file of random weights, in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _lite import write_gguf


def installed() -> bool:
    there = importlib.util.find_spec("xllamacpp") is not None
    if not there:
        print("no peer: install xllamacpp to have llama.cpp beside it")
    return there


class Llama:
    """llama.cpp's own server; two teams of threads in one process would get in each other's way."""

    def __init__(self, kind: str, layers: int, context: int, directory: Path) -> None:
        path = directory / f"{kind}.gguf"
        write_gguf(path, kind, layers)
        spawn = multiprocessing.get_context("spawn")
        self.ask, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs, str(path), context), daemon=True)
        self.process.start()
        self.name: str = self.ask.recv()

    def __call__(self, context: int, steps: int) -> dict[str, float]:
        """Its timings of ``steps`` tokens after ``context``, of which it reads what it does not hold yet."""
        return self._timed(context, steps, True)

    def prefill(self, context: int) -> dict[str, float]:
        """Its timings of reading ``context`` tokens anew."""
        return self._timed(context, 1, False)

    def _timed(self, context: int, steps: int, keep: bool) -> dict[str, float]:
        self.ask.send((context, steps, keep))
        timings: dict[str, float] = self.ask.recv()
        return timings

    def close(self) -> None:
        self.ask.send(None)
        self.process.join()


def serve(asked: Any, path: str, context: int) -> None:
    import xllamacpp

    wanted = xllamacpp.CommonParams()
    wanted.model.path, wanted.n_ctx, wanted.n_parallel = path, context + 512, 1
    wanted.warmup, wanted.verbosity = False, 0
    wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(wanted)
    generator = random.Random(0)
    prompt = [generator.randrange(2, 100_000) for _ in range(context)]
    asked.send(f"llama.cpp (xllamacpp {xllamacpp.__version__})")
    while (question := asked.recv()) is not None:
        length, steps, keep = question
        request = {"prompt": prompt[:length], "n_predict": steps, "temperature": 0.0, "ignore_eos": True}
        answer = server.handle_completions(request | {"cache_prompt": keep})
        asked.send((json.loads(answer) if isinstance(answer, str) else answer)["timings"])


PAUSE = 0.5  # seconds before each run: the threads of the one before have stopped to spin by then


def seconds_of(function: Callable[[], object]) -> float:
    time.sleep(PAUSE)
    began = time.perf_counter()
    function()
    return time.perf_counter() - began
