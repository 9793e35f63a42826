"""The model as a whole: what it returns, refuses, starts from; and the scale of its attention."""

from __future__ import annotations

import pytest
import torch

from fourfold import ops
from fourfold.config import ModelConfig
from fourfold.model import mla as mla_module
from fourfold.model.cache import Cache, PagePool, SequenceState
from fourfold.model.context import Selection, Window
from fourfold.model.sequence import IGNORE, Document, pack
from fourfold.model.transformer import Model
from tests.model import tiny

ALL = {
    "attention.q_lora_rank": 10,
    "indexer.mode": "sparse",
    "indexer.head_dim": 8,
    "indexer.topk": 4,
    "moe.n_routed_experts": 8,
    "residual.kind": "mhc",
    "engram.layer_ids": [1],
    "engram.vocab_size": 101,
    "engram.short_conv": True,
    "mtp.num_layers": 1,
    "media": tiny.MEDIA,
}


# ---------------------------------------------------------------- what comes out


@torch.no_grad()
def test_logits_of_all_last_and_target_positions():
    cfg = tiny.config(media=tiny.MEDIA)
    made, packed = tiny.model(cfg), pack([tiny.document(cfg, n, n) for n in (20, 1, 7)])
    whole = made(packed).logits
    assert whole.shape == (28, tiny.VOCAB) and whole.dtype == torch.float32
    torch.testing.assert_close(made(packed, logits="last").logits, whole[[19, 20, 27]])
    torch.testing.assert_close(made(packed, logits="target").logits, whole[packed.targets != IGNORE])


@torch.no_grad()
@pytest.mark.parametrize("overrides", [{}, {"attention.kind": "gqa"}, ALL | {"engram.short_conv": False}])
def test_one_token_and_none(overrides):
    made = tiny.model(tiny.config(**overrides))
    assert tiny.logits(made, tiny.text(1)).shape == (1, tiny.VOCAB)
    assert tiny.logits(made, tiny.text(0)).shape == (0, tiny.VOCAB)
    between = tiny.logits(made, tiny.text(3), tiny.text(0), tiny.text(2))
    torch.testing.assert_close(between[:3], tiny.logits(made, tiny.text(3)), rtol=0, atol=1e-5)


def test_a_sequence_past_the_context_is_refused():
    made = tiny.model(tiny.config(max_position_embeddings=8))
    tiny.logits(made, tiny.text(8), tiny.text(8))
    with pytest.raises(ValueError, match="positions: 9 exceed max_position_embeddings \\(8\\)"):
        tiny.logits(made, tiny.text(9))
    with pytest.raises(ValueError, match="max_position_embeddings"):
        pool, state = PagePool(made.cfg, 4, 4), SequenceState()
        made(pack([tiny.text(8)]), cache=Cache(pool, [state]))
        made(pack([tiny.text(1)], starts=[8]), cache=Cache(pool, [state]))


def test_packing_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="at least one document"):
        pack([])
    for lengths in ([3, 3], [4, 5, 3], [5]):
        with pytest.raises(ValueError, match="rows of 4 positions"):
            pack([tiny.text(n) for n in lengths], row=4)
    assert pack([tiny.text(n) for n in (1, 3, 4)], row=4).row == 4


def test_a_batch_moves_as_a_whole():
    cfg = tiny.config(media=tiny.MEDIA)
    packed = pack([tiny.document(cfg, 60, 0)]).to("meta")
    tensors = [packed.tokens, packed.positions, packed.cu_seqlens, packed.patches["image"].values]
    assert all(t.device.type == "meta" for t in tensors)


def test_targets_of_text_are_the_next_tokens():
    document = Document.text([5, 6, 7])
    assert document.targets.tolist() == [6, 7, IGNORE]
    assert len(Document.text([])) == 0


# ---------------------------------------------------------------- what it starts from


def test_initial_weights():
    """Normal of the configured width, narrower into the residual; norms one, biases and the convolution zero."""
    cfg = tiny.config(**ALL, hidden_size=64, initializer_range=0.05)
    torch.manual_seed(0)
    for name, p in Model(cfg).named_parameters():
        if name.endswith(("norm.weight", "q_weight", "k_weight")):
            assert (p == 1).all(), name
        elif name.endswith(("bias", "conv.weight")):
            assert not p.any(), name
        elif not name.endswith(("base", "scale")) and p.numel() > 500:
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
            wanted = 0.05 / (2 * 3) ** 0.5 if into_residual else 0.05
            wanted = 0.05 if name.endswith("fn") else wanted
            assert p.std().item() == pytest.approx(wanted, rel=0.15), name
            assert abs(p.mean().item()) < wanted / 5, name


def test_a_meta_model_has_shapes_alone():
    with torch.device("meta"):
        made = Model(tiny.config(**ALL))
    assert all(p.device.type == "meta" for p in made.parameters())
    real = tiny.model(tiny.config(**ALL))
    assert {k: v.shape for k, v in made.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}


def test_every_parameter_learns():
    """Nothing is left out of the graph: trunk, memory, experts, streams, embedders, guesses and indexers."""
    cfg = tiny.config(**ALL)
    made = tiny.model(cfg).train()
    packed = pack([tiny.document(cfg, 60, seed) for seed in (0, 1, 2)])
    output = made(packed, mtp=True, balance=True)
    loss = output.logits.square().mean() + output.mtp_logits.square().mean() + output.index_loss + output.balance_loss
    loss.backward()
    for name, p in made.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


# ---------------------------------------------------------------- attention


def attention(**overrides):
    with torch.device("meta"):
        return Model(tiny.config(**overrides)).layers[0].self_attn


V3 = {"attention.qk_nope_head_dim": 128, "attention.qk_rope_head_dim": 64, "rope.factor": 40.0}


@pytest.mark.parametrize(
    ("mscale", "scale"), [(1.0, 0.13523378), (0.707, 0.11472139), (0.0, 192**-0.5)], ids=["v3", "v2-lite", "none"]
)
def test_softmax_scale_of_mla(mscale, scale):
    assert attention(**V3, **{"rope.mscale_all_dim": mscale}).scale == pytest.approx(scale, abs=1e-8)


def test_softmax_scale_without_extension():
    assert attention(**{"rope.mscale_all_dim": 1.0}).scale == 10**-0.5
    gqa = {"attention.kind": "gqa", "attention.head_dim": 64, "rope.mscale_all_dim": 1.0}
    assert attention(**gqa).scale == 0.125
    assert attention(**gqa, **{"rope.factor": 40.0}).scale == pytest.approx(0.125 * 1.8738542, abs=1e-8)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["off", "sparse"])
@pytest.mark.parametrize("seed", range(4))
def test_naive_and_absorbed_are_one_function(mode, seed):
    """Called directly, over random entries and, when sparse, over a random selection."""
    torch.manual_seed(seed)
    cfg = tiny.config(**{"indexer.mode": mode, "indexer.topk": 4, "rope.factor": 8.0, "rope.mscale_all_dim": 1.0})
    made = tiny.model(cfg, seed)
    layer, a, (b, queries, keys) = made.layers[1].self_attn, cfg.attention, (3, 5, 11)
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand(b, -1, -1)
    window = Window(torch.arange(b * queries).view(b, queries), torch.full((b,), keys - queries))
    assert torch.equal(window.visible, visible)
    ctx = made.context(pack([tiny.text(queries)] * b), None, None)
    if mode == "sparse":
        scores = torch.randn(b, queries, keys)
        ctx.selection = Selection([scores], [ops.select_topk(scores, visible, 4)])
    q_nope = torch.randn(b, queries, a.num_attention_heads, a.qk_nope_head_dim)
    q_rope = torch.randn(b, queries, a.num_attention_heads, a.qk_rope_head_dim)
    entries = torch.randn(b, keys, a.kv_lora_rank + a.qk_rope_head_dim)
    naive = layer.naive(q_nope, q_rope, entries, window, 0, ctx)
    pages = torch.arange(b)[:, None]  # a sequence is one page
    absorbed = layer.absorbed(q_nope, q_rope, entries, pages, window, 0, ctx)
    assert naive.shape == (b, queries, a.num_attention_heads, a.v_head_dim)
    torch.testing.assert_close(absorbed, naive, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0, 1000])
def test_decode_is_the_same_in_either_form(threshold, monkeypatch):
    made = tiny.model(tiny.config(**ALL | {"engram.short_conv": False}))
    documents = [tiny.text(20, seed=1), tiny.text(13, seed=2)]
    wanted = [tiny.logits(made, d) for d in documents]
    monkeypatch.setattr(mla_module, "ABSORB_BELOW", threshold)
    for got, want in zip(tiny.decode(made, documents, [[9, *[1] * 11], [13]]), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_config_is_what_the_model_was_made_of():
    cfg = tiny.config(**ALL)
    assert isinstance(cfg, ModelConfig) and Model(cfg).cfg == cfg


def test_overrides_leave_the_given_table_alone():
    table = {"image": {"patch_size": 2}, "audio": {}}
    cfg = tiny.config(**{"media": table, "media.image": None})
    assert cfg.media.modalities == ("audio",) and table == {"image": {"patch_size": 2}, "audio": {}}
