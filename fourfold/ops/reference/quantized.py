"""Matrix products with weights held as codes of few bits: the numbers that the codes stand for, then plain products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.ops.reference.blocks import dequantize_fp8, dequantize_int4, dequantize_int8, pack_nibbles, unpack_nibbles
from fourfold.ops.reference.experts import swiglu

ROWS, WORD, COLUMNS = 16, 4, 32  # rows of a packed block, bytes of a row in a line, what columns are padded to
NO_CODE = {"int8": 0x80, "int4": 0x8}  # stands for 0
FP8_BLOCK = (128, 128)  # rows and columns that share a scale, as V3 was released


@dataclass(frozen=True, eq=False)
class Quantized:
    """A matrix [N, K], or a stack of them [E, N, K]: int8 with a scale per row, int4 with one per group, or fp8 (e4m3)
    with one per block of 128 x 128.

    Plain: codes and scales as of ``ops.quantize_int8`` and so on. Packed, for kernels, never fp8: blocks of 16 rows,
    codes uint8 [..., N / 16, lines, 64], scales [..., N / 16, 16] or, int4, [..., N / 16, K / group, 16]; a line of 64
    bytes holds 4 (int8) or 8 (int4) columns of the 16 rows, offset to be positive, and what is missing from whole
    blocks and groups is 0.
    """

    codes: Tensor
    scales: Tensor
    shape: tuple[int, ...]
    kind: str
    group: int = 32
    packed: bool = False

    def __getitem__(self, index: int | Tensor) -> Quantized:
        """Some matrices of a stack, or one of them."""
        codes = self.codes[index]
        shape = tuple(codes.shape[: codes.dim() - self.codes.dim() + 1]) + self.shape[1:]
        return Quantized(codes, self.scales[index], shape, self.kind, self.group, self.packed)

    @property
    def padded(self) -> int:
        """Columns of a packed row."""
        unit = self.group if self.kind == "int4" else COLUMNS
        return -(-self.shape[-1] // unit) * unit

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        plain = self.to_plain()
        if self.kind == "fp8":
            return dequantize_fp8(plain.codes, plain.scales, FP8_BLOCK).to(dtype)
        if self.kind == "int8":
            return dequantize_int8(plain.codes, plain.scales).to(dtype)
        return dequantize_int4(plain.codes, plain.scales, self.group, self.shape[-1]).to(dtype)

    def to_packed(self) -> Quantized:
        """The same numbers, packed. group must be a multiple of 32, and fp8 has no such layout."""
        if self.packed:
            return self
        if self.kind == "fp8":
            raise ValueError("kind: is fp8; a packed weight is int8 or int4")
        if self.kind == "int4" and self.group % COLUMNS:
            raise ValueError(f"group: is {self.group}; a packed weight needs a multiple of {COLUMNS}")
        rows, columns = self.shape[-2:]
        short = -rows % ROWS
        codes = self.codes.view(torch.uint8) ^ 0x80 if self.kind == "int8" else unpack_nibbles(self.codes, columns)
        codes = F.pad(codes, (0, self.padded - columns, 0, short), value=NO_CODE[self.kind])
        codes = (
            codes.unflatten(-1, (-1, WORD)).unflatten(-3, (-1, ROWS)).transpose(-3, -2)
        )  # [.., blocks, words, 16, 4]
        if self.kind == "int4":
            codes = codes[..., ::2, :, :] | (codes[..., 1::2, :, :] << 4)
            scales = F.pad(self.scales, (0, 0, 0, short)).unflatten(-2, (-1, ROWS)).transpose(-1, -2)
        else:
            scales = F.pad(self.scales, (0, short)).unflatten(-1, (-1, ROWS))
        return Quantized(codes.flatten(-2), scales.contiguous(), self.shape, self.kind, self.group, True)

    def to_plain(self) -> Quantized:
        """The inverse of :meth:`to_packed`."""
        if not self.packed:
            return self
        rows, columns = self.shape[-2:]
        codes = self.codes.unflatten(-1, (ROWS, WORD))
        if self.kind == "int4":
            codes = torch.stack([codes & 15, codes >> 4], dim=-3).flatten(-4, -3)
            scales = self.scales.transpose(-1, -2).flatten(-3, -2)[..., :rows, :]
        else:
            scales = self.scales.flatten(-2)[..., :rows]
        codes = codes.transpose(-3, -2).flatten(-2).flatten(-3, -2)[..., :rows, :columns]
        codes = pack_nibbles(codes) if self.kind == "int4" else (codes ^ 0x80).view(torch.int8)
        return Quantized(codes.contiguous(), scales.contiguous(), self.shape, self.kind, self.group)


def pack_weight(codes: Tensor, weight: Quantized) -> Quantized:
    """``weight`` in the layout that the kernels of its device want; the reference wants none. codes: its codes."""
    return weight


def quantized_linear(x: Tensor, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` in the dtype of x. x: [..., K]; weight: of [N, K]; bias: [N]. Returns [..., N]."""
    return F.linear(x, weight.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))


def quantized_experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Quantized,
    down: Quantized,
    limit: float = 0.0,
    shared: tuple[Quantized, Quantized, Quantized] | None = None,
) -> Tensor:
    """See :func:`fourfold.ops.reference.experts`; no two experts are ever dequantised at once.

    shared: gate [I', d], up and down [d, I'] of an expert that every token has besides, with weight 1.
    """
    out = x.new_zeros(x.shape)
    for expert in indices.unique().tolist():
        token, slot = (indices == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up[expert].dequantize(x.dtype).T).chunk(2, dim=-1)
        y = swiglu(gate, up, limit) @ down[expert].dequantize(x.dtype).T
        out = out.index_add(0, token, (y * weights[token, slot, None]).to(out.dtype))
    if shared is not None:
        gate, up = (quantized_linear(x, weight) for weight in shared[:2])
        out = out + quantized_linear(swiglu(gate, up, limit), shared[2])
    return out
