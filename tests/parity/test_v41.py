"""DeepSeek-V4.1 against an oracle of its own, from a random checkpoint in the released names and number formats."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fourfold.media.processor import DocumentBuilder
from fourfold.model.sequence import IMAGE, Document, pack
from fourfold.model.transformer import Model
from fourfold.text.tokenizer import Tokenizer, compress_vocabulary, train_tokenizer
from fourfold.weights.checkpoint import load_model
from tests.model import tiny
from tests.parity import oracle_v41 as oracle
from tests.parity.worst import difference

BAR = 2e-5
VOCAB, IMAGE_ID = 320, 310
_HOME = tempfile.TemporaryDirectory(prefix="v41-")

TEXT: dict[str, Any] = {
    "model_type": "deepseek_v41_text",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 12,
    "o_lora_rank": 6,
    "o_groups": 2,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 0.8,
    "rms_norm_eps": 1e-20,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "compress_rope_theta": 40000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "sliding_window": 5,
    "compress_ratios": [0, 0, 2, 2, 2, 1, 1, 1, 0, 0],
    "kv_source_layer_ids": [2, 5],
    "index_source_layer_ids": [2, 4, 5, 6],
    "candidate_source_layer_id": 5,
    "candidate_topk_blocks": 3,
    "candidate_block_size": 4,
    "index_n_heads": 32,
    "index_head_dim": 16,
    "index_topk": 6,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "engram_layer_ids": [1, 4],
    "engram_max_ngram_size": 3,
    "engram_n_heads": 2,
    "engram_head_dim": 32,
    "engram_vocab_size": 101,
    "engram_pad_token_id": 2,
    "num_nextn_predict_layers": 2,
    "dspark_block_size": 4,
    "dspark_noise_token_id": 305,
    "dspark_target_layer_ids": [3, 6],
    "dspark_markov_rank": 8,
    "dspark_n_routed_experts": 4,
    "dspark_num_experts_per_tok": 2,
}
VISION: dict[str, Any] = {
    "model_type": "deepseek_v41_vision",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "patch_size": 2,
    "rope_theta": 10000.0,
    "downsample_ratio": 3,
    "max_image_tokens": 40,
    "min_pixels": 1,
    "max_wh_ratio": None,
}
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


class Writer:
    """Random tensors: as they lie on disk, and what they stand for."""

    def __init__(self, seed: int, formats: str) -> None:
        self.disk: Weights = {}
        self.values: Weights = {}
        self.formats = formats
        self.generator = torch.Generator().manual_seed(seed)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def plain(self, name: str, *shape: int, gain: float | None = None, around: float = 0.0) -> None:
        """bfloat16 numbers, of a gain of one for a matrix."""
        scale = (shape[-1] ** -0.5 if len(shape) > 1 else 0.1) if gain is None else gain
        self.disk[name] = (self.randn(*shape) * scale + around).bfloat16()
        self.values[name] = self.disk[name].float()

    def exact(self, name: str, *shape: int, gain: float) -> None:
        """float32 numbers."""
        self.disk[name] = self.values[name] = self.randn(*shape) * gain

    def exponents(self, *shape: int, center: int) -> tuple[Tensor, Tensor]:
        exponent = torch.randint(center - 1, center + 2, shape, generator=self.generator)
        return (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu), 2.0**exponent

    def dense(self, name: str, rows: int, columns: int) -> None:
        """e4m3 with a power of two per 32 x 32."""
        if self.formats == "bf16":
            return self.plain(f"{name}.weight", rows, columns)
        codes = self.randn(rows, columns).to(torch.float8_e4m3fn)
        scale, power = self.exponents(-(-rows // 32), -(-columns // 32), center=-2)
        self.disk |= {f"{name}.weight": codes, f"{name}.scale": scale}
        wide = power.repeat_interleave(32, 0)[:rows].repeat_interleave(32, 1)[:, :columns]
        self.values[f"{name}.weight"] = codes.float() * wide
        return None

    def expert(self, name: str, rows: int, columns: int) -> None:
        """Two e2m1 codes a byte, the lower half first, with a power of two per 32 inputs."""
        if self.formats == "bf16":
            return self.plain(f"{name}.weight", rows, columns)
        codes = torch.randint(0, 16, (rows, columns), generator=self.generator)
        scale, power = self.exponents(rows, columns // 32, center=-4)
        packed = (codes[:, 0::2] | (codes[:, 1::2] << 4)).to(torch.uint8).view(torch.int8)
        self.disk |= {f"{name}.weight": packed, f"{name}.scale": scale}
        sign = torch.where(codes >= 8, -1.0, 1.0)
        self.values[f"{name}.weight"] = sign * E2M1[codes % 8] * power.repeat_interleave(32, 1)
        return None

    def table(self, name: str, rows: int, columns: int) -> None:
        """e4m3 rows with a power of two per 32 channels."""
        if self.formats == "bf16":
            return self.plain(f"{name}.weight", rows, columns, gain=1.0)
        codes = self.randn(rows, columns).to(torch.float8_e4m3fn)
        scale, power = self.exponents(rows, columns // 32, center=0)
        self.disk |= {f"{name}.weight": codes, f"{name}.scale": scale}
        self.values[f"{name}.weight"] = codes.float() * power.repeat_interleave(32, 1)
        return None


Weights = dict[str, Tensor]


def write_block(out: Writer, name: str, c: dict[str, Any], experts: int, image_bias: bool) -> None:
    d, heads, dim, width = c["hidden_size"], c["num_attention_heads"], c["head_dim"], c["moe_intermediate_size"]
    n, ranks = c["hc_mult"], c["o_groups"] * c["o_lora_rank"]
    for norm in ("attn_norm", "ffn_norm"):
        out.plain(f"{name}.{norm}.weight", d, around=1.0)
    for site in ("attn", "ffn"):
        out.exact(f"{name}.hc_{site}_fn", n * (n + 2), n * d, gain=(n * d) ** -0.5)
        out.exact(f"{name}.hc_{site}_base", n * (n + 2), gain=0.5)
        out.exact(f"{name}.hc_{site}_scale", 3, gain=0.5)
    out.exact(f"{name}.attn.attn_sink", heads, gain=0.5)
    out.dense(f"{name}.attn.wq_a", c["q_lora_rank"], d)
    out.plain(f"{name}.attn.q_norm.weight", c["q_lora_rank"], around=1.0)
    out.dense(f"{name}.attn.wq_b", heads * dim, c["q_lora_rank"])
    out.dense(f"{name}.attn.wkv", dim, d)
    out.plain(f"{name}.attn.kv_norm.weight", dim, around=1.0)
    out.dense(f"{name}.attn.wo_a", ranks, heads * dim // c["o_groups"])
    out.dense(f"{name}.attn.wo_b", d, ranks)
    out.plain(f"{name}.ffn.gate.weight", experts, d)
    out.exact(f"{name}.ffn.gate.bias", experts, gain=0.3)
    if image_bias:
        out.exact(f"{name}.ffn.gate.bias_vl", experts, gain=0.3)
    for e in range(experts):
        for part, shape in (("w1", (width, d)), ("w2", (d, width)), ("w3", (width, d))):
            out.expert(f"{name}.ffn.experts.{e}.{part}", *shape)
    for part, shape in (("w1", (width, d)), ("w2", (d, width)), ("w3", (width, d))):
        out.dense(f"{name}.ffn.shared_experts.{part}", *shape)


def write_tensors(seed: int, c: dict[str, Any], formats: str) -> Writer:
    out = Writer(seed, formats)
    d, dim, n, index = c["hidden_size"], c["head_dim"], c["hc_mult"], c["index_head_dim"]
    out.plain("embed.weight", VOCAB, d, gain=1.0)
    out.plain("head.weight", VOCAB, d)
    out.plain("norm.weight", d, around=1.0)
    for layer in range(c["num_hidden_layers"]):
        name = f"layers.{layer}"
        write_block(out, name, c, c["n_routed_experts"], image_bias=True)
        source = layer in c["kv_source_layer_ids"]
        if source:
            out.plain(f"{name}.attn.compressor.wkv.weight", dim, d)
            if c["compress_ratios"][layer] > 1:
                out.plain(f"{name}.attn.compressor.wgate.weight", dim, d)
            out.plain(f"{name}.attn.compressor.norm.weight", dim, around=1.0)
            out.plain(f"{name}.attn.indexer.wk.weight", index, dim)
            out.plain(f"{name}.attn.indexer.k_norm.weight", index, around=1.0)
        if layer in c["index_source_layer_ids"]:
            out.dense(f"{name}.attn.indexer.wq_b", c["index_n_heads"] * index, c["q_lora_rank"])
            out.plain(f"{name}.attn.indexer.weights_proj.weight", c["index_n_heads"], d)
        if layer in c["engram_layer_ids"]:
            primes = oracle.engram_primes(c)[c["engram_layer_ids"].index(layer)]
            width = (c["engram_max_ngram"] - 1) * c["engram_n_heads"] * c["engram_head_dim"]
            out.table(f"{name}.engram.embed", sum(p for order in primes for p in order), c["engram_head_dim"])
            out.dense(f"{name}.engram.wkv", (n + 1) * d, width)
            out.plain(f"{name}.engram.q_weight", n, d, gain=0.2, around=1.0)
            out.plain(f"{name}.engram.k_weight", n, d, gain=0.2, around=1.0)
    for stage in range(c["num_nextn_predict_layers"]):
        write_block(out, f"mtp.{stage}", c, c["dspark_n_routed_experts"], image_bias=False)
    last = f"mtp.{c['num_nextn_predict_layers'] - 1}"
    out.dense("mtp.0.main_proj", d, len(c["dspark_target_layer_ids"]) * d)
    out.plain("mtp.0.main_norm.weight", d, around=1.0)
    out.plain(f"{last}.norm.weight", d, around=1.0)
    out.plain(f"{last}.markov_head.embed.weight", VOCAB, c["dspark_markov_rank"], gain=1.0)
    out.plain(f"{last}.markov_head.head.weight", VOCAB, c["dspark_markov_rank"])
    out.exact(f"{last}.confidence_head.proj.weight", 1, d + c["dspark_markov_rank"], gain=0.2)
    write_vision(out, d)
    return out


def write_vision(out: Writer, d: int) -> None:
    v, wide, inner = VISION, VISION["hidden_size"], VISION["intermediate_size"]
    shapes = {"patch_embed.proj": (wide, 3 * v["patch_size"] ** 2)}
    for block in range(v["num_hidden_layers"]):
        name = f"blocks.{block}"
        shapes |= {f"{name}.attn.wqkv": (3 * wide, wide), f"{name}.attn.wo": (wide, wide)}
        out.plain(f"vision.{name}.mlp.w1.weight", 2 * inner, wide)
        out.plain(f"vision.{name}.mlp.w2.weight", wide, inner)
        for norm in ("norm1", "norm2"):
            out.plain(f"vision.{name}.{norm}.weight", wide, around=1.0)
    out.plain("vision.norm.weight", wide, around=1.0)
    for name, shape in shapes.items():
        out.plain(f"vision.{name}.weight", *shape)
        out.plain(f"vision.{name}.bias", shape[0])
    for name, shape in {"aligner.w1": (d, wide * v["downsample_ratio"] ** 2), "aligner.w2": (d, d)}.items():
        out.plain(f"{name}.weight", *shape)
        out.plain(f"{name}.bias", shape[0])
    for mark in ("start", "end", "newline", "pad"):  # nothing reads the last
        out.plain(f"image_{mark}", d, gain=1.0)


@dataclass(frozen=True)
class Made:
    directory: Path
    config: dict[str, Any]  # as the oracle reads it
    weights: Weights
    compressed: list[int]
    model: Model
    tokenizer: Tokenizer

    def trunk(self, document: Document, images: list[tuple[int, Tensor]] = ()) -> tuple[Tensor, Tensor]:
        ids = document.tokens.tolist()
        compressed = [self.compressed[i] if i < len(self.compressed) else 0 for i in ids]
        return oracle.trunk(self.weights, self.config, ids, compressed, images)


@functools.cache
def make(seed: int, formats: str) -> Made:
    tokenizer = train_tokenizer(["The quick Brown fox jumps over the Lazy dog, the THE quick QUICK"] * 3, 300)
    compressed = compress_vocabulary(tokenizer)
    text = {**TEXT, "engram_compressed_vocab_size": max(compressed) + 1}
    c = {**text, "image_token_id": IMAGE_ID, "engram_max_ngram": text["engram_max_ngram_size"]}
    c |= {"engram_pad_compressed": compressed[text["engram_pad_token_id"]]}
    c["vision"] = {**VISION, "downsample": VISION["downsample_ratio"]}
    text["engram_num_embeddings"] = [sum(p for o in layer for p in o) for layer in oracle.engram_primes(c)]
    written = write_tensors(seed, c, formats)
    directory = Path(_HOME.name) / f"{formats}-{seed}"
    directory.mkdir()
    config = {
        "architectures": ["DeepseekV41ForCausalLM"],
        "model_type": "deepseek_v41",
        "image_token_id": IMAGE_ID,
        "text_config": text,
        "vision_config": VISION,
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [32, 32],
            "scale_fmt": "ue8m0",
            "expert_dtype": "fp4",
        },
    }
    if formats == "bf16":
        del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer.save(directory / "tokenizer.json")
    save_file(written.disk, directory / "model.safetensors")
    model, loaded = load_model(directory)
    return Made(directory, c, written.values, compressed, model, loaded)


def bar(wanted: Tensor) -> float:
    """Random codes of four and eight bits make larger logits than trained weights do: the bar grows with them."""
    return BAR * max(1.0, float(wanted.abs().max()) / 5)


def text(n: int, seed: int) -> Document:
    generator = torch.Generator().manual_seed(seed)
    return Document.text(torch.randint(20, 290, (n,), generator=generator).tolist())


def with_images(made: Made, seed: int) -> tuple[Document, list[tuple[int, Tensor]]]:
    """Text, an image whose sides are no multiple of a token's, text, another image, text."""
    generator = torch.Generator().manual_seed(seed)
    builder = DocumentBuilder(made.model.cfg.media, made.tokenizer)
    images = []
    for length, (rows, cols) in ((7, (4, 7)), (3, (6, 5)), (6, (0, 0))):
        builder.text(torch.randint(20, 290, (length,), generator=generator).tolist())
        if rows:
            pixels = torch.randint(0, 256, (2 * rows, 2 * cols, 3), generator=generator, dtype=torch.uint8)
            images.append((len(builder.build()), (pixels.float() / 255 - 0.5) / 0.5))
            builder.image(pixels.numpy())
    return builder.build(), images


@torch.no_grad()
@pytest.mark.parametrize("formats", ["bf16", "released"])
@pytest.mark.parametrize("seed", range(3))
def test_text_logits_are_the_oracle_s(seed, formats):
    made, document = make(seed, formats), text(60, seed)
    wanted, _ = made.trunk(document)
    got = made.model(pack([document])).logits
    assert 0.5 < wanted.std() < 20
    assert difference(f"deepseek_v41 logits, {formats}", got, wanted) <= bar(wanted)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_image_logits_are_the_oracle_s(seed):
    made = make(seed, "released")
    document, images = with_images(made, seed)
    assert (document.modality == IMAGE).sum() == 2 * (3 + 1) + 2 + 2 * (2 + 1) + 2
    wanted, _ = made.trunk(document, images)
    got = made.model(pack([document])).logits
    assert difference("deepseek_v41 logits, images", got, wanted) <= bar(wanted)
    blind = made.model(pack([changed_pixels(document)])).logits
    assert (blind - wanted).abs().max() > 0.05


def changed_pixels(document: Document) -> Document:

    patches = document.patches["image"]
    return dataclasses.replace(document, patches={"image": dataclasses.replace(patches, values=-patches.values)})


@torch.no_grad()
@pytest.mark.parametrize("seed", range(2))
def test_in_chunks_and_beside_strangers(seed):
    made = make(seed, "released")
    documents = [text(30, 10 + seed), text(19, 20 + seed)]
    wanted = [made.trunk(d)[0] for d in documents]
    for chunks in ([[30], [19]], [[9, 1, 1, 12, 7], [2, 3, 14]], [[1] * 30, [1] * 19]):
        for got, want in zip(tiny.decode(made.model, documents, chunks, page_size=4), wanted, strict=True):
            assert difference("deepseek_v41 through the cache", got, want) <= bar(want)
            assert torch.equal(got.argmax(-1), want.argmax(-1))


@torch.no_grad()
@pytest.mark.parametrize("length", [2, 30])
def test_drafts_are_the_oracle_s(length):
    made, document = make(0, "released"), text(length, 5)
    _, features = made.trunk(document)
    out = made.model(pack([document]), features=True)
    assert (out.features - features).abs().max() <= BAR * max(1, float(features.abs().max()))
    tokens, logits, confidence = oracle.draft(made.weights, made.config, features, token=77)
    positions = torch.arange(length)
    keys = made.model.drafter.keys(out.features, positions)
    draft = made.model.drafter.draft(
        keys[None], positions[None], torch.tensor([77]), made.model.embed_tokens, made.model.head
    )
    assert draft.tokens[0].tolist() == tokens
    assert difference("deepseek_v41 drafts", draft.logits[0], logits) <= bar(logits)
    assert (draft.confidence[0] - confidence).abs().max() <= BAR


@torch.no_grad()
def test_the_oracle_sees_what_is_special():
    """Without the candidates' limit, or with the other source's entries, the answer is another: the test can tell."""
    made, document = make(0, "released"), text(60, 0)
    wanted, _ = made.trunk(document)
    for change in ({"candidate_source_layer_id": -1}, {"sliding_window": 4}, {"index_topk": 5}):
        other = oracle.trunk(
            made.weights, made.config | change, document.tokens.tolist(),
            [made.compressed[i] for i in document.tokens.tolist()],
        )[0]  # fmt: skip
        assert (other - wanted).abs().max() > 1e-3, change
