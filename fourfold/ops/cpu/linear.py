"""Float32 matrix products by oneDNN, forward and backward.

torch hands float32 to MKL, which on processors that are not Intel's does not use AVX-512: oneDNN, which is in the same
wheel, is twice as fast there and no slower elsewhere. The half types go to oneDNN by themselves. Their products summed
in float32 are the matrix unit's very own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fourfold.ops import reference
from fourfold.ops.cpu import native
from fourfold.ops.cpu.threads import team
from fourfold.ops.reference.norm import at_least_float32, compute_dtype, multiplies_bfloat16

TILE = 32  # numbers of a row that the matrix unit takes at once
LONG = 256  # rows from which it pays: each new shape costs oneDNN a fraction of a millisecond
FEW = 8  # rows: a weight is then read at the speed of memory, and what torch does around it takes as long
ONEDNN = torch.backends.mkldnn.is_available()
HALF = multiplies_bfloat16(torch.device("cpu"))  # else bfloat16 is multiplied as float32


def product(a: Tensor, b: Tensor, onednn: bool = ONEDNN) -> Tensor:
    """``a b^T``, by oneDNN or as torch would. a: [m, k]; b: [n, k], of any strides. Returns [m, n]."""
    if a.dtype == torch.bfloat16 and not HALF:
        return product(a.float(), b.float(), onednn).bfloat16()
    if a.dtype == torch.float32 and onednn:
        if b.stride() not in ((b.shape[1], 1), (1, b.shape[0])):
            b = b.contiguous()  # oneDNN has no kernel for others, and takes a thousand times as long without one
        out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return out
    return a @ b.T


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (x, weight), (g,) = ctx.saved_tensors, grads
        dx = product(g, weight.T) if ctx.needs_input_grad[0] else None
        return dx, product(g.T, x.T) if ctx.needs_input_grad[1] else None


def _compiled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    """The compiled kernels, if they can take a few rows of these."""
    if x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.bfloat16) or bias is not None:
        return None
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not weight.is_contiguous() or not x.numel():
        return None
    return native.library()


def _few_rows(library: Any, x: Tensor, weight: Tensor) -> Tensor:
    """float32 [..., n]."""
    rows = x.detach().float().contiguous()
    out = torch.empty(*x.shape[:-1], len(weight))
    half, where = weight.dtype == torch.bfloat16, weight.data_ptr()
    count = rows.numel() // x.shape[-1]
    library.ff_linear(where, half, *weight.shape, rows.data_ptr(), count, out.data_ptr(), team())
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See :func:`fourfold.ops.reference.linear`."""
    if x.numel() <= FEW * x.shape[-1] and (library := _compiled(x, weight, bias)):
        return _few_rows(library, x, weight).to(x.dtype)
    if x.dtype == weight.dtype == compute_dtype(x) == torch.bfloat16 and not HALF:
        return linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    single = x.dtype == weight.dtype == compute_dtype(x) == torch.float32
    if not single or x.numel() < LONG * x.shape[-1]:
        return reference.linear(x, weight, bias)
    out = _Linear.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])  # type: ignore[no-untyped-call]
    return out if bias is None else out + bias


def _by_matrix(x: Tensor, weight: Tensor) -> Tensor | None:
    """``x weight^T``, float32 [..., n], by the matrix unit where that can take these."""
    known = x.dtype == torch.bfloat16 and weight.dtype in (torch.float32, torch.bfloat16)
    if not known or x.shape[-1] % TILE or not x.numel() or not weight.is_contiguous():
        return None
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not native.matrix_unit():
        return None
    library = native.library()
    assert library is not None
    rows, out = x.contiguous(), torch.empty(*x.shape[:-1], len(weight))
    library.ff_half_linear(
        rows.data_ptr(),
        weight.data_ptr(),
        weight.dtype == torch.float32,
        out.data_ptr(),
        rows.numel() // x.shape[-1],
        *weight.shape,
        team(),
    )
    return out


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """See :func:`fourfold.ops.reference.wide_linear`."""
    if x.dtype == torch.bfloat16 and x.numel() <= FEW * x.shape[-1] and (library := _compiled(x, weight, None)):
        return _few_rows(library, x, weight)
    if (out := _by_matrix(x, weight)) is not None:
        return out
    wide = at_least_float32(x)
    return linear(wide, weight.to(wide.dtype))
