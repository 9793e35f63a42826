"""What is computed in float32 whatever the rest is computed in: under autocast, and in a half model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fourfold import ops
from fourfold.model import engram as engram_module
from fourfold.model import moe as moe_module
from fourfold.model.residual import HyperConnection, StreamCollapse
from fourfold.model.sequence import pack
from fourfold.model.transformer import Model
from fourfold.ops.cpu.streams import LONG
from tests.model import tiny

CFG = tiny.config(
    **{
        "attention.q_lora_rank": 10,
        "indexer.mode": "sparse",
        "indexer.head_dim": 8,
        "indexer.topk": 4,
        "moe.n_routed_experts": 8,
        "residual.kind": "mhc",
        "engram.layer_ids": [0, 1],
        "engram.vocab_size": 101,
        "media": tiny.MEDIA,
    }
)


def half() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("how", ["autocast", "bfloat16 model"])
def test_islands_stay_float32(how, monkeypatch):
    """Every value that enters or leaves an island, watched from outside during one training pass."""
    seen: dict[str, list[torch.dtype]] = {}

    def watch(place: Any, name: str, arguments: slice) -> None:
        function = getattr(place, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            out = function(*args, **kwargs)
            results = out if isinstance(out, tuple) else (out,)
            tensors = [t for t in (*args[arguments], *results) if isinstance(t, torch.Tensor) and t.is_floating_point()]
            seen.setdefault(name, []).extend(t.dtype for t in tensors)
            return out

        monkeypatch.setattr(place, name, watched)

    watch(moe_module, "score", slice(None))
    watch(moe_module, "choose_experts", slice(None))
    watch(engram_module, "engram_gate", slice(None))
    watch(ops, "index_scores", slice(None))
    watch(ops, "select_topk", slice(None))
    watch(ops, "attention_mass", slice(0))  # what leaves it
    watch(ops, "hyper_maps", slice(0))
    made = tiny.model(CFG)
    made = made.train() if how == "autocast" else made.bfloat16().train()
    packed = pack([tiny.document(CFG, 30, 0), tiny.text(9)])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        output = made(packed, balance=True)
    assert len(seen) == 7
    for name, dtypes in seen.items():
        assert set(dtypes) == {torch.float32}, name
    assert {output.logits.dtype, output.index_loss.dtype, output.balance_loss.dtype} == {torch.float32}


@torch.no_grad()
def test_norm_statistics_are_float32():
    """In bfloat16 the mean of squares of 4096 equal numbers would stop growing; the result would be off."""
    x = torch.full((1, 4096), 0.3, dtype=torch.bfloat16)
    got = ops.rms_norm(x, None, 1e-6)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, torch.ones_like(x), rtol=1e-2, atol=0)
    wide = torch.randn(3, 8)
    with half():
        assert torch.equal(ops.rms_norm(wide, None, 1e-6), wide * torch.rsqrt(wide.square().mean(-1, True) + 1e-6))


@torch.no_grad()
def test_router_under_autocast_is_the_float32_router():
    gate, x = tiny.model(CFG).layers[1].mlp.gate, torch.randn(40, 24)
    packed = pack([tiny.text(40)])
    wanted = gate(x, packed)
    with half():
        got = gate(x, packed)
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("tokens", [5, LONG + 1])
def test_stream_mixing_under_autocast_is_that_of_float32(tokens):
    made = tiny.model(CFG)
    ctx, x = made.context(pack([tiny.text(5)]), None, None), torch.randn(tokens, 4, 24)
    for module in made.modules():
        if isinstance(module, HyperConnection):
            wanted = module(x, torch.tanh, ctx)
            with half():
                got = module(x, torch.tanh, ctx)
            assert torch.equal(got, wanted)
        if isinstance(module, StreamCollapse):
            wanted = module(x, ctx)
            with half():
                assert torch.equal(module(x, ctx), wanted)


@torch.no_grad()
def test_index_scores_under_autocast_are_those_of_float32():
    made = tiny.model(CFG)
    indexer, packed = made.layers[0].self_attn.indexer, pack([tiny.text(20)])
    x, latent = torch.randn(20, 24), torch.randn(20, 10)
    wanted = indexer(x, latent, made.context(packed, None, None))
    with half():
        got = indexer(x, latent, made.context(packed, None, None))
    assert torch.equal(got.scores[0], wanted.scores[0]) and torch.equal(got.chosen[0], wanted.chosen[0])


@torch.no_grad()
def test_streams_are_carried_in_float32_under_autocast():
    made: Model = tiny.model(CFG)
    dtypes = []
    for block in made.layers:
        block.register_forward_hook(lambda *args: dtypes.append(args[-1].dtype))
    with half():
        made(pack([tiny.text(9)]))
    assert set(dtypes) == {torch.float32}
