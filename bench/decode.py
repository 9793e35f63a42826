"""Decoding one stream of DeepSeek-V2-Lite's shape beside llama.cpp and the read bandwidth of the same minute.

Random weights: int4 in groups of 32 beside Q4_0, int8 beside Q8_0 (which reads a little more: a scale for every 32).
The peer is the xllamacpp wheel, if it is installed; it first has to read the context, minutes for the longest.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _lite import Decoder, bytes_per_token, lite, probe_buffer
from _llama import PAUSE, Llama, installed, seconds_of
from _report import case, finish, median, parser

from fourfold.ops.cpu import native


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
    there = installed()
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
