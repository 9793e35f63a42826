"""Sinkhorn-Knopp: scale a matrix until rows and columns sum to one (arXiv 2512.24880)."""

from __future__ import annotations

from torch import Tensor


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Doubly stochastic matrices from ``logits`` [..., n, n].

    A row softmax, then columns and rows in turn, ending on columns: ``iterations`` column passes in all.
    """
    m = logits.softmax(-1) + eps
    m = m / (m.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        m = m / (m.sum(-1, keepdim=True) + eps)
        m = m / (m.sum(-2, keepdim=True) + eps)
    return m
