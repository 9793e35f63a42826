"""Whole runs on two and four processes, saves and resumption included: the same losses as on one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fourfold.train.loop import train
from fourfold.weights.checkpoint import load_model
from tests.distributed.worlds import launch
from tests.train.conftest import corpus, metrics, write_recipe  # noqa: F401

SETTINGS = ["rows=4", "save_every=3", "optimizer.kind=adamw", "optimizer.lr=3e-3"]
TWO = {
    "shard": ["parallel.dp_shard=2", "recompute=true"],
    "experts": ["parallel={dp_replicate=2, ep=2}", "optimizer.accumulate=1"],
}
FOUR = ["parallel={dp_replicate=2, dp_shard=2, ep=2}"]


@pytest.fixture(scope="module")
def recipes(corpus, tmp_path_factory) -> dict[str, Path]:  # noqa: F811
    folder = tmp_path_factory.mktemp("worlds")
    return {name: write_recipe(folder, corpus, name) for name in ("alone", "shard", "experts", "one", "four")}


@pytest.fixture(scope="module")
def runs(recipes) -> dict[str, Path]:
    """By name: one process, two in each form, and what was saved by two gone on with by one and by four."""
    train(recipes["alone"], SETTINGS)
    launch([(2, str(recipes[name]), [*SETTINGS, *form]) for name, form in TWO.items()])
    for name in ("one", "four"):
        run = recipes[name].with_suffix("")
        shutil.copytree(recipes["shard"].with_suffix(""), run)
        shutil.rmtree(run / "checkpoints" / "step-6")
        shutil.rmtree(run / "model")
    train(recipes["one"], SETTINGS)
    launch([(4, str(recipes["four"]), [*SETTINGS, *FOUR])])
    return {name: path.with_suffix("") for name, path in recipes.items()}


@pytest.mark.parametrize("name", ["shard", "experts", "one", "four"])
def test_the_number_of_processes_changes_nothing(name, runs):
    lines, wanted = metrics(runs[name]), metrics(runs["alone"])
    assert [line["step"] for line in lines] == [line["step"] for line in wanted] == [1, 2, 3, 4, 5, 6]
    for line, other in zip(lines, wanted, strict=True):
        for key in ("loss", "index_kl", "mtp_loss", "grad_norm", "index_recall", "loss_text"):
            close = pytest.approx(other[key], rel=1e-6 if key == "loss" else 1e-4) if key in other else None
            assert line.get(key) == close, (key, line["step"])
        for key in ("tokens", "positions", "skipped", "dead_experts", "max_violation"):
            assert line[key] == other[key], (key, line["step"])


@pytest.mark.parametrize("name", ["shard", "four"])
def test_a_run_of_many_processes_leaves_a_model_and_a_report(name, runs):
    model, _ = load_model(runs[name] / "model")
    alone, _ = load_model(runs["alone"] / "model")
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in alone.named_parameters()}
    assert (runs[name] / "report.html").is_file()
    state = json.loads((runs[name] / "checkpoints" / "step-6" / "state.json").read_text())
    assert set(state["progress"]["data"]["stream"]["lanes"]) == {"0", "1", "2", "3"}
