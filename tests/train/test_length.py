"""Skipped positions: what stays, how far they reach; and that a run may begin from a model."""

from __future__ import annotations

import pytest
import torch

from fourfold.fields import ConfigError
from fourfold.model.sequence import Document, pack
from fourfold.train.length import skip_positions
from fourfold.train.loop import build_model, run_recipe
from fourfold.train.parallel import ALONE
from fourfold.train.recipe import Phase, Recipe
from fourfold.weights.checkpoint import load_model


def packs(lengths):
    return pack([Document.text(range(n)) for n in lengths])


def test_positions_ascend_within_the_span_and_nothing_else_changes():
    before = packs([40, 1, 25, 60])
    for step in range(30):
        after = skip_positions(before, 1000, 0, step)
        assert torch.equal(after.tokens, before.tokens) and torch.equal(after.cu_seqlens, before.cu_seqlens)
        for part in after.positions.split([40, 1, 25, 60]):
            assert (part.diff() >= 1).all() and 0 <= part[0] and part[-1] < 1000
    assert torch.equal(before.positions, packs([40, 1, 25, 60]).positions)


def test_the_draw_depends_on_its_key_alone_and_reaches_far_and_near():
    before = packs([50])
    assert torch.equal(skip_positions(before, 9999, 1, 2).positions, skip_positions(before, 9999, 1, 2).positions)
    ends = torch.tensor([int(skip_positions(before, 2**20, step).positions[-1]) for step in range(300)])
    assert (ends < 1000).float().mean() > 0.1 and (ends > 2**17).float().mean() > 0.1
    assert 0.35 < (ends < 50 * (2**20 / 50) ** 0.5).float().mean() < 0.65  # every doubling as often


def test_a_sequence_as_long_as_the_span_stays():
    assert torch.equal(skip_positions(packs([64]), 64, 0).positions, torch.arange(64))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ({"phases": (Phase(1, span=5000),)}, "phases.span.*max_position_embeddings"),
        ({"init": "nano", "tokenizer": "tokenizer.json"}, "tokenizer.*init"),
    ],
)
def test_what_cannot_be_is_named(override, named):
    with pytest.raises(ConfigError, match=named):
        Recipe(**{"out": "run", "phases": (Phase(1),), "weights": {"arithmetic": 1.0}} | override)


def test_a_run_begins_from_a_model_and_reads_far_positions(recipe, tmp_path):
    first = Recipe.load(recipe, [f"out={tmp_path / 'first'}"])
    begun, _ = load_model(run_recipe(first, ALONE) / "model", torch.float32)
    long = {"out": str(tmp_path / "second"), "init": str(tmp_path / "first" / "model")}
    second = Recipe(
        **long,
        phases=(Phase(1, "dense", span=4000), Phase(1, "sparse", span=4000)),
        weights=first.weights,
        corpus=first.corpus,
        model={"max_position_embeddings": 4096},
        row=first.row,
        rows=first.rows,
        bf16=False,
    )
    model = build_model(second, None)
    assert model.cfg.max_position_embeddings == 4096
    for name, value in begun.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)
    after, tokenizer = load_model(run_recipe(second, ALONE) / "model", torch.float32)
    assert after.cfg.max_position_embeddings == 4096 and tokenizer.vocab_size
    changed = [n for n, v in after.state_dict().items() if not torch.equal(v, begun.state_dict()[n])]
    assert any("kv_a_proj" in name for name in changed)
    with pytest.raises(ValueError, match=r"init: .* does not fit"):
        build_model(Recipe(**long, phases=(Phase(1),), weights=first.weights, model={"hidden_size": 20}), None)


def test_a_run_may_share_indexers_otherwise_than_the_model_it_begins_from(recipe, tmp_path):
    """Those that the model has are taken over, others are fresh; of all else nothing may be missing."""
    first = Recipe.load(recipe, [f"out={tmp_path / 'first'}"])
    run_recipe(first, ALONE)

    def grouped(begin: str, layers: int, **changes: int) -> Recipe:
        return Recipe(
            out=str(tmp_path / f"groups of {layers}"),
            init=str(tmp_path / begin / "model"),
            phases=(Phase(1),),
            weights=first.weights,
            corpus=first.corpus,
            model={"indexer.layers_per_indexer": layers}
            | {f"indexer.{name}": value for name, value in changes.items()},
            row=first.row,
            rows=first.rows,
            bf16=False,
        )

    run_recipe(grouped("first", 2), ALONE)
    shared, _ = load_model(tmp_path / "groups of 2" / "model", torch.float32)
    before, after = shared.state_dict(), build_model(grouped("groups of 2", 1), None).state_dict()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value)
    added = after.keys() - before.keys()
    assert added and all(".indexer." in name for name in added)
    wider, begun = build_model(grouped("groups of 2", 2, n_heads=7), None), shared.cfg.indexer.n_heads
    assert begun != 7 and wider.layers[0].self_attn.indexer.weights_proj.out_features == 7
    torch.testing.assert_close(wider.embed_tokens.weight, shared.embed_tokens.weight)
