"""Checkpoints: whole or not at all, the same to the bit, on any number of ranks, and never unpickled."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fourfold.data.skills import SKILLS
from fourfold.train import state as states
from fourfold.train.loop import train
from fourfold.train.metrics import TIMED
from fourfold.train.recipe import Recipe
from fourfold.train.state import Checkpoints, TrainState, checkpoints, load, seed_generators
from fourfold.weights.checkpoint import CheckpointError, load_model
from tests.train.conftest import metrics, write_recipe

SMOKE = Path(__file__).parents[2] / "recipes/smoke.toml"
CALLS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")  # by which a save becomes visible

processes = multiprocessing.get_context("forkserver")  # imports once, then every child is there at once
processes.set_forkserver_preload(["fourfold.train.loop"])


# ---------------------------------------------------------------- a run that is killed


def run(recipe: Path, overrides: list[str], deadly: int) -> None:
    """Trains; dies just before the ``deadly``-th change of the file system (0: never)."""
    torch.set_num_threads(1)
    moments = iter(range(1, 10**9))

    def counted(real):
        def call(*args, **kwargs):
            if next(moments) == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    train(recipe, overrides)


def attempt(recipe: Path, overrides: list[str], deadly: int = 0, seconds: float | None = None) -> int:
    """The exit code of one process that trains, killed from within or, after ``seconds``, from outside."""
    process = processes.Process(target=run, args=(recipe, overrides, deadly))
    process.start()
    process.join(seconds)
    if seconds is not None:
        process.kill()
    process.join()
    return process.exitcode


def outcome(run: Path) -> tuple[list[dict], dict[str, bytes]]:
    """All that was logged but times, and every byte of the last checkpoint and the final model."""
    last = checkpoints(run)[-1]
    files = [p for folder in (last, run / "model") for p in folder.rglob("*") if p.is_file()]
    lines = [{k: v for k, v in line.items() if k not in TIMED} for line in metrics(run)]
    return lines, {str(p.relative_to(run)): p.read_bytes() for p in files}


def survives(recipe: Path, overrides: list[str], run: Path, whole: Path, kills: int, longest: float) -> None:
    """Kills a run ``kills`` times, by turns within a save and after up to ``longest`` seconds; then lets it end.

    One that ends before it could be killed begins anew.
    """
    rng, deaths = random.Random(0), 0
    while deaths < kills:
        if deaths % 2:
            code = attempt(recipe, overrides, seconds=rng.uniform(0.1, longest))
        else:
            code = attempt(recipe, overrides, deadly=rng.randint(5, 60))
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            assert outcome(run) == outcome(whole)
            shutil.rmtree(run)
        else:
            deaths += 1
    assert attempt(recipe, overrides) == 0
    assert outcome(run) == outcome(whole)
    assert not list((run / "checkpoints").glob(".*"))


def test_a_run_killed_at_random_moments_ends_as_if_it_never_was(corpus, tmp_path):
    overrides = ["save_every=1"]
    whole, killed = (write_recipe(tmp_path, corpus, name) for name in ("whole", "killed"))
    assert attempt(whole, overrides) == 0
    survives(killed, overrides, tmp_path / "killed", tmp_path / "whole", kills=5, longest=2.0)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_smoke_run_killed_twenty_times(corpus, tmp_path):
    whole, killed = ([f"out={tmp_path / name}", f"corpus={corpus}"] for name in ("whole", "killed"))
    began = time.monotonic()
    assert attempt(SMOKE, whole) == 0
    survives(SMOKE, killed, tmp_path / "killed", tmp_path / "whole", 20, longest=(time.monotonic() - began) / 4)


def test_the_smoke_recipe_needs_nothing_built():
    recipe = Recipe.load(SMOKE, [])
    assert not any(SKILLS[name].shards for name in recipe.weights) and Path(recipe.tokenizer).is_file()
    assert {phase.indexer for phase in recipe.phases} == {"dense", "warmup", "sparse"}
    cfg = recipe.config()
    assert cfg.residual.kind == "mhc" and cfg.engram.layer_ids and cfg.mtp.num_layers and cfg.moe.n_routed_experts


def test_the_model_in_a_checkpoint_is_a_model_like_any_other(corpus, tmp_path):
    end = train(write_recipe(tmp_path, corpus, "run"), ["phases=[{steps=2, indexer='dense'}]"])
    model, tokenizer = load_model(checkpoints(end)[-1] / "model", dtype=torch.bfloat16)
    final, _ = load_model(end / "model", dtype=torch.bfloat16)
    assert tokenizer.vocab_size == 288
    same = zip(model.state_dict().values(), final.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


# ---------------------------------------------------------------- one process, a small module


class Small(nn.Module):
    """Odd sizes, so that pieces are of unequal length or empty; a buffer; noise from every generator."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(7, 6)
        self.inner = nn.Linear(6, 5)
        self.head = nn.Linear(5, 1)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, ids: torch.Tensor, noise: float = 0.0) -> torch.Tensor:
        self.seen += 1
        y = self.inner(self.rows(ids)).tanh()
        if noise:
            y = y + noise * (torch.randn(y.shape) + float(np.random.rand()) + random.random())
        return self.head(y)[..., 0]


def made(seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    return with_optimizers(Small())


def with_optimizers(model: nn.Module) -> TrainState:
    """Moments of the shape of their parameter, steps without one."""
    adamw = torch.optim.AdamW([*model.rows.parameters(), *model.head.parameters()], lr=1e-2)
    return TrainState(model, [adamw, torch.optim.SGD(model.inner.parameters(), lr=1e-2, momentum=0.9)])


def trained(state: TrainState, steps: int, noise: float = 0.1, rank: int = 0, ranks: int = 1) -> list[float]:
    """Losses of some steps; every batch is of eight and divided between the ranks."""
    losses = []
    for _ in range(steps):
        ids = torch.arange(8).add(state.data.get("next", 0)).mul(3) % 7
        mine = ids.chunk(ranks)[rank]
        loss = (state.model(mine, noise) - torch.sin(mine.float())).square().mean()
        loss.backward()
        for optimizer in state.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        total = loss.detach() / ranks
        if ranks > 1:
            dist.all_reduce(total)
        losses.append(float(total))
        state.step, state.tokens, state.data = state.step + 1, state.tokens + 8, {"next": state.step + 1}
    return losses


def saved(run: Path, *steps: int, keep: int = 9) -> TrainState:
    """A run saved after each of ``steps``."""
    state, saves = made(), Checkpoints(run, keep)
    for step in steps:
        trained(state, step - state.step)
        saves.save(state)
    saves.wait()
    return state


def assert_same(a: TrainState, b: TrainState) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first["progress"] == second["progress"]
    assert first["tensors"].keys() == second["tensors"].keys()
    for name, tensor in first["tensors"].items():
        assert torch.equal(tensor, second["tensors"][name]), name


def test_everything_comes_back_and_goes_on_to_the_bit(tmp_path):
    seed_generators(3)
    state, saves = made(), Checkpoints(tmp_path, keep=2)
    trained(state, 3)
    state.counters = {"skipped": 2}
    saves.save(state)
    rest = trained(state, 3)
    saves.wait()
    seed_generators(4)
    again = made(seed=5)
    trained(again, 1)  # what it has done is forgotten
    assert Checkpoints(tmp_path, keep=2).resume(again) == tmp_path / "checkpoints/step-3"
    assert (again.step, again.tokens, again.data, again.counters) == (3, 24, {"next": 3}, {"skipped": 2})
    assert trained(again, 3) == rest
    assert_same(again, state)


def test_a_save_is_of_its_moment_and_waits_for_the_one_before(tmp_path, monkeypatch):
    real, go = states.save_file, threading.Event()

    def slow(tensors, path, *metadata):
        go.wait()
        real(tensors, path, *metadata)

    monkeypatch.setattr(states, "save_file", slow)
    state, saves = made(), Checkpoints(tmp_path, keep=2)
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    saves.save(state)
    assert checkpoints(tmp_path) == []  # save has returned, the files are not there
    trained(state, 1)
    threading.Timer(0.2, go.set).start()
    saves.save(state)
    assert checkpoints(tmp_path) == [tmp_path / "checkpoints/step-0"]
    saves.wait()
    stored = load_file(tmp_path / "checkpoints/step-0/model/model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in before.items())


def test_the_newest_are_kept_and_what_a_killed_save_left_is_removed(tmp_path):
    left = tmp_path / "checkpoints/.step-9.partial/model"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    saved(tmp_path, 1, 2, 3, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-2", "step-3"]


def test_nothing_is_ever_replaced(tmp_path):
    state = saved(tmp_path, 1)
    with pytest.raises(FileExistsError, match="step-1 exists"):
        Checkpoints(tmp_path, keep=2).save(state)


def test_no_checkpoint_is_no_fault(tmp_path):
    assert Checkpoints(tmp_path, keep=2).resume(made()) is None


# ---------------------------------------------------------------- files that are not as they were written


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "file", "said"),
    [
        (cut, "model/model.safetensors", "bytes of"),
        (cut, "optimizer.safetensors", "bytes of"),
        (flip, "model/model.safetensors", "checksum"),
        (flip, "rng.safetensors", "checksum"),
        (Path.unlink, "optimizer.safetensors", "optimizer.safetensors is missing"),
        (cut, "state.json", "state.json cannot be read"),
        (lambda path: path.write_text('{"progress": {}, "files": []}'), "state.json", "state.json cannot be read"),
        (lambda path: path.with_name("more.safetensors").write_bytes(b""), "state.json", "not one of its files"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(harm, file, said, tmp_path):
    state = saved(tmp_path, 2, 4)
    harm(tmp_path / "checkpoints/step-4" / file)
    with pytest.raises(CheckpointError, match=f"step-4: damaged: .*{said}"):
        load(tmp_path / "checkpoints/step-4", made(1))
    again, saves = made(1), Checkpoints(tmp_path, keep=2)
    with pytest.warns(UserWarning, match=f"step-4: damaged: .*{said}.*; going back"):
        assert saves.resume(again) == tmp_path / "checkpoints/step-2"
    assert (tmp_path / "checkpoints/step-4.damaged").is_dir()
    trained(again, 2)
    assert_same(again, state)
    saves.save(again)  # the name is free
    saves.wait()
    assert [p.name for p in checkpoints(tmp_path)] == ["step-2", "step-4"]


def test_no_whole_checkpoint_is_an_error(tmp_path):
    """To begin anew would throw away what may be saved by hand."""
    saved(tmp_path, 1)
    cut(tmp_path / "checkpoints/step-1/state.json")
    with warnings.catch_warnings(), pytest.raises(CheckpointError, match="step-1: damaged.*no checkpoint is whole"):
        warnings.simplefilter("ignore")
        Checkpoints(tmp_path, keep=2).resume(made())


def test_a_checkpoint_of_another_model_is_refused_and_left_alone(tmp_path):
    saved(tmp_path, 1)
    model = Small()
    model.head, model.more = nn.Linear(5, 2), nn.Linear(2, 2)
    del model.seen
    other = with_optimizers(model)
    kept = other.model.rows.weight.clone()
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(tmp_path, keep=2).resume(other)
    for fault in ("model/more.bias is missing", "model/seen is not in the model", "has shape (1, 5), the model's is"):
        assert fault in str(caught.value)
    assert torch.equal(other.model.rows.weight, kept) and len(checkpoints(tmp_path)) == 1


def test_a_full_disk_leaves_the_state_before(tmp_path):
    state = saved(tmp_path, 1)
    saves, kept = Checkpoints(tmp_path, keep=1), made()
    load(tmp_path / "checkpoints/step-1", kept)
    trained(state, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))  # a write past it fails as one to a full disk does
    try:
        saves.save(state)
        with pytest.raises(Exception, match="File too large"):
            saves.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-1"]
    again = made(1)
    assert saves.resume(again) == tmp_path / "checkpoints/step-1"
    assert_same(again, kept)
    saves.save(state)  # there is room again
    saves.wait()
    assert [p.name for p in checkpoints(tmp_path)] == ["step-2"]


# ---------------------------------------------------------------- never unpickled


class Bomb:
    def __reduce__(self):
        return os.abort, ()


def test_nothing_is_pickled_or_unpickled(tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("pickle")

    for module, names in ((pickle, ("dump", "load", "loads", "Unpickler")), (torch, ("load", "save"))):
        for name in names:
            monkeypatch.setattr(module, name, never)
    state = saved(tmp_path, 1)
    step = tmp_path / "checkpoints/step-1"
    files = sorted(str(p.relative_to(step)) for p in step.rglob("*") if p.is_file())
    assert files == ["model/model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"]
    again = made(1)
    load(step, again)
    assert_same(again, state)


def test_a_pickle_among_the_files_is_not_opened(tmp_path):
    """``.metadata`` is what the library's own reader unpickles first."""
    saved(tmp_path, 1)
    step = tmp_path / "checkpoints/step-1"
    for name in (".metadata", "__0_0.distcp", "model/.metadata"):
        (step / name).write_bytes(pickle.dumps(Bomb()))
    load(step, made())
    (step / "optimizer.safetensors").write_bytes(pickle.dumps(Bomb()))
    values = json.loads((step / "state.json").read_text())
    del values["files"]["optimizer.safetensors"]
    size, checksum = states.written(step, "optimizer.safetensors").size_in_bytes, 0
    values["files"]["optimizer.safetensors"] = [size, checksum]
    (step / "state.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="checksum"):
        load(step, made())
    checksum = states.written(step, "optimizer.safetensors").storage_data
    values["files"]["optimizer.safetensors"] = [size, checksum]
    (step / "state.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(step, made())


# ---------------------------------------------------------------- other numbers of ranks


def on_rank(rank: int, ranks: int, meeting: Path, run: Path, out: Path, save: bool) -> None:
    """Trains on, or from the start, for three steps, and notes the losses, what the generators say and the weights."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    torch.manual_seed(
        0 if save else 1
    )  # the same on all: without a checkpoint, weights would differ from the first run
    model = Small()
    shape, names = ((2, 2), ("replicate", "shard")) if ranks == 4 else ((ranks,), ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    if ranks > 1:
        fully_shard(model.inner, mesh=mesh)
        fully_shard(model, mesh=mesh)
    state, saves = with_optimizers(model), Checkpoints(run, keep=3)
    if save:
        trained(state, 3, 0.0, rank, ranks)
        seed_generators(10 + rank)
        saves.save(state)
    else:
        assert saves.resume(state) == run / "checkpoints/step-3"
    drawn = [float(torch.rand(1)), float(np.random.rand()), random.random()]
    losses = trained(state, 3, 0.0, rank, ranks)
    saves.wait()
    ends = Checkpoints(out, keep=1)
    ends.save(state)
    ends.wait()
    (out / f"rank-{rank}.json").write_text(json.dumps([losses, drawn]))
    dist.destroy_process_group()


def world(ranks: int, run: Path, out: Path, save: bool = False) -> tuple[list[float], list[list[float]]]:
    """Losses of a group of processes, and what was drawn on each rank."""
    out.mkdir()
    arguments = (ranks, out / "meeting", run, out, save)
    group = [processes.Process(target=on_rank, args=(rank, *arguments)) for rank in range(ranks)]
    for process in group:
        process.start()
    for process in group:
        process.join(120)
        assert process.exitcode == 0
    found = [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    return found[0][0], [drawn for _, drawn in found]


def test_saved_on_two_ranks_resumed_on_one_and_four(tmp_path):
    """Four are two replicas of two."""
    losses, drawn = world(2, tmp_path, tmp_path / "saved", save=True)
    step = tmp_path / "checkpoints/step-3"
    assert sorted(p.name for p in step.glob("optimizer*")) == [
        "optimizer-00000-of-00002.safetensors",
        "optimizer-00001-of-00002.safetensors",
    ]
    end = Path("checkpoints/step-6/model/model.safetensors")
    weights = load_file(tmp_path / "saved" / end)
    for ranks in (1, 2, 4):
        again, random_numbers = world(ranks, tmp_path, tmp_path / f"on-{ranks}")
        if ranks == 2:
            assert again == losses
        assert again == pytest.approx(losses, abs=1e-6)
        assert random_numbers == [drawn[rank % 2] for rank in range(ranks)]
        ended = load_file(tmp_path / f"on-{ranks}" / end)
        assert ended.keys() == weights.keys() and int(ended["seen"]) == 6
        for name, tensor in ended.items():
            torch.testing.assert_close(tensor, weights[name], atol=1e-6, rtol=0)
