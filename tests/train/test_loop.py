"""Whole runs: they learn, stop on request, go on as if they had never stopped, and survive being killed."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fourfold.fields import ConfigError
from fourfold.model.probe import Probe
from fourfold.model.sequence import pack
from fourfold.text.tokenizer import compress_vocabulary
from fourfold.train import loop, state
from fourfold.train.loop import train, train_step
from fourfold.train.metrics import TIMED
from fourfold.train.optim import SkipStep, build_optimizers
from fourfold.train.recipe import Optimizer, Phase, Recipe
from fourfold.train.tables import RowAdam
from fourfold.weights.checkpoint import load_model
from tests.model import tiny
from tests.train.conftest import metrics, write_recipe

STEPS = 6


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    """The run directory of an uninterrupted run."""
    return train(write_recipe(tmp_path_factory.mktemp("whole"), corpus, "run"))


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def assert_same_end(run: Path, whole: Path) -> None:
    """Parameters, buffers, moments, the place in the data and the final model, to the bit."""
    last = f"checkpoints/step-{STEPS}"
    assert files(run / last) == files(whole / last)
    assert files(run / "model") == files(whole / "model")


def untimed(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k not in TIMED} for line in metrics(run)]


# ---------------------------------------------------------------- a run


def test_what_a_run_leaves(whole):
    assert {p.name for p in whole.iterdir()} >= {"recipe.json", "metrics.jsonl", "tb", "checkpoints", "model"}
    assert [p.name for p in state.checkpoints(whole)] == ["step-4", "step-6"]  # the newest two
    assert not [p for p in (whole / "checkpoints").iterdir() if p.name.startswith(".")]
    lines = metrics(whole)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert line["positions"] == 192 and line["loss"] > 0 and line["grad_norm"] > 0
        assert 0.5 < line["gain_forward"] < 2 and line["max_violation"] >= 0
    assert [("index_kl" in line, "index_recall" in line, "mtp_loss" in line) for line in lines] == (
        [(False, False, False)] * 3 + [(True, True, False)] + [(True, False, True)] * 2
    )


def test_the_model_of_a_run_loads_and_knows_its_tokenizer(whole):
    model, tokenizer = load_model(whole / "model")
    compressed = compress_vocabulary(tokenizer)
    assert model.compression.ids[: len(compressed)].tolist() == compressed
    assert model.cfg.engram.compressed_vocab_size == max(compressed) + 1
    assert model.cfg.indexer.mode == "sparse"
    assert tiny.logits(model, tiny.text(9)).isfinite().all()


def test_what_was_there_before_the_first_step_is_no_garbage():
    with loop.settled():
        assert gc.get_freeze_count() > 1000
    assert gc.get_freeze_count() == 0


def test_a_finished_run_is_left_as_it_is(whole, corpus, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    train(write_recipe(tmp_path, corpus, "run"))
    assert_same_end(run, whole)
    assert metrics(run) == metrics(whole)


# ---------------------------------------------------------------- stopping and going on


def interrupt(monkeypatch, number: signal.Signals, after: int) -> None:
    """Sends this process a signal during step ``after``."""
    real, steps = loop.train_step, iter(range(1, 100))

    def step(*args, **kwargs):
        if next(steps) == after:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", step)


@pytest.mark.parametrize(
    ("number", "after"),
    [(signal.SIGINT, 1), (signal.SIGTERM, 3), (signal.SIGINT, 4), (signal.SIGINT, 6)],
    ids=["at once", "between phases and mixtures", "after the warm-up", "at the end"],
)
def test_a_stopped_run_saves_and_goes_on_to_the_bit(number, after, whole, recipe, monkeypatch):
    run, handlers = recipe.parent / "run", (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    with monkeypatch.context() as patched:
        interrupt(patched, number, after)
        assert train(recipe) == run
    assert state.checkpoints(run)[-1].name == f"step-{after}" and not (run / "model").exists()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert train(recipe) == run
    assert_same_end(run, whole)
    assert untimed(run) == untimed(whole)


def test_a_run_stopped_after_its_last_step_ends_with_the_mode_it_was_trained_in(recipe, monkeypatch):
    short = ["phases=[{steps=2, indexer='dense'}]"]
    with monkeypatch.context() as patched:
        interrupt(patched, signal.SIGINT, 2)
        train(recipe, short)
    model, _ = load_model(train(recipe, short) / "model")
    assert model.cfg.indexer.mode == "dense"


def test_a_killed_run_goes_on_from_the_newest_complete_checkpoint(whole, recipe):
    """SIGKILL in the middle of writing step 4: step 2 is whole, and the end is that of a run never killed."""
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from fourfold.train import loop, state\n"
        "write, saves = state.write_json, iter(range(9))\n"
        "def killed(path, value):\n"
        "    if next(saves) == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    write(path, value)\n"
        "state.write_json = killed\n"
        "loop.train(Path(sys.argv[1]))\n"
    )
    run, root = recipe.parent / "run", str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", code, str(recipe)], env=environment, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    assert [p.name for p in state.checkpoints(run)] == ["step-2"]
    assert [line["step"] for line in metrics(run)][:4] == [1, 2, 3, 4]  # it was written in the background
    train(recipe)
    assert_same_end(run, whole)
    assert untimed(run) == untimed(whole)


def test_a_failed_save_leaves_the_checkpoints_as_they_were(whole, tmp_path, monkeypatch):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    model, tokenizer = load_model(run / "model")
    saves, now = state.Checkpoints(run, 1, tokenizer), state.TrainState(model, [], step=8)
    before = files(run)

    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(OSError, match="disk full"):
        saves.save(now)
        saves.wait()
    assert files(run) == before


def test_the_newest_checkpoint_is_by_number(tmp_path):
    for name in ("step-2", "step-10", "step-9", ".step-11-partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "state.json").write_text("{}")
    (tmp_path / "checkpoints" / "step-99").mkdir()  # not whole
    assert [p.name for p in state.checkpoints(tmp_path)] == ["step-2", "step-9", "step-10"]
    assert state.checkpoints(tmp_path / "nothing") == []


def test_restoring_gives_back_every_moment(whole, tmp_path):
    recipe = Recipe.load(write_recipe(tmp_path, tmp_path, "run"), [])
    _, tokenizer = load_model(whole / "model")
    model = loop.build_model(recipe, tokenizer)
    optimizers = build_optimizers(model, recipe.optimizer)
    now = state.TrainState(model, optimizers)
    state.load(whole / "checkpoints" / "step-4", now)
    assert now.step == 4 and now.data["stream"]["lanes"]["0"]["next"]["drawn"] > 0
    stored = load_file(whole / "checkpoints" / "step-4" / "optimizer.safetensors")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    restored = {
        f"{names[id(parameter)]}:{key}": torch.as_tensor(value)
        for optimizer in optimizers
        for parameter, entry in optimizer.state.items()
        for key, value in entry.items()
    }
    assert restored.keys() == stored.keys()
    assert all(torch.equal(restored[name], stored[name]) for name in stored)


# ---------------------------------------------------------------- single steps

FULL = {
    "attention.q_lora_rank": 10,
    "indexer.mode": "sparse",
    "indexer.head_dim": 8,
    "indexer.topk": 4,
    "indexer.layers_per_indexer": 1,
    "moe.n_routed_experts": 4,
    "moe.num_experts_per_tok": 2,
    "residual.kind": "mhc",
    "engram.layer_ids": [1],
    "engram.vocab_size": 101,
    "mtp.num_layers": 1,
    "initializer_range": 0.05,
}


def one_step_recipe(**values) -> Recipe:
    defaults = {
        "out": "run",
        "phases": (Phase(1),),
        "weights": {"arithmetic": 1.0},
        "bf16": False,
        "balance_weight": 1e-3,
    }
    return Recipe(**defaults | values)


@pytest.mark.parametrize(("kind", "bf16"), [("muon", False), ("adamw", False), ("muon", True)])
def test_a_few_sentences_are_learnt_by_heart(kind, bf16):
    model = tiny.model(tiny.config(**FULL))
    optimizer = Optimizer(kind=kind, lr=1e-2)
    recipe, phase = one_step_recipe(bf16=bf16, optimizer=optimizer), Phase(1, "sparse", 0.3)
    optimizers = build_optimizers(model, optimizer)
    packed = pack([tiny.text(12, seed=i) for i in range(4)])
    losses = [train_step(model, optimizers, packed, recipe, phase)["loss"] for _ in range(25)]
    assert losses[0] > 3.5 and losses[-1] < 0.5 * losses[0]


def step_once(phase: Phase, **values) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, float]]:
    """All tensors of a model before and after one step."""
    model = tiny.model(tiny.config(**FULL))
    recipe = one_step_recipe(**values)
    optimizers = build_optimizers(model, recipe.optimizer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measured = train_step(model, optimizers, pack([tiny.text(20)]), recipe, phase)
    return before, model.state_dict(), measured


def test_the_warmup_trains_the_indexers_and_nothing_else():
    before, after, measured = step_once(Phase(1, "warmup"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    indexers = {name for name in before if ".indexer." in name and not name.startswith("mtp.")}
    assert moved == indexers
    assert measured["index_kl"] > 0 and 0 < measured["index_recall"] <= 1


def test_dense_training_leaves_the_indexers_alone():
    before, after, measured = step_once(Phase(1, "dense", 0.3))
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {name for name in before if ".indexer." in name or name == "compression.ids"}
    assert "index_kl" not in measured and measured["mtp_loss"] > 0


def test_selection_biases_follow_the_loads():
    before, after, _ = step_once(Phase(1))
    speed = tiny.config(**FULL).moe.bias_update_speed
    change = after["layers.1.mlp.gate.bias"] - before["layers.1.mlp.gate.bias"]
    assert change.abs().max() == pytest.approx(speed, rel=1e-3)


def test_gradients_are_clipped(monkeypatch):
    """What the optimizers see is of the length ``clip``; what is reported is the length before."""
    seen = []

    def watch(self, closure=None):
        seen.extend(
            p.grad.to_dense().norm() for group in self.param_groups for p in group["params"] if p.grad is not None
        )

    for kind in (torch.optim.AdamW, RowAdam):
        monkeypatch.setattr(kind, "step", watch)
    _, _, measured = step_once(Phase(1), optimizer=Optimizer(clip=1e-2, kind="adamw"))
    assert measured["grad_norm"] > 0.1
    assert float(torch.stack(seen).norm()) == pytest.approx(1e-2, rel=1e-3)


def poisoned(**values):
    """A model whose loss is not finite, with what a step of it needs."""
    model = tiny.model(tiny.config(**FULL))
    with torch.no_grad():
        model.embed_tokens.weight[:, 0] = float("nan")
    recipe = one_step_recipe(**values)
    return model, build_optimizers(model, recipe.optimizer), recipe


def tensors(model, optimizers) -> dict[str, torch.Tensor]:
    """Parameters, buffers and moments, NaN as a number that compares."""
    moments = {
        f"{number} {index} {key}": torch.as_tensor(value)
        for number, optimizer in enumerate(optimizers)
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }
    return {name: t.clone().nan_to_num(7) for name, t in (model.state_dict() | moments).items()}


def assert_untouched(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("indexer", ["dense", "warmup", "sparse"])
def test_a_loss_that_is_not_finite_is_skipped_and_the_third_ends_the_run(indexer):
    model, optimizers, recipe = poisoned()
    before, guard, packed = tensors(model, optimizers), SkipStep(6.0), pack([tiny.text(20)])
    for skipped in (1, 2):
        values = train_step(model, optimizers, packed, recipe, Phase(1, indexer), guard=guard, step=skipped)
        assert values["skipped"] == skipped
    with pytest.raises(RuntimeError, match="step 3: loss nan and gradient norm nan"):
        train_step(model, optimizers, packed, recipe, Phase(1, indexer), guard=guard, step=3)
    assert_untouched(before, tensors(model, optimizers))


def test_a_gradient_that_is_not_finite_spoils_nothing():
    """The loss can be finite where its gradient is not. Moments and selection biases stay too."""
    model = tiny.model(tiny.config(**FULL))
    recipe, packed = one_step_recipe(), pack([tiny.text(20)])
    optimizers, guard = build_optimizers(model, recipe.optimizer), SkipStep(6.0)
    assert train_step(model, optimizers, packed, recipe, Phase(1), guard=guard)["skipped"] == 0
    before = tensors(model, optimizers)
    hook = model.norm.weight.register_hook(lambda grad: grad * float("nan"))
    assert train_step(model, optimizers, packed, recipe, Phase(1), guard=guard)["skipped"] == 1
    assert_untouched(before, tensors(model, optimizers))
    hook.remove()
    assert train_step(model, optimizers, packed, recipe, Phase(1), guard=guard)["skipped"] == 1  # goes on
    assert not torch.equal(before["norm.weight"], model.norm.weight)
    assert not torch.equal(before["layers.1.mlp.gate.bias"], model.layers[1].mlp.gate.bias)


def test_an_outlier_is_skipped():
    model = tiny.model(tiny.config(**FULL))
    recipe, packed = one_step_recipe(), pack([tiny.text(20)])
    optimizers, guard = build_optimizers(model, recipe.optimizer), SkipStep(6.0)
    guard.recent = [(1.0 + 0.01 * (-1) ** i, 100.0) for i in range(32)]
    before = tensors(model, optimizers)
    assert train_step(model, optimizers, packed, recipe, Phase(1), guard=guard)["skipped"] == 1
    assert_untouched(before, tensors(model, optimizers))


# ---------------------------------------------------------------- micro-batches


def gradients(micro: list, phase: Phase, balance: float) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """What the optimizer is given for a step over ``micro``, and what there is to log."""
    model, seen = tiny.model(tiny.config(**FULL | {"initializer_range": 0.1})).double(), {}
    recipe = one_step_recipe(optimizer=Optimizer(kind="adamw", clip=1e9), balance_weight=balance)
    optimizers = build_optimizers(model, recipe.optimizer)

    def note(*_):
        seen.update((name, p.grad.to_dense().clone()) for name, p in model.named_parameters() if p.grad is not None)

    optimizers[0].register_step_pre_hook(note)
    return seen, train_step(model, optimizers, micro, recipe, phase, Probe())


@pytest.mark.parametrize(
    ("phase", "balance"),
    [
        (Phase(1, "dense", 0.3), 0.0),
        (Phase(1, "dense"), 0.1),
        (Phase(1, "warmup"), 0.1),
        (Phase(1, "sparse", 0.3), 0.1),
    ],
    ids=["mtp", "balance", "warmup", "sparse and mtp"],
)
def test_micro_batches_make_one_big_batch(phase, balance):
    """Documents of unequal lengths and micro-batches of unequal size, so that a mean of means is another loss."""
    rows = [[5, 11], [16], [2, 3, 11], [9, 7]]
    documents = [[tiny.text(n, seed=10 * i + n) for n in row] for i, row in enumerate(rows)]
    whole, measured = gradients([pack(sum(documents, []), row=16)], phase, balance)
    cut = [pack(documents[0], row=16), pack(sum(documents[1:], []), row=16)]
    parts, measured_parts = gradients(cut, phase, balance)
    mean_of_means = [gradients([part], phase, balance)[0] for part in cut]
    assert parts.keys() == whole.keys() and whole
    apart = 0.0
    for name, wanted in whole.items():
        size = float(wanted.abs().max())
        torch.testing.assert_close(parts[name], wanted, rtol=0, atol=1e-5 * size + 1e-12)
        other = sum(means[name] for means in mean_of_means) / 2
        apart = max(apart, float((other - wanted).abs().max()) / (size + 1e-12))
    assert apart > 0.1
    for name in ("loss", "grad_norm", "index_kl", "index_recall", "mtp_loss", "loss_text"):
        assert measured_parts.get(name) == (pytest.approx(measured[name], rel=1e-5) if name in measured else None)


def test_a_run_with_micro_batches_counts_all_their_positions(recipe):
    run = train(recipe, ["optimizer.accumulate=2", "phases=[{steps=2}]"])
    assert [line["positions"] for line in metrics(run)] == [384, 384]


# ---------------------------------------------------------------- what a recipe switches off

OFF = {
    "plain": ["model.residual.kind=plain"],
    "hc": ["model.residual.kind=hc"],
    "mhc": ["model.residual.kind=mhc"],
    "mhc_single_pass": ["model.residual.kind=mhc_single_pass"],
    "engram": ["model.engram.layer_ids=[]"],
    "indexer": ["model.indexer.mode=off"],
    "experts": ["model.moe.n_routed_experts=0"],
    "mtp": ["model.mtp.num_layers=0"],
    "media": ["weights={arithmetic=1.0}", *(f"model.media.{m}=off" for m in ("image", "video", "audio", "vision"))],
}


@pytest.mark.parametrize("name", OFF)
def test_three_steps_of_every_variant(name, recipe):
    """One step of each mode of the indexer."""
    phases = "phases=[{steps=1}, {steps=1, indexer='warmup'}, {steps=1, indexer='sparse', mtp=0.3}]"
    run = train(recipe, [phases, "save_every=9", *OFF[name]])
    lines = metrics(run)
    assert len(lines) == 3 and all(line["loss"] > 0 and line["skipped"] == 0 for line in lines)
    model, _ = load_model(run / "model")
    has = {"gain_forward": "plain", "index_kl": "indexer", "max_violation": "experts", "mtp_loss": "mtp"}
    for metric, without in has.items():
        assert (metric in lines[-1]) == (name != without)
    assert (model.compression is None) == (name == "engram")
    assert (not model.cfg.media.modalities) == (name == "media")


def test_more_processes_than_there_are_is_refused(recipe):
    with pytest.raises(ConfigError, match="parallel.dp_shard: .* must be the number of processes, which is 1"):
        train(recipe, ["parallel.dp_shard=2"])


def test_the_smoke_recipe_needs_nothing_built(tmp_path, monkeypatch):
    monkeypatch.setenv("FOURFOLD_DATA", str(tmp_path / "nothing"))
    run = train(Path("recipes/smoke.toml"), [f"out={tmp_path / 'run'}", "phases=[{steps=2}]"])
    assert (run / "model" / "model.safetensors").is_file()
