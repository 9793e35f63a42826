"""Counts against published sizes, an independent recount and the modules themselves."""

from __future__ import annotations

import random

import pytest

from fourfold.config import EngramConfig, ModelConfig
from fourfold.counts import (
    Read,
    cache_bytes_per_sequence,
    cache_bytes_per_token,
    count_parameters,
    decode_flops,
    engram_primes,
    engram_rows,
    num_indexers,
    part_of,
    prefill_flops,
    training_flops,
    weight_bytes,
)

# Total parameters, and active ones (without the input embedding) as exactly as they are published.
ANNOUNCED = {"v4": (998_028_498_787, 36_125_113_187), "v4-lite": (203_639_057_239, 12_663_567_703)}
RELEASED = {
    "v2-lite": (15_706_484_224, 2.451),
    "v2": (235_741_434_880, 20.85),
    "v3": (671_026_404_352, 36.63),
    "v3.2": (671_877_929_216, 37.48),
    "v4-flash": (284_332_230_231, 13.27),
    "v4-pro": (1_572_997_179_491, 48.85),
    "v4.1-flash": (551_880_835_184 + 196_613_849_600, 15.8),
}
NATIVE = ("v4", "v4-lite", "v4-mini", "nano")
LADDER = (*RELEASED, "v1-7b", "v1-67b", "v1-moe-16b")


def tiny(**overrides) -> ModelConfig:
    base = ModelConfig(vocab_size=97, hidden_size=32, num_hidden_layers=5, intermediate_size=48)
    return base.replace(**overrides)


# ---------------------------------------------------------------- totals


@pytest.mark.parametrize(("name", "total", "active"), [(name, *sizes) for name, sizes in ANNOUNCED.items()])
def test_presets_have_the_announced_size_to_the_last_parameter(name, total, active):
    counted = count_parameters(ModelConfig.preset(name))
    assert (counted["total"], counted["active"]) == (total, active)


@pytest.mark.parametrize(("name", "total", "active"), [(name, *sizes) for name, sizes in RELEASED.items()])
def test_released_models_have_their_published_size_to_the_last_parameter(name, total, active):
    counted = count_parameters(ModelConfig.preset(name))
    assert counted["total"] == total
    digits = 1 if name == "v4.1-flash" else 3 if active < 10 else 2
    published = counted["active"] - counted["by_part"]["engram_projections"]  # which only V4.1 has, and leaves out
    assert round(published / 1e9, digits) == active


def test_the_ledger_of_v4_1_adds_up_to_its_file():
    by_part = count_parameters(ModelConfig.preset("v4.1-flash"))["by_part"]
    assert by_part["engram_projections"] == 314_654_720
    assert by_part["engram_tables"] == 196_613_849_600
    assert by_part["drafter"] == 14_225_362_530
    assert by_part["media"] == 485_268_480
    assert sum(by_part.values()) == 763_205_315_794
    apart = ("engram_projections", "engram_tables", "drafter", "media")
    assert sum(by_part.values()) - sum(by_part[part] for part in apart) == 551_566_180_464


@pytest.mark.parametrize("name", [*NATIVE, *LADDER])
def test_parts_add_up_to_the_decoder_and_what_stands_beside_it(name):
    cfg = ModelConfig.preset(name)
    counted = count_parameters(cfg)
    parts = dict(counted["by_part"])
    beside = ["mtp", "drafter", "media", *([] if cfg.media.modalities else ["router_bias"])]
    assert sum(parts.values()) - sum(parts[part] for part in beside) == counted["total"]
    assert (parts["mtp"] > 0) == bool(cfg.mtp.num_layers)
    assert (parts["drafter"] > 0) == bool(cfg.drafter.num_layers)
    assert (parts["media"] > 0) == bool(cfg.media.modalities)


def test_only_routers_that_balance_by_a_bias_have_one():
    biases = {name: count_parameters(ModelConfig.preset(name))["by_part"]["router_bias"] for name in RELEASED}
    assert biases == {
        "v2-lite": 0,  # balanced by a loss
        "v2": 0,
        "v3": 58 * 256,
        "v3.2": 58 * 256,
        "v4-flash": 40 * 256,  # three layers route by hash
        "v4-pro": 58 * 384,
        "v4.1-flash": 40 * 384 * 2,  # of text and of images
    }


def test_the_mtp_block_of_v3_has_its_published_size():
    assert round(count_parameters(ModelConfig.preset("v3"))["by_part"]["mtp"] / 1e9, 2) == 11.61


def test_a_tied_head_costs_no_parameters_and_all_its_flops():
    cfg = ModelConfig.preset("v1-7b")
    tied, free = (count_parameters(c) for c in (cfg.replace(tie_word_embeddings=True), cfg))
    assert tied["by_part"]["head"] == 0 and free["total"] - tied["total"] == 102400 * 4096
    assert tied["active"] == free["active"]


def test_biases_of_grouped_queries_are_counted():
    cfg = tiny(**{"attention.kind": "gqa", "attention.num_key_value_heads": 2})
    more = count_parameters(cfg.replace(**{"attention.qkv_bias": True}))["total"] - count_parameters(cfg)["total"]
    assert more == 5 * (4 + 2 * 2) * cfg.attention.head_dim


def test_a_plain_grouped_query_model_has_the_size_of_llama():
    cfg = ModelConfig.preset("v1-7b")
    by_hand = 2 * 102400 * 4096 + 30 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
    counted = count_parameters(cfg)
    assert counted["total"] == by_hand
    assert counted["active"] == by_hand - 102400 * 4096
    used = {name for name, count in counted["by_part"].items() if count}
    assert used == {"embedding", "head", "attention", "dense_ffn", "norms"}


def test_fewer_key_value_heads_leave_out_their_projections():
    full = tiny(**{"attention.kind": "gqa", "attention.num_key_value_heads": 4})
    one = full.replace(**{"attention.num_key_value_heads": 1})
    saved = count_parameters(full)["total"] - count_parameters(one)["total"]
    assert saved == 5 * 2 * 32 * 3 * full.attention.head_dim


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ({"indexer.mode": "off"}, "indexer"),
        ({"engram.layer_ids": []}, "engram_tables"),
        ({"engram.layer_ids": []}, "engram_projections"),
        ({"residual.kind": "plain"}, "residual"),
        ({"moe.n_routed_experts": 0}, "routed_experts"),
        ({"mtp.num_layers": 0}, "mtp"),
        ({"media.image": None, "media.video": None, "media.audio": None}, "media"),
    ],
)
def test_an_innovation_switched_off_costs_nothing(override, part):
    assert count_parameters(ModelConfig.preset("nano"))["by_part"][part] > 0
    assert count_parameters(ModelConfig.preset("nano", **override))["by_part"][part] == 0


def test_everything_is_active_in_a_dense_model_but_the_embedding():
    counted = count_parameters(tiny())
    assert counted["total"] - counted["active"] == 97 * 32


def test_the_last_group_of_layers_may_be_short():
    groups = {1: 5, 2: 3, 4: 2, 5: 1, 9: 1}
    for layers_per_indexer, indexers in groups.items():
        cfg = tiny(**{"indexer.mode": "sparse", "indexer.layers_per_indexer": layers_per_indexer})
        assert num_indexers(cfg) == indexers


# ---------------------------------------------------------------- Engram tables


def test_primes_match_the_released_model():
    cfg = EngramConfig(layer_ids=(1, 14), max_ngram=4, n_heads=8, head_dim=256, vocab_size=16_000_000)
    primes = engram_primes(cfg)
    assert primes[0][0][:4] == [16000057, 16000079, 16000081, 16000097]
    assert primes[1][2][-1] == 16000889
    assert [sum(map(sum, layer)) for layer in primes] == [384006168, 384016682]


def test_primes_are_distinct_primes_not_below_the_start():
    cfg = EngramConfig(layer_ids=(0, 2, 3), max_ngram=4, n_heads=3, vocab_size=2)
    primes = engram_primes(cfg)
    flat = [p for layer in primes for order in layer for p in order]
    assert [len(layer) for layer in primes] == [3, 3, 3] and len(flat) == 27
    small = [n for n in range(2, 200) if all(n % m for m in range(2, n))]
    assert flat == small[:27]  # no number is left out or taken twice
    assert engram_primes(EngramConfig()) == []


def test_large_primes_and_strong_pseudoprimes():
    # 3215031751 passes Miller-Rabin for 2, 3, 5 and 7; 2147483647 is prime.
    [[[after_pseudoprime]]] = engram_primes(EngramConfig((0,), max_ngram=2, n_heads=1, vocab_size=3215031751))
    assert after_pseudoprime > 3215031751
    [[[mersenne]]] = engram_primes(EngramConfig((0,), max_ngram=2, n_heads=1, vocab_size=2147483647))
    assert mersenne == 2147483647


# ---------------------------------------------------------------- the modules themselves


def random_attention(rng: random.Random, layers: int) -> dict:
    pick = rng.choice
    kind = pick(("mla", "mla", "gqa", "compressed", "csa2"))
    drawn = {
        "kind": kind,
        "num_attention_heads": 4,
        "num_key_value_heads": pick((1, 2, 4)),
        "qkv_bias": pick((False, True)),
        "head_dim": pick((8, 12)),
        "q_lora_rank": pick((0, 12)) if kind == "mla" else 12,
        "kv_lora_rank": rng.randint(4, 20),
        "qk_nope_head_dim": rng.randint(4, 12),
        "qk_rope_head_dim": pick((4, 8)),
        "v_head_dim": rng.randint(4, 12),
        "o_groups": pick((1, 2, 4)),
        "o_lora_rank": rng.randint(4, 12),
        "sliding_window": rng.randint(1, 6),
    }
    if kind == "compressed":
        drawn["compress_ratios"] = [pick((0, 4, 8)) for _ in range(layers)]
    if kind == "csa2":
        alone, second = rng.randint(0, layers), rng.randint(0, layers)
        second = max(second, alone)
        sources = [s for s in dict.fromkeys((alone, second)) if s < layers]
        more = [layer for layer in range(alone, layers) if rng.random() < 0.3]
        drawn["compress_ratios"] = [0] * alone + [2] * (second - alone) + [1] * (layers - second)
        drawn["kv_source_layer_ids"] = sources
        drawn["index_source_layer_ids"] = sorted({*sources, *more})
    return drawn


def random_config(seed: int) -> ModelConfig:
    rng = random.Random(seed)
    pick = rng.choice
    layers = rng.randint(1, 6)
    attention = random_attention(rng, layers)
    image = pick(("embedder", "tower", None))
    media = {
        "hidden_size": rng.randint(4, 20),
        "image": {"patch_size": 4} if image == "embedder" else None,
        "video": pick((None, {"patch_size": 4})),
        "audio": pick((None, {"n_mels": 8})),
        "vision": {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 12}
        if image == "tower"
        else None,
    }
    reads_media = any(media[name] for name in ("image", "video", "audio", "vision"))
    drafts = attention["kind"] in ("compressed", "csa2") and not reads_media and rng.random() < 0.5
    drafter = {"num_layers": 2, "target_layer_ids": [0, layers - 1], "markov_rank": 5, "n_routed_experts": 6}
    return ModelConfig.from_dict(
        {
            "vocab_size": rng.randint(32, 200),
            "hidden_size": pick((16, 24, 40)),
            "num_hidden_layers": layers,
            "intermediate_size": rng.randint(8, 64),
            "tie_word_embeddings": pick((False, True)),
            "attention": attention,
            "indexer": {
                "mode": "off" if attention["kind"] == "gqa" else pick(("off", "dense", "warmup", "sparse")),
                "n_heads": rng.randint(1, 3),
                "head_dim": 8,
                "layers_per_indexer": rng.randint(1, 3),
                "first_layer": rng.randint(0, 2),
                "candidate_blocks": pick((0, 8)) if attention["kind"] == "mla" else 0,
            },
            "moe": {
                "n_routed_experts": pick((0, 4, 8)),
                "n_shared_experts": pick((0, 1, 2)),
                "num_experts_per_tok": pick((1, 4)),
                "moe_intermediate_size": rng.randint(4, 16),
                "first_k_dense_replace": rng.randint(0, layers + 1),
                "num_hash_layers": 0 if reads_media else rng.randint(0, layers),
            },
            "residual": {"kind": pick(("plain", "hc", "mhc", "mhc_single_pass")), "hc_mult": pick((2, 4))},
            "engram": {
                "layer_ids": sorted(rng.sample(range(layers), rng.randint(0, min(layers, 2)))),
                "max_ngram": pick((2, 3)),
                "n_heads": rng.randint(1, 3),
                "head_dim": 4,
                "vocab_size": rng.randint(50, 100),
                "short_conv": pick((False, True)),
            },
            "mtp": {"num_layers": pick((0, 1))},
            "drafter": drafter if drafts else {},
            "media": media,
        }
    )


CONFIGS = {name: ModelConfig.preset(name) for name in (*NATIVE, *LADDER)}
CONFIGS |= {f"random-{seed}": random_config(seed) for seed in range(80)}


def test_the_random_models_are_of_every_kind():
    kinds = {(cfg.attention.kind, cfg.indexer.mode != "off") for cfg in CONFIGS.values()}
    assert kinds == {(k, b) for k in ("mla", "compressed", "csa2") for b in (False, True)} | {("gqa", False)}


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_the_model_has_exactly_the_counted_parameters(cfg):
    import torch

    from fourfold.model.transformer import Model

    with torch.device("meta"):
        model = Model(cfg)
    built = sum(p.numel() for p in model.parameters())
    if cfg.moe.topk_method == "noaux_tc":
        for name, buffer in model.named_buffers():
            if name.endswith("gate.bias"):
                built += buffer.numel() * (1 if cfg.media.vision is None else 2)  # a tower brings one more set
            elif name.endswith("gate.media_bias") and cfg.media.embedded:
                built += buffer.numel() * (3 if cfg.media.vision is None else 2) // 3
    counted = count_parameters(cfg)["by_part"]
    assert built == sum(counted.values()), f"built {built}, counted {counted}"


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_every_parameter_belongs_to_the_part_that_counts_it(cfg):
    import torch

    from fourfold.model.transformer import Model

    with torch.device("meta"):
        model = Model(cfg)
    built = dict.fromkeys(count_parameters(cfg)["by_part"], 0)
    for name, parameter in model.named_parameters():
        built[part_of(name)] += parameter.numel()
    counted = dict(count_parameters(cfg)["by_part"])
    for part in ("router_bias", "mtp", "drafter", "media"):  # which hold buffers too
        assert built.pop(part) <= counted.pop(part)
    assert built == counted


@pytest.mark.parametrize("numbers", ["fp32", "bf16", "fp8", "int8"])
@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_the_cache_holds_exactly_the_counted_numbers(cfg, numbers):
    from fourfold.model.cache import layout
    from fourfold.ops import ROW_FORMATS

    dtype = ROW_FORMATS[numbers]
    kept = layout(cfg, dtype=dtype)
    per_token = cache_bytes_per_token(cfg, numbers)
    assert per_token["total"] == pytest.approx(dtype.itemsize * kept.per_position, abs=2)  # each part is rounded up
    assert cache_bytes_per_sequence(cfg) == 4 * kept.tail_width


# ---------------------------------------------------------------- FLOPs


def test_decoding_at_a_million_tokens_costs_what_the_design_says():
    flops = decode_flops(ModelConfig.preset("v4"), 2**20)
    assert flops["weights"] == 2 * ANNOUNCED["v4"][1]
    assert round(flops["attention"] / 1e9) == 35
    assert round(flops["indexer"] / 1e9) == 137
    assert flops["total"] == flops["weights"] + flops["attention"] + flops["indexer"]


def test_sparse_attention_stops_growing_and_dense_attention_does_not():
    sparse = tiny(**{"indexer.mode": "sparse", "indexer.topk": 16})
    dense = tiny(**{"indexer.mode": "dense", "indexer.topk": 16})
    assert decode_flops(sparse, 16)["attention"] == decode_flops(sparse, 4096)["attention"]
    assert decode_flops(dense, 4096)["attention"] == 256 * decode_flops(dense, 16)["attention"]
    assert decode_flops(dense, 4096)["indexer"] == 0
    assert decode_flops(sparse, 4096)["indexer"] == 256 * decode_flops(sparse, 16)["indexer"]


@pytest.mark.parametrize("ratio", [1, 2, 4, 7])
@pytest.mark.parametrize("limit", [None, 1, 3, 10])
def test_the_mean_of_what_is_read_is_that_of_all_positions(ratio, limit):
    read = Read("attention", 8, 2, ratio, limit)
    for context in range(1, 60):
        rows = [read.rows(position) for position in range(1, context + 1)]
        assert read.mean_rows(context) == pytest.approx(sum(rows) / context)


def test_a_compressing_layer_reads_its_window_and_entries():
    cfg = ModelConfig.preset("v4-flash")
    per_row = 4 * 64 * 512  # 64 heads, score and value of 512 numbers
    window, selected, all_entries = 43 * 128, 21 * 512, 20 * (2**20 // 128)
    flops = decode_flops(cfg, 2**20)
    assert flops["attention"] == per_row * (window + selected + all_entries)
    assert flops["indexer"] == 21 * 2 * 64 * 128 * 2**18
    short = decode_flops(cfg, 100)
    assert short["attention"] == per_row * (43 * 100 + 21 * 25)
    dense = cfg.replace(**{"indexer.mode": "dense"})
    assert decode_flops(dense, 2**20)["attention"] == per_row * (window + 21 * 2**18 + all_entries)
    assert decode_flops(dense, 2**20)["indexer"] == 0


def test_layers_that_borrow_a_selection_score_nothing_and_candidates_bound_the_rest():
    cfg = ModelConfig.preset("v4.1-flash")
    per_score = 2 * 32 * 128
    flat, narrowed = 3 * 2**19 + 2**20, 4 * 2048 * 8
    assert decode_flops(cfg, 2**20)["indexer"] == per_score * (flat + narrowed)
    assert decode_flops(cfg, 2**20)["attention"] == 4 * 64 * 512 * (40 * 128 + 38 * 512)
    flat_only = cfg.replace(**{"attention.candidate_source_layer_id": -1})
    assert decode_flops(flat_only, 2**20)["indexer"] == per_score * (3 * 2**19 + 5 * 2**20)


@pytest.mark.parametrize("context", [1, 2, 15, 16, 17, 100])
def test_prefill_is_the_mean_over_positions(context):
    cfg = tiny(**{"indexer.mode": "sparse", "indexer.topk": 16})
    a = cfg.attention
    head = a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim
    per_key = 2 * cfg.num_hidden_layers * a.num_attention_heads * head
    mean_keys = sum(min(t, 16) for t in range(1, context + 1)) / context
    assert prefill_flops(cfg, context)["attention"] == pytest.approx(per_key * mean_keys)
    mean_scored = sum(range(1, context + 1)) / context
    per_score = 2 * 2 * cfg.indexer.n_heads * cfg.indexer.head_dim  # two groups of layers
    assert prefill_flops(cfg, context)["indexer"] == pytest.approx(per_score * mean_scored)


def test_grouped_queries_read_one_key_and_one_value_per_head():
    cfg = tiny(**{"attention.kind": "gqa"})
    assert decode_flops(cfg, 10)["attention"] == 2 * 5 * 4 * 2 * 32 * 10
    assert prefill_flops(cfg, 1)["attention"] == decode_flops(cfg, 1)["attention"]


def test_training_costs_three_forwards_and_the_mtp_block():
    cfg = ModelConfig.preset("nano")
    without = cfg.replace(**{"mtp.num_layers": 0})
    assert training_flops(without, 512) == 3 * prefill_flops(without, 512)["total"]
    extra = training_flops(cfg, 512) - training_flops(without, 512)
    idle_experts = cfg.moe.n_routed_experts - cfg.moe.num_experts_per_tok
    idle = idle_experts * 3 * cfg.hidden_size * cfg.moe.moe_intermediate_size
    used = count_parameters(cfg)["by_part"]["mtp"] - idle + cfg.vocab_size * cfg.hidden_size
    assert 3 * 2 * used < extra < 1.2 * 3 * 2 * used  # the rest is the attention of one layer


# ---------------------------------------------------------------- bytes


def test_weights_in_each_dtype():
    cfg = ModelConfig.preset("v4")
    parameters = count_parameters(cfg)["by_part"]
    assert weight_bytes(cfg, "bf16") == {part: 2 * n for part, n in parameters.items()}
    assert weight_bytes(cfg, "fp32") == {part: 4 * n for part, n in parameters.items()}
    int8, int4 = weight_bytes(cfg, "int8"), weight_bytes(cfg, "int4")
    assert int8["routed_experts"] == parameters["routed_experts"] * 130 / 128
    assert int4["routed_experts"] == parameters["routed_experts"] * 18 / 32
    assert int4["norms"] == int8["norms"] == 2 * parameters["norms"]
    expansions = cfg.attention.num_attention_heads * (cfg.attention.qk_nope_head_dim + cfg.attention.v_head_dim)
    wide = cfg.num_hidden_layers * expansions * cfg.attention.kv_lora_rank
    assert int4["attention"] == (parameters["attention"] - wide) * 18 / 32 + 2 * wide
    with pytest.raises(ValueError, match="fp12"):
        weight_bytes(cfg, "fp12")


def test_a_cached_token_takes_latent_rope_key_and_index_keys():
    cfg = ModelConfig.preset("v4")
    assert cache_bytes_per_token(cfg) == {"attention": 70_272, "indexer": 2 * 128 * 16, "total": 70_272 + 4_096}
    assert cache_bytes_per_token(cfg, "fp32")["total"] == 2 * cache_bytes_per_token(cfg)["total"]
    assert cache_bytes_per_token(tiny(**{"attention.kind": "gqa"}))["total"] == 2 * 5 * 2 * 4 * 32
    rows = {"attention": 61 * (512 + 64 + 2 * 4), "indexer": 16 * (128 + 4)}
    assert cfg.num_hidden_layers == 61
    for numbers in ("fp8", "int8"):
        assert cache_bytes_per_token(cfg, numbers) == rows | {"total": sum(rows.values())}
    with pytest.raises(ValueError, match="int2"):
        cache_bytes_per_token(cfg, "int2")


def test_compressed_caches_grow_by_entries_and_begin_with_a_tail():
    flash, shared = ModelConfig.preset("v4-flash"), ModelConfig.preset("v4.1-flash")
    per_token = cache_bytes_per_token(flash)
    assert per_token["attention"] == 2 * (21 * 512 // 4 + 20 * 512 // 128)
    assert per_token["indexer"] == 2 * 21 * 128 // 4
    csa, hca = 7 * 4 * (512 + 128), 127 * 2 * 512
    assert cache_bytes_per_sequence(flash) == 4 * (43 * 127 * 512 + 21 * csa + 20 * hca)
    assert cache_bytes_per_token(shared)["total"] == 2 * (3 * (512 + 128) // 2 + 512 + 128)  # four layers keep entries
    assert cache_bytes_per_sequence(shared) == 4 * (40 * 127 * 512 + 3 * 2 * 512)
    assert cache_bytes_per_sequence(ModelConfig.preset("v4")) == 0


def test_rows_follow_from_the_primes():
    assert engram_rows(ModelConfig.preset("v4")) == 480_003_590 + 480_011_990
    assert engram_rows(tiny()) == 0
