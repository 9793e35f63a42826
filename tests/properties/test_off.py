"""Every innovation has an off that is exactly the plain transformer."""

from __future__ import annotations

import pytest
import torch

from fourfold.model.sequence import pack
from fourfold.model.transformer import Model
from tests.model import plain, tiny, v41

EVERYTHING = {
    "attention.q_lora_rank": 10,
    "indexer.mode": "sparse",
    "indexer.head_dim": 8,
    "indexer.topk": 4,
    "moe.n_routed_experts": 8,
    "residual.kind": "mhc",
    "residual.hc_mult": 3,
    "engram.layer_ids": [0, 1],
    "engram.vocab_size": 101,
    "mtp.num_layers": 1,
    "media": tiny.MEDIA,
}
OFF = {
    "indexer": ({"indexer.mode": "off"}, ("indexer",)),
    "moe": ({"moe.n_routed_experts": 0}, ("experts", "gate.", "gate_up")),
    "residual": ({"residual.kind": "plain"}, ("residual", "collapse")),
    "engram": ({"engram.layer_ids": []}, ("engram", "compression")),
    "mtp": ({"mtp.num_layers": 0}, ("mtp",)),
    "media": ({"media.image": None, "media.video": None, "media.audio": None}, ("media",)),
}

V41_OFF = {"drafter": {"drafter.num_layers": 0}, "vision": {"media.vision": None}}


def all_off() -> dict[str, object]:
    """The switches alone: what else is said of an innovation stays, and must not matter."""
    return {key: value for overrides, _ in OFF.values() for key, value in overrides.items()}


ATTENTION = [{"attention.kind": "gqa"}, {"attention.q_lora_rank": 0}, {"attention.q_lora_rank": 10}]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("attention", ATTENTION, ids=str)
def test_with_everything_off_the_plain_transformer_is_left_to_the_bit(attention, backend, monkeypatch):
    monkeypatch.setenv("FOURFOLD_BACKEND", backend)
    made = tiny.model(tiny.config(**EVERYTHING | all_off() | attention))
    weights = dict(made.state_dict())
    for n in (1, 2, 7, 33):
        document = tiny.text(n, seed=n)
        wanted = plain.logits(weights, made.cfg, document.tokens, fused=backend == "cpu")
        assert torch.equal(tiny.logits(made, document), wanted)


def test_the_plain_transformer_has_no_other_weights():
    made = tiny.model(tiny.config(**all_off()))
    names = {name.split(".", 2)[-1] if name.startswith("layers.") else name for name in made.state_dict()}
    assert names == {
        "embed_tokens.weight",
        "input_layernorm.weight",
        "self_attn.q_proj.weight",
        "self_attn.kv_a_proj_with_mqa.weight",
        "self_attn.kv_a_layernorm.weight",
        "self_attn.kv_b_proj.weight",
        "self_attn.o_proj.weight",
        "post_attention_layernorm.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
        "norm.weight",
        "lm_head.weight",
    }


@pytest.mark.parametrize("innovation", OFF)
def test_one_switched_off_leaves_nothing_of_it(innovation):
    overrides, traces = OFF[innovation]
    full = Model(tiny.config(**EVERYTHING))
    without = Model(tiny.config(**EVERYTHING | overrides))
    assert any(trace in name for name in full.state_dict() for trace in traces)
    left = [name for name in without.state_dict() if any(trace in name for trace in traces)]
    assert not left
    others = {name for name in full.state_dict() if not any(trace in name for trace in traces)}
    gone = others - set(without.state_dict())
    assert not gone or innovation == "moe" or (innovation == "media" and all("media_bias" in n for n in gone))
    without(pack([tiny.text(9)]))


def transplant(source: Model, overrides: dict[str, object]) -> Model:
    """A model with an innovation switched off, and the weights of the one that has it."""
    target = Model(source.cfg.replace(**overrides)).eval()
    weights = source.state_dict()
    target.load_state_dict({name: weights[name] for name in target.state_dict()})
    return target


@pytest.mark.parametrize("mode", ["dense", "warmup"])
def test_an_unused_indexer_changes_no_bit(mode):
    made = tiny.model(tiny.config(**EVERYTHING | {"indexer.mode": mode}))
    off = transplant(made, {"indexer.mode": "off"})
    documents = [tiny.document(made.cfg, 40, seed) for seed in (0, 1)]
    assert torch.equal(tiny.logits(made, *documents), tiny.logits(off, *documents))
    plans = [[20, *[1] * 20], [1] * 40]
    for got, wanted in zip(tiny.decode(made, documents, plans), tiny.decode(off, documents, plans), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("innovation", ["mtp", "media"])
def test_what_is_not_used_changes_no_bit(innovation):
    """A model that can guess ahead or read media treats text as one that cannot."""
    made = tiny.model(tiny.config(**EVERYTHING))
    off = transplant(made, OFF[innovation][0])
    assert torch.equal(tiny.logits(made, tiny.text(30)), tiny.logits(off, tiny.text(30)))


@pytest.mark.parametrize("innovation", V41_OFF)
def test_what_is_not_used_changes_no_bit_of_a_v41(innovation):
    made = tiny.model(v41.config())
    off = transplant(made, V41_OFF[innovation])
    gone = set(made.state_dict()) - set(off.state_dict())
    assert gone and all(name.startswith("drafter.") or "media" in name for name in gone)
    assert torch.equal(tiny.logits(made, tiny.text(30)), tiny.logits(off, tiny.text(30)))


def test_a_memory_of_zeros_changes_no_bit():
    made = tiny.model(tiny.config(**EVERYTHING))
    with torch.no_grad():
        for engram in made.engrams.values():
            engram.value_proj.weight.zero_()
    off = transplant(made, OFF["engram"][0])
    assert torch.equal(tiny.logits(made, tiny.text(30)), tiny.logits(off, tiny.text(30)))


def test_one_expert_that_all_choose_is_a_dense_layer():
    """moe with a single expert of weight 1 and no shared one against the dense layer of the same numbers."""
    one = {"moe.n_routed_experts": 1, "moe.num_experts_per_tok": 1, "moe.n_shared_experts": 0}
    made = tiny.model(tiny.config(**one, **{"moe.moe_intermediate_size": 32, "moe.first_k_dense_replace": 0}))
    dense = Model(tiny.config()).eval()
    weights = dict(made.state_dict())
    for layer in range(3):
        at = f"layers.{layer}.mlp."
        weights[f"{at}gate_proj.weight"], weights[f"{at}up_proj.weight"] = weights.pop(f"{at}gate_up_proj")[0].chunk(2)
        weights[f"{at}down_proj.weight"] = weights.pop(f"{at}down_proj")[0]
        del weights[f"{at}gate.weight"], weights[f"{at}gate.bias"]
    dense.load_state_dict(weights)
    torch.testing.assert_close(tiny.logits(made, tiny.text(70)), tiny.logits(dense, tiny.text(70)), rtol=0, atol=1e-5)
