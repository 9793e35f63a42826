"""The plain transformer, written out once more: what must be left when every innovation is switched off.

It reads a model's weights by name and knows nothing of its code. ``fused``: by the kernels that the CPU has for norms,
rotations and attention, where the bits are to be the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold import ops
from fourfold.config import ModelConfig


def rms_norm(x: Tensor, weight: Tensor, eps: float, fused: bool = False) -> Tensor:
    if fused:
        return ops.rms_norm(x, weight, eps)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, positions: Tensor, theta: float, interleaved: bool, fused: bool = False) -> Tensor:
    """x: [T, H, dim]."""
    dim = x.shape[-1]
    angles = positions[:, None].float() * theta ** (-2 * torch.arange(dim // 2, dtype=torch.float32) / dim)
    if fused:
        return ops.apply_rope(x, angles.cos(), angles.sin(), interleaved)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    out = torch.empty_like(x)
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(dim // 2), slice(dim // 2, None))
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, fused: bool) -> Tensor:
    """Causal; q: [T, H, D], k: [T, Hk, D], v: [T, Hk, Dv]. Returns [T, H * Dv]."""
    causal = torch.ones(len(q), len(q), dtype=torch.bool).tril()
    if fused:
        wide = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
        q, k, wide = (t.transpose(0, 1)[None] for t in (q, k, wide))
        o = F.scaled_dot_product_attention(q, k, wide, attn_mask=causal[None, None], scale=scale, enable_gqa=True)
        return o[0].transpose(0, 1)[..., : v.shape[-1]].flatten(1)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = torch.einsum("blhd,bshd->bhls", q[None], k[None]) * scale
    probs = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    return torch.einsum("bhls,bshd->blhd", probs, v[None])[0].flatten(1)


def gqa(w: dict[str, Tensor], at: str, cfg: ModelConfig, x: Tensor, positions: Tensor, fused: bool) -> Tensor:
    a = cfg.attention
    q, k, v = (ops.linear(x, w[f"{at}{n}_proj.weight"]).unflatten(-1, (-1, a.head_dim)) for n in "qkv")
    q, k = (rotate(t, positions, cfg.rope.theta, interleaved=False, fused=fused) for t in (q, k))
    o = softmax_attention(q, k, v, a.head_dim**-0.5, fused)
    return ops.linear(o, w[f"{at}o_proj.weight"])


def mla(w: dict[str, Tensor], at: str, cfg: ModelConfig, x: Tensor, positions: Tensor, fused: bool) -> Tensor:
    a = cfg.attention
    heads, dn, dr, rank = a.num_attention_heads, a.qk_nope_head_dim, a.qk_rope_head_dim, a.kv_lora_rank
    if a.q_lora_rank:
        latent = rms_norm(
            ops.linear(x, w[f"{at}q_a_proj.weight"]), w[f"{at}q_a_layernorm.weight"], cfg.rms_norm_eps, fused
        )
        q = ops.linear(latent, w[f"{at}q_b_proj.weight"])
    else:
        q = ops.linear(x, w[f"{at}q_proj.weight"])
    q = q.unflatten(-1, (heads, dn + dr))
    ckr = ops.linear(x, w[f"{at}kv_a_proj_with_mqa.weight"])
    c = rms_norm(ckr[:, :rank], w[f"{at}kv_a_layernorm.weight"], cfg.rms_norm_eps, fused)
    k_rope = rotate(ckr[:, None, rank:], positions, cfg.rope.theta, interleaved=True, fused=fused)
    q_rope = rotate(q[..., dn:], positions, cfg.rope.theta, interleaved=True, fused=fused)
    kv = ops.linear(c, w[f"{at}kv_b_proj.weight"]).unflatten(-1, (heads, -1))
    q = torch.cat([q[..., :dn], q_rope], dim=-1)
    k = torch.cat([kv[..., :dn], k_rope.expand(-1, heads, -1)], dim=-1)
    o = softmax_attention(q, k, kv[..., dn:], (dn + dr) ** -0.5, fused)
    return ops.linear(o, w[f"{at}o_proj.weight"])


def swiglu(w: dict[str, Tensor], at: str, x: Tensor) -> Tensor:
    gate, up = ops.linear(x, w[f"{at}gate_proj.weight"]), ops.linear(x, w[f"{at}up_proj.weight"])
    return ops.linear(F.silu(gate) * up, w[f"{at}down_proj.weight"])


def block(w: dict[str, Tensor], at: str, cfg: ModelConfig, x: Tensor, positions: Tensor, fused: bool) -> Tensor:
    attention = mla if cfg.attention.kind == "mla" else gqa
    normed = rms_norm(x, w[f"{at}input_layernorm.weight"], cfg.rms_norm_eps, fused)
    x = x + attention(w, f"{at}self_attn.", cfg, normed, positions, fused)
    normed = rms_norm(x, w[f"{at}post_attention_layernorm.weight"], cfg.rms_norm_eps, fused)
    return x + swiglu(w, f"{at}mlp.", normed)


@torch.no_grad()
def trunk(w: dict[str, Tensor], cfg: ModelConfig, tokens: Tensor, fused: bool) -> Tensor:
    """The residual stream after the last layer, [T, d], of one sequence."""
    x = w["embed_tokens.weight"][tokens]
    for layer in range(cfg.num_hidden_layers):
        x = block(w, f"layers.{layer}.", cfg, x, torch.arange(len(tokens)), fused)
    return x


@torch.no_grad()
def logits(w: dict[str, Tensor], cfg: ModelConfig, tokens: Tensor, fused: bool = True) -> Tensor:
    """float32 [T, V]. ``fused``: by torch's attention kernel, else written out."""
    x = trunk(w, cfg, tokens, fused)
    return ops.linear(rms_norm(x, w["norm.weight"], cfg.rms_norm_eps, fused), w["lm_head.weight"])
