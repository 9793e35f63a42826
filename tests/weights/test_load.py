"""Released directories become models: every family, both dialects, all formats, in pieces, quantised or not."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fourfold.config import ModelConfig
from fourfold.fields import ConfigError
from fourfold.model.sequence import Document
from fourfold.model.transformer import Model
from fourfold.quant.model import quantize_model
from fourfold.text.tokenizer import train_tokenizer
from fourfold.weights import stream
from fourfold.weights.checkpoint import (
    CheckpointError,
    load_config,
    load_model,
    load_weights,
    open_source,
    read_tensors,
)
from fourfold.weights.export import export_model
from fourfold.weights.families import FAMILIES, base
from tests.model import tiny
from tests.weights.released import VOCAB, tiny_config


def text(n: int = 30) -> Document:
    return Document.text(torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist())


def equal(a: Model, b: Model) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def change(directory: Path, edit) -> Path:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


def change_config(directory: Path, **values) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return directory


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_read_bit_by_bit(name, models, directories):
    loaded, _ = load_model(directories[name])
    assert base.canonical(loaded.cfg) == base.canonical(models[name].cfg) and not loaded.training
    equal(loaded, models[name])
    assert torch.equal(tiny.logits(loaded, text()), tiny.logits(models[name], text()))
    assert load_config(directories[name]) == loaded.cfg


@pytest.mark.parametrize("name", FAMILIES)
def test_pieces_of_any_size_give_the_same(name, models, directories, monkeypatch):
    for chunk in (1, 50, 1000):
        monkeypatch.setattr(stream, "CHUNK", chunk)
        equal(
            load_weights(open_source(directories[name]), tokenizer=load_model(directories[name])[1]),
            models[name],
        )


def test_no_piece_is_larger_than_a_chunk_or_a_row(directories, monkeypatch):
    """What bounds the memory beside the final tensors."""
    monkeypatch.setattr(stream, "CHUNK", 64)
    seen, rows = [], stream.Numbers.rows
    monkeypatch.setattr(stream.Numbers, "rows", lambda *a: seen.append(rows(*a)) or seen[-1])
    load_model(directories["deepseek_v3"])
    assert seen and all(piece.numel() <= 64 or len(piece) == 1 for piece in seen)


def test_a_model_of_half_precision_keeps_its_islands_wide(directories):
    model, _ = load_model(directories["deepseek_v4"], torch.bfloat16)
    wide = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {"fn", "base", "scale", "sinks", "position_bias"}
    assert model.layers[1].mlp.gate.bias.dtype == torch.float32
    assert tiny.logits(model, text()).isfinite().all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "deepseek_v3", "deepseek_v4"])
def test_quantising_while_loading_is_quantising_after(name, kind, directories, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK", 100)
    while_loading, _ = load_model(directories[name], quant=kind)
    after = quantize_model(load_model(directories[name])[0], kind)
    equal(while_loading, after)
    assert torch.equal(tiny.logits(while_loading, text()), tiny.logits(after, text()))


@pytest.mark.parametrize("name", ["llama", "deepseek_v4"])
def test_a_bar_shows_the_progress_on_stderr(name, directories, capfd):
    load_model(directories[name], progress=True)
    out, err = capfd.readouterr()
    assert not out and "loading" in err and "100%" in err
    load_model(directories[name])
    assert capfd.readouterr() == ("", "")


def test_loaded_weights_do_not_need_their_files(copied, models):
    directory = copied("deepseek_v3")
    model, _ = load_model(directory)
    shutil.rmtree(directory)
    equal(model, models["deepseek_v3"])


def test_heads_that_predict_ahead_may_be_absent(copied, models):
    """Writers drop the layer and leave the field that counts it."""
    directory = change(copied("deepseek_v3"), lambda t: [t.pop(n) for n in list(t) if n.startswith("model.layers.3.")])
    model, _ = load_model(directory)
    assert model.mtp is None and torch.equal(tiny.logits(model, text()), tiny.logits(models["deepseek_v3"], text()))
    for name in ("deepseek_v4", "deepseek_v41"):
        directory = change(copied(name), lambda t: [t.pop(n) for n in list(t) if n.startswith("mtp.")])
        model, _ = load_model(directory)
        assert model.mtp is None and model.drafter is None
        assert torch.equal(tiny.logits(model, text()), tiny.logits(models[name], text()))


def test_copies_and_leftovers_are_ignored(copied, models):
    def leave(tensors):
        tensors["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)

    equal(load_model(change(copied("deepseek_v3"), leave))[0], models["deepseek_v3"])
    tied = change(copied("qwen2"), lambda t: t.update({"lm_head.weight": torch.ones(3)}))
    equal(load_model(tied)[0], models["qwen2"])

    def image_pad(tensors):
        tensors["image_pad"] = torch.ones(24)
        tensors["mtp.0.ffn.gate.bias_vl"] = torch.ones(4)

    equal(load_model(change(copied("deepseek_v41"), image_pad))[0], models["deepseek_v41"])


def test_our_own_directory_as_transformers_writes_it(tmp_path, models, family_tokenizer):
    from fourfold.weights.checkpoint import save_model

    save_model(tmp_path / "own", models["deepseek_v3"], family_tokenizer)
    about = {"model_type": "fourfold", "architectures": ["FourfoldForCausalLM"], "dtype": "float32", "bos_token_id": 0}
    equal(load_model(change_config(tmp_path / "own", **about))[0], models["deepseek_v3"])


# ---------------------------------------------------------------- what is refused


def test_nothing_is_allocated_for_a_model_that_is_refused(copied, monkeypatch):
    directory = change(copied("deepseek_v3"), lambda t: t.pop("model.norm.weight"))
    made = []
    monkeypatch.setattr("fourfold.weights.checkpoint.TensorSink", lambda tensor: made.append(tensor))
    with pytest.raises(CheckpointError, match="model.norm.weight is missing"):
        load_model(directory)
    assert not made


def test_all_faults_in_one_error(copied):
    def spoil(tensors):
        del tensors["model.layers.1.mlp.experts.2.up_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.7.input_layernorm.weight"] = torch.ones(24)
        tensors["lm_head.weight"] = torch.zeros(3, 5)
        tensors["model.embed_tokens.weight"][4, 5] = torch.nan
        tensors["model.layers.1.mlp.gate.e_score_correction_bias"][0] = torch.inf
        tensors["model.layers.2.mlp.experts.0.gate_proj.weight"][0, 0] = -torch.inf
        tensors["model.layers.0.self_attn.o_proj.weight"] = torch.zeros(24, 20, dtype=torch.int64)

    directory = change(copied("deepseek_v3"), spoil)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        load_model(directory)
    for words in (
        "tokenizer.json",
        "model.layers.1.mlp.experts.2.up_proj.weight is missing",
        "model.norm.weight is missing",
        "model.layers.7.input_layernorm.weight is not part of this model",
        f"lm_head.weight has shape [3, 5], the model's is [{VOCAB}, 24]",
        "model.embed_tokens.weight holds NaN or infinity",
        "model.layers.1.mlp.gate.e_score_correction_bias holds NaN or infinity",
        "model.layers.2.mlp.experts.0.gate_proj.weight holds NaN or infinity",
        "model.layers.0.self_attn.o_proj.weight: is int64",
    ):
        assert words in str(caught.value)


def test_faults_of_config_and_files_in_one_error(copied):
    directory = change_config(copied("deepseek_v3"), hidden_act="relu")
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError) as caught:
        load_model(directory)
    assert "hidden_act" in str(caught.value) and "cut off" in str(caught.value)


def test_a_long_list_of_faults_is_folded(copied):
    directory = change(copied("deepseek_v3"), lambda t: [t.pop(n) for n in list(t) if "mlp" in n and "gate" in n])
    with pytest.raises(CheckpointError) as caught:
        load_model(change(directory, lambda t: t.update({f"x{i}": torch.ones(1) for i in range(500)})))
    assert "more" in str(caught.value) and len(str(caught.value)) < 10_000


def test_the_table_of_a_hash_layer_points_at_experts(copied):
    name = "layers.0.ffn.gate.tid2eid"
    for value in (6, -1):
        directory = change(copied("deepseek_v4"), lambda t, v=value: t[name].__setitem__((3, 1), v))
        with pytest.raises(CheckpointError, match="tid2eid names experts"):
            load_model(directory)
        shutil.rmtree(directory)


def test_engram_needs_the_tokenizer_it_was_trained_with(copied):
    directory = copied("deepseek_v41")
    train_tokenizer(["other words, and more of them than before"] * 3, 280).save(directory / "tokenizer.json")
    with pytest.raises(CheckpointError, match="distinct readings"):
        load_model(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        load_model(directory)


def test_nan_in_fp8_is_found(models, family_tokenizer, tmp_path):
    directory = export_model(
        models["deepseek_v3"], family_tokenizer, tmp_path / "fp8", "deepseek_v3", storage="fp8"
    ).path
    name = "model.layers.0.self_attn.o_proj.weight"
    spoil = {name: 0x7F}

    def edit(tensors):
        raw = tensors[name].view(torch.uint8)
        raw[3, 3] = spoil[name]

    with pytest.raises(CheckpointError, match=f"{name} holds NaN"):
        load_model(change(directory, edit))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_nan_is_found_while_quantising_too(kind, copied):
    def spoil(tensors):
        tensors["model.layers.1.mlp.experts.3.down_proj.weight"][1, 1] = torch.nan
        tensors["model.layers.2.self_attn.o_proj.weight"][0, 0] = torch.inf

    with pytest.raises(CheckpointError, match="o_proj.weight holds NaN") as caught:
        load_model(change(copied("deepseek_v3"), spoil), quant=kind)
    assert "experts.3.down_proj.weight holds NaN" in str(caught.value)


def test_a_quantisation_that_is_none_is_refused(directories):
    with pytest.raises(ValueError, match="quant: 'int3'"):
        load_model(directories["llama"], quant="int3")


def test_one_file_of_our_own_format(models, family_tokenizer, tmp_path):
    from fourfold.weights.checkpoint import save_model

    model = models["llama"]
    save_model(tmp_path / "own", model, family_tokenizer)
    path = tmp_path / "own" / "model.safetensors"
    assert read_tensors(path, model, torch.float32).keys() == model.state_dict().keys()
    change(tmp_path / "own", lambda t: t.pop("norm.weight"))
    with pytest.raises(CheckpointError, match="norm.weight is missing"):
        read_tensors(path, model, torch.float32)


def test_a_family_names_what_it_is_asked_for():
    assert dataclasses.is_dataclass(FAMILIES["llama"])
    with pytest.raises(ConfigError, match="model_type"):
        FAMILIES["llama"].config({"model_type": "qwen2"})
    assert isinstance(
        FAMILIES["llama"].config(FAMILIES["llama"].to_config(tiny_config("llama"), "released")), ModelConfig
    )


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is set on what Linux counts")
def test_peak_memory_is_the_final_model_and_little_more(directories, family_tokenizer, tmp_path):
    """A file larger than what remains of it: bfloat16 on disk, int4 in memory, and never both at once."""
    import subprocess

    cfg = tiny_config(
        "llama",
        hidden_size=1024,
        intermediate_size=8192,
        num_hidden_layers=6,
        **{"attention.head_dim": 32},
    )
    model = tiny.model(cfg).bfloat16()
    directory = export_model(model, family_tokenizer, tmp_path / "big", "llama").path
    size = (directory / "model.safetensors").stat().st_size
    assert size > 300e6
    code = (
        "import resource, sys, torch\n"
        "from fourfold.weights.checkpoint import load_model\n"
        "limit = int(sys.argv[2])\n"
        "held = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmData')).split()[1]) * 1024\n"
        "load_model(sys.argv[4], quant=sys.argv[3] or None)\n"  # imports what it needs
        "resource.setrlimit(resource.RLIMIT_DATA, (held() + limit, held() + limit))\n"
        "load_model(sys.argv[1], quant=sys.argv[3] or None, dtype=torch.bfloat16)\n"
    )
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}

    def load(quant: str, limit: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", code, str(directory), str(limit), quant, str(directories["llama"])]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    own, temporaries = size * 9 // 32, 110 * 2**20  # int4 and scales; chunks and what they become
    assert own + temporaries < size
    for quant, final in (("int4", own), ("", size)):
        done = load(quant, final + temporaries)
        assert done.returncode == 0, done.stderr[-2000:]
    assert load("", size // 2).returncode != 0  # the limit is one
