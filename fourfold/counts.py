"""What a model costs: parameters, FLOPs and bytes from its configuration alone, without torch.

The training engine's MFU, ``fourfold plan`` and the benchmarks read these functions; no formula stands elsewhere.
"""

from __future__ import annotations

from typing import Any

from fourfold.config import EngramConfig, ModelConfig

COORD_FEATURES = 48  # sines and cosines of time, row and column that the media embedders read
SPAN_MARKS = 3  # learned rows per modality: start, newline, end
MEDIA_KINDS = 3  # a router has a selection bias for each, whichever of them the model reads
SHORT_CONV_TAPS = 4

# Bytes a weight takes, scales included: one 16-bit scale per 128 weights of int8, per 32 weights of int4.
WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1 + 2 / 128, "int4": 0.5 + 2 / 32}
# Parts that int8 and int4 leave in bf16: small, or sensitive to rounding.
KEPT_BF16 = ("embedding", "head", "indexer", "router", "residual", "norms", "media")
CACHE_BYTES = {"fp32": 4, "bf16": 2}


# ---------------------------------------------------------------- Engram tables


def engram_primes(cfg: EngramConfig) -> list[list[list[int]]]:
    """Rows of each Engram table, as ``[layer][order - 2][head]``: distinct primes (arXiv 2601.07372).

    Every (layer, order) searches upwards from ``vocab_size``; a prime used by any layer or order is never used again.
    """
    used: set[int] = set()

    def next_prime(candidate: int) -> int:
        while candidate in used or not _is_prime(candidate):
            candidate += 1
        used.add(candidate)
        return candidate

    layers = []
    for _ in cfg.layer_ids:
        orders = []
        for _ in range(2, cfg.max_ngram + 1):
            heads: list[int] = []
            for _ in range(cfg.n_heads):
                heads.append(next_prime(heads[-1] + 1 if heads else cfg.vocab_size))
            orders.append(heads)
        layers.append(orders)
    return layers


def _is_prime(n: int) -> bool:
    """Miller-Rabin with the witnesses that leave no error below 3.3e24."""
    witnesses = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
    if n < 2:
        return False
    if any(n % p == 0 for p in witnesses):
        return n in witnesses
    twos = ((n - 1) & (1 - n)).bit_length() - 1
    odd = (n - 1) >> twos
    for a in witnesses:
        x = pow(a, odd, n)
        if x in (1, n - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


# ---------------------------------------------------------------- parameters


def count_parameters(cfg: ModelConfig) -> dict[str, Any]:
    """``{"total", "active", "by_part": {part: parameters}}``.

    ``total`` is the decoder's; ``active`` leaves out the experts a token does not visit, the Engram tables and the
    input embedding, of which a token reads single rows. The media embedders (with the router biases that each
    modality adds) and the MTP block stand in ``by_part`` only. Router selection biases count as parameters.
    """
    d, layers, moe = cfg.hidden_size, cfg.num_hidden_layers, cfg.moe
    moe_layers, dense_layers = _moe_layers(cfg), layers - _moe_layers(cfg)
    by_part = {
        "embedding": cfg.vocab_size * d,
        "head": cfg.vocab_size * d,
        "attention": layers * _attention(cfg),
        "indexer": num_indexers(cfg) * _indexer(cfg),
        "dense_ffn": dense_layers * 3 * d * cfg.intermediate_size,
        "router": moe_layers * _router(cfg),
        "shared_experts": moe_layers * moe.n_shared_experts * _expert(cfg),
        "routed_experts": moe_layers * moe.n_routed_experts * _expert(cfg),
        "residual": layers * _stream_mixing(cfg) + _stream_collapse(cfg),
        "norms": layers * 2 * d + d,
        "engram_projections": len(cfg.engram.layer_ids) * _engram_projections(cfg),
        "engram_tables": engram_rows(cfg) * cfg.engram.head_dim,
    }
    total = sum(by_part.values())
    idle_experts = moe_layers * (moe.n_routed_experts - moe.num_experts_per_tok) * _expert(cfg)
    active = total - idle_experts - by_part["embedding"] - by_part["engram_tables"]
    by_part["mtp"] = cfg.mtp.num_layers * _mtp(cfg)
    by_part["media"] = _media(cfg)
    return {"total": total, "active": active, "by_part": by_part}


def num_indexers(cfg: ModelConfig) -> int:
    """Indexers of the trunk: one for each group of ``layers_per_indexer`` layers, the last group maybe short."""
    return 0 if cfg.indexer.mode == "off" else -(-cfg.num_hidden_layers // cfg.indexer.layers_per_indexer)


def engram_rows(cfg: ModelConfig) -> int:
    """Rows of all Engram tables together."""
    return sum(prime for layer in engram_primes(cfg.engram) for order in layer for prime in order)


def _moe_layers(cfg: ModelConfig) -> int:
    return max(cfg.num_hidden_layers - cfg.moe.first_k_dense_replace, 0) if cfg.moe.n_routed_experts else 0


def _attention(cfg: ModelConfig) -> int:
    a, d = cfg.attention, cfg.hidden_size
    if a.kind == "gqa":
        return 2 * d * (a.num_attention_heads + a.num_key_value_heads) * a.head_dim
    queries = a.num_attention_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
    q = d * a.q_lora_rank + a.q_lora_rank + a.q_lora_rank * queries if a.q_lora_rank else d * queries
    kv_a = d * (a.kv_lora_rank + a.qk_rope_head_dim) + a.kv_lora_rank
    kv_b = a.kv_lora_rank * a.num_attention_heads * (a.qk_nope_head_dim + a.v_head_dim)
    return q + kv_a + kv_b + a.num_attention_heads * a.v_head_dim * d


def _indexer(cfg: ModelConfig) -> int:
    i, d = cfg.indexer, cfg.hidden_size
    return (cfg.attention.q_lora_rank or d) * i.n_heads * i.head_dim + d * i.head_dim + 2 * i.head_dim + d * i.n_heads


def _expert(cfg: ModelConfig) -> int:
    return 3 * cfg.hidden_size * cfg.moe.moe_intermediate_size


def _router(cfg: ModelConfig) -> int:
    return cfg.moe.n_routed_experts * (cfg.hidden_size + 1)


def _stream_mixing(cfg: ModelConfig) -> int:
    if cfg.residual.kind == "plain":
        return 0
    n = cfg.residual.hc_mult
    mixes = n * n + 2 * n
    return 2 * (mixes * n * cfg.hidden_size + mixes + 3)


def _stream_collapse(cfg: ModelConfig) -> int:
    n = cfg.residual.hc_mult
    return 0 if cfg.residual.kind == "plain" else n * n * cfg.hidden_size + n + 1


def _engram_projections(cfg: ModelConfig) -> int:
    e, d, n = cfg.engram, cfg.hidden_size, cfg.residual.streams
    short_conv = SHORT_CONV_TAPS * n * d + d if e.short_conv else 0
    return (n + 1) * d * (e.max_ngram - 1) * e.n_heads * e.head_dim + 2 * n * d + short_conv


def _mtp(cfg: ModelConfig) -> int:
    """One more block, what joins hidden state and embedding, and its own stream collapse."""
    d, moe = cfg.hidden_size, cfg.moe
    indexer = _indexer(cfg) if cfg.indexer.mode != "off" else 0
    if _mtp_is_routed(cfg):
        ffn = _router(cfg) + _media_biases(cfg) + (moe.n_shared_experts + moe.n_routed_experts) * _expert(cfg)
    else:
        ffn = 3 * d * cfg.intermediate_size
    return 2 * d * d + 3 * d + _attention(cfg) + indexer + _stream_mixing(cfg) + 2 * d + ffn + _stream_collapse(cfg)


def _mtp_is_routed(cfg: ModelConfig) -> bool:
    """The MTP block follows the last layer, so it is as dense or routed as one more layer would be."""
    return bool(cfg.moe.n_routed_experts) and cfg.moe.first_k_dense_replace <= cfg.num_hidden_layers


def _media_biases(cfg: ModelConfig) -> int:
    return MEDIA_KINDS * cfg.moe.n_routed_experts if cfg.media.modalities else 0


def _media(cfg: ModelConfig) -> int:
    m, d = cfg.media, cfg.hidden_size
    total = _moe_layers(cfg) * _media_biases(cfg)
    for name in m.modalities:
        features: int = getattr(m, name).features
        two_linears = features * m.hidden_size + m.hidden_size + m.hidden_size * d + d
        total += two_linears + COORD_FEATURES * d + SPAN_MARKS * d
    return total


# ---------------------------------------------------------------- FLOPs


def decode_flops(cfg: ModelConfig, context: int) -> dict[str, float]:
    """FLOPs of one more token over a cache of ``context`` tokens: ``{"weights", "attention", "indexer", "total"}``.

    A multiply and an add are two FLOPs. Attention is absorbed (each head reads the latent), over the selected keys
    when the indexer is in use. Softmax, norms, Sinkhorn and sampling are left out.
    """
    return _flops(cfg, float(_attended(cfg, context)), float(context), absorbed=True)


def prefill_flops(cfg: ModelConfig, context: int) -> dict[str, float]:
    """FLOPs per token of a prompt of ``context`` tokens, on average over its positions; keys as ``decode_flops``.

    Attention is expanded (each head has its own keys and values); position t attends to itself and what is before it.
    """
    context = max(context, 1)
    limit = _attended(cfg, context)
    attended = limit * (limit + 1) / 2 + (context - limit) * limit  # sum over t = 1..context of min(t, limit)
    return _flops(cfg, attended / context, (context + 1) / 2, absorbed=False)


def training_flops(cfg: ModelConfig, context: int) -> float:
    """FLOPs per token of one training step on sequences of ``context`` tokens: forward, and a backward of twice that.

    The MTP block and its use of the head count; recomputed activations do not, so this is what MFU divides by time.
    """
    forward = prefill_flops(cfg, context)
    per_layer = forward["attention"] / cfg.num_hidden_layers + forward["indexer"] / max(num_indexers(cfg), 1)
    idle = (cfg.moe.n_routed_experts - cfg.moe.num_experts_per_tok) * _expert(cfg) if _mtp_is_routed(cfg) else 0
    mtp = cfg.mtp.num_layers * (2 * (_mtp(cfg) - idle + cfg.vocab_size * cfg.hidden_size) + per_layer)
    return 3 * (forward["total"] + mtp)


def _attended(cfg: ModelConfig, context: int) -> int:
    return min(context, cfg.indexer.topk) if cfg.indexer.mode == "sparse" else context


def _flops(cfg: ModelConfig, attended: float, scored: float, absorbed: bool) -> dict[str, float]:
    a, i = cfg.attention, cfg.indexer
    if a.kind == "gqa":
        per_key = 2 * a.head_dim
    elif absorbed:
        per_key = 2 * a.kv_lora_rank + a.qk_rope_head_dim
    else:
        per_key = a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim
    in_use = num_indexers(cfg) if i.mode in ("sparse", "warmup") else 0
    flops = {
        "weights": 2.0 * count_parameters(cfg)["active"],
        "attention": 2.0 * cfg.num_hidden_layers * a.num_attention_heads * per_key * attended,
        "indexer": 2.0 * in_use * i.n_heads * i.head_dim * scored,
    }
    return {**flops, "total": sum(flops.values())}


# ---------------------------------------------------------------- bytes


def weight_bytes(cfg: ModelConfig, dtype: str = "bf16") -> dict[str, int]:
    """Bytes of each part's weights, scales included; int8 and int4 keep the parts of ``KEPT_BF16`` in bf16.

    Raises ValueError if ``dtype`` is not one of ``WEIGHT_BYTES``.
    """
    if dtype not in WEIGHT_BYTES:
        raise ValueError(f"dtype: {dtype!r} is unknown; choose one of {', '.join(WEIGHT_BYTES)}")
    quantised = dtype in ("int8", "int4")
    return {
        part: round(count * WEIGHT_BYTES["bf16" if quantised and part in KEPT_BF16 else dtype])
        for part, count in count_parameters(cfg)["by_part"].items()
    }


def cache_bytes_per_token(cfg: ModelConfig, dtype: str = "bf16") -> dict[str, int]:
    """Bytes that one cached token takes: ``{"attention", "indexer", "total"}``.

    Attention keeps the latent and the rope key of each layer (gqa: its keys and values), the indexer one key per
    group of layers. Raises ValueError if ``dtype`` is not one of ``CACHE_BYTES``.
    """
    if dtype not in CACHE_BYTES:
        raise ValueError(f"dtype: {dtype!r} is unknown; choose one of {', '.join(CACHE_BYTES)}")
    a = cfg.attention
    numbers = 2 * a.num_key_value_heads * a.head_dim if a.kind == "gqa" else a.kv_lora_rank + a.qk_rope_head_dim
    attention = cfg.num_hidden_layers * numbers * CACHE_BYTES[dtype]
    indexer = num_indexers(cfg) * cfg.indexer.head_dim * CACHE_BYTES[dtype]
    return {"attention": attention, "indexer": indexer, "total": attention + indexer}
