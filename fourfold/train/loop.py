"""The training loop: one process, all modalities mixed from the first step.

A run directory holds the resolved recipe, ``metrics.jsonl`` (one object a logged step), ``tb/``,
``checkpoints/step-N/`` and, when it is done, ``model/``. Starting it again resumes from the newest checkpoint.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from fourfold.data import corpus as corpora
from fourfold.data.mixture import Mixture
from fourfold.data.pack import Batches
from fourfold.model.moe import MoE, update_bias
from fourfold.model.probe import Probe
from fourfold.model.sequence import Packed
from fourfold.model.transformer import Model, Output, mtp_targets
from fourfold.text.tokenizer import Tokenizer, compress_vocabulary, train_tokenizer
from fourfold.train import state
from fourfold.train.optim import build_optimizers, set_lr, weighted_cross_entropy
from fourfold.train.recipe import Phase, Recipe
from fourfold.weights.checkpoint import save_model, write_json


def train(path: Path, overrides: list[str] | None = None) -> Path:
    """Runs a recipe to its end, or until Ctrl-C or SIGTERM, which save first. Returns the run directory.

    Raises ConfigError or ValueError for a recipe that cannot run, FloatingPointError if loss or gradient is not finite.
    """
    recipe = Recipe.load(path, overrides or [])
    console = Console(stderr=True)
    run = Path(recipe.out)
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "recipe.json", recipe.to_dict())
    corpus = corpora.load(Path(recipe.corpus) if recipe.corpus else None)
    tokenizer = run_tokenizer(run, recipe, corpus, console)
    torch.manual_seed(recipe.seed)
    model = build_model(recipe, tokenizer)
    optimizers = build_optimizers(model, recipe.optimizer)

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
        console.print(f"resuming {run} after step {step}")
    batches = stream(max(step - 1, 0), position)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"{parameters:,} parameters, {recipe.steps} steps of {recipe.row * recipe.rows} positions")

    def checkpoint() -> None:
        state.save(run, step, model, tokenizer, optimizers, batches.state(), recipe.keep)

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with (
        Interruption() as interrupted,
        Metrics(run, step) as metrics,
        Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, refresh_per_second=1
        ) as progress,
    ):
        task = progress.add_task("training", total=recipe.steps, completed=step)
        while step < recipe.steps:
            began = time.perf_counter()
            if step and recipe.weights_at(step) != recipe.weights_at(step - 1):  # what still waits is left out
                batches = stream(step, {"next": batches.next, "held": []})
            packed = next(batches)
            set_lr(optimizers, recipe.optimizer.lr_scale(step, recipe.steps))
            log = (step + 1) % recipe.log_every == 0
            values = train_step(model, optimizers, packed, recipe, recipe.phase(step), Probe() if log else None)
            step += 1
            if log:
                values |= {
                    "seconds": time.perf_counter() - began,
                    "positions": len(packed),
                    "lr": optimizers[0].param_groups[0]["lr"],
                }
                metrics.write(step, values)
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
    return run


def train_step(
    model: Model,
    optimizers: list[torch.optim.Optimizer],
    packed: Packed,
    recipe: Recipe,
    phase: Phase,
    probe: Probe | None = None,
) -> dict[str, Any]:
    """One optimizer step. Returns what there is to log."""
    model.train()
    model.set_indexer_mode(phase.indexer)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.bf16):
        output = model(packed, probe=probe, logits="target", mtp=phase.mtp > 0, balance=recipe.balance_weight > 0)
        loss, values = total_loss(output, packed, recipe, phase)
    if not loss.isfinite():
        raise FloatingPointError(f"loss: {values} is not finite")
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip)
    if not norm.isfinite():
        raise FloatingPointError(f"grad_norm: is {float(norm)}")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for name, load in (output.loads or {}).items():
        module = model.get_submodule(name)
        assert isinstance(module, MoE)
        if phase.indexer != "warmup":
            update_bias(module.gate, load, model.cfg.moe.bias_update_speed)
    return values | {"grad_norm": float(norm)} | telemetry(output, probe)


def total_loss(output: Output, packed: Packed, recipe: Recipe, phase: Phase) -> tuple[torch.Tensor, dict[str, Any]]:
    """What is minimised in this phase, and its parts by name. In the warm-up of the indexer nothing else learns."""
    loss, plain = weighted_cross_entropy(output.logits, packed, packed.targets)
    values = {"loss": float(plain)}
    if output.index_loss is not None:
        values["index_kl"] = float(output.index_loss.detach())
        loss = output.index_loss if phase.indexer == "warmup" else loss + output.index_loss
    if output.index_recall is not None:
        values["index_recall"] = float(output.index_recall)
    if phase.indexer == "warmup":
        return loss, values
    if output.balance_loss is not None:
        loss = loss + recipe.balance_weight * output.balance_loss
    if output.mtp_logits is not None:
        extra, values_mtp = weighted_cross_entropy(output.mtp_logits, packed, mtp_targets(packed))
        loss, values["mtp_loss"] = loss + phase.mtp * extra, float(values_mtp)
    return loss, values


def telemetry(output: Output, probe: Probe | None) -> dict[str, float]:
    """Balance of the experts and gain of the stream mixing."""
    values: dict[str, float] = {}
    if output.loads:
        loads = torch.stack([load.sum(0).float() for load in output.loads.values()])
        relative = loads / loads.mean(-1, keepdim=True)
        values["max_violation"] = float(relative.amax(-1).mean() - 1)
        values["dead_experts"] = float((relative < 0.1).sum(-1).float().mean())
    if probe is not None and probe.stream_maps:
        values["gain_forward"], values["gain_backward"] = probe.composite_gain()
    return values


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


class Metrics:
    """``metrics.jsonl`` and TensorBoard. What a killed run logged after its last checkpoint is forgotten."""

    def __init__(self, run: Path, step: int) -> None:
        self.run, self.step = run, step

    def __enter__(self) -> Metrics:
        path = self.run / "metrics.jsonl"
        kept = [line for line in path.read_text().splitlines() if _step(line) <= self.step] if path.is_file() else []
        partial = path.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line in kept))
        partial.replace(path)
        self.file = path.open("a")
        self.board = SummaryWriter(str(self.run / "tb"), purge_step=self.step + 1)
        return self

    def write(self, step: int, values: dict[str, Any]) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def __exit__(self, *_: Any) -> None:
        self.file.close()
        self.board.close()


def _step(line: str) -> float:
    """The step of a logged line; one that was cut short belongs to no step kept."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")
