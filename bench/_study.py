"""What the studies share: a synthetic language, a plain training loop, and cells that are kept one JSON line each.

A study that is stopped and started again goes on with the cells that are missing.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _report import commit, machine

from fourfold.config import ModelConfig
from fourfold.model.moe import MoE, update_bias
from fourfold.model.sequence import Document, Packed, pack
from fourfold.model.transformer import Model, Output
from fourfold.train.optim import SkipStep

Cell = dict[str, Any]
VOCABULARY, BRANCHES, LENGTH, ROWS = 64, 4, 64, 8
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


class Language:
    """Half a row is drawn from a Markov chain, the other half repeats it: statistics, then copying.

    The same for all seeds of a study; each token has ``BRANCHES`` followers, drawn as 8 : 4 : 2 : 1.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(20)
        self.following = torch.rand(VOCABULARY, VOCABULARY, generator=generator).argsort(1)[:, :BRANCHES]
        self.shares = torch.tensor([8.0, 4.0, 2.0, 1.0]) / 15

    def batch(self, generator: torch.Generator, rows: int = ROWS) -> Packed:
        half = LENGTH // 2
        ids = torch.randint(VOCABULARY, (rows, half), generator=generator)
        draws = torch.multinomial(self.shares, rows * half, True, generator=generator).view(rows, half)
        for t in range(1, half):
            ids[:, t] = self.following[ids[:, t - 1], draws[:, t]]
        return pack([Document.text(row) for row in ids.repeat(1, 2).tolist()], row=LENGTH)

    @property
    def floor(self) -> float:
        """Nats per target that nobody can go below."""
        entropy, half = -float((self.shares * self.shares.log()).sum()), LENGTH // 2
        return (half - 1) * entropy / (LENGTH - 1)  # the first token is no target, and the second half is known


def train(
    cfg: ModelConfig,
    lr: float,
    steps: int,
    seed: int,
    balance: float = 0.0,
    watch: Callable[[int, Model, Output], None] = lambda step, model, output: None,
) -> Cell:
    """Trains by AdamW with a warm-up of a tenth of the steps and a linear end of three tenths.

    balance: weight of the sequence-wise balance loss; watch: called after each step. Returns losses in nats per target,
    greatest gradient norm after the warm-up, skipped steps and seconds; a final loss of None is one that is not finite,
    ``stopped_at`` the step at which the engine would have given up.
    """
    torch.manual_seed(seed)
    model, language, guard = Model(cfg).train(), Language(), SkipStep(sigma=6.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(seed)
    warmup, decay = max(1, steps // 10), max(1, 3 * steps // 10)
    stopped, greatest, began = None, 0.0, time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warmup) * max(0.05, min(1.0, (steps - step) / decay))
        packed = language.batch(generator)
        output = model(packed, logits="target", balance=balance > 0)
        loss = cross_entropy(output, packed)
        (loss if output.balance_loss is None else loss + balance * output.balance_loss).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        try:
            taken = guard.takes(step, float(loss.detach()), norm)
        except RuntimeError:  # where the engine would stop, the cell does
            stopped = step
            break
        if taken:
            optimizer.step()
            for name, load in (output.loads or {}).items():
                module = model.get_submodule(name)
                assert isinstance(module, MoE)
                update_bias(module.gate, load, cfg.moe.bias_update_speed)
        if step >= warmup and math.isfinite(norm):
            greatest = max(greatest, norm)
        optimizer.zero_grad(set_to_none=True)
        watch(step, model, output)
    seconds = time.perf_counter() - began
    with torch.no_grad():
        held_out = [language.batch(torch.Generator().manual_seed(10_000 + i)) for i in range(16)]
        final = statistics.fmean(float(cross_entropy(model(packed, logits="target"), packed)) for packed in held_out)
    return {
        "loss": final if math.isfinite(final) else None,
        "floor": language.floor,
        "max_grad_norm": greatest,
        "skipped": guard.skipped,
        "stopped_at": stopped,
        "seconds": seconds,
        "seconds_per_step": seconds / (steps if stopped is None else stopped + 1),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def cross_entropy(output: Output, packed: Packed) -> torch.Tensor:
    return F.cross_entropy(output.logits, packed.targets[packed.targets >= 0])


# ---------------------------------------------------------------- cells


def parser(description: str | None, name: str, steps: int, plot: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--steps", type=int, default=steps, help=f"of each cell (default: {steps})")
    made.add_argument("--seeds", type=int, default=3, help="of each cell (default: 3)")
    made.add_argument("--cells", default="", metavar="KEY=VALUE,...", help="only cells of these values, e.g. depth=8")
    made.add_argument("--limit", type=int, metavar="N", help="stop after N new cells")
    made.add_argument("--threads", type=int, help="threads of torch and Numba (default: all)")
    made.add_argument("--out", type=Path, default=Path(f"bench/results/{name}.jsonl"), help="where the cells are kept")
    made.add_argument("--plot", type=Path, default=Path(plot), help=f"the figure (default: {plot})")
    return made


def threads(count: int | None) -> None:
    if count:
        import numba

        torch.set_num_threads(count)
        numba.set_num_threads(count)


def grid(**axes: list[Any]) -> list[Cell]:
    """Every combination; the last axis turns fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def chosen(cells: list[Cell], which: str) -> list[Cell]:
    """The cells that ``KEY=VALUE,...`` names; a key may stand twice: either value. SystemExit if none is left."""
    wanted: dict[str, set[str]] = {}
    for part in filter(None, which.split(",")):
        key, _, value = part.partition("=")
        wanted.setdefault(key, set()).add(value)
    kept = [c for c in cells if all(str(c.get(key)) in values for key, values in wanted.items())]
    if not kept:
        raise SystemExit(f"--cells: {which} names none of {len(cells)} cells; the first is {cells[0]}")
    return kept


def read(path: Path) -> list[Cell]:
    """The cells that are done. A line that was cut short is none."""
    done = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            done.append(json.loads(line))
        except ValueError:
            continue
    return done


def run(cells: list[Cell], path: Path, limit: int | None, work: Callable[[Cell], Cell], workers: int = 1) -> list[Cell]:
    """Does the cells that ``path`` lacks and writes each as it is done. Returns those of ``cells`` that are done.

    workers: more than one does as many cells at once, each on one thread of a process of its own; ``work`` must be a
    function of a module then. Ctrl-C ends it; the cells in hand are lost, the others are kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    done = read(path)
    missing = [cell for cell in cells if not any(cell.items() <= d.items() for d in done)]
    print(f"{len(cells) - len(missing)} of {len(cells)} cells are done ({path})")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else workers would go on alone
    try:
        for number, (cell, result) in enumerate(_results(missing[:limit], work, workers), 1):
            result = cell | result | {"machine": machine(), "commit": commit()}
            append(path, result)
            done.append(result)
            told = ", ".join(f"{key} {value}" for key, value in cell.items())
            loss = "not finite" if result["loss"] is None else f"{result['loss']:.4f}"
            print(f"{number} of {len(missing)}: {told}: loss {loss}, {result['seconds']:.0f} s", flush=True)
    except KeyboardInterrupt:
        print("stopped; the same command goes on")
    return [d for d in done if any(cell.items() <= d.items() for cell in cells)]


def _results(cells: list[Cell], work: Callable[[Cell], Cell], workers: int) -> Iterator[tuple[Cell, Cell]]:
    """Each cell with what ``work`` made of it, as they are done."""
    if workers == 1 or len(cells) < 2:
        yield from ((cell, work(cell)) for cell in cells)
        return
    with multiprocessing.get_context("spawn").Pool(workers, threads, (1,)) as pool:  # which a break terminates
        yield from pool.imap_unordered(functools.partial(_paired, work), cells)


def _paired(work: Callable[[Cell], Cell], cell: Cell) -> tuple[Cell, Cell]:
    return cell, work(cell)


def append(path: Path, cell: Cell) -> None:
    """Adds a line that is whole or not there; one that was cut short before it stays alone."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(cell).encode() + b"\n")


def groups(cells: list[Cell], *keys: str) -> Iterator[tuple[tuple[Any, ...], list[Cell]]]:
    """The cells that agree in ``keys``, in order of first appearance."""
    found: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        found.setdefault(tuple(cell[key] for key in keys), []).append(cell)
    yield from found.items()


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval (Student's t; NaN for a single value)."""
    n = len(values)
    if n < 2:
        return (values[0] if values else math.nan), math.nan
    half = T95.get(n - 1, 1.96) * statistics.stdev(values) / n**0.5
    return statistics.fmean(values), half


def shown(values: list[float], digits: int = 3) -> str:
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")
