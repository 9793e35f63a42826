"""The specification in plain PyTorch: obviously right, differentiable, any floating dtype."""

from fourfold.ops.reference.attention import attention, attention_probs, sparse_mla
from fourfold.ops.reference.experts import experts
from fourfold.ops.reference.index import index_scores, select_topk
from fourfold.ops.reference.ngram import ngram_rows
from fourfold.ops.reference.norm import rms_norm
from fourfold.ops.reference.rope import apply_rope, rope_frequencies, rope_tables, yarn_mscale
from fourfold.ops.reference.sinkhorn import sinkhorn
from fourfold.ops.reference.streams import hyper_maps, mix_streams, read_streams

__all__ = [
    "apply_rope",
    "attention",
    "attention_probs",
    "experts",
    "hyper_maps",
    "index_scores",
    "mix_streams",
    "ngram_rows",
    "read_streams",
    "rms_norm",
    "rope_frequencies",
    "rope_tables",
    "select_topk",
    "sinkhorn",
    "sparse_mla",
    "yarn_mscale",
]
