"""Which parameter learns how fast, and the loss that drives them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.model.sequence import IGNORE, Packed
from fourfold.train.muon import Muon
from fourfold.train.recipe import Optimizer


def build_optimizers(model: nn.Module, cfg: Optimizer) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the hidden layers; AdamW for embeddings, head and vectors, for the tables (faster,
    without decay) and for the indexers (at a rate of their own).

    Each group remembers its own peak as ``peak_lr``.
    """
    groups: dict[str, list[nn.Parameter]] = {
        "matrices": [],
        "embeddings": [],
        "vectors": [],
        "tables": [],
        "indexers": [],
    }
    for name, parameter in model.named_parameters():
        if ".indexer." in name:
            groups["indexers"].append(parameter)
        elif name.startswith("engrams.") and name.endswith("embed.weight"):
            groups["tables"].append(parameter)
        elif name.endswith(("q_weight", "k_weight", "conv.weight", "position_bias")):  # per channel, but no matrices
            groups["vectors"].append(parameter)
        elif name in ("embed_tokens.weight", "lm_head.weight") or name.endswith("delimiters"):
            groups["embeddings"].append(parameter)
        else:
            groups["matrices" if parameter.dim() > 1 else "vectors"].append(parameter)
    matrices = groups.pop("matrices")
    rates = {"tables": cfg.lr * cfg.engram_lr_scale, "indexers": cfg.indexer_lr}
    decays = {"embeddings": cfg.weight_decay, "indexers": cfg.weight_decay}
    settings: list[dict[str, Any]] = [
        {"params": members, "lr": rates.get(name, cfg.lr), "weight_decay": decays.get(name, 0.0)}
        for name, members in groups.items()
        if members
    ]
    betas = (cfg.betas[0], cfg.betas[1])
    adamw = torch.optim.AdamW(settings, lr=cfg.lr, betas=betas, eps=1e-10, fused=True)
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if cfg.kind == "muon":
        optimizers.append(Muon(matrices, cfg.lr, weight_decay=cfg.weight_decay))
    else:
        adamw.add_param_group({"params": matrices, "lr": cfg.lr, "weight_decay": cfg.weight_decay})
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
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


def weighted_cross_entropy(logits: Tensor, packed: Packed, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss to follow, and the plain mean in nats per target to report. logits: [M, V]; targets: int64 [T]."""
    losses = F.cross_entropy(logits, targets[targets != IGNORE], reduction="none")
    weights = answer_weights(packed, targets)
    # a batch without targets has no loss and no gradient
    return (losses * weights).sum() / weights.sum().clamp_min(1e-9), losses.detach().sum() / max(1, len(losses))
