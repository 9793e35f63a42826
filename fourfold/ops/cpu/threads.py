"""How many threads work on an operation: OpenMP's on torch's own, the team on the compiled kernels.

Every OpenMP thread must arrive before an operation ends, and spins for milliseconds after it. For small operations
that costs more than it saves: on a busy machine each may wait for a time slice, and on a quiet one the spinning
threads are in the team's way, whose caller waits for nobody that has not begun.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

_own = threading.local()


def team() -> int:
    """Threads that a compiled kernel may use."""
    count: int | None = getattr(_own, "team", None)
    return count or torch.get_num_threads()


@contextmanager
def without_openmp() -> Iterator[None]:
    """Torch's operations run on the calling thread alone; the team, and what other threads do, stay as they are."""
    count = torch.get_num_threads()
    limit = _limit()
    if limit is None or count == 1:
        yield
        return
    _own.team = count
    limit(1)
    try:
        yield
    finally:
        limit(count)
        del _own.team


@cache
def _limit() -> Any:
    """OpenMP's own function: torch's would change all threads. None where torch has no OpenMP."""
    return getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
