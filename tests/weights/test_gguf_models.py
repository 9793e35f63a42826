"""Whole models in GGUF: what ours computes from the file is what ``transformers`` computes from the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Kind
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.utils import logging

from fourfold.model.sequence import Document
from fourfold.quant.model import quantize_model
from fourfold.weights.checkpoint import load_config, load_model
from fourfold.weights.gguf_view import GgufView
from fourfold.weights.tensors import CheckpointError
from tests.model import tiny
from tests.weights import gguf_files

logging.set_verbosity_error()
logging.disable_progress_bar()

BAR = 2e-5
VOCAB = len(gguf_files.tokens()[0])
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PLAIN = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
LATENT = {
    **PLAIN,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
    "rms_norm_eps": 1e-6,
}
DEEP_YARN = {"rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}}
MODELS: dict[str, tuple[type[PreTrainedModel], Any, dict[str, Any], dict[str, Any]]] = {
    # class, config class, its values, how the file is written
    "llama": (LlamaForCausalLM, LlamaConfig, PLAIN, {}),
    "llama, tied": (LlamaForCausalLM, LlamaConfig, PLAIN | {"tie_word_embeddings": True, "head_dim": 32}, {}),
    "llama, linear": (
        LlamaForCausalLM,
        LlamaConfig,
        PLAIN | {"rope_parameters": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 2.0}},
        {},
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, PLAIN, {}),
    "qwen2, yarn": (Qwen2ForCausalLM, Qwen2Config, PLAIN | {"rope_parameters": YARN}, {}),
    "qwen2, readable types": (
        Qwen2ForCausalLM,
        Qwen2Config,
        PLAIN | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2},
        {"kinds": gguf_files.READABLE},
    ),
    "v2-lite": (
        DeepseekV2ForCausalLM,
        DeepseekV2Config,
        LATENT | {"q_lora_rank": None, "topk_method": "greedy"},
        {},
    ),
    "v2": (
        DeepseekV2ForCausalLM,
        DeepseekV2Config,
        LATENT
        | DEEP_YARN
        | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5},
        {"split": True},
    ),
    "v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        LATENT | DEEP_YARN | {"n_group": 2, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
        {"split": True, "fused": True},
    ),
    "v3, without groups": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        LATENT | {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
        {"kinds": (Kind.Q8_0, Kind.F32, Kind.Q5_0)},
    ),
}


def make(name: str, path: Path, seed: int = 0) -> PreTrainedModel:
    """Writes the model to ``path``; what is returned holds the numbers of the file."""
    model_class, config_class, values, how = MODELS[name]
    config = config_class(**values)
    config._attn_implementation = config._experts_implementation = "eager"
    model = model_class(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in sorted(model.state_dict().items()):
            noise = torch.randn(tensor.shape, generator=generator)
            vector = tensor.dim() == 1
            tensor.copy_(("norm" in key) + 0.3 * noise if vector else 0.8 * noise * tensor.shape[-1] ** -0.5)
    gguf_files.convert(model, path, **how)
    return model


def ids(count: int = 40) -> torch.Tensor:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(1))


def expected(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(ids()[None]).logits[0]


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    judge = make(name, tmp_path / "a.gguf")
    wanted = expected(judge)
    assert 0.5 < wanted.abs().max() < 12
    model, tokenizer = load_model(tmp_path / "a.gguf")
    assert tokenizer.vocab_size == VOCAB
    got = tiny.logits(model, Document.text(ids().tolist()))
    assert (got - wanted).abs().max() <= BAR


@pytest.mark.parametrize("name", MODELS)
def test_tensors_by_their_released_names(tmp_path: Path, name: str) -> None:
    """Whole and by rows; experts apart, in the order of the judge's fused tensors."""
    judge = make(name, tmp_path / "a.gguf")
    view = GgufView(tmp_path / "a.gguf")
    state = dict(judge.state_dict())
    if judge.config.tie_word_embeddings:
        del state["lm_head.weight"]
    for key in [key for key in state if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        stem, fused = key.rsplit(".", 1)
        for expert, matrix in enumerate(state.pop(key)):
            parts = ("gate_proj", "up_proj") if "up" in fused else (fused,)
            for part, value in zip(parts, matrix.chunk(len(parts)), strict=True):
                state[f"{stem}.{expert}.{part}.weight"] = value
    assert sorted(view.names()) == sorted(state)
    for key, value in state.items():
        assert view.shape(key) == tuple(value.shape)
        torch.testing.assert_close(view.read(key), value, rtol=0, atol=0)
        if value.dim() == 2:
            cuts = [0, 1, len(value) // 3, len(value) // 2 + 1, len(value)]
            pieces = [view.read_rows(key, a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
            torch.testing.assert_close(torch.cat(pieces), value, rtol=0, atol=0)
        view.release(key)


def test_unturned_queries_would_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = make("llama", tmp_path / "a.gguf")
    monkeypatch.setattr(GgufView, "_turned_heads", lambda self, stem, shape: 0)
    got = tiny.logits(load_model(tmp_path / "a.gguf")[0], Document.text(ids().tolist()))
    assert (got - expected(judge)).abs().max() > 0.01


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_transformers_reads_the_same_from_the_file(tmp_path: Path, name: str) -> None:
    """Checks the writer of these tests: an independent reader of GGUF gets the judge's numbers."""
    judge = make(name, tmp_path / "a.gguf")
    found = load_gguf_checkpoint(str(tmp_path / "a.gguf"), return_tensors=True, model_to_load=judge)["tensors"]
    assert sorted(found) == sorted(judge.state_dict())
    for key, value in judge.state_dict().items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0)


def rewrite(source: Path, path: Path, tensors: dict[str, np.ndarray | None], **fields: Any) -> Path:
    """A copy with tensors and metadata exchanged; None leaves one out."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    kept = {n: f.contents() for n, f in reader.fields.items() if not n.startswith("GGUF.")} | fields
    types = {n: f.types[0] for n, f in reader.fields.items()}
    for key, value in kept.items():
        if key != "general.architecture" and value is not None:
            kind = types[key] if key not in fields and key in types else gguf.GGUFValueType.get_type(value)
            writer.add_array(key, value) if isinstance(value, list) else writer.add_key_value(key, value, kind)
    for found in reader.tensors:
        if found.name not in tensors:
            writer.add_tensor(found.name, found.data, raw_dtype=found.tensor_type)
    for key, values in tensors.items():
        if values is not None:
            writer.add_tensor(key, values)
    if "general.architecture" in fields:
        writer.kv_data[0]["general.architecture"].value = fields["general.architecture"]
    gguf_files.finish(writer)
    return path


def llama3_factors(rope: dict[str, Any], dim: int) -> np.ndarray:
    """As the converter of llama.cpp computes them, one by one."""
    factors = []
    for pair in range(dim // 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (2 * pair / dim)
        context, low, high = (
            rope[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        )
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(rope["factor"])
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def test_scaling_of_llama3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {**LLAMA3, "rope_type": "default"}
    values = PLAIN | {"head_dim": 32}
    monkeypatch.setitem(MODELS, "llama3", (LlamaForCausalLM, LlamaConfig, values | {"rope_parameters": plain}, {}))
    monkeypatch.setitem(MODELS, "judge", (LlamaForCausalLM, LlamaConfig, values | {"rope_parameters": LLAMA3}, {}))
    make("llama3", tmp_path / "plain.gguf")
    judge = make("judge", tmp_path / "unused.gguf")
    factors = llama3_factors(LLAMA3, 32)
    assert len({1.0, 8.0} & set(factors.tolist())) == 2 and len(set(factors.tolist())) > 2
    path = rewrite(tmp_path / "plain.gguf", tmp_path / "a.gguf", {"rope_freqs.weight": factors})
    assert GgufView(path).config["rope_scaling"] == {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    model, _ = load_model(path)
    got = tiny.logits(model, Document.text(ids().tolist()))
    assert (got - expected(judge)).abs().max() <= BAR
    for wrong in (factors[::-1].copy(), factors * 1.1, factors[:8], np.zeros(16, np.float32), factors * np.nan):
        with pytest.raises(CheckpointError, match="rope_freqs.weight"):
            GgufView(rewrite(tmp_path / "plain.gguf", tmp_path / "b.gguf", {"rope_freqs.weight": wrong}))
    same = rewrite(tmp_path / "plain.gguf", tmp_path / "c.gguf", {"rope_freqs.weight": np.ones(16, np.float32)})
    assert GgufView(same).config["rope_scaling"] is None


def test_config_is_that_of_the_released_model(tmp_path: Path) -> None:
    for name in MODELS:
        judge = make(name, tmp_path / f"{name}.gguf")
        judge.save_pretrained(tmp_path / name)
        ours = load_config(tmp_path / f"{name}.gguf")
        theirs = load_config(tmp_path / name)
        said = json.loads((tmp_path / name / "config.json").read_text())
        assert said["model_type"] == GgufView(tmp_path / f"{name}.gguf").config["model_type"]
        # MTP layers are not converted; V3 says that it has one
        assert ours.to_dict() | {"mtp": 0} == theirs.to_dict() | {"mtp": 0}, name


@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("name", ["qwen2", "v3"])
def test_quantised_while_loading(tmp_path: Path, name: str, quant: str) -> None:
    """Block types go through their float32 values into ours, as if the model had been loaded first."""
    judge = make(name, tmp_path / "a.gguf")
    model, _ = load_model(tmp_path / "a.gguf", quant=quant)
    wanted = quantize_model(load_model(tmp_path / "a.gguf")[0], quant).state_dict()
    got = model.state_dict()
    assert got.keys() == wanted.keys() and any(key.endswith(".codes") for key in got)
    for key, value in wanted.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=0)
    logits = tiny.logits(model, Document.text(ids().tolist()))
    assert torch.cosine_similarity(logits.flatten(), expected(judge).flatten(), dim=0) > 0.85


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dequantised_to_a_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    make("qwen2", tmp_path / "a.gguf")
    view = GgufView(tmp_path / "a.gguf")
    model, _ = load_model(tmp_path / "a.gguf", dtype=dtype)
    weight = model.state_dict()["layers.0.mlp.up_proj.weight"]
    assert weight.dtype == dtype
    torch.testing.assert_close(weight, view.read("model.layers.0.mlp.up_proj.weight").to(dtype), rtol=0, atol=0)


# ---------------------------------------------------------------- refusals


def test_architectures_that_are_not_ours(tmp_path: Path) -> None:
    make("llama", tmp_path / "a.gguf")
    path = rewrite(tmp_path / "a.gguf", tmp_path / "b.gguf", {}, **{"general.architecture": "gemma3"})
    with pytest.raises(CheckpointError, match="'gemma3'; llama, qwen2 and deepseek2"):
        load_model(path)


def test_every_fault_of_the_metadata_is_listed(tmp_path: Path) -> None:
    make("llama", tmp_path / "a.gguf")
    fields = {
        "llama.embedding_length": "wide",
        "llama.block_count": -2,
        "llama.attention.head_count_kv": [2, 4],
        "llama.expert_count": 8,
        "llama.rope.scaling.type": "longrope",
        "llama.rope.scaling.factor": 4.0,
        "llama.context_length": None,
    }
    path = rewrite(tmp_path / "a.gguf", tmp_path / "b.gguf", {}, **fields)
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    for words in (
        "llama.embedding_length is 'wide'",
        "llama.block_count is -2",
        "llama.attention.head_count_kv is a list of different values",
        "llama.expert_count",
        "'longrope'",
        "llama.context_length is missing",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "field", "value", "words"),
    [
        ("llama", "llama.block_count", 1 << 19, "block_count is 524288, there are"),
        ("llama", "llama.block_count", (1 << 31) - 1, "out of any range"),
        ("llama", "llama.embedding_length", (1 << 31) - 1, "out of any range"),
        ("llama", "llama.attention.head_count", 1 << 19, "has shape"),
        ("llama", "llama.attention.head_count", 3, "num_key_value_heads"),
        ("llama", "llama.attention.head_count", 0, "num_attention_heads"),
        ("llama", "llama.rope.dimension_count", 1 << 19, "size of a head|has shape"),
        ("llama", "llama.rope.freq_base", float("nan"), "freq_base is nan, must be finite"),
        ("llama", "llama.rope.freq_base", -1.0, "theta"),
        ("llama", "llama.rope.scaling.factor", float("inf"), "factor is inf, must be finite"),
        ("v3", "deepseek2.expert_count", 1 << 19, "expert_count is 524288, the tensors hold 8"),
        ("v3", "deepseek2.expert_count", 0, "expert_count is 0, the tensors hold 8"),
        ("v3", "deepseek2.expert_gating_func", 3, "expert_gating_func is 3"),
        ("v3", "deepseek2.expert_used_count", 9, "num_experts_per_tok"),
        ("v3", "deepseek2.attention.kv_lora_rank", 1 << 19, "has shape"),
        ("v3", "deepseek2.rope.dimension_count", 4096, "qk_nope_head_dim"),
    ],
)
def test_metadata_that_the_tensors_belie(tmp_path: Path, name: str, field: str, value: Any, words: str) -> None:
    make(name, tmp_path / "a.gguf")
    path = rewrite(tmp_path / "a.gguf", tmp_path / "b.gguf", {}, **{field: value})
    with pytest.raises(CheckpointError, match=words):
        load_model(path)


def test_sizes_per_layer_that_agree_are_one_size(tmp_path: Path) -> None:
    make("llama", tmp_path / "a.gguf")
    path = rewrite(tmp_path / "a.gguf", tmp_path / "b.gguf", {}, **{"llama.attention.head_count_kv": [2, 2]})
    assert GgufView(path).config["num_key_value_heads"] == 2


def test_tensors_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    make("v3", tmp_path / "a.gguf")
    tensors = {
        "output_norm.weight": None,
        "blk.0.attn_norm.weight": np.ones(65, np.float32),
        "blk.1.attn_v_b.weight": None,
        "blk.2.attn_qk_norm.weight": np.ones(8, np.float32),
        "surplus": np.ones(8, np.float32),
        "blk.0.ffn_norm.weight": np.full(64, np.nan, np.float32),
    }
    with pytest.raises(CheckpointError) as caught:
        load_model(rewrite(tmp_path / "a.gguf", tmp_path / "b.gguf", tensors))
    for words in (
        "model.norm.weight is missing",
        "model.layers.0.input_layernorm.weight has shape [65], the model's is [64]",
        "model.layers.1.self_attn.kv_b_proj.weight is missing",
        "blk.1.attn_k_b.weight is not part of this model",
        "blk.2.attn_qk_norm.weight is not part of this model",
        "surplus is not part of this model",
        "model.layers.0.post_attention_layernorm.weight holds NaN",
    ):
        assert words in str(caught.value)


def test_names_that_mean_the_same(tmp_path: Path) -> None:
    make("llama", tmp_path / "a.gguf")
    tensors: dict[str, np.ndarray | None] = {"model.norm.weight": np.ones(64, np.float32)}
    with pytest.raises(CheckpointError, match="is model.norm.weight, which another tensor is too"):
        GgufView(rewrite(tmp_path / "a.gguf", tmp_path / "b.gguf", tensors))
    tensors = {"blk.00.attn_norm.weight": np.ones(64, np.float32)}
    with pytest.raises(CheckpointError, match="blk.00.attn_norm.weight is not part of this model"):
        load_model(rewrite(tmp_path / "a.gguf", tmp_path / "b.gguf", tensors))


def test_expansions_in_both_forms(tmp_path: Path) -> None:
    """Some files hold them whole and split: the whole ones are read. Halves that do not fit are not read as a whole."""
    judge = make("v3", tmp_path / "a.gguf")
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    whole = torch.randn(judge.state_dict()[name].shape)
    path = rewrite(tmp_path / "a.gguf", tmp_path / "b.gguf", {"blk.0.attn_kv_b.weight": whole.numpy()})
    torch.testing.assert_close(GgufView(path).read(name), whole, rtol=0, atol=0)
    for wrong in ((4, 64), (4, 32, 64), (3, 64, 64)):
        tensors: dict[str, np.ndarray | None] = {"blk.0.attn_v_b.weight": np.ones(wrong, np.float32)}
        names = GgufView(rewrite(tmp_path / "a.gguf", tmp_path / "b.gguf", tensors)).names()
        fits = wrong == (4, 32, 64)
        assert (name in names) == fits and ("blk.0.attn_k_b.weight" in names) != fits


def test_a_cut_model_is_not_half_loaded(tmp_path: Path) -> None:
    make("qwen2", tmp_path / "a.gguf")
    whole = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "b.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=f"the file ends at offset {len(whole) // 2}, .* wants offsets"):
        load_model(tmp_path / "b.gguf")
