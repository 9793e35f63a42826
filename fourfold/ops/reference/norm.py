"""Normalisation, and the rule for what is computed in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """float32 for the half types; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``x / rms(x) * weight`` over the last axis, statistics in float32.

    x: [..., d]; weight: [d], any shape that x can be multiplied with, or None. Returns [..., d] in the dtype of x.
    """
    wide = at_least_float32(x)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide if weight is None else wide * weight).to(x.dtype)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether it has instructions for products of bfloat16; without, they take twenty times as long as float32's."""
    if device.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products of x run in: autocast's where it is on, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def float32_island(x: Tensor) -> torch.autocast:
    """Context in which autocast leaves float32 alone: router, stream maps, index scores, Engram gate."""
    return torch.autocast(x.device.type, enabled=False)
