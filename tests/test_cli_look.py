"""inspect, plan and convert: presets, directories of every dialect, single files, and what is refused."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

import fourfold
from fourfold.cli import main
from fourfold.config import PRESETS, ModelConfig
from fourfold.counts import count_parameters
from tests.test_cli import refusal


def test_inspect_a_preset(capsys):
    assert main(["inspect", "v4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["params"]["total"] == 998_028_498_787
    assert found["params"]["active"] == 36_125_113_187
    assert found["params"]["by_part"]["routed_experts"] == 735_647_367_168
    assert ModelConfig.from_dict(found["config"]) == ModelConfig.preset("v4")

    assert main(["inspect", "v4"]) == 0
    table = capsys.readouterr().out
    assert "735,647,367,168" in table and "998,028,498,787" in table


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.toml")))
def test_every_preset_can_be_inspected(name, capsys):
    assert main(["inspect", name]) == 0
    shown = capsys.readouterr().out
    cfg = ModelConfig.preset(name)
    assert f"total {count_parameters(cfg)['total']:,}, active" in shown
    assert ("a sequence" in shown) == cfg.attention.is_compressed


def test_inspect_says_which_parts_the_total_leaves_out(capsys):
    outside = {"v4": "MTP, media", "v3": "MTP, router biases", "v2": "nothing", "v4.1-flash": "drafter, media"}
    for name, parts in outside.items():
        assert main(["inspect", name]) == 0
        assert f"(without {parts})" in capsys.readouterr().out


def tiny_v3() -> ModelConfig:
    """With one MTP layer."""
    smaller = {"vocab_size": 280, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 24}
    smaller |= {"attention.num_attention_heads": 2, "attention.q_lora_rank": 16, "attention.kv_lora_rank": 16}
    smaller |= {"moe.n_routed_experts": 8, "moe.moe_intermediate_size": 16, "moe.first_k_dense_replace": 1}
    return ModelConfig.preset("v3", **smaller, **{"moe.n_group": 2, "moe.topk_group": 2, "moe.num_experts_per_tok": 3})


def tiny_v4() -> ModelConfig:
    """A layer of each kind, the first of them routed by hash."""
    smaller = {"vocab_size": 280, "hidden_size": 64, "num_hidden_layers": 3, "attention.compress_ratios": [0, 4, 128]}
    smaller |= {"attention.num_attention_heads": 2, "attention.q_lora_rank": 32, "attention.head_dim": 64}
    smaller |= {"attention.qk_rope_head_dim": 16, "attention.o_groups": 2, "attention.o_lora_rank": 32}
    smaller |= {"indexer.n_heads": 2, "indexer.head_dim": 32, "moe.n_routed_experts": 8}
    return ModelConfig.preset("v4-flash", **smaller, **{"moe.moe_intermediate_size": 32, "moe.num_hash_layers": 1})


def released_directory(path: Path, kind: str, cfg: ModelConfig, dialect: str, storage: str) -> ModelConfig:
    """A directory of zeros in the formats of ``storage``."""
    import torch
    from safetensors.torch import save_file as save_tensors

    from fourfold.model.transformer import Model
    from fourfold.weights.families import FAMILIES
    from fourfold.weights.families.entries import by_disk_name, disk_shape
    from fourfold.weights.formats import encode

    family = FAMILIES[kind]
    with torch.device("meta"):
        wanted = Model(cfg).state_dict()
    pieces = by_disk_name(family.plan(cfg, dialect), {name: tuple(tensor.shape) for name, tensor in wanted.items()})
    tensors: dict[str, torch.Tensor] = {}
    for name, parts in pieces.items():
        shape, meta = disk_shape(parts), wanted[parts[0].ours]
        if not meta.is_floating_point():
            tensors[name] = torch.zeros(shape, dtype=meta.dtype)
            continue
        stored = storage if storage == "bf16" else family.tensor_format(name, storage)
        stem = name.removesuffix("weight")
        tensors |= {
            stem + suffix if name.endswith("weight") else name: tensor
            for suffix, tensor in encode(torch.zeros(shape), stored).items()
        }
    path.mkdir()
    save_tensors(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(family.to_config(cfg, dialect)))
    return cfg


@pytest.mark.parametrize("dialect", ["released", "transformers"])
def test_inspect_a_released_directory(dialect, tmp_path, capsys):
    cfg = released_directory(tmp_path / "tiny", "deepseek_v3", tiny_v3(), dialect, "fp8")
    assert main(["inspect", str(tmp_path / "tiny"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["params"] == count_parameters(cfg)
    assert (found["family"], found["dialect"], found["faults"]) == ("deepseek_v3", dialect, [])
    experts = found["params"]["by_part"]["routed_experts"]
    assert found["storage"]["routed_experts"] == {"F8_E4M3 + F32": experts}
    assert found["storage"]["embedding"] == {"BF16": 280 * 32}
    for part in ("attention", "dense_ffn", "router", "shared_experts", "norms"):
        assert sum(found["storage"][part].values()) == found["params"]["by_part"][part]
    assert any(t["name"].endswith("weight_scale_inv") for t in found["tensors"])

    assert main(["inspect", str(tmp_path / "tiny")]) == 0
    shown = capsys.readouterr().out
    assert f"(deepseek_v3, {dialect})" in shown and "F8_E4M3 + F32" in shown and "would not load" not in shown


@pytest.mark.parametrize("dialect", ["released", "transformers"])
def test_inspect_a_directory_with_packed_experts(dialect, tmp_path, capsys):
    cfg = released_directory(tmp_path / "tiny", "deepseek_v4", tiny_v4(), dialect, "fp8+fp4")
    assert main(["inspect", str(tmp_path / "tiny"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    by_part = found["params"]["by_part"]
    assert (found["family"], found["dialect"], found["faults"]) == ("deepseek_v4", dialect, [])
    assert found["params"]["total"] == count_parameters(cfg)["total"]
    assert found["storage"]["routed_experts"] == {"E2M1 + F8_E8M0": by_part["routed_experts"]}
    assert found["storage"]["shared_experts"] == {"F8_E4M3 + F8_E8M0": by_part["shared_experts"]}
    assert found["storage"]["router"]["I64"] == 280 * 6


def test_inspect_says_what_would_not_load(tmp_path, capsys):
    released_directory(tmp_path / "tiny", "deepseek_v3", tiny_v3(), "released", "bf16")
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config | {"vocab_size": 281}))
    assert main(["inspect", str(tmp_path / "tiny")]) == 0
    shown = capsys.readouterr().out
    assert "would not load: lm_head.weight has shape [280, 32], the model's is [281, 32]" in shown


def test_a_directory_without_weights_is_known_by_its_config(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(ModelConfig.preset("v4-mini").to_dict()))
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["params"] == count_parameters(ModelConfig.preset("v4-mini")) and "tensors" not in found
    assert main(["plan", str(tmp_path), "--ram", "64GiB"]) == 0


def test_a_directory_that_is_wrong_is_refused(tmp_path, capsys):
    assert "config.json" in refusal(capsys, "inspect", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert "model_type: is 'gpt2'" in refusal(capsys, "inspect", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": "wide"}))
    assert "hidden_size: must be of type int" in refusal(capsys, "plan", tmp_path)


def gguf_file(path: Path) -> ModelConfig:
    """One llama-type layer; matrices in Q8_0."""
    from gguf import GGUFWriter
    from gguf.constants import GGMLQuantizationType as Kind
    from gguf.quants import quantize

    d, heads, inner, vocabulary = 64, 2, 96, 40
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(d)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-6)
    square = {f"blk.0.attn_{part}": (d, d) for part in ("q", "k", "v", "output")}
    dense = {"blk.0.ffn_gate": (inner, d), "blk.0.ffn_up": (inner, d), "blk.0.ffn_down": (d, inner)}
    for name, shape in {"token_embd": (vocabulary, d), "output": (vocabulary, d), **square, **dense}.items():
        raw = quantize(np.zeros(shape, np.float32), Kind.Q8_0)
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=Kind.Q8_0)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(d, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shape = {"vocab_size": vocabulary, "hidden_size": d, "num_hidden_layers": 1, "intermediate_size": inner}
    gqa = {"kind": "gqa", "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": d // heads}
    return ModelConfig.from_dict({**shape, "max_position_embeddings": 128, "attention": gqa})


def test_inspect_a_gguf_file(tmp_path, capsys):
    cfg = gguf_file(tmp_path / "tiny.gguf")
    assert main(["inspect", str(tmp_path / "tiny.gguf"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["family"], found["dialect"], found["faults"]) == ("llama", "gguf", [])
    assert found["params"] == count_parameters(cfg)
    assert found["storage"]["attention"] == {"Q8_0": 4 * 64 * 64} and found["storage"]["norms"] == {"F32": 3 * 64}
    assert main(["plan", str(tmp_path / "tiny.gguf"), "--ram", "1GiB"]) == 0


def test_a_broken_gguf_file_is_refused(tmp_path, capsys):
    path = tmp_path / "broken.gguf"
    for content in (b"", b"GGUF", b"GGML" + bytes(60)):
        path.write_bytes(content)
        assert "broken.gguf" in refusal(capsys, "inspect", path)
        assert "broken.gguf" in refusal(capsys, "generate", path, "--prompt", "x")


def test_inspect_a_weights_file_reads_its_header(tmp_path, capsys):
    path = tmp_path / "weights.safetensors"
    save_file({"a.weight": np.zeros((3, 5), np.float16), "b": np.zeros(2, np.int64)}, path)
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "tensors": [
            {"name": "a.weight", "dtype": "F16", "shape": [3, 5]},
            {"name": "b", "dtype": "I64", "shape": [2]},
        ]
    }
    assert main(["inspect", str(path)]) == 0
    assert "2 tensors, 17 numbers" in capsys.readouterr().out


def test_a_huge_weights_file_is_not_read_but_for_its_header(tmp_path, capsys):
    shape = [1 << 18, 1 << 17]  # 64 GiB, a hole on disk
    size = 2 * shape[0] * shape[1]
    header = json.dumps({"x": {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}}).encode()
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    start = time.monotonic()
    assert main(["inspect", str(path), "--json"]) == 0
    assert time.monotonic() - start < 5
    assert json.loads(capsys.readouterr().out)["tensors"][0]["shape"] == shape


@pytest.mark.parametrize(
    "content", [b"", b"\x10", b"\xff" * 64, struct.pack("<Q", 3) + b"{]}", struct.pack("<Q", 1 << 40)]
)
def test_a_broken_weights_file_is_refused(content, tmp_path, capsys):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    assert "broken.safetensors: cannot be read" in refusal(capsys, "inspect", path)


def test_a_truncated_weights_file_is_refused(tmp_path, capsys):
    path = tmp_path / "cut.safetensors"
    save_file({"a": np.zeros((30, 50), np.float32)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    assert "cut.safetensors: cannot be read: it is cut off at byte" in refusal(capsys, "inspect", path)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pkl"])
def test_a_pickle_is_refused_unopened(name, tmp_path, capsys):
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert "only .safetensors and .gguf files are read" in refusal(capsys, "inspect", path)
    assert not (tmp_path / "sprung").exists()


def test_plan_as_json(capsys):
    assert main("plan v4 --quant int4 --vram 80GiB --ram 512GiB --disk 2TB --context 1048576 --json".split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True and found["limited_by"] == "ram"
    assert found["memories"][0] == {"name": "vram", "capacity": 80 * 1024**3, "bandwidth": 1000e9}
    assert found["parameters"] == 998_028_498_787


def test_plan_as_a_table_says_what_it_assumes(capsys):
    assert main("plan v4 --ram 64GiB --disk 100GB".split()) == 0
    shown = capsys.readouterr().out
    assert "does not fit" in shown and "routed experts" in shown
    assert "assumed:" in shown and "not modelled:" in shown and "50 GB/s" in shown
    assert main("plan nano --ram 1GiB --disk 0 --ram-bandwidth 10GB".split()) == 0
    shown = capsys.readouterr().out
    assert "fits; at most" in shown and "limited by reading ram" in shown and "10 GB/s" in shown


def test_plan_looks_at_this_machine_by_default(capsys):
    assert main(["plan", "nano", "--json"]) == 0
    vram, ram, disk = json.loads(capsys.readouterr().out)["memories"]
    assert vram["capacity"] == 0 and ram["capacity"] > 2**28 and disk["capacity"] > 0


def test_convert_there_and_back(tmp_path, capsys):
    import torch

    from fourfold.text.tokenizer import train_tokenizer

    cfg = released_directory(tmp_path / "tiny", "deepseek_v3", tiny_v3(), "released", "fp8")
    train_tokenizer(["a"], cfg.vocab_size).save(tmp_path / "tiny" / "tokenizer.json")
    assert main(["convert", str(tmp_path / "tiny"), str(tmp_path / "ours"), "--storage", "fp32"]) == 0
    assert f"{tmp_path / 'ours'}: native" in capsys.readouterr().out
    back = [str(tmp_path / "ours"), str(tmp_path / "theirs")]
    assert main(["convert", *back, "--family", "deepseek_v3", "--dialect", "transformers", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["path"], said["family"], said["storage"]) == (str(tmp_path / "theirs"), "deepseek_v3", "fp32")
    assert main(["inspect", str(tmp_path / "theirs"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["dialect"], found["faults"], found["params"]) == ("transformers", [], count_parameters(cfg))
    with contextlib.closing(fourfold.load(str(tmp_path / "theirs"), quant="int8")) as model:
        assert torch.equal(model.logits([0, 1]), torch.zeros(2, cfg.vocab_size))
    assert "is there already" in refusal(capsys, "convert", *back)


def test_ours_for_transformers(tmp_path, capsys):
    out = tmp_path / "nano"
    assert main(["convert", "nano", str(out), "--family", "fourfold", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "fourfold"
    importlib.import_module("fourfold.weights.hf")  # registers the class

    ids = torch.tensor([[0, 4, 65, 70]])
    got = AutoModelForCausalLM.from_pretrained(out)(ids).logits[0]
    want = fourfold.load("nano").logits(ids[0].tolist())
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert main(["convert", "nano", str(out), "--family", "fourfold"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["convert", "nano", str(tmp_path / "x"), "--family", "fourfold", "--storage", "fp8"]) == 2
