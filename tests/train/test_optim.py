"""Muon, which parameter learns by which rule, and the loss."""

from __future__ import annotations

import math

import pytest
import torch

from fourfold.model.sequence import IGNORE, Document, pack
from fourfold.train.muon import Muon, orthogonalize
from fourfold.train.optim import answer_weights, build_optimizers, set_lr, weighted_cross_entropy
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
                got[names[id(p)]] = (type(optimizer).__name__, group["peak_lr"], group["weight_decay"])
    assert set(got) == set(names.values())
    return got


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_every_parameter_has_the_rule_of_its_kind(kind):
    matrix = ("Muon" if kind == "muon" else "AdamW", 1e-2, 0.1)
    for name, rule in rules(kind).items():
        if ".indexer." in name:
            assert rule == ("AdamW", 3e-3, 0.1), name
        elif name == "engrams.1.embed.weight":
            assert rule == ("AdamW", 5e-2, 0.0), name
        elif name in ("embed_tokens.weight", "lm_head.weight") or "delimiters" in name:
            assert rule == ("AdamW", 1e-2, 0.1), name
        elif name.endswith(("norm.weight", "base", "scale", "bias")):
            assert rule == ("AdamW", 1e-2, 0.0), name
        elif not name.endswith(("q_weight", "k_weight", "conv.weight")):
            assert rule == matrix, name


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
    loss, plain = weighted_cross_entropy(logits, packed, packed.targets)
    wanted = packed.targets[packed.targets != IGNORE]
    each = [-float(logits[i].log_softmax(-1)[wanted[i]]) for i in range(5)]
    assert float(plain) == pytest.approx(sum(each) / 5, rel=1e-5)
    assert float(loss) == pytest.approx((each[0] + 0.5 * sum(each[1:])) / 3, rel=1e-5)
