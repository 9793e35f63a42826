"""A released directory that is wrong is refused with one error that names all that is wrong, and exit status 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fourfold.cli import main
from fourfold.weights.checkpoint import CheckpointError, load_model
from tests.parity import reference, released, test_released
from tests.parity.reference import make

V3, V4 = ("deepseek_v3", 0), ("deepseek_v4", 0)
Change = Callable[[dict[str, Any]], Any]


def copied(family: str, seed: int) -> Path:
    directory = reference.new_directory()
    shutil.copytree(make(family, seed).directory, directory, dirs_exist_ok=True)
    return directory


def change_config(directory: Path, change: Change) -> Path:
    path = directory / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    return directory


def change_tensors(directory: Path, change: Change, file: str = "model.safetensors") -> Path:
    tensors: dict[str, Tensor] = load_file(directory / file)
    change(tensors)
    save_file(tensors, directory / file)
    return directory


def refused(directory: Path, *said: str) -> None:
    """Every way to load the directory ends in the same error, in which all of ``said`` stands."""
    with pytest.raises(CheckpointError) as error:
        load_model(directory)
    for words in said:
        assert words in str(error.value)


def exits(directory: Path, capsys: pytest.CaptureFixture[str], command: str, *said: str) -> None:
    arguments = {"inspect": ["inspect", str(directory)], "generate": ["generate", str(directory), "--prompt", "x"]}
    assert main(arguments[command]) == 2
    out, message = capsys.readouterr()
    assert not out and message.count("\n") == 1 and message.startswith(f"fourfold {command}: ")
    assert "Traceback" not in message
    for words in said:
        assert words in message


GATE, NORM = "model.layers.1.mlp.gate.weight", "model.norm.weight"


def break_many(tensors: dict[str, Tensor]) -> None:
    del tensors["lm_head.weight"], tensors["model.layers.1.mlp.experts.1.up_proj.weight"]
    tensors["model.layers.9.input_layernorm.weight"] = torch.ones(3)
    tensors[GATE] = tensors[GATE][:, 1:].contiguous()
    tensors[NORM][0] = torch.nan
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].int()


def test_every_wrong_tensor_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Missing twice, one too many, misshapen, not a number, and whole numbers for weights: in a single error."""
    directory = change_tensors(copied(*V3), break_many)
    names = (
        "lm_head.weight",
        "model.layers.1.mlp.experts.1.up_proj.weight",
        "model.layers.9.input_layernorm.weight",
        GATE,
        NORM,
        "model.embed_tokens.weight",
    )
    refused(directory, *names)
    exits(directory, capsys, "generate", *names)


def infinite(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.self_attn.kv_b_proj.weight"][1, 1] = torch.inf


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("model.layers.0.self_attn.kv_a_layernorm.weight"), "kv_a_layernorm.weight"),
        (lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(2)}), "q_norm.weight"),
        (lambda t: t.update({NORM: t[NORM][None]}), NORM),
        (lambda t: t.update({NORM: t[NORM].to(torch.bool)}), NORM),
        (infinite, "kv_b_proj.weight"),
    ],
    ids=["missing", "extra", "misshapen", "wrong dtype", "infinite"],
)
def test_one_wrong_tensor(change: Change, said: str) -> None:
    refused(change_tensors(copied(*V3), change), said)


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
@pytest.mark.parametrize("command", ["inspect", "generate"])
def test_a_file_that_is_cut_off(size: int, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    directory = copied(*V3)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(directory, "model.safetensors")
    exits(directory, capsys, command, "model.safetensors")


def test_a_pickle_is_never_opened(capsys: pytest.CaptureFixture[str]) -> None:
    directory = copied(*V3)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    refused(directory, "pytorch_model.bin")
    exits(directory, capsys, "generate", "pytorch_model.bin")


def sharded() -> Path:
    model, more = test_released.latent("deepseek_v3")
    directory = reference.new_directory()
    released.write(directory, released.latent_rows(model, "fp8"), released.latent_config(model.config, **more))
    return directory


FIRST, SECOND = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))


def change_index(directory: Path, change: Change) -> Path:
    path = directory / "model.safetensors.index.json"
    values = json.loads(path.read_text())
    change(values["weight_map"])
    path.write_text(json.dumps(values))
    return directory


@pytest.mark.parametrize("command", ["inspect", "generate"])
@pytest.mark.parametrize("outside", ["../secret.safetensors", "/etc/passwd", "sub/../../secret.safetensors", "..\\x"])
def test_an_index_that_points_outside(outside: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    directory = change_index(sharded(), lambda index: index.update({"model.norm.weight": outside}))
    save_file({"model.norm.weight": torch.ones(144)}, directory.parent / "secret.safetensors")
    refused(directory, "model.safetensors.index.json")
    exits(directory, capsys, command, "model.safetensors.index.json")


def test_an_index_and_its_files_must_agree() -> None:
    gone = sharded()
    (gone / SECOND).unlink()
    refused(gone, SECOND)
    swapped = sharded()
    change_index(swapped, lambda index: index.update({n: {FIRST: SECOND, SECOND: FIRST}[f] for n, f in index.items()}))
    refused(swapped, FIRST)
    refused(change_index(sharded(), lambda index: index.update({"model.none.weight": FIRST})), "model.none.weight")
    broken = sharded()
    (broken / "model.safetensors.index.json").write_text('{"weight_map": [')
    refused(broken, "model.safetensors.index.json")


@pytest.mark.parametrize("scale", ["missing", "misshapen", "alone"])
def test_scales_belong_to_their_weights(scale: str) -> None:
    """fp8 without its scale is no weight, and a scale without fp8 beside it no tensor of the model."""
    directory, name = sharded(), "model.layers.0.mlp.down_proj.weight"
    for file in (FIRST, SECOND):

        def change(tensors: dict[str, Tensor], file: str = file) -> None:
            if scale == "missing" and tensors.pop(f"{name}_scale_inv", None) is not None:
                change_index(directory, lambda index: index.pop(f"{name}_scale_inv"))
            elif scale == "misshapen" and f"{name}_scale_inv" in tensors:
                tensors[f"{name}_scale_inv"] = tensors[f"{name}_scale_inv"][:1].contiguous()
            elif scale == "alone" and name in tensors:
                tensors[name] = tensors[name].bfloat16()

        change_tensors(directory, change, file)
    refused(directory, name, "scale")


@pytest.mark.parametrize("command", ["inspect", "generate"])
def test_all_faults_of_a_config_in_one_error(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    def change(values: dict[str, Any]) -> None:
        del values["kv_lora_rank"]
        values |= {"vocab_size": "many", "hidden_dropout": 0.1, "hidden_act": "relu", "attention_bias": True}

    directory = change_config(copied(*V3), change)
    faults = ("kv_lora_rank", "vocab_size", "hidden_dropout", "hidden_act", "attention_bias")
    refused(directory, *faults)
    exits(directory, capsys, command, *faults)


CONTRADICTIONS: dict[str, tuple[tuple[str, int], Change, str]] = {
    "no family": (V3, lambda v: v.update(model_type="mamba"), "mamba"),
    "no model_type": (V3, lambda v: v.pop("model_type"), "model_type"),
    "unknown rope": (V3, lambda v: v.update(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}), "longrope"),
    "two ropes": (
        V3,
        lambda v: v.update(rope_scaling={"type": "yarn", "factor": 7.0, "original_max_position_embeddings": 8}),
        "rope",
    ),
    "groups do not divide": (V3, lambda v: v.update(n_group=3), "n_group"),
    "more experts than there are": (V3, lambda v: v.update(num_experts_per_tok=100), "num_experts_per_tok"),
    "negative": (V3, lambda v: v.update(num_hidden_layers=-1), "num_hidden_layers"),
    "not a number": (V3, lambda v: v.update(rms_norm_eps="small"), "rms_norm_eps"),
    "another gate": (V3, lambda v: v.update(scoring_func="tanh"), "scoring_func"),
    "layers and kinds": (V4, lambda v: v.update(layer_types=v["layer_types"][1:]), "layer_types"),
    "unknown kind of layer": (V4, lambda v: v["layer_types"].__setitem__(0, "full_attention"), "full_attention"),
    "two schedules": (V4, lambda v: v.update(compress_ratios=[0] * len(v["layer_types"])), "compress_ratios"),
    "hash layers last": (V4, lambda v: v.update(mlp_layer_types=["moe"] * 2 + ["hash_moe"]), "mlp_layer_types"),
    "dims of rope": (V4, lambda v: v.update(qk_rope_head_dim=v["qk_rope_head_dim"] + 2), "qk_rope_head_dim"),
    "groups of heads": (V4, lambda v: v.update(o_groups=3), "o_groups"),
    "another number format": (V3, lambda v: v.update(quantization_config={"quant_method": "awq"}), "awq"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    which, change, said = CONTRADICTIONS[name]
    directory = change_config(copied(*which), change)
    refused(directory, said)
    exits(directory, capsys, "inspect", said)
    exits(directory, capsys, "generate", said)


def test_mtp_of_the_judge_is_in_its_config_alone() -> None:
    """``save_pretrained`` keeps the field and drops the tensors: there is none to load."""
    for family in ("deepseek_v3", "deepseek_v4"):
        seed = next(s for s in reference.SEEDS if make(family, s).config.num_nextn_predict_layers == 1)
        assert load_model(make(family, seed).directory)[0].mtp is None


def test_half_of_an_mtp_layer_is_refused() -> None:
    seed = next(s for s in reference.SEEDS if make("deepseek_v3", s).config.num_nextn_predict_layers == 1)
    directory, at = copied("deepseek_v3", seed), f"model.layers.{make('deepseek_v3', seed).config.num_hidden_layers}."
    change_tensors(directory, lambda t: t.update({f"{at}enorm.weight": torch.ones_like(t[NORM])}))
    refused(directory, f"{at}hnorm.weight", f"{at}eh_proj.weight")


TABLE = "model.layers.0.ffn.gate.tid2eid"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update({"model.layers.0.ffn.gate.bias": torch.zeros(6)}), "gate.bias"),
        (lambda t: t[TABLE].__setitem__((3, 0), 99), "tid2eid"),
        (lambda t: t[TABLE].__setitem__((3, 0), -1), "tid2eid"),
        (lambda t: t.update({TABLE: t[TABLE].float()}), "tid2eid"),
        (lambda t: t.pop(TABLE), "tid2eid"),
    ],
    ids=["bias", "too large", "negative", "not whole", "missing"],
)
def test_hash_layers_have_a_table_of_experts_and_no_bias(change: Change, said: str) -> None:
    seed = next(s for s in reference.SEEDS if make("deepseek_v4", s).config.mlp_layer_types[0] == "hash_moe")
    refused(change_tensors(copied("deepseek_v4", seed), change), said)
