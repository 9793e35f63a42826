"""Multi-token prediction, derived again, and which positions it is trained on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fourfold.model.mtp import MTP
from fourfold.model.sequence import IGNORE, Document, pack
from fourfold.model.transformer import mtp_targets
from tests.model import plain, tiny


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_mtp_of_a_plain_model_is_one_more_block(kind):
    """norm of the next embedding and norm of the trunk's state, each projected, added, one block, norm, shared head."""
    cfg = tiny.config(**{"attention.kind": kind, "mtp.num_layers": 1})
    made = tiny.model(cfg)
    w = dict(made.state_dict())
    documents = [tiny.text(9), tiny.text(2, seed=1), tiny.text(6, seed=2)]
    got = made(pack(documents), mtp=True).mtp_logits
    wanted = []
    for d in documents:
        hidden = plain.trunk(w, cfg, d.tokens, fused=True)[:-1]  # the last token has no next one
        following = w["embed_tokens.weight"][d.tokens[1:]]
        e = plain.rms_norm(following, w["mtp.enorm.weight"], cfg.rms_norm_eps)
        h = plain.rms_norm(hidden, w["mtp.hnorm.weight"], cfg.rms_norm_eps)
        z = F.linear(e, w["mtp.e_proj.weight"]) + F.linear(h, w["mtp.h_proj.weight"])
        z = plain.block(w, "mtp.block.", cfg, z, torch.arange(len(z)), fused=True)
        out = F.linear(plain.rms_norm(z, w["mtp.norm.weight"], cfg.rms_norm_eps), w["lm_head.weight"])
        wanted.append(out[:-1])  # the token after the next is known for all but the last of these
    torch.testing.assert_close(got, torch.cat(wanted), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_mtp_projects_every_stream():
    cfg = tiny.config(**{"residual.kind": "mhc", "mtp.num_layers": 1})
    made = tiny.model(cfg)
    mtp, packed = made.mtp, pack([tiny.text(8)])
    assert isinstance(mtp, MTP) and list(mtp.collapse.parameters())  # its own
    streams, following = torch.randn(8, 4, 24), torch.randn(8, 24)
    z = torch.stack([mtp.e_proj(mtp.enorm(following)) + mtp.h_proj(mtp.hnorm(streams[:, i])) for i in range(4)], dim=1)
    ctx = made.context(packed, None, None)
    wanted = mtp.norm(mtp.collapse(mtp.block(z, ctx), ctx))
    torch.testing.assert_close(mtp(streams, following, made.context(packed, None, None)), wanted)


def test_targets_are_two_ahead_and_stay_in_their_sequence():
    cfg = tiny.config(media=tiny.MEDIA)
    documents = [tiny.text(5), tiny.text(1), tiny.text(2), *(tiny.document(cfg, 30, s) for s in range(3))]
    got, start = mtp_targets(pack(documents)), 0
    for d in documents:
        for t in range(len(d)):
            wanted = d.targets[t + 1] if t + 1 < len(d) else IGNORE
            assert got[start + t] == wanted
            if wanted != IGNORE:
                assert wanted == d.tokens[t + 2]
        start += len(d)


def test_targets_leave_the_batch_as_it_is():
    packed = pack([tiny.text(4), tiny.text(3)])
    before = packed.targets.clone()
    mtp_targets(packed)
    assert torch.equal(packed.targets, before)


@torch.no_grad()
def test_a_guess_sees_the_next_token_and_none_after():
    cfg = tiny.config(**{"residual.kind": "mhc", "mtp.num_layers": 1, "moe.n_routed_experts": 4})
    made, tokens = tiny.model(cfg), tiny.text(12).tokens
    before = made(pack([Document.text(tokens)]), mtp=True).mtp_logits
    for changed in range(2, 12):
        other = tokens.clone()
        other[changed] = (other[changed] + 1) % tiny.VOCAB
        after = made(pack([Document.text(other)]), mtp=True).mtp_logits
        unmoved = (after - before).abs().amax(-1) < 1e-5
        assert unmoved[: changed - 1].all() and not unmoved[changed - 1 :].any()


def test_guesses_train_the_trunk_too():
    made = tiny.model(tiny.config(**{"mtp.num_layers": 1})).train()
    made(pack([tiny.text(9)]), mtp=True).mtp_logits.sum().backward()
    assert all(p.grad is not None for name, p in made.named_parameters() if name != "norm.weight")


def test_no_guess_without_request_or_block():
    packed = pack([tiny.text(5)])
    assert tiny.model(tiny.config(**{"mtp.num_layers": 1}))(packed).mtp_logits is None
    assert tiny.model(tiny.config())(packed, mtp=True).mtp_logits is None
