"""Residual connections: plain, hyper-connections, and manifold-constrained ones (arXiv 2409.19606, 2512.24880).

The state is n parallel streams [T, n, d] (plain: n = 1). Each sub-layer reads one mixture of them and writes
its output back to all, while the streams themselves are mixed by an n x n map, which mHC keeps doubly stochastic
so that the product over all depth can neither grow nor vanish. ``mhc_single_pass`` (DeepSeek-V4.1) reads with the
weights that the site before computed, so that each site needs the streams but once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fourfold import ops
from fourfold.config import ModelConfig
from fourfold.model.context import Context


class PlainResidual(nn.Module):
    """``x + f(x)`` on a single stream."""

    def forward(self, streams: Tensor, f: Callable[[Tensor], Tensor], ctx: Context) -> Tensor:
        """streams: [T, 1, d]; f: [T, d] -> [T, d]."""
        return streams + f(streams[:, 0])[:, None]


class HyperConnection(nn.Module):
    """One site of ``hc`` or ``mhc``; starts as the plain residual: reads the mean, writes to all, mixes hardly."""

    def __init__(self, cfg: ModelConfig, site: int) -> None:
        super().__init__()
        self.cfg, self.site, self.norm_eps = cfg.residual, site, cfg.rms_norm_eps
        n = cfg.residual.hc_mult
        self.fn = nn.Parameter(torch.empty(n * (n + 2), n * cfg.hidden_size))
        self.base = nn.Parameter(torch.empty(n * (n + 2)))
        self.scale = nn.Parameter(torch.empty(3))

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        n, mhc = self.cfg.hc_mult, self.cfg.kind != "hc"
        nn.init.normal_(self.fn, std=std)
        nn.init.constant_(self.scale, 0.01)
        pre = torch.full((n,), -math.log(n - 1) if mhc and n > 1 else 1 / n)  # sigmoid(-ln(n - 1)) = 1 / n
        post = torch.zeros(n) if mhc else torch.ones(n)  # 2 sigmoid(0) = 1
        comb = torch.eye(n) * (6.0 if mhc else 1.0)
        self.base.copy_(torch.cat([pre, post, comb.flatten()]))

    def forward(self, streams: Tensor, f: Callable[[Tensor], Tensor], ctx: Context) -> Tensor:
        """streams: [T, n, d]; f: [T, d] -> [T, d]."""
        cfg = self.cfg
        with ops.float32_island(streams):
            # Once for all three where they learn; else each reads half types as they are
            wide = ops.at_least_float32(streams) if torch.is_grad_enabled() else streams
            maps = (self.fn, self.base, self.scale, cfg.kind != "hc", cfg.hc_sinkhorn_iters, cfg.hc_eps, self.norm_eps)
            pre, post, comb = ops.hyper_maps(wide, *maps)
            if cfg.kind == "mhc_single_pass":
                pre, ctx.read_weights = first_stream(pre) if ctx.read_weights is None else ctx.read_weights, pre
            x = ops.read_streams(wide, pre).to(streams.dtype)
        if ctx.probe is not None:
            ctx.probe.stream_maps[self.site] = comb.detach()
        y = f(x)
        with ops.float32_island(streams):
            out: Tensor = ops.mix_streams(wide, y, post, comb).to(streams.dtype)
        return out


def first_stream(pre: Tensor) -> Tensor:
    """Weights [T, n] that read the first stream alone: of the site that no other comes before."""
    return torch.eye(pre.shape[-1], device=pre.device, dtype=pre.dtype)[0].expand_as(pre)


class PlainCollapse(nn.Module):
    """One stream is the hidden state."""

    def forward(self, streams: Tensor, ctx: Context) -> Tensor:
        return streams[:, 0]


class LastReadCollapse(nn.Module):
    """The streams as the last site's weights read them (``mhc_single_pass``)."""

    def forward(self, streams: Tensor, ctx: Context) -> Tensor:
        """streams: [T, n, d]. Returns [T, d]."""
        assert ctx.read_weights is not None
        with ops.float32_island(streams):
            out: Tensor = ops.read_streams(streams, ctx.read_weights)
            return out


class StreamCollapse(nn.Module):
    """The gated sum of all streams before the final norm (``hc_head``)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        n = cfg.residual.hc_mult
        self.eps, self.norm_eps = cfg.residual.hc_eps, cfg.rms_norm_eps
        self.fn = nn.Parameter(torch.empty(n, n * cfg.hidden_size))
        self.base = nn.Parameter(torch.empty(n))
        self.scale = nn.Parameter(torch.empty(1))

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        n = len(self.base)
        nn.init.normal_(self.fn, std=std)
        nn.init.constant_(self.scale, 0.01)
        nn.init.constant_(self.base, -math.log(n - 1) if n > 1 else 0.0)

    def forward(self, streams: Tensor, ctx: Context) -> Tensor:
        """streams: [T, n, d]. Returns [T, d]."""
        with ops.float32_island(streams):
            parameters = self.fn, self.base, self.scale, self.eps, self.norm_eps
            out: Tensor = ops.collapse_streams(streams, *parameters)
            return out


def residual_site(cfg: ModelConfig, site: int) -> nn.Module:
    return PlainResidual() if cfg.residual.kind == "plain" else HyperConnection(cfg, site)


def collapse(cfg: ModelConfig) -> nn.Module:
    if cfg.residual.kind == "plain":
        return PlainCollapse()
    return LastReadCollapse() if cfg.residual.kind == "mhc_single_pass" else StreamCollapse(cfg)
