"""Triton twins of the reference: same names, same signatures. What they do not handle they leave to the reference:
gradients, double precision, and sizes that no tile fits.

They have run through Triton's interpreter; see the tests for what that covers.
"""

from fourfold.ops.triton.experts import experts, quantized_experts
from fourfold.ops.triton.index import index_scores, select_positions
from fourfold.ops.triton.latent import latent_attention
from fourfold.ops.triton.matmul import quantized_linear
from fourfold.ops.triton.ngram import ngram_rows
from fourfold.ops.triton.norm import rms_norm
from fourfold.ops.triton.streams import hyper_maps, mix_streams, read_streams

__all__ = [
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
]
