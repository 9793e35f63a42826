"""CPU twins of the reference: same names, same signatures, same results to a stated tolerance."""

from fourfold.ops.cpu.attention import attention
from fourfold.ops.cpu.experts import experts
from fourfold.ops.cpu.index import select_topk
from fourfold.ops.cpu.streams import hyper_maps, mix_streams, read_streams

__all__ = ["attention", "experts", "hyper_maps", "mix_streams", "read_streams", "select_topk"]
