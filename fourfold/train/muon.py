"""Muon: orthogonalised momentum (Jordan et al. 2024), with iteration and scaling of DeepSeek-V4 (arXiv 2606.19348)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from fourfold import ops

FAST = (3.4445, -4.7750, 2.0315)  # drives all singular values near one, roughly
EXACT = (2.0, -1.5, 0.5)  # converges to one
SCHEDULE = (FAST,) * 8 + (EXACT,) * 2
UPDATE_RMS = 0.18  # so that learning rates and decay carry over from AdamW


def orthogonalize(g: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, by Newton-Schulz in bfloat16. g: [..., rows, cols].

    In float32 where the processor has no products of bfloat16.
    """
    x = g.bfloat16() if ops.multiplies_bfloat16(g.device) else g.float()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    flat = x.reshape(-1, *x.shape[-2:])
    for a, b, c in SCHEDULE:
        gram = flat @ flat.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        flat = torch.baddbmm(flat, polynomial, flat, beta=a)
    x = flat.reshape(x.shape)
    return (x.mT if tall else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """For matrices [rows, cols] and stacks of them [E, rows, cols]; Nesterov momentum, decoupled weight decay.

    A group may say ``split``: each of its matrices is that many, one below the other (the heads of a projection).
    """

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float = 0.95, weight_decay: float = 0.1, split: int = 1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "split": split})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("Muon.step: closures are not supported")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                entry = self.state[parameter]
                momentum = entry.setdefault("momentum", torch.zeros_like(parameter))
                momentum.mul_(group["momentum"]).add_(parameter.grad)
                wanted = parameter.grad.add(momentum, alpha=group["momentum"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update(wanted, group["split"]), alpha=-group["lr"])


def update(g: Tensor, split: int) -> Tensor:
    """The step along g [..., rows, cols], each of its ``split`` matrices orthogonal, of root mean square 0.18.

    Where each process holds whole matrices, of a stack of experts or of the heads, it treats its own. Others are put
    together first, for a shard of a matrix says nothing of its singular values.
    """
    if isinstance(g, DTensor):
        mesh, placements = g.device_mesh, g.placements
        pieces = math.prod(n for n, place in zip(mesh.shape, placements, strict=True) if place.is_shard(g.ndim - 2))
        if split % pieces == 0 and not any(place.is_partial() or place.is_shard(g.ndim - 1) for place in placements):
            kept = update(g.to_local(), split // pieces)
            return DTensor.from_local(kept, mesh, placements, run_check=False, shape=g.shape, stride=g.stride())
        whole = DTensor.from_local(update(g.full_tensor(), split), mesh, [Replicate()] * mesh.ndim, run_check=False)
        return whole.redistribute(mesh, placements)
    parts = g.unflatten(-2, (split, -1)) if split > 1 else g
    return orthogonalize(parts).reshape(g.shape) * (UPDATE_RMS * max(parts.shape[-2:]) ** 0.5)
