"""Writes GGUF files the way the converters of llama.cpp do, from tiny random models of ``transformers``.

The model is changed to hold exactly what the file says, so that both sides compute with the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import PreTrainedModel

Map = Callable[[Tensor], Tensor]

SCALES = {  # where the float16 scales of a block lie, of types that the library reads and does not write
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
    Kind.IQ4_XS: (0,),
    Kind.IQ4_NL: (0,),
    Kind.IQ3_S: (0,),
    Kind.IQ2_XXS: (0,),
}
SMALL = {  # scales that give weights of unit gain over 256 inputs
    Kind.Q2_K: 0.004,
    Kind.Q3_K: 0.0014,
    Kind.Q4_K: 0.0002,
    Kind.Q5_K: 0.00009,
    Kind.Q6_K: 0.00004,
    Kind.IQ4_XS: 0.00005,
    Kind.IQ4_NL: 0.0009,
    Kind.IQ3_S: 0.0004,
    Kind.IQ2_XXS: 0.001,
}
WRITABLE = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1)
READABLE = tuple(SCALES)

# The alphabet of bytes, a few merges, and one token of each other type
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "1 2", "i m"]
MARKS = {"<|im_start|>": 3, "<|im_end|>": 3, "<think>": 4, "[PAD]": 5}


def quantized(values: Tensor, kind: Kind, rng: np.random.Generator) -> tuple[np.ndarray, Tensor]:
    """What lies in the file, and the float32 values that it stands for; these are near ``values`` if the library can
    write the type, and any values otherwise."""
    if kind in SCALES:
        block, size = GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 256, (*values.shape[:-1], values.shape[-1] // block, size), dtype=np.uint8)
        for at in SCALES[kind]:
            scale = rng.uniform(0.5, 1, raw.shape[:-1]) * SMALL[kind]
            raw[..., at : at + 2] = scale.astype("<f2")[..., None].view(np.uint8)
        raw = raw.reshape(*values.shape[:-1], -1)
    else:
        raw = gguf.quants.quantize(values.numpy(), kind)
    return raw, torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(raw, kind))).reshape(values.shape)


def turned(weight: Tensor, heads: int) -> Tensor:
    """Rows of halves (i, i + d/2) as adjacent pairs."""
    pairs = [
        head * (len(weight) // heads) + half * (len(weight) // heads // 2) + i
        for head in range(heads)
        for i in range(len(weight) // heads // 2)
        for half in (0, 1)
    ]
    return weight[pairs]


class Converter:
    """Adds the tensors of ``model`` to ``writer``, matrices in ``kinds`` by turns, vectors in float32."""

    def __init__(self, model: PreTrainedModel, writer: gguf.GGUFWriter, kinds: Sequence[Kind], seed: int = 0) -> None:
        self.state, self.config, self.writer = model.state_dict(), model.config, writer
        self.kinds, self.count = kinds, 0
        self.rng = np.random.default_rng(seed)

    def add(self, name: str, source: Tensor, forth: Map, back: Map) -> None:
        """Writes ``forth(source)`` and puts what the file says, ``back``, into ``source``."""
        values = forth(source).contiguous()
        kind = Kind.F32 if values.dim() == 1 else self.kinds[self.count % len(self.kinds)]
        if values.shape[-1] % GGML_QUANT_SIZES[kind][0]:
            kind = Kind.F16
        self.count += values.dim() > 1
        raw, held = quantized(values, kind, self.rng)
        self.writer.add_tensor(name, raw, raw_dtype=kind)
        source.copy_(back(held))

    def same(self, name: str, source: Tensor) -> None:
        self.add(name, source, lambda t: t, lambda t: t)

    def all(self, split: bool = False, fused: bool = False) -> None:
        """split: the expansions of MLA; fused: gate and up of experts in one tensor."""
        state = self.state
        self.same("token_embd.weight", state["model.embed_tokens.weight"])
        self.same("output_norm.weight", state["model.norm.weight"])
        if not self.config.tie_word_embeddings:
            self.same("output.weight", state["lm_head.weight"])
        for layer in range(self.config.num_hidden_layers):
            self.layer(f"model.layers.{layer}.", f"blk.{layer}.", split, fused)

    def layer(self, ours: str, theirs: str, split: bool, fused: bool) -> None:
        names = {name.removeprefix(ours): name for name in self.state if name.startswith(ours)}
        turn = self.config.model_type == "llama"
        for short, name in names.items():
            tensor = self.state[name]
            stem, _, suffix = short.rpartition(".")
            if suffix == "e_score_correction_bias":
                self.same(f"{theirs}exp_probs_b.bias", tensor)
            elif stem in SIMPLE:
                self.same(f"{theirs}{SIMPLE[stem]}.{suffix}", tensor)
            elif stem in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = self.config.num_attention_heads if "q_proj" in stem else self.config.num_key_value_heads
                there = (lambda t, h=heads: turned(t, h)) if turn else (lambda t: t)
                order = there(torch.arange(len(tensor)))
                target = f"{theirs}{'attn_q' if 'q_proj' in stem else 'attn_k'}.{suffix}"
                self.add(target, tensor, there, lambda t, o=order: torch.empty_like(t).index_copy_(0, o, t))
            elif stem == "self_attn.kv_b_proj":
                self.expansion(theirs, tensor, split)
            elif suffix == "gate_up_proj" and fused:
                self.same(f"{theirs}ffn_gate_up_exps.weight", tensor)
            elif suffix == "gate_up_proj":
                self.same(f"{theirs}ffn_gate_exps.weight", tensor.chunk(2, dim=1)[0])
                self.same(f"{theirs}ffn_up_exps.weight", tensor.chunk(2, dim=1)[1])
            else:
                assert short == "mlp.experts.down_proj", short
                self.same(f"{theirs}ffn_down_exps.weight", tensor)

    def expansion(self, theirs: str, tensor: Tensor, split: bool) -> None:
        if not split:
            self.same(f"{theirs}attn_kv_b.weight", tensor)
            return
        c = self.config
        heads = tensor.unflatten(0, (c.num_attention_heads, -1))
        keys, values = heads[:, : c.qk_nope_head_dim], heads[:, c.qk_nope_head_dim :]
        self.add(f"{theirs}attn_k_b.weight", keys, lambda t: t.mT, lambda t: t.mT)
        self.same(f"{theirs}attn_v_b.weight", values)


SIMPLE = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


def describe(writer: gguf.GGUFWriter, config: Any, split: bool = False) -> None:
    """The metadata of the model's shape."""
    rope = config.rope_parameters
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("yarn", "linear"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if not config.model_type.startswith("deepseek"):
        writer.add_head_count_kv(config.num_key_value_heads)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_rope_dimension_count(head_dim)
        return
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    qk, latent = config.qk_nope_head_dim + config.qk_rope_head_dim, config.kv_lora_rank + config.qk_rope_head_dim
    writer.add_head_count_kv(1 if split else config.num_attention_heads)
    writer.add_key_length(latent if split else qk)
    writer.add_value_length(config.kv_lora_rank if split else config.v_head_dim)
    if split:
        writer.add_key_length_mla(qk)
        writer.add_value_length_mla(config.v_head_dim)
    if config.q_lora_rank:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    if config.norm_topk_prob:
        writer.add_expert_weights_norm(True)
    if config.model_type == "deepseek_v3":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if config.n_group and config.n_group > 1:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)


def alphabet() -> list[str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    letters = {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]


def tokens() -> tuple[list[str], list[int]]:
    """The tokens of the test files and their types."""
    merged = [merge.replace(" ", "") for merge in MERGES]
    return [*alphabet(), *merged, *MARKS], [1] * (256 + len(MERGES)) + list(MARKS.values())


def add_tokenizer(writer: gguf.GGUFWriter, pre: str = "qwen2") -> None:
    names, types = tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(names)
    writer.add_token_types(types)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(names.index("<|im_start|>"))
    writer.add_eos_token_id(names.index("<|im_end|>"))
    writer.add_chat_template("{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def convert(
    model: PreTrainedModel, path: Path, kinds: Sequence[Kind] = WRITABLE, split: bool = False, fused: bool = False
) -> Path:
    """Writes ``model`` to ``path`` and makes it hold what the file says."""
    kind = model.config.model_type
    writer = gguf.GGUFWriter(path, "deepseek2" if kind.startswith("deepseek") else kind)
    describe(writer, model.config, split)
    add_tokenizer(writer)
    Converter(model, writer, kinds).all(split, fused)
    finish(writer)
    return path
