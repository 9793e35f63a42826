"""A long context read by the bundled model: time and memory of reading it, speed of decoding after it, and how many
of the keys that the flat indexer would choose the two-level one finds.

The model was trained on short contexts: what it would answer is another question (`fourfold eval needle`).
"""

from __future__ import annotations

import resource
import sys
import time

import torch
from _report import case, finish, median, parser

from fourfold.data.recall import document
from fourfold.eval.recall import fork
from fourfold.model.cache import Cache, PagePool, SequenceState
from fourfold.model.probe import Probe
from fourfold.model.sequence import Document, pack
from fourfold.model.transformer import Model
from fourfold.quant.model import quantize_model
from fourfold.weights.checkpoint import load_model, resolve

CHUNK, FIRST, DECODED = 512, 4096, 24


def extended(model: Model, length: int, block_size: int, candidate_blocks: int) -> Model:
    """The same weights, read further than they were trained for."""
    cfg = model.cfg.replace(
        **{
            "max_position_embeddings": length + 2 * CHUNK,
            "indexer.block_size": block_size,
            "indexer.candidate_blocks": candidate_blocks,
        }
    )
    model.cfg = cfg
    for layer in model.layers:
        if layer.self_attn.indexer is not None:
            layer.self_attn.indexer.cfg = cfg.indexer
    return model


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--length", type=int, default=65536)
    flags.add_argument("--quant", choices=("int8", "int4"), default="int8")
    flags.add_argument("--block-size", type=int, default=32)
    flags.add_argument("--candidate-blocks", type=int, default=256)
    flags.add_argument("--pages", choices=("float32", "bfloat16"), default="bfloat16")
    args = flags.parse_args()
    trained, tokenizer = load_model(resolve("nano"))
    model = extended(quantize_model(trained.eval(), args.quant), args.length, args.block_size, args.candidate_blocks)
    ids = document("niah_multiquery", tokenizer, args.length, 0).context.tolist()
    pool = PagePool(model.cfg, (args.length + 2 * CHUNK) // 64, dtype=getattr(torch, args.pages))
    state, cases, spent = SequenceState(), {}, 0.0

    @torch.inference_mode()
    def read(state: SequenceState, tokens: list[int], probe: Probe | None = None) -> float:
        began = time.perf_counter()
        packed = pack([Document.text(tokens)], starts=[state.length])
        model(packed, cache=Cache(pool, [state]), probe=probe, logits="last")
        return time.perf_counter() - began

    for start in range(0, len(ids), CHUNK):
        spent += read(state, ids[start : start + CHUNK])
        done = state.length
        if done < len(ids) and (done < FIRST or done & (done - 1)):
            continue
        branch, probe = fork(pool, state), Probe()
        read(branch, ids[:64], probe)
        shares = torch.cat([kept.flatten() for each in probe.kept.values() for kept in each]).tolist()
        rates = [1 / read(branch, [token]) for token in ids[:DECODED]][4:]
        pool.release(branch.pages)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        cases[f"{done} tokens read"] = case(spent, None, None, "s", [spent], peak_gib=peak)
        cases[f"decode after {done}"] = case(median(rates), None, None, "tokens/s", rates)
        cases[f"keys kept at {done}"] = case(100 * sum(shares) / len(shares), None, None, "%", [100 * min(shares)])
        print(f"{done}: {spent:.1f} s, {median(rates):.0f} tokens/s, {peak:.2f} GiB", file=sys.stderr, flush=True)
    finish(cases, args.json)


if __name__ == "__main__":
    main()
