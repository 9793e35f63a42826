"""Memory in huge pages: weights that are read once a token would otherwise miss the TLB at every step."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

HUGE = 2 << 20


def huge_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Like ``torch.empty`` on the CPU, from 2 MiB on in huge pages where the system gives them."""
    plain = torch.empty(shape, dtype=dtype, device="cpu") if torch.Size(shape).numel() * dtype.itemsize < HUGE else None
    if plain is not None or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device="cpu") if plain is None else plain
    size = torch.Size(shape).numel() * dtype.itemsize
    memory = mmap.mmap(-1, size + HUGE)
    memory.madvise(mmap.MADV_HUGEPAGE)
    data = torch.frombuffer(memory, dtype=torch.uint8)
    start = -data.data_ptr() % HUGE
    return data[start : start + size].view(dtype).view(shape)
