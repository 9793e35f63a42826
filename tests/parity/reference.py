"""Tiny random models of ``transformers``, which judge ours.

Every draw is made by its seed alone: first the configuration, then a value for each parameter and buffer, none of
which keeps the zero or the one that training starts from. Weights have a gain of about one, so logits stay within a
few units and the noise of float32 below the bar.
"""

from __future__ import annotations

import functools
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging

from fourfold.model.sequence import Document
from fourfold.model.transformer import Model
from fourfold.text.tokenizer import Tokenizer, train_tokenizer
from fourfold.weights.checkpoint import load_model
from tests.model import tiny

logging.set_verbosity_error()
logging.disable_progress_bar()

BAR = 2e-5  # greatest difference of two logits
LENGTH = 56
FAMILIES = ("llama", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4")
SEEDS = range(16)
SLIDING, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"

_HOME = tempfile.TemporaryDirectory(prefix="parity-")  # gone with the interpreter


@dataclass(frozen=True)
class Reference:
    """The judge and the directory that its ``save_pretrained`` wrote."""

    model: PreTrainedModel
    config: PreTrainedConfig
    directory: Path


def draw(family: str, seed: int) -> PreTrainedModel:
    """A random model of a random configuration, float32, in evaluation mode."""
    rng = random.Random(f"{family} {seed}")
    model_class, config = {
        "llama": _llama,
        "deepseek_v2": _v2,
        "deepseek_v3": _v3,
        "deepseek_v32": _v32,
        "deepseek_v4": _v4,
    }[family](rng)
    return build(model_class, config, seed)


def build(model_class: type[PreTrainedModel], config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    config._attn_implementation = config._experts_implementation = "eager"
    model = model_class(config).float().eval()
    randomise(model, torch.Generator().manual_seed(seed))
    return model


@functools.cache
def make(family: str, seed: int) -> Reference:
    model = draw(family, seed)
    directory = Path(_HOME.name) / f"{family}-{seed}"
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return Reference(model, model.config, directory)


@functools.cache
def ours(family: str, seed: int) -> Model:
    """Our model, loaded from what the judge wrote. Shared: not to be changed."""
    return load_model(make(family, seed).directory)[0]


def our_logits(model: Model, ids: Tensor) -> Tensor:
    return tiny.logits(model, Document.text(ids.tolist()))


def new_directory() -> Path:
    """An empty one, gone with the interpreter."""
    return Path(tempfile.mkdtemp(dir=_HOME.name))


@functools.cache
def _tokenizer() -> Tokenizer:
    return train_tokenizer(["a text of no importance"], 272)


def write_tokenizer(directory: Path) -> None:
    _tokenizer().save(directory / "tokenizer.json")


@torch.no_grad()
def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """A value for every parameter and every saved buffer."""

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    for name, tensor in sorted(model.state_dict().items()):
        *_, module, leaf = ["", *name.split(".")]
        if leaf == "tid2eid":
            experts = model.config.n_routed_experts
            rows = [torch.randperm(experts, generator=generator)[: tensor.shape[1]] for _ in range(len(tensor))]
            tensor.copy_(torch.stack(rows))
        elif "norm" in module and leaf == "weight":
            tensor.copy_(1 + 0.2 * normal(tensor))
        elif leaf == "e_score_correction_bias":
            tensor.copy_(0.4 * normal(tensor) - 0.7)  # below zero too: groups are hidden, not set to zero
        elif leaf.endswith("scale"):
            tensor.copy_(1 + 0.3 * normal(tensor))
        elif leaf.endswith(("bias", "base", "sinks")):
            tensor.copy_(0.4 * normal(tensor))
        else:
            gain = 0.5 if module in ("embed_tokens", "lm_head") else 0.8
            tensor.copy_(gain * normal(tensor) * tensor.shape[-1] ** -0.5)


def tokens(config: PreTrainedConfig, seed: int, n: int = LENGTH) -> Tensor:
    return torch.randint(0, config.vocab_size, (n,), generator=torch.Generator().manual_seed(1000 + seed))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """float32 [T, V] of one sequence, without a cache."""
    return model(input_ids=ids[None], use_cache=False).logits[0]


def _yarn(rng: random.Random, **more: Any) -> dict[str, Any]:
    return {
        "factor": rng.choice([2.0, 4.0, 8.0]),
        "beta_fast": rng.choice([32, 16]),
        "beta_slow": 1,
        "original_max_position_embeddings": rng.choice([16, 32, 64]),
        **more,
    }


def _llama(rng: random.Random) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    qwen = rng.random() < 0.4
    heads = rng.choice([2, 4, 6])
    head_dim = rng.choice([6, 8])
    rope = rng.choice(["default", "default", "linear", "yarn", "llama3"])
    parameters: dict[str, Any] = {"rope_type": rope, "rope_theta": rng.choice([10000.0, 500000.0])}
    if rope == "linear":
        parameters |= {"factor": 4.0}
    elif rope == "yarn":
        parameters |= _yarn(rng)
        if rng.random() < 0.5:
            parameters["attention_factor"] = 1.25
    elif rope == "llama3":
        parameters |= {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    common: dict[str, Any] = {
        "vocab_size": rng.choice([272, 290]),
        "hidden_size": heads * (head_dim if qwen else rng.choice([4, 6, 8])),
        "intermediate_size": rng.choice([24, 40]),
        "num_hidden_layers": rng.choice([2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([k for k in (1, 2, 3, heads) if heads % k == 0]),
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
        "tie_word_embeddings": rng.random() < 0.4,
        "rope_parameters": parameters,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if qwen:
        return Qwen2ForCausalLM, Qwen2Config(**common)
    return LlamaForCausalLM, LlamaConfig(**common, head_dim=head_dim)


def _latent(rng: random.Random, heads: int) -> dict[str, Any]:
    """What V2, V3 and V3.2 have in common."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    if rng.random() < 0.6:
        mscale = rng.choice([0.707, 1.0])
        all_dim = mscale if rng.random() < 0.7 else 0.5
        rope = {"rope_type": "yarn", "rope_theta": 10000.0, **_yarn(rng, mscale=mscale, mscale_all_dim=all_dim)}
    groups, size = rng.choice([(1, 8), (2, 4), (4, 2), (4, 4)])
    kept = rng.randint(1, groups)
    return {
        "vocab_size": rng.choice([272, 290]),
        "hidden_size": heads * rng.choice([8, 12]),
        "intermediate_size": rng.choice([24, 40]),
        "moe_intermediate_size": rng.choice([10, 16]),
        "num_hidden_layers": rng.choice([2, 3, 4]),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "n_routed_experts": groups * size,
        "n_shared_experts": rng.choice([1, 2]),
        "num_experts_per_tok": rng.randint(1, min(4, kept * size)),
        "n_group": groups,
        "topk_group": kept,
        "routed_scaling_factor": rng.choice([1.0, 2.5]),
        "first_k_dense_replace": rng.choice([0, 1, 1]),
        "kv_lora_rank": rng.choice([10, 16]),
        "q_lora_rank": rng.choice([12, 18]),
        "qk_nope_head_dim": rng.choice([6, 10]),
        "qk_rope_head_dim": rng.choice([4, 8]),
        "v_head_dim": rng.choice([6, 9]),
        "max_position_embeddings": 512,
        "rope_parameters": rope,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def _v2(rng: random.Random) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    values = _latent(rng, rng.choice([2, 4]))
    if rng.random() < 0.5:
        values |= {"topk_method": "greedy", "n_group": 1, "topk_group": 1}
    else:
        values |= {"topk_method": "group_limited_greedy"}
    values["q_lora_rank"] = rng.choice([None, values["q_lora_rank"]])
    return DeepseekV2ForCausalLM, DeepseekV2Config(**values, norm_topk_prob=False)


def _v3(rng: random.Random) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    values = _latent(rng, rng.choice([2, 4]))
    values["q_lora_rank"] = rng.choice([values["q_lora_rank"], values["q_lora_rank"], None])
    return DeepseekV3ForCausalLM, DeepseekV3Config(
        **values, norm_topk_prob=rng.random() < 0.8, num_nextn_predict_layers=rng.choice([0, 1])
    )


def _index(rng: random.Random) -> dict[str, Any]:
    """Enough heads that no score is exactly zero, or a selection that holds everything: ties break differently."""
    few = rng.random() < 0.3
    return {
        "index_n_heads": rng.choice([2, 3]) if few else rng.choice([32, 48]),
        "index_topk": 128 if few else rng.choice([3, 5, 9]),
    }


def _v32(rng: random.Random) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    values = _latent(rng, rng.choice([2, 4]))
    dim = rng.choice([values["qk_rope_head_dim"] + 4, 16])
    return DeepseekV32ForCausalLM, DeepseekV32Config(**values, **_index(rng), index_head_dim=dim)


def _v4(rng: random.Random) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    layers = rng.choice([3, 4, 5])
    kinds = [CSA, HCA, *(rng.choice([SLIDING, CSA, HCA]) for _ in range(layers - 2))]
    rng.shuffle(kinds)
    heads = rng.choice([2, 4, 8])
    head_dim, rope_dim = rng.choice([(16, 8), (12, 4), (16, 16)])
    experts = rng.choice([6, 8])
    yarn = {"rope_scaling": {"type": "yarn", **_yarn(rng)}} if rng.random() < 0.7 else {}
    return DeepseekV4ForCausalLM, DeepseekV4Config(
        vocab_size=rng.choice([272, 290]),
        hidden_size=rng.choice([24, 32]),
        moe_intermediate_size=rng.choice([8, 12]),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        head_dim=head_dim,
        qk_rope_head_dim=rope_dim,
        q_lora_rank=rng.choice([12, 16]),
        o_groups=rng.choice([g for g in (1, 2, 4) if heads % g == 0]),
        o_lora_rank=rng.choice([5, 6]),
        n_routed_experts=experts,
        n_shared_experts=1,
        num_experts_per_tok=rng.choice([1, 2, 3]),
        scoring_func=rng.choice(["sqrtsoftplus", "sqrtsoftplus", "sigmoid"]),
        routed_scaling_factor=rng.choice([1.5, 2.5]),
        num_hash_layers=rng.choice([0, 1, 2]),
        swiglu_limit=rng.choice([0.5, 1.0, 10.0]),
        **_index(rng),
        index_head_dim=rng.choice([rope_dim, rope_dim + 8]),
        layer_types=kinds,
        compress_rates={CSA: rng.choice([2, 4]), HCA: rng.choice([8, 16])},
        sliding_window=rng.choice([3, 7, 16]),
        hc_mult=rng.choice([2, 4, 4]),
        hc_sinkhorn_iters=rng.choice([3, 20]),
        rope_theta=10000.0,
        compress_rope_theta=rng.choice([40000.0, 160000.0]),
        max_position_embeddings=512,
        num_nextn_predict_layers=rng.choice([0, 1]),  # kept in the configuration, never in the file
        bos_token_id=0,
        eos_token_id=1,
        **yarn,
    )
