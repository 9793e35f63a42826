"""DeepSeek-V2-Lite with random weights, as our quantised model and as the GGUF file of the same shape for llama.cpp.

Fewer experts are stored than the 64 released ones, so that a laptop holds them; a token still reads six of them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, ExpertGatingFuncType, GGMLQuantizationType, GGUFWriter
from torch import Tensor, nn

from fourfold.config import ModelConfig
from fourfold.model.cache import Cache, PagePool, SequenceState
from fourfold.model.transformer import Model
from fourfold.ops.cpu.buffers import huge_empty
from fourfold.quant.model import prepare, quantizable
from fourfold.quant.modules import QuantizedWeight, pack
from fourfold.serve.batch import pack_step

EXPERTS, CONTEXT, SIZE = 16, 16384, 0.02  # SIZE: of a weight, roughly
FORMATS = {"int4": GGMLQuantizationType.Q4_0, "int8": GGMLQuantizationType.Q8_0}


def config(layers: int) -> ModelConfig:
    changes = {"num_hidden_layers": layers, "moe.n_routed_experts": EXPERTS, "max_position_embeddings": CONTEXT}
    return ModelConfig.preset("v2-lite", **changes)


def tiled(shape: tuple[int, ...], numbers: Tensor) -> Tensor:
    """A few random numbers over and over, which times as many different ones do."""
    out = torch.empty(shape, dtype=numbers.dtype)
    flat = out.view(-1)
    for start in range(0, len(flat), len(numbers)):
        flat[start : start + len(numbers)] = numbers[: len(flat) - start]
    return out


def lite(kind: str, layers: int, expansions: torch.dtype = torch.bfloat16) -> Model:
    """All matrices as int4 or int8 codes, head included; W_UK and W_UV in ``expansions``, the rest in float32."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = Model(config(layers))
    prepare(model, kind, torch.float32, "cpu", only=quantizable(model, head=True))
    codes = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8, generator=generator)
    normal = torch.randn(1 << 16, generator=generator) * SIZE
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            module.codes.copy_(tiled(tuple(module.codes.shape), codes).view(module.codes.dtype))
            module.scales.fill_(SIZE / (8 if kind == "int4" else 127))
            continue
        for child, parameter in list(module.named_parameters(recurse=False)):
            made = torch.ones(parameter.shape) if "norm" in name else tiled(tuple(parameter.shape), normal)
            made = made.to(expansions) if "kv_b_proj" in name else made
            setattr(module, child, nn.Parameter(made, requires_grad=False))
        for child, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                setattr(module, child, torch.zeros(buffer.shape, dtype=buffer.dtype))
    pack(model)
    return model.eval()


def bytes_per_token(model: Model, context: int) -> int:
    """What decoding one token has to read: every matrix once, of the experts those chosen, and the cached latents."""
    moe, a = model.cfg.moe, model.cfg.attention
    total = 0
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            size = module.codes.nbytes + module.scales.nbytes
            routed = len(module.shape) == 3
            total += size * moe.num_experts_per_tok // moe.n_routed_experts if routed else size
        elif name != "embed_tokens":
            total += sum(p.nbytes for p in module.parameters(recurse=False))
    return total + model.cfg.num_hidden_layers * context * (a.kv_lora_rank + a.qk_rope_head_dim) * 2


class Decoder:
    """Greedy decoding after a context of random latents, bfloat16, through the step that the engine makes."""

    def __init__(self, model: Model, context: int, steps: int) -> None:
        page_size = 64
        self.model, self.context, self.steps = model, context, steps
        self.pool = PagePool(model.cfg, -(-(context + steps) // page_size), page_size, torch.bfloat16)
        self.pool.data.normal_(std=0.5)

    @torch.inference_mode()
    def __call__(self) -> None:
        state = SequenceState()
        self.pool.reserve(state, self.context)
        state.length, state.history = self.context, [7] * self.context
        token = 7
        for _ in range(self.steps):
            packed = pack_step([[token]], [state.length])
            logits = self.model(packed, cache=Cache(self.pool, [state]), logits="target").logits
            token = int(logits.argmax())
        self.pool.release(state.pages)


def probe_buffer() -> Tensor:
    return huge_empty((256 << 20,), torch.uint8).fill_(1)


def write_gguf(path: Path, kind: str, layers: int) -> None:
    """The same shape for llama.cpp: Q4_0 or Q8_0 throughout, its names of the tensors."""
    cfg = config(layers)
    a, moe, d = cfg.attention, cfg.moe, cfg.hidden_size
    rng, form = np.random.default_rng(0), FORMATS[kind]
    out = GGUFWriter(path, "deepseek2")
    out.add_block_count(layers)
    out.add_context_length(CONTEXT)
    out.add_embedding_length(d)
    out.add_feed_forward_length(cfg.intermediate_size)
    out.add_head_count(a.num_attention_heads)
    out.add_head_count_kv(1)
    out.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    out.add_rope_freq_base(cfg.rope.theta)
    out.add_rope_dimension_count(a.qk_rope_head_dim)
    out.add_leading_dense_block_count(moe.first_k_dense_replace)
    out.add_vocab_size(cfg.vocab_size)
    out.add_kv_lora_rank(a.kv_lora_rank)
    out.add_key_length(a.kv_lora_rank + a.qk_rope_head_dim)
    out.add_value_length(a.kv_lora_rank)
    out.add_key_length_mla(a.qk_nope_head_dim + a.qk_rope_head_dim)
    out.add_value_length_mla(a.v_head_dim)
    out.add_expert_feed_forward_length(moe.moe_intermediate_size)
    out.add_expert_count(moe.n_routed_experts)
    out.add_expert_used_count(moe.num_experts_per_tok)
    out.add_expert_shared_count(moe.n_shared_experts)
    out.add_expert_weights_scale(1.0)
    out.add_expert_gating_func(ExpertGatingFuncType.SOFTMAX)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("deepseek-llm")
    words = [b"<s>", b"</s>", *(f"t{n}".encode() for n in range(cfg.vocab_size - 2))]
    out.add_token_list(words)
    out.add_token_types([3, 3, *[1] * (len(words) - 2)])
    out.add_token_merges(["t 0"])
    out.add_bos_token_id(0)
    out.add_eos_token_id(1)

    block, size = GGML_QUANT_SIZES[form]
    blocks = rng.integers(0, 256, (1 << 16, size), dtype=np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(SIZE / (8 if kind == "int4" else 127)).tobytes(), np.uint8)

    def matrix(name: str, *shape: int) -> None:
        count = int(np.prod(shape)) // block
        data = np.tile(blocks, (-(-count // len(blocks)), 1))[:count]
        out.add_tensor(name, data.reshape(*shape[:-1], -1), raw_dtype=form)

    def plain(name: str, *shape: int) -> None:
        out.add_tensor(name, (np.ones if "norm" in name else rng.standard_normal)(shape).astype(np.float32) * 1)

    matrix("token_embd.weight", cfg.vocab_size, d)
    plain("output_norm.weight", d)
    matrix("output.weight", cfg.vocab_size, d)
    for layer in range(layers):
        heads, b = a.num_attention_heads, f"blk.{layer}."
        plain(b + "attn_norm.weight", d)
        plain(b + "ffn_norm.weight", d)
        plain(b + "attn_kv_a_norm.weight", a.kv_lora_rank)
        matrix(b + "attn_q.weight", heads * (a.qk_nope_head_dim + a.qk_rope_head_dim), d)
        matrix(b + "attn_kv_a_mqa.weight", a.kv_lora_rank + a.qk_rope_head_dim, d)
        matrix(b + "attn_k_b.weight", heads, a.kv_lora_rank, a.qk_nope_head_dim)
        matrix(b + "attn_v_b.weight", heads, a.v_head_dim, a.kv_lora_rank)
        matrix(b + "attn_output.weight", d, heads * a.v_head_dim)
        if layer < moe.first_k_dense_replace:
            sizes = {"": ((), cfg.intermediate_size)}
        else:
            plain(b + "ffn_gate_inp.weight", moe.n_routed_experts, d)
            wide = moe.n_shared_experts * moe.moe_intermediate_size
            sizes = {"_exps": ((moe.n_routed_experts,), moe.moe_intermediate_size), "_shexp": ((), wide)}
        for suffix, (stack, width) in sizes.items():
            matrix(f"{b}ffn_gate{suffix}.weight", *stack, width, d)
            matrix(f"{b}ffn_up{suffix}.weight", *stack, width, d)
            matrix(f"{b}ffn_down{suffix}.weight", *stack, d, width)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
