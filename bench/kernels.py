"""Our CPU kernels beside torch's own operations and the limit of this minute, each at the shapes of DeepSeek-V2-Lite.

A decoding kernel is held to a read-bandwidth probe taken among its runs, prefill to the int8 matrix product of torch
on ready int8 operands. Every product reads another weight, so that none is still in a cache. The host's bandwidth
drifts: fractions are worth more than times.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from _report import case, finish, interleaved, median, parser
from torch import Tensor

from fourfold import ops
from fourfold.ops import reference
from fourfold.ops.cpu import native
from fourfold.ops.cpu import quantized as cpu
from fourfold.ops.cpu.buffers import huge_empty

WIDE, NARROW, EXPERTS, CHOSEN = 2048, 1408, 16, 6
HEADS, LATENT, ROPE, NOPE, VALUE = 16, 512, 64, 128, 128
COLD = 160 << 20  # bytes of weights that are gone through in turn; far more than the caches hold

Arms = dict[str, Callable[[], object]]


def probe() -> Callable[[], object]:
    """Reads COLD bytes once."""
    data = huge_empty((COLD,), torch.uint8).fill_(1)
    library = native.library()
    threads = torch.get_num_threads()
    return lambda: library.ff_read_bandwidth(data.data_ptr(), data.numel(), threads)  # type: ignore[union-attr]


def weights(kind: str, rows: int, columns: int) -> list[ops.Quantized]:
    """As many packed weights as fill COLD bytes; their codes are the same."""
    w = torch.randn(rows, columns)
    codes, scales = ops.quantize_int8(w) if kind == "int8" else ops.quantize_int4(w)
    one = cpu.pack_weight(codes, ops.Quantized(codes, scales, (rows, columns), kind))
    count = max(1, COLD // one.codes.nbytes)
    stack = huge_empty((count, *one.codes.shape), torch.uint8).copy_(one.codes.expand(count, *one.codes.shape))
    return [ops.Quantized(c, one.scales.clone(), one.shape, kind, packed=True) for c in stack]


def turns(function: Callable[[Any], object], items: list[Any], times: int) -> Callable[[], object]:
    """Calls ``function`` with the next few items."""
    endless = cycle(items)

    def run() -> None:
        for _ in range(times):
            function(next(endless))

    return run


def torch_int4(rows: int, columns: int, x: Tensor, times: int) -> Callable[[], object]:
    """torch's packed int4 product; only bfloat16 activations take its fast path."""
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    one = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    items = [one.clone() for _ in range(COLD // one.nbytes)]
    scales = torch.rand(columns // 32, rows, 2).bfloat16()
    return turns(lambda w: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, 32, scales), items, times)


def torch_int8(rows: int, columns: int, x: Tensor, times: int) -> Callable[[], object]:
    one, scales = torch.randint(-127, 128, (rows, columns), dtype=torch.int8), torch.rand(rows).bfloat16()
    items = [one.clone() for _ in range(COLD // one.nbytes)]
    return turns(lambda w: torch.ops.aten._weight_int8pack_mm(x, w, scales), items, times)


def line(
    arms: Arms, times: int, repeats: int, peer: str, limit: Callable[[dict[str, float]], float], **extra: Any
) -> Any:
    """Microseconds of one call: ours, the peer's, and what the limit allows."""
    seconds = interleaved(arms, repeats)
    medians = {name: median(values) for name, values in seconds.items()}
    ours = medians["ours"] / times * 1e6
    theirs = medians["peer"] / times * 1e6
    spread = [s / times * 1e6 for s in seconds["ours"]]
    measured = case(ours, theirs, limit(medians) * 1e6, "us", spread, peer_name=peer, **extra)
    measured["ratio"] = theirs / ours  # times faster than the peer
    measured["load"] = os.getloadavg()[0]  # of all processes: beside others, times are theirs too
    return measured


def by_bandwidth(size: int) -> Callable[[dict[str, float]], float]:
    return lambda medians: size * medians["probe"] / COLD


def linear(kind: str, m: int, repeats: int, read: Callable[[], object]) -> Any:
    items, times = weights(kind, NARROW, WIDE), 16
    x = torch.randn(m, WIDE)
    theirs = (torch_int4 if kind == "int4" else torch_int8)(NARROW, WIDE, x.bfloat16(), times)
    arms: Arms = {"ours": turns(lambda w: ops.quantized_linear(x, w), items, times), "peer": theirs, "probe": read}
    size = items[0].codes.nbytes + items[0].scales.nbytes
    name = "_weight_int4pack_mm_for_cpu" if kind == "int4" else "_weight_int8pack_mm"
    return line(arms, times, repeats, f"{name} bf16", by_bandwidth(size), bytes=size)


def prefill(kind: str, m: int, repeats: int) -> Any:
    """The limit is torch's int8 product of operands that are int8 already, without scales."""
    items, times = weights(kind, NARROW, WIDE), 2
    x, half = torch.randn(m, WIDE), torch.randn(NARROW, WIDE).bfloat16()
    left, right = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((m, WIDE), (NARROW, WIDE)))
    arms: Arms = {
        "ours": turns(lambda w: ops.quantized_linear(x, w), items, times),
        "peer": turns(lambda w: F.linear(x.bfloat16(), w), [half], times),
        "limit": turns(lambda w: torch._int_mm(left, w.T), [right], times),
    }
    work = 2 * m * NARROW * WIDE
    return line(
        arms, times, repeats, "bf16 F.linear of a ready bf16 weight", lambda s: s["limit"] / times, operations=work
    )


def stacks(kind: str) -> tuple[ops.Quantized, ops.Quantized]:
    made = []
    for rows, columns in ((2 * NARROW, WIDE), (WIDE, NARROW)):
        w = torch.randn(rows, columns) * 0.02
        codes, scales = ops.quantize_int8(w) if kind == "int8" else ops.quantize_int4(w)
        stack = ops.Quantized(
            codes.expand(EXPERTS, -1, -1), scales.expand(EXPERTS, *scales.shape), (EXPERTS, rows, columns), kind
        )
        made.append(cpu.pack_weight(stack.codes, stack))
    return made[0], made[1]


def experts(kind: str, tokens: int, repeats: int, read: Callable[[], object]) -> Any:
    """A routed layer; the peer is torch's bf16 product of the dequantised experts."""
    gate_up, down = stacks(kind)
    x, shares = torch.randn(tokens, WIDE), torch.rand(tokens, CHOSEN)
    choices = [torch.rand(tokens, EXPERTS).topk(CHOSEN).indices for _ in range(16)]
    half = [w.dequantize(torch.bfloat16) for w in (gate_up, down)]
    narrow, times = x.bfloat16(), 4
    arms: Arms = {
        "ours": turns(lambda i: ops.quantized_experts(x, i, shares, gate_up, down), choices, times),
        "peer": turns(lambda i: reference.experts(narrow, i, shares, *half), choices, times),
        "probe": read,
    }
    used = len(choices[0].unique())
    size = sum(w.codes.nbytes + w.scales.nbytes for w in (gate_up, down)) * used // EXPERTS
    return line(arms, times, repeats, "bf16 products, expert by expert", by_bandwidth(size), bytes=size)


def latent(keys: int, repeats: int, read: Callable[[], object]) -> Any:
    """Absorbed attention of one query; the peer is the plain reference in bfloat16."""
    q, q_rope = torch.randn(1, HEADS, NOPE), torch.randn(1, HEADS, ROPE)
    w = (torch.randn(HEADS, NOPE + VALUE, LATENT) * 0.02).bfloat16()
    one = torch.randn(1, keys, LATENT + ROPE).bfloat16()
    size, times = one.nbytes + w.nbytes, 4
    items = [(one.clone(), w.clone()) for _ in range(max(2, COLD // size))]
    seen, page = torch.ones(1, keys, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.int64)
    halves = q.bfloat16(), q_rope.bfloat16()
    arms: Arms = {
        "ours": turns(lambda i: ops.latent_attention(q, q_rope, i[1], i[0], page, seen, 0.07), items, times),
        "peer": turns(lambda i: reference.latent_attention(*halves, i[1], i[0], page, seen, 0.07), items, times),
        "probe": read,
    }
    return line(arms, times, repeats, "torch in bf16", by_bandwidth(size), bytes=size)


def norm(repeats: int, read: Callable[[], object]) -> Any:
    x, w, out, times = torch.randn(1, WIDE), torch.randn(WIDE), torch.empty(1, WIDE), 64
    run = native.library().ff_rms_norm  # type: ignore[union-attr]
    arms: Arms = {
        "ours": turns(lambda _: run(x.data_ptr(), None, w.data_ptr(), out.data_ptr(), 1, WIDE, 1e-6), [0], times),
        "peer": turns(lambda _: F.rms_norm(x, (WIDE,), w, 1e-6), [0], times),
        "probe": read,
    }
    return line(arms, times, repeats, "F.rms_norm", by_bandwidth(3 * x.nbytes))


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--long", action="store_true", help="more shapes")
    args = arguments.parse_args()
    if native.library() is None:
        raise SystemExit("kernels: not compiled; run python -m fourfold.ops.cpu.native.build")
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    read, cases = probe(), {}
    for kind in ("int4", "int8"):
        for m in (1, 2, 4, 8, 16) if args.long else (1, 4):
            cases[f"linear {kind}, {m} rows"] = linear(kind, m, args.repeats, read)
        for m in (64, 512, 2048) if args.long else (512,):
            cases[f"linear {kind}, {m} rows"] = prefill(kind, m, args.repeats)
        for tokens in (1, 2, 4, 8) if args.long else (1,):
            cases[f"experts {kind}, {tokens} tokens"] = experts(kind, tokens, args.repeats, read)
    for keys in (64, 512, 2048, 8192) if args.long else (512, 2048):
        cases[f"latent attention, {keys} keys"] = latent(keys, args.repeats, read)
    cases["norm"] = norm(args.repeats, read)
    finish(cases, args.json)


if __name__ == "__main__":
    main()
