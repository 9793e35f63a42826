"""Rotary position embedding in both layouts, and its extensions (arXiv 2104.09864, 2309.00071, 2407.21783)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fourfold.config import RopeConfig


def yarn_mscale(factor: float, mscale: float) -> float:
    """``0.1 * mscale * ln(factor) + 1``: how much an extension sharpens attention; 1 without one."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_frequencies(dim: int, rope: RopeConfig) -> Tensor:
    """Angular frequencies, float32 [dim/2]; an extension divides by ``factor`` those that turn too slowly for it."""
    pairs = torch.arange(dim // 2, dtype=torch.float32)
    frequencies = rope.theta ** (-2 * pairs / dim)
    if rope.factor <= 1:
        return frequencies
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "llama3":
        turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
        share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        return torch.lerp(frequencies / rope.factor, frequencies, share.clamp(0, 1))

    def pair_turning(rotations: float) -> float:
        """The (fractional) pair that turns this often within the original context."""
        return (
            dim
            * math.log(rope.original_max_position_embeddings / (2 * math.pi * rotations))
            / (2 * math.log(rope.theta))
        )

    low = max(math.floor(pair_turning(rope.beta_fast)), 0)
    high = min(math.ceil(pair_turning(rope.beta_slow)), dim - 1)
    ramp = ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequencies / rope.factor * ramp + frequencies * (1 - ramp)


def rope_tables(positions: Tensor, frequencies: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """``factor`` times cos and sin, float32 [T, dim/2] each, of ``positions`` [T] times ``frequencies`` [dim/2]."""
    angles = positions[:, None].float() * frequencies
    return angles.cos() * factor, angles.sin() * factor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = True) -> Tensor:
    """Rotates the last ``dim`` numbers of x; those before them stay.

    x: [T, ..., width]; cos, sin: [T, dim/2]. ``interleaved`` pairs are (0, 1), (2, 3), ...; otherwise
    pair i is (i, i + dim/2). The layout of the result is that of x, so keys may be cached.
    """
    if still := x.shape[-1] - 2 * cos.shape[-1]:
        return torch.cat([x[..., :still], apply_rope(x[..., still:], cos, sin, interleaved)], dim=-1)
    shape = (len(cos),) + (1,) * (x.dim() - 2) + (cos.shape[-1],)
    cos, sin = cos.view(shape), sin.view(shape)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    rotated = (first * cos - second * sin, first * sin + second * cos)
    joined = torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)
    return joined.to(x.dtype)
