"""Muon, which parameter learns by which rule, and the loss."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fourfold.config import ModelConfig
from fourfold.model.sequence import IGNORE, Document, pack
from fourfold.model.transformer import Model
from fourfold.train.muon import Muon, orthogonalize, update
from fourfold.train.optim import SkipStep, answer_weights, build_optimizers, rule, set_lr, weighted_cross_entropy
from fourfold.train.recipe import Optimizer
from tests.model import tiny

FULL = {
    "attention.q_lora_rank": 10,
    "indexer.mode": "sparse",
    "indexer.head_dim": 8,
    "moe.n_routed_experts": 4,
    "residual.kind": "mhc",
    "engram.layer_ids": [1],
    "engram.vocab_size": 101,
    "engram.short_conv": True,
    "mtp.num_layers": 1,
    "media": tiny.MEDIA,
}


# ---------------------------------------------------------------- Muon


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16), (3, 8, 24), (3, 24, 8), (2, 3, 5, 9), (1, 7), (7, 1)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_orthogonalize_sets_all_singular_values_near_one(shape, size):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * size
    got = orthogonalize(g)
    assert got.shape == g.shape and got.dtype == g.dtype
    values = torch.linalg.svdvals(got)
    assert values.min() > 0.9 and values.max() < 1.1
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    torch.testing.assert_close(got, u @ vh, rtol=0, atol=0.1)  # the nearest one, not just any


def test_orthogonalize_treats_a_stack_one_by_one():
    stack = torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(0))
    stack[2] *= 1e4
    got = orthogonalize(stack)
    for one, g in zip(got, stack, strict=True):
        torch.testing.assert_close(one, orthogonalize(g), rtol=0, atol=0.02)


def test_orthogonalize_of_zeros_is_zero():
    assert not orthogonalize(torch.zeros(3, 4)).any()


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (3, 6, 10)])
def test_muon_by_hand(shape):
    """M <- 0.95 M + G; the step is along 0.95 M + G, orthogonal, times 0.18 sqrt(max(rows, cols)), after decay."""
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(shape, generator=generator))
    optimizer = Muon([parameter], lr=0.1, weight_decay=0.5)
    wanted, momentum = parameter.detach().clone(), torch.zeros(shape)
    for _ in range(3):
        g = torch.randn(shape, generator=generator)
        parameter.grad = g.clone()
        optimizer.step()
        momentum = 0.95 * momentum + g
        wanted = wanted * (1 - 0.1 * 0.5) - 0.1 * 0.18 * math.sqrt(10) * orthogonalize(0.95 * momentum + g)
        torch.testing.assert_close(parameter.detach(), wanted)


def test_muon_leaves_what_has_no_gradient_alone():
    still = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([still], lr=0.1)
    optimizer.step()
    assert torch.equal(still.detach(), torch.ones(2, 2)) and not optimizer.state
    with pytest.raises(ValueError, match="closures"):
        optimizer.step(lambda: 0.0)


def test_muon_learns():
    torch.manual_seed(0)
    target, parameter = torch.randn(6, 4), torch.nn.Parameter(torch.zeros(6, 4))
    optimizer = Muon([parameter], lr=0.1, weight_decay=0.0)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (parameter - target).square().sum()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * target.square().sum()


@pytest.mark.parametrize("parts", [2, 3])
def test_muon_treats_the_heads_of_a_projection_one_by_one(parts):
    """As if each head's rows were a parameter of their own."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.nn.Parameter(torch.randn(12, 8, generator=generator))
    heads = [torch.nn.Parameter(part.clone()) for part in whole.detach().chunk(parts)]
    together, apart = Muon([{"params": [whole], "split": parts}], lr=0.1), Muon(heads, lr=0.1)
    for _ in range(3):
        whole.grad = torch.randn(12, 8, generator=generator)
        for head, grad in zip(heads, whole.grad.chunk(parts), strict=True):
            head.grad = grad.clone()
        together.step()
        apart.step()
        torch.testing.assert_close(whole.detach(), torch.cat([head.detach() for head in heads]), rtol=0, atol=2e-3)
    step = update(whole.grad, parts)
    for one in step.chunk(parts):  # the largest side of a head scales its step, not that of all of them
        values = torch.linalg.svdvals(one) / (0.18 * math.sqrt(max(one.shape)))
        assert values.min() > 0.9 and values.max() < 1.1


def test_muon_on_a_sharded_matrix(tmp_path, monkeypatch):
    """One process is a world too: the step of a DTensor is that of the tensor."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        g = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
        sharded = distribute_tensor(g, mesh, [Shard(0)])
        step = update(sharded, 3)
        assert isinstance(step, DTensor) and step.placements == sharded.placements
        torch.testing.assert_close(step.full_tensor(), update(g, 3), rtol=0, atol=0)
        stack = distribute_tensor(g.view(3, 4, 8), mesh, [Shard(0)])
        with monkeypatch.context() as patched:
            patched.setattr(DTensor, "full_tensor", None)  # whole matrices need no others
            step = update(stack, 1)
        torch.testing.assert_close(step.full_tensor(), update(g.view(3, 4, 8), 1), rtol=0, atol=0)
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------- who learns how


def rules(kind: str) -> dict[str, tuple[str, float, float]]:
    """Parameter name -> (optimizer, peak rate, weight decay)."""
    made = tiny.model(tiny.config(**FULL))
    cfg = Optimizer(kind=kind, lr=1e-2, weight_decay=0.1, engram_lr_scale=5.0, indexer_lr=3e-3)
    names = {id(p): name for name, p in made.named_parameters()}
    got = {}
    for optimizer in build_optimizers(made, cfg):
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert names[id(p)] not in got, "a parameter learns twice"
                got[names[id(p)]] = (type(optimizer).__name__, group["peak_lr"], group.get("weight_decay", 0.0))
    assert set(got) == set(names.values())
    return got


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_every_parameter_has_the_rule_of_its_kind(kind):
    matrix = ("Muon" if kind == "muon" else "AdamW", 1e-2, 0.1)
    for name, got in rules(kind).items():
        if ".indexer." in name:
            assert got == ("AdamW", 3e-3, 0.1), name
        elif name == "engrams.1.embed.weight":
            assert got == ("RowAdam", 5e-2, 0.0), name
        elif name in ("embed_tokens.weight", "lm_head.weight") or "delimiters" in name:
            assert got == ("AdamW", 1e-2, 0.1), name
        elif name.endswith(("norm.weight", "base", "scale", "bias")):
            assert got == ("AdamW", 1e-2, 0.0), name
        elif not name.endswith(("q_weight", "k_weight", "conv.weight")):
            assert got == matrix, name


@pytest.mark.parametrize("name", ["q_weight", "k_weight", "conv.weight"])
def test_norm_weights_and_taps_of_the_memory_are_no_matrices(name):
    """One norm weight or one row of taps per stream and channel: vectors, whatever their number of axes."""
    assert rules("muon")[f"engrams.1.{name}"] == ("AdamW", 1e-2, 0.0)


def test_rates_are_scaled_from_their_peaks():
    optimizers = build_optimizers(tiny.model(tiny.config(**FULL)), Optimizer(lr=1e-2))
    for scale in (0.5, 0.1, 1.0):
        set_lr(optimizers, scale)
        for optimizer in optimizers:
            assert all(g["lr"] == g["peak_lr"] * scale for g in optimizer.param_groups)


PRESETS = ("nano", "v4-lite", "v4", "v4-flash", "v4.1-flash", "v3.2", "v2-lite", "v1-7b")


@pytest.mark.parametrize("preset", PRESETS)
def test_the_rules_know_every_parameter(preset):
    """By name: each has one rule; no vector goes to Muon; what is split has rows for it."""
    cfg = ModelConfig.preset(preset)
    with torch.device("meta"):
        made = Model(cfg)
    for name, parameter in made.named_parameters():
        group, split = rule(name)
        assert group in ("matrices", "embeddings", "vectors", "tables", "indexers"), name
        if group == "matrices":
            assert parameter.dim() > 1, name
        if group == "vectors":
            assert parameter.dim() == 1 or name.endswith(("q_weight", "k_weight", "conv.weight", "position_bias")), name
        assert not split or parameter.shape[-2] % getattr(cfg.attention, split) == 0, name


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("layers.3.self_attn.q_b_proj.weight", ("matrices", "num_attention_heads")),
        ("mtp.block.self_attn.kv_b_proj.weight", ("matrices", "num_attention_heads")),
        ("drafter.blocks.0.self_attn.q_b_proj.weight", ("matrices", "num_attention_heads")),
        ("layers.3.self_attn.q_proj.weight", ("matrices", "num_attention_heads")),
        ("layers.3.self_attn.k_proj.weight", ("matrices", "num_key_value_heads")),
        ("layers.3.self_attn.v_proj.weight", ("matrices", "")),
        ("layers.3.self_attn.o_a_proj.weight", ("matrices", "o_groups")),
        ("layers.3.self_attn.o_proj.weight", ("matrices", "")),
        ("layers.3.self_attn.kv_a_proj_with_mqa.weight", ("matrices", "")),
        ("layers.3.mlp.gate_up_proj", ("matrices", "")),
        ("layers.3.mlp.gate.weight", ("matrices", "")),
        ("layers.3.attn_residual.fn", ("matrices", "")),
        ("layers.3.attn_residual.base", ("vectors", "")),
        ("mtp.collapse.scale", ("vectors", "")),
        ("layers.3.self_attn.sinks", ("vectors", "")),
        ("layers.3.self_attn.compressor.position_bias", ("vectors", "")),
        ("layers.3.self_attn.indexer.compressor.kv_proj.weight", ("indexers", "")),
        ("layers.3.self_attn.indexer.k_norm.bias", ("indexers", "")),
        ("engrams.1.embed.weight", ("tables", "")),
        ("engrams.1.value_proj.weight", ("matrices", "")),
        ("drafter.markov_head.weight", ("embeddings", "")),
        ("media.image_delimiters", ("embeddings", "")),
    ],
)
def test_rules_by_name(name, wanted):
    assert rule(name) == wanted


def test_a_parameter_without_a_rule_is_named():
    with pytest.raises(ValueError, match="layers.0.novelty: no rule"):
        rule("layers.0.novelty")


def test_muon_splits_what_the_rules_say():
    made = tiny.model(tiny.config(**FULL))
    (muon,) = (found for found in build_optimizers(made, Optimizer()) if isinstance(found, Muon))
    names = {id(p): name for name, p in made.named_parameters()}
    split = {names[id(p)] for group in muon.param_groups if group["split"] > 1 for p in group["params"]}
    assert {name.split("self_attn.")[-1] for name in split} == {"q_b_proj.weight", "kv_b_proj.weight"}
    assert {group["split"] for group in muon.param_groups} == {1, made.cfg.attention.num_attention_heads}


# ---------------------------------------------------------------- steps not taken


def seen(guard: SkipStep, n: int) -> None:
    """Losses of mean 2 and deviation 0.1, norms of mean 1 and deviation 0.2."""
    for i in range(n):
        assert guard.takes(i, 2 + 0.1 * (-1) ** i, 1 + 0.2 * (-1) ** i)


@pytest.mark.parametrize(
    ("loss", "norm", "taken"),
    [(2.59, 1.0, True), (2.61, 1.0, False), (2.0, 2.19, True), (2.0, 2.21, False), (0.0, 0.0, True)]
    + [(math.nan, 1.0, False), (2.0, math.inf, False)],
)
def test_a_step_far_above_the_mean_is_refused(loss, norm, taken):
    guard = SkipStep(6.0)
    seen(guard, 32)
    assert guard.takes(32, loss, norm) == taken and guard.skipped == (not taken)


def test_a_guard_needs_to_have_seen_some_steps_and_forgets_old_ones():
    guard = SkipStep(6.0)
    seen(guard, 31)
    assert guard.takes(31, 100.0, 100.0)
    seen(guard, 128)
    assert len(guard.recent) == 128 and not guard.takes(160, 100.0, 1.0)
    guard.forget()
    assert guard.takes(161, 100.0, 1.0)


def test_what_was_refused_is_no_part_of_the_mean():
    guard = SkipStep(6.0)
    seen(guard, 32)
    assert [guard.takes(i, 9.0, 1.0) for i in (32, 33)] == [False, False]
    assert max(loss for loss, _ in guard.recent) < 3


def test_three_in_a_row_stop():
    guard = SkipStep(6.0)
    for _ in range(2):  # one that is taken begins the count anew
        assert not guard.takes(7, math.nan, 1.0)
        assert not guard.takes(8, 2.0, math.inf)
        assert guard.takes(9, 2.0, 1.0)
    assert not guard.takes(10, math.nan, 1.0) and not guard.takes(11, math.nan, 1.0)
    with pytest.raises(RuntimeError, match="step 12: loss 2.5 and gradient norm inf"):
        guard.takes(12, 2.5, math.inf)


def test_a_loss_that_stands_still_has_no_outliers():
    guard = SkipStep(6.0)
    assert all(guard.takes(i, 1.0, 1.0) for i in range(40))
    assert guard.takes(40, 1.005, 1.0) and not guard.takes(41, 1.1, 1.0)


def test_a_guard_goes_on_where_it_was():
    guard, again = SkipStep(6.0), SkipStep(6.0)
    seen(guard, 40)
    assert not guard.takes(40, math.nan, 1.0)
    again.restore(json.loads(json.dumps(guard.state())))
    assert again.state() == guard.state() and again.skipped == 1


# ---------------------------------------------------------------- loss


def packed_answers():
    """Documents with 1, 4 and 0 targets."""
    documents = [tiny.text(5, seed=i) for i in range(3)]
    keep = [[3], [0, 1, 2, 3], []]
    out = []
    for d, kept in zip(documents, keep, strict=True):
        targets = torch.full((5,), IGNORE)
        targets[kept] = d.targets[kept]
        out.append(Document(d.tokens, d.modality, d.marks, targets))
    return pack(out)


def test_an_answer_weighs_the_root_of_its_length():
    packed = packed_answers()
    torch.testing.assert_close(answer_weights(packed, packed.targets), torch.tensor([1.0, 0.5, 0.5, 0.5, 0.5]))


def test_loss_by_loops():
    packed = packed_answers()
    logits = torch.randn(5, tiny.VOCAB, generator=torch.Generator().manual_seed(0))
    loss, nats = weighted_cross_entropy(logits, packed, packed.targets)
    wanted = packed.targets[packed.targets != IGNORE]
    each = [-float(logits[i].log_softmax(-1)[wanted[i]]) for i in range(5)]
    assert nats.tolist() == pytest.approx(each, rel=1e-5)
    assert float(loss) == pytest.approx((each[0] + 0.5 * sum(each[1:])) / 3, rel=1e-5)
    part, _ = weighted_cross_entropy(logits, packed, packed.targets, torch.tensor(12.0))
    assert float(part) == pytest.approx((each[0] + 0.5 * sum(each[1:])) / 12, rel=1e-5)
