"""A GGUF file seen as a released directory: the values of its config.json, and its tensors by their released names.

What the conversion to GGUF did is undone on the way: the rows of queries and keys that it reordered for adjacent
rotary pairs (architecture ``llama``), the expansions of MLA that it split and transposed (``deepseek2``), and the
experts that it stacked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourfold.weights.gguf import GgufFile
from fourfold.weights.tensors import CheckpointError

TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
EXPERT_NAMES = {
    "ffn_gate_exps": ("gate_proj",),
    "ffn_up_exps": ("up_proj",),
    "ffn_down_exps": ("down_proj",),
    "ffn_gate_up_exps": ("gate_proj", "up_proj"),
}
MAX_SIZE = 1 << 19  # of any width or count: nothing comes near, and products of three stay far below 64 bits
MAX_POSITIONS = 1 << 31
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3_CONTEXT, LLAMA3_LOW, LLAMA3_HIGH = 8192, 1.0, 4.0  # GGUF keeps what follows from them, not the numbers


@dataclass(frozen=True)
class Rows:
    """Rows ``start`` and on of a stored tensor. ``heads``: they were reordered for adjacent rotary pairs."""

    source: str
    shape: tuple[int, ...]
    start: int = 0
    heads: int = 0


@dataclass(frozen=True)
class SplitExpansion:
    """``kv_b_proj`` from keys stored [heads, latent, key] and values stored [heads, value, latent]."""

    keys: str
    values: str
    shape: tuple[int, ...]
    heads: int


class GgufView:
    """A tensor reader with released names. ``config``: the values of a config.json of ``model_type`` llama, qwen2,
    deepseek_v2 or deepseek_v3. Tensors that are not of the architecture keep the names of the file.

    Raises CheckpointError as :class:`GgufFile` does, and for an architecture or metadata that are not supported.
    """

    def __init__(self, path: str | Path) -> None:
        self.file = GgufFile(path)
        self.config = read_config(self.file)
        self._views: dict[str, Rows | SplitExpansion] = {}
        for name in self.file.names():
            for released, view in self._seen(name):
                if released in self._views:
                    raise CheckpointError(f"{self.file.path}: {name} is {released}, which another tensor is too")
                self._views[released] = view

    def _seen(self, name: str) -> Iterator[tuple[str, Rows | SplitExpansion]]:
        """The released tensors that a tensor of the file holds, or begins to hold."""
        shape = self.file.shape(name)
        layer, stem, suffix = _split_name(name)
        prefix = f"model.layers.{layer}."
        if name == ROPE_FACTORS and "kv_lora_rank" not in self.config:
            return  # said by config
        if stem in EXPERT_NAMES and len(shape) == 3 and shape[0] == self.config.get("n_routed_experts"):
            parts = EXPERT_NAMES[stem]
            rows = shape[1] // len(parts)
            for expert in range(shape[0]):
                for number, part in enumerate(parts):
                    released = f"{prefix}mlp.experts.{expert}.{part}.{suffix}"
                    yield released, Rows(name, (rows, shape[2]), expert * shape[1] + number * rows)
        elif stem in ("attn_k_b", "attn_v_b"):
            whole, keys, values = (f"blk.{layer}.attn_{part}_b.{suffix}" for part in ("kv", "k", "v"))
            if whole in self.file.tensors:
                return  # some files hold both forms
            halves = [self.file.tensors[half].shape for half in (keys, values) if half in self.file.tensors]
            if [len(half) for half in halves] != [3, 3] or halves[0][:2] != (halves[1][0], halves[1][2]):
                yield name, Rows(name, shape)
            elif stem == "attn_k_b":
                (heads, latent, key), value = halves[0], halves[1][1]
                expansion = SplitExpansion(keys, values, (heads * (key + value), latent), heads)
                yield f"{prefix}self_attn.kv_b_proj.{suffix}", expansion
        elif stem == "exp_probs_b":
            yield f"{prefix}mlp.gate.e_score_correction_bias", Rows(name, shape)
        elif stem in LAYER_NAMES:
            yield f"{prefix}{LAYER_NAMES[stem]}.{suffix}", Rows(name, shape, heads=self._turned_heads(stem, shape))
        else:
            yield TOP_NAMES.get(name, name), Rows(name, shape)

    def _turned_heads(self, stem: str, shape: tuple[int, ...]) -> int:
        """Heads whose rows the conversion reordered; 0 if it did not, or if they do not fit: the loader will say so."""
        if self.config["model_type"] != "llama" or stem not in ("attn_q", "attn_k"):
            return 0
        heads = int(self.config["num_attention_heads" if stem == "attn_q" else "num_key_value_heads"])
        return heads if heads and shape[0] % (2 * heads) == 0 and len(shape) <= 2 else 0

    def names(self) -> list[str]:
        return list(self._views)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._views[name].shape

    def dtype(self, name: str) -> str:
        """Of what lies in the file, e.g. ``Q4_K``; what is read is float32."""
        view = self._views[name]
        return self.file.dtype(view.source if isinstance(view, Rows) else view.keys)

    def read(self, name: str) -> Tensor:
        """float32, of the tensor's shape."""
        view = self._views[name]
        if isinstance(view, Rows) and len(view.shape) == 1:
            return self._undone(view, self.file.read(view.source))
        return self.read_rows(name, 0, math.prod(view.shape[:-1])).reshape(view.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop-1 of a tensor of two axes, float32 [stop - start, columns]."""
        view = self._views[name]
        if isinstance(view, SplitExpansion):
            size = view.shape[0] // view.heads
            first, last = start // size, -(-stop // size)
            k, v = self._heads(view.keys, first, last), self._heads(view.values, first, last)
            rows = torch.cat([k.transpose(1, 2), v], dim=1).flatten(0, 1)
            return rows[start - first * size : stop - first * size]
        if not view.heads:
            return self.file.read_rows(view.source, view.start + start, view.start + stop)
        size = view.shape[0] // view.heads
        first, last = start // size * size, -(-stop // size) * size
        return self._undone(view, self.file.read_rows(view.source, first, last))[start - first : stop - first]

    def release(self, name: str) -> None:
        """Lets the system drop the pages that the tensor was read from."""
        view = self._views[name]
        for source in (view.source,) if isinstance(view, Rows) else (view.keys, view.values):
            self.file.release(source)

    def _heads(self, name: str, first: int, last: int) -> Tensor:
        rows = self.file.shape(name)[1]
        return self.file.read_rows(name, first * rows, last * rows).unflatten(0, (-1, rows))

    def _undone(self, view: Rows, rows: Tensor) -> Tensor:
        """Whole heads whose rows are (0, 1), (2, 3), ... of rotary pairs: first halves first again."""
        if not view.heads:
            return rows
        size = view.shape[0] // view.heads
        return rows.unflatten(0, (-1, size // 2, 2)).transpose(1, 2).flatten(0, 2)


def _split_name(name: str) -> tuple[int, str, str]:
    """``blk.7.attn_q.weight`` -> 7, ``attn_q``, ``weight``; other names give no stem."""
    match = re.fullmatch(r"blk\.(0|[1-9]\d{0,5})\.(\w+)\.(weight|bias)", name)
    return (int(match[1]), match[2], match[3]) if match else (-1, "", "")


class _Metadata:
    """Fields of one architecture by name, with their types checked; collects faults."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.values, self.prefix = file.metadata, f"{architecture}."
        self.faults: list[str] = []

    def has(self, name: str) -> bool:
        return self.prefix + name in self.values

    def get(self, name: str, kind: type[Any], default: Any = None) -> Any:
        """The field, or ``default``; a fault without one. A list of equal numbers, one per layer, is one number."""
        value = self.values.get(self.prefix + name, default)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if value is None:
            self.fault(f"{name} is missing")
        elif type(value) is not kind and not (kind is float and type(value) is int):
            shown = "a list of different values" if isinstance(value, list) else repr(value)[:40]
            self.fault(f"{name} is {shown}, must be of type {kind.__name__}")
        elif kind is int and not 0 <= value <= (MAX_POSITIONS if name.endswith("context_length") else MAX_SIZE):
            self.fault(f"{name} is {value}, out of any range")
        elif kind is float and not math.isfinite(value):
            self.fault(f"{name} is {value}, must be finite")
        else:
            return kind(value)
        return kind(1)  # read on, to list every fault

    def fault(self, message: str) -> None:
        self.faults.append(self.prefix + message)


def read_config(file: GgufFile) -> dict[str, Any]:
    """The values of a released config.json. Raises CheckpointError, which lists every fault of the metadata."""
    architecture = file.metadata.get("general.architecture")
    build = {"llama": _plain, "qwen2": _plain, "deepseek2": _deepseek}.get(str(architecture))
    if build is None:
        raise CheckpointError(
            f"{file.path}: general.architecture is {architecture!r}; llama, qwen2 and deepseek2 can be loaded"
        )
    data = _Metadata(file, str(architecture))
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        data.faults.append("the tensor token_embd.weight is missing")
    config = {
        "vocab_size": embedding.shape[0] if embedding else 1,
        "hidden_size": data.get("embedding_length", int),
        "num_hidden_layers": data.get("block_count", int),
        "intermediate_size": data.get("feed_forward_length", int),
        "num_attention_heads": data.get("attention.head_count", int),
        "max_position_embeddings": data.get("context_length", int),
        "rms_norm_eps": data.get("attention.layer_norm_rms_epsilon", float),
        "rope_theta": data.get("rope.freq_base", float, 10000.0),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **build(file, data),
    }
    if config["num_hidden_layers"] > len(file.tensors):
        data.fault(f"block_count is {config['num_hidden_layers']}, there are {len(file.tensors)} tensors")
    for name in ("bos", "eos", "pad"):
        identity = file.metadata.get(f"tokenizer.ggml.{'padding' if name == 'pad' else name}_token_id")
        if isinstance(identity, int):
            config[f"{name}_token_id"] = identity
    if data.faults:
        raise CheckpointError(*(f"{file.path}: {fault}" for fault in dict.fromkeys(data.faults)))
    return config


def _plain(file: GgufFile, data: _Metadata) -> dict[str, Any]:
    """The transformers of types llama and qwen2."""
    heads = max(data.get("attention.head_count", int), 1)
    head_dim = data.get("embedding_length", int) // heads
    head_dim = data.get("attention.key_length", int, data.get("rope.dimension_count", int, head_dim))
    if data.has("expert_count") and data.get("expert_count", int):
        data.fault("expert_count: experts are read of deepseek2 only")
    for name in ("rope.dimension_count", "attention.value_length"):
        if (size := data.get(name, int, head_dim)) != head_dim:
            data.fault(f"{name} is {size}, must equal the size of a head ({head_dim})")
    scaling = _rope_scaling(data)
    if ROPE_FACTORS in file.tensors:
        scaling = _llama3_scaling(file, data, head_dim)
    return {
        "architectures": ["Qwen2ForCausalLM" if data.prefix == "qwen2." else "LlamaForCausalLM"],
        "model_type": data.prefix[:-1],
        "num_key_value_heads": data.get("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "rope_scaling": scaling,
        **({} if data.prefix == "qwen2." else {"attention_bias": "blk.0.attn_q.bias" in file.tensors}),
    }


def _deepseek(file: GgufFile, data: _Metadata) -> dict[str, Any]:
    rope = data.get("rope.dimension_count", int)
    # files that split the expansions describe the attention in latent space, and the heads beside it
    beside = "_mla" if data.has("attention.key_length_mla") else ""
    gating = data.get("expert_gating_func", int, 1)  # files without it are V2's
    if gating not in (1, 2):
        data.fault(f"expert_gating_func is {gating}; 1 (softmax) and 2 (sigmoid) are known")
    experts = data.get("expert_count", int, 0)
    stacks = {i.shape[0] for n, i in file.tensors.items() if _split_name(n)[1] in EXPERT_NAMES}
    if stacks - {experts} or (experts and not stacks):
        data.fault(f"expert_count is {experts}, the tensors hold {' or '.join(map(str, sorted(stacks))) or 'none'}")
    groups = data.get("expert_group_count", int, 1) or 1
    v3 = gating == 2
    scaling = _rope_scaling(data)
    if scaling and scaling["type"] == "yarn":
        # the file holds a tenth of it; cosines and sines keep their length
        sharpening = round(10 * data.get("rope.scaling.yarn_log_multiplier", float, 0.0), 6)
        scaling |= {"mscale_all_dim": sharpening, "attention_factor": 1.0}
    return {
        "architectures": ["DeepseekV3ForCausalLM" if v3 else "DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v3" if v3 else "deepseek_v2",
        "num_key_value_heads": data.get("attention.head_count", int),
        "q_lora_rank": data.get("attention.q_lora_rank", int, 0) or None,
        "kv_lora_rank": data.get("attention.kv_lora_rank", int),
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": data.get(f"attention.key_length{beside}", int) - rope,
        "v_head_dim": data.get(f"attention.value_length{beside}", int),
        "attention_bias": False,
        "rope_scaling": scaling,
        "n_routed_experts": experts or None,
        "n_shared_experts": data.get("expert_shared_count", int, 0) or None,
        "num_experts_per_tok": data.get("expert_used_count", int, 0) or None,
        "moe_intermediate_size": data.get("expert_feed_forward_length", int),
        "first_k_dense_replace": data.get("leading_dense_block_count", int, 0),
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid" if v3 else "softmax",
        "topk_method": "noaux_tc" if v3 else "group_limited_greedy" if groups > 1 else "greedy",
        "n_group": groups,
        "topk_group": data.get("expert_group_used_count", int, 1) or 1,
        "norm_topk_prob": data.get("expert_weights_norm", bool, False),
        "routed_scaling_factor": data.get("expert_weights_scale", float, 1.0) or 1.0,
    }


def _rope_scaling(data: _Metadata) -> dict[str, Any] | None:
    kind = data.get("rope.scaling.type", str, "none")
    factor = data.get("rope.scaling.factor", float, 1.0)
    if kind == "none" or factor in (0.0, 1.0):
        return None
    if kind == "linear":
        return {"type": "linear", "factor": factor}
    if kind != "yarn":
        data.fault(f"rope.scaling.type is {kind!r}; none, linear and yarn are known")
        return None
    length = data.get("rope.scaling.attn_factor", float, 1.0) * (0.1 * math.log(max(factor, 1.0)) + 1.0)
    return {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": data.get("rope.scaling.original_context_length", int),
        "beta_fast": data.get("rope.scaling.yarn_beta_fast", float, 32.0),
        "beta_slow": data.get("rope.scaling.yarn_beta_slow", float, 1.0),
        "attention_factor": length,
    }


def _llama3_scaling(file: GgufFile, data: _Metadata, head_dim: int) -> dict[str, Any] | None:
    """The scaling of Llama 3 that gives the divisors of the frequencies in ``rope_freqs.weight``."""
    stored = file.read(ROPE_FACTORS)
    if stored.shape != (head_dim // 2,):
        data.faults.append(f"{ROPE_FACTORS} has shape {list(stored.shape)}, must have {head_dim // 2} numbers")
        return None
    factor = round(float(stored.max()), 4)
    theta = data.get("rope.freq_base", float, 10000.0)
    wavelengths = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = ((LLAMA3_CONTEXT / wavelengths - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth) if factor >= 1 else torch.full_like(smooth, math.nan)
    if not torch.allclose(stored.double(), expected, rtol=1e-3):
        data.faults.append(
            f"{ROPE_FACTORS} is no scaling of Llama 3 (low_freq_factor {LLAMA3_LOW:g}, high_freq_factor "
            f"{LLAMA3_HIGH:g}, original context {LLAMA3_CONTEXT})"
        )
        return None
    if factor == 1:
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": LLAMA3_CONTEXT,
    }
