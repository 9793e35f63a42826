"""Decoding one stream of DeepSeek-V2-Lite's shape beside llama.cpp and the read bandwidth of the same minute.

Random weights: int4 in groups of 32 beside Q4_0, int8 beside Q8_0 (which reads a little more: a scale for every 32).
The peer is the xllamacpp wheel, if it is installed; it first has to read the context, minutes for the longest.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _lite import Decoder, bytes_per_token, lite, probe_buffer, write_gguf
from _report import case, finish, median, parser

from fourfold.ops.cpu import native


class Llama:
    """llama.cpp's own server on a file of random weights, in a process of its own: two teams of threads in one process
    get in each other's way."""

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
        self.ask.send((context, steps))
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
        length, steps = question
        request = {"prompt": prompt[:length], "n_predict": steps, "temperature": 0.0, "ignore_eos": True}
        answer = server.handle_completions(request | {"cache_prompt": True})
        asked.send((json.loads(answer) if isinstance(answer, str) else answer)["timings"])


PAUSE = 0.5  # seconds before each run: the threads of the one before have stopped to spin by then


def seconds_of(function: Callable[[], object]) -> float:
    time.sleep(PAUSE)
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def measure(
    kind: str, layers: int, contexts: list[int], steps: int, repeats: int, peer: Llama | None
) -> dict[str, Any]:
    model, cases, data = lite(kind, layers), {}, probe_buffer()
    library = native.library()
    for context in contexts:
        decoder = Decoder(model, context, steps)
        decoder()
        if peer is not None:
            peer(context, steps)
        ours: list[float] = []
        theirs: list[float] = []
        limits: list[float] = []
        size = bytes_per_token(model, context)
        for _ in range(repeats):
            ours.append(steps / seconds_of(decoder))
            if peer is not None:
                time.sleep(PAUSE)
                theirs.append(peer(context, steps)["predicted_per_second"])
            if library is not None:
                time.sleep(PAUSE)
                limits.append(library.ff_read_bandwidth(data.data_ptr(), data.numel(), torch.get_num_threads()) / size)
        best = median(limits) if limits else None
        made = case(median(ours), median(theirs) if theirs else None, None, "tokens/s", ours, bytes_per_token=size)
        made |= {"limit": best, "fraction_of_limit": best and made["ours"] / best}
        if peer is not None:
            made |= {"peer_name": peer.name, "peer_min": min(theirs), "peer_max": max(theirs)}
        cases[f"{kind}, context {context}"] = made
        share = f", {made['fraction_of_limit']:.0%} of the read bandwidth" if best else ""
        print(
            f"{kind}, context {context}: {made['ours']:.1f} tokens/s, peer {made['peer'] or 0:.1f}{share}", flush=True
        )
    return cases


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--kinds", nargs="+", choices=("int4", "int8"), default=["int4", "int8"])
    flags.add_argument("--contexts", nargs="+", type=int, default=[64, 512, 2048, 8192])
    flags.add_argument("--layers", type=int, default=27)
    flags.add_argument("--steps", type=int, default=16, help="tokens of a timed run (default: 16)")
    args = flags.parse_args()
    there = importlib.util.find_spec("xllamacpp") is not None
    if not there:
        print("no peer: install xllamacpp to have llama.cpp beside it")
    cases: dict[str, Any] = {}
    for kind in args.kinds:
        with tempfile.TemporaryDirectory(prefix="bench-decode-") as directory:
            contexts = sorted(args.contexts)
            peer = Llama(kind, args.layers, contexts[-1], Path(directory)) if there else None
            cases |= measure(kind, args.layers, contexts, args.steps, args.repeats, peer)
            if peer is not None:
                peer.close()
    finish(cases, args.json)


if __name__ == "__main__":
    main()
