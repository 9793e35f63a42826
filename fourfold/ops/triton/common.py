"""What the twins share."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LEAST = 16  # a tile's side that a matrix product needs


def fits(*tensors: Tensor | None) -> bool:
    """Whether a twin may take these: no gradient is wanted, and nothing is double, empty or of rows with scales."""
    given = [t for t in tensors if t is not None]
    numbers = [t for t in given if t.is_floating_point() or t.dtype == torch.int8]
    floating = all(t.dtype == torch.float32 or t.dtype in HALF for t in numbers)
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    return floating and not learns and all(t.numel() for t in given)


def power(n: int, least: int = LEAST) -> int:
    """The smallest power of two that holds ``n``."""
    return max(least, 1 << max(0, n - 1).bit_length())


@triton.jit
def dot(a, b):
    """The product of two tiles in float32, by tensor cores where these take the numbers exactly."""
    if INTERPRETED:  # which multiplies the bits of bfloat16 as if they were whole numbers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
