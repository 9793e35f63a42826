"""Every Triton twin beside its reference; a program, for the interpreter must be chosen before Triton is imported.

``TRITON_INTERPRET=1 python -m tests.ops.triton_cases cpu``, or ``cuda`` without it.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
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


def quantized(rng: random.Random, *shape: int) -> ops.Quantized:
    kind, w = rng.choice(["int8", "int4", "fp8"]), torch.randn(shape) / shape[-1] ** 0.5
    if kind == "fp8":
        made = [ops.quantize_fp8(m, ops.FP8_BLOCK) for m in w.view(-1, *shape[-2:])]
        codes, scales = (torch.stack(parts).view(*shape[:-2], *parts[0].shape) for parts in zip(*made, strict=True))
        return ops.Quantized(codes, scales, shape, kind)
    group = rng.choice([32, 64])
    codes, scales = ops.quantize_int8(w) if kind == "int8" else ops.quantize_int4(w, group)
    return ops.Quantized(codes, scales, shape, kind, group)


def quantized_linear_case(size: str, dtype: torch.dtype, rng: random.Random) -> Case:
    rows, inner, outer = {"empty": 0, "one": 1}.get(size, rng.randint(2, 40)), rng.randint(1, 300), rng.randint(1, 200)
    shape = (2, rows, inner) if rng.random() < 0.5 else (rows, inner)
    bias = torch.randn(outer, dtype=dtype) if rng.random() < 0.5 else None
    return Case([torch.randn(shape, dtype=dtype), quantized(rng, outer, inner), bias])


def quantized_experts_case(size: str, dtype: torch.dtype, rng: random.Random) -> Case:
    tokens, n, d = {"empty": 0, "one": 1}.get(size, rng.randint(2, 40)), rng.randint(3, 6), rng.randint(1, 150)
    width, limit = rng.choice([7, 40, 140]), rng.choice([0.0, 0.5])
    shared = tuple(quantized(rng, *shape) for shape in ((width, d), (width, d), (d, width)))
    indices = torch.stack([torch.randperm(n)[:3] for _ in range(tokens)]) if tokens else torch.empty(0, 3).long()
    stacks = quantized(rng, n, 2 * width, d), quantized(rng, n, d, width)
    x, weights = torch.randn(tokens, d, dtype=dtype), torch.rand(tokens, 3, dtype=dtype)
    return Case([x, indices, weights, *stacks, limit, shared if rng.random() < 0.5 else None])


MADE = CASES | {
    "index_scores": index_scores_case,
    "ngram_rows": ngram_rows_case,
    "quantized_experts": quantized_experts_case,
    "quantized_linear": quantized_linear_case,
}


def moved(value: Any, device: str) -> Any:
    if isinstance(value, tuple):
        return tuple(moved(part, device) for part in value)
    if isinstance(value, ops.Quantized):
        return replace(value, codes=value.codes.to(device), scales=value.scales.to(device))
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
