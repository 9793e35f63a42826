"""Pure tensor functions. Each has one reference; some devices have faster twins of the same signature.

The twin is picked by the device of the first tensor, on a GPU those in Triton where that is installed.
``FOURFOLD_BACKEND=reference`` switches all twins off; the name of a package of them switches those on for any device.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from fourfold.ops import reference
from fourfold.ops.reference.norm import at_least_float32, compute_dtype, float32_island, multiplies_bfloat16

TWINS: dict[str, tuple[str, ...]] = {
    "cpu": (
        "apply_rope",
        "attention",
        "attention_mass",
        "collapse_streams",
        "decode_layers",
        "decode_rows",
        "encode_rows",
        "experts",
        "hyper_maps",
        "latent_attention",
        "linear",
        "mix_streams",
        "pack_weight",
        "quantized_experts",
        "quantized_linear",
        "read_streams",
        "rms_norm",
        "select_positions",
        "select_topk",
        "wide_linear",
    ),
    "triton": (
        "experts",
        "hyper_maps",
        "index_scores",
        "latent_attention",
        "mix_streams",
        "ngram_rows",
        "quantized_experts",
        "quantized_linear",
        "read_streams",
        "rms_norm",
        "select_positions",
    ),
}
BACKENDS = {"cpu": "cpu", "cuda": "triton"}  # of a device


@cache
def implementation(name: str, device: str, backend: str | None) -> Callable[..., Any]:
    """The function that runs op ``name`` on ``device``; ``backend`` is the operator's override."""
    if backend not in (None, "reference", *TWINS):
        raise ValueError(f"FOURFOLD_BACKEND: {backend!r} is unknown; choose reference or one of {', '.join(TWINS)}")
    chosen = backend or BACKENDS.get(device, "reference")
    if chosen == "triton" and find_spec("triton") is None:
        if backend:
            raise ValueError("FOURFOLD_BACKEND: is triton, which is not installed")
        chosen = "reference"
    if name in TWINS.get(chosen, ()):
        return getattr(importlib.import_module(f"fourfold.ops.{chosen}"), name)
    return getattr(reference, name)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _as_it_is(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A twin is called from a compiled model, never compiled itself: its kernels are nothing a compiler can read."""
    return function(*args, **kwargs)


def _dispatched(name: str) -> Callable[..., Any]:
    law = getattr(reference, name)

    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = implementation(name, x.device.type, os.environ.get("FOURFOLD_BACKEND"))
        if torch.compiler.is_compiling() and chosen is not law:
            return _as_it_is(chosen, x, *args, **kwargs)
        return chosen(x, *args, **kwargs)

    call.__name__ = name
    call.__doc__ = getattr(reference, name).__doc__
    return call


attention = _dispatched("attention")
attention_mass = _dispatched("attention_mass")
collapse_streams = _dispatched("collapse_streams")
decode_layers = _dispatched("decode_layers")
linear = _dispatched("linear")
wide_linear = _dispatched("wide_linear")
experts = _dispatched("experts")
index_scores = _dispatched("index_scores")
ngram_rows = _dispatched("ngram_rows")
select_positions = _dispatched("select_positions")
select_topk = _dispatched("select_topk")
hyper_maps = _dispatched("hyper_maps")
read_streams = _dispatched("read_streams")
mix_streams = _dispatched("mix_streams")
apply_rope = _dispatched("apply_rope")
rms_norm = _dispatched("rms_norm")
latent_attention = _dispatched("latent_attention")
encode_rows = _dispatched("encode_rows")
decode_rows = _dispatched("decode_rows")
pack_weight = _dispatched("pack_weight")
quantized_experts = _dispatched("quantized_experts")
quantized_linear = _dispatched("quantized_linear")

from fourfold.ops.reference import (  # noqa: E402
    FP8_BLOCK,
    DecodeLayer,
    DecodeLayers,
    DecodeState,
    Pooling,
    Quantized,
    Site,
    attention_probs,
    block_counts,
    block_summaries,
    candidate_keys,
    chosen_positions,
    dequantize_fp4,
    dequantize_fp8,
    dequantize_int4,
    dequantize_int8,
    e2m1_decode,
    e2m1_encode,
    e8m0_decode,
    e8m0_encode,
    fp4_to_fp8,
    has_scales,
    pack_nibbles,
    pool,
    quantize_fp4,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
    rope_frequencies,
    rope_tables,
    row_width,
    simulate_fp4,
    simulate_fp8,
    sinkhorn,
    swiglu,
    unpack_nibbles,
    yarn_mscale,
)
from fourfold.ops.reference.rows import ROW_FORMATS  # noqa: E402

__all__ = [
    "DecodeLayer",
    "DecodeLayers",
    "DecodeState",
    "FP8_BLOCK",
    "Pooling",
    "Quantized",
    "ROW_FORMATS",
    "Site",
    "TWINS",
    "apply_rope",
    "at_least_float32",
    "attention",
    "attention_mass",
    "attention_probs",
    "block_counts",
    "block_summaries",
    "candidate_keys",
    "chosen_positions",
    "collapse_streams",
    "decode_rows",
    "compute_dtype",
    "decode_layers",
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
    "float32_island",
    "fp4_to_fp8",
    "has_scales",
    "hyper_maps",
    "implementation",
    "index_scores",
    "latent_attention",
    "linear",
    "mix_streams",
    "multiplies_bfloat16",
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
