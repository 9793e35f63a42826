"""Which parameter learns how fast, and the loss that drives them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.model.sequence import IGNORE, Packed
from fourfold.train.recipe import Optimizer


def build_optimizer(model: nn.Module, cfg: Optimizer) -> torch.optim.AdamW:
    """AdamW in four groups: matrices decay; norms, biases and stream maps do not; tables learn faster; indexers apart.

    Each group remembers its own peak as ``peak_lr``.
    """
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "tables": [], "indexers": []}
    for name, parameter in model.named_parameters():
        if ".indexer." in name:
            groups["indexers"].append(parameter)
        elif name.startswith("engrams.") and name.endswith("embed.weight"):
            groups["tables"].append(parameter)
        else:
            groups["matrices" if parameter.dim() > 1 else "vectors"].append(parameter)
    rates = {"tables": cfg.lr * cfg.engram_lr_scale, "indexers": cfg.indexer_lr}
    decays = {"matrices": cfg.weight_decay, "indexers": cfg.weight_decay}
    settings: list[dict[str, Any]] = [
        {"params": members, "peak_lr": rates.get(name, cfg.lr), "weight_decay": decays.get(name, 0.0)}
        for name, members in groups.items()
        if members
    ]
    return torch.optim.AdamW(settings, lr=cfg.lr, betas=(cfg.betas[0], cfg.betas[1]), eps=1e-10, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, scale: float) -> None:
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


def weighted_cross_entropy(logits: Tensor, packed: Packed, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss to follow, and the plain mean in nats per target to report. logits: [M, V]; targets: int64 [T]."""
    losses = F.cross_entropy(logits, targets[targets != IGNORE], reduction="none")
    weights = answer_weights(packed, targets)
    return (losses * weights).sum() / weights.sum(), losses.detach().mean()
