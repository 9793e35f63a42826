"""Counts against published sizes, an independent recount and the modules themselves."""

from __future__ import annotations

import random

import pytest

from fourfold.config import EngramConfig, ModelConfig
from fourfold.counts import (
    cache_bytes_per_token,
    count_parameters,
    decode_flops,
    engram_primes,
    engram_rows,
    num_indexers,
    prefill_flops,
    training_flops,
    weight_bytes,
)

# The announced models: total and active parameters.
EXACT = {"v4": (998_028_498_787, 36_125_113_187), "v4-lite": (203_639_057_239, 12_663_567_703)}
PRESETS = ("v4", "v4-lite", "v4-mini", "nano")


def tiny(**overrides) -> ModelConfig:
    base = ModelConfig(vocab_size=97, hidden_size=32, num_hidden_layers=5, intermediate_size=48)
    return base.replace(**overrides)


# ---------------------------------------------------------------- totals


@pytest.mark.parametrize(("name", "total", "active"), [(name, *sizes) for name, sizes in EXACT.items()])
def test_presets_have_the_announced_size_to_the_last_parameter(name, total, active):
    counted = count_parameters(ModelConfig.preset(name))
    assert (counted["total"], counted["active"]) == (total, active)


def test_parts_add_up_and_mtp_and_media_stand_apart():
    for name in PRESETS:
        counted = count_parameters(ModelConfig.preset(name))
        parts = dict(counted["by_part"])
        assert parts.pop("mtp") > 0 and parts.pop("media") > 0
        assert sum(parts.values()) == counted["total"]


def test_v3_2_without_streams_and_memory_has_its_published_size():
    cfg = ModelConfig.preset(
        "v4",
        **{
            "residual.kind": "plain",
            "engram.layer_ids": [],
            "moe.n_routed_experts": 256,
            "moe.num_experts_per_tok": 8,
            "moe.moe_intermediate_size": 2048,
            "indexer.n_heads": 64,
            "indexer.layers_per_indexer": 1,
        },
    )
    router_biases = 58 * 256  # buffers, which the published figure leaves out
    assert count_parameters(cfg)["total"] - router_biases == 671_877_929_216
    without_indexer = cfg.replace(**{"indexer.mode": "off"})
    assert count_parameters(without_indexer)["total"] - router_biases == 671_026_404_352


def test_v2_lite_without_a_query_latent_has_its_published_size():
    cfg = ModelConfig.from_dict(
        {
            "vocab_size": 102400,
            "hidden_size": 2048,
            "num_hidden_layers": 27,
            "intermediate_size": 10944,
            "attention": {
                "num_attention_heads": 16,
                "kv_lora_rank": 512,
                "qk_nope_head_dim": 128,
                "qk_rope_head_dim": 64,
                "v_head_dim": 128,
            },
            "moe": {
                "n_routed_experts": 64,
                "n_shared_experts": 2,
                "num_experts_per_tok": 6,
                "moe_intermediate_size": 1408,
                "scoring_func": "softmax",
            },
        }
    )
    assert count_parameters(cfg)["total"] - 26 * 64 == 15_706_484_224


def test_a_plain_grouped_query_model_has_the_size_of_llama():
    cfg = ModelConfig.from_dict(
        {
            "vocab_size": 102400,
            "hidden_size": 4096,
            "num_hidden_layers": 30,
            "intermediate_size": 11008,
            "attention": {"kind": "gqa", "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128},
        }
    )
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


def random_config(seed: int) -> ModelConfig:
    rng = random.Random(seed)
    pick = rng.choice
    layers = rng.randint(1, 6)
    gqa = rng.random() < 0.25
    return ModelConfig.from_dict(
        {
            "vocab_size": rng.randint(32, 200),
            "hidden_size": pick((16, 24, 40)),
            "num_hidden_layers": layers,
            "intermediate_size": rng.randint(8, 64),
            "attention": {
                "kind": "gqa" if gqa else "mla",
                "num_attention_heads": 4,
                "num_key_value_heads": pick((1, 2, 4)),
                "head_dim": pick((4, 8)),
                "q_lora_rank": pick((0, 12)),
                "kv_lora_rank": rng.randint(4, 20),
                "qk_nope_head_dim": rng.randint(4, 12),
                "qk_rope_head_dim": pick((4, 8)),
                "v_head_dim": rng.randint(4, 12),
            },
            "indexer": {
                "mode": "off" if gqa else pick(("off", "dense", "warmup", "sparse")),
                "n_heads": rng.randint(1, 3),
                "head_dim": 8,
                "layers_per_indexer": rng.randint(1, 3),
            },
            "moe": {
                "n_routed_experts": pick((0, 4, 8)),
                "n_shared_experts": pick((0, 1, 2)),
                "num_experts_per_tok": pick((1, 4)),
                "moe_intermediate_size": rng.randint(4, 16),
                "first_k_dense_replace": rng.randint(0, layers + 1),
            },
            "residual": {"kind": pick(("plain", "hc", "mhc")), "hc_mult": pick((2, 4))},
            "engram": {
                "layer_ids": sorted(rng.sample(range(layers), rng.randint(0, min(layers, 2)))),
                "max_ngram": pick((2, 3)),
                "n_heads": rng.randint(1, 3),
                "head_dim": 4,
                "vocab_size": rng.randint(50, 100),
                "short_conv": pick((False, True)),
            },
            "mtp": {"num_layers": pick((0, 1))},
            "media": {
                "hidden_size": rng.randint(4, 20),
                "image": pick((None, {"patch_size": 4})),
                "video": pick((None, {"patch_size": 4})),
                "audio": pick((None, {"n_mels": 8})),
            },
        }
    )


CONFIGS = {name: ModelConfig.preset(name) for name in PRESETS}
CONFIGS |= {f"random-{seed}": random_config(seed) for seed in range(40)}


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_the_model_has_exactly_the_counted_parameters(cfg):
    import torch

    from fourfold.model.transformer import Model

    with torch.device("meta"):
        model = Model(cfg)
    built = sum(p.numel() for p in model.parameters())
    built += sum(b.numel() for name, b in model.named_buffers() if name.endswith(("gate.bias", "gate.media_bias")))
    counted = count_parameters(cfg)["by_part"]
    assert built == sum(counted.values()), f"built {built}, counted {counted}"


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_the_cache_holds_exactly_the_counted_numbers(cfg):
    from fourfold.model.cache import token_width

    assert cache_bytes_per_token(cfg)["total"] == 2 * token_width(cfg)


# ---------------------------------------------------------------- FLOPs


def test_decoding_at_a_million_tokens_costs_what_the_design_says():
    flops = decode_flops(ModelConfig.preset("v4"), 2**20)
    assert flops["weights"] == 2 * EXACT["v4"][1]
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
    with pytest.raises(ValueError, match="fp12"):
        weight_bytes(cfg, "fp12")


def test_a_cached_token_takes_latent_rope_key_and_index_keys():
    cfg = ModelConfig.preset("v4")
    assert cache_bytes_per_token(cfg) == {"attention": 70_272, "indexer": 2 * 128 * 16, "total": 70_272 + 4_096}
    assert cache_bytes_per_token(cfg, "fp32")["total"] == 2 * cache_bytes_per_token(cfg)["total"]
    assert cache_bytes_per_token(tiny(**{"attention.kind": "gqa"}))["total"] == 2 * 5 * 2 * 4 * 32
    with pytest.raises(ValueError, match="int2"):
        cache_bytes_per_token(cfg, "int2")


def test_rows_follow_from_the_primes():
    assert engram_rows(ModelConfig.preset("v4")) == 480_003_590 + 480_011_990
    assert engram_rows(tiny()) == 0
