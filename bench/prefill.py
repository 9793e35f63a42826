"""Reading a prompt with DeepSeek-V2-Lite's shape and random weights beside llama.cpp: int4 and Q4_0, int8 and Q8_0."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _lite import lite
from _llama import PAUSE, Llama, installed, seconds_of
from _report import case, finish, median, parser

from fourfold.counts import count_parameters
from fourfold.model.cache import Cache, PagePool, SequenceState
from fourfold.model.transformer import Model
from fourfold.serve.batch import pack_step


def reader(model: Model, length: int, chunk: int) -> Any:
    """Reads ``length`` tokens into an empty cache, ``chunk`` at a time, as the engine does."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.cfg.vocab_size, (length,), generator=generator).tolist()

    @torch.inference_mode()
    def read() -> None:
        pool, state = PagePool(model.cfg, -(-length // 64), 64, torch.bfloat16), SequenceState()
        for start in range(0, length, chunk):
            packed = pack_step([ids[start : start + chunk]], [start])
            model(packed, cache=Cache(pool, [state]), logits="last")

    return read


def multiply_rate(size: int = 2048) -> float:
    """Products a second of int8 matrices by torch, the limit that perf of a prompt is measured by."""
    a = torch.randint(-128, 127, (size, size), dtype=torch.int8)
    return size**3 / min(seconds_of(lambda: torch._int_mm(a, a.t())) for _ in range(5))


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--kinds", nargs="+", choices=("int4", "int8"), default=["int4", "int8"])
    flags.add_argument("--lengths", nargs="+", type=int, default=[512, 2048])
    flags.add_argument("--layers", type=int, default=27)
    flags.add_argument("--chunk", type=int, default=512, help="tokens of a step (default: 512)")
    args = flags.parse_args()
    there = installed()
    cases: dict[str, Any] = {}
    for kind in args.kinds:
        with tempfile.TemporaryDirectory(prefix="bench-prefill-") as directory:
            longest = max(args.lengths)
            peer = Llama(kind, args.layers, longest, Path(directory)) if there else None
            model = lite(kind, args.layers, torch.float32)
            products = count_parameters(model.cfg)["active"]
            for length in args.lengths:
                read = reader(model, length, args.chunk)
                read()
                ours: list[float] = []
                theirs: list[float] = []
                for _ in range(args.repeats):
                    ours.append(length / seconds_of(read))
                    if peer is not None:
                        time.sleep(PAUSE)
                        theirs.append(peer.prefill(length)["prompt_per_second"])
                limit = multiply_rate() / products
                made = case(median(ours), median(theirs) if theirs else None, None, "tokens/s", ours)
                made |= {"limit": limit, "fraction_of_limit": made["ours"] / limit}
                if peer is not None:
                    made |= {"peer_name": peer.name, "peer_min": min(theirs), "peer_max": max(theirs)}
                cases[f"{kind}, {length} tokens"] = made
                finish(cases, args.json)
            if peer is not None:
                peer.close()


if __name__ == "__main__":
    main()
