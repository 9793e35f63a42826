"""Configurations: presets, dotted overrides, and errors that name the field and its limit."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold.config import PRESETS, ModelConfig
from fourfold.fields import ConfigError, parse_override

NAMES = sorted(path.stem for path in PRESETS.glob("*.toml"))
MINIMAL = {"vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 16}
FULL = ModelConfig.from_dict(
    {
        "vocab_size": 4096,
        "hidden_size": 32,
        "num_hidden_layers": 6,
        "intermediate_size": 64,
        "indexer": {"mode": "sparse"},
        "moe": {"n_routed_experts": 24},
        "residual": {"kind": "mhc"},
        "engram": {"layer_ids": [1, 3]},
        "mtp": {"num_layers": 1},
        "media": {"image": {}, "video": {}, "audio": {}},
    }
)


def test_the_native_presets_are_there():
    assert {"v4", "v4-lite", "v4-mini", "nano"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_survives_json(name):
    cfg = ModelConfig.preset(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_the_announced_model():
    cfg = ModelConfig.preset("v4")
    assert cfg.max_position_embeddings == 2**20
    assert cfg.moe.num_experts_per_tok == 16
    assert cfg.media.modalities == ("image", "video", "audio")
    assert cfg.residual.streams == 4


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"preset: 'v5' is unknown; choose one of .*nano.*v4"):
        ModelConfig.preset("v5")


def test_overrides_reach_nested_fields_and_leave_the_rest():
    base = FULL
    cfg = base.replace(**{"residual.kind": "plain", "engram.layer_ids": [2], "num_hidden_layers": 4})
    assert (cfg.residual.kind, cfg.engram.layer_ids, cfg.num_hidden_layers) == ("plain", (2,), 4)
    assert cfg.residual.streams == 1
    assert cfg.attention == base.attention and base.residual.kind == "mhc"
    assert ModelConfig.preset("nano", **{"moe.n_routed_experts": 0}).moe.n_routed_experts == 0


def test_a_modality_can_be_left_out_and_added():
    cfg = FULL.replace(**{"media.video": None})
    assert cfg.media.modalities == ("image", "audio")
    assert cfg.replace(**{"media.video": {"patch_size": 4}}).media.video.features == 3 * 2 * 16


@pytest.mark.parametrize("dotted", ["moe.experts", "nothing", "moe.n_routed_experts.x", "rope.theta.y", ".x"])
def test_an_override_of_no_field_names_it(dotted):
    with pytest.raises(ConfigError, match=dotted.replace(".", r"\.")):
        FULL.replace(**{dotted: 1})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 0}, "hidden_size: must be > 0"),
        ({"vocab_size": -1}, "vocab_size: must be > 0"),
        ({"hidden_size": "wide"}, "hidden_size: must be of type int, not str"),
        ({"hidden_size": True}, "hidden_size: must be of type int, not bool"),
        ({"hidden_size": 8.0}, "hidden_size: must be of type int, not float"),
        ({"attention.kind": "linear"}, "attention.kind: is 'linear'; choose one of mla, gqa, compressed, csa2"),
        ({"attention.qk_rope_head_dim": 7}, "attention.qk_rope_head_dim: must be even"),
        ({"attention.kind": "gqa", "attention.num_key_value_heads": 3}, "attention.num_key_value_heads: must divide"),
        ({"attention.kind": "gqa"}, "indexer.mode: must be 'off' for attention.kind 'gqa'"),
        ({"indexer.mode": "fast"}, "indexer.mode: is 'fast'"),
        ({"indexer.head_dim": 8}, "indexer.head_dim: must be at least attention.qk_rope_head_dim (16)"),
        ({"indexer.topk": 0}, "indexer.topk: must be > 0"),
        ({"moe.num_experts_per_tok": 25}, "moe.num_experts_per_tok: must be between 1 and n_routed_experts (24)"),
        ({"moe.n_group": 5}, "moe.n_group: must divide n_routed_experts (24)"),
        ({"moe.n_group": 4, "moe.topk_group": 5}, "moe.topk_group: must be between 1 and n_group (4)"),
        ({"moe.n_group": 24}, "moe.topk_group: keeps fewer experts"),
        ({"moe.scoring_func": "tanh"}, "moe.scoring_func: is 'tanh'"),
        ({"residual.kind": "deep"}, "residual.kind: is 'deep'"),
        ({"residual.hc_sinkhorn_iters": 0}, "residual.hc_sinkhorn_iters: must be >= 1"),
        ({"engram.layer_ids": [6]}, "engram.layer_ids: has 6, outside 0..5"),
        ({"engram.layer_ids": [-1]}, "engram.layer_ids: has -1, outside 0..5"),
        ({"engram.layer_ids": 3}, "engram.layer_ids: must be a list"),
        ({"engram.max_ngram": 1}, "engram.max_ngram: must be >= 2"),
        ({"engram.compressed_vocab_size": 5000}, "engram.compressed_vocab_size: must be at most vocab_size (4096)"),
        ({"mtp.num_layers": 2}, "mtp.num_layers: must be 0 or 1"),
        ({"rope.factor": 0.5}, "rope.factor: must be >= 1"),
        ({"media.video.max_frames": 7}, "media.video.max_frames: must be a multiple of tubelet_frames"),
        ({"media.image.patch_size": 0}, "media.image.patch_size: must be > 0"),
        ({"media.audio.max_seconds": 0}, "media.audio.max_seconds: must be > 0"),
        ({"media.image": 3}, "media.image.: must be a table"),
        ({"media": {"smell": {}}}, "media.smell: is not a field; known: hidden_size, image, video, audio, vision"),
    ],
)
def test_a_bad_value_names_the_field_and_the_limit(overrides, message):
    with pytest.raises(ConfigError) as caught:
        FULL.replace(**overrides)
    assert message in str(caught.value)


def test_missing_and_unknown_fields_are_errors():
    for name in MINIMAL:
        with pytest.raises(ConfigError, match=f"{name}: is missing"):
            ModelConfig.from_dict({k: v for k, v in MINIMAL.items() if k != name})
    with pytest.raises(ConfigError, match="moe.depth: is not a field"):
        ModelConfig.from_dict({**MINIMAL, "moe": {"depth": 1}})
    with pytest.raises(ConfigError, match="must be a table"):
        ModelConfig.from_dict([])


def test_whole_numbers_pass_for_reals_only():
    cfg = ModelConfig.from_dict({**MINIMAL, "rope": {"theta": 500000}})
    assert type(cfg.rope.theta) is float and cfg.rope.theta == 500000.0


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig.preset("nano").hidden_size = 1
    assert hash(ModelConfig.preset("nano")) == hash(ModelConfig.preset("nano"))


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("moe.n_routed_experts=0", ("moe.n_routed_experts", 0)),
        ("rope.theta=1e4", ("rope.theta", 1e4)),
        ("residual.kind=plain", ("residual.kind", "plain")),
        ('residual.kind="plain"', ("residual.kind", "plain")),
        ("engram.layer_ids=[1, 3]", ("engram.layer_ids", [1, 3])),
        ("moe.norm_topk_prob=false", ("moe.norm_topk_prob", False)),
        ("out=runs/a=b", ("out", "runs/a=b")),
    ],
)
def test_overrides_are_written_as_toml(text, parsed):
    assert parse_override(text) == parsed


@pytest.mark.parametrize("text", ["moe", "=3", ""])
def test_an_override_without_key_or_value_is_an_error(text):
    with pytest.raises(ConfigError, match="write key=value"):
        parse_override(text)


@given(st.text(st.characters(categories=["L", "N"]), min_size=1), st.integers(-(2**40), 2**40))
def test_any_integer_override_comes_back(key, value):
    assert parse_override(f"{key}={value}") == (key, value)
