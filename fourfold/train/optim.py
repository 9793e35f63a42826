"""Which parameter learns how fast, and the loss that drives them."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from statistics import fmean, pstdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.model.sequence import IGNORE, Packed
from fourfold.model.transformer import Model
from fourfold.train.muon import Muon
from fourfold.train.recipe import Optimizer
from fourfold.train.tables import RowAdam, sparse_tables

# Which parameter learns how: the first pattern that fits its name. ``split``: the field of ``AttentionConfig`` that
# says how many matrices its rows are, which Muon treats one by one (queries and keys by head, DeepSeek-V4.1; the output
# projections have one matrix a group of heads, where they are grouped).
RULES: tuple[tuple[str, str, str], ...] = (
    # pattern, group, split
    ("*.indexer.*", "indexers", ""),
    ("engrams.*.embed.weight", "tables", ""),
    ("embed_tokens.weight", "embeddings", ""),
    ("lm_head.weight", "embeddings", ""),
    ("*delimiters", "embeddings", ""),
    ("drafter.markov_*.weight", "embeddings", ""),
    ("drafter.confidence_proj.weight", "embeddings", ""),
    ("engrams.*.[qk]_weight", "vectors", ""),  # norms of a stream each, and taps of a channel each: no matrices
    ("engrams.*.conv.weight", "vectors", ""),
    ("*.position_bias", "vectors", ""),
    ("*norm.weight", "vectors", ""),
    ("*norm[12].weight", "vectors", ""),
    ("*.bias", "vectors", ""),
    ("*.sinks", "vectors", ""),
    ("*residual.base", "vectors", ""),
    ("*residual.scale", "vectors", ""),
    ("*collapse.base", "vectors", ""),
    ("*collapse.scale", "vectors", ""),
    ("*.self_attn.q_b_proj.weight", "matrices", "num_attention_heads"),
    ("*.self_attn.q_proj.weight", "matrices", "num_attention_heads"),
    ("*.self_attn.k_proj.weight", "matrices", "num_key_value_heads"),
    ("*.self_attn.kv_b_proj.weight", "matrices", "num_attention_heads"),
    ("*.self_attn.o_a_proj.weight", "matrices", "o_groups"),
    ("*residual.fn", "matrices", ""),
    ("*collapse.fn", "matrices", ""),
    ("*_proj.weight", "matrices", ""),
    ("*.kv_a_proj_with_mqa.weight", "matrices", ""),
    ("*.mlp.gate_up_proj", "matrices", ""),  # stacks of experts
    ("*.mlp.down_proj", "matrices", ""),
    ("*.mlp.gate.weight", "matrices", ""),
    ("media.tower.patch_embed.weight", "matrices", ""),
    ("media.tower.blocks.*.weight", "matrices", ""),
    ("media.aligner.*.weight", "matrices", ""),
)


def rule(name: str) -> tuple[str, str]:
    """The group of a parameter and the field that says how many matrices it is. Raises ValueError if no rule fits."""
    for pattern, group, split in RULES:
        if fnmatchcase(name, pattern):
            return group, split
    raise ValueError(f"{name}: no rule says how it learns (fourfold.train.optim.RULES)")


def build_optimizers(model: Model, cfg: Optimizer) -> list[torch.optim.Optimizer]:
    """AdamW, Muon for the matrices of the hidden layers and a row-sparse Adam for the tables, as ``RULES`` says: the
    tables learn faster and do not decay, the indexers have a rate of their own. Comes after ``parallelize``.

    Each group remembers its own peak as ``peak_lr``.
    """
    groups: dict[tuple[str, int], list[nn.Parameter]] = {
        (group, 1): [] for group in ("embeddings", "vectors", "tables", "indexers")
    }
    for name, parameter in model.named_parameters():
        group, split = rule(name)
        groups.setdefault((group, getattr(model.cfg.attention, split) if split else 1), []).append(parameter)
    rates = {"indexers": cfg.indexer_lr}
    settings: dict[str, list[dict[str, Any]]] = {"muon": [], "adamw": []}
    for (group, parts), members in groups.items():
        decay = 0.0 if group == "vectors" else cfg.weight_decay
        values = {"params": members, "lr": rates.get(group, cfg.lr), "weight_decay": decay}
        if group == "matrices" and cfg.kind == "muon":
            settings["muon"].append(values | {"split": parts})
        elif group == "tables":
            continue
        elif members:
            settings["adamw"].append(values)
    betas = (cfg.betas[0], cfg.betas[1])
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(settings["adamw"], lr=cfg.lr, betas=betas, eps=1e-10, fused=True)
    ]
    if tables := sparse_tables(model):
        optimizers.append(RowAdam(tables, cfg.lr * cfg.engram_lr_scale, betas))
    if settings["muon"]:
        optimizers.append(Muon(settings["muon"], cfg.lr))
    for optimizer in optimizers:
        for settled in optimizer.param_groups:
            settled["peak_lr"] = settled["lr"]
    return optimizers


def set_lr(optimizers: list[torch.optim.Optimizer], scale: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale


def answer_weights(packed: Packed, targets: Tensor) -> Tensor:
    """Weight of each target, float32 [M]: one over the root of how many its sequence has.

    Between equal weight per token (long prose drowns short answers) and per sequence (the reverse);
    square averaging, arXiv 2412.05271, section 3.2.
    """
    has_target = targets != IGNORE
    sequence = packed.sequence_ids[has_target]
    counts = torch.bincount(sequence, minlength=len(packed.cu_seqlens) - 1)
    return counts[sequence].float().rsqrt()


def weighted_cross_entropy(
    logits: Tensor, packed: Packed, targets: Tensor, total: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss to follow, and the nats of each target [M] to report. logits: [M, V]; targets: int64 [T].

    total: what the weighted sum is divided by where this batch is but a part (default: its own weights).
    """
    losses = F.cross_entropy(logits, targets[targets != IGNORE], reduction="none")
    weights = answer_weights(packed, targets)
    total = weights.sum() if total is None else total
    return (losses * weights).sum() / total.clamp_min(1e-9), losses.detach()  # without targets: no loss, no gradient


class SkipStep:
    """Judges each step by its loss and gradient norm before it is taken, as OLMo does.

    A step is refused when either is not finite, or lies more than ``sigma`` standard deviations above the mean of the
    last ``WINDOW`` steps taken (once there are ``LEAST``). ``skipped`` counts them; a third in a row is an error.
    """

    WINDOW, LEAST, STOP_AT = 128, 32, 3
    FLAT = 1e-3  # of the mean: a deviation below is taken for this, or a loss that stands still would be all outliers

    def __init__(self, sigma: float) -> None:
        self.sigma, self.skipped, self.in_a_row = sigma, 0, 0
        self.recent: list[tuple[float, float]] = []

    def takes(self, step: int, loss: float, norm: float) -> bool:
        """Whether to take this step. Raises RuntimeError, which names it, if it is the third refused in a row."""
        if all(self._usual(value, seen) for value, seen in zip((loss, norm), self._columns(), strict=True)):
            self.recent = [*self.recent, (loss, norm)][-self.WINDOW :]
            self.in_a_row = 0
            return True
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row == self.STOP_AT:
            raise RuntimeError(
                f"step {step}: loss {loss:g} and gradient norm {norm:g} are not finite or more than "
                f"{self.sigma:g} standard deviations above the recent mean, like the {self.STOP_AT - 1} steps before; "
                "go on from the last checkpoint with a lower optimizer.lr or other data"
            )
        return False

    def forget(self) -> None:
        """What is usual is learnt anew: a new phase minimises another loss."""
        self.recent = []

    def state(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "recent": [list(pair) for pair in self.recent]}

    def restore(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self.recent = [(loss, norm) for loss, norm in state["recent"]]

    def _columns(self) -> tuple[list[float], list[float]]:
        return [loss for loss, _ in self.recent], [norm for _, norm in self.recent]

    def _usual(self, value: float, seen: list[float]) -> bool:
        if not math.isfinite(value):
            return False
        if len(seen) < self.LEAST:
            return True
        mean = fmean(seen)
        return value <= mean + self.sigma * max(pstdev(seen, mean), self.FLAT * abs(mean))
