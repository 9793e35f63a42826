"""Router, experts and their balance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fourfold.model.moe import MLP, MoE, Router, choose_experts, score, sequence_balance_loss, update_bias
from fourfold.model.probe import Probe, expert_load
from fourfold.model.sequence import AUDIO, IMAGE, TEXT, VIDEO, Packed, pack
from tests.model import tiny

MOE = {"moe.n_routed_experts": 8, "moe.num_experts_per_tok": 3, "moe.moe_intermediate_size": 8}


def router(**overrides) -> Router:
    """Random weights, zero bias."""
    made = Router(tiny.config(**MOE | overrides), layer=0)
    torch.nn.init.normal_(made.weight, generator=torch.Generator().manual_seed(0))
    return made


def tokens(n: int = 50, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, 24, generator=torch.Generator().manual_seed(seed))


def batch(modality: torch.Tensor) -> Packed:
    """What a router reads of one: whose modality each position is."""
    zeros = torch.zeros_like(modality)
    return Packed(zeros, zeros, modality, zeros, zeros, torch.tensor([0, len(modality)]))


def text(n: int = 50) -> Packed:
    return batch(torch.full((n,), TEXT))


def as_weights(indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[T, E]: the weight of each expert, 0 where it is not chosen."""
    return torch.zeros(len(indices), 8).scatter(-1, indices, weights)


# ---------------------------------------------------------------- scores, choice, weights


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("sigmoid", lambda z: 1 / (1 + np.exp(-z))),
        ("sqrtsoftplus", lambda z: np.sqrt(np.log1p(np.exp(z)))),
        ("softmax", lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True)),
    ],
)
def test_scores(name, formula):
    logits = torch.randn(20, 8, dtype=torch.float64)
    np.testing.assert_allclose(score(logits, name), formula(logits.numpy()), rtol=1e-9)


@pytest.mark.parametrize("scoring", ["sigmoid", "sqrtsoftplus", "softmax"])
@pytest.mark.parametrize("norm", [True, False])
def test_router_by_loops(scoring, norm):
    """Choice by score plus bias; weights from the scores alone, normalised on request, times the scale."""
    gate = router(**{"moe.scoring_func": scoring, "moe.norm_topk_prob": norm, "moe.routed_scaling_factor": 2.5})
    gate.bias.copy_(torch.randn(8, generator=torch.Generator().manual_seed(3)) * 0.3)
    x = tokens()
    with torch.no_grad():
        indices, weights, scores = gate(x, text())
    for t in range(50):
        s = score(gate.weight @ x[t], scoring).detach()
        torch.testing.assert_close(scores[t], s)
        best = sorted(range(8), key=lambda e: -float(s[e] + gate.bias[e]))[:3]
        assert sorted(indices[t].tolist()) == sorted(best)
        total = sum(float(s[e]) for e in best) if norm else 1.0
        for slot, e in enumerate(indices[t].tolist()):
            assert float(weights[t, slot]) == pytest.approx(float(s[e]) / total * 2.5, rel=1e-5)


def test_bias_changes_the_choice_but_never_a_weight():
    gate, x = router(**{"moe.norm_topk_prob": False}), tokens()
    with torch.no_grad():
        before = as_weights(*gate(x, text())[:2])
        gate.bias[5] = 10.0
        indices, weights, scores = gate(x, text())
        after = as_weights(indices, weights)
    assert (indices == 5).any(-1).all() and not (before[:, 5] > 0).all()
    both = (before > 0) & (after > 0)
    assert torch.equal(before[both], after[both])
    assert torch.equal(after[:, 5], scores[:, 5])


def test_no_gradient_flows_into_the_choice():
    gate = router()
    gate(tokens(), text())[1].sum().backward()
    assert gate.weight.grad is not None and gate.bias.grad is None


@pytest.mark.parametrize(("groups", "kept"), [(4, 2), (2, 1), (8, 5), (4, 4)])
def test_groups_are_ranked_by_their_two_best_biased_experts(groups, kept):
    cfg = tiny.config(**MOE | {"moe.n_group": groups, "moe.topk_group": kept}).moe
    biased = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)) - 1  # negative ones too
    chosen = choose_experts(biased, cfg)
    size, differs = 8 // groups, False
    for t, row in enumerate(biased.tolist()):
        members = [range(g * size, (g + 1) * size) for g in range(groups)]
        worth = [sum(sorted((row[e] for e in m), reverse=True)[:2]) for m in members]
        best = sorted(range(groups), key=lambda g: -worth[g])[:kept]
        allowed = [e for g in best for e in members[g]]
        wanted = sorted(allowed, key=lambda e: -row[e])[:3]
        assert chosen[t].tolist() == wanted
        differs |= wanted != sorted(range(8), key=lambda e: -row[e])[:3]
    assert differs == (kept * size < 8 and size > 1)  # groups of one that hold all choices change nothing


def test_each_modality_has_a_bias_of_its_own():
    gate = router(media=tiny.MEDIA)
    gate.bias[0] = 10.0
    for modality, expert in ((IMAGE, 1), (VIDEO, 2), (AUDIO, 3)):
        gate.media_bias[modality - 1, expert] = 10.0
    modality = torch.tensor([TEXT, IMAGE, VIDEO, AUDIO]).repeat(10)
    indices, _, _ = gate(tokens(40), batch(modality))
    for t in range(40):
        assert set(indices[t].tolist()) & {0, 1, 2, 3} >= {int(modality[t])}
    text_only = router()
    text_only.bias[0] = 10.0
    assert torch.equal(gate(tokens(40), text(40))[0], text_only(tokens(40), text(40))[0])


# ---------------------------------------------------------------- the layer


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("n", [5, 60])
def test_layer_by_loops(shared, n):
    cfg = tiny.config(**MOE | {"moe.n_shared_experts": shared, "moe.first_k_dense_replace": 0})
    made = tiny.model(cfg)
    moe, x = made.layers[0].mlp, tokens(n)
    with torch.no_grad():
        got = moe(x, made.context(pack([tiny.text(n)]), None, None))
        indices, weights, _ = moe.gate(x, text(n))
        for t in range(n):
            wanted = torch.zeros(24)
            for slot, e in enumerate(indices[t].tolist()):
                gate, up = (moe.gate_up_proj[e] @ x[t]).chunk(2)
                wanted += weights[t, slot] * (moe.down_proj[e] @ (F.silu(gate) * up))
            if shared:
                s = moe.shared_experts
                assert s.gate_proj.weight.shape == (8 * shared, 24)
                wanted += s.down_proj.weight @ (F.silu(s.gate_proj.weight @ x[t]) * (s.up_proj.weight @ x[t]))
            torch.testing.assert_close(got[t], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dense", [0, 1, 2, 9])
def test_which_layers_are_routed(dense):
    made = tiny.model(tiny.config(**MOE | {"moe.first_k_dense_replace": dense}))
    assert [type(b.mlp) for b in made.layers] == [MLP if i < dense else MoE for i in range(3)]


def test_probe_names_the_layer_of_each_choice():
    made, probe = tiny.model(tiny.config(**MOE | {"moe.first_k_dense_replace": 1})), Probe()
    made(pack([tiny.text(7)]), probe=probe)
    assert sorted(probe.experts) == [1, 2]
    assert all(chosen.shape == (7, 3) for chosen in probe.experts.values())


def test_loads_count_choices_by_modality_and_layer():
    cfg = tiny.config(**MOE, media=tiny.MEDIA)
    made, document, probe = tiny.model(cfg).train(), tiny.document(cfg, 40, seed=0), Probe()
    loads = made(pack([document]), probe=probe).loads
    assert sorted(loads) == ["layers.1.mlp", "layers.2.mlp"]
    for load, chosen in zip(loads.values(), probe.experts.values(), strict=True):
        assert load.shape == (4, 8)
        for kind in range(4):
            assert torch.equal(load[kind], expert_load(chosen[document.modality == kind], 8))
    assert made.eval()(pack([document])).loads is None


# ---------------------------------------------------------------- balance


def test_update_bias_moves_towards_the_mean():
    gate = router(media=tiny.MEDIA)
    load = torch.zeros(4, 8, dtype=torch.int64)
    load[TEXT] = torch.tensor([9, 1, 5, 5, 5, 5, 5, 5])
    load[AUDIO] = torch.tensor([8, 0, 0, 0, 0, 0, 0, 0])
    update_bias(gate, load, 0.01)
    torch.testing.assert_close(gate.bias, torch.tensor([-0.01, 0.01] + [0.0] * 6))
    torch.testing.assert_close(gate.media_bias[AUDIO - 1], torch.tensor([-0.01] + [0.01] * 7))
    assert not gate.media_bias[IMAGE - 1].any() and not gate.media_bias[VIDEO - 1].any()  # did not occur


def test_repeated_updates_balance_a_skewed_router():
    gate, x = router(), tokens(400)
    with torch.no_grad():
        gate.weight.mul_(0.2)
        gate.weight[:4] += 0.05  # some experts are liked by far too many
    x = x + 0.5

    def violation() -> float:
        load = expert_load(gate(x, text(400))[0], 8).float()
        return float(load.max() / load.mean() - 1)

    before = violation()
    for _ in range(300):
        load = torch.zeros(4, 8, dtype=torch.int64)
        load[TEXT] = expert_load(gate(x, text(400))[0], 8)
        update_bias(gate, load, 0.01)
    assert before > 0.5 and violation() < 0.15


@pytest.mark.parametrize("scoring", ["sigmoid", "sqrtsoftplus", "softmax"])
def test_sequence_balance_loss_by_loops(scoring):
    lengths, experts, per_token = [7, 1, 20], 8, 3
    scores = score(torch.randn(28, experts, dtype=torch.float64), scoring)
    indices = scores.topk(per_token).indices
    got = sequence_balance_loss(scores, indices, torch.repeat_interleave(torch.tensor(lengths)), 3)
    total, start = 0.0, 0
    for n in lengths:
        loss = 0.0
        for e in range(experts):
            chosen = sum(e in indices[start + t].tolist() for t in range(n))
            p = sum(float(scores[start + t, e] / scores[start + t].sum()) for t in range(n)) / n
            loss += experts / (per_token * n) * chosen * p
        total, start = total + loss * n, start + n
    assert float(got) == pytest.approx(total / 28)


def test_sequence_balance_loss_is_one_when_even_and_falls_when_scores_spread():
    scores = torch.full((8, 8), 0.3, requires_grad=True)
    even = torch.arange(8)[:, None]
    ids = torch.zeros(8, dtype=torch.int64)
    assert float(sequence_balance_loss(scores, even, ids, 1).detach()) == pytest.approx(1)
    sequence_balance_loss(scores, torch.zeros(8, 1, dtype=torch.int64), ids, 1).backward()
    assert (scores.grad[:, 0] > 0).all() and (scores.grad[:, 1:] < 0).all()  # descent pushes expert 0 down


def test_balance_loss_only_on_request_and_only_in_training():
    made = tiny.model(tiny.config(**MOE)).train()
    packed = pack([tiny.text(9)])
    assert made(packed).balance_loss is None
    assert made(packed, balance=True).balance_loss.isfinite()
    assert made.eval()(packed, balance=True).balance_loss is None
