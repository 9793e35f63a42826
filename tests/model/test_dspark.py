"""The drafter against the formulas of all its parts written out; what it may see and what it may not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold import ops
from fourfold.config import ModelConfig
from fourfold.model.cache import Cache, PagePool, SequenceState
from fourfold.model.dspark import Draft
from fourfold.model.sequence import Document, pack
from fourfold.model.transformer import Model
from tests.model import tiny, v41
from tests.model.plain import rms_norm
from tests.model.test_csa2 import rotate


class Written:
    """One sequence: features of all its positions, the token sampled last."""

    def __init__(self, made: Model, features: Tensor, last: int) -> None:
        self.cfg, self.w = made.cfg, {k: v.detach() for k, v in made.state_dict().items()}
        cfg, drafter, w = self.cfg, self.cfg.drafter, self.w
        main = self.norm(features @ w["drafter.main_proj.weight"].T, "drafter.main_norm.weight")
        tokens = [last] + [drafter.noise_token_id] * (drafter.block_size - 1)
        streams = w["embed_tokens.weight"][tokens][:, None].repeat(1, cfg.residual.hc_mult, 1)
        pre = torch.zeros(len(tokens), cfg.residual.hc_mult)
        pre[:, 0] = 1.0
        for n in range(drafter.num_layers):
            at = f"drafter.blocks.{n}."
            for site, norm, f in (
                (
                    "attn_residual.",
                    "input_layernorm.weight",
                    lambda x, at=at: self.attention(x, main, at + "self_attn."),
                ),
                ("mlp_residual.", "post_attention_layernorm.weight", lambda x, at=at: self.moe(x, at + "mlp.")),
            ):
                following, post, comb = self.maps(streams, at + site)
                y = f(self.norm(torch.einsum("ln,lnd->ld", pre, streams), at + norm))
                streams = post[..., None] * y[:, None] + torch.einsum("ljk,ljd->lkd", comb, streams)
                pre = following
        hidden = torch.einsum("ln,lnd->ld", pre, streams)
        base = self.norm(hidden, "drafter.norm.weight") @ w["lm_head.weight"].T
        self.tokens, self.logits, self.confidence = [], [], []
        for i in range(drafter.block_size):
            markov = w["drafter.markov_embed.weight"][last]
            self.logits.append(base[i] + w["drafter.markov_head.weight"] @ markov)
            self.confidence.append(w["drafter.confidence_proj.weight"][0] @ torch.cat([hidden[i], markov]))
            last = int(self.logits[-1].argmax())
            self.tokens.append(last)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self.w[name], self.cfg.rms_norm_eps)

    def maps(self, streams: Tensor, at: str) -> tuple[Tensor, Tensor, Tensor]:
        r, n = self.cfg.residual, self.cfg.residual.hc_mult
        flat, scale, base = streams.flatten(1), self.w[at + "scale"], self.w[at + "base"]
        mix = flat @ self.w[at + "fn"].T * torch.rsqrt(flat.square().mean(-1, keepdim=True) + self.cfg.rms_norm_eps)
        pre = (mix[:, :n] * scale[0] + base[:n]).sigmoid() + r.hc_eps
        post = 2 * (mix[:, n : 2 * n] * scale[1] + base[n : 2 * n]).sigmoid()
        comb = (mix[:, 2 * n :] * scale[2] + base[2 * n :]).view(-1, n, n).softmax(-1) + r.hc_eps
        for turn in range(r.hc_sinkhorn_iters):
            if turn:
                comb = comb / (comb.sum(2, keepdim=True) + r.hc_eps)
            comb = comb / (comb.sum(1, keepdim=True) + r.hc_eps)
        return pre, post, comb

    def attention(self, x: Tensor, main: Tensor, at: str) -> Tensor:
        a, w, count = self.cfg.attention, self.w, len(main)
        frequencies = ops.rope_frequencies(a.qk_rope_head_dim, self.cfg.rope)
        q = self.norm(x @ w[at + "q_a_proj.weight"].T, at + "q_a_layernorm.weight") @ w[at + "q_b_proj.weight"].T
        q = q.unflatten(-1, (a.num_attention_heads, a.head_dim))
        rows = [(s, main[s]) for s in range(max(0, count - a.sliding_window), count)]
        rows += [(count + i, x[i]) for i in range(len(x))]
        kv = [
            rotate(self.norm(w[at + "kv_proj.weight"] @ row, at + "kv_layernorm.weight"), position, frequencies)
            for position, row in rows
        ]
        keys, out = torch.stack(kv), []
        for i in range(len(x)):
            logits = rotate(q[i], count + i, frequencies) @ keys.T * a.head_dim**-0.5
            p = torch.cat([logits, w[at + "sinks"][:, None]], dim=1).softmax(-1)[:, :-1]
            o = rotate(p @ keys, count + i, frequencies, back=True).reshape(a.o_groups, -1)
            z = [g @ part for g, part in zip(w[at + "o_a_proj.weight"].chunk(a.o_groups), o, strict=True)]
            out.append(w[at + "o_b_proj.weight"] @ torch.cat(z))
        return torch.stack(out)

    def moe(self, x: Tensor, at: str) -> Tensor:
        moe, w, out = self.cfg.moe, self.w, []
        assert len(w[at + "gate.weight"]) == self.cfg.drafter.n_routed_experts

        def swiglu(gate: Tensor, up: Tensor) -> Tensor:
            gate, up = gate.clamp(max=moe.swiglu_limit), up.clamp(-moe.swiglu_limit, moe.swiglu_limit)
            return gate * gate.sigmoid() * up

        for row in x:
            scores = F.softplus(w[at + "gate.weight"] @ row).sqrt()
            chosen = (scores + w[at + "gate.bias"]).topk(self.cfg.drafter.num_experts_per_tok).indices
            y = torch.zeros_like(row)
            for expert in chosen:
                gate, up = (w[at + "gate_up_proj"][expert] @ row).chunk(2)
                share = moe.routed_scaling_factor * scores[expert] / scores[chosen].sum()
                y = y + share * (w[at + "down_proj"][expert] @ swiglu(gate, up))
            gate, up = (w[f"{at}shared_experts.{name}_proj.weight"] @ row for name in ("gate", "up"))
            out.append(y + w[at + "shared_experts.down_proj.weight"] @ swiglu(gate, up))
        return torch.stack(out)


@pytest.fixture(scope="module")
def made() -> Model:
    return tiny.model(v41.config())


@torch.no_grad()
def features_of(made: Model, *documents: Document) -> list[Tensor]:
    out = made(pack(documents), features=True).features
    return list(out.split([len(d) for d in documents]))


@torch.no_grad()
def draft(made: Model, features: list[Tensor], last: list[int], width: int | None = None, **options) -> Draft:
    """Of sequences of any lengths, filled up to the left."""
    longest = width or max(map(len, features))
    keys, positions = [], []
    for rows in features:
        at = torch.arange(len(rows))
        missing = longest - len(rows)
        keys.append(F.pad(made.drafter.keys(rows, at), (0, 0, 0, 0, missing, 0), value=3.0))
        positions.append(F.pad(at, (missing, 0), value=-1))
    last = torch.tensor(last)
    return made.drafter.draft(torch.stack(keys), torch.stack(positions), last, made.embed_tokens, made.head, **options)


@pytest.mark.parametrize("seed", range(3))
def test_a_draft_is_the_formula(seed):
    """Alone and beside others, before and after the window is full."""
    made = tiny.model(v41.config(), seed)
    documents = [tiny.text(n, seed=n + seed) for n in (3, 5, 14)] + [v41.document(made.cfg, seed, pieces=1)]
    features, last = features_of(made, *documents), [4, 9, 60, 1]
    together = draft(made, features, last)
    assert together.tokens.shape == (4, 4) and together.logits.shape == (4, 4, tiny.VOCAB)
    for n in range(4):
        written = Written(made, features[n], last[n])
        assert together.tokens[n].tolist() == written.tokens
        torch.testing.assert_close(together.logits[n], torch.stack(written.logits), rtol=0, atol=5e-5)
        torch.testing.assert_close(together.confidence[n], torch.stack(written.confidence), rtol=0, atol=5e-5)


@torch.no_grad()
def test_features_are_the_streams_that_enter_the_targets(made):
    packed = pack([v41.document(made.cfg, 0), tiny.text(9)])
    entering: dict[int, Tensor] = {}
    hooks = [
        made.layers[layer].register_forward_pre_hook(lambda _, args, layer=layer: entering.__setitem__(layer, args[0]))
        for layer in made.cfg.drafter.target_layer_ids
    ]
    out = made(packed, features=True)
    for hook in hooks:
        hook.remove()
    wanted = torch.cat([entering[layer].mean(1) for layer in (5, 6, 7)], dim=1)
    torch.testing.assert_close(out.features, wanted)
    assert out.features.shape == (len(packed), 3 * made.cfg.hidden_size)
    assert made(packed).features is None
    torch.testing.assert_close(made(packed).logits, out.logits)


@torch.no_grad()
def test_features_of_chunks_are_those_of_a_prefill(made):
    document = tiny.text(21)
    (whole,) = features_of(made, document)
    pool, state, parts = PagePool(made.cfg, 8, 4), SequenceState(), []
    for start, stop in ((0, 8), (8, 9), (9, 20), (20, 21)):
        piece = pack([document.slice(start, stop)], starts=[start])
        parts.append(made(piece, cache=Cache(pool, [state]), features=True).features)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-4)


def test_positions_behind_the_window_are_not_read(made):
    (features,) = features_of(made, tiny.text(20))
    wanted = draft(made, [features], [5])
    changed = features.clone()
    changed[:15] = 9.0  # the window holds 5
    torch.testing.assert_close(draft(made, [changed], [5]).logits, wanted.logits)
    changed[15] = 9.0
    assert not torch.allclose(draft(made, [changed], [5]).logits, wanted.logits, atol=1e-4)


def test_drafted_positions_see_one_another(made):
    """Of the draft only the first place holds a token, and all places see it, and it sees the noise behind it."""
    (features,) = features_of(made, tiny.text(8))
    a, b = draft(made, [features], [5]), draft(made, [features], [6])
    assert ((a.logits - b.logits).abs().amax(-1) > 1e-4).all()
    other = tiny.model(made.cfg.replace(**{"drafter.noise_token_id": 8}))
    other.load_state_dict(made.state_dict())
    c = draft(other, [features], [5])
    assert ((a.logits - c.logits).abs().amax(-1) > 1e-4).all()


def test_what_is_chosen_corrects_what_follows(made):
    """Sampling and teacher forcing: the choice changes later logits by the markov matrix alone."""
    (features,) = features_of(made, tiny.text(8))
    greedy = draft(made, [features], [5])
    forced = iter([torch.tensor([n]) for n in (1, 2, 3, 4)])
    other = draft(made, [features], [5], choose=lambda logits: next(forced))
    assert other.tokens.tolist() == [[1, 2, 3, 4]]
    w = made.state_dict()
    markov = w["drafter.markov_embed.weight"] @ w["drafter.markov_head.weight"].T
    torch.testing.assert_close(other.logits[0, 0], greedy.logits[0, 0])
    for place in (1, 2, 3):
        difference = markov[other.tokens[0, place - 1]] - markov[greedy.tokens[0, place - 1]]
        torch.testing.assert_close(other.logits[0, place] - greedy.logits[0, place], difference, rtol=0, atol=1e-5)


@torch.no_grad()
def test_keys_may_be_kept(made):
    """Keys computed as the sequence grows, of which the last window is kept, draft the same."""
    (features,) = features_of(made, tiny.text(20))
    ring = torch.cat([made.drafter.keys(features[n : n + 1], torch.tensor([n])) for n in range(15, 20)])[None]
    got = made.drafter.draft(ring, torch.arange(15, 20)[None], torch.tensor([5]), made.embed_tokens, made.head)
    torch.testing.assert_close(got.logits, draft(made, [features], [5]).logits, rtol=0, atol=1e-5)


def test_parameter_names(made):
    names = {k.removeprefix("drafter.") for k in made.state_dict() if k.startswith("drafter.")}
    blocks = {n for n in names if n.startswith("blocks.")}
    assert names - blocks == {
        f"{n}.weight" for n in ("main_proj", "main_norm", "norm", "markov_embed", "markov_head")
    } | {"confidence_proj.weight"}
    trunk = {k.removeprefix("layers.0.") for k in made.state_dict() if k.startswith("layers.0.")}
    for n in range(3):  # as a window layer of the trunk, without the bias of images
        of_block = {k.removeprefix(f"blocks.{n}.") for k in blocks if k.startswith(f"blocks.{n}.")}
        assert of_block == trunk - {"mlp.gate.media_bias"}
    shapes = {k: tuple(v.shape) for k, v in made.drafter.state_dict().items()}
    assert shapes["main_proj.weight"] == (24, 3 * 24) and shapes["confidence_proj.weight"] == (1, 24 + 6)
    assert shapes["markov_embed.weight"] == shapes["markov_head.weight"] == (tiny.VOCAB, 6)
    assert shapes["blocks.0.mlp.gate_up_proj"] == (5, 16, 24)


def test_a_model_without_a_drafter_has_no_features():
    made = tiny.model(tiny.config())
    assert made.drafter is None
    with pytest.raises(ValueError, match="features: this model has no drafter"):
        made(pack([tiny.text(3)]), features=True)


def test_other_residuals_draft_too():
    cfg: ModelConfig = v41.config(**{"residual.kind": "plain"})
    (features,) = features_of(tiny.model(cfg), tiny.text(6))
    assert draft(tiny.model(cfg), [features], [5]).tokens.shape == (1, 4)
