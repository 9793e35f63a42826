"""Recipes: what they hold, what they refuse, and how the learning rate moves."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch

from fourfold.data.stream import SourceSpec
from fourfold.fields import ConfigError
from fourfold.train.loop import train
from fourfold.train.recipe import SCHEDULES, Optimizer, Parallel, Phase, Recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def made(**values) -> Recipe:
    defaults = {"out": "run", "phases": (Phase(3), Phase(2, "sparse", 0.3)), "weights": {"arithmetic": 1.0}}
    return Recipe(**defaults | values)


def test_a_recipe_is_read_with_its_overrides(recipe):
    got = Recipe.load(recipe, ["rows=3", "optimizer.kind=adamw", "model.residual.kind=plain", "model.mtp.num_layers=0"])
    assert got.rows == 3 and got.row == 192 and got.optimizer.kind == "adamw" and got.optimizer.lr == 1e-2
    assert [p.steps for p in got.phases] == [3, 1, 2] and got.steps == 6
    cfg = got.config()
    assert cfg.residual.kind == "plain" and cfg.mtp.num_layers == 0 and cfg.hidden_size == 16
    assert cfg.residual.hc_mult == 2 and cfg.media.audio is not None  # the rest is the recipe's and the preset's


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("colour=red", "colour"),
        ("optimizer.lrr=1.0", "optimizer.lrr"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ("optimizer.kind=sgd", "optimizer.kind.*muon or adamw"),
        ("optimizer.betas=[0.9]", "optimizer.betas"),
        ("optimizer.lr=0.0", "optimizer.lr"),
        ("rows=0", "rows"),
        ("rows=1.5", "rows"),
        ("row=-1", "row"),
        ("keep=0", "keep"),
        ("phases=[]", "phases"),
        ("phases=[{}]", "phases.steps"),
        ("phases=[{steps=1, indexer='sometimes'}]", "indexer.*sometimes"),
        ("phases=[{steps=1, indexer='off'}]", "indexer.*off"),
        ("phases=[{steps=1, stepz=2}]", "phases.stepz"),
        ("phases=[{steps=-1}]", "steps"),
        ("out.deeper=1", "out.deeper"),
        ("optimizer.schedule=steep", "optimizer.schedule.*linear, wsd, cosine"),
        ("optimizer.accumulate=0", "optimizer.accumulate"),
        ("optimizer.skip_sigma=0.0", "optimizer.skip_sigma"),
        ("peak_flops=-1.0", "peak_flops"),
        ("parallel.dp_shard=0", "parallel.dp_shard"),
        ("parallel.ep=2", "parallel.ep: is 2; must divide .* .1."),
        ("parallel={dp_replicate=2, dp_shard=2, ep=3}", "parallel.ep"),
        ("parallel.pp=2", "parallel.pp"),
        ("rows", "key=value"),
        ("=3", "key=value"),
    ],
)
def test_a_bad_override_is_refused_by_name(recipe, override, named):
    with pytest.raises(ConfigError, match=named):
        Recipe.load(recipe, [override])


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.hidden_sizes=3", "hidden_sizes"),
        ("model.residual.kind=loose", "residual.kind"),
        ("preset=nowhere", "nowhere"),
        ("weights.juggling=1.0", "juggling"),
        ("weights.arithmetic=-1.0", "mixture.arithmetic"),
        ("phases=[{steps=2}, {steps=1, weights={juggling=1.0}}]", "juggling"),
        ("corpus=/nowhere", "/nowhere"),
        ("tokenizer=/nowhere/tokenizer.json", "/nowhere/tokenizer.json"),
        ("row=3", "row"),
    ],
)
def test_what_cannot_run_is_refused_before_the_first_step(recipe, override, named):
    with pytest.raises(ValueError, match=named):
        train(recipe, [override])
    logged = recipe.parent / "run" / "metrics.jsonl"
    assert not logged.exists() or not logged.read_text()


def test_a_recipe_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothing.toml cannot be read"):
        Recipe.load(tmp_path / "nothing.toml", [])
    (tmp_path / "bad.toml").write_text("rows = ")
    with pytest.raises(ConfigError, match="bad.toml cannot be read"):
        Recipe.load(tmp_path / "bad.toml", [])
    (tmp_path / "few.toml").write_text('out = "x"')
    with pytest.raises(ConfigError, match="phases: is missing"):
        Recipe.load(tmp_path / "few.toml", [])


def test_phases_follow_each_other():
    recipe = made()
    assert [recipe.phase(step).indexer for step in range(6)] == ["dense"] * 3 + ["sparse"] * 2 + ["sparse"]
    assert [recipe.phase(step).mtp for step in (2, 3)] == [0.0, 0.3]


def test_a_mixture_holds_until_the_next():
    a, b, c = {"arithmetic": 1.0}, {"shapes": 1.0}, {"tones": 1.0}
    phases = (Phase(2), Phase(2, weights=b), Phase(1), Phase(2, weights=c))
    recipe = made(phases=phases, weights=a)
    assert [recipe.sources_at(step)[0].skills for step in range(7)] == [a, a, b, b, b, c, c]
    assert list(recipe.changes) == [0, 2, 5]
    assert made(phases=(Phase(1, weights=b),), weights=a).sources_at(0)[0].skills == b


def test_phases_weigh_the_sources():
    sources = (SourceSpec("jsonl", "a", name="a"), SourceSpec("jsonl", "b", name="b", weight=3.0))
    recipe = made(weights={}, sources=sources, phases=(Phase(1), Phase(1, weights={"a": 2.0})))
    assert [[source.weight for source in recipe.sources_at(step)] for step in (0, 1)] == [[1.0, 3.0], [2.0, 0.0]]
    with pytest.raises(ConfigError, match="phases.weights: c is no source"):
        made(weights={}, sources=sources, phases=(Phase(1, weights={"c": 1.0}),))
    for both in ({"sources": sources}, {"weights": {}}):
        with pytest.raises(ConfigError, match="weights: give either"):
            made(**both)


def test_a_recipe_becomes_plain_data():
    values = made().to_dict()
    assert values["phases"][1]["mtp"] == 0.3 and values["optimizer"]["betas"] == (0.9, 0.95)


def test_sizes_of_a_parallel_run():
    assert Parallel() == made().parallel and Parallel().world_size == 1
    assert Parallel(dp_replicate=2, dp_shard=3, ep=6).world_size == 6


def test_media_are_switched_off_by_a_word(recipe):
    got = Recipe.load(recipe, ["model.media.image=off", "model.media.audio=off"]).config()
    assert got.media.image is None and got.media.audio is None and got.media.video is not None


@pytest.mark.parametrize(
    ("name", "wanted"),  # warm-up of 4, 20 steps, decay over the last half, to 0.2 of the peak
    [
        ("linear", {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 10: 1.0, 15: 0.6, 20: 0.2}),
        ("wsd", {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 10: 1.0, 15: 0.6, 20: 0.2, 12.5: 0.6 + 0.4 * 0.5**0.5}),
        ("cosine", {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 12: 0.6, 20: 0.2, 8: 0.6 + 0.4 * 0.5**0.5}),
    ],
)
def test_schedules_by_hand(name, wanted):
    schedule = SCHEDULES[name]
    for step, value in wanted.items():
        assert schedule(step, 20, 4, 0.5, 0.2) == pytest.approx(value), step
    cfg = Optimizer(lr=2.0, lr_end=0.4, schedule=name, warmup_steps=4, decay_share=0.5)
    assert [cfg.lr_scale(s, 20) for s in range(21)] == [schedule(s, 20, 4, 0.5, 0.2) for s in range(21)]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("steps", "warmup", "share"), [(1, 0, 0.0), (1, 5, 1.0), (8, 8, 0.5), (8, 0, 1.0)])
def test_schedules_at_their_limits(name, steps, warmup, share):
    values = [SCHEDULES[name](step, steps, warmup, share, 0.1) for step in range(steps)]
    assert all(0 < value <= 1 for value in values)


def test_learning_rate_by_value():
    """Linear up over 4 steps, flat, linear down over the last half to lr_end."""
    cfg = Optimizer(lr=1.0, lr_end=0.2, warmup_steps=4, decay_share=0.5)
    scales = [cfg.lr_scale(step, 20) for step in range(20)]
    assert scales[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert scales[4:11] == pytest.approx([1.0] * 7)
    assert scales[11:] == pytest.approx([0.2 + 0.8 * left / 10 for left in range(9, 0, -1)])
    assert cfg.lr_scale(20, 20) == pytest.approx(0.2)


@pytest.mark.parametrize(("warmup", "share"), [(0, 0.0), (0, 1.0), (1, 0.5)])
def test_learning_rate_at_its_limits(warmup, share):
    cfg = Optimizer(lr=2.0, lr_end=0.5, warmup_steps=warmup, decay_share=share)
    scales = [cfg.lr_scale(step, 8) for step in range(8)]
    assert scales[0] == 1.0 and scales == sorted(scales, reverse=True) and scales[-1] >= 0.25
    assert (scales[-1] == 1.0) == (share == 0.0)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_that_are_shipped_are_valid(path: Path) -> None:
    overrides = [] if "init" not in tomllib.loads(path.read_text()) else ["init=nano-long"]
    got = Recipe.load(path, overrides)
    assert got.config().num_hidden_layers > 0
    assert got.phases[-1].indexer != "warmup"  # a checkpoint attends as its last step did


def test_autocast_is_the_processors_choice_unless_the_recipe_says(monkeypatch):
    cpu = torch.device("cpu")
    for has in (False, True):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda has=has: has)
        assert made().in_bf16(cpu) == (has and torch.backends.mkldnn.is_available())
        assert made(bf16=True).in_bf16(cpu) and not made(bf16=False).in_bf16(cpu)
    assert made().in_bf16(torch.device("cuda"))
