"""Released configurations become ours and go back; every tensor of ours has one place on disk, to the last number."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from fourfold.config import ModelConfig
from fourfold.fields import ConfigError
from fourfold.model.transformer import Model
from fourfold.weights.families import FAMILIES, family_of
from fourfold.weights.families.base import canonical
from fourfold.weights.families.entries import Cat, Part, Stack, Zeros, by_disk_name, disk_shapes, leaves
from fourfold.weights.formats import FORMATS
from tests.weights import released
from tests.weights.released import tiny_config

MODELS = {
    "v2-lite": released.V2_LITE,
    "v2": released.V2,
    "v3": released.V3,
    "v3.2": released.V32,
    "v4-flash": released.V4_FLASH,
    "v4-pro": released.V4_PRO,
    "v4.1-flash": released.V41,
}


def read(values: dict[str, Any]) -> ModelConfig:
    return family_of(values).config(copy.deepcopy(values))


def kind(values: dict[str, Any]) -> str:
    return values["model_type"]


def shapes_of(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Model(cfg).state_dict().items()}


def on_disk(values: dict[str, Any], cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    plan = family_of(values).plan(cfg, "released")
    shapes = shapes_of(cfg)
    assert shapes.keys() - plan.keys() <= {"compression.ids"} and not plan.keys() - shapes.keys()
    return disk_shapes(plan, shapes)


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize("name", MODELS)
def test_a_released_config_is_the_preset_of_that_name(name):
    assert canonical(read(MODELS[name])) == canonical(ModelConfig.preset(name))


@pytest.mark.parametrize("values", [*MODELS.values(), released.LLAMA_8B, released.QWEN_7B], ids=kind)
@pytest.mark.parametrize("dialect", ["released", "transformers"])
def test_written_configs_are_read_as_what_was_written(values, dialect):
    family, cfg = family_of(values), read(values)
    if dialect not in family.dialects:
        with pytest.raises(ConfigError, match="dialect"):
            family.to_config(cfg, dialect)
        return
    written = family.to_config(cfg, dialect)
    assert family.config(written) == cfg
    assert ("rope_parameters" in written) == (dialect == "transformers")


def test_yarn_numbers_of_v3_and_v2_lite():
    """Spec 1.3: equal mscales leave cosines alone; the softmax gets the square of what mscale_all_dim gives."""
    for values, mscale in ((released.V3, 1.0), (released.V2_LITE, 0.707)):
        rope = read(values).rope
        assert (rope.attention_factor, rope.mscale_all_dim, rope.factor) == (1.0, mscale, 40.0)


@pytest.mark.parametrize(
    ("more", "factor"),
    [
        ({}, 0.1 * math.log(40) + 1),
        ({"mscale": 1.0}, 0.1 * math.log(40) + 1),
        ({"mscale": 1.0, "mscale_all_dim": 0.5}, (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1)),
        ({"attention_factor": 1.5, "mscale": 1.0, "mscale_all_dim": 0.5}, 1.5),
    ],
    ids=["none", "mscale alone", "both", "given"],
)
def test_the_length_of_cosines_under_yarn(more, factor):
    rope = read(released.V3 | {"rope_scaling": released.YARN | more}).rope
    assert rope.attention_factor == pytest.approx(factor)
    family = family_of(released.V3)
    cfg = read(released.V3 | {"rope_scaling": released.YARN | more})
    for dialect in family.dialects:
        assert family.config(family.to_config(cfg, dialect)) == cfg


def test_mscale_all_dim_does_not_touch_the_softmax_of_llama_types():
    scaling = released.YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}
    rope = read(released.LLAMA_8B | {"rope_scaling": scaling}).rope
    assert rope.mscale_all_dim == 0 and rope.attention_factor == 1


def test_v4_never_stretches_cosines():
    cfg = read(released.V4_FLASH)
    assert cfg.compress_rope.attention_factor == 1 and cfg.rope.factor == 1
    assert cfg.attention.compress_ratios.count(4) == 21 and cfg.attention.compress_ratios.count(128) == 20
    pro = read(released.V4_PRO)
    assert pro.attention.compress_ratios.count(4) == 30 and pro.attention.compress_ratios.count(128) == 31


def test_a_v4_with_a_drafter_loads_without_it(caplog):
    cfg = read(released.V4_FLASH_0731)
    assert cfg.mtp.num_layers == 0 and cfg.replace(**{"mtp.num_layers": 1}) == read(released.V4_FLASH)
    assert "drafter" in caplog.text
    assert FAMILIES["deepseek_v4"].ignored(cfg, "mtp.2.markov_head.markov_w1.weight")


def test_v4_schedules_by_name_and_by_number_are_one():
    cfg = tiny_config("deepseek_v4")
    values = FAMILIES["deepseek_v4"].to_config(cfg, "transformers")
    assert values["layer_types"][1:] == ["compressed_sparse_attention", "heavily_compressed_attention"]
    assert values["compress_rates"]["heavily_compressed_attention"] == 8
    both = values | {"compress_ratios": [0, 4, 8, 0], "num_hash_layers": 1}
    assert canonical(FAMILIES["deepseek_v4"].config(both)) == canonical(cfg)


WRONG = {
    "silu": (released.V3, {"hidden_act": "gelu"}, "hidden_act: is 'gelu'"),
    "bias": (released.V3, {"attention_bias": True}, "attention_bias: is True"),
    "llama bias": (released.LLAMA_8B, {"mlp_bias": True}, "mlp_bias: is True"),
    "not interleaved": (released.V3, {"rope_interleave": False}, "rope_interleave: is False"),
    "some layers routed": (released.V3, {"moe_layer_freq": 2}, "moe_layer_freq: is 2"),
    "expert parallel": (released.V3, {"ep_size": 8}, "ep_size: is 8"),
    "window": (released.QWEN_7B, {"use_sliding_window": True}, "use_sliding_window: is True"),
    "dropout": (released.LLAMA_8B, {"attention_dropout": 0.1}, "attention_dropout: is 0.1"),
    "eps": (released.V3, {"rms_norm_eps": 1e-5}, "rms_norm_eps: is 1e-05"),
    "heads": (released.LLAMA_8B, {"num_attention_heads": 33}, "num_attention_heads: is 33"),
    "kv heads": (released.V3, {"num_key_value_heads": 8}, "num_key_value_heads: is 8"),
    "head dim": (released.V3, {"head_dim": 128}, "head_dim: is 128, but qk_rope_head_dim"),
    "renormalised": (released.V2, {"norm_topk_prob": True}, "norm_topk_prob: is True"),
    "another choice": (released.V2, {"topk_method": "noaux_tc"}, "topk_method: is 'noaux_tc'"),
    "another score": (released.V3, {"scoring_func": "softmax"}, "scoring_func: is 'softmax'"),
    "two mtp": (released.V3, {"num_nextn_predict_layers": 2}, "num_nextn_predict_layers: is 2"),
    "dynamic rope": (released.V3, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type: is 'dynamic'"),
    "rope field": (released.V3, {"rope_scaling": released.YARN | {"alpha": 1}}, "rope_scaling.alpha: is not a field"),
    "rope shrinks": (released.V3, {"rope_scaling": released.YARN | {"factor": 0.5}}, "rope_scaling.factor: is 0.5"),
    "rope not truncated": (released.V3, {"rope_scaling": released.YARN | {"truncate": False}}, "truncate: is False"),
    "two thetas": (released.LLAMA_8B, {"rope_parameters": {"rope_theta": 1e4}}, "rope_theta"),
    "gptq": (released.V3, {"quantization_config": {"quant_method": "gptq"}}, "quant_method: is 'gptq'"),
    "block": (released.V3, {"quantization_config": released.FP8 | {"weight_block_size": [0]}}, "weight_block_size"),
    "no latent": (released.V32, {"q_lora_rank": None}, "q_lora_rank: is missing"),
    "sparse layers": (released.V32, {"mlp_layer_types": ["dense"] * 61}, "mlp_layer_types"),
    "too few ratios": (released.V4_FLASH, {"compress_ratios": [0] * 42}, "compress_ratios: has 42 entries"),
    "too many ratios": (released.V4_FLASH, {"compress_ratios": [0] * 46}, "compress_ratios: has 46 entries"),
    "no ratios": (released.V4_FLASH, {"compress_ratios": None}, "compress_ratios: is missing"),
    "kv heads of v4": (released.V4_FLASH, {"num_key_value_heads": 8}, "num_key_value_heads: is 8"),
    "two shared": (released.V4_FLASH, {"n_shared_experts": 2}, "n_shared_experts: is 2"),
    "no text": (released.V41, {"text_config": 3}, "text_config: must be of type dict"),
    "no family": ({"model_type": "mamba"}, {}, "model_type: is 'mamba'"),
    "model_type list": ({"model_type": ["llama"]}, {}, "model_type"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_we_would_compute_otherwise_is_refused(case):
    values, change, said = WRONG[case]
    with pytest.raises(ConfigError) as caught:
        read(values | change)
    assert said in str(caught.value)


def test_the_tables_of_engram_must_follow_from_its_primes():
    wrong = copy.deepcopy(released.V41)
    wrong["text_config"]["engram_num_embeddings"][1] += 1
    with pytest.raises(ConfigError, match="engram_num_embeddings.*384016682"):
        read(wrong)


def test_all_faults_come_at_once():
    values = released.V3 | {
        "hidden_act": "relu",
        "colour": "red",
        "vocab_size": "many",
        "rope_scaling": {"type": "ntk"},
    }
    del values["kv_lora_rank"]
    with pytest.raises(ConfigError) as caught:
        read(values)
    for name in ("hidden_act", "colour", "vocab_size", "rope_type", "kv_lora_rank"):
        assert f"{name}: " in str(caught.value)


@pytest.mark.parametrize("values", [released.V3, released.V4_FLASH, released.V41, released.QWEN_7B], ids=kind)
def test_no_field_can_be_missing_or_wrong_without_an_error_of_ours(values):
    """Whatever stands in a field: it is read, or ConfigError names it; never another exception."""
    tables = [values, *(v for v in values.values() if isinstance(v, dict))]
    for table in tables:
        for name in table:
            for wrong in (None, -1, 0, 10**9, "x", [], {}, [1], {"a": 1}, True, 1e400):
                broken = copy.deepcopy(values)
                target = broken if table is values else next(v for k, v in broken.items() if values[k] is table)
                target[name] = wrong
                try:
                    read(broken)
                except ConfigError:
                    pass


# ---------------------------------------------------------------- what a family cannot express


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_expresses_its_own_tiny_model(model_type):
    cfg = tiny_config(model_type)
    if cfg.engram.layer_ids:
        cfg = cfg.replace(**{"engram.compressed_vocab_size": 200})
    family = FAMILIES[model_type]
    for dialect in family.dialects:
        assert canonical(family.config(family.to_config(cfg, dialect))) == canonical(cfg)


@pytest.mark.parametrize(
    ("model_type", "change", "named"),
    [
        ("llama", {"residual.kind": "mhc"}, "residual.kind"),
        ("llama", {"attention.qkv_bias": True}, "attention.qkv_bias"),
        ("qwen2", {"attention.qkv_bias": False}, "attention.qkv_bias"),
        ("llama", {"moe.n_routed_experts": 4}, "moe.n_routed_experts"),
        ("deepseek_v2", {"mtp.num_layers": 1}, "mtp.num_layers"),
        ("deepseek_v3", {"engram.layer_ids": [1]}, "engram.layer_ids"),
        ("deepseek_v3", {"mtp.normed_input": False}, "mtp.normed_input"),
        ("deepseek_v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ("deepseek_v3", {"media.image": {"patch_size": 2}}, "media.image"),
        ("deepseek_v32", {"indexer.layers_per_indexer": 2}, "indexer.layers_per_indexer"),
        ("deepseek_v32", {"indexer.first_layer": 1}, "indexer.first_layer"),
        ("deepseek_v32", {"indexer.mode": "dense"}, "indexer.mode"),
        ("deepseek_v4", {"moe.first_k_dense_replace": 1}, "moe.first_k_dense_replace"),
        ("deepseek_v4", {"residual.kind": "mhc_single_pass"}, "residual.kind"),
        ("deepseek_v4", {"rope.factor": 4.0}, "rope.factor"),
        ("deepseek_v4", {"moe.norm_topk_prob": False}, "norm_topk_prob"),
        ("deepseek_v41", {"engram.short_conv": True, "engram.compressed_vocab_size": 9}, "engram.short_conv"),
    ],
)
def test_what_a_family_cannot_express_is_named(model_type, change, named):
    for dialect in FAMILIES[model_type].dialects:
        with pytest.raises(ConfigError, match=named):
            FAMILIES[model_type].to_config(tiny_config(model_type, **change), dialect)


def test_what_is_not_in_use_need_not_be_expressed():
    cfg = tiny_config(
        "llama", **{"moe.n_shared_experts": 7, "indexer.topk": 3, "residual.hc_mult": 9, "attention.o_groups": 2}
    )
    assert FAMILIES["llama"].to_config(cfg, "released")["model_type"] == "llama"


# ---------------------------------------------------------------- places on disk


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_number_has_one_place(model_type):
    """The slices of a disk tensor tile it: no gap, no overlap, no tensor of ours forgotten."""
    cfg, family = tiny_config(model_type), FAMILIES[model_type]
    shapes = shapes_of(cfg)
    for dialect in family.dialects:
        plan = family.plan(cfg, dialect)
        zeros = sum(
            math.prod(leaf.shape)
            for ours, entry in plan.items()
            for leaf in leaves(entry, shapes[ours])
            if isinstance(leaf.part, Zeros)
        )
        numbers = sum(math.prod(shapes[ours]) for ours in plan) - zeros
        pieces = by_disk_name(plan, shapes)
        assert sum(math.prod(shape) for shape in disk_shapes(plan, shapes).values()) == numbers
        for parts in pieces.values():
            end = 0
            for piece in parts:
                assert piece.leaf.part.start == end
                end = piece.leaf.part.stop
            assert end is None or len(parts) > 1
        assert not any(family.ignored(cfg, name) for name in pieces)


def test_entries_and_their_leaves():
    entry = Stack((Cat((Part("a"), Part("b"))), Cat((Part("c", 0, 2, 4), Zeros()))))
    found = list(leaves(entry, (2, 4, 3)))
    assert [(leaf.leading, leaf.start, leaf.shape) for leaf in found] == [
        ((0,), 0, (2, 3)),
        ((0,), 2, (2, 3)),
        ((1,), 0, (2, 3)),
        ((1,), 2, (2, 3)),
    ]
    assert found[2].part.name == "c" and isinstance(found[3].part, Zeros)
    with pytest.raises(ValueError):
        list(leaves(entry, (3, 4, 3)))


def test_the_gate_lies_above_the_up_projection():
    """Spec 8.4, P9, in both kinds of names; and V3's MTP reads the embedding by the first half of its matrix."""
    v3 = FAMILIES["deepseek_v3"].plan(tiny_config("deepseek_v3"), "released")
    first = v3["layers.1.mlp.gate_up_proj"].entries[0]
    assert [p.name.rsplit(".", 2)[1] for p in first.entries] == ["gate_proj", "up_proj"]
    assert (v3["mtp.e_proj.weight"].dim, v3["mtp.e_proj.weight"].start, v3["mtp.h_proj.weight"].start) == (1, 0, 24)
    v4 = FAMILIES["deepseek_v4"].plan(tiny_config("deepseek_v4"), "released")
    assert [p.name.rsplit(".", 2)[1] for p in v4["layers.0.mlp.gate_up_proj"].entries[0].entries] == ["w1", "w3"]


def test_hash_layers_have_a_table_and_no_bias():
    plan = FAMILIES["deepseek_v4"].plan(tiny_config("deepseek_v4"), "transformers")
    assert plan["layers.0.mlp.gate.tid2eid"] == Part("model.layers.0.ffn.gate.tid2eid")
    assert "layers.0.mlp.gate.bias" not in plan and "layers.1.mlp.gate.bias" in plan


# ---------------------------------------------------------------- totals of the released models


TOTALS = {  # as published, without MTP and without the router's biases, which are buffers there
    "v2-lite": 15_706_484_224,
    "v2": 235_741_434_880,
    "v3": 671_026_404_352,
    "v3.2": 671_877_929_216,
    "v4-flash": 284_332_230_231,
    "v4-pro": 1_572_997_179_491,
}


@pytest.mark.parametrize("name", TOTALS)
def test_totals_to_the_last_parameter(name):
    cfg = read(MODELS[name]).replace(**{"mtp.num_layers": 0})
    shapes = on_disk(MODELS[name], cfg)
    buffers = ("gate.bias", "e_score_correction_bias", "tid2eid")
    assert sum(math.prod(s) for n, s in shapes.items() if not n.endswith(buffers)) == TOTALS[name]


def test_the_ledger_of_v41():
    """Spec 5.2. The drafter's biases for images are in the file and nowhere used."""
    cfg = read(released.V41)
    shapes = on_disk(released.V41, cfg)
    size: dict[str, int] = dict.fromkeys(("tables", "engram", "drafter", "media", "backbone"), 0)
    for name, shape in shapes.items():
        part = "backbone"
        if name.startswith("mtp."):
            part = "drafter"
        elif name.startswith(("vision.", "aligner.", "image_")):
            part = "media"
        elif ".engram." in name:
            part = "tables" if ".embed." in name else "engram"
        size[part] += math.prod(shape)
    assert size == {
        "tables": 196_613_849_600,
        "engram": 314_654_720,
        "drafter": 14_225_362_530 - 3 * 128,
        "media": 485_268_480,
        "backbone": 551_566_180_464,
    }
    assert FAMILIES["deepseek_v41"].ignored(cfg, "mtp.1.ffn.gate.bias_vl")


@pytest.mark.parametrize(("name", "tensors"), [("v4-flash", 69_187), ("v4.1-flash", 96_085 - 3)])
def test_the_files_have_as_many_tensors_as_the_released_ones(name, tensors):
    """Spec 4.1 and 5.2 (the three: biases that nothing reads), scales of fp8 and fp4 weights included."""
    values = MODELS[name]
    family, cfg = family_of(values), read(values)
    shapes = on_disk(values, cfg)
    scaled = sum(FORMATS[family.tensor_format(name, "fp8+fp4")].block is not None for name in shapes)
    assert len(shapes) + scaled == tensors
