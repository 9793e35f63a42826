"""Codes that keep what a layer computes, rather than its weights (GPTQ, arXiv 2210.17323).

Columns are rounded one after the other; the error of each is taken up by the columns still to come, as far as the
inputs of the layer go together. Scales are fixed before, so that columns may be taken in the order of their weight
("act-order") while groups stay where they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold import ops
from fourfold.ops.reference.blocks import INT4_MAX, INT8_MAX, SMALLEST, block_amax, quantisable

SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of the scale that spares the largest number of a group
DAMPING = 0.01  # of the mean of the diagonal
BLOCK = 128  # columns whose errors are passed on together


def gptq(
    weight: Tensor, hessian: Tensor, kind: str, group: int = 32, act_order: bool = True, search: bool = True
) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix [N, K], in the layout of ``ops.quantize_int4`` or ``ops.quantize_int8``.

    hessian: float32 [K, K], mean of ``x x^T`` over the inputs; search: scales may also cut large numbers off.
    Raises ValueError if it is of another shape, not finite, or the weight cannot be quantised.
    """
    if kind not in ("int4", "int8"):
        raise ValueError(f"gptq: chooses codes of int4 and int8, not of {kind}")
    rows, columns = weight.shape
    if tuple(hessian.shape) != (columns, columns) or not hessian.isfinite().all():
        raise ValueError(f"gptq: needs a finite hessian of shape {[columns, columns]}, not {list(hessian.shape)}")
    most = INT4_MAX if kind == "int4" else INT8_MAX
    group = group if kind == "int4" else columns
    w = quantisable(weight).clone()
    diagonal = hessian.diagonal().double()
    floor = diagonal.mean().clamp_min(1e-30)
    scales = _scales(w, diagonal.clamp_min(DAMPING * floor).float(), most, group, search)
    if kind == "int4":
        scales = scales.bfloat16().float()
    spread = scales.repeat_interleave(group, 1)[:, :columns]
    damped = hessian.double().clone()
    damped.diagonal().add_(DAMPING * floor)
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(columns)
    # upper factor of the inverse: row k says how the columns after k take up the error of k
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order])), upper=True)
    codes = _round(w[:, order], spread[:, order], inverse.float(), most)[:, order.argsort()]
    if kind == "int8":
        return codes.to(torch.int8), scales[:, 0].contiguous()
    return ops.pack_nibbles((codes + 8).to(torch.uint8)), scales.bfloat16()


def _round(w: Tensor, scales: Tensor, inverse: Tensor, most: int) -> Tensor:
    """Whole numbers, float32 [N, K]. w is used up."""
    codes = torch.empty_like(w)
    columns = w.shape[1]
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        errors = torch.empty(len(w), last - first)
        for k in range(first, last):
            codes[:, k] = (w[:, k] / scales[:, k]).round().clamp(-most, most)
            error = (w[:, k] - codes[:, k] * scales[:, k]) / inverse[k, k]
            w[:, k:last] -= error[:, None] * inverse[k, k:last]
            errors[:, k - first] = error
        w[:, last:] -= errors @ inverse[first:last, last:]
    return codes


def _scales(w: Tensor, importance: Tensor, most: int, group: int, search: bool) -> Tensor:
    """float32 [N, groups]: of the shrunken scales, the one whose rounding costs least at the inputs' magnitudes."""
    amax = block_amax(w, (1, group)).clamp_min(most * SMALLEST)
    best, least = amax / most, torch.full_like(amax, torch.inf)
    for shrink in SHRINK if search else ():
        scales = (amax * shrink / most).clamp_min(SMALLEST)
        spread = scales.repeat_interleave(group, 1)[:, : w.shape[1]]
        error = (w - (w / spread).round().clamp(-most, most) * spread).square() * importance
        padded = torch.nn.functional.pad(error, (0, -w.shape[1] % group))
        cost = padded.unflatten(1, (-1, group)).sum(-1)
        best, least = torch.where(cost < least, scales, best), torch.minimum(cost, least)
    return best
