"""Rows of the cache with scales, made and read by the compiled kernel (``native/rows.cpp``)."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int64

import torch
from torch import Tensor

from fourfold.ops import reference
from fourfold.ops.cpu import native
from fourfold.ops.cpu.quantized import route
from fourfold.ops.cpu.threads import team

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.float8_e4m3fn: 3}  # as in native/rows.h


def encode_rows(x: Tensor, parts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """See :func:`fourfold.ops.reference.encode_rows`."""
    if not reference.has_scales(dtype) or x.dtype == torch.float64 or route() != "native":
        return reference.encode_rows(x, parts, dtype)
    wide = x.detach().float().contiguous()
    rows = torch.empty(*x.shape[:-1], reference.row_width(parts, dtype), dtype=dtype)
    library = native.library()
    assert library is not None
    fine = library.ff_encode_rows(
        wide.data_ptr(),
        rows[..., 0].numel(),
        (c_int64 * len(parts))(*parts),
        len(parts),
        FORMATS[dtype],
        rows.data_ptr(),
        team(),
    )
    return rows if fine else reference.encode_rows(x, parts, dtype)  # which says what is wrong


def decode_rows(rows: Tensor, parts: Sequence[int]) -> Tensor:
    """See :func:`fourfold.ops.reference.decode_rows`."""
    if not reference.has_scales(rows.dtype) or route() != "native":
        return reference.decode_rows(rows, parts)
    rows = rows.contiguous()
    out = torch.empty(*rows.shape[:-1], sum(parts))
    library = native.library()
    assert library is not None
    library.ff_decode_rows(
        rows.data_ptr(),
        rows[..., 0].numel(),
        (c_int64 * len(parts))(*parts),
        len(parts),
        FORMATS[rows.dtype],
        out.data_ptr(),
        team(),
    )
    return out
