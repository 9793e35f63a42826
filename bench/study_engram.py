"""Does a memory of n-grams earn its parameters? Routed experts traded for Engram tables, at equal size and equal work.

All arms have the parameters of the MoE arm, in all and per token, up to one table row and one hidden number: experts
leave, tables come, and the dense layer pays for Engram's projections. The plain control adds the table row of the last
two bytes to the residual. All arms read the same documents in the same order, prose and questions about needles.

Measured: bits per byte of held-out prose; exact match of needles whose pairs were never trained, at the training length
and beyond; the same at the step where an arm's bits first reach those that the MoE arm ends with (equal loss).
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _needles import PACKAGE, TASKS, Prose, copy, document, prose
from _study import Cell, chosen, grid, groups, interval, parser, read, run, shown, threads
from torch import Tensor, nn

from fourfold import ops
from fourfold.config import ModelConfig
from fourfold.counts import count_parameters
from fourfold.data.recall import lesson
from fourfold.model.context import Context
from fourfold.model.engram import Engram
from fourfold.model.moe import MoE, update_bias
from fourfold.model.sequence import Document, Packed, pack
from fourfold.model.transformer import Model
from fourfold.train.length import skip_positions
from fourfold.train.optim import build_optimizers, set_lr
from fourfold.train.recipe import Optimizer

# arm: what takes the place of experts, and how much of the sparse parameters it is given
ARMS: dict[str, tuple[str, float]] = {
    "moe": ("", 0.0),
    "engram 10": ("engram", 0.10),
    "engram 20": ("engram", 0.20),
    "engram 25": ("engram", 0.25),
    "engram 40": ("engram", 0.40),
    "bigram 25": ("bigram", 0.25),
}
WINDOW, LENGTH, BEYOND = 128, 64, (1, 2, 4)  # bytes of prose, bytes of a lesson and what is asked as multiples of it
PROSE = 4  # windows of a step
# Bytes of a lesson: how many of a step. Copies, short ones, teach to look back; in lessons of 32 few needles compete.
COPIES, LESSONS = {12: 16, 16: 20}, {32: 16, LENGTH: 8}
SKIPPING = 0.75  # share of the steps after which positions have gaps, which reach as far as what is asked
LOOKS, HELD_OUT = 20, 128  # looks at the held-out prose during training, and its rows
EXPERTS, CHOSEN, MOE_LAYERS = 22, 2, 2
BASE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "initializer_range": 0.05,  # at this width attention would begin all but blind with 0.02
    "num_hidden_layers": MOE_LAYERS + 1,
    "intermediate_size": 192,
    "max_position_embeddings": LENGTH * max(BEYOND),
    "attention": {"kind": "gqa", "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16},
    "moe": {"n_routed_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": 64},
    "engram": {"max_ngram": 3, "n_heads": 2, "head_dim": 16, "pad_token_id": 0},
}


# ---------------------------------------------------------------- arms


def config(arm: str) -> ModelConfig:
    """The model of an arm: as many experts fewer as its share says, then the widest dense layer and the largest table
    that keep it within the active and the total parameters of the MoE arm."""
    kind, share = ARMS[arm]
    whole = ModelConfig.from_dict(BASE)
    if not kind:
        return whole
    left = EXPERTS - round(share * (EXPERTS - CHOSEN))
    cfg = whole.replace(**{"moe.n_routed_experts": left, "engram.layer_ids": (1,), "engram.vocab_size": 2})
    if kind == "bigram":  # one table of whole rows, added to the embeddings
        row = {"engram.layer_ids": (0,), "engram.max_ngram": 2, "engram.n_heads": 1, "engram.head_dim": cfg.hidden_size}
        cfg = cfg.replace(**row)
    size, limit = counted(arm, cfg), counted("moe", whole)
    wider = (limit["active"] - size["active"]) // (3 * cfg.hidden_size)
    cfg = cfg.replace(intermediate_size=cfg.intermediate_size + wider)
    tables = (cfg.engram.max_ngram - 1) * cfg.engram.n_heads
    rows = (limit["total"] - counted(arm, cfg)["total"]) // (cfg.engram.head_dim * tables) + 8
    while counted(arm, made := cfg.replace(**{"engram.vocab_size": rows}))["total"] > limit["total"]:
        rows -= 1
    return made


def counted(arm: str, cfg: ModelConfig) -> Cell:
    """Parameters: total, active (what a byte reads of them) and by part, without the parts that are not there."""
    counts = count_parameters(cfg)
    parts = {part: count for part, count in counts["by_part"].items() if count and part != "router_bias"}
    if ARMS[arm][0] == "bigram":  # the table is there, the rest of Engram is not
        absent = parts.pop("engram_projections")
        counts = counts | {"total": counts["total"] - absent, "active": counts["active"] - absent}
    return {"total": counts["total"], "active": counts["active"], "by_part": parts}


class Bigram(nn.Module):
    """The plain control: the table row that a hash of the last two tokens names, added to the residual as it is."""

    def __init__(self, engram: Engram) -> None:
        super().__init__()
        self.constants = (engram.multipliers, engram.primes, engram.offsets)
        self.embed = engram.embed

    def forward(self, streams: Tensor, grams: Tensor, ctx: Context) -> Tensor:
        """streams: [T, n, d]; grams: int64 [T, 2]. Returns the new streams."""
        rows = ops.ngram_rows(grams, *(torch.tensor(c, device=grams.device) for c in self.constants))
        return streams + self.embed(rows).flatten(1)[:, None]


def build(arm: str) -> Model:
    model = Model(config(arm))
    if ARMS[arm][0] == "bigram":
        model.engrams["0"] = Bigram(model.engrams["0"])
    return model


# ---------------------------------------------------------------- one cell


@functools.cache
def texts(folder: Path | None) -> Prose:
    return prose(folder)


def batch(text: Prose, seed: int, step: int, skipping: bool) -> Packed:
    """The documents of a step, the same for all arms: windows of prose, copies, lessons; positions with gaps or not."""
    rng = np.random.default_rng([seed, step])
    rows = windows(text["train"], PROSE, rng)
    for length, count in COPIES.items():
        rows += [lesson(copy(length, rng)) for _ in range(count)]
    for length, count in LESSONS.items():
        for _ in range(count):
            task = TASKS[int(rng.integers(len(TASKS)))]
            rows.append(lesson(document(task, length, rng, "train", text["train"], fewer=length < LENGTH)))
    packed = pack(rows)
    return skip_positions(packed, LENGTH * max(BEYOND), seed, step) if skipping else packed


def windows(text: np.ndarray, count: int, rng: np.random.Generator) -> list[Document]:
    starts = rng.integers(0, len(text) - WINDOW, count)
    return [Document.text(text[start : start + WINDOW].tolist()) for start in starts]


@torch.no_grad()
def bits_per_byte(model: Model, text: Prose) -> float:
    packed = pack(windows(text["test"], HELD_OUT, np.random.default_rng(1)), row=WINDOW)
    losses = F.cross_entropy(model(packed, logits="target").logits, packed.targets[packed.targets >= 0])
    return float(losses) / math.log(2)


@torch.no_grad()
def exact(model: Model, task: str, length: int, count: int, split: str, text: Prose) -> float:
    """Share of the questions whose greedy answer is right to the last byte.

    A greedy answer is right just where every byte of the right one is the likeliest after those before it, so one pass
    over a document tells. Its questions stand in a row, each after the right answers to those before.
    """
    rng = np.random.default_rng([7, length])
    asked = right = 0
    for _ in range(0, count, 16):
        made = [document(task, length, rng, split, text["test"]) for _ in range(min(16, count))]
        packed = pack([lesson(one) for one in made], row=length)
        hits = iter((model(packed, logits="target").logits.argmax(-1) == packed.targets[packed.targets >= 0]).tolist())
        for query in (query for one in made for query in one.queries):
            asked += 1
            right += sum(next(hits) for _ in query.answer) == len(query.answer)
    return right / asked


def recall(model: Model, documents: int, text: Prose) -> dict[str, Any]:
    """Exact match as {task: {length: share}} with needles never trained; ``seen``: {task: share} with trained pairs."""
    unseen = {t: {str(LENGTH * n): exact(model, t, LENGTH * n, documents, "test", text) for n in BEYOND} for t in TASKS}
    return {"unseen": unseen, "seen": {t: exact(model, t, LENGTH, documents, "train", text) for t in TASKS}}


def work(cell: Cell, documents: int, folder: Path | None, targets: dict[int, float]) -> Cell:
    """targets: seed -> bits per byte that the MoE arm ends with; whoever reaches them is asked there as well."""
    text, steps, seed = texts(folder), cell["steps"], cell["seed"]
    torch.manual_seed(seed)
    model, skipped = build(cell["arm"]).train(), 0
    optimizers = build_optimizers(model, Optimizer(kind="muon", lr=cell["lr"]))
    warmup, decay = max(1, steps // 10), max(1, steps // 2)
    every = max(1, steps // LOOKS)
    target, equal, curve = targets.get(seed), None, []
    began, asking = time.process_time(), 0.0
    for step in range(steps):
        set_lr(optimizers, min(1.0, (step + 1) / warmup) * max(0.05, min(1.0, (steps - step) / decay)))
        packed = batch(text, seed, step, step >= SKIPPING * steps)
        output = model(packed, logits="target")
        losses = F.cross_entropy(output.logits, packed.targets[packed.targets >= 0], reduction="none")
        first = PROSE * (WINDOW - 1)  # targets; prose and answers count alike, however few the answers are
        (losses[:first].mean() + losses[first:].mean()).backward()
        dense = [p for p in model.parameters() if p.grad is not None and not p.grad.is_sparse]
        norm = float(torch.nn.utils.clip_grad_norm_(dense, 1.0))
        skipped += not math.isfinite(norm)  # outliers are clipped: tables are learnt in leaps
        if math.isfinite(norm):
            for optimizer in optimizers:
                optimizer.step()
            for name, load in (output.loads or {}).items():
                module = model.get_submodule(name)
                assert isinstance(module, MoE)
                update_bias(module.gate, load, model.cfg.moe.bias_update_speed)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        if (step + 1) % every == 0 or step + 1 == steps:
            paused = time.process_time()
            found = {task: exact(model.eval(), task, LENGTH, documents // 2, "test", text) for task in TASKS}
            curve.append((step + 1, bits_per_byte(model, text), found))
            if equal is None and target is not None and curve[-1][1] <= target:
                equal = {"step": step + 1, "bpb": curve[-1][1], **recall(model, documents, text)}
            model.train()
            asking += time.process_time() - paused
    seconds = time.process_time() - began - asking
    final = recall(model.eval(), documents, text)
    return {
        "loss": curve[-1][1],  # in bits per byte
        "curve": curve,
        **final,
        "equal_loss": equal,
        "documents": documents,
        "text": folder.name if folder else PACKAGE,
        "bytes": steps * (PROSE * WINDOW + sum(n * count for n, count in (COPIES | LESSONS).items())),
        "skipped": skipped,
        "parameters": counted(cell["arm"], model.cfg) | {"experts": model.cfg.moe.n_routed_experts},
        "seconds": seconds + asking,
        "seconds_per_step": seconds / steps,
    }


# ---------------------------------------------------------------- report


def table(cells: list[Cell]) -> None:
    lengths = [str(LENGTH * n) for n in BEYOND]
    moe = {c["seed"]: c for c in cells if c["arm"] == "moe"}
    print("\n| arm | experts | parameters | active | tables | projections | s/step |\n|---|---|---|---|---|---|---|")
    for (arm,), same in groups(cells, "arm"):
        size = same[0]["parameters"]
        extra = [size["by_part"].get(part, 0) for part in ("engram_tables", "engram_projections")]
        print(
            f"| {arm} | {size['experts']} | {size['total']} | {size['active']} | {extra[0]} | {extra[1]}"
            f" | {statistics.median(c['seconds_per_step'] for c in same):.3f} |"
        )
    print("\nEqual steps; exact match in %, of pairs never trained but where it says seen.\n")
    print(f"| arm | seeds | bits per byte | less than moe | {' | '.join(headings(lengths))} |")
    print("|---" * (4 + len(headings(lengths))) + "|")
    for (arm,), same in groups(cells, "arm"):
        less = [moe[c["seed"]]["loss"] - c["loss"] for c in same if c["seed"] in moe and arm != "moe"]
        print(
            f"| {arm} | {len(same)} | {shown([c['loss'] for c in same])} | {shown(less) if less else ''} | "
            + scores(same, lengths)
        )
    print(
        "\nEqual loss: at the look where the arm's bits first reached those of the MoE arm's end, of the same seed.\n"
    )
    print(f"| arm | seeds that reached it | step | bits per byte | {' | '.join(headings(lengths))} |")
    print("|---" * (4 + len(headings(lengths))) + "|")
    for (arm,), same in groups(cells, "arm"):
        reached = [c["equal_loss"] for c in same if c["equal_loss"]]
        if arm == "moe":
            reached = [{"step": c["steps"], "bpb": c["loss"], **c} for c in same]
        if reached:
            print(
                f"| {arm} | {len(reached)} of {len(same)} | {shown([r['step'] for r in reached], 0)}"
                f" | {shown([r['bpb'] for r in reached])} | " + scores(reached, lengths)
            )
        else:
            print(f"| {arm} | 0 of {len(same)} |" + " |" * (2 + len(headings(lengths))))


def headings(lengths: list[str]) -> list[str]:
    return [f"{task} {length}" for task in TASKS for length in (*lengths, "seen")]


def scores(cells: list[Cell], lengths: list[str]) -> str:
    """One column of each heading: mean and half of the 95 % interval over the seeds, in per cent."""
    columns = []
    for task in TASKS:
        columns += [[100 * c["unseen"][task][length] for c in cells] for length in lengths]
        columns.append([100 * c["seen"][task] for c in cells])
    return " | ".join(shown(column, 1) for column in columns) + " |"


def draw(cells: list[Cell], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "study"  # the same figure has the same bytes
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2 + len(TASKS), figsize=(3.2 * (2 + len(TASKS)), 3.4), squeeze=False)
    bits, curves, *asked = axes[0]
    for number, ((arm,), same) in enumerate(groups(cells, "arm")):
        kind, share = ARMS[arm]
        colour, mark = f"C{number}", "x" if kind == "bigram" else "o"
        mean, half = interval([c["loss"] for c in same])
        bits.errorbar(100 * share, mean, yerr=0 if math.isnan(half) else half, fmt=mark, color=colour, capsize=3)
        steps = [step for step, *_ in same[0]["curve"]]
        means = [statistics.fmean(c["curve"][at][1] for c in same) for at in range(len(steps))]
        curves.plot(steps, means, color=colour, label=arm, linestyle="--" if kind == "bigram" else "-")
        for axis, task in zip(asked, TASKS, strict=True):
            points = [interval([100 * c["unseen"][task][str(LENGTH * n)] for c in same]) for n in BEYOND]
            bars = [0.0 if math.isnan(half) else half for _, half in points]
            places = [LENGTH * n * 1.03 ** (number - len(ARMS) / 2) for n in BEYOND]  # side by side
            axis.errorbar(places, [m for m, _ in points], yerr=bars, fmt=mark + "-", color=colour, capsize=2, alpha=0.8)
    bits.set(title="held-out prose", xlabel="sparse parameters in tables, %", ylabel="bits per byte, mean ± 95 %")
    curves.set(title="held-out prose", xlabel="step", ylabel="bits per byte")
    curves.legend(fontsize="small")
    for axis, task in zip(asked, TASKS, strict=True):
        axis.set_xscale("log", base=2)
        axis.set(title=task, xlabel="bytes of the document", ylabel="exact match, %, mean ± 95 %")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    print(f"figure: {path}")


def main() -> None:
    flags = parser(__doc__, "study_engram", steps=1200, plot="docs/study_engram.svg")
    flags.add_argument("--lr", type=float, default=3e-3, help="peak of every arm (default: 0.003)")
    flags.add_argument("--documents", type=int, default=64, help="asked of each task and length (default: 64)")
    flags.add_argument("--text", type=Path, metavar="FOLDER", help=f"read docstrings from here, not from {PACKAGE}")
    flags.add_argument("--workers", type=int, default=1, help="cells at once, each on one thread (default: 1)")
    flags.add_argument("--report", action="store_true", help="no new cells: table and figure of those that are kept")
    args = flags.parse_args()
    threads(args.threads)
    every = grid(steps=[args.steps], lr=[args.lr], arm=[*ARMS], seed=[*range(args.seeds)])
    wanted = chosen(every, args.cells)
    limit = 0 if args.report else args.limit
    if not args.report:
        texts(args.text)  # fetched once, before the workers want it
    # The MoE arm comes first: what it ends with is the equal loss of the others.
    seeds = {cell["seed"] for cell in wanted}
    first = [cell for cell in every if cell["arm"] == "moe" and cell["seed"] in seeds]
    before = len(read(args.out))
    do = functools.partial(work, documents=args.documents, folder=args.text)
    done = run(first, args.out, limit, functools.partial(do, targets={}), args.workers)
    if limit is not None:
        limit = max(0, limit - (len(read(args.out)) - before))
    if len(done) < len(first):  # stopped: no other arm begins without what it is to be equal to
        limit = 0
    targets = {cell["seed"]: cell["loss"] for cell in done}
    rest = [cell for cell in wanted if cell["arm"] != "moe"]
    if rest:
        done += run(rest, args.out, limit, functools.partial(do, targets=targets), args.workers)
    done.sort(key=lambda cell: ([*ARMS].index(cell["arm"]), cell["seed"]))
    if done:
        table(done)
        draw(done, args.plot)


if __name__ == "__main__":
    main()
