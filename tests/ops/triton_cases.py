"""Every Triton twin beside its reference; a program, for the interpreter must be chosen before Triton is imported.

``TRITON_INTERPRET=1 python -m tests.ops.triton_cases cpu``, or ``cuda`` without it.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

from fourfold import ops
from fourfold.ops import reference
from tests.ops.test_twins import CASES, TOLERANCE, Case, assert_near

SIZES = ("empty", "one", "small", "odd")
DTYPES = (torch.float32, torch.bfloat16)


def index_scores_case(size: str, dtype: torch.dtype, rng: random.Random) -> Case:
    batch, queries = rng.randint(1, 2), {"empty": 0, "one": 1}.get(size, rng.randint(2, 40))
    keys, heads, dim = rng.randint(1, 150), rng.randint(1, 5), rng.choice([3, 16, 40])
    weights = torch.randn(batch, queries, heads)
    return Case(
        [torch.randn(batch, queries, heads, dim, dtype=dtype), torch.randn(batch, keys, dim, dtype=dtype), weights]
    )


def ngram_rows_case(size: str, dtype: torch.dtype, rng: random.Random) -> Case:
    count, order, heads = {"empty": 0, "one": 1}.get(size, rng.randint(2, 300)), rng.randint(2, 4), rng.randint(1, 5)
    columns = order - 1, heads
    return Case(
        [
            torch.randint(0, 2**17, (count, order)),
            torch.randint(-(2**62), 2**62, (order,)) | 1,  # products wrap around, and rows must not be negative
            torch.randint(90, 20_000, columns),
            torch.randint(0, 10**6, columns),
        ]
    )


MADE = CASES | {"index_scores": index_scores_case, "ngram_rows": ngram_rows_case}


def moved(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def check(name: str, size: str, dtype: torch.dtype, device: str) -> None:
    rng = random.Random(f"{name} {size} {dtype}")
    torch.manual_seed(rng.randint(0, 1 << 30))
    args = MADE[name](size, dtype, rng).args
    exact = [a.float() if isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 else a for a in args]
    got, plain, wanted = (
        f(*values)
        for f, values in (
            (ops.implementation(name, device, "triton"), [moved(a, device) for a in args]),
            (getattr(reference, name), args),
            (getattr(reference, name), exact),
        )
    )
    if not isinstance(got, tuple):
        got, plain, wanted = (got,), (plain,), (wanted,)
    for number, (g, p, w) in enumerate(zip(got, plain, wanted, strict=True)):
        assert g.dtype == p.dtype, (name, size, dtype, number, g.dtype, p.dtype)
        assert_near(g.cpu(), w, TOLERANCE[dtype] if w.is_floating_point() else 0, f"{name} {size} {dtype} {number}")


def main(device: str) -> None:
    for name in ops.TWINS["triton"]:
        assert ops.implementation(name, device, "triton") is not getattr(reference, name)
        for size in SIZES:
            for dtype in DTYPES:
                with torch.no_grad():
                    check(name, size, dtype, device)
        print(name, "agrees with its reference", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
