"""Model directories: written whole, read back bit by bit, refused with every fault in one error."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fourfold.model.transformer import Model
from fourfold.text.tokenizer import Tokenizer, train_tokenizer
from fourfold.weights.checkpoint import (
    CheckpointError,
    atomic_directory,
    load_config,
    load_model,
    resolve,
    save_model,
    write_json,
)
from tests.model import tiny

SIZE = 300
CFG = tiny.config(
    vocab_size=SIZE,
    media=tiny.MEDIA,
    **{
        "attention.q_lora_rank": 10,
        "indexer.mode": "sparse",
        "indexer.head_dim": 8,
        "moe.n_routed_experts": 4,
        "moe.num_experts_per_tok": 2,
        "residual.kind": "mhc",
        "engram.layer_ids": [1],
        "engram.vocab_size": 101,
        "engram.compressed_vocab_size": 50,
        "mtp.num_layers": 1,
    },
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 3, 290)


@pytest.fixture(scope="module")
def model() -> Model:
    made = tiny.model(CFG)
    made.compression.ids.copy_(torch.randint(0, 50, (SIZE,)))
    return made


@pytest.fixture(scope="module")
def saved(model, tokenizer, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "model"
    save_model(directory, model, tokenizer)
    return directory


@pytest.fixture
def directory(saved, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change_tensors(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


# ---------------------------------------------------------------- round trips


def test_what_is_saved_is_loaded_bit_by_bit(saved, model, tokenizer):
    loaded, its_tokenizer = load_model(saved)
    assert loaded.cfg == model.cfg and not loaded.training
    assert its_tokenizer.backend.to_str() == tokenizer.backend.to_str()
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]), name
    assert torch.equal(tiny.logits(loaded, tiny.text(20)), tiny.logits(model, tiny.text(20)))
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_random_configurations_survive(tokenizer, tmp_path):
    for seed in range(8):
        made = tiny.model(tiny.random_config(seed).replace(vocab_size=SIZE), seed)
        save_model(tmp_path / str(seed), made, tokenizer)
        loaded, _ = load_model(tmp_path / str(seed))
        assert loaded.cfg == made.cfg
        assert torch.equal(tiny.logits(loaded, tiny.text(9)), tiny.logits(made, tiny.text(9)))


def test_storage_in_bfloat16(model, tokenizer, tmp_path):
    """Parameters are rounded once; the float32 islands, the biases that choose and the map of ids keep their types."""
    save_model(tmp_path / "half", model, tokenizer, torch.bfloat16)
    on_disk = load_file(tmp_path / "half" / "model.safetensors")
    parameters = dict(model.named_parameters())

    def rounded(name: str) -> bool:
        return name in parameters and not name.endswith(("_residual.fn", ".base", ".scale", "collapse.fn"))

    for name, tensor in model.state_dict().items():
        assert on_disk[name].dtype == (torch.bfloat16 if rounded(name) else tensor.dtype), name
    wide, _ = load_model(tmp_path / "half")
    assert all(p.dtype == torch.float32 for p in wide.parameters())
    for name, p in wide.named_parameters():
        assert torch.equal(p, parameters[name].bfloat16().float() if rounded(name) else parameters[name]), name
    half, _ = load_model(tmp_path / "half", torch.bfloat16)
    for name, p in half.named_parameters():
        assert p.dtype == (torch.bfloat16 if rounded(name) else torch.float32), name
    assert half.layers[1].mlp.gate.bias.dtype == torch.float32 and half.compression.ids.dtype == torch.int64
    assert tiny.logits(half, tiny.text(9)).isfinite().all()
    save_model(tmp_path / "again", half, tokenizer)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "half" / "model.safetensors"
    ).read_bytes()


def test_loaded_weights_do_not_need_the_file_any_more(directory, model):
    loaded, _ = load_model(directory)
    shutil.rmtree(directory)
    assert torch.equal(tiny.logits(loaded, tiny.text(5)), tiny.logits(model, tiny.text(5)))


# ---------------------------------------------------------------- refusals


def test_every_fault_of_the_tensors_is_listed(directory):
    def spoil(tensors):
        del tensors["norm.weight"], tensors["layers.0.mlp.up_proj.weight"]
        tensors["surplus"] = torch.zeros(1)
        tensors["lm_head.weight"] = torch.zeros(3, 5)
        tensors["embed_tokens.weight"][4, 5] = float("nan")
        tensors["layers.1.mlp.gate.bias"][0] = float("inf")

    change_tensors(directory, spoil)
    with pytest.raises(CheckpointError) as caught:
        load_model(directory)
    for fault in (
        "norm.weight is missing",
        "layers.0.mlp.up_proj.weight is missing",
        "surplus is not part of this model",
        f"lm_head.weight has shape [3, 5], the model's is [{SIZE}, 24]",
        "embed_tokens.weight holds NaN or infinity",
        "layers.1.mlp.gate.bias holds NaN or infinity",
    ):
        assert fault in str(caught.value)
    assert str(directory) in str(caught.value)


def test_a_wrong_tokenizer_and_wrong_tensors_are_one_error(directory):
    train_tokenizer(["more words than this model can ever know, each of them twice " * 2] * 3, 320).save(
        directory / "tokenizer.json"
    )
    change_tensors(directory, lambda tensors: tensors.pop("norm.weight"))
    with pytest.raises(CheckpointError) as caught:
        load_model(directory)
    assert f"vocab_size is {SIZE}" in str(caught.value) and "norm.weight is missing" in str(caught.value)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused(directory, keep):
    path = directory / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(CheckpointError, match="model.safetensors: cannot be read"):
        load_model(directory)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(directory, name):
    (directory / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_model(directory)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_file_of_something_else_is_refused(directory, name):
    (directory / name).write_bytes(b"\x80\x04 this is no such file")
    with pytest.raises(CheckpointError, match=name):
        load_model(directory)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b'{"hidden_size": 3}', b"[" * 100_000],
    ids=["empty", "cut", "list", "null", "binary", "no fields", "too few", "deep"],
)
def test_a_config_that_is_none_is_refused(directory, content):
    (directory / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="config.json"):
        load_model(directory)


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", -1), ("hidden_size", "24"), ("colour", "red"), ("residual", {"kind": "loose"}), ("moe", 3)],
)
def test_a_config_with_a_bad_field_names_it(directory, field, value):
    values = json.loads((directory / "config.json").read_text())
    write_json(directory / "config.json", values | {field: value})
    with pytest.raises(CheckpointError, match=field):
        load_model(directory)


def test_a_config_of_another_model_lists_the_shapes(directory):
    values = json.loads((directory / "config.json").read_text())
    write_json(directory / "config.json", values | {"intermediate_size": 40})
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.down_proj.weight has shape \[24, 32\].*gate_proj"):
        load_model(directory)


@pytest.mark.parametrize("keep", [272, 285])
def test_a_smaller_tokenizer_is_fine(directory, keep):
    train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 3, keep).save(directory / "tokenizer.json")
    assert load_model(directory)[1].vocab_size == keep


# ---------------------------------------------------------------- names


def test_resolving_a_name(directory, tmp_path, monkeypatch):
    assert resolve(str(directory)) == directory
    with pytest.raises(CheckpointError, match="'no-such-model' is neither bundled"):
        resolve("no-such-model")
    with pytest.raises(CheckpointError):
        resolve(str(tmp_path / "nothing"))
    monkeypatch.setattr("fourfold.weights.checkpoint.BUNDLED", tmp_path)
    assert resolve("model") == directory
    with pytest.raises(CheckpointError, match=r"bundled \(model\)"):
        resolve("other")


def test_a_directory_given_as_text(directory):
    assert load_config(str(directory)) == CFG
    assert load_model(str(directory))[0].cfg == CFG


# ---------------------------------------------------------------- whole or not at all


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    for interruption in (KeyboardInterrupt, OSError):
        with pytest.raises(interruption):
            with atomic_directory(tmp_path / "deep" / "model") as partial:
                (partial / "half").write_text("x")
                raise interruption
    assert list((tmp_path / "deep").iterdir()) == []


def test_an_interrupted_writer_leaves_the_old_one(tmp_path):
    path = tmp_path / "model"
    with atomic_directory(path) as partial:
        (partial / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with atomic_directory(path) as partial:
            (partial / "new").write_text("new")
            raise KeyboardInterrupt
    assert [p.name for p in path.iterdir()] == ["old"] and list(tmp_path.iterdir()) == [path]


def test_a_directory_is_replaced_whole(tmp_path):
    path = tmp_path / "model"
    for name in ("first", "second"):
        with atomic_directory(path) as partial:
            assert not (partial / "first").exists()
            (partial / name).write_text(name)
    assert [p.name for p in path.iterdir()] == ["second"] and list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("fault", [OSError("disk full"), KeyboardInterrupt("now")], ids=["full", "interrupted"])
def test_a_failed_replacement_leaves_the_old_one(tmp_path, monkeypatch, fault):
    path = tmp_path / "model"
    with atomic_directory(path) as partial:
        (partial / "old").write_text("old")
    rename, faults = Path.rename, [fault]

    def failing(self, target):
        if Path(target) == path and faults:
            raise faults.pop()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(type(fault), match=str(fault)):
        with atomic_directory(path) as partial:
            (partial / "new").write_text("new")
    assert [p.name for p in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_the_old_model(directory, model, tokenizer):
    """SIGKILL while the tensors are written: what stands there still loads."""
    before = {p.name: p.read_bytes() for p in directory.iterdir()}
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from fourfold.weights import checkpoint\n"
        "model, tokenizer = checkpoint.load_model(Path(sys.argv[1]))\n"
        "write = checkpoint.save_file\n"
        "def killed(tensors, path):\n"
        "    write(tensors, path)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "checkpoint.save_file = killed\n"
        "model.norm.weight.data.zero_()\n"
        "checkpoint.save_model(Path(sys.argv[1]), model, tokenizer)\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code, str(directory)], env=os.environ | {"PYTHONPATH": root})
    assert done.returncode == -9
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == before
    assert torch.equal(load_model(directory)[0].norm.weight, model.norm.weight)


def test_json_is_replaced_at_once(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
