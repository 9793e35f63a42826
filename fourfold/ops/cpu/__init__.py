"""CPU twins of the reference: same names, same signatures, same results to a stated tolerance."""

from fourfold.ops.cpu.attention import attention, attention_mass
from fourfold.ops.cpu.experts import experts
from fourfold.ops.cpu.index import select_topk
from fourfold.ops.cpu.linear import linear
from fourfold.ops.cpu.quantized import latent_attention, pack_weight, quantized_experts, quantized_linear
from fourfold.ops.cpu.streams import hyper_maps, mix_streams, read_streams

__all__ = [
    "attention",
    "attention_mass",
    "experts",
    "hyper_maps",
    "latent_attention",
    "linear",
    "mix_streams",
    "pack_weight",
    "quantized_experts",
    "quantized_linear",
    "read_streams",
    "select_topk",
]
