"""Reading a prompt and decoding with a small V4 (CSA, HCA, mHC) beside transformers, same weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from _peers import SIZES, ours, peer
from _report import case, finish, median, parser
from torch import nn
from transformers import DynamicCache

from fourfold.model.cache import Cache, PagePool, SequenceState
from fourfold.model.transformer import Model
from fourfold.serve.batch import pack_step

Timed = Callable[[], tuple[float, float]]  # seconds of the prompt and of one decoded token


def timed(read: Callable[[list[int]], int], prompt: list[int], steps: int) -> tuple[float, float]:
    began = time.perf_counter()
    token = read(prompt)
    middle = time.perf_counter()
    for _ in range(steps):
        token = read([token])
    return middle - began, (time.perf_counter() - middle) / steps


def our_arm(model: Model, prompt: list[int], steps: int) -> Timed:
    size = math.lcm(64, PagePool(model.cfg, 1, 128).layout.multiple)

    @torch.inference_mode()
    def run() -> tuple[float, float]:
        dtype = next(model.parameters()).dtype
        pool, state = PagePool(model.cfg, -(-(len(prompt) + steps) // size), size, dtype), SequenceState()

        def read(ids: list[int]) -> int:
            packed = pack_step([ids], [state.length])
            return int(model(packed, cache=Cache(pool, [state]), logits="last").logits[-1].argmax())

        return timed(read, prompt, steps)

    return run


def peer_arm(model: nn.Module, prompt: list[int], steps: int) -> Timed:
    @torch.inference_mode()
    def run() -> tuple[float, float]:
        cache = DynamicCache(config=model.config)

        def read(ids: list[int]) -> int:
            out = model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            return int(out.logits[0, -1].argmax())

        return timed(read, prompt, steps)

    return run


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--lengths", nargs="+", type=int, default=[512, 2048])
    flags.add_argument("--steps", type=int, default=16, help="decoded tokens (default: 16)")
    args = flags.parse_args()
    cases: dict[str, Any] = {}
    size = SIZES["usual"] | {"row": 2 * max(args.lengths)}
    made = peer("V4", size).eval()
    for dtype in (torch.float32, torch.bfloat16):
        mine, theirs = ours(made, dtype).eval().requires_grad_(False), made.to(dtype)
        for length in args.lengths:
            prompt = torch.randint(size["vocabulary"], (length,), generator=torch.Generator().manual_seed(0)).tolist()
            arms = {"ours": our_arm(mine, prompt, args.steps), "peer": peer_arm(theirs, prompt, args.steps)}
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
            for run in range(args.repeats + 1):
                for name, arm in arms.items():
                    seconds = arm()
                    if run:
                        found[name].append(seconds)
            name = str(dtype).removeprefix("torch.")
            for part, title, tokens in ((0, "prefill", length), (1, "decode", 1)):
                rates = {arm: [tokens / seconds[part] for seconds in all] for arm, all in found.items()}
                cases[f"{title}, {length} tokens, {name}"] = case(
                    median(rates["ours"]), median(rates["peer"]), None, "tokens/s", rates["ours"],
                    peer_name="transformers, eager",
                )  # fmt: skip
            finish(cases, args.json)


if __name__ == "__main__":
    main()
