"""CPU twins of the reference: same names, same signatures, same results to a stated tolerance."""

from fourfold.ops.cpu.attention import attention, attention_mass
from fourfold.ops.cpu.decode import decode_layers
from fourfold.ops.cpu.experts import experts
from fourfold.ops.cpu.index import select_positions, select_topk
from fourfold.ops.cpu.latent import latent_attention
from fourfold.ops.cpu.linear import linear, wide_linear
from fourfold.ops.cpu.norm import rms_norm
from fourfold.ops.cpu.quantized import pack_weight, quantized_experts, quantized_linear
from fourfold.ops.cpu.rope import apply_rope
from fourfold.ops.cpu.rows import decode_rows, encode_rows
from fourfold.ops.cpu.streams import collapse_streams, hyper_maps, mix_streams, read_streams

__all__ = [
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
]
