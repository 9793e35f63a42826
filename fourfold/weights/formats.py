"""How the numbers of a released checkpoint lie on disk: a weight, and beside it perhaps the scales of its blocks.

Whether a weight is scaled is told by a sibling tensor (``X.weight_scale_inv``, ``X.scale``), never by its name, and
its blocks by the shape of that sibling. Scales multiply, ``scale_inv`` too.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fourfold import ops

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FP8 = torch.float8_e4m3fn
PACKED_FP4 = (torch.int8, torch.uint8)
E8M0 = (torch.float8_e8m0fnu, torch.uint8)
FP4_GROUP = 32
KNOWN_BLOCKS = ((128, 128), (32, 32), (1, 32), (1, 128))  # of e4m3; where two fit a shape they mean the same

Block = tuple[int, int]


class FormatError(ValueError):
    """A weight or its scales are not what they must be; the message names the tensor."""


@dataclass(frozen=True)
class Format:
    """A way to write a weight.

    dtype: of the weight on disk (torch.int8: packed fp4); block: rows and columns that share a scale; scale: the
    last part of the scale's name; scale_dtype: of the scales on disk; ue8m0: scales are powers of two.
    """

    dtype: torch.dtype
    block: Block | None = None
    scale: str = ""
    scale_dtype: torch.dtype = torch.float32
    ue8m0: bool = False


FORMATS: dict[str, Format] = {
    "fp32": Format(torch.float32),
    "bf16": Format(torch.bfloat16),
    "fp8": Format(FP8, (128, 128), "weight_scale_inv"),  # V3, R1
    "fp8_ue8m0": Format(FP8, (128, 128), "weight_scale_inv", ue8m0=True),  # V3.1, V3.2
    "fp8_e8m0": Format(FP8, (128, 128), "scale", torch.float8_e8m0fnu, True),  # V4
    "fp8_e8m0_32": Format(FP8, (32, 32), "scale", torch.float8_e8m0fnu, True),  # V4.1
    "fp8_rows": Format(FP8, (1, 32), "scale", torch.float8_e8m0fnu, True),  # Engram tables of V4.1
    "mxfp4": Format(torch.int8, (1, FP4_GROUP), "scale", torch.float8_e8m0fnu, True),  # experts of V4 and V4.1
}


# ---------------------------------------------------------------- names


def scale_name(name: str, names: Collection[str]) -> str | None:
    """The sibling of weight ``name`` that holds its scales, or None: the weight is stored as it is."""
    stem = name.removesuffix(".weight")
    found = [other for other in (f"{name}_scale_inv", f"{stem}.scale") if other in names]
    if len(found) > 1:
        raise FormatError(f"{name}: has two scales, {found[0]} and {found[1]}")
    return found[0] if found else None


def weight_block_size(quantization_config: dict[str, Any] | None) -> Block | None:
    """The blocks that a released config.json promises, or None. Raises FormatError if they make no sense."""
    size = (quantization_config or {}).get("weight_block_size")
    if size is None:
        return None
    if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
        raise FormatError(f"quantization_config.weight_block_size: is {size!r}; it must be two positive integers")
    return size[0], size[1]


def quantization_config(format: str) -> dict[str, Any]:
    """What a released config.json says of its dense weights in fp8 ``format``."""
    chosen = FORMATS[format]
    if chosen.dtype is not FP8 or chosen.block is None:
        raise FormatError(f"format: {format} is not fp8 and has no quantization_config")
    values = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(chosen.block),
    }
    return values | ({"scale_fmt": "ue8m0"} if chosen.ue8m0 else {})


# ---------------------------------------------------------------- reading


def decoded_shape(weight: Tensor, scale: Tensor | None) -> tuple[int, ...]:
    """The shape of what :func:`decode` returns: packed fp4 holds two numbers a byte."""
    packed = scale is not None and weight.dtype in PACKED_FP4
    return (*weight.shape[:-1], 2 * weight.shape[-1]) if packed else tuple(weight.shape)


def find_block(weight: Tensor, scale: Tensor, block: Block | None = None, name: str = "weight") -> Block:
    """Rows and columns that share a scale, by shapes; ``block`` is tried first. Reads no values.

    Raises FormatError if dtypes or shapes do not go together.
    """
    if weight.dtype is FP8:
        dtypes, blocks = (torch.float32, *E8M0), [*([block] if block else []), *KNOWN_BLOCKS]
    elif weight.dtype in PACKED_FP4:
        dtypes, blocks = E8M0, [(1, FP4_GROUP)]
    else:
        raise FormatError(f"{name}: is {_dtype(weight)} and has a scale; e4m3 or packed fp4 (int8) would")
    if scale.dtype not in dtypes:
        raise FormatError(
            f"{name}: its scale is {_dtype(scale)}; beside {_dtype(weight)} it must be one of "
            f"{', '.join(str(d).removeprefix('torch.') for d in dtypes)}"
        )
    shape = decoded_shape(weight, scale)
    if len(shape) < 2:
        raise FormatError(f"{name}: has shape {list(shape)} and a scale; only matrices are stored in blocks")
    fits = [b for b in blocks if ops.block_counts(shape, b) == tuple(scale.shape)]
    if not fits:
        wanted = ", ".join(f"{list(ops.block_counts(shape, b))} ({b[0]} x {b[1]})" for b in dict.fromkeys(blocks))
        raise FormatError(
            f"{name}: its scale has shape {list(scale.shape)}; for numbers of shape {list(shape)} it must be {wanted}"
        )
    return fits[0]


def decode(
    weight: Tensor,
    scale: Tensor | None = None,
    block: Block | None = None,
    dtype: torch.dtype = torch.float32,
    name: str = "weight",
) -> Tensor:
    """The numbers of a stored weight [..., N, K] in ``dtype``.

    weight: float32, bfloat16, float16 or float64 without scales; e4m3 with scales per block, float32 or e8m0; int8
    [..., N, K/2], packed fp4, with e8m0 scales [..., N, ceil(K/32)]. block: the rows and columns that the config
    promises, else found by shape; name: of the weight, for errors. NaN on disk stays NaN. Raises FormatError.
    """
    if scale is None:
        return _unscaled(weight, name).to(dtype)
    return _scaled(weight, scale, find_block(weight, scale, block, name), 0).to(dtype)


def decode_rows(
    weight: Tensor,
    scale: Tensor | None,
    start: int,
    stop: int,
    block: Block | None = None,
    dtype: torch.dtype = torch.float32,
    name: str = "weight",
) -> Tensor:
    """Rows start..stop-1 of what :func:`decode` gives for a stored matrix [N, K]; touches no other row.

    weight and scale are whole, best memory-mapped. Raises FormatError, also for rows that are not there.
    """
    if weight.dim() != 2 or not 0 <= start <= stop <= len(weight):
        raise FormatError(f"{name}: has shape {list(weight.shape)}; it has no rows {start} to {stop}")
    if scale is None:
        return _unscaled(weight, name)[start:stop].to(dtype)
    found = find_block(weight, scale, block, name)
    first, last = start // found[0], -(-stop // found[0])
    return _scaled(weight[start:stop], scale[first:last], found, start - first * found[0]).to(dtype)


def _unscaled(weight: Tensor, name: str) -> Tensor:
    if weight.dtype not in FLOATS:
        raise FormatError(f"{name}: is {_dtype(weight)} but has no scale beside it")
    return weight


def _scaled(weight: Tensor, scale: Tensor, block: Block, first_row: int) -> Tensor:
    """float32; shapes are known to fit."""
    scales = ops.e8m0_decode(scale) if scale.dtype in E8M0 else scale
    if weight.dtype is FP8:
        return ops.dequantize_fp8(weight, scales, block, first_row)
    return ops.dequantize_fp4(weight, scales, block[1])


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# ---------------------------------------------------------------- writing


def encode(tensor: Tensor, format: str, name: str = "weight") -> dict[str, Tensor]:
    """What to write for a weight [..., N, K], keyed by the last part of the name: "weight", and its scale's.

    Raises FormatError for an unknown format, or a tensor that cannot be written in it.
    """
    if format not in FORMATS:
        raise FormatError(f"format: {format!r} is unknown; choose one of {', '.join(FORMATS)}")
    chosen = FORMATS[format]
    if chosen.block is None:
        return {"weight": tensor.to(chosen.dtype)}
    if tensor.dim() < 2:
        raise FormatError(f"{name}: has shape {list(tensor.shape)}; {format} stores matrices")
    if chosen.dtype is torch.int8 and tensor.shape[-1] % 2:
        raise FormatError(f"{name}: has {tensor.shape[-1]} columns; {format} stores two numbers a byte")
    try:
        if chosen.dtype is FP8:
            codes, scales = ops.quantize_fp8(tensor, chosen.block, chosen.ue8m0)
        else:
            codes, scales = ops.quantize_fp4(tensor, chosen.block[1])
    except ValueError as error:
        raise FormatError(f"{name}: {error}") from None
    if chosen.scale_dtype is not torch.float32:
        scales = ops.e8m0_encode(scales).view(chosen.scale_dtype)
    return {"weight": codes if codes.dtype is FP8 else codes.view(chosen.dtype), chosen.scale: scales}
