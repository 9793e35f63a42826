"""What a model costs: parameters, FLOPs and bytes from its configuration alone, without torch.

The training engine's MFU, ``fourfold plan`` and the benchmarks read these functions; no formula stands elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import count
from math import ceil
from typing import Any

from fourfold.config import EngramConfig, ModelConfig

COORD_FEATURES = 48  # sines and cosines of time, row and column that the media embedders read
SPAN_MARKS = 3  # learned rows per modality: start, newline, end
MEDIA_KINDS = 3  # a router has a selection bias for each, whichever of them the model reads
SHORT_CONV_TAPS = 4

# Bytes a weight takes, scales included: a 16-bit one per 32 weights of int4, a 32-bit one per row of int8, here of
# 256 weights, which few rows fall short of.
WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1 + 2 / 128, "int4": 0.5 + 2 / 32, "fp8": 1 + 4 / 128**2}
# Parts that int8, int4 and fp8 leave in bf16: small, or sensitive to rounding.
KEPT_BF16 = ("embedding", "head", "indexer", "compressor", "router", "router_bias", "residual", "norms", "media")
CACHE_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1, "int8": 1}  # of a number; rows of single bytes have scales too
TAIL_BYTES = 4  # what is kept of the last positions alone is float32


# ---------------------------------------------------------------- Engram tables


def engram_primes(cfg: EngramConfig) -> list[list[list[int]]]:
    """Rows of each Engram table, as ``[layer][order - 2][head]``: distinct primes (arXiv 2601.07372).

    They go upwards from ``vocab_size``; a prime used by any layer or order is never used again.
    """
    primes = filter(_is_prime, count(cfg.vocab_size))
    orders = range(2, cfg.max_ngram + 1)
    return [[[next(primes) for _ in range(cfg.n_heads)] for _ in orders] for _ in cfg.layer_ids]


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
    input embedding, of which a token reads single rows (a tied one is also the head, and stays). The MTP block, the
    drafter and what reads media (with the router biases of each modality that enters through an embedder) stand in
    ``by_part`` only. So do the ``router_bias`` of a model that reads nothing but text: published sizes of such models
    leave selection biases out, those of models that read media count them.
    """
    d, layers, moe = cfg.hidden_size, cfg.num_hidden_layers, cfg.moe
    moe_layers, dense_layers = _moe_layers(cfg), layers - _moe_layers(cfg)
    vocabulary = cfg.vocab_size * d
    by_part = {
        "embedding": vocabulary,
        "head": 0 if cfg.tie_word_embeddings else vocabulary,
        "attention": layers * _attention(cfg),
        "compressor": _compressors(cfg),
        "indexer": _indexers(cfg),
        "dense_ffn": dense_layers * 3 * d * cfg.intermediate_size,
        "router": moe_layers * moe.n_routed_experts * d,
        "router_bias": _biased_layers(cfg) * _text_biases(cfg, moe.n_routed_experts),
        "shared_experts": moe_layers * moe.n_shared_experts * _expert(cfg),
        "routed_experts": moe_layers * moe.n_routed_experts * _expert(cfg),
        "residual": layers * _stream_mixing(cfg) + _stream_collapse(cfg),
        "norms": layers * 2 * d + d,
        "engram_projections": len(cfg.engram.layer_ids) * _engram_projections(cfg),
        "engram_tables": engram_rows(cfg) * cfg.engram.head_dim,
    }
    total = sum(by_part.values()) - (0 if cfg.media.modalities else by_part["router_bias"])
    idle_experts = moe_layers * (moe.n_routed_experts - moe.num_experts_per_tok) * _expert(cfg)
    looked_up = by_part["engram_tables"] + (0 if cfg.tie_word_embeddings else vocabulary)
    by_part["mtp"] = cfg.mtp.num_layers * _mtp(cfg)
    by_part["drafter"] = _drafter(cfg)
    by_part["media"] = _media(cfg)
    return {"total": total, "active": total - idle_experts - looked_up, "by_part": by_part}


def num_indexers(cfg: ModelConfig) -> int:
    """Indexers of the trunk. ``mla``: one for each group of layers, the last maybe short."""
    a = cfg.attention
    if cfg.indexer.mode == "off":
        return 0
    if a.kind == "compressed":
        return a.compress_ratios.count(a.csa_ratio)
    if a.kind == "csa2":
        return len(a.index_source_layer_ids)
    return sum(map(cfg.indexer.owned_by, range(cfg.num_hidden_layers)))


def engram_rows(cfg: ModelConfig) -> int:
    """Rows of all Engram tables together."""
    return sum(prime for layer in engram_primes(cfg.engram) for order in layer for prime in order)


def part_of(name: str) -> str:
    """The part of ``by_part`` that a tensor of the model belongs to, by its name."""
    path = name.split(".")
    for part in ("mtp", "drafter", "media", "indexer", "compressor", "shared_experts"):
        if part in path:
            return part
    if path[0] == "engrams":
        return "engram_tables" if path[2] == "embed" else "engram_projections"
    if "gate" in path:
        return {"bias": "router_bias", "media_bias": "media"}.get(path[-1], "router")
    if "mlp" in path:  # the experts of a layer are stacked into tensors that are nobody's weight
        return "dense_ffn" if path[-1] == "weight" else "routed_experts"
    if "self_attn" in path:
        return "attention"
    if not {"attn_residual", "mlp_residual", "collapse"}.isdisjoint(path):
        return "residual"
    return {"embed_tokens": "embedding", "lm_head": "head", "compression": "engram_projections"}.get(path[0], "norms")


def _moe_layers(cfg: ModelConfig) -> int:
    return max(cfg.num_hidden_layers - cfg.moe.first_k_dense_replace, 0) if cfg.moe.n_routed_experts else 0


def _biased_layers(cfg: ModelConfig) -> int:
    """Layers whose router has a selection bias: those that choose by score, and balance by it."""
    unbiased = max(cfg.moe.first_k_dense_replace, cfg.moe.num_hash_layers)
    return max(cfg.num_hidden_layers - unbiased, 0) if cfg.moe.n_routed_experts and _has_bias(cfg) else 0


def _has_bias(cfg: ModelConfig) -> bool:
    return cfg.moe.topk_method == "noaux_tc"


def _attention(cfg: ModelConfig) -> int:
    """One layer, without what compresses and selects."""
    a, d = cfg.attention, cfg.hidden_size
    heads = a.num_attention_heads
    if a.kind == "gqa":
        outputs = (heads + 2 * a.num_key_value_heads) * a.head_dim
        return d * (outputs + heads * a.head_dim) + (outputs if a.qkv_bias else 0)
    if a.is_compressed:
        q = d * a.q_lora_rank + a.q_lora_rank + a.q_lora_rank * heads * a.head_dim
        o = heads * a.head_dim * a.o_lora_rank + a.o_groups * a.o_lora_rank * d
        return q + d * a.head_dim + a.head_dim + o + heads  # a sink for each head
    queries = heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
    q = d * a.q_lora_rank + a.q_lora_rank + a.q_lora_rank * queries if a.q_lora_rank else d * queries
    kv_a = d * (a.kv_lora_rank + a.qk_rope_head_dim) + a.kv_lora_rank
    return q + kv_a + a.kv_lora_rank * heads * (a.qk_nope_head_dim + a.v_head_dim) + heads * a.v_head_dim * d


def _compressors(cfg: ModelConfig) -> int:
    a, d = cfg.attention, cfg.hidden_size
    if a.kind == "csa2":  # a single position needs no weighing
        return sum((2 if a.compress_ratios[s] > 1 else 1) * d * a.head_dim + a.head_dim for s in a.kv_source_layer_ids)
    ratios = a.compress_ratios if a.kind == "compressed" else ()
    return sum(_pooling(d, ratio, a.head_dim, ratio == a.csa_ratio) for ratio in ratios if ratio)


def _pooling(d: int, ratio: int, width: int, overlaps: bool) -> int:
    """Values and scores, the bias of each place in a group, and the norm of the entries."""
    out = 2 * width if overlaps else width
    return 2 * d * out + ratio * out + width


def _indexers(cfg: ModelConfig) -> int:
    a, i, d = cfg.attention, cfg.indexer, cfg.hidden_size
    if a.kind == "csa2" and i.mode != "off":
        keys = len(a.kv_source_layer_ids) * (a.head_dim * i.head_dim + i.head_dim)
        return num_indexers(cfg) * _index_queries(cfg) + keys
    keys = _pooling(d, a.csa_ratio, i.head_dim, overlaps=True) if a.kind == "compressed" else _index_keys(cfg)
    return num_indexers(cfg) * (_index_queries(cfg) + keys)


def _index_queries(cfg: ModelConfig) -> int:
    i, d = cfg.indexer, cfg.hidden_size
    each = (cfg.attention.q_lora_rank or d) * i.n_heads * i.head_dim + d * i.n_heads
    return each * (2 if i.candidate_blocks else 1)


def _index_keys(cfg: ModelConfig) -> int:
    return cfg.hidden_size * cfg.indexer.head_dim + 2 * cfg.indexer.head_dim


def _expert(cfg: ModelConfig) -> int:
    return 3 * cfg.hidden_size * cfg.moe.moe_intermediate_size


def _text_biases(cfg: ModelConfig, experts: int) -> int:
    """Selection biases of one router; a model with an image tower has a second set, for images."""
    return experts * (1 if cfg.media.vision is None else 2)


def _embedded_biases(cfg: ModelConfig, experts: int) -> int:
    """The sets that come with the media embedders: of all kinds at once, but that which a tower brought."""
    return experts * (MEDIA_KINDS if cfg.media.vision is None else MEDIA_KINDS - 1) if cfg.media.embedded else 0


def _routed_ffn(cfg: ModelConfig, experts: int) -> int:
    """Router, its biases, shared and routed experts of a layer outside the trunk."""
    biases = _text_biases(cfg, experts) + _embedded_biases(cfg, experts) if _has_bias(cfg) else 0
    return experts * cfg.hidden_size + biases + (cfg.moe.n_shared_experts + experts) * _expert(cfg)


def _stream_mixing(cfg: ModelConfig) -> int:
    if cfg.residual.kind == "plain":
        return 0
    n = cfg.residual.hc_mult
    mixes = n * n + 2 * n
    return 2 * (mixes * n * cfg.hidden_size + mixes + 3)


def _stream_collapse(cfg: ModelConfig) -> int:
    n = cfg.residual.hc_mult
    return n * n * cfg.hidden_size + n + 1 if cfg.residual.kind in ("hc", "mhc") else 0


def _engram_projections(cfg: ModelConfig) -> int:
    e, d, n = cfg.engram, cfg.hidden_size, cfg.residual.streams
    short_conv = SHORT_CONV_TAPS * n * d + d if e.short_conv else 0
    return (n + 1) * d * (e.max_ngram - 1) * e.n_heads * e.head_dim + 2 * n * d + short_conv


def _mtp(cfg: ModelConfig) -> int:
    """One more block, what joins hidden state and embedding, and its own stream collapse."""
    d = cfg.hidden_size
    selects = cfg.indexer.mode != "off" and not cfg.attention.is_compressed  # there it reads its window alone
    indexer = _index_queries(cfg) + _index_keys(cfg) if selects else 0
    ffn = _routed_ffn(cfg, cfg.moe.n_routed_experts) if _mtp_is_routed(cfg) else 3 * d * cfg.intermediate_size
    return 2 * d * d + 3 * d + _attention(cfg) + indexer + _stream_mixing(cfg) + 2 * d + ffn + _stream_collapse(cfg)


def _mtp_is_routed(cfg: ModelConfig) -> bool:
    """The MTP block follows the last layer, so it is as dense or routed as one more layer would be."""
    return bool(cfg.moe.n_routed_experts) and cfg.moe.first_k_dense_replace <= cfg.num_hidden_layers


def _drafter(cfg: ModelConfig) -> int:
    """Blocks that read their window alone; what joins the features of the trunk; the Markov and confidence heads."""
    drafter, d = cfg.drafter, cfg.hidden_size
    if not drafter.num_layers:
        return 0
    block = _attention(cfg) + _stream_mixing(cfg) + 2 * d + _routed_ffn(cfg, drafter.n_routed_experts)
    joined = len(drafter.target_layer_ids) * d * d + d
    heads = 2 * cfg.vocab_size * drafter.markov_rank + d + drafter.markov_rank
    return drafter.num_layers * block + joined + _stream_collapse(cfg) + d + heads


def _media(cfg: ModelConfig) -> int:
    m, d = cfg.media, cfg.hidden_size
    total = _biased_layers(cfg) * _embedded_biases(cfg, cfg.moe.n_routed_experts)
    for name in m.embedded:
        features: int = getattr(m, name).features
        two_linears = features * m.hidden_size + m.hidden_size + m.hidden_size * d + d
        total += two_linears + COORD_FEATURES * d + SPAN_MARKS * d
    return total + _vision(cfg)


def _vision(cfg: ModelConfig) -> int:
    """The image tower, the aligner into the decoder, and the learned rows around a span."""
    v, d = cfg.media.vision, cfg.hidden_size
    if v is None:
        return 0
    h = v.hidden_size
    block = 4 * h * h + 4 * h + 2 * h + 3 * h * v.intermediate_size
    tower = 3 * v.patch_size**2 * h + h + v.num_hidden_layers * block + h
    return tower + v.downsample**2 * h * d + d + d * d + d + SPAN_MARKS * d


# ---------------------------------------------------------------- what a position reads of the others


@dataclass(frozen=True)
class Read:
    """What a query of one layer reads: rows of ``width`` numbers that each stand for ``ratio`` positions.

    part: "attention" or "indexer"; flops: of one row, all heads; limit: the most rows it reads (None: all);
    tail: the rows are those of the last positions, kept apart from the paged cache.
    """

    part: str
    width: int
    flops: int
    ratio: int = 1
    limit: int | None = None
    tail: bool = False

    def rows(self, context: int) -> int:
        """Rows read when ``context`` positions are visible."""
        rows = context // self.ratio
        return rows if self.limit is None else min(rows, self.limit)

    def mean_rows(self, context: int) -> float:
        """Mean of ``rows`` over 1..context: it grows by one every ``ratio`` positions, up to ``rows(context)``."""
        most = self.rows(context)
        return (self.ratio * most * (most - 1) / 2 + most * (context - most * self.ratio + 1)) / context


def reads(cfg: ModelConfig, absorbed: bool = True) -> list[Read]:
    """What a query reads in all layers together.

    absorbed: heads of ``mla`` read the latent itself, as in decoding; otherwise keys and values made from it.
    """
    return [read for layer in range(cfg.num_hidden_layers) for read in _layer_reads(cfg, layer, absorbed)]


def _layer_reads(cfg: ModelConfig, layer: int, absorbed: bool) -> Iterator[Read]:
    """Of a layer; of the MTP block, where ``layer`` is the number of layers."""
    a, i = cfg.attention, cfg.indexer
    heads, topk = a.num_attention_heads, i.topk if i.mode == "sparse" else None
    in_use, per_score = i.mode in ("sparse", "warmup"), 2 * i.n_heads * i.head_dim
    if not a.is_compressed:
        width = 2 * a.num_key_value_heads * a.head_dim if a.kind == "gqa" else a.kv_lora_rank + a.qk_rope_head_dim
        if a.kind == "gqa":
            per_key = 2 * a.head_dim
        elif absorbed:
            per_key = 2 * a.kv_lora_rank + a.qk_rope_head_dim
        else:
            per_key = a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim
        yield Read("attention", width, 2 * heads * per_key, limit=i.topk if i.keeps_near(layer) else topk)
        if in_use and (layer == cfg.num_hidden_layers or i.owned_by(layer)):
            yield Read("indexer", i.head_dim, per_score, limit=i.candidate_blocks * i.block_size or None)
            if i.candidate_blocks:  # which of them are looked into, by their summaries
                yield Read("indexer", i.head_dim, per_score, i.block_size)
        return
    per_key = 4 * heads * a.head_dim
    yield Read("attention", a.head_dim, per_key, limit=a.sliding_window, tail=True)
    ratio = a.compress_ratios[layer] if layer < cfg.num_hidden_layers else 0
    if not ratio:
        return
    selects = a.kind == "csa2" or ratio == a.csa_ratio
    yield Read("attention", a.head_dim, per_key, ratio, topk if selects else None)
    if in_use and selects and (a.kind == "compressed" or layer in a.index_source_layer_ids):
        narrowed = a.kind == "csa2" and -1 < a.candidate_source_layer_id < layer
        candidates = a.candidate_topk_blocks * a.candidate_block_size if narrowed else None
        yield Read("indexer", i.head_dim, per_score, ratio, candidates)


# ---------------------------------------------------------------- FLOPs


def decode_flops(cfg: ModelConfig, context: int) -> dict[str, float]:
    """FLOPs of one more token over a cache of ``context`` tokens: ``{"weights", "attention", "indexer", "total"}``.

    A multiply and an add are two FLOPs. Attention is absorbed (each head reads the latent), over the selected keys
    when the indexer is in use. Softmax, norms, Sinkhorn and sampling are left out.
    """
    return _flops(cfg, {part: _part_flops(reads(cfg), part, context, mean=False) for part in ("attention", "indexer")})


def prefill_flops(cfg: ModelConfig, context: int) -> dict[str, float]:
    """FLOPs per token of a prompt of ``context`` tokens, on average over its positions; keys as ``decode_flops``.

    Attention is expanded (each head has its own keys and values); position t attends to itself and what is before it.
    """
    found = reads(cfg, absorbed=False)
    return _flops(cfg, {part: _part_flops(found, part, context, mean=True) for part in ("attention", "indexer")})


def training_flops(cfg: ModelConfig, context: int) -> float:
    """FLOPs per token of one training step on sequences of ``context`` tokens: forward, and a backward of twice that.

    The MTP block and its use of the head count; recomputed activations do not, so this is what MFU divides by time.
    """
    extra = list(_layer_reads(cfg, cfg.num_hidden_layers, absorbed=False))
    attention = sum(_part_flops(extra, part, context, mean=True) for part in ("attention", "indexer"))
    idle = (cfg.moe.n_routed_experts - cfg.moe.num_experts_per_tok) * _expert(cfg) if _mtp_is_routed(cfg) else 0
    mtp = cfg.mtp.num_layers * (2 * (_mtp(cfg) - idle + cfg.vocab_size * cfg.hidden_size) + attention)
    return 3 * (prefill_flops(cfg, context)["total"] + mtp)


def _part_flops(found: list[Read], part: str, context: int, mean: bool) -> float:
    context = max(context, 1) if mean else context
    rows = Read.mean_rows if mean else Read.rows
    return float(sum(read.flops * rows(read, context) for read in found if read.part == part))


def _flops(cfg: ModelConfig, parts: dict[str, float]) -> dict[str, float]:
    flops = {"weights": 2.0 * count_parameters(cfg)["active"], **parts}
    return {**flops, "total": sum(flops.values())}


# ---------------------------------------------------------------- bytes


def weight_bytes(cfg: ModelConfig, dtype: str = "bf16") -> dict[str, int]:
    """Bytes of each part's weights, scales included; int8, int4 and fp8 keep the parts of ``KEPT_BF16`` in bf16, and of
    the others what :func:`_kept` counts.

    Raises ValueError if ``dtype`` is not one of ``WEIGHT_BYTES``.
    """
    if dtype not in WEIGHT_BYTES:
        raise ValueError(f"dtype: {dtype!r} is unknown; choose one of {', '.join(WEIGHT_BYTES)}")
    by_part = count_parameters(cfg)["by_part"]
    if dtype in ("fp32", "bf16"):
        return {part: round(count * WEIGHT_BYTES[dtype]) for part, count in by_part.items()}
    kept = dict.fromkeys(by_part, 0) | _kept(cfg) | {part: by_part[part] for part in KEPT_BF16}
    small, wide = WEIGHT_BYTES[dtype], WEIGHT_BYTES["bf16"]
    return {part: round((count - kept[part]) * small + kept[part] * wide) for part, count in by_part.items()}


def _kept(cfg: ModelConfig) -> dict[str, int]:
    """Parameters that stay wide in parts that are quantised: the expansion that decoding folds into the queries; and
    outside the trunk all but the matrices of attention and feed-forward."""
    a, d, moe = cfg.attention, cfg.hidden_size, cfg.moe
    expansion = a.num_attention_heads * (a.qk_nope_head_dim + a.v_head_dim) * a.kv_lora_rank if a.kind == "mla" else 0
    attention = _attention(cfg) - expansion

    def experts(count: int) -> int:
        return (moe.n_shared_experts + count) * _expert(cfg)

    ffn = experts(moe.n_routed_experts) if _mtp_is_routed(cfg) else 3 * d * cfg.intermediate_size
    drafted = cfg.drafter.num_layers * (attention + experts(cfg.drafter.n_routed_experts))
    joined = len(cfg.drafter.target_layer_ids) * d * d if cfg.drafter.num_layers else 0
    return {
        "attention": cfg.num_hidden_layers * expansion,
        "mtp": cfg.mtp.num_layers * (_mtp(cfg) - attention - ffn),
        "drafter": _drafter(cfg) - drafted - joined,
    }


def cache_bytes_per_token(cfg: ModelConfig, dtype: str = "bf16") -> dict[str, int]:
    """Bytes by which the paged cache grows with each token: ``{"attention", "indexer", "total"}``, rounded up.

    Attention keeps the latent and the rope key of each layer (gqa: its keys and values), the indexer one key and its
    part of a summary per group of layers; a layer that compresses keeps one entry (and one key) for every ``ratio``
    positions, unless it borrows those of another. Raises ValueError if ``dtype`` is not one of ``CACHE_BYTES``.
    """
    if dtype not in CACHE_BYTES:
        raise ValueError(f"dtype: {dtype!r} is unknown; choose one of {', '.join(CACHE_BYTES)}")
    a, size = cfg.attention, CACHE_BYTES[dtype]
    row, key = row_bytes(kv_parts(cfg), size), row_bytes((cfg.indexer.head_dim,), size)
    if a.is_compressed:
        ratios = _cached_ratios(cfg)
        rows = sum((Fraction(1, ratio) for ratio in ratios), Fraction())
        indexed = [r for r in ratios if cfg.indexer.mode != "off" and (a.kind == "csa2" or r == a.csa_ratio)]
        keys = sum((Fraction(1, ratio) for ratio in indexed), Fraction())
    else:
        rows, keys = Fraction(cfg.num_hidden_layers), num_indexers(cfg) * cfg.indexer.rows_per_position
    attention, indexer = ceil(rows * row), ceil(keys * key)
    return {"attention": attention, "indexer": indexer, "total": attention + indexer}


def kv_parts(cfg: ModelConfig) -> tuple[int, ...]:
    """Numbers in each part of what a layer caches of a position, or of an entry: the latent and the rotary key, or the
    keys of every head and their values."""
    a = cfg.attention
    if a.kind == "gqa":
        return (a.head_dim,) * (2 * a.num_key_value_heads)
    latent = a.head_dim - a.qk_rope_head_dim if a.is_compressed else a.kv_lora_rank
    return tuple(filter(None, (latent, a.qk_rope_head_dim)))


def row_bytes(parts: Sequence[int], size: int) -> int:
    """Bytes of a cached row whose numbers take ``size`` each: of single bytes, every part has a 32-bit scale, and the
    row is filled up to a multiple of four."""
    return sum(parts) * size if size > 1 else 4 * len(parts) + -(-sum(parts) // 4) * 4


def cache_bytes_per_sequence(cfg: ModelConfig) -> int:
    """Bytes that a sequence keeps beside its pages, whatever its length: windows, and positions not yet pooled."""
    a, i = cfg.attention, cfg.indexer
    if not a.is_compressed:
        return 0
    numbers = cfg.num_hidden_layers * (a.sliding_window - 1) * a.head_dim
    for ratio in _cached_ratios(cfg):
        if a.kind == "compressed" and ratio == a.csa_ratio:  # values and scores of both halves, of two groups
            numbers += (2 * ratio - 1) * 4 * (a.head_dim + (0 if i.mode == "off" else i.head_dim))
        else:
            numbers += (ratio - 1) * 2 * a.head_dim
    return TAIL_BYTES * numbers


def _cached_ratios(cfg: ModelConfig) -> list[int]:
    """The ratio of each layer that keeps entries of its own."""
    a = cfg.attention
    owners = a.kv_source_layer_ids if a.kind == "csa2" else range(cfg.num_hidden_layers)
    return [a.compress_ratios[layer] for layer in owners if a.compress_ratios[layer]]
