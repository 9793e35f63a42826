"""The reference ops against loops, numpy and published numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fourfold.config import RopeConfig
from fourfold.ops import reference


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize(
    ("rope", "low", "high"),
    [
        (RopeConfig(theta=1e4, factor=40, original_max_position_embeddings=4096), 10, 23),
        (RopeConfig(theta=160000, factor=16, original_max_position_embeddings=65536), 15, 25),
    ],
    ids=["v3", "v4"],
)
def test_yarn_ramp(rope, low, high):
    """Fast pairs keep their frequency, slow ones turn ``factor`` times slower, linearly mixed between."""
    got = reference.rope_frequencies(64, rope)
    for pair in range(32):
        plain = rope.theta ** (-2 * pair / 64)
        ramp = min(max((pair - low) / (high - low), 0), 1)
        assert got[pair].item() == pytest.approx(plain * (1 - ramp) + plain / rope.factor * ramp, rel=1e-5), pair
    assert got.dtype == torch.float32


def test_yarn_ramp_of_no_width_is_a_step():
    rope = RopeConfig(theta=1e4, factor=8, original_max_position_embeddings=4096, beta_fast=1.0, beta_slow=1.0)
    got = reference.rope_frequencies(4, rope) / reference.rope_frequencies(4, RopeConfig())
    assert set(got.tolist()) <= {1.0, 0.125}


def test_without_yarn_frequencies_are_plain():
    got = reference.rope_frequencies(8, RopeConfig(theta=100.0))
    np.testing.assert_allclose(got, [100 ** (-i / 4) for i in range(4)], rtol=1e-6)


def test_yarn_mscale_numbers():
    assert reference.yarn_mscale(40, 1.0) == pytest.approx(1.3688879, abs=1e-7)
    assert reference.yarn_mscale(40, 1.0) ** 2 == pytest.approx(1.8738542, abs=1e-7)
    assert reference.yarn_mscale(40, 0.707) == pytest.approx(1.2608038, abs=1e-7)
    assert reference.yarn_mscale(1, 1.0) == reference.yarn_mscale(40, 0.0) == 1.0


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_is_a_complex_product(interleaved):
    positions = torch.tensor([0, 1, 5, 1000])
    frequencies = reference.rope_frequencies(6, RopeConfig())
    x = draw(4, 2, 6).float()
    got = reference.apply_rope(x, *reference.rope_tables(positions, frequencies), interleaved=interleaved)
    for token, position in enumerate(positions.tolist()):
        for head in range(2):
            for pair in range(3):
                first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 3)
                z = complex(x[token, head, first], x[token, head, second])
                angle = position * 1e4 ** (-2 * pair / 6)
                z *= complex(math.cos(angle), math.sin(angle))
                turned = complex(got[token, head, first], got[token, head, second])
                assert abs(turned - z) < 1e-4, (token, head, pair)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_products_depend_on_distance_alone(interleaved):
    frequencies = reference.rope_frequencies(8, RopeConfig())
    q, k = draw(1, 8, seed=1).float(), draw(1, 8, seed=2).float()

    def product(at: int, distance: int) -> float:
        turned = [
            reference.apply_rope(v, *reference.rope_tables(torch.tensor([p]), frequencies), interleaved=interleaved)
            for v, p in ((q, at + distance), (k, at))
        ]
        return float((turned[0] * turned[1]).sum())

    assert product(0, 7) == pytest.approx(product(300, 7), abs=1e-4)
    assert abs(product(0, 7) - product(0, 8)) > 1e-3


def test_rope_keeps_the_dtype():
    tables = reference.rope_tables(torch.arange(3), reference.rope_frequencies(4, RopeConfig()))
    assert reference.apply_rope(torch.ones(3, 4, dtype=torch.bfloat16), *tables).dtype == torch.bfloat16


# ---------------------------------------------------------------- norms


def test_rms_norm_by_numpy():
    x, w = draw(3, 7), draw(7, seed=1)
    wanted = x.numpy() / np.sqrt((x.numpy() ** 2).mean(-1, keepdims=True) + 1e-6) * w.numpy()
    np.testing.assert_allclose(reference.rms_norm(x, w, 1e-6), wanted, rtol=1e-12)


def test_rms_norm_of_halves_takes_its_statistics_in_float32():
    x = torch.full((2, 64), 300.0, dtype=torch.float16)  # 300^2 is more than float16 holds
    got = reference.rms_norm(x, torch.ones(64), 1e-6)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got, torch.ones_like(x))


def test_rms_norm_of_zeros_is_zero():
    assert not reference.rms_norm(torch.zeros(2, 3), None, 1e-6).any()


# ---------------------------------------------------------------- streams


def test_sinkhorn_step_by_step():
    """Softmax over rows plus eps, columns, then rows and columns by turns: 20 column passes in all."""
    logits, eps = draw(4, 4).numpy() * 2, 1e-6
    c = np.stack([softmax(row) for row in logits]) + eps
    c = c / (c.sum(0, keepdims=True) + eps)
    for _ in range(19):
        c = c / (c.sum(1, keepdims=True) + eps)
        c = c / (c.sum(0, keepdims=True) + eps)
    np.testing.assert_allclose(reference.sinkhorn(torch.from_numpy(logits), 20, eps), c, rtol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 4, 7])
def test_sinkhorn_is_doubly_stochastic(n):
    got = reference.sinkhorn(draw(50, n, n).float(), 20, 1e-6)
    assert (got > 0).all()
    assert (got.sum(-1) - 1).abs().max() < 1e-3 and (got.sum(-2) - 1).abs().max() < 1e-3


def test_hyper_maps_of_mhc_step_by_step():
    """Spec 2.2 token by token: order pre, post, comb; norm after the product; eps on pre; twice on post."""
    n, d, eps, norm_eps = 3, 5, 1e-6, 1e-5
    x, fn, base, scale = draw(2, n, d), draw(n * (n + 2), n * d, seed=1), draw(n * (n + 2), seed=2), draw(3, seed=3)
    pre, post, comb = reference.hyper_maps(x, fn, base, scale, True, 20, eps, norm_eps)
    for t in range(2):
        f = x[t].numpy().reshape(-1)
        mix = fn.numpy() @ f / np.sqrt((f**2).mean() + norm_eps)
        h = [mix[:n] * scale[0].item(), mix[n : 2 * n] * scale[1].item(), mix[2 * n :] * scale[2].item()]
        h = np.concatenate(h) + base.numpy()
        np.testing.assert_allclose(pre[t], 1 / (1 + np.exp(-h[:n])) + eps, rtol=1e-10)
        np.testing.assert_allclose(post[t], 2 / (1 + np.exp(-h[n : 2 * n])), rtol=1e-10)
        wanted = reference.sinkhorn(torch.from_numpy(h[2 * n :].reshape(n, n)), 20, eps)
        np.testing.assert_allclose(comb[t], wanted, rtol=1e-10)


def test_hyper_maps_of_hc_are_static_maps_plus_a_bounded_change():
    n, d = 3, 5
    x, fn, base = draw(20, n, d) * 100, draw(n * (n + 2), n * d, seed=1) * 100, draw(n * (n + 2), seed=2)
    scale = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    maps = reference.hyper_maps(x, fn, base, scale, False, 20, 1e-6, 1e-6)
    flat = torch.cat([m.flatten(1) for m in maps], dim=-1)
    reach = torch.cat([scale[0].expand(n), scale[1].expand(n), scale[2].expand(n * n)])
    assert ((flat - base).abs() <= reach + 1e-12).all() and (flat != base).any()


def test_streams_are_read_and_mixed_by_loops():
    """comb is applied transposed: stream j goes to stream k with weight comb[j, k]."""
    tokens, n, d = 2, 3, 4
    x, y, pre, post = draw(tokens, n, d), draw(tokens, d, seed=1), draw(tokens, n, seed=2), draw(tokens, n, seed=3)
    comb = draw(tokens, n, n, seed=4)
    read, mixed = reference.read_streams(x, pre), reference.mix_streams(x, y, post, comb)
    for t in range(tokens):
        np.testing.assert_allclose(read[t], sum(pre[t, i] * x[t, i] for i in range(n)))
        for k in range(n):
            wanted = post[t, k] * y[t] + sum(comb[t, j, k] * x[t, j] for j in range(n))
            np.testing.assert_allclose(mixed[t, k], wanted)


def test_asymmetric_comb_moves_streams_one_way():
    comb = torch.zeros(1, 3, 3)
    comb[0, 0, 1] = comb[0, 1, 2] = comb[0, 2, 0] = 1  # 0 -> 1 -> 2 -> 0
    x = torch.arange(3.0)[None, :, None]
    assert reference.mix_streams(x, torch.zeros(1, 1), torch.zeros(1, 3), comb).flatten().tolist() == [2, 0, 1]


# ---------------------------------------------------------------- attention


def test_attention_by_loops():
    """Grouped heads: query head h reads key head h // group; an invisible key has no weight."""
    q, k, v = draw(2, 3, 4, 5), draw(2, 6, 2, 5, seed=1), draw(2, 6, 2, 3, seed=2)
    visible = torch.rand(2, 3, 6, generator=torch.Generator().manual_seed(3)) < 0.5
    visible[..., 2] = True
    probs, out = reference.attention_probs(q, k, visible, 0.3), reference.attention(q, k, v, visible, 0.3)
    for b in range(2):
        for t in range(3):
            for h in range(4):
                seen = visible[b, t].numpy()
                scores = k[b, :, h // 2].numpy() @ q[b, t, h].numpy() * 0.3
                weights = np.zeros(6)
                weights[seen] = softmax(scores[seen])
                np.testing.assert_allclose(probs[b, h, t], weights, rtol=1e-10)
                np.testing.assert_allclose(out[b, t, h], weights @ v[b, :, h // 2].numpy(), rtol=1e-10)


def test_attention_probs_of_halves_are_float32():
    q = torch.randn(1, 2, 1, 4, dtype=torch.bfloat16)
    assert reference.attention_probs(q, q, torch.ones(1, 2, 2, dtype=torch.bool), 1.0).dtype == torch.float32


def test_latent_attention_reads_the_chosen_entries_alone():
    heads, nope, rope, v, latent, size = 4, 3, 2, 6, 5, 4
    q, q_rope, expansions = draw(2, heads, nope), draw(2, heads, rope, seed=1), draw(heads, nope + v, latent, seed=2)
    entries, pages = draw(7, size, latent + rope, seed=3), torch.tensor([[4, 1, 6], [2, 0, 5]])
    chosen = torch.rand(2, 11, generator=torch.Generator().manual_seed(4)) < 0.5
    chosen[:, 4] = True
    valid, indices = chosen.int().topk(8, dim=-1)  # a row with fewer than eight is filled up with invalid ones
    whole = reference.latent_attention(q, q_rope, expansions, entries, pages, chosen, 0.4)
    got = reference.latent_attention(q, q_rope, expansions, entries, pages, valid.bool(), 0.4, indices)
    for b in range(2):
        rows = entries[pages[b]].flatten(0, 1)[:11][chosen[b]].numpy()
        for h in range(heads):
            keys = np.concatenate([rows[:, :latent] @ expansions[h, :nope].numpy().T, rows[:, latent:]], axis=1)
            weights = softmax(keys @ np.concatenate([q[b, h], q_rope[b, h]]) * 0.4)
            wanted = weights @ rows[:, :latent] @ expansions[h, nope:].numpy().T
            np.testing.assert_allclose(got[b, h], wanted, rtol=1e-10)
            np.testing.assert_allclose(whole[b, h], wanted, rtol=1e-10)


# ---------------------------------------------------------------- selection


def test_index_scores_by_loops():
    q, k, w = draw(2, 3, 4, 5), draw(2, 6, 5, seed=1), draw(2, 3, 4, seed=2)
    got = reference.index_scores(q, k, w)
    for b in range(2):
        for t in range(3):
            for s in range(6):
                wanted = sum(float(w[b, t, h]) * max(float(q[b, t, h] @ k[b, s]), 0) for h in range(4))
                assert float(got[b, t, s]) == pytest.approx(wanted)
    half = reference.index_scores(q.bfloat16(), k.bfloat16(), w.bfloat16())
    assert half.dtype == torch.float32


@pytest.mark.parametrize("k", [1, 3, 8, 20])
def test_select_topk_sorts_by_score_then_recency(k):
    scores = draw(2, 8, 8).round()  # many ties
    visible = torch.ones(8, 8, dtype=torch.bool).tril().expand(2, -1, -1)
    got = reference.select_topk(scores, visible, k)
    for b in range(2):
        for t in range(8):
            ranked = sorted(range(t + 1), key=lambda s: (-float(scores[b, t, s]), -s))
            assert got[b, t].nonzero()[:, 0].tolist() == sorted(ranked[:k])


def test_a_selection_does_not_depend_on_what_comes_later():
    """The rule that lets prefill, chunks and decode agree: equal scores, however many keys lie behind."""
    scores = torch.zeros(1, 6, 6)
    whole = reference.select_topk(scores, torch.ones(6, 6, dtype=torch.bool).tril()[None], 2)
    for t in range(6):
        alone = reference.select_topk(scores[:, t : t + 1, : t + 1], torch.ones(1, 1, t + 1, dtype=torch.bool), 2)
        assert torch.equal(whole[:, t : t + 1, : t + 1], alone)


# ---------------------------------------------------------------- experts and n-grams


def test_experts_by_loops():
    x, weights = draw(5, 3), draw(5, 2, seed=1)
    indices = torch.tensor([[0, 2], [2, 1], [3, 0], [1, 3], [2, 0]])
    gate_up, down = draw(4, 4, 3, seed=2), draw(4, 3, 2, seed=3)
    got = reference.experts(x, indices, weights, gate_up, down)
    for t in range(5):
        wanted = np.zeros(3)
        for slot, e in enumerate(indices[t].tolist()):
            both = gate_up[e].numpy() @ x[t].numpy()  # gate rows first
            gate, up = both[:2], both[2:]
            wanted += weights[t, slot].item() * (down[e].numpy() @ (gate / (1 + np.exp(-gate)) * up))
        np.testing.assert_allclose(got[t], wanted, rtol=1e-10)


def test_ngram_rows_by_python_integers():
    """Products of the largest ids stay inside int64, so torch agrees with unbounded integers."""
    vocab, heads = 99092, 3
    multipliers = [76632096046245, 4839876093313, 35959672319349, 73987337458391]
    primes = [[101 + 2 * h + 10 * order for h in range(heads)] for order in range(3)]
    offsets = [[1000 * order + 7 * h for h in range(heads)] for order in range(3)]
    grams = torch.randint(0, vocab, (50, 4), generator=torch.Generator().manual_seed(0))
    grams[0] = vocab - 1
    got = reference.ngram_rows(grams, *(torch.tensor(c) for c in (multipliers, primes, offsets)))
    for t, ids in enumerate(grams.tolist()):
        wanted = []
        for n in range(2, 5):
            mixed = 0
            for k in range(n):
                product = ids[k] * multipliers[k]
                assert product < 1 << 63
                mixed ^= product
            wanted += [mixed % primes[n - 2][h] + offsets[n - 2][h] for h in range(heads)]
        assert got[t].tolist() == wanted
