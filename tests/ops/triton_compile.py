"""Compiles every Triton kernel for a GPU that need not be there: a program, for it must not run in the interpreter."""

from __future__ import annotations

from itertools import product
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from fourfold.ops.triton.index import _scores
from fourfold.ops.triton.latent import _attend
from fourfold.ops.triton.matmul import _product
from fourfold.ops.triton.ngram import _rows
from fourfold.ops.triton.norm import _rms_norm
from fourfold.ops.triton.streams import _maps, _mix, _read

# kernel, types of its arguments in their order ("x" is the dtype of the model), sizes of tiles
KERNELS: list[tuple[Any, str, dict[str, Any]]] = [
    (_scores, "*x *x *fp32 *fp32 i32 i32 i32 i32", {"ROWS": 16, "COLUMNS": 64, "WIDE": 128}),
    (
        _attend,
        "*fp32 *fp32 *x *i64 i32 i32 i32 *i64 *i8 *fp32 i32 i32 i32 i32 fp32",
        {"HEADS": 16, "COLUMNS": 32, "WIDE": 512, "TURNED": 64},
    ),
    *(
        (
            _product,
            f"*x *i64 *i64 {codes} {scales} *x i32 i32 i32 i32 i32",
            {"KIND": kind, "HIGH": high, "WIDE": wide, "ROWS": 16, "COLUMNS": 64, "DEPTH": 32},
        )
        for kind, codes, scales, high, wide in (
            ("plain", "*x", "*x", 1, 2048),
            ("int8", "*i8", "*fp32", 1, 2048),
            ("int4", "*u8", "*bf16", 1, 32),
            ("fp8", "*fp8e4nv", "*fp32", 128, 128),
        )
    ),
    (_maps, "*fp32 *fp32 *fp32 *fp32 fp32", {"ITERATIONS": 20, "N": 4}),
    (_read, "*x *fp32 *x i32", {"N": 4, "SIZE": 256}),
    (_mix, "*x *x *fp32 *fp32 *x i32", {"N": 4, "SIZE": 256}),
    (_rows, "*i64 *i64 *i64 *i64 *i64 i32", {"N": 3, "J": 8, "SIZE": 128}),
    (_rms_norm, "*x *x *x i32 fp32", {"WIDE": 8192}),
]


def main() -> None:
    for (kernel, types, tiles), dtype in product(KERNELS, ("bf16", "fp32")):
        names = [name for name in kernel.arg_names if name not in tiles]
        types = types.replace("*x", f"*{dtype}").split()
        signature = dict(zip(names, types, strict=True)) | dict.fromkeys(tiles, "constexpr")
        made = compile(ASTSource(fn=kernel, signature=signature, constexprs=tiles), target=GPUTarget("cuda", 90, 32))
        shared = made.metadata.shared
        assert made.asm["cubin"] and shared <= 227 * 1024, f"{kernel.__name__}: {shared} bytes of shared memory"
        print(kernel.__name__, dtype, "compiles", f"({shared} bytes of shared memory)", flush=True)


if __name__ == "__main__":
    main()
