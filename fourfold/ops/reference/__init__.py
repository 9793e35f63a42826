"""The specification in plain PyTorch: obviously right, differentiable, any floating dtype."""

from fourfold.ops.reference.attention import attention, attention_mass, attention_probs, latent_attention
from fourfold.ops.reference.blocks import (
    block_counts,
    dequantize_fp4,
    dequantize_fp8,
    dequantize_int4,
    dequantize_int8,
    e2m1_decode,
    e2m1_encode,
    e8m0_decode,
    e8m0_encode,
    fp4_to_fp8,
    pack_nibbles,
    quantize_fp4,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
    simulate_fp4,
    simulate_fp8,
    unpack_nibbles,
)
from fourfold.ops.reference.decode import DecodeLayer, DecodeLayers, DecodeState, Pooling, Site, decode_layers
from fourfold.ops.reference.experts import experts, swiglu
from fourfold.ops.reference.index import (
    block_summaries,
    candidate_keys,
    chosen_positions,
    index_scores,
    select_positions,
    select_topk,
)
from fourfold.ops.reference.linear import linear, wide_linear
from fourfold.ops.reference.ngram import ngram_rows
from fourfold.ops.reference.norm import rms_norm
from fourfold.ops.reference.pool import pool
from fourfold.ops.reference.quantized import (
    FP8_BLOCK,
    Quantized,
    pack_weight,
    quantized_experts,
    quantized_linear,
)
from fourfold.ops.reference.rope import apply_rope, rope_frequencies, rope_tables, yarn_mscale
from fourfold.ops.reference.rows import decode_rows, encode_rows, has_scales, row_width
from fourfold.ops.reference.sinkhorn import sinkhorn
from fourfold.ops.reference.streams import collapse_streams, hyper_maps, mix_streams, read_streams

__all__ = [
    "DecodeLayer",
    "DecodeLayers",
    "DecodeState",
    "FP8_BLOCK",
    "Pooling",
    "Quantized",
    "Site",
    "apply_rope",
    "attention",
    "attention_mass",
    "attention_probs",
    "block_counts",
    "block_summaries",
    "candidate_keys",
    "chosen_positions",
    "collapse_streams",
    "decode_layers",
    "decode_rows",
    "dequantize_fp4",
    "dequantize_fp8",
    "dequantize_int4",
    "dequantize_int8",
    "e2m1_decode",
    "e2m1_encode",
    "e8m0_decode",
    "e8m0_encode",
    "encode_rows",
    "experts",
    "fp4_to_fp8",
    "has_scales",
    "hyper_maps",
    "index_scores",
    "linear",
    "latent_attention",
    "mix_streams",
    "ngram_rows",
    "pack_nibbles",
    "pack_weight",
    "pool",
    "quantize_fp4",
    "quantize_fp8",
    "quantize_int4",
    "quantize_int8",
    "quantized_experts",
    "quantized_linear",
    "read_streams",
    "rms_norm",
    "rope_frequencies",
    "rope_tables",
    "row_width",
    "select_positions",
    "select_topk",
    "simulate_fp4",
    "simulate_fp8",
    "sinkhorn",
    "swiglu",
    "unpack_nibbles",
    "wide_linear",
    "yarn_mscale",
]
