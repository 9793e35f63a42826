"""The training loop: all modalities mixed from the first step, on one process or as many as torchrun starts.

A run directory holds the resolved recipe, ``metrics.jsonl`` (one object a logged step), ``tb/``,
``checkpoints/step-N/`` and, when it is done, ``model/`` and ``report.html``. Starting it again resumes from the newest
checkpoint.
"""

from __future__ import annotations

import gc
import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fourfold.config import ModelConfig
from fourfold.data import corpus as corpora
from fourfold.data.pack import Lanes, merge
from fourfold.data.stream import Bad, open_batches, take_bad
from fourfold.model.probe import Probe
from fourfold.model.transformer import Model
from fourfold.text.tokenizer import Tokenizer, compress_vocabulary, train_tokenizer
from fourfold.train import metrics
from fourfold.train.length import skip_positions
from fourfold.train.optim import SkipStep, build_optimizers, set_lr
from fourfold.train.parallel import Parallel, parallelize, setup
from fourfold.train.recipe import Phase, Recipe
from fourfold.train.report import write_report
from fourfold.train.state import Checkpoints, TrainState, seed_generators
from fourfold.train.step import train_step
from fourfold.weights.checkpoint import load_model, resolve, save_model, write_json

log = logging.getLogger(__name__)


def train(path: Path, overrides: list[str] | None = None) -> Path:
    """Runs a recipe to its end, or until Ctrl-C or SIGTERM, which save first. Returns the run directory.

    Every process that torchrun starts calls it. Raises ConfigError or ValueError for a recipe that cannot run,
    RuntimeError if three steps in a row had to be skipped.
    """
    recipe = Recipe.load(path, overrides or [])
    parallel = setup(recipe.parallel)
    try:
        return run_recipe(recipe, parallel)
    finally:
        parallel.destroy()


def run_recipe(recipe: Recipe, parallel: Parallel) -> Path:
    """``train`` on one of the processes; the first alone tells and writes what is not the state."""
    console = Console(stderr=True, quiet=not parallel.is_main)
    run = Path(recipe.out)
    run.mkdir(parents=True, exist_ok=True)
    if parallel.is_main:
        write_json(run / "recipe.json", recipe.to_dict())
    tokenizer = run_tokenizer(run, recipe, console, parallel)
    seed_generators(recipe.seed)
    model = build_model(recipe, tokenizer).to(parallel.device)
    parameters = sum(p.numel() for p in model.parameters())
    parallelize(model, parallel, bf16=recipe.in_bf16(parallel.device), recompute=recipe.recompute)
    guard, parts = SkipStep(recipe.optimizer.skip_sigma), recipe.optimizer.accumulate
    now = TrainState(model, build_optimizers(model, recipe.optimizer))

    def stream(step: int) -> Lanes:
        media, rows = model.cfg.media, recipe.rows * parts
        place = parallel.rank, parallel.world, parts
        return open_batches(recipe.sources_at(step), tokenizer, media, recipe.row, rows, recipe.seed, *place)

    for step in recipe.changes:  # a fault in a later one need not wait for its turn
        stream(step)
    saves = Checkpoints(run, recipe.keep, tokenizer)
    if saves.resume(now) is not None:
        guard.restore(now.data["guard"])
        console.print(f"resuming {run} after step {now.step}")
    batches = stream(max(now.step - 1, 0))
    if now.step:
        batches.restore(now.data["stream"])
    console.print(f"{parameters:,} parameters, {recipe.steps} steps of {recipe.row * recipe.rows * parts} positions")
    peak = recipe.peak_flops or metrics.measured_peak(parallel.device, recipe.in_bf16(parallel.device))
    console.print(f"MFU against {peak:.3g} FLOP/s a process ({'assumed' if recipe.peak_flops else 'measured'})")
    speed = metrics.Throughput(peak)

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with (
        settled(),
        Interruption() as interrupted,
        metrics.Metrics(run, now.step) if parallel.is_main else nullcontext() as lines,
        Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, refresh_per_second=1
        ) as progress,
    ):
        task = progress.add_task("training", total=recipe.steps, completed=now.step)
        while now.step < recipe.steps:
            step, phase, skipped = now.step, recipe.phase(now.step), guard.skipped
            if step and step in recipe.changes:  # what still waits is left out
                place = merge(parallel.gather(batches.state(held=False)))
                batches = stream(step)
                batches.restore(place)
            if step and phase is not recipe.phase(step - 1):
                guard.forget()
            set_lr(now.optimizers, recipe.optimizer.lr_scale(step, recipe.steps))
            now.step = step = step + 1
            due = step % recipe.log_every == 0 or step == recipe.steps
            began = time.perf_counter()
            packed = [next(batches).to(parallel.device) for _ in range(parts)]
            if phase.span:
                packed = [
                    skip_positions(part, phase.span, recipe.seed, step, parallel.rank, number)
                    for number, part in enumerate(packed)
                ]
            probe = Probe() if due else None
            values = train_step(model, now.optimizers, packed, recipe, phase, probe, guard, step, parallel)
            speed.add(packed, time.perf_counter() - began)
            now.tokens += int(values["positions"])
            stop, bad = parallel.sum(bool(interrupted.by), name_bad(take_bad(batches)))
            now.counters["bad_samples"] = now.counters.get("bad_samples", 0) + int(bad)
            if guard.skipped > skipped:
                console.print(f"step {step} skipped: loss {values['loss']:g}, gradient norm {values['grad_norm']:g}")
            if lines is not None and (due or guard.skipped > skipped):
                values |= {"tokens": now.tokens, "lr": now.optimizers[0].param_groups[0]["lr"], **now.counters}
                lines.write(step, values | speed.read(trained_config(model, phase), parallel.world))
                progress.update(task, description=f"loss {values['loss']:.3f}")
            progress.update(task, completed=step)
            if stop or step % recipe.save_every == 0 or step == recipe.steps:
                now.data = {"stream": merge(parallel.gather(batches.state())), "guard": guard.state()}
                saves.save(now)
            if stop:
                saves.wait()
                console.print(f"{interrupted.by or 'stopped'}: saved step {step}; run the same command to go on")
                return run
        saves.wait()
    if parallel.is_main:
        finish(run, recipe, console)
    parallel.barrier()
    return run


def finish(run: Path, recipe: Recipe, console: Console) -> None:
    """The model of the last checkpoint, for use, and the report."""
    model, tokenizer = load_model(run / "checkpoints" / f"step-{recipe.steps}" / "model", torch.float32)
    model.set_indexer_mode(recipe.phases[-1].indexer)
    save_model(run / "model", model.eval(), tokenizer, torch.bfloat16)
    console.print(f"done: {run / 'model'}")
    if metrics.read_metrics(run):
        console.print(f"report: {write_report(run)}")


def name_bad(samples: list[Bad]) -> int:
    """Tells which samples were left out, on whichever process it was. Returns how many."""
    for bad in samples:
        log.warning("left out %s, %s, sample %d: %s", bad.source, bad.shard, bad.index, bad.reason)
    return len(samples)


def trained_config(model: Model, phase: Phase) -> ModelConfig | None:
    """What the step computed, to count its FLOPs; None for the warm-up, whose backward reaches the indexers alone."""
    if model.cfg.indexer.mode == "warmup":
        return None
    return model.cfg if phase.mtp > 0 else model.cfg.replace(**{"mtp.num_layers": 0})


def run_tokenizer(run: Path, recipe: Recipe, console: Console, parallel: Parallel) -> Tokenizer:
    """The recipe's tokenizer, or one trained on the corpus once and kept in the run directory."""
    if recipe.init:
        return Tokenizer.load(resolve(recipe.init) / "tokenizer.json")
    path = Path(recipe.tokenizer) if recipe.tokenizer else run / "tokenizer.json"
    if recipe.tokenizer and not path.is_file():
        raise ValueError(f"tokenizer: {path} is not a file")
    if parallel.is_main and not path.is_file():
        console.print("training the tokenizer")
        corpus = corpora.load(Path(recipe.corpus) if recipe.corpus else None)
        train_tokenizer(corpus.texts("train"), recipe.config().vocab_size).save(path)
    parallel.barrier()
    return Tokenizer.load(path)


def build_model(recipe: Recipe, tokenizer: Tokenizer) -> Model:
    """A fresh model whose Engram knows the tokenizer's compressed vocabulary; or that which ``init`` names, with fresh
    indexers where the recipe has them in other layers or of other sizes."""
    cfg = recipe.config()
    if recipe.init:
        begun, _ = load_model(resolve(recipe.init), torch.float32)
        model = Model(cfg.replace(**{"engram.compressed_vocab_size": begun.cfg.engram.compressed_vocab_size}))
        fresh = model.state_dict()
        indexers = {name: weight for name, weight in fresh.items() if ".indexer." in name}
        weights = {
            n: w
            for n, w in begun.state_dict().items()
            if ".indexer." not in n or (n in fresh and w.shape == fresh[n].shape)
        }
        try:
            model.load_state_dict(indexers | weights)
        except RuntimeError as error:
            raise ValueError(f"init: {recipe.init} does not fit the recipe's model: {error}") from None
        return model
    if cfg.vocab_size < tokenizer.vocab_size:
        raise ValueError(f"model.vocab_size: {cfg.vocab_size} is less than the tokenizer's {tokenizer.vocab_size}")
    compressed = compress_vocabulary(tokenizer)
    if cfg.engram.layer_ids:
        cfg = cfg.replace(**{"engram.compressed_vocab_size": max(compressed) + 1})
    model = Model(cfg)
    if model.compression is not None:
        model.compression.ids[: len(compressed)] = torch.tensor(compressed)
    return model


@contextmanager
def settled() -> Iterator[None]:
    """While open, garbage is looked for among new objects alone. A step leaves cycles behind, and walking through all
    that was imported to find them took longer than the step."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Interruption:
    """While open, SIGINT and SIGTERM are noted in ``by`` instead of ending the process."""

    def __init__(self) -> None:
        self.by = ""

    def __enter__(self) -> Interruption:
        def note(number: int, _: Any) -> None:
            self.by = signal.Signals(number).name

        self._previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
