"""Float32 matrix products by oneDNN, forward and backward.

torch hands float32 to MKL, which on processors that are not Intel's does not use AVX-512: oneDNN, which is in the same
wheel, is twice as fast there and no slower elsewhere. The half types go to oneDNN by themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fourfold.ops import reference
from fourfold.ops.reference.norm import compute_dtype

LONG = 256  # rows from which it pays: each new shape costs oneDNN a fraction of a millisecond
ONEDNN = torch.backends.mkldnn.is_available()


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a b^T``. a: [m, k]; b: [n, k], of any strides. Returns [m, n]."""
    if a.dtype == torch.float32 and ONEDNN:
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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See :func:`fourfold.ops.reference.linear`."""
    single = x.dtype == weight.dtype == compute_dtype(x) == torch.float32
    if not single or x.numel() < LONG * x.shape[-1]:
        return reference.linear(x, weight, bias)
    out: Tensor = _Linear.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])  # type: ignore[no-untyped-call]
    return out if bias is None else out + bias
