"""The released models written out a second time, from their description alone, each with a list of mistakes to make.

``logits(model, ids)`` agrees with ``transformers``. ``logits(model, ids, mistake)`` makes one mistake that has cost
others weeks; that it then disagrees proves that the random models can tell.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from tests.parity.reference import CSA, SLIDING

LATENT_MISTAKES = {
    "deepseek_v2": ("rope halves", "no mscale", "group sum", "renormalise", "unscaled", "fused order"),
    "deepseek_v3": ("rope halves", "no mscale", "group max", "group zero", "biased weights", "fused order"),
    "deepseek_v32": (
        "rope halves",
        "fused order",
        "index rope pairs",
        "index rope last",
        "index latent raw",
        "index norm unbiased",
        "index ignored",
    ),
}
V4_MISTAKES = (
    "comb direct",
    "visible t // ratio",
    "visible unfinished",
    "first entry pools zeros",
    "halves exchanged",
    "own entry late",
    "window by the other table",
    "all by the first table",
    "entry at its last position",
    "not turned back",
    "index rope first halves",
    "no sink",
    "query norm missing",
    "hash by score",
    "bias weighs",
    "clamp missing",
    "fused order",
)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, mistake: str = "") -> Tensor:
    """float32 [T, V] of one sequence of T tokens."""
    kind = V4 if model.config.model_type == "deepseek_v4" else Latent
    return kind(model, mistake).logits(ids)


@torch.no_grad()
def mtp_logits(model: PreTrainedModel, mtp: dict[str, Tensor], ids: Tensor) -> Tensor:
    """V4's guess of token t + 2 at each t < T - 1: [T - 1, V]. ``mtp``: its weights, the block's under "block."."""
    v4 = V4(model, "")
    h = v4.trunk(ids)[:-1]
    last = v4.cfg.num_hidden_layers
    v4.w |= {f"layers.{last}.{name.removeprefix('block.')}": t for name, t in mtp.items() if name.startswith("block.")}
    v4.w |= {f"mtp.{name}": t for name, t in mtp.items()}
    v4.layer_types, v4.mlp_layer_types = [*v4.layer_types, SLIDING], [*v4.mlp_layer_types, "moe"]
    v4.ids, v4.positions = ids[1:], torch.arange(len(ids) - 1)
    following = v4.linear(rms(v4.w["embed_tokens.weight"][ids[1:]], mtp["enorm.weight"]), "mtp.e_proj")
    z = following[:, None] + v4.linear(rms(h, mtp["hnorm.weight"]), "mtp.h_proj")
    return v4.head(v4.block(z, last), "mtp.")


def rms(x: Tensor, weight: Tensor | float = 1.0, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def frequencies(dim: int, rope: dict[str, Any]) -> Tensor:
    inv = rope["rope_theta"] ** (-torch.arange(0, dim, 2).float() / dim)
    if rope["rope_type"] == "default":
        return inv

    def turns(n: float) -> float:
        return (
            dim
            * math.log(rope["original_max_position_embeddings"] / (n * 2 * math.pi))
            / (2 * math.log(rope["rope_theta"]))
        )

    low, high = max(math.floor(turns(rope["beta_fast"])), 0), min(math.ceil(turns(rope["beta_slow"])), dim - 1)
    ramp = ((torch.arange(dim // 2) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return inv / rope["factor"] * ramp + inv * (1 - ramp)


def turn(x: Tensor, positions: Tensor, inv: Tensor, *, pairs: bool = True, sign: int = 1, scale: float = 1) -> Tensor:
    """x: [T, ..., dim], all of which turns; ``pairs``: neighbours turn together, else the two halves."""
    angles = positions.float()[:, None] * inv
    angles = angles.view(len(x), *[1] * (x.dim() - 2), -1)
    cos, sin = angles.cos() * scale, angles.sin() * scale * sign
    a, b = (x[..., 0::2], x[..., 1::2]) if pairs else x.chunk(2, -1)
    turned = (a * cos - b * sin, a * sin + b * cos)
    return torch.stack(turned, -1).flatten(-2) if pairs else torch.cat(turned, -1)


def keep_top(scores: Tensor, visible: Tensor, k: int) -> Tensor:
    best = scores.masked_fill(~visible, -math.inf).topk(min(k, scores.shape[-1]), -1).indices
    return visible & torch.zeros_like(visible).scatter(-1, best, True)


class Oracle:
    def __init__(self, model: PreTrainedModel, mistake: str) -> None:
        self.cfg, self.mistake = model.config, mistake
        self.w = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.w[name + ".weight"])

    def expert(self, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        limit = getattr(self.cfg, "swiglu_limit", math.inf)
        if self.mistake == "clamp missing":
            limit = math.inf
        return (F.silu((x @ gate.T).clamp(max=limit)) * (x @ up.T).clamp(-limit, limit)) @ down.T

    def dense(self, x: Tensor, at: str) -> Tensor:
        return self.expert(x, *(self.w[f"{at}{name}_proj.weight"] for name in ("gate", "up", "down")))

    def routed(self, x: Tensor, at: str, weights: Tensor, chosen: Tensor) -> Tensor:
        y = self.dense(x, at + "shared_experts.")
        fused, down = self.w[at + "experts.gate_up_proj"], self.w[at + "experts.down_proj"]
        for e in range(self.cfg.n_routed_experts):
            halves = fused[e].chunk(2)
            if self.mistake == "fused order":
                halves = halves[::-1]
            y = y + (weights * (chosen == e)).sum(-1, keepdim=True) * self.expert(x, *halves, down[e])
        return y


class Latent(Oracle):
    """V2, V3 and V3.2, attention in the absorbed form."""

    def logits(self, ids: Tensor) -> Tensor:
        self.positions = torch.arange(len(ids))
        rope = self.cfg.rope_parameters
        self.inv = frequencies(self.cfg.qk_rope_head_dim, rope)
        self.turn_scale = self.logit_scale = 1.0
        if rope["rope_type"] == "yarn":
            grow = 0.1 * math.log(rope["factor"])
            self.turn_scale = (grow * rope["mscale"] + 1) / (grow * rope["mscale_all_dim"] + 1)
            self.logit_scale = (grow * rope["mscale_all_dim"] + 1) ** 2
        if self.mistake == "no mscale":
            self.logit_scale = 1.0
        h = self.w["embed_tokens.weight"][ids]
        for layer in range(self.cfg.num_hidden_layers):
            at = f"layers.{layer}."
            h = h + self.attend(rms(h, self.w[at + "input_layernorm.weight"]), at + "self_attn.")
            x = rms(h, self.w[at + "post_attention_layernorm.weight"])
            h = h + (self.dense if layer < self.cfg.first_k_dense_replace else self.moe)(x, at + "mlp.")
        return self.linear(rms(h, self.w["norm.weight"]), "lm_head")

    def attend(self, x: Tensor, at: str) -> Tensor:
        cfg = self.cfg
        nope, rank = cfg.qk_nope_head_dim, cfg.kv_lora_rank
        pairs = self.mistake != "rope halves"

        def rope(t: Tensor) -> Tensor:
            return turn(t, self.positions, self.inv, pairs=pairs, scale=self.turn_scale)

        if cfg.q_lora_rank:
            raw = self.linear(x, at + "q_a_proj")
            latent = rms(raw, self.w[at + "q_a_layernorm.weight"])
            q = self.linear(latent, at + "q_b_proj")
        else:
            raw = latent = x
            q = self.linear(x, at + "q_proj")
        q = q.unflatten(-1, (cfg.num_attention_heads, -1))
        compressed = self.linear(x, at + "kv_a_proj_with_mqa")
        c, k_rope = rms(compressed[:, :rank], self.w[at + "kv_a_layernorm.weight"]), rope(compressed[:, rank:])
        expand = self.w[at + "kv_b_proj.weight"].view(cfg.num_attention_heads, -1, rank)
        folded = torch.einsum("thn,hnc->thc", q[..., :nope], expand[:, :nope])
        scores = torch.einsum("thc,sc->hts", folded, c) + torch.einsum("thr,sr->hts", rope(q[..., nope:]), k_rope)
        scores = scores * self.logit_scale * q.shape[-1] ** -0.5
        visible = self.positions[None] <= self.positions[:, None]
        if cfg.model_type == "deepseek_v32" and self.mistake != "index ignored":
            visible = self.select(x, raw if self.mistake == "index latent raw" else latent, visible, at + "indexer.")
        probs = scores.masked_fill(~visible, -math.inf).softmax(-1)
        o = torch.einsum("hts,sc->thc", probs, c)
        return self.linear(torch.einsum("thc,hvc->thv", o, expand[:, nope:]).flatten(1), at + "o_proj")

    def select(self, x: Tensor, latent: Tensor, visible: Tensor, at: str) -> Tensor:
        cfg, dim = self.cfg, self.cfg.qk_rope_head_dim

        def rope(t: Tensor) -> Tensor:
            pairs = self.mistake == "index rope pairs"
            if self.mistake == "index rope last":
                turned = turn(t[..., -dim:], self.positions, self.inv, pairs=True, scale=self.turn_scale)
                return torch.cat([t[..., :-dim], turned], -1)
            turned = turn(t[..., :dim], self.positions, self.inv, pairs=pairs, scale=self.turn_scale)
            return torch.cat([turned, t[..., dim:]], -1)

        q = rope(self.linear(latent, at + "wq_b").unflatten(-1, (cfg.index_n_heads, -1)))
        bias = self.w[at + "k_norm.bias"] * (self.mistake != "index norm unbiased")
        k = F.layer_norm(self.linear(x, at + "wk"), (cfg.index_head_dim,), self.w[at + "k_norm.weight"], bias, 1e-6)
        scores = torch.einsum("thd,sd->ths", q, rope(k)).relu()
        scores = (scores * self.linear(x, at + "weights_proj")[..., None]).sum(1)
        return keep_top(scores, visible, cfg.index_topk)

    def moe(self, x: Tensor, at: str) -> Tensor:
        cfg, groups = self.cfg, self.cfg.n_group or 1
        out = self.linear(x, at + "gate")
        first = cfg.model_type == "deepseek_v2"
        scores = out.softmax(-1) if first else out.sigmoid()
        biased = scores if first else scores + self.w[at + "gate.e_score_correction_bias"]
        grouped = biased.unflatten(-1, (groups, -1))
        if groups > 1:
            by_best = first != (self.mistake in ("group sum", "group max"))
            worth = grouped.amax(-1) if by_best else grouped.topk(2, -1).values.sum(-1)
            kept = keep_top(worth, torch.ones_like(worth, dtype=torch.bool), cfg.topk_group)
            hidden = 0.0 if first or self.mistake == "group zero" else -math.inf
            grouped = grouped.masked_fill(~kept[..., None], hidden)
        chosen = grouped.flatten(-2).topk(cfg.num_experts_per_tok, -1).indices
        weights = (biased if self.mistake == "biased weights" else scores).gather(-1, chosen)
        if (not first and cfg.norm_topk_prob) or self.mistake == "renormalise":
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if self.mistake != "unscaled":
            weights = weights * cfg.routed_scaling_factor
        return self.routed(x, at, weights, chosen)


class V4(Oracle):
    def __init__(self, model: PreTrainedModel, mistake: str) -> None:
        super().__init__(model, mistake)
        self.layer_types, self.mlp_layer_types = self.cfg.layer_types, self.cfg.mlp_layer_types

    def logits(self, ids: Tensor) -> Tensor:
        return self.head(self.trunk(ids))

    def trunk(self, ids: Tensor) -> Tensor:
        """The streams behind the last layer, [T, n, d]."""
        cfg = self.cfg
        self.ids, self.positions = ids, torch.arange(len(ids))
        ropes = cfg.rope_parameters
        self.tables = {name: frequencies(cfg.qk_rope_head_dim, ropes[name]) for name in ("main", "compress")}
        h = self.w["embed_tokens.weight"][ids][:, None].repeat(1, cfg.hc_mult, 1)
        for layer in range(cfg.num_hidden_layers):
            h = self.block(h, layer)
        return h

    def block(self, h: Tensor, layer: int) -> Tensor:
        at = f"layers.{layer}."
        h = self.site(h, at + "attn_hc.", at + "input_layernorm", lambda x: self.attend(x, layer))
        return self.site(h, at + "ffn_hc.", at + "post_attention_layernorm", lambda x: self.moe(x, layer))

    def head(self, h: Tensor, at: str = "") -> Tensor:
        fn, base, scale = (self.w[f"{at}hc_head.hc_{name}"] for name in ("fn", "base", "scale"))
        pre = torch.sigmoid(rms(h.flatten(1)) @ fn.T * scale + base) + self.cfg.hc_eps
        return self.linear(rms((pre[..., None] * h).sum(1), self.w[at + "norm.weight"]), "lm_head")

    def site(self, h: Tensor, at: str, norm: str, f: Any) -> Tensor:
        n, eps = self.cfg.hc_mult, self.cfg.hc_eps
        fn, base, scale = (self.w[at + name] for name in ("fn", "base", "scale"))
        mixed = (rms(h.flatten(1)) @ fn.T).split([n, n, n * n], -1)
        pre, post, comb = (m * s + b for m, s, b in zip(mixed, scale, base.split([n, n, n * n]), strict=True))
        comb = comb.unflatten(-1, (n, n)).softmax(-1) + eps
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
        for _ in range(self.cfg.hc_sinkhorn_iters - 1):
            comb = comb / (comb.sum(-1, keepdim=True) + eps)
            comb = comb / (comb.sum(-2, keepdim=True) + eps)
        y = f(rms(((pre.sigmoid() + eps)[..., None] * h).sum(1), self.w[norm + ".weight"]))
        mix = "tkj,tjd->tkd" if self.mistake == "comb direct" else "tjk,tjd->tkd"
        return 2 * post.sigmoid()[..., None] * y[:, None] + torch.einsum(mix, comb, h)

    def rope(self, x: Tensor, table: Tensor, positions: Tensor | None = None, sign: int = 1) -> Tensor:
        """Pairs of the last dimensions."""
        dim = self.cfg.qk_rope_head_dim
        turned = turn(x[..., -dim:], self.positions if positions is None else positions, table, sign=sign)
        return torch.cat([x[..., :-dim], turned], -1)

    def pool(self, x: Tensor, at: str, ratio: int, dim: int, overlap: bool) -> Tensor:
        """The entries of all finished groups, [M, dim]."""
        n = len(x) // ratio
        values, scores = (
            self.linear(x[: n * ratio], at + name).unflatten(0, (n, ratio)) for name in ("kv_proj", "gate_proj")
        )
        scores = scores + self.w[at + "position_bias"]
        if overlap:
            before, own = slice(0, dim), slice(dim, None)
            if self.mistake == "halves exchanged":
                before, own = own, before
            nothing = values.new_zeros(1, ratio, dim)
            hidden = nothing if self.mistake == "first entry pools zeros" else nothing - math.inf
            values = torch.cat([torch.cat([nothing, values[:-1, :, before]]), values[..., own]], 1)
            scores = torch.cat([torch.cat([hidden, scores[:-1, :, before]]), scores[..., own]], 1)
        entries = rms((values * scores.softmax(1)).sum(1), self.w[at + "kv_norm.weight"])
        positions = torch.arange(n) * ratio + (ratio - 1) * (self.mistake == "entry at its last position")
        return self.rope(entries, self.tables["compress"], positions)

    def attend(self, x: Tensor, layer: int) -> Tensor:
        cfg, at = self.cfg, f"layers.{layer}.self_attn."
        kind = self.layer_types[layer]
        name = "main" if kind == SLIDING else "compress"
        if self.mistake == "window by the other table" and kind != SLIDING:
            name = "main"
        if self.mistake == "all by the first table" and kind == SLIDING:
            name = "compress"
        table = self.tables[name]
        latent = rms(self.linear(x, at + "q_a_proj"), self.w[at + "q_a_norm.weight"])
        q = self.linear(latent, at + "q_b_proj").unflatten(-1, (cfg.num_attention_heads, -1))
        q = self.rope(q if self.mistake == "query norm missing" else rms(q), table)
        keys = self.rope(rms(self.linear(x, at + "kv_proj"), self.w[at + "kv_norm.weight"]), table)
        age = self.positions[:, None] - self.positions[None]
        visible = (age >= 0) & (age < cfg.sliding_window)
        if kind != SLIDING:
            ratio = cfg.compress_rates[kind]
            entries = self.pool(x, at + "compressor.", ratio, cfg.head_dim, kind == CSA)
            seen = self.seen(ratio, len(entries))
            if kind == CSA:
                seen = self.select(x, latent, seen, ratio, at + "compressor.indexer.")
            keys, visible = torch.cat([keys, entries]), torch.cat([visible, seen], -1)
        scores = torch.einsum("thd,sd->hts", q, keys) * cfg.head_dim**-0.5
        scores = scores.masked_fill(~visible, -math.inf)
        if self.mistake == "no sink":
            probs = scores.softmax(-1)
        else:
            sinks = self.w[at + "sinks"].view(-1, 1, 1).expand(-1, len(x), 1)
            probs = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        o = torch.einsum("hts,sd->thd", probs, keys)
        if self.mistake != "not turned back":
            o = self.rope(o, table, sign=-1)
        o = o.reshape(len(x), cfg.o_groups, -1)
        groups = self.w[at + "o_a_proj.weight"].unflatten(0, (cfg.o_groups, -1))
        return self.linear(torch.einsum("tgd,grd->tgr", o, groups).flatten(1), at + "o_b_proj")

    def seen(self, ratio: int, n: int) -> Tensor:
        """Which finished groups each query sees, [T, n]."""
        finished = (self.positions + 1) // ratio
        if self.mistake == "visible t // ratio":
            finished = self.positions // ratio
        if self.mistake == "visible unfinished":
            finished = finished + 1
        if self.mistake == "own entry late":
            finished = finished - 1
        return torch.arange(n) < finished[:, None]

    def select(self, x: Tensor, latent: Tensor, seen: Tensor, ratio: int, at: str) -> Tensor:
        cfg, table = self.cfg, self.tables["compress"]
        k = self.pool(x, at, ratio, cfg.index_head_dim, overlap=True)
        q = self.linear(latent, at + "q_b_proj").unflatten(-1, (cfg.index_n_heads, -1))
        if self.mistake == "index rope first halves":
            dim = cfg.qk_rope_head_dim
            turned = turn(q[..., :dim], self.positions, table, pairs=False)
            q = torch.cat([turned, q[..., dim:]], -1)
        else:
            q = self.rope(q, table)
        weights = self.linear(x, at + "scorer.weights_proj")
        scores = (torch.einsum("thd,sd->ths", q, k).relu() * weights[..., None]).sum(1)
        return keep_top(scores, seen, cfg.index_topk)

    def moe(self, x: Tensor, layer: int) -> Tensor:
        cfg, at = self.cfg, f"layers.{layer}.mlp."
        out = self.linear(x, at + "gate")
        scores = F.softplus(out).sqrt() if cfg.scoring_func == "sqrtsoftplus" else out.sigmoid()
        biased = scores
        if self.mlp_layer_types[layer] == "hash_moe" and self.mistake != "hash by score":
            chosen = self.w[at + "gate.tid2eid"][self.ids]
        else:
            biased = scores + self.w.get(at + "gate.e_score_correction_bias", torch.zeros(()))
            chosen = biased.topk(cfg.num_experts_per_tok, -1).indices
        weights = (biased if self.mistake == "bias weighs" else scores).gather(-1, chosen)
        weights = weights / weights.sum(-1, keepdim=True) * cfg.routed_scaling_factor
        return self.routed(x, at, weights, chosen)
