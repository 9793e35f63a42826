"""Modules that hold a weight as integer codes with scales, and compute with the numbers these stand for.

int8 has one float32 scale per output row, int4 one bfloat16 scale per 32 inputs of a row (see ``ops.quantize_int4``).
Codes and scales are buffers: part of the state dict, never trained, never cast to another dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold import ops

KINDS = ("int8", "int4")
INT4_GROUP = 32


class QuantizedWeight(nn.Module):
    """A matrix [N, K], or a stack [E, N, K], of which rows are written one range at a time.

    dtype: of the numbers it gives; follows ``module.to(dtype)``.
    """

    def __init__(self, shape: tuple[int, ...], kind: str, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"quant: {kind!r} is unknown; choose one of {', '.join(KINDS)}")
        self.shape, self.kind, self.dtype = torch.Size(shape), kind, dtype
        *rows, columns = shape
        if kind == "int8":
            codes = torch.empty(*rows, columns, dtype=torch.int8, device=device)
            scales = torch.empty(rows, dtype=torch.float32, device=device)
        else:
            codes = torch.empty(*rows, -(-columns // 2), dtype=torch.uint8, device=device)
            scales = torch.empty(*rows, -(-columns // INT4_GROUP), dtype=torch.bfloat16, device=device)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @torch.no_grad()
    def put(self, index: int | None, row_start: int, rows: Tensor) -> None:
        """Quantises and stores ``rows`` [n, K] as rows row_start.. of the matrix, or of matrix ``index`` of a stack.

        Rows are independent: any order and any cut gives the same codes. Raises ValueError for rows that do not
        belong here or cannot be quantised.
        """
        *stack, height, width = self.shape
        if (index is None) != (not stack) or (index is not None and not 0 <= index < stack[0]):
            raise ValueError(f"put: index {index} is not part of a weight of shape {list(self.shape)}")
        if rows.dim() != 2 or rows.shape[1] != width or not 0 <= row_start <= height - len(rows):
            raise ValueError(f"put: rows of shape {list(rows.shape)} from row {row_start} do not fit {[height, width]}")
        if self.codes.is_meta:
            raise ValueError("put: the weight is on the meta device and cannot hold numbers")
        codes, scales = ops.quantize_int8(rows) if self.kind == "int8" else ops.quantize_int4(rows, INT4_GROUP)
        where = slice(row_start, row_start + len(rows))
        (self.codes if index is None else self.codes[index])[where] = codes.to(self.codes.device)
        (self.scales if index is None else self.scales[index])[where] = scales.to(self.scales.device)

    def dequantize(self, index: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """All numbers, or those of matrix ``index`` of a stack, in ``dtype`` or that of the module."""
        codes, scales = (self.codes, self.scales) if index is None else (self.codes[index], self.scales[index])
        if self.kind == "int8":
            values = ops.dequantize_int8(codes, scales)
        else:
            values = ops.dequantize_int4(codes, scales, INT4_GROUP, self.shape[-1])
        return values.to(dtype or self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves like any module, but a cast changes only what comes out: rounded scales would be other numbers."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scales.device)).dtype

        def keep_scales(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if tensor is self.scales and moved.dtype != tensor.dtype else moved

        return super()._apply(keep_scales, recurse)

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {self.kind}"


class QuantizedLinear(QuantizedWeight):
    """``nn.Linear`` over a quantised weight [out, in]; the bias stays a parameter."""

    def __init__(
        self,
        shape: tuple[int, int],
        kind: str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__(shape, kind, dtype, device)
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """The dequantised weight, made anew each time, for callers that use it as a plain matrix."""
        return self.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in]. Returns [..., out], computed in the dtype of x."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dequantize(dtype=x.dtype), bias)


class QuantizedTable(QuantizedWeight):
    """``nn.Embedding`` over a quantised table [rows, width], of which only the rows that are asked for are decoded."""

    def forward(self, rows: Tensor) -> Tensor:
        """rows: int64 [...]. Returns [..., width]."""
        codes, scales = self.codes[rows], self.scales[rows]
        if self.kind == "int8":
            values = ops.dequantize_int8(codes, scales)
        else:
            values = ops.dequantize_int4(codes, scales, INT4_GROUP, self.shape[-1])
        return values.to(self.dtype)


class QuantizedStack(QuantizedWeight):
    """The weights of all experts [E, N, K]; ``stack[e]`` dequantises one of them."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        kind: str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(shape, kind, dtype, device)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, expert: int) -> Tensor:
        return self.dequantize(expert)

    def select(self, experts: Tensor, dtype: torch.dtype) -> SelectedExperts:
        """The experts with these numbers, int64 [n], dequantised to ``dtype`` when they are asked for."""
        return SelectedExperts(self, experts.tolist(), dtype)


class SelectedExperts:
    """Some experts of a stack, one dequantised at a time."""

    def __init__(self, stack: QuantizedStack, experts: list[int], dtype: torch.dtype) -> None:
        self.stack, self.experts, self.dtype = stack, experts, dtype

    def __len__(self) -> int:
        return len(self.experts)

    def __getitem__(self, number: int) -> Tensor:
        return self.stack.dequantize(self.experts[number], self.dtype)
