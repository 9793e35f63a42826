"""What each innovation costs in decoding: everything on, each one off, everything off, of one shape in int8.

"All off" keeps heads, experts and depth; its attention caches keys and values of every head, and copies them to read.
"MLA alone" is the stricter base.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from _report import case, finish, median, parser

from fourfold.config import ModelConfig
from fourfold.model.cache import Cache, PagePool, SequenceState
from fourfold.model.transformer import Model
from fourfold.quant.model import quantize_model
from fourfold.serve.batch import pack_step

SHAPE: dict[str, Any] = {
    "vocab_size": 32000,
    "num_hidden_layers": 12,
    "moe.n_routed_experts": 16,
    "engram.vocab_size": 50_000,
    "engram.compressed_vocab_size": 0,
    "mtp.num_layers": 0,
    "media.image": None,
    "media.video": None,
    "media.audio": None,
}
PLAIN = {"attention.kind": "gqa", "attention.num_key_value_heads": 16, "attention.head_dim": 96}
OFF: dict[str, dict[str, Any]] = {
    "all on": {},
    "MLA off": PLAIN | {"indexer.mode": "off"},  # the indexer reads MLA's query latent
    "indexer off": {"indexer.mode": "off"},
    "mHC off": {"residual.kind": "plain"},
    "Engram off": {"engram.layer_ids": []},
    "MLA alone": {"indexer.mode": "off", "residual.kind": "plain", "engram.layer_ids": []},
    "all off": PLAIN | {"indexer.mode": "off", "residual.kind": "plain", "engram.layer_ids": []},
}


class Arm:
    def __init__(self, changes: dict[str, Any], context: int, kind: str) -> None:
        torch.manual_seed(0)
        self.model = quantize_model(Model(ModelConfig.preset("v4-mini", **SHAPE | changes)).eval(), kind)
        cfg = self.model.cfg
        size = math.lcm(64, PagePool(cfg, 1, 128, torch.float32).layout.multiple)
        self.pool, self.context = PagePool(cfg, context // size + 2, size, torch.float32), context
        self.pool.data.normal_(std=0.5)

    @torch.inference_mode()
    def __call__(self, steps: int) -> float:
        """Seconds of a token after a context of random entries."""
        state = SequenceState()
        self.pool.reserve(state, self.context)
        state.length, state.history = self.context, [7] * self.context
        began, token = time.perf_counter(), 7
        for _ in range(steps):
            packed = pack_step([[token]], [state.length])
            token = int(self.model(packed, cache=Cache(self.pool, [state]), logits="target").logits.argmax())
        seconds = (time.perf_counter() - began) / steps
        self.pool.release(state.pages)
        return seconds


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--contexts", nargs="+", type=int, default=[512, 4096])
    flags.add_argument("--steps", type=int, default=16)
    flags.add_argument("--quant", choices=("int8", "int4"), default="int8")
    args = flags.parse_args()
    cases: dict[str, Any] = {}
    for context in args.contexts:
        arms = {name: Arm(changes, context, args.quant) for name, changes in OFF.items()}
        found: dict[str, list[float]] = {name: [] for name in arms}
        for run in range(args.repeats + 1):
            for name, arm in arms.items():
                seconds = arm(args.steps) * 1000
                if run:
                    found[name].append(seconds)
        base = median(found["all off"])
        for name, times in found.items():
            made = case(median(times), base, None, "ms/token", times, peer_name="all off")
            cases[f"{name}, context {context}"] = made
        finish(cases, args.json)


if __name__ == "__main__":
    main()
