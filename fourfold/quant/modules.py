"""Modules that hold a weight as integer codes with scales, and compute with the numbers these stand for.

int8 has one float32 scale per output row, int4 one bfloat16 scale per group of inputs of a row (see
``ops.quantize_int4``), fp8 (e4m3) one float32 scale per block of 128 x 128, as V3 was released.
Codes and scales are buffers: part of the state dict, never trained, never cast to another dtype. On their first use
they are packed for the kernels of their device, in place of the plain ones; state dicts always hold plain ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fourfold import ops

KINDS = ("int8", "int4")  # of whole numbers
ALL_KINDS = (*KINDS, "fp8")
INT4_GROUP = 32
GROUPS = (32, 64, 128)
FP8_BLOCK = ops.FP8_BLOCK


def check_kind(kind: str, group: int = INT4_GROUP) -> None:
    """Raises ValueError if there is no such kind or, for int4, group."""
    if kind not in ALL_KINDS:
        raise ValueError(f"quant: {kind!r} is unknown; choose one of {', '.join(ALL_KINDS)}")
    if group not in GROUPS:
        raise ValueError(f"group: is {group!r}; choose one of {', '.join(map(str, GROUPS))}")


class QuantizedWeight(nn.Module):
    """A matrix [N, K], or a stack [E, N, K], of which rows are written one range at a time.

    dtype: of the numbers it gives; follows ``module.to(dtype)``; group: inputs that share a scale, of int4.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        kind: str,
        dtype: torch.dtype,
        device: torch.device | str,
        group: int = INT4_GROUP,
    ) -> None:
        super().__init__()
        check_kind(kind, group)
        self.shape, self.kind, self.dtype, self.group = torch.Size(shape), kind, dtype, group
        *rows, columns = shape
        if kind == "int8":
            codes = torch.empty(*rows, columns, dtype=torch.int8, device=device)
            scales = torch.empty(rows, dtype=torch.float32, device=device)
        elif kind == "fp8":
            codes = torch.empty(*rows, columns, dtype=torch.float8_e4m3fn, device=device)
            scales = torch.empty(ops.block_counts(shape, FP8_BLOCK), dtype=torch.float32, device=device)
        else:
            codes = torch.empty(*rows, -(-columns // 2), dtype=torch.uint8, device=device)
            scales = torch.empty(*rows, -(-columns // group), dtype=torch.bfloat16, device=device)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self._held: ops.Quantized | None = None  # codes and scales as the kernels know them

    def held(self) -> ops.Quantized:
        """Codes and scales as they are now, plain or packed."""
        held = self._held
        if held is None or held.codes is not self.codes or held.scales is not self.scales:
            held = self._held = ops.Quantized(self.codes, self.scales, tuple(self.shape), self.kind, self.group)
        return held

    def packed(self) -> ops.Quantized:
        """Codes and scales in the layout that the kernels of their device want; packs them once."""
        held = self.held()
        if not held.packed and not self.codes.is_meta:
            with torch.inference_mode(False), torch.no_grad():
                self._hold(ops.pack_weight(self.codes, held))
        return self.held()

    def unpack(self) -> None:
        """Back to the plain layout."""
        if self.held().packed:
            with torch.inference_mode(False), torch.no_grad():
                self._hold(self.held().to_plain())

    def _hold(self, weight: ops.Quantized) -> None:
        self.codes, self.scales, self._held = weight.codes, weight.scales, weight

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        plain = self.held().to_plain()
        destination[f"{prefix}codes"], destination[f"{prefix}scales"] = plain.codes, plain.scales

    def _load_from_state_dict(self, *args: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args)

    @torch.no_grad()
    def put(self, index: int | None, row_start: int, rows: Tensor) -> None:
        """Quantises and stores ``rows`` [n, K] as rows row_start.. of the matrix, or of matrix ``index`` of a stack.

        Rows are independent: any order and any cut gives the same codes; but those of fp8 come in whole blocks.
        Raises ValueError for rows that do not belong here or cannot be quantised.
        """
        *stack, height, width = self.shape
        if (index is None) != (not stack) or (index is not None and not 0 <= index < stack[0]):
            raise ValueError(f"put: index {index} is not part of a weight of shape {list(self.shape)}")
        if rows.dim() != 2 or rows.shape[1] != width or not 0 <= row_start <= height - len(rows):
            raise ValueError(f"put: rows of shape {list(rows.shape)} from row {row_start} do not fit {[height, width]}")
        if self.codes.is_meta:
            raise ValueError("put: the weight is on the meta device and cannot hold numbers")
        stop = row_start + len(rows)
        if self.kind == "fp8" and (row_start % FP8_BLOCK[0] or (stop % FP8_BLOCK[0] and stop < height)):
            raise ValueError(f"put: rows {row_start} to {stop} of {height} cut a block of {FP8_BLOCK[0]} in two")
        self.unpack()
        codes, scales = self.quantize(rows)
        where = slice(row_start, stop)
        of_scales = slice(row_start // FP8_BLOCK[0], -(-stop // FP8_BLOCK[0])) if self.kind == "fp8" else where
        (self.codes if index is None else self.codes[index])[where] = codes.to(self.codes.device)
        (self.scales if index is None else self.scales[index])[of_scales] = scales.to(self.scales.device)

    def quantize(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of rows [n, K], each number rounded to the nearest. Raises ValueError."""
        if self.kind == "int8":
            return ops.quantize_int8(rows)
        return ops.quantize_int4(rows, self.group) if self.kind == "int4" else ops.quantize_fp8(rows, FP8_BLOCK)

    def dequantize(self, index: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """All numbers, or those of matrix ``index`` of a stack, in ``dtype`` or that of the module."""
        held = self.held() if index is None else self.held()[index]
        return held.dequantize(dtype or self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves like any module, but a cast changes only what comes out: rounded scales would be other numbers."""
        self.unpack()
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scales.device)).dtype

        def keep_codes(tensor: Tensor) -> Tensor:
            moved, ours = fn(tensor), tensor is self.scales or tensor is self.codes
            return tensor.to(moved.device) if ours and moved.dtype != tensor.dtype else moved

        return super()._apply(keep_codes, recurse)

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
        group: int = INT4_GROUP,
    ) -> None:
        super().__init__(shape, kind, dtype, device, group)
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """The dequantised weight, made anew each time, for callers that use it as a plain matrix."""
        return self.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in]. Returns [..., out], computed in the dtype of x."""
        return ops.quantized_linear(x, self.packed(), self.bias)


class QuantizedTable(QuantizedWeight):
    """``nn.Embedding`` over a quantised table [rows, width], of which only the rows that are asked for are decoded."""

    def forward(self, rows: Tensor) -> Tensor:
        """rows: int64 [...]. Returns [..., width]."""
        if self.kind == "fp8":
            codes = self.codes.view(torch.uint8)[rows].view(self.codes.dtype)
            values = ops.dequantize_fp8(codes, self.scales[rows // FP8_BLOCK[0]], (1, FP8_BLOCK[1]))
        elif self.kind == "int8":
            values = ops.dequantize_int8(self.codes[rows], self.scales[rows])
        else:
            values = ops.dequantize_int4(self.codes[rows], self.scales[rows], self.group, self.shape[-1])
        return values.to(self.dtype)


class QuantizedStack(QuantizedWeight):
    """The weights of all experts [E, N, K]; ``stack[e]`` dequantises one of them."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        kind: str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        group: int = INT4_GROUP,
    ) -> None:
        super().__init__(shape, kind, dtype, device, group)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, expert: int) -> Tensor:
        return self.dequantize(expert)

    def experts(
        self,
        down: QuantizedStack,
        x: Tensor,
        indices: Tensor,
        weights: Tensor,
        limit: float,
        shared: Sequence[nn.Module] = (),
    ) -> tuple[Tensor, bool]:
        """``ops.experts`` with this stack as gate and up; see there for the arguments.

        shared: gate, up and down of an expert that every token has besides. Also returns whether it is in the sum.
        """
        alike = [m for m in shared if isinstance(m, QuantizedLinear) and (m.kind, m.group) == (self.kind, self.group)]
        together = len(alike) == 3 and all(m.bias is None for m in alike)
        more = tuple(m.packed() for m in alike) if together else None
        return ops.quantized_experts(x, indices, weights, self.packed(), down.packed(), limit, more), together


def pack(model: nn.Module) -> None:
    """Packs all weights of ``model`` that kernels multiply with, which their first use would otherwise do."""
    for module in model.modules():
        if isinstance(module, (QuantizedLinear, QuantizedStack)):
            module.packed()
