"""A long context read by a model: time and memory of reading it, speed of decoding after it, and, where its indexers
work in two levels, how many of the keys that flat ones would choose from the same pages they find; for pages of each
format, in memory or, but for what ``--memory`` leaves room for, in a file.

What the model would answer is another question (`fourfold eval needle`).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from _report import case, finish, median, parser

from fourfold import ops
from fourfold.data.recall import document
from fourfold.eval.recall import fork
from fourfold.model.cache import Cache, PagePool, SequenceState, layout, page_elements
from fourfold.model.probe import Probe
from fourfold.model.sequence import Document, pack
from fourfold.model.transformer import Model
from fourfold.plan import parse_size
from fourfold.quant.model import quantize_model
from fourfold.serve.memory import size, weight_bytes
from fourfold.serve.pagefile import PageFile, spans
from fourfold.weights.checkpoint import load_model, resolve

CHUNK, FIRST, DECODED = 512, 4096, 24


def extended(model: Model, length: int) -> Model:
    """The same weights, for positions up to ``length`` and the chunks read behind it."""
    model.cfg = model.cfg.replace(max_position_embeddings=length + 2 * CHUNK)
    return model


def resident() -> dict[str, float]:
    """GiB of this process in memory, as Linux counts them: now, of files among it, and at most so far."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {line[0][:-1]: int(line[1]) / 2**20 for line in lines if line[0] in ("VmHWM:", "VmRSS:", "RssFile:")}


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--model", default="nano-long")
    flags.add_argument("--length", type=int, default=65536)
    flags.add_argument("--quant", choices=("int8", "int4"), default="int8")
    flags.add_argument("--cache-format", choices=tuple(ops.ROW_FORMATS), default="bf16")
    flags.add_argument("--context-pages", type=Path, metavar="DIR", help="pages in a temporary file here")
    flags.add_argument("--memory", type=parse_size, metavar="SIZE", help="for weights and cache, with --context-pages")
    args = flags.parse_args()
    if (args.memory is None) != (args.context_pages is None):
        flags.error("--memory and --context-pages go together")
    trained, tokenizer = load_model(resolve(args.model))
    model = extended(quantize_model(trained.eval(), args.quant), args.length)
    ids = document("niah_multiquery", tokenizer, args.length, 0).context.tolist()
    pages, dtype, file = (args.length + 2 * CHUNK) // 64, ops.ROW_FORMATS[args.cache_format], None
    if args.context_pages is not None:
        kept = layout(model.cfg, dtype=dtype)
        rows = sum(stop - start for start, stop in spans(kept, 64).values())
        always = weight_bytes(model) + pages * (page_elements(kept, 64) * dtype.itemsize - rows)
        if always >= args.memory:
            flags.error(f"--memory: weights, index keys and summaries take {size(always)}")
        file = PageFile(args.context_pages, kept, pages, 64, args.memory - always)
    pool = PagePool(model.cfg, pages, dtype=dtype, backing=file)
    empty = resident()
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
        shares = [share for each in probe.kept.values() for kept in each for share in kept.flatten().tolist()]
        rates = [1 / read(branch, [token]) for token in ids[:DECODED]][4:]
        pool.release(branch.pages)
        held = resident()
        memory = {"peak_gib": held["VmHWM"], "file_gib": held["RssFile"], "before_gib": empty["VmRSS"]}
        if file is not None:
            memory |= {"rows_given_back": file.evicted, "rows_gib": file.resident / 2**30}
        cases[f"{done} tokens read"] = case(spent, None, None, "s", [spent], pages=args.cache_format, **memory)
        cases[f"decode after {done}"] = case(median(rates), None, None, "tokens/s", rates)
        if shares:
            cases[f"keys kept at {done}"] = case(100 * sum(shares) / len(shares), None, None, "%", [100 * min(shares)])
        line = f"{done}: {spent:.1f} s, {median(rates):.0f} tokens/s, {memory}"
        print(line, file=sys.stderr, flush=True)
    finish(cases, args.json)


if __name__ == "__main__":
    main()
