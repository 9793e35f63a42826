"""Hyper-connections in one pass over the streams each way.

The eager reference makes an [T, n, n, d] intermediate and eighty small operations for Sinkhorn; here each token's
n x n map lives in registers: of long batches that learn by Numba, of what a server computes by compiled kernels. Half
types that learn go to the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fourfold.ops import reference
from fourfold.ops.cpu import native
from fourfold.ops.cpu.linear import product, wide_linear
from fourfold.ops.cpu.threads import team
from fourfold.ops.reference.norm import at_least_float32

LONG = 1024  # tokens from which Numba's pass pays: training batches, not the chunks of a server's prefill
FEW = 16  # tokens: more are worth a matrix product of their own
MOST = 8  # streams that the compiled kernels know


def _worth_compiling(x: Tensor) -> bool:
    return len(x) >= LONG and x.dtype in (torch.float32, torch.float64)


def _compiled(x: Tensor, *others: Tensor) -> Any:
    """The compiled kernels, if they can take these tensors; x: [T, n, d]."""
    if any(t.dtype not in (torch.float32, torch.bfloat16) for t in (x, *others)) or not len(x) or x.shape[1] > MOST:
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *others)):
        return None
    return native.library()


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [t.float().contiguous() for t in tensors]


def _kernels() -> Any:
    """Imported on first use: Numba takes a second that a server at rest need not spend."""
    from fourfold.ops.cpu import stream_kernels

    return stream_kernels


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    return function.apply(*args)


class _Maps(torch.autograd.Function):
    """The norm is taken out of the product, which then reads x [T, n d] as it is."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        fn: Tensor,
        base: Tensor,
        scale: Tensor,
        n: int,
        iterations: int,
        eps: float,
        norm_eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        total, width = x.shape
        mixed = product(x, fn)
        inverse = torch.linalg.vector_norm(x, dim=1, keepdim=True).square_().div_(width).add_(norm_eps).rsqrt_()
        spread = scale.repeat_interleave(_widths(n))
        hidden = torch.addcmul(base, mixed * inverse, spread)
        pre, post, comb = x.new_empty(total, n), x.new_empty(total, n), x.new_empty(total, n, n)
        _kernels().maps(hidden.numpy(), pre.numpy(), post.numpy(), comb.numpy(), iterations, eps)
        ctx.save_for_backward(x, fn, spread, mixed, inverse, hidden, pre, post)
        ctx.n, ctx.iterations, ctx.eps = n, iterations, eps
        return pre, post, comb

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, fn, spread, mixed, inverse, hidden, pre, post = ctx.saved_tensors
        g = torch.empty_like(hidden)
        arrays = [t.contiguous().numpy() for t in (hidden, pre, post, *grads, g)]
        _kernels().maps_backward(*arrays, ctx.n, ctx.iterations, ctx.eps)
        dscale = torch.stack([part.sum() for part in (g * mixed * inverse).split(_widths(ctx.n).tolist(), dim=1)])
        dnormed = g * spread
        dmixed = dnormed * inverse
        dinverse = (dnormed * mixed).sum(1, keepdim=True)
        dx = product(dmixed, fn.T)
        dx.addcmul_(x, dinverse * inverse**3, value=-1 / x.shape[1])
        return dx, product(dmixed.T, x.T), g.sum(0), dscale, None, None, None, None


def _widths(n: int) -> Tensor:
    """How many numbers of a site's maps share each of its three scales."""
    return torch.tensor([n, n, n * n])


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pre: Tensor) -> Tensor:
        out = x.new_empty(len(x), x.shape[2])
        _kernels().read(x.numpy(), pre.numpy(), out.numpy())
        ctx.save_for_backward(x, pre)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, pre = ctx.saved_tensors
        dx, dpre = torch.empty_like(x), torch.empty_like(pre)
        _kernels().read_backward(x.numpy(), pre.numpy(), grads[0].contiguous().numpy(), dx.numpy(), dpre.numpy())
        return dx, dpre


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        out = torch.empty_like(x)
        _kernels().mix(x.numpy(), y.numpy(), post.numpy(), comb.numpy(), out.numpy())
        ctx.save_for_backward(x, y, post, comb)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        saved = ctx.saved_tensors
        out = tuple(torch.empty_like(t) for t in saved)
        arrays = [t.numpy() for t in (*saved, grads[0].contiguous(), *out)]
        _kernels().mix_backward(*arrays)
        dx, dy, dpost, dcomb = out
        return dx, dy, dpost, dcomb


def hyper_maps(
    x: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    doubly_stochastic: bool,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fourfold.ops.reference.hyper_maps`."""
    if doubly_stochastic and (library := _compiled(x, fn, base, scale)):
        rows, n, d = x.shape
        pre, post, comb = torch.empty(rows, n), torch.empty(rows, n), torch.empty(rows, n, n)
        rest = rows, n, n * d, iterations, eps, norm_eps, *(t.data_ptr() for t in (pre, post, comb)), team()
        if x.dtype == torch.bfloat16 and rows > FEW:
            inputs = [x.contiguous(), *_wide(base, scale), wide_linear(x.flatten(1), fn)]
            library.ff_half_hyper_maps(*(t.data_ptr() for t in inputs), *rest)
            return pre, post, comb
        inputs = _wide(x, fn, base, scale)
        known = product(inputs[0].flatten(1), inputs[1]) if rows > FEW else None
        library.ff_hyper_maps(*(t.data_ptr() for t in inputs), None if known is None else known.data_ptr(), *rest)
        return pre, post, comb
    if not (doubly_stochastic and _worth_compiling(x)):
        return reference.hyper_maps(x, fn, base, scale, doubly_stochastic, iterations, eps, norm_eps)
    flat = at_least_float32(x).flatten(1)
    parameters = (t.to(flat.dtype) for t in (fn, base, scale))
    pre, post, comb = _apply(_Maps, flat, *parameters, x.shape[1], iterations, eps, norm_eps)
    return pre, post, comb


def read_streams(x: Tensor, pre: Tensor) -> Tensor:
    """See :func:`fourfold.ops.reference.read_streams`."""
    if library := _compiled(x, pre):
        read = library.ff_half_read_streams if x.dtype == torch.bfloat16 else library.ff_read_streams
        x, (weights,) = x.contiguous(), _wide(pre)
        out = x.new_empty(len(x), x.shape[2])
        read(x.data_ptr(), weights.data_ptr(), *x.shape, out.data_ptr(), team())
        return out
    if not (_worth_compiling(x) and x.dtype == pre.dtype):
        return reference.read_streams(x, pre)
    learnt: Tensor = _apply(_Read, x.contiguous(), pre.contiguous())
    return learnt


def mix_streams(x: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """See :func:`fourfold.ops.reference.mix_streams`."""
    if library := _compiled(x, y, post, comb):
        mix = library.ff_half_mix_streams if x.dtype == torch.bfloat16 else library.ff_mix_streams
        inputs = x.contiguous(), y.to(x.dtype).contiguous(), *_wide(post, comb)
        out = torch.empty_like(inputs[0])
        mix(*(t.data_ptr() for t in inputs), *x.shape, out.data_ptr(), team())
        return out
    if not (_worth_compiling(x) and x.dtype == post.dtype):
        return reference.mix_streams(x, y, post, comb)
    learnt: Tensor = _apply(_Mix, x.contiguous(), y.to(x.dtype).contiguous(), post.contiguous(), comb.contiguous())
    return learnt


def collapse_streams(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float) -> Tensor:
    """See :func:`fourfold.ops.reference.collapse_streams`."""
    library = _compiled(x, fn, base, scale)
    if library is None or len(x) > FEW:
        return reference.collapse_streams(x, fn, base, scale, eps, norm_eps)
    inputs = _wide(x, fn, base, scale)
    out = inputs[0].new_empty(len(x), x.shape[2])
    library.ff_collapse_streams(*(t.data_ptr() for t in inputs), *x.shape, eps, norm_eps, out.data_ptr())
    return out.to(x.dtype)
