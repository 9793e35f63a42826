"""What a token of a long prompt costs by its place in it: dense attention beside the two-level indexer with sparse
attention, both measured over a cache of that length, both as the formulas of ``fourfold.counts`` say, and the length
from which the second costs less.

A formula gives FLOPs, not seconds: a constant and a rate of each arm are those that fit all its lengths best. What is
told is how far each length is from that line, and how far apart the crossings are. What lies in the cache is random.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from _report import case, finish, median, parser
from long import CHUNK, extended

from fourfold.config import ModelConfig
from fourfold.counts import prefill_flops
from fourfold.eval.recall import fork
from fourfold.model.cache import Cache, PagePool, SequenceState
from fourfold.model.sequence import Document, pack
from fourfold.model.transformer import Model
from fourfold.quant.model import quantize_model
from fourfold.weights.checkpoint import load_model, resolve

NEAR = [512 * n for n in (1, 2, 3, 4, 6)]  # where the two cost much the same
LENGTHS = {"dense": NEAR + [2**n for n in range(12, 18)], "two-level": NEAR + [2**n for n in range(12, 21)]}


def seconds_per_token(model: Model, length: int, repeats: int) -> list[float]:
    """Of the last chunk of a prompt, over a cache that holds what is before it."""
    pool = PagePool(model.cfg, (length + CHUNK) // 64, dtype=torch.bfloat16)
    pool.data.normal_()
    state = SequenceState()
    pool.reserve(state, length - CHUNK)
    state.length, state.history = length - CHUNK, [0] * (length - CHUNK)
    ids = torch.randint(256, model.cfg.vocab_size, (CHUNK,), generator=torch.Generator().manual_seed(0)).tolist()

    @torch.inference_mode()
    def read() -> float:
        branch = fork(pool, state)
        began = time.perf_counter()
        model(pack([Document.text(ids)], starts=[branch.length]), cache=Cache(pool, [branch]), logits="last")
        spent = time.perf_counter() - began
        pool.release(branch.pages)
        return spent / CHUNK

    read()
    return [read() for _ in range(repeats)]


def growing_flops(cfg: ModelConfig, length: int) -> float:
    """FLOPs of a token of the last chunk, of what grows with the length: attention of a dense model, else indexing."""
    part = "attention" if cfg.indexer.mode == "dense" else "indexer"
    whole, before = (prefill_flops(cfg, n)[part] * n for n in (length, length - CHUNK))
    return (whole - before) / CHUNK


def fitted(cfg: ModelConfig, measured: dict[int, float]) -> tuple[float, float]:
    """Seconds that do not grow, and seconds per FLOP of those that do, by least squares of the relative errors."""
    rows = np.array([(1 / seconds, growing_flops(cfg, n) / seconds) for n, seconds in measured.items()])
    constant, per_flop = np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)[0]
    return float(constant), float(per_flop)


def crossing(first: dict[int, float], second: dict[int, float]) -> float:
    """The length from which the second costs less, between lengths on straight lines of the logarithms; the shortest if
    it always does, inf if it never does."""
    lengths = sorted(first.keys() & second.keys())
    gaps = [math.log(first[n] / second[n]) for n in lengths]
    if min(gaps) >= 0:
        return lengths[0]
    for (a, low), (b, high) in zip(
        zip(lengths, gaps, strict=True), list(zip(lengths, gaps, strict=True))[1:], strict=False
    ):
        if low < 0 <= high:
            return math.exp(math.log(a) + (math.log(b) - math.log(a)) * -low / (high - low))
    return math.inf


def plot(path: Path, measured: dict[str, dict[int, float]], formula: dict[str, dict[int, float]], where: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "crossover"
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    for number, name in enumerate(measured):
        points = sorted(measured[name].items())
        axis.plot(
            [n for n, _ in points], [1000 * s for _, s in points], "o", color=f"C{number}", label=f"{name}, measured"
        )
        lines = sorted(formula[name].items())
        axis.plot(
            [n for n, _ in lines], [1000 * s for _, s in lines], color=f"C{number}", label=f"{name}, by the formula"
        )
    axis.axvline(where, color="grey", linestyle=":", label=f"crossover at {where:,.0f} tokens")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set(xlabel="tokens before it", ylabel="milliseconds a token", title="Reading a token of a long prompt")
    axis.grid(True, which="both", alpha=0.3)
    axis.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--model", default="nano-long")
    flags.add_argument("--plot", type=Path, default=Path("docs/crossover.svg"))
    args = flags.parse_args()
    measured: dict[str, dict[int, float]] = {}
    formula: dict[str, dict[int, float]] = {}
    cases = {}
    models = {}
    for name, mode in (("dense", "dense"), ("two-level", "sparse")):
        trained, _ = load_model(resolve(args.model))
        if not trained.cfg.indexer.candidate_blocks:
            flags.error(f"--model: {args.model} has no indexers of two levels (indexer.candidate_blocks is 0)")
        models[name] = extended(quantize_model(trained.eval(), "int8"), max(LENGTHS[name]))
        models[name].set_indexer_mode(mode)
    every = sorted({n for lengths in LENGTHS.values() for n in lengths})
    found: dict[str, dict[int, list[float]]] = {name: {} for name in models}
    for n in every:  # both at a length before the next: a machine that drifts drifts for both
        for name, model in models.items():
            if n in LENGTHS[name]:
                found[name][n] = seconds_per_token(model, n, args.repeats)
                print(f"{name}, {n}: {1000 * median(found[name][n]):.3f} ms", file=sys.stderr)
    for name, model in models.items():
        measured[name] = {n: median(all_) for n, all_ in found[name].items()}
        constant, per_flop = fitted(model.cfg, measured[name])
        formula[name] = {n: constant + growing_flops(model.cfg, n) * per_flop for n in every}
        for n, spread in found[name].items():
            cases[f"{name}, token {n}"] = case(
                1000 * measured[name][n], 1000 * formula[name][n], None, "ms", [1000 * s for s in spread],
                peer_name="the formula",
            )  # fmt: skip
    where = {
        kind: crossing(*(lines["dense"], lines["two-level"]))
        for kind, lines in (("measured", measured), ("formula", formula))
    }
    cases["crossover"] = case(
        where["measured"], where["formula"], None, "tokens", [where["measured"]], peer_name="the formula"
    )
    plot(args.plot, measured, formula, where["measured"])
    finish(cases, args.json)


if __name__ == "__main__":
    main()
