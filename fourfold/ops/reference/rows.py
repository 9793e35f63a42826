"""Rows of cache pages in the formats they may lie in: float32, bfloat16, and int8 or fp8 with scales.

The dtype of a page is its format. A row consists of parts, such as a latent and a rotary key, whose magnitudes differ.
A row of int8 or float8_e4m3fn begins with a float32 scale for each part, in its bytes; the codes of all parts follow,
and zeros up to a multiple of four bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.counts import row_bytes
from fourfold.ops.reference.blocks import quantize_fp8, quantize_int8

ROW_FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
SCALE = 4  # bytes


def has_scales(dtype: torch.dtype) -> bool:
    """Whether rows of ``dtype`` carry scales."""
    return dtype.itemsize == 1


def row_width(parts: Sequence[int], dtype: torch.dtype) -> int:
    """Elements of a row of ``parts``, the numbers in each, with its scales."""
    return row_bytes(parts, dtype.itemsize) // dtype.itemsize


def encode_rows(x: Tensor, parts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Rows [..., N, row_width] of numbers x [..., N, sum(parts)]. Raises ValueError for what cannot be quantised."""
    if not has_scales(dtype):
        return x.to(dtype)
    codes, scales = zip(*(_quantize(part, dtype) for part in x.split(list(parts), dim=-1)), strict=True)
    head = torch.stack(scales, dim=-1).view(torch.uint8)
    row = torch.cat([head, *(c.view(torch.uint8) for c in codes)], dim=-1)
    return F.pad(row, (0, row_width(parts, dtype) - row.shape[-1])).view(dtype)


def _quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [..., N, w] of x [..., N, w] and their scales [..., N]."""
    if dtype == torch.int8:
        return quantize_int8(x)
    codes, scales = quantize_fp8(x, (1, x.shape[-1]))
    return codes, scales[..., 0]


def decode_rows(rows: Tensor, parts: Sequence[int]) -> Tensor:
    """The numbers [..., sum(parts)] in rows [..., row_width]: float32 where they have scales, else as they are."""
    if not has_scales(rows.dtype):
        return rows
    head = SCALE * len(parts)
    scales = rows[..., :head].contiguous().view(torch.float32)
    codes = rows[..., head : head + sum(parts)].float().split(list(parts), dim=-1)
    return torch.cat([c * scales[..., n : n + 1] for n, c in enumerate(codes)], dim=-1)
