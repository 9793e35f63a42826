"""Feed-forward layers: the dense SwiGLU, and routed plus shared experts (arXiv 2401.06066; 2412.19437, section 2.1.2).

Balance comes without an auxiliary loss: a bias per expert (and per modality) shifts which experts are chosen,
never how they are weighted, and is moved after each step towards the under-loaded ones (arXiv 2408.15664).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold import ops
from fourfold.config import ModelConfig, MoEConfig
from fourfold.model.context import Context
from fourfold.model.linear import Linear
from fourfold.model.probe import expert_load
from fourfold.model.sequence import MODALITIES, Packed


class MLP(nn.Module):
    """``down swiglu(gate x, up x)``."""

    def __init__(self, cfg: ModelConfig, intermediate_size: int) -> None:
        super().__init__()
        self.limit = cfg.moe.swiglu_limit
        self.gate_proj = Linear(cfg.hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(cfg.hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """x: [T, d]. Returns [T, d]."""
        out: Tensor = self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x), self.limit))
        return out


class Router(nn.Module):
    """Chooses K of E experts for each token and weighs them; float32 throughout.

    A hash layer (DeepSeek-V4) takes the choice from a table of token ids instead, and has no selection bias.
    """

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.cfg, self.by_hash = cfg.moe, layer < cfg.moe.num_hash_layers
        self.weight = nn.Parameter(torch.empty(cfg.moe.n_routed_experts, cfg.hidden_size))
        if self.by_hash:
            pairs = torch.arange(cfg.vocab_size * cfg.moe.num_experts_per_tok)
            table = (pairs % cfg.moe.n_routed_experts).view(cfg.vocab_size, -1)
            self.register_buffer("tid2eid", table)
            self.tid2eid: Tensor
            return
        self.register_buffer("bias", torch.zeros(cfg.moe.n_routed_experts))
        if cfg.media.modalities:
            self.register_buffer("media_bias", torch.zeros(len(MODALITIES) - 1, cfg.moe.n_routed_experts))
        self.bias: Tensor
        self.media_bias: Tensor

    def selection_bias(self, modality: Tensor) -> Tensor:
        """float32 [T, E]: the selection bias that belongs to each token's modality."""
        if "media_bias" not in self._buffers:
            return self.bias.expand(len(modality), -1)
        return torch.cat([self.bias[None], self.media_bias])[modality]

    def forward(self, x: Tensor, packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
        """x: [T, d]. Returns chosen experts int64 [T, K], their weights and all scores [T, E]."""
        cfg = self.cfg
        with ops.float32_island(x):
            logits = ops.wide_linear(x, self.weight)
        scores = score(logits, cfg.scoring_func)
        if self.by_hash:
            indices = self.tid2eid[packed.tokens]
        else:
            indices = choose_experts(scores.detach() + self.selection_bias(packed.modality), cfg)
        weights = scores.gather(-1, indices)
        if cfg.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return indices, weights * cfg.routed_scaling_factor, scores


def score(logits: Tensor, scoring_func: str) -> Tensor:
    """Router logits to positive scores."""
    if scoring_func == "sigmoid":
        return logits.sigmoid()
    return logits.softmax(-1) if scoring_func == "softmax" else F.softplus(logits).sqrt()


def choose_experts(biased: Tensor, cfg: MoEConfig) -> Tensor:
    """The K best experts of the best groups. biased: [T, E]. Returns int64 [T, K].

    A group is as good as its two best experts together (one, where it has one), or as its best (group_limited_greedy).
    """
    if cfg.n_group > 1:
        groups = biased.unflatten(-1, (cfg.n_group, -1))
        judges = 1 if cfg.topk_method == "group_limited_greedy" else min(2, groups.shape[-1])
        best = groups.topk(judges, dim=-1).values.sum(-1).topk(cfg.topk_group, dim=-1).indices
        keep = torch.zeros(groups.shape[:-1], dtype=torch.bool, device=biased.device).scatter(-1, best, True)
        biased = groups.masked_fill(~keep[..., None], -torch.inf).flatten(-2)
    return biased.topk(cfg.num_experts_per_tok, dim=-1).indices


class MoE(nn.Module):
    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        moe, d, width = cfg.moe, cfg.hidden_size, cfg.moe.moe_intermediate_size
        self.cfg = moe
        self.gate = Router(cfg, layer)
        self.gate_up_proj = nn.Parameter(torch.empty(moe.n_routed_experts, 2 * width, d))
        self.down_proj = nn.Parameter(torch.empty(moe.n_routed_experts, d, width))
        self.shared_experts = MLP(cfg, moe.n_shared_experts * width) if moe.n_shared_experts else None
        self.name = ""  # set by the model: its key in telemetry
        # in place of ``ops.experts`` where the experts are spread over processes (fourfold.train.experts)
        self.dispatch: Callable[..., Tensor] | None = None

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """x: [T, d]. Returns [T, d]."""
        indices, weights, scores = self.gate(x, ctx.packed)
        if ctx.probe is not None:
            ctx.probe.experts[self.layer] = indices.detach()
        if self.training:
            pairs = ctx.packed.modality[:, None] * self.cfg.n_routed_experts + indices
            load = expert_load(pairs, len(MODALITIES) * self.cfg.n_routed_experts)
            ctx.loads[self.name] = load.view(len(MODALITIES), -1)
            if ctx.balance:
                n_sequences = len(ctx.packed.cu_seqlens) - 1
                ctx.balance_losses.append(sequence_balance_loss(scores, indices, ctx.packed.sequence_ids, n_sequences))
        dtype, limit = ops.compute_dtype(x), self.cfg.swiglu_limit
        if isinstance(self.gate_up_proj, nn.Parameter):
            gate_up, down = self.gate_up_proj.to(dtype), self.down_proj.to(dtype)
            out = (self.dispatch or ops.experts)(x.to(dtype), indices, weights, gate_up, down, limit)
            complete = self.shared_experts is None
        else:  # quantised, the shared experts too
            shared = () if self.shared_experts is None else self.shared_experts.children()
            arguments = (self.down_proj, x.to(dtype), indices, weights, limit, tuple(shared))
            out, together = self.gate_up_proj.experts(*arguments)
            complete = together or self.shared_experts is None
        return out if complete else out + self.shared_experts(x, ctx)  # type: ignore[misc]


def sequence_balance_loss(scores: Tensor, indices: Tensor, sequence_ids: Tensor, n_sequences: int) -> Tensor:
    """``sum_i f_i P_i`` per sequence, averaged over sequences weighted by length (DeepSeek-V3, eq. 17-20).

    scores: [T, E]; indices: int64 [T, K]; sequence_ids: int64 [T]. 1 when perfectly balanced.
    """
    experts, per_token = scores.shape[-1], indices.shape[-1]
    share = scores / scores.sum(-1, keepdim=True)
    lengths = torch.bincount(sequence_ids, minlength=n_sequences).clamp_min(1)[:, None]
    used = torch.zeros_like(share).scatter_add(-1, indices, torch.ones_like(indices, dtype=share.dtype))
    f = share.new_zeros(n_sequences, experts).index_add(0, sequence_ids, used) * experts / (per_token * lengths)
    p = share.new_zeros(n_sequences, experts).index_add(0, sequence_ids, share) / lengths
    return ((f.detach() * p).sum(-1) * lengths[:, 0]).sum() / lengths.sum()


@torch.no_grad()
def update_bias(router: Router, load: Tensor, speed: float) -> None:
    """Moves each selection bias by ``speed`` towards balance. load: int64 [modalities, E], choices since the last call.

    A modality that did not occur keeps its bias; a hash layer has none.
    """
    if router.by_hash:
        return
    occurred = load.sum(-1, keepdim=True) > 0
    step = speed * torch.sign(load.float().mean(-1, keepdim=True) - load.float()) * occurred
    router.bias += step[0]
    if "media_bias" in router._buffers:
        router.media_bias += step[1:]
