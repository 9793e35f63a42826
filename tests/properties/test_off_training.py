"""Off is exactly the plain transformer in training too: the loss, every gradient, and the weights after some steps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.config import ModelConfig
from fourfold.model.sequence import Document, pack
from fourfold.model.transformer import Model
from tests.model import plain, tiny
from tests.properties.test_off import EVERYTHING, OFF, all_off, transplant

LENGTH = 33
ATTENTION = [{"attention.kind": "gqa"}, {}, {"attention.q_lora_rank": 10}]


def plain_loss(w: dict[str, Tensor], cfg: ModelConfig, tokens: Tensor, fused: bool) -> Tensor:
    """Mean cross-entropy of one sequence, by the blocks of the plain transformer."""
    attention = plain.mla if cfg.attention.kind == "mla" else plain.gqa
    x, positions = w["embed_tokens.weight"][tokens], torch.arange(len(tokens))
    for layer in range(cfg.num_hidden_layers):
        at = f"layers.{layer}."
        normed = plain.rms_norm(branch(x), w[f"{at}input_layernorm.weight"], cfg.rms_norm_eps)
        x = x + attention(w, f"{at}self_attn.", cfg, normed, positions, fused)
        normed = plain.rms_norm(branch(x), w[f"{at}post_attention_layernorm.weight"], cfg.rms_norm_eps)
        x = x + plain.swiglu(w, f"{at}mlp.", normed)
    hidden = plain.rms_norm(x[:-1], w["norm.weight"], cfg.rms_norm_eps)
    return F.cross_entropy(F.linear(hidden, w["lm_head.weight"]), tokens[1:])


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
    made = tiny.model(tiny.config(**all_off() | attention)).train()
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
