"""Pooling of neighbouring positions into one entry (DeepSeek-V4, arXiv 2606.19348)."""

from __future__ import annotations

from torch import Tensor


def pool(values: Tensor, scores: Tensor) -> Tensor:
    """The mean of R rows, each channel weighing them by a softmax of its own.

    values, scores: [..., R, w]; a score of -inf leaves a row out. Returns [..., w].
    """
    return (values * scores.softmax(-2)).sum(-2)
