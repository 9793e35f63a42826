"""Off is exactly the plain transformer in training too: the loss, every gradient, and the weights after some steps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.config import ModelConfig
from fourfold.model.sequence import Document, pack
from fourfold.model.transformer import Model
from fourfold.train.loop import train_step
from fourfold.train.optim import build_optimizers
from fourfold.train.parallel import Parallel, parallelize
from fourfold.train.recipe import Optimizer, Phase, Recipe
from tests.model import plain, tiny, v41
from tests.properties.test_off import ATTENTION, EVERYTHING, OFF, V41_OFF, all_off, transplant

LENGTH = 33


def plain_loss(w: dict[str, Tensor], cfg: ModelConfig, tokens: Tensor, fused: bool, reduction: str = "mean") -> Tensor:
    """Cross-entropy of one sequence, by the blocks of the plain transformer."""
    attention = plain.mla if cfg.attention.kind == "mla" else plain.gqa
    x, positions = w["embed_tokens.weight"][tokens], torch.arange(len(tokens))
    for layer in range(cfg.num_hidden_layers):
        at = f"layers.{layer}."
        normed = plain.rms_norm(branch(x), w[f"{at}input_layernorm.weight"], cfg.rms_norm_eps)
        x = x + attention(w, f"{at}self_attn.", cfg, normed, positions, fused)
        normed = plain.rms_norm(branch(x), w[f"{at}post_attention_layernorm.weight"], cfg.rms_norm_eps)
        x = x + plain.swiglu(w, f"{at}mlp.", normed)
    hidden = plain.rms_norm(x[:-1], w["norm.weight"], cfg.rms_norm_eps)
    return F.cross_entropy(F.linear(hidden, w["lm_head.weight"]), tokens[1:], reduction=reduction)


def branch(x: Tensor) -> Tensor:
    """x itself, but what flows back through the branch is added up before it joins the residual's: sums of floats
    have an order."""
    return x.view_as(x)


def our_loss(model: Model, tokens: Tensor) -> Tensor:
    packed = pack([Document.text(tokens.tolist())])
    output = model(packed, logits="target", mtp=False)
    return F.cross_entropy(output.logits, packed.targets[packed.targets >= 0])


def gradients(model: Model, tokens: Tensor) -> dict[str, Tensor]:
    """The loss under "loss", and each parameter's gradient (none: zero) under its name."""
    model.train().zero_grad()
    loss = our_loss(model, tokens)
    loss.backward()
    got = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return got | {"loss": loss.detach()}


def assert_same_bits(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    different = [name for name, tensor in wanted.items() if not torch.equal(got[name], tensor)]
    assert not different


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("attention", ATTENTION, ids=str)
def test_with_everything_off_training_is_plain_to_the_bit(attention, backend, monkeypatch):
    monkeypatch.setenv("FOURFOLD_BACKEND", backend)
    made = tiny.model(tiny.config(**EVERYTHING | all_off() | attention)).train()
    weights = {name: p.detach().clone().requires_grad_() for name, p in made.named_parameters()}
    ours, theirs = (torch.optim.AdamW(p, lr=1e-3) for p in (made.parameters(), weights.values()))
    for step in range(4):
        tokens = tiny.text(LENGTH, seed=step).tokens
        got = gradients(made, tokens)
        theirs.zero_grad()
        loss = plain_loss(weights, made.cfg, tokens, fused=backend == "cpu")
        loss.backward()
        assert_same_bits(got, {name: w.grad for name, w in weights.items()} | {"loss": loss.detach()})
        ours.step()
        theirs.step()
    assert_same_bits(dict(made.named_parameters()), weights)


@pytest.mark.parametrize("attention", ATTENTION, ids=str)
def test_the_training_engine_adds_nothing_to_a_plain_step(attention, monkeypatch):
    """One process, no recomputation, no term beside the cross-entropy: its step is AdamW's on the plain gradients."""
    monkeypatch.setenv("FOURFOLD_BACKEND", "cpu")
    made = tiny.model(tiny.config(**EVERYTHING | all_off() | attention))
    weights = {name: p.detach().clone().requires_grad_() for name, p in made.named_parameters()}
    settings = Optimizer(kind="adamw", lr=1e-2, clip=1e9)
    recipe = Recipe(out="", phases=(Phase(3),), weights={"prose": 1.0}, bf16=False, optimizer=settings)
    parallelize(made, Parallel(0, 1, torch.device("cpu")), recompute=False)
    ours = build_optimizers(made, settings)
    vectors = [w for name, w in weights.items() if name.endswith("norm.weight")]
    others = [w for name, w in weights.items() if not name.endswith("norm.weight")]
    groups = [{"params": others}, {"params": vectors, "weight_decay": 0.0}]
    decay, betas = settings.weight_decay, settings.betas
    theirs = torch.optim.AdamW(groups, lr=1e-2, betas=betas, eps=1e-10, weight_decay=decay, fused=True)
    for step in range(3):
        tokens = tiny.text(LENGTH, seed=step).tokens
        values = train_step(made, ours, pack([Document.text(tokens.tolist())]), recipe, recipe.phases[0], step=step)
        theirs.zero_grad()
        each = plain_loss(weights, made.cfg, tokens, fused=True, reduction="none")
        share = torch.full_like(each, len(each)).rsqrt()
        ((each * share).sum() / share.sum()).backward()
        theirs.step()
        assert values["loss"] == float(each.detach().sum()) / len(each)
        assert_same_bits(dict(made.named_parameters()), weights)


@pytest.mark.parametrize("innovation", ["indexer", "mtp", "media"])
def test_what_is_not_used_changes_no_gradient(innovation):
    """Text of a model that has it, unused, teaches what is left without it exactly the same."""
    used = EVERYTHING | {"indexer.mode": "dense"}
    made = tiny.model(tiny.config(**used))
    off = transplant(made, OFF[innovation][0])
    tokens = tiny.text(LENGTH).tokens
    got = gradients(made, tokens)
    assert_same_bits(got, gradients(off, tokens))
    traces = OFF[innovation][1]
    assert not any(got[name].any() for name in got if any(trace in name for trace in traces))


@pytest.mark.parametrize("innovation", V41_OFF)
def test_what_is_not_used_changes_no_gradient_of_a_v41(innovation):
    """Its drafter and its tower, beside the attention that they need."""
    made = tiny.model(v41.config())
    tokens = tiny.text(LENGTH).tokens
    got, wanted = gradients(made, tokens), gradients(transplant(made, V41_OFF[innovation]), tokens)
    assert_same_bits(got, wanted)
    left = set(got) - set(wanted)
    assert left and not any(got[name].any() for name in left)


def test_a_memory_of_zeros_changes_no_gradient():
    made = tiny.model(tiny.config(**EVERYTHING | {"indexer.mode": "dense"}))
    with torch.no_grad():
        for engram in made.engrams.values():
            engram.value_proj.weight.zero_()
    tokens = tiny.text(LENGTH).tokens
    assert_same_bits(gradients(made, tokens), gradients(transplant(made, OFF["engram"][0]), tokens))


def test_a_term_that_is_not_asked_for_changes_no_gradient():
    """The balance loss and the guess ahead are computed beside the loss, never in it."""
    made = tiny.model(tiny.config(**EVERYTHING | {"indexer.mode": "dense"})).train()
    tokens = tiny.text(LENGTH).tokens
    wanted = gradients(made, tokens)
    made.zero_grad()
    packed = pack([tiny.text(LENGTH)])
    output = made(packed, logits="target", mtp=True, balance=True)
    F.cross_entropy(output.logits, packed.targets[packed.targets >= 0]).backward()
    assert output.mtp_logits is not None and output.balance_loss is not None
    got = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in made.named_parameters()}
    del wanted["loss"]
    assert_same_bits(got, wanted)
