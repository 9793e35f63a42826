"""One optimizer step: the losses of a phase, over micro-batches and processes that together stand for one batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.config import ModelConfig
from fourfold.model.moe import MoE, update_bias
from fourfold.model.probe import Probe
from fourfold.model.sequence import Packed
from fourfold.model.transformer import Model, Output, mtp_targets
from fourfold.train import metrics
from fourfold.train.optim import SkipStep, answer_weights, weighted_cross_entropy
from fourfold.train.parallel import ALONE, Parallel
from fourfold.train.recipe import Phase, Recipe


def train_step(
    model: Model,
    optimizers: list[torch.optim.Optimizer],
    packed: Packed | Sequence[Packed],
    recipe: Recipe,
    phase: Phase,
    probe: Probe | None = None,
    guard: SkipStep | None = None,
    step: int = 0,
    parallel: Parallel = ALONE,
) -> dict[str, float]:
    """One optimizer step over a batch, or over micro-batches that stand for one. Returns what there is to log.

    All that is divided by a total is divided by that of all processes, so what each has to log or to give is a sum.
    Without a ``guard`` only what is not finite is skipped. Raises RuntimeError as ``SkipStep`` does.
    """
    parts = [packed] if isinstance(packed, Packed) else packed
    guard = guard or SkipStep(recipe.optimizer.skip_sigma)
    model.train()
    model.set_indexer_mode(phase.indexer)
    totals = Totals.of(parts, parallel.all_reduce_sum)
    sums: dict[str, float] = defaultdict(float)
    values: dict[str, float] = {}
    modalities, loads = torch.zeros(()), {}
    with metrics.router_entropy(model, values) if probe is not None else nullcontext():
        for number, part in enumerate(parts):
            device = part.tokens.device
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.in_bf16(device)):
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
            for name, value in found.items():
                sums[name] += value
            for name, load in (output.loads or {}).items():
                loads[name] = loads[name] + load if name in loads else load
            if probe is not None:
                modalities = modalities + metrics.modality_sums(losses, part)
    sums = dict(zip(sums, parallel.sum(*sums.values()), strict=True))
    loads = parallel.reduce_loads(loads)
    norm = float(parallel.clip(model.parameters(), recipe.optimizer.clip))
    taken = guard.takes(step, sums.pop("objective"), norm)
    for optimizer in optimizers:
        if taken:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for name, load in loads.items():
        module = model.get_submodule(name)
        assert isinstance(module, MoE)
        if taken and model.cfg.indexer.mode != "warmup":
            update_bias(module.gate, load, model.cfg.moe.bias_update_speed)
    values |= sums | {"grad_norm": norm, "skipped": guard.skipped, "positions": totals.positions}
    values |= metrics.expert_balance(loads)
    if probe is not None:
        values |= metrics.modality_losses(parallel.all_reduce_sum(modalities))
        values |= metrics.bias_range(model) | metrics.stream_gain(probe)
    return values


@dataclass(frozen=True)
class Totals:
    """What the sums of a step are divided by, over all its micro-batches and processes: cutting changes nothing."""

    weights: Tensor
    targets: float
    mtp_weights: Tensor
    mtp_targets: float
    positions: float

    @staticmethod
    def of(parts: Sequence[Packed], everywhere: Callable[[Tensor], Tensor]) -> Totals:
        """``everywhere`` adds up a tensor of each process."""
        sums = torch.zeros(5, dtype=torch.float64, device=parts[0].tokens.device)
        for part in parts:
            own, further = (answer_weights(part, targets) for targets in (part.targets, mtp_targets(part)))
            here = (own.sum(), len(own), further.sum(), len(further), len(part))
            sums += torch.stack([torch.as_tensor(x, dtype=torch.float64, device=sums.device) for x in here])
        weights, targets, mtp_weights, n_mtp, positions = everywhere(sums)
        return Totals(weights, float(targets), mtp_weights, float(n_mtp), float(positions))


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
    if output.balance_loss is not None and not warmup:
        loss = loss + recipe.balance_weight * output.balance_loss * share
    if output.mtp_logits is not None and not warmup:
        extra, each = weighted_cross_entropy(output.mtp_logits, packed, mtp_targets(packed), totals.mtp_weights)
        loss, values["mtp_loss"] = loss + phase.mtp * extra, float(each.sum()) / max(1, totals.mtp_targets)
    return loss, values | {"objective": float(loss.detach())}, losses
