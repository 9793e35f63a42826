"""Engram: primes, multipliers, look-back, rows, gate, fusion and convolution, each derived again."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fourfold.config import EngramConfig
from fourfold.counts import engram_primes
from fourfold.model.cache import Cache, PagePool, SequenceState
from fourfold.model.engram import Engram, engram_gate, engram_multipliers
from fourfold.model.probe import Probe
from fourfold.model.sequence import AUDIO, IMAGE, TEXT, Document, pack
from tests.model import tiny

RELEASED = EngramConfig(layer_ids=(1, 14), max_ngram=4, n_heads=8, head_dim=256, vocab_size=16_000_000)
ENGRAM = {"engram.layer_ids": [0, 2], "engram.max_ngram": 3, "engram.vocab_size": 101, "engram.head_dim": 4}


def test_primes_of_the_released_model():
    primes = engram_primes(RELEASED)
    flat = [[p for order in layer for p in order] for layer in primes]
    assert flat[0][:4] == [16000057, 16000079, 16000081, 16000097]
    assert flat[1][-1] == 16000889
    assert [sum(layer) for layer in flat] == [384006168, 384016682]
    assert len({p for layer in flat for p in layer}) == 48


def test_multipliers_of_the_released_model():
    assert engram_multipliers(RELEASED, 1, 99092) == [76632096046245, 4839876093313, 35959672319349, 73987337458391]
    assert engram_multipliers(RELEASED, 14, 99092) == [67716810739261, 51510806800915, 30921347202721, 82619226485591]


@pytest.mark.parametrize("vocab", [1, 2, 99092, 1 << 40])
def test_multipliers_are_odd_and_never_overflow(vocab):
    for layer in range(20):
        for m in engram_multipliers(RELEASED, layer, vocab):
            assert m % 2 == 1 and m * (vocab - 1) < 1 << 63


def test_the_module_has_the_table_and_constants_of_its_layer():
    cfg = tiny.config(**ENGRAM, **{"engram.compressed_vocab_size": 20})
    made = tiny.model(cfg)
    for layer, primes in zip((0, 2), engram_primes(cfg.engram), strict=True):
        engram = made.engrams[str(layer)]
        flat = [p for order in primes for p in order]
        assert engram.embed.num_embeddings == sum(flat)
        assert [o for order in engram.offsets for o in order] == [sum(flat[:i]) for i in range(len(flat))]
        assert engram.multipliers == engram_multipliers(cfg.engram, layer, 20)


# ---------------------------------------------------------------- look-back


def expected_grams(document: Document, ids: list[int], pad: int, max_ngram: int) -> list[list[int]]:
    """Walks back from each position until the sequence or its text ends; all beyond is padding."""
    tokens, modality = document.tokens.tolist(), document.modality.tolist()
    grams = []
    for t in range(len(tokens)):
        gram, dead = [], False
        for back in range(max_ngram):
            dead = dead or t - back < 0 or modality[t - back] != TEXT
            gram.append(ids[pad] if dead else ids[tokens[t - back]])
        grams.append(gram)
    return grams


@pytest.mark.parametrize("max_ngram", [2, 3, 5])
@pytest.mark.parametrize("compressed", [0, 7])
def test_look_back_stops_at_sequence_start_and_at_media(max_ngram, compressed):
    sizes = {"engram.max_ngram": max_ngram, "engram.compressed_vocab_size": compressed}
    cfg = tiny.config(**ENGRAM | sizes, media=tiny.MEDIA)
    made = tiny.model(cfg)
    documents = [tiny.document(cfg, n, seed) for seed, n in enumerate((1, 30, 2, 50))]
    ids = [token % (compressed or tiny.VOCAB) for token in range(tiny.VOCAB)]
    wanted = [g for d in documents for g in expected_grams(d, ids, 2, max_ngram)]
    got = made.compression(made.context(pack(documents), None, None))
    assert got.tolist() == wanted
    assert any(len(set(g)) > 1 and g[-1] == 2 for g in wanted)  # some n-gram is cut short


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 7], [2, 1, 9], [11, 1]])
@pytest.mark.parametrize("media", [True, False])
def test_look_back_continues_through_the_cache(pieces, media):
    cfg = tiny.config(**ENGRAM | {"engram.max_ngram": 4}, media=tiny.MEDIA)
    made, document = tiny.model(cfg), tiny.document(cfg, 12, seed=4) if media else tiny.text(12)
    assert (document.modality == TEXT).any() and (document.modality != TEXT).any() == media
    pool, state, got, start = PagePool(cfg, 4, 4), SequenceState(), [], 0
    for n in pieces:
        packed, cache = pack([document.slice(start, start + n)], starts=[start]), Cache(pool, [state])
        got += made.compression(made.context(packed, cache, None)).tolist()
        made(packed, cache=Cache(pool, [state]))
        start += n
    assert got == expected_grams(document, list(range(tiny.VOCAB)), 2, 4)


def test_look_back_uses_the_tokenizers_map():
    cfg = tiny.config(**ENGRAM | {"engram.compressed_vocab_size": 3})
    made = tiny.model(cfg)
    made.compression.ids[:] = torch.randint(0, 3, (tiny.VOCAB,))
    document = tiny.text(9)
    got = made.compression(made.context(pack([document]), None, None)).tolist()
    assert got == expected_grams(document, made.compression.ids.tolist(), 2, 3)


# ---------------------------------------------------------------- gate and fusion


def test_gate_is_a_sigmoid_of_the_signed_root():
    key = torch.ones(4)  # d = <q, k> / 2
    for d in (4.0, 0.25, -9.0, -0.04):
        got = engram_gate(torch.full((4,), d / 2), key)
        root = math.copysign(math.sqrt(abs(d)), d)
        assert float(got) == pytest.approx(1 / (1 + math.exp(-root)), rel=1e-6)


def test_gate_near_zero_is_finite_with_a_finite_gradient():
    query = torch.zeros(3, 4, requires_grad=True)
    with torch.no_grad():
        query[1] = 1e-30
    gate = engram_gate(query, torch.ones(3, 4))
    gate.sum().backward()
    assert gate[0] == 0.5 and gate.isfinite().all() and query.grad.isfinite().all()
    assert float(engram_gate(torch.full((1,), 1e-9), torch.ones(1))) == pytest.approx(1 / (1 + math.exp(-1e-3)))


@pytest.mark.parametrize(("kind", "streams"), [("plain", 1), ("mhc", 3)])
def test_engram_by_numpy(kind, streams):
    """Rows, one value for all streams, one key and gate per stream, added before the block."""
    cfg = tiny.config(**ENGRAM, **{"residual.kind": kind, "residual.hc_mult": streams}, media=tiny.MEDIA)
    made, document = tiny.model(cfg), tiny.document(cfg, 25, seed=1)
    d, eps = cfg.hidden_size, cfg.rms_norm_eps
    x = torch.randn(25, streams, d)
    probe = Probe()
    ctx = made.context(pack([document]), None, probe)
    engram: Engram = made.engrams["2"]
    with torch.no_grad():
        got = engram(x, made.compression(ctx), ctx)
    weights = {name: p.detach().double().numpy() for name, p in engram.named_parameters()}
    primes, multipliers = engram_primes(cfg.engram)[1], engram_multipliers(cfg.engram, 2, tiny.VOCAB)

    def rms(v: np.ndarray) -> np.ndarray:
        return v / np.sqrt((v**2).mean() + eps)

    grams = expected_grams(document, list(range(tiny.VOCAB)), 2, 3)
    for t in range(25):
        if document.modality[t] != TEXT:
            assert torch.equal(got[t], x[t]) and not probe.engram_gates[2][t].any()
            continue
        rows, offset = [], 0
        for n in (2, 3):
            mixed = 0
            for k in range(n):
                mixed ^= grams[t][k] * multipliers[k]
            for prime in primes[n - 2]:
                rows.append(mixed % prime + offset)
                offset += prime
        e = np.concatenate([weights["embed.weight"][r] for r in rows])
        value, keys = weights["value_proj.weight"] @ e, (weights["key_proj.weight"] @ e).reshape(streams, d)
        for m in range(streams):
            stream = x[t, m].double().numpy()
            query, key = rms(stream) * weights["q_weight"][m], rms(keys[m]) * weights["k_weight"][m]
            s = query @ key / math.sqrt(d)
            gate = 1 / (1 + math.exp(-math.copysign(math.sqrt(max(abs(s), 1e-6)), s)))
            assert float(probe.engram_gates[2][t, m]) == pytest.approx(gate, abs=1e-5)
            np.testing.assert_allclose(got[t, m].numpy(), stream + gate * value, atol=1e-5)


def test_memory_is_silent_on_media():
    """Media rows take nothing from the tables, whatever stands in them."""
    cfg = tiny.config(**ENGRAM | {"engram.layer_ids": [0]}, media=tiny.MEDIA)
    made = tiny.model(cfg)
    spans = []
    for document in (tiny.document(cfg, 40, seed) for seed in range(3)):
        text = [m == TEXT for m in document.modality.tolist()]
        start = text.index(False)
        spans.append(document.slice(start, text.index(True, start)))
    before = tiny.logits(made, *spans)
    with torch.no_grad():
        made.engrams["0"].embed.weight.add_(5.0)
    assert torch.equal(tiny.logits(made, *spans), before)


# ---------------------------------------------------------------- the short convolution of the paper


def test_short_conv_starts_as_nothing():
    torch.manual_seed(0)
    cfg = tiny.config(**ENGRAM, **{"engram.short_conv": True})
    made = tiny.Model(cfg)
    plain = tiny.Model(cfg.replace(**{"engram.short_conv": False}))
    plain.load_state_dict({k: v for k, v in made.state_dict().items() if ".conv." not in k})
    assert torch.equal(tiny.logits(made, tiny.text(9)), tiny.logits(plain, tiny.text(9)))


def test_short_conv_by_loops():
    """Depthwise, causal, kernel 4, dilation N; the last tap is the present; no reach into another sequence."""
    cfg = tiny.config(**ENGRAM, **{"engram.short_conv": True, "residual.kind": "mhc", "residual.hc_mult": 2})
    made = tiny.model(cfg)
    conv, lengths = made.engrams["0"].conv, [15, 1, 6]
    u = torch.randn(sum(lengths), 2, cfg.hidden_size)
    ctx = made.context(pack([tiny.text(n) for n in lengths]), None, None)
    with torch.no_grad():
        got = conv(u, ctx)
        normed = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + cfg.rms_norm_eps) * conv.norm.weight
        start = 0
        for n in lengths:
            for t in range(n):
                taps = [(3 - tap, t - tap * 3) for tap in range(4) if t - tap * 3 >= 0]
                wanted = sum(conv.weight[..., k] * normed[start + s] for k, s in taps)
                wanted = wanted / (1 + torch.exp(-wanted))
                torch.testing.assert_close(got[start + t], wanted, rtol=1e-4, atol=1e-6)
            start += n


def test_short_conv_refuses_a_cache():
    cfg = tiny.config(**ENGRAM, **{"engram.short_conv": True})
    with pytest.raises(ValueError, match="engram.short_conv"):
        tiny.decode(tiny.model(cfg), [tiny.text(4)], [[4]])


def test_short_conv_is_silent_on_media():
    cfg = tiny.config(**ENGRAM | {"engram.layer_ids": [0]}, **{"engram.short_conv": True}, media=tiny.MEDIA)
    made, document = tiny.model(cfg), tiny.document(cfg, 40, seed=2)
    ctx = made.context(pack([document]), None, None)
    x = torch.randn(40, 1, cfg.hidden_size)
    with torch.no_grad():
        got = made.engrams["0"](x, made.compression(ctx), ctx)
    media = (document.modality == IMAGE) | (document.modality == AUDIO)
    assert media.any() and torch.equal(got[media], x[media])
