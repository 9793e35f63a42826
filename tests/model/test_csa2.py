"""CSA2 against the formulas written out position by position; chunks and decoding against a whole prefill."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold import ops
from fourfold.config import ModelConfig
from fourfold.model.cache import PagePool, layout
from fourfold.model.csa2 import CSA2, candidate_entries
from fourfold.model.probe import Probe
from fourfold.model.sequence import IGNORE, pack
from fourfold.model.transformer import Model
from tests.model import tiny, v41
from tests.model.plain import rms_norm


def rotate(x: Tensor, position: int, frequencies: Tensor, back: bool = False) -> Tensor:
    """The last pairs (0, 1), (2, 3), ... of x [..., D] as complex numbers times e^(i angle)."""
    pairs = torch.view_as_complex(x[..., -2 * len(frequencies) :].reshape(*x.shape[:-1], -1, 2).contiguous())
    turn = torch.polar(torch.ones_like(frequencies), frequencies * (-position if back else position))
    return torch.cat([x[..., : -2 * len(frequencies)], torch.view_as_real(pairs * turn).flatten(-2)], dim=-1)


def best_first(scores: dict[int, float], k: int) -> list[int]:
    return sorted(scores, key=lambda j: (-scores[j], -j))[:k]


class Written:
    """One sequence through the attention of all layers, each fed its own x."""

    def __init__(self, made: Model, xs: list[Tensor]) -> None:
        self.cfg, self.w = made.cfg, {k: v.detach() for k, v in made.state_dict().items()}
        self.outputs = [self.layer(layer, x) for layer, x in enumerate(xs)]

    def weight(self, layer: int, name: str) -> Tensor:
        return self.w[f"layers.{layer}.self_attn.{name}"]

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.cfg.rms_norm_eps)

    def layer(self, layer: int, x: Tensor) -> Tensor:
        a, ratio = self.cfg.attention, self.cfg.attention.compress_ratios[layer]
        rope = self.cfg.compress_rope if ratio else self.cfg.rope
        frequencies = ops.rope_frequencies(a.qk_rope_head_dim, rope)
        w = lambda name: self.weight(layer, name)  # noqa: E731
        q_latent = self.norm(x @ w("q_a_proj.weight").T, w("q_a_layernorm.weight"))
        q = (q_latent @ w("q_b_proj.weight").T).unflatten(-1, (a.num_attention_heads, a.head_dim))
        kv = self.norm(x @ w("kv_proj.weight").T, w("kv_layernorm.weight"))
        if layer in a.kv_source_layer_ids:
            self.pool(layer, x, ratio, frequencies)
        if layer in a.index_source_layer_ids:
            self.select(layer, x, q_latent, ratio, frequencies)
        out = []
        for t in range(len(x)):
            keys = [rotate(kv[s], s, frequencies) for s in range(max(0, t - a.sliding_window + 1), t + 1)]
            if ratio:
                keys += [self.entries[j] for j in self.chosen[t]]
            stacked = torch.stack(keys)
            logits = rotate(q[t], t, frequencies) @ stacked.T * a.head_dim**-0.5  # [H, S]
            p = torch.cat([logits, w("sinks")[:, None]], dim=1).softmax(-1)[:, :-1]
            o = rotate(p @ stacked, t, frequencies, back=True).reshape(a.o_groups, -1)
            first = w("o_a_proj.weight").chunk(a.o_groups)
            z = torch.cat([first[g] @ o[g] for g in range(a.o_groups)])
            out.append(w("o_b_proj.weight") @ z)
        return torch.stack(out)

    def pool(self, layer: int, x: Tensor, ratio: int, frequencies: Tensor) -> None:
        w = lambda name: self.weight(layer, name)  # noqa: E731
        self.entries, self.keys, self.candidates = [], [], None
        for j in range(len(x) // ratio):
            group = x[j * ratio : (j + 1) * ratio]
            latent = group @ w("compressor.kv_proj.weight").T
            if ratio > 1:
                latent = latent * (group @ w("compressor.gate_proj.weight").T).softmax(0)
            latent = self.norm(latent.sum(0), w("compressor.norm.weight"))
            key = self.norm(w("indexer.wk.weight") @ latent, w("indexer.k_norm.weight"))
            self.keys.append(rotate(key, j * ratio, frequencies))
            self.entries.append(rotate(latent, j * ratio, frequencies))

    def select(self, layer: int, x: Tensor, q_latent: Tensor, ratio: int, frequencies: Tensor) -> None:
        a, index = self.cfg.attention, self.cfg.indexer
        wq_b, weights_proj = (
            self.weight(layer, "indexer.wq_b.weight"),
            self.weight(layer, "indexer.weights_proj.weight"),
        )
        self.chosen: list[list[int]] = []
        candidates = []
        for t in range(len(x)):
            q = rotate((wq_b @ q_latent[t]).unflatten(0, (index.n_heads, -1)), t, frequencies)
            head_weights = weights_proj @ x[t] * index.head_dim**-0.5 * index.n_heads**-0.5
            scores = {j: float(head_weights @ (q @ self.keys[j]).relu()) for j in range((t + 1) // ratio)}
            allowed = scores if self.candidates is None else {j: scores[j] for j in self.candidates[t]}
            self.chosen.append(best_first(allowed, index.topk))
            blocks: dict[int, float] = {}
            for j, score in scores.items():
                block = j // a.candidate_block_size
                blocks[block] = max(blocks.get(block, -float("inf")), score)
            if blocks:
                blocks[max(blocks)] = float("inf")
            kept = best_first(blocks, a.candidate_topk_blocks)
            candidates.append([j for j in scores if j // a.candidate_block_size in kept])
        if layer == a.candidate_source_layer_id:
            self.candidates = candidates


@torch.no_grad()
def attention_of(made: Model, xs: list[list[Tensor]], probe: Probe | None = None) -> list[Tensor]:
    """What every layer's attention gives for its x of all sequences, packed."""
    packed = pack([tiny.text(len(x)) for x in xs[0]])
    ctx = made.context(packed, None, probe)
    return [block.self_attn(torch.cat(x), ctx) for block, x in zip(made.layers, xs, strict=True)]


def inputs(cfg: ModelConfig, lengths: list[int], seed: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    layers = range(cfg.num_hidden_layers)
    return [[torch.randn(n, cfg.hidden_size, generator=generator) for n in lengths] for _ in layers]


@pytest.mark.parametrize("seed", range(3))
def test_every_kind_of_layer_is_the_formula(seed):
    """Full, reindexing, reusing and window layers, ratios 2 and 1, candidates; strangers beside it do not matter."""
    cfg = tiny.config(**v41.CSA2)
    made, lengths = tiny.model(cfg, seed), [23, 1, 23, 8]
    xs, probe = inputs(cfg, lengths, seed), Probe()
    got = attention_of(made, xs, probe)
    for number in range(len(lengths)):
        written = Written(made, [x[number] for x in xs])
        for layer in range(cfg.num_hidden_layers):
            part = got[layer].split(lengths)[number]
            torch.testing.assert_close(part, written.outputs[layer], rtol=0, atol=2e-5, msg=f"layer {layer}")
    assert set(probe.selected) == {1, 2, 3, 4, 5, 6, 7}
    for older, newer in ((1, 2), (4, 5), (6, 7)):
        assert all(torch.equal(a, b) for a, b in zip(probe.selected[older], probe.selected[newer], strict=True))
    for older, newer in ((1, 3), (4, 6)):  # anew
        assert not torch.equal(probe.selected[older][0], probe.selected[newer][0])


def test_candidates_confine_later_selections():
    cfg = tiny.config(**v41.CSA2)
    free = cfg.replace(**{"attention.candidate_source_layer_id": -1})
    xs, made = inputs(cfg, [40], 0), tiny.model(cfg)
    unbound = tiny.model(free)
    unbound.load_state_dict(made.state_dict())
    with_filter, without = Probe(), Probe()
    attention_of(made, xs, with_filter), attention_of(unbound, xs, without)
    for layer in (1, 2, 3, 4, 5):  # the source itself looks at all entries
        assert torch.equal(with_filter.selected[layer][0], without.selected[layer][0])
    assert not torch.equal(with_filter.selected[6][0], without.selected[6][0])


def test_candidate_blocks():
    scores = torch.tensor([[[0.0, 9.0, 5.0, 4.0, 0.0, 0.0, 7.0, 1.0, 2.0]]])
    visible = torch.arange(9) < 9
    chosen = candidate_entries(scores, visible[None, None], blocks=2, size=2)
    assert chosen[0, 0].nonzero()[:, 0].tolist() == [0, 1, 8]  # the best block, and that of the newest entry
    fewer = (torch.arange(9) < 7)[None, None]
    assert candidate_entries(scores, fewer, 2, 2)[0, 0].nonzero()[:, 0].tolist() == [0, 1, 6]
    ties = torch.zeros(1, 1, 9)
    assert candidate_entries(ties, visible[None, None], 2, 2)[0, 0].nonzero()[:, 0].tolist() == [6, 7, 8]
    assert not candidate_entries(scores, torch.zeros(1, 1, 9, dtype=torch.bool), 2, 2).any()
    assert candidate_entries(scores[..., :0], visible[None, None, :0], 2, 2).shape == (1, 1, 0)


@pytest.mark.parametrize("mode", ["dense", "off"])
def test_without_selection_every_entry_is_attended(mode):
    """The same as a selection larger than the sequence."""
    cfg = tiny.config(**v41.CSA2 | {"indexer.topk": 99, "attention.candidate_topk_blocks": 99})
    made = tiny.model(cfg)
    other = tiny.model(cfg.replace(**{"indexer.mode": mode}))
    other.load_state_dict(made.state_dict(), strict=mode == "dense")
    xs = inputs(cfg, [21, 4], 0)
    for got, wanted in zip(attention_of(other, xs), attention_of(made, xs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_parameter_names():
    def names(layer: int, module: str) -> set[str]:
        prefix = f"layers.{layer}.self_attn.{module}."
        return {k.removeprefix(prefix) for k in state if k.startswith(prefix)}

    state = tiny.model(tiny.config(**v41.CSA2)).state_dict()
    every = {"q_a_proj.weight", "q_a_layernorm.weight", "q_b_proj.weight", "kv_proj.weight", "kv_layernorm.weight"}
    every |= {"o_a_proj.weight", "o_b_proj.weight", "sinks"}
    for layer in range(8):
        own = {
            k.removeprefix(f"layers.{layer}.self_attn.") for k in state if k.startswith(f"layers.{layer}.self_attn.")
        }
        assert {k for k in own if not k.startswith(("compressor", "indexer"))} == every
        source, indexes = layer in (1, 4), layer in (1, 3, 4, 6)
        assert names(layer, "indexer") == ({"wq_b.weight", "weights_proj.weight"} if indexes else set()) | (
            {"wk.weight", "k_norm.weight"} if source else set()
        )
        gate = {"gate_proj.weight"} if layer == 1 else set()
        assert names(layer, "compressor") == ({"kv_proj.weight", "norm.weight"} | gate if source else set())
    assert state["layers.1.self_attn.indexer.wk.weight"].shape == (8, 12)
    assert state["layers.1.self_attn.o_a_proj.weight"].shape == (2 * 6, 4 * 12 // 2)


def test_only_sources_have_pages():
    kept = layout(tiny.config(**v41.CSA2))
    assert {n: s.ratio for n, s in kept.slots.items()} == {
        "layers.1.kv": 2,
        "layers.1.index": 2,
        "layers.4.kv": 1,
        "layers.4.index": 1,
    }
    assert kept.multiple == 2 and {f"layers.{n}.window" for n in range(8)} <= set(kept.tails)
    with pytest.raises(ValueError, match="multiple of 2"):
        PagePool(tiny.config(**v41.CSA2), 4, 3)


# ---------------------------------------------------------------- chunks and decoding


@pytest.mark.parametrize("seed", range(4))
def test_chunks_give_what_a_prefill_gives(seed):
    """Any cuts, any company; what lies in unwritten pages is never seen."""
    rng = random.Random(seed)
    cfg = tiny.config(**v41.CSA2 | {"attention.sliding_window": rng.choice([1, 3, 8])})
    made = tiny.model(cfg, seed)
    documents = [tiny.text(n, seed=10 * seed + n) for n in (33, 2, 17, 33)]
    chunks = [tiny.random_chunks(len(d), rng) for d in documents]
    for one, parts in zip(documents, tiny.decode(made, documents, chunks, page_size=4, fill=37.0), strict=True):
        torch.testing.assert_close(parts, tiny.logits(made, one), rtol=0, atol=1e-4)


def test_token_by_token():
    made, document = tiny.model(tiny.config(**v41.CSA2)), tiny.text(30)
    (got,) = tiny.decode(made, [document], [[1] * 30])
    torch.testing.assert_close(got, tiny.logits(made, document), rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_everything_of_v41_in_chunks(seed):
    """Pictures, memory, single-pass streams, routed experts: decoding is prefilling."""
    cfg, rng = v41.config(), random.Random(seed)
    made = tiny.model(cfg, seed)
    documents = [v41.document(cfg, 3 * seed + n) for n in range(2)] + [tiny.text(20, seed=seed)]
    chunks = [v41.random_chunks(d, rng) for d in documents]
    for one, parts in zip(documents, tiny.decode(made, documents, chunks, fill=37.0), strict=True):
        torch.testing.assert_close(parts, tiny.logits(made, one), rtol=0, atol=2e-4)


def test_every_parameter_of_v41_learns():
    cfg = v41.config()
    made = tiny.model(cfg).train()
    packed = pack([v41.document(cfg, seed) for seed in range(3)])
    out = made(packed, balance=True, features=True)
    loss = F.cross_entropy(out.logits, packed.targets, ignore_index=IGNORE) + out.index_loss + out.balance_loss
    keys = made.drafter.keys(out.features, packed.positions)
    stop = int(packed.cu_seqlens[1])
    positions = packed.positions[None, :stop]
    draft = made.drafter.draft(keys[None, :stop], positions, torch.tensor([3]), made.embed_tokens, made.head)
    (loss + draft.logits.logsumexp(-1).mean() + F.softplus(draft.confidence).mean()).backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_indexers_learn_from_their_own_loss_alone():
    cfg = tiny.config(**v41.CSA2)
    for mode in ("warmup", "sparse"):
        made = tiny.model(cfg.replace(**{"indexer.mode": mode})).train()
        out = made(pack([tiny.text(30)]))
        grads = torch.autograd.grad(out.index_loss, list(made.parameters()), allow_unused=True)
        for (name, _), grad in zip(made.named_parameters(), grads, strict=True):
            assert (grad is not None and bool(grad.any())) == (".indexer." in name), name


def test_layers_are_of_this_kind():
    made = tiny.model(v41.config())
    assert all(isinstance(block.self_attn, CSA2) for block in made.layers)
