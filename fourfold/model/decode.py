"""One new position of each sequence through many layers at once, where a twin of :func:`ops.decode_layers` can.

It takes the weights from the modules of layers with compressed attention and ``mhc``, and computes what they would.
"""

from __future__ import annotations

import os
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fourfold import ops
from fourfold.config import ModelConfig
from fourfold.model.block import Block
from fourfold.model.cache import PagePool
from fourfold.model.compressed_attention import CompressedAttention
from fourfold.model.compressor import Compressor
from fourfold.model.context import Context
from fourfold.model.linear import Linear
from fourfold.model.moe import MLP, MoE

MOST = 64  # sequences: more are worth matrix products of their own


class Decoder:
    """The layers of a model as the op takes them, with pages of one size."""

    def __init__(self, blocks: nn.ModuleList, cfg: ModelConfig, pool: PagePool) -> None:
        a, moe, hyper = cfg.attention, cfg.moe, cfg.residual
        self.cfg, self.page_size = cfg, pool.page_size
        frequencies = [ops.rope_frequencies(a.rope_dim, rope) for rope in (cfg.rope, cfg.compress_rope)]
        self.layers = ops.DecodeLayers(
            layers=tuple(decode_layer(block, pool) for block in blocks),
            frequencies=torch.stack(frequencies).to(pool.data.device),
            rope_factors=(cfg.rope.attention_factor, cfg.compress_rope.attention_factor),
            heads=a.num_attention_heads,
            groups=a.o_groups,
            window=a.sliding_window,
            topk=cfg.indexer.topk,
            index_heads=cfg.indexer.n_heads,
            per_token=moe.num_experts_per_tok,
            scoring=moe.scoring_func,
            normed_shares=moe.norm_topk_prob,
            share=moe.routed_scaling_factor,
            limit=moe.swiglu_limit,
            iterations=hyper.hc_sinkhorn_iters,
            eps=cfg.rms_norm_eps,
            stream_eps=hyper.hc_eps,
        )
        weights = [t for t in self.layers.tensors if t is not None]
        wanted = set(map(id, weights))
        named = [
            (held, n, t) for m in blocks.modules() for held in (m._parameters, m._buffers) for n, t in held.items()
        ]
        holders = [(held, n, t) for held, n, t in named if id(t) in wanted]
        parts = [(m._modules, n, c) for m in blocks.modules() for n, c in m._modules.items()]
        self._held, self._names, held = zip(*holders, strict=True)
        self._where = list(map(Tensor.data_ptr, held))
        self._owners, self._owned, self._parts = zip(*parts, strict=True)
        self._hooks = [h for m in blocks.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]

    def current(self, cfg: ModelConfig, pool: PagePool) -> bool:
        """Whether the weights are and lie where they did when it was made, and no module is listened to."""
        if cfg is not self.cfg or pool.page_size != self.page_size or any(self._hooks):
            return False
        if not all(map(is_, map(dict.get, self._owners, self._owned), self._parts)):
            return False
        return list(map(Tensor.data_ptr, map(dict.__getitem__, self._held, self._names))) == self._where

    def __call__(self, streams: Tensor, first: int, last: int, ctx: Context) -> Tensor:
        """Layers ``first`` .. ``last`` - 1. streams: [T, n, d]."""
        out: Tensor = ops.decode_layers(streams, self.layers, ctx.decoding, first, last)
        return out


_made: WeakKeyDictionary[nn.ModuleList, Decoder] = WeakKeyDictionary()


def decoder(blocks: nn.ModuleList, cfg: ModelConfig, ctx: Context) -> Decoder | None:
    """For a step of one new text position a sequence over plain pages in memory, with nobody learning or looking in."""
    cache = ctx.cache
    if cache is None or cfg.attention.kind != "compressed" or cfg.residual.kind != "mhc" or blocks.training:
        return None
    if not 0 < len(cache.states) == len(ctx.packed) <= MOST or not cache.single or ctx.probe is not None:
        return None
    if cache.pool.backing is not None or cache.pool.data.dtype not in (torch.float32, torch.bfloat16):
        return None  # rows that have to be fetched, or decoded
    device = cache.pool.data.device.type
    if torch.is_grad_enabled() or torch.is_autocast_enabled(device) or torch.compiler.is_compiling():
        return None
    backend = os.environ.get("FOURFOLD_BACKEND")
    if ops.implementation("decode_layers", device, backend) is ops.implementation("decode_layers", device, "reference"):
        return None
    made = _made.get(blocks)
    if made is None or not made.current(cfg, cache.pool):
        if not all(map(_is_plain, blocks)) or cfg.indexer.mode not in ("off", "sparse") or cfg.moe.n_group > 1:
            return None
        made = _made[blocks] = Decoder(blocks, cfg, cache.pool)
        if not made.current(cfg, cache.pool):
            return None
    ctx.decoding = ops.DecodeState(
        ctx.packed.positions, ctx.packed.tokens, cache.tails(), cache.replace_tails(), cache.pool.data, made.page_size,
        cache.tables,
    )  # fmt: skip
    return made


def _is_plain(block: nn.Module) -> bool:
    """Whether a layer is made of nothing but the modules whose weights :func:`decode_layer` reads."""
    if type(block) is not Block or not isinstance(block.self_attn, CompressedAttention):
        return False
    moe = block.mlp
    if isinstance(moe, MoE) and (moe.dispatch is not None or "media_bias" in moe.gate._buffers):
        return False
    linear = [m for name, m in block.named_modules() if name.endswith(("_proj", "wq_b"))]
    stacks = isinstance(moe, MLP) or isinstance(moe.gate_up_proj, nn.Parameter)
    return stacks and all(type(m) in (Linear, nn.Linear) and m.bias is None for m in linear)


def decode_layer(block: Any, pool: PagePool) -> ops.DecodeLayer:
    at, moe, slots, tails = block.self_attn, block.mlp, pool.layout.slots, pool.layout.tails
    indexer, name = at.indexer, f"layers.{at.layer}"
    routed = isinstance(moe, MoE)
    shared = moe.shared_experts if routed else moe

    def begins(slot: str) -> int:
        return round(slots[slot].start * pool.page_size)

    def site(residual: Any, norm: Any) -> ops.Site:
        return ops.Site(residual.fn, residual.base, residual.scale, norm.weight)

    def pooling(by: Compressor | None) -> ops.Pooling | None:
        if by is None:
            return None
        gate = None if by.gate_proj is None else by.gate_proj.weight
        return ops.Pooling(by.kv_proj.weight, gate, by.position_bias, by.norm.weight)

    return ops.DecodeLayer(
        attention_site=site(block.attn_residual, block.input_layernorm),
        q_a=at.q_a_proj.weight,
        q_a_norm=at.q_a_layernorm.weight,
        q_b=at.q_b_proj.weight,
        kv=at.kv_proj.weight,
        kv_norm=at.kv_layernorm.weight,
        o_a=at.o_a_proj.weight,
        o_b=at.o_b_proj.weight,
        sinks=at.sinks,
        pool=pooling(at.compressor),
        index_pool=pooling(indexer.compressor) if indexer is not None else None,
        index_q=indexer.wq_b.weight if indexer is not None else None,
        index_weights=indexer.weights_proj.weight if indexer is not None else None,
        mlp_site=site(block.mlp_residual, block.post_attention_layernorm),
        router=moe.gate.weight if routed else None,
        router_bias=moe.gate.bias if routed and not moe.gate.by_hash else None,
        router_table=moe.gate.tid2eid if routed and moe.gate.by_hash else None,
        gate_up=moe.gate_up_proj if routed else None,
        down=moe.down_proj if routed else None,
        shared_gate=shared.gate_proj.weight if shared is not None else None,
        shared_up=shared.up_proj.weight if shared is not None else None,
        shared_down=shared.down_proj.weight if shared is not None else None,
        ratio=at.ratio,
        overlaps=at.compressor is not None and at.compressor.overlaps,
        window_tail=tails[f"{name}.window"].start,
        pool_tail=tails[f"{name}.pool"].start if at.ratio else 0,
        index_tail=tails[f"{name}.index_pool"].start if indexer is not None else 0,
        entries=begins(f"{name}.kv") if at.ratio else 0,
        keys=begins(f"{name}.index") if indexer is not None else 0,
    )
