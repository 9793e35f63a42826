"""The training loop: one process, all modalities mixed from the first step.

A run directory holds the resolved recipe, ``metrics.jsonl`` (one object a logged step), ``tb/``,
``checkpoints/step-N/`` and, when it is done, ``model/`` and ``report.html``. Starting it again resumes from the newest
checkpoint.
"""

from __future__ import annotations

import signal
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from fourfold.config import ModelConfig
from fourfold.data import corpus as corpora
from fourfold.data.mixture import Mixture
from fourfold.data.pack import Batches
from fourfold.data.skills import SKILLS
from fourfold.fields import require
from fourfold.model.moe import MoE, update_bias
from fourfold.model.probe import Probe
from fourfold.model.sequence import Packed
from fourfold.model.transformer import Model, Output, mtp_targets
from fourfold.text.tokenizer import Tokenizer, compress_vocabulary, train_tokenizer
from fourfold.train import metrics, state
from fourfold.train.optim import SkipStep, answer_weights, build_optimizers, set_lr, weighted_cross_entropy
from fourfold.train.recipe import Phase, Recipe
from fourfold.train.report import write_report
from fourfold.weights.checkpoint import save_model, write_json


def train(path: Path, overrides: list[str] | None = None) -> Path:
    """Runs a recipe to its end, or until Ctrl-C or SIGTERM, which save first. Returns the run directory.

    Raises ConfigError or ValueError for a recipe that cannot run, RuntimeError if three steps in a row had to be
    skipped.
    """
    recipe = Recipe.load(path, overrides or [])
    require(recipe.parallel.world_size == 1, "parallel", "dp_replicate and dp_shard must be 1: a run is one process")
    console = Console(stderr=True)
    run = Path(recipe.out)
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "recipe.json", recipe.to_dict())
    corpus = run_corpus(recipe)
    tokenizer = run_tokenizer(run, recipe, corpus, console)
    torch.manual_seed(recipe.seed)
    model = build_model(recipe, tokenizer)
    optimizers = build_optimizers(model, recipe.optimizer)
    guard = SkipStep(recipe.optimizer.skip_sigma)

    def mixture(weights: dict[str, float]) -> Mixture:
        return Mixture(weights, corpus, tokenizer, model.cfg.media, seed=recipe.seed)

    def stream(step: int, position: dict[str, Any]) -> Batches:
        batches = Batches(mixture(recipe.weights_at(step)), recipe.row, recipe.rows)
        batches.restore(position)
        return batches

    for phase in recipe.phases:  # a fault in a later one need not wait for its turn
        mixture(phase.weights or recipe.weights)
    step, position = 0, {"next": 0, "held": []}
    if done := state.checkpoints(run):
        step, position = state.restore(done[-1], model, optimizers)
        guard.restore(position.pop("guard", guard.state()))
        console.print(f"resuming {run} after step {step}")
    batches = stream(max(step - 1, 0), position)
    parameters, parts = sum(p.numel() for p in model.parameters()), recipe.optimizer.accumulate
    console.print(f"{parameters:,} parameters, {recipe.steps} steps of {recipe.row * recipe.rows * parts} positions")
    peak = recipe.peak_flops or metrics.measured_peak(next(model.parameters()).device, recipe.bf16)
    console.print(f"MFU against {peak:.3g} FLOP/s ({'assumed' if recipe.peak_flops else 'measured'})")
    speed = metrics.Throughput(peak)

    def checkpoint() -> None:
        state.save(run, step, model, tokenizer, optimizers, batches.state() | {"guard": guard.state()}, recipe.keep)

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with (
        Interruption() as interrupted,
        metrics.Metrics(run, step) as log,
        Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, refresh_per_second=1
        ) as progress,
    ):
        task = progress.add_task("training", total=recipe.steps, completed=step)
        while step < recipe.steps:
            phase, skipped = recipe.phase(step), guard.skipped
            if step and recipe.weights_at(step) != recipe.weights_at(step - 1):  # what still waits is left out
                batches = stream(step, {"next": batches.next, "held": []})
            if step and phase is not recipe.phase(step - 1):
                guard.forget()
            set_lr(optimizers, recipe.optimizer.lr_scale(step, recipe.steps))
            step += 1
            due = step % recipe.log_every == 0 or step == recipe.steps
            began = time.perf_counter()
            packed = [next(batches) for _ in range(parts)]
            values = train_step(model, optimizers, packed, recipe, phase, Probe() if due else None, guard, step)
            speed.add(packed, time.perf_counter() - began)
            if guard.skipped > skipped:
                console.print(f"step {step} skipped: loss {values['loss']:g}, gradient norm {values['grad_norm']:g}")
            if due or guard.skipped > skipped:
                values |= {"positions": sum(map(len, packed)), "lr": optimizers[0].param_groups[0]["lr"]}
                log.write(step, values | speed.read(trained_config(model, phase)))
                progress.update(task, description=f"loss {values['loss']:.3f}")
            progress.update(task, completed=step)
            if interrupted.by or step % recipe.save_every == 0 or step == recipe.steps:
                checkpoint()
            if interrupted.by:
                console.print(f"{interrupted.by}: saved step {step}; run the same command to go on")
                return run
    model.set_indexer_mode(recipe.phases[-1].indexer)  # also where nothing was left to do
    save_model(run / "model", model.eval(), tokenizer, torch.bfloat16)
    console.print(f"done: {run / 'model'}")
    if metrics.read_metrics(run):
        console.print(f"report: {write_report(run)}")
    return run


def train_step(
    model: Model,
    optimizers: list[torch.optim.Optimizer],
    packed: Packed | Sequence[Packed],
    recipe: Recipe,
    phase: Phase,
    probe: Probe | None = None,
    guard: SkipStep | None = None,
    step: int = 0,
) -> dict[str, float]:
    """One optimizer step over a batch, or over micro-batches that stand for one. Returns what there is to log.

    Without a ``guard`` only what is not finite is skipped. Raises RuntimeError as ``SkipStep`` does.
    """
    parts = [packed] if isinstance(packed, Packed) else packed
    guard = guard or SkipStep(recipe.optimizer.skip_sigma)
    model.train()
    model.set_indexer_mode(phase.indexer)
    totals, objective = Totals.of(parts), 0.0
    values: dict[str, float] = defaultdict(float)
    modalities, loads = torch.zeros(()), {}
    with metrics.router_entropy(model, values) if probe is not None else nullcontext():
        for number, part in enumerate(parts):
            with torch.autocast(part.tokens.device.type, dtype=torch.bfloat16, enabled=recipe.bf16):
                output = model(
                    part,
                    probe=probe if number == 0 else None,
                    logits="target",
                    mtp=phase.mtp > 0,
                    balance=recipe.balance_weight > 0,
                )
                loss, found, losses = total_loss(output, part, totals, recipe, phase, model.cfg)
            if loss.requires_grad:
                loss.backward()
            objective += float(loss.detach())
            for name, value in found.items():
                values[name] += value
            for name, load in (output.loads or {}).items():
                loads[name] = loads[name] + load if name in loads else load
            if probe is not None:
                modalities = modalities + metrics.modality_sums(losses, part)
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip))
    taken = guard.takes(step, objective, norm)
    for optimizer in optimizers:
        if taken:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for name, load in loads.items():
        module = model.get_submodule(name)
        assert isinstance(module, MoE)
        if taken and model.cfg.indexer.mode != "warmup":
            update_bias(module.gate, load, model.cfg.moe.bias_update_speed)
    values |= {"grad_norm": norm, "skipped": guard.skipped} | metrics.expert_balance(loads)
    if probe is not None:
        values |= metrics.modality_losses(modalities) | metrics.bias_range(model) | metrics.stream_gain(probe)
    return dict(values)


@dataclass(frozen=True)
class Totals:
    """What the sums of a step are divided by, over all its micro-batches, so that cutting a batch changes nothing."""

    weights: Tensor
    targets: int
    mtp_weights: Tensor
    mtp_targets: int
    positions: int

    @staticmethod
    def of(parts: Sequence[Packed]) -> Totals:
        def weigh(targets: list[Tensor]) -> tuple[Tensor, int]:
            weights = torch.cat([answer_weights(part, t) for part, t in zip(parts, targets, strict=True)])
            return weights.sum(), len(weights)

        own, further = weigh([part.targets for part in parts]), weigh([mtp_targets(part) for part in parts])
        return Totals(*own, *further, sum(map(len, parts)))


def total_loss(
    output: Output, packed: Packed, totals: Totals, recipe: Recipe, phase: Phase, cfg: ModelConfig
) -> tuple[Tensor, dict[str, float], Tensor]:
    """This micro-batch's share of what is minimised in this phase and of its parts by name; the nats of each target.

    In the warm-up of the indexer nothing else learns. Means over positions count by how many positions there are.
    """
    loss, losses = weighted_cross_entropy(output.logits, packed, packed.targets, totals.weights)
    share, warmup = len(packed) / totals.positions, cfg.indexer.mode == "warmup"
    values = {"loss": float(losses.sum()) / max(1, totals.targets)}
    loss = loss.new_zeros(()) if warmup else loss
    if output.index_loss is not None:
        values["index_kl"] = float(output.index_loss.detach()) * share
        loss = loss + output.index_loss * share
    if output.index_recall is not None:
        values["index_recall"] = float(output.index_recall) * share
    if warmup:
        return loss, values, losses
    if output.balance_loss is not None:
        loss = loss + recipe.balance_weight * output.balance_loss * share
    if output.mtp_logits is not None:
        extra, each = weighted_cross_entropy(output.mtp_logits, packed, mtp_targets(packed), totals.mtp_weights)
        loss, values["mtp_loss"] = loss + phase.mtp * extra, float(each.sum()) / max(1, totals.mtp_targets)
    return loss, values, losses


def trained_config(model: Model, phase: Phase) -> ModelConfig | None:
    """What the step computed, to count its FLOPs; None for the warm-up, whose backward reaches the indexers alone."""
    if model.cfg.indexer.mode == "warmup":
        return None
    return model.cfg if phase.mtp > 0 else model.cfg.replace(**{"mtp.num_layers": 0})


def run_corpus(recipe: Recipe) -> corpora.Corpus:
    """The built corpus; an empty one for a recipe that names its tokenizer and draws from generated skills alone."""
    drawn = {name for weights in (recipe.weights, *(p.weights for p in recipe.phases)) for name in weights}
    if recipe.tokenizer and not recipe.corpus and not any(SKILLS[name].shards for name in drawn & SKILLS.keys()):
        return corpora.Corpus(Path(), {})
    return corpora.load(Path(recipe.corpus) if recipe.corpus else None)


def run_tokenizer(run: Path, recipe: Recipe, corpus: corpora.Corpus, console: Console) -> Tokenizer:
    """The recipe's tokenizer, or one trained on the corpus once and kept in the run directory."""
    path = Path(recipe.tokenizer) if recipe.tokenizer else run / "tokenizer.json"
    if not path.is_file():
        if recipe.tokenizer:
            raise ValueError(f"tokenizer: {path} is not a file")
        console.print("training the tokenizer")
        train_tokenizer(corpus.texts("train"), recipe.config().vocab_size).save(path)
    return Tokenizer.load(path)


def build_model(recipe: Recipe, tokenizer: Tokenizer) -> Model:
    """A fresh model whose Engram knows the tokenizer's compressed vocabulary."""
    cfg = recipe.config()
    if cfg.vocab_size < tokenizer.vocab_size:
        raise ValueError(f"model.vocab_size: {cfg.vocab_size} is less than the tokenizer's {tokenizer.vocab_size}")
    compressed = compress_vocabulary(tokenizer)
    if cfg.engram.layer_ids:
        cfg = cfg.replace(**{"engram.compressed_vocab_size": max(compressed) + 1})
    model = Model(cfg)
    if model.compression is not None:
        model.compression.ids[: len(compressed)] = torch.tensor(compressed)
    return model


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
