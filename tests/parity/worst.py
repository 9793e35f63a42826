"""The greatest differences that were measured, by what was compared."""

from __future__ import annotations

from torch import Tensor

SEEN: dict[str, float] = {}


def difference(what: str, a: Tensor, b: Tensor) -> float:
    """max |a - b|, remembered under ``what``; infinite where a value is no number."""
    assert a.shape == b.shape, f"{what}: shapes {list(a.shape)} and {list(b.shape)}"
    apart = (a - b).abs().nan_to_num(nan=float("inf")).max().item()
    SEEN[what] = max(SEEN.get(what, 0.0), apart)
    return apart
