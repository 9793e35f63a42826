"""Every twin in the dispatch table gives what its reference gives: values and gradients."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fourfold import ops
from fourfold.ops import reference
from fourfold.ops.cpu.attention import BLOCK
from fourfold.ops.cpu.experts import FEW, STEP
from fourfold.ops.cpu.linear import LONG as MANY
from fourfold.ops.cpu.norm import FEW as FEW_ROWS
from fourfold.ops.cpu.rope import FEW as FEW_NUMBERS
from fourfold.ops.cpu.streams import FEW as FEW_STREAMS
from fourfold.ops.cpu.streams import LONG

QUANTIZED = {n for n in reference.__all__ if getattr(getattr(reference, n), "__module__", "").endswith(".quantized")}
ELSEWHERE = QUANTIZED | {"decode_layers"}  # see test_native and test_decode, for those in Triton test_triton
TWINS = [("cpu", name) for name in ops.TWINS["cpu"] if name not in ELSEWHERE]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10, torch.bfloat16: 4e-2}  # of the largest number expected
SIZES = ["empty", "one", "small", "odd", "below", "at", "above"]  # the last three: of the twins' thresholds


@dataclass
class Case:
    """Arguments of one op, in order. ``learn``: which of the tensors get gradients."""

    args: list[Any]
    learn: list[int] = field(default_factory=list)


def length(size: str, rng: random.Random, threshold: int) -> int:
    table = {"empty": 0, "one": 1, "small": rng.randint(2, 9), "odd": 13, "below": threshold - 1, "at": threshold}
    return table.get(size, threshold + rng.randint(1, 77))


def width(size: str, rng: random.Random) -> int:
    return {"one": 1, "odd": rng.choice([3, 5, 7, 11])}.get(size) or rng.choice([4, 8, 12, 16, 21])


def attention_case(size: str, dtype: torch.dtype, rng: random.Random) -> Case:
    batch, queries = rng.randint(1, 3), length(size, rng, rng.choice([BLOCK // 2, BLOCK]))
    keys = max(queries + rng.randint(0, 5), 1)
    groups, kv_heads, dim, value_dim = rng.choice([1, 2, 3]), rng.choice([1, 2]), width(size, rng), width(size, rng)
    visible = torch.rand(batch, queries, keys) < 0.4
    visible[..., 0] |= ~visible.any(-1)  # a query sees at least one key
    sinks = torch.randn(groups * kv_heads, dtype=dtype) if rng.random() < 0.5 else None
    return Case(
        [
            torch.randn(batch, queries, groups * kv_heads, dim, dtype=dtype),
            torch.randn(batch, keys, kv_heads, dim, dtype=dtype),
            torch.randn(batch, keys, kv_heads, value_dim, dtype=dtype),
            visible,
            dim**-0.5,
            sinks,
        ],
        learn=[0, 1, 2] if sinks is None else [0, 1, 2, 5],
    )


def attention_mass_case(size: str, dtype: torch.dtype, rng: random.Random) -> Case:
    q, k, _, visible, scale, *_ = attention_case(size, dtype, rng).args
    if len(visible) > 1:
        visible[1, visible.shape[1] // 2 :] = False  # queries, and a whole block of them, that see nothing
    return Case([q, k, visible, scale])


def linear_case(size: str, dtype: torch.dtype, rng: random.Random) -> Case:
    rows, inner, outer = length(size, rng, MANY), width(size, rng), width(size, rng)
    x = torch.randn(rows, inner, dtype=dtype)
    x = x.view(2, -1, inner) if rows % 2 == 0 and rng.random() < 0.5 else x
    bias = torch.randn(outer, dtype=dtype) if rng.random() < 0.5 else None
    weight = torch.randn(outer, inner, dtype=dtype) / inner**0.5
    return Case([x, weight, bias], learn=[0, 1] if bias is None else [0, 1, 2])


def wide_linear_case(size: str, dtype: torch.dtype, rng: random.Random) -> Case:
    x, weight, _ = linear_case(size, dtype, rng).args
    return Case([x, weight], learn=[0, 1])


def rms_norm_case(size: str, dtype: torch.dtype, rng: random.Random) -> Case:
    shape = (length(size, rng, FEW_ROWS + 1), width(size, rng))
    weight = torch.randn(shape[1], dtype=dtype) if rng.random() < 0.7 else None
    x = torch.randn(shape, dtype=dtype)
    x = x.view(2, -1, shape[1]) if shape[0] % 2 == 0 and rng.random() < 0.5 else x
    if weight is not None and rng.random() < 0.3:
        weight = torch.randn(x.shape[1:], dtype=dtype)  # one for each head
    return Case([x, weight, 1e-6], learn=rng.choice([[], [0], [0, 1]]) if weight is not None else [])


def apply_rope_case(size: str, dtype: torch.dtype, rng: random.Random) -> Case:
    tokens, half = length(size, rng, 40), 1 if size == "one" else rng.randint(2, 20)
    heads = (FEW_NUMBERS // (80 * half) + 1,) if size in ("at", "above") else rng.choice([(), (1,), (3,)])
    angles = torch.randn(tokens, half, dtype=torch.float64).to(of_maps(dtype))
    learn, still = rng.choice([[], [0]]), rng.choice([0, 0, 1, 24])
    x = torch.randn(tokens, *heads, still + 2 * half, dtype=dtype)
    return Case([x, angles.cos(), angles.sin(), rng.random() < 0.5], learn)


def latent_attention_case(size: str, dtype: torch.dtype, rng: random.Random) -> Case:
    batch, heads, keys = rng.randint(1, 3), rng.choice([1, 4, 5]), max(length(size, rng, 128), 1)
    nope, rope, v, latent = (width(size, rng) for _ in range(4))
    per_page = rng.choice([1, 4, 16])
    pages = -(-keys // per_page)
    table = torch.randperm(batch * pages).view(batch, pages)
    valid, indices = torch.rand(batch, keys) < 0.6, None
    if rng.random() < 0.5:
        indices = torch.rand(batch, keys).argsort(-1)[:, : rng.randint(1, keys)]
        valid = valid.gather(1, indices)
    valid[:, 0] = True
    return Case(
        [
            torch.randn(batch, heads, nope, dtype=dtype),
            torch.randn(batch, heads, rope, dtype=dtype),
            torch.randn(heads, nope + v, latent, dtype=dtype) / latent**0.5,
            torch.randn(batch * pages, per_page, latent + rope, dtype=dtype),
            table,
            valid,
            0.3,
            indices,
        ],
        learn=rng.choice([[], [0, 1, 2, 3]]),
    )


def encode_rows_case(size: str, dtype: torch.dtype, rng: random.Random) -> Case:
    """Not fp8, some of whose bytes are NaN as numbers; test_rows.py looks at bytes."""
    parts = [width(size, rng) for _ in range(rng.randint(1, 3))]
    x = torch.randn(length(size, rng, 40), sum(parts), dtype=dtype)
    return Case([x, parts, rng.choice([torch.int8, torch.float32, torch.bfloat16])])


def decode_rows_case(size: str, dtype: torch.dtype, rng: random.Random) -> Case:
    x, parts, _ = encode_rows_case(size, torch.float32, rng).args
    return Case([reference.encode_rows(x, parts, rng.choice([torch.int8, torch.float8_e4m3fn, dtype])), parts])


def experts_case(size: str, dtype: torch.dtype, rng: random.Random) -> Case:
    n_experts = 1 if size == "one" else rng.randint(4, 9)
    per_token = rng.randint(1, min(3, n_experts))
    tokens = -(-length(size, rng, FEW) // per_token) if size in ("at", "above") else length(size, rng, FEW) // per_token
    if size == "above" and rng.random() < 0.5:
        tokens = -(-2 * STEP * n_experts // per_token) + rng.randint(0, 99)  # enough to fill rows up
    tokens = max(tokens, size != "empty")
    dim, inner = width(size, rng), width(size, rng)
    reachable = max(n_experts - 2, per_token)  # some experts get nothing
    indices = torch.rand(tokens, reachable).argsort(-1)[:, :per_token]
    weights = torch.rand(tokens, per_token, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    gate_up = torch.randn(n_experts, 2 * inner, dim, dtype=dtype) / dim**0.5
    down = torch.randn(n_experts, dim, inner, dtype=dtype) / inner**0.5
    limit = rng.choice([0.0, 0.7]) if dtype != torch.bfloat16 else 0.0  # rounding across it turns gradients on or off
    return Case([torch.randn(tokens, dim, dtype=dtype), indices, weights, gate_up, down, limit], learn=[0, 2, 3, 4])


def select_topk_case(size: str, dtype: torch.dtype, rng: random.Random) -> Case:
    """Scores with many exact ties (also of 0 and -0), as the indexer's relu makes them."""
    batch, queries = rng.randint(1, 3), length(size, rng, 30)
    keys = max(queries, 1) + rng.randint(0, 7)
    scores = torch.randn(batch, queries, keys).mul(rng.choice([0.6, 1.0, 3.0])).round().to(dtype)
    if rng.random() < 0.3:
        scores = torch.randn(batch, queries, keys, dtype=dtype)
    causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand(batch, -1, -1)
    visible = causal & (torch.rand(batch, queries, keys) < rng.choice([0.7, 1.1]))
    return Case([scores, visible, rng.randint(1, keys + 2)])


def shapes_of_streams(size: str, rng: random.Random) -> tuple[int, int, int]:
    return length(size, rng, LONG), 1 if size == "one" else rng.randint(2, 5), width(size, rng)


def of_maps(dtype: torch.dtype) -> torch.dtype:
    """Maps are float32 beside half streams."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def hyper_maps_case(size: str, dtype: torch.dtype, rng: random.Random) -> Case:
    tokens, n, dim = shapes_of_streams(size, rng)
    maps, fine = n * (n + 2), of_maps(dtype)
    return Case(
        [
            torch.randn(tokens, n, dim, dtype=dtype),
            torch.randn(maps, n * dim, dtype=fine) / (n * dim) ** 0.5,
            torch.randn(maps, dtype=fine) * rng.choice([1.0, 6.0]),
            torch.randn(3, dtype=fine),
            rng.random() < 0.8,
            rng.choice([1, 2, 20]),
            1e-6,
            1e-6,
        ],
        learn=[0, 1, 2, 3],
    )


def read_streams_case(size: str, dtype: torch.dtype, rng: random.Random) -> Case:
    tokens, n, dim = shapes_of_streams(size, rng)
    return Case([torch.randn(tokens, n, dim, dtype=dtype), torch.randn(tokens, n, dtype=of_maps(dtype))], learn=[0, 1])


def mix_streams_case(size: str, dtype: torch.dtype, rng: random.Random) -> Case:
    tokens, n, dim = shapes_of_streams(size, rng)
    return Case(
        [
            torch.randn(tokens, n, dim, dtype=dtype),
            torch.randn(tokens, dim, dtype=dtype),
            torch.randn(tokens, n, dtype=of_maps(dtype)),
            torch.randn(tokens, n, n, dtype=of_maps(dtype)),
        ],
        learn=[0, 1, 2, 3],
    )


def select_positions_case(size: str, dtype: torch.dtype, rng: random.Random) -> Case:
    """Whole numbers, so that every way of adding up is exact, and few of them, so that scores are often equal."""
    batch, heads, dim, block = rng.randint(1, 2), rng.choice([1, 3, 16, 21]), width(size, rng), rng.choice([1, 2, 4])
    page_size, queries, blocks = block * rng.choice([1, 4, 16]), length(size, rng, 40), rng.randint(1, 6)
    past = torch.tensor([rng.randint(0, 150) for _ in range(batch)])
    each = -(-(int(past.max()) + max(queries, 1)) // page_size)
    keys = torch.randint(-2, 3, (batch * each + 1, page_size, dim)).to(dtype)
    summaries = torch.randint(-2, 3, (batch * each + 1, page_size // block, dim)).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def queries_and_weights() -> list[Tensor]:
        q, weights = torch.randint(-2, 3, (batch, queries, heads, dim)), torch.randint(-1, 3, (batch, queries, heads))
        return [q.to(wide), weights.to(wide)]

    asked = queries_and_weights()
    return Case(
        [
            *queries_and_weights(),
            keys,
            torch.randperm(batch * each).view(batch, each),
            past,
            rng.choice([1, 5, 64]),
            *((summaries, *asked, blocks) if rng.random() < 0.7 else (None, None, None, 0)),
            rng.choice([1, 1, 3, 4]),
            rng.choice([-torch.inf, -torch.inf, 0.0, 2.5]),
        ]
    )


def collapse_streams_case(size: str, dtype: torch.dtype, rng: random.Random) -> Case:
    tokens, n, d = length(size, rng, FEW_STREAMS + 1), rng.choice([1, 2, 4, 9]), width(size, rng)
    shapes = (tokens, n, d), (n, n * d), (n,), (1,)
    return Case([*(torch.randn(s, dtype=dtype) for s in shapes), 1e-6, 1e-6], [0, 1, 2, 3])


CASES: dict[str, Callable[[str, torch.dtype, random.Random], Case]] = {
    "apply_rope": apply_rope_case,
    "attention": attention_case,
    "attention_mass": attention_mass_case,
    "collapse_streams": collapse_streams_case,
    "decode_rows": decode_rows_case,
    "encode_rows": encode_rows_case,
    "experts": experts_case,
    "hyper_maps": hyper_maps_case,
    "latent_attention": latent_attention_case,
    "linear": linear_case,
    "mix_streams": mix_streams_case,
    "read_streams": read_streams_case,
    "rms_norm": rms_norm_case,
    "select_positions": select_positions_case,
    "select_topk": select_topk_case,
    "wide_linear": wide_linear_case,
}


def strided(t: Tensor, rng: random.Random) -> Tensor:
    """The same numbers, laid out in another way."""
    if t.dim() > 1 and rng.random() < 0.5:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    return torch.stack([t, torch.zeros_like(t)], dim=-1)[..., 0]


def run(function: Callable[..., Any], case: Case, args: list[Any], cotangents: list[Tensor] | None) -> list[Tensor]:
    """Outputs, then gradients of the learnt arguments."""
    args = [a.detach().requires_grad_() if i in case.learn else a for i, a in enumerate(args)]
    outputs = function(*args)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if cotangents is None:
        return outputs
    given = [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, [args[i] for i in case.learn], given) if case.learn else ()
    return [*(o.detach() for o in outputs), *grads]


def assert_near(got: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    assert got.shape == wanted.shape, what
    if wanted.numel():
        error, scale = (got.double() - wanted.double()).abs().max(), wanted.double().abs().max()
        assert error <= tolerance * max(scale, 1.0), f"{what}: off by {error} where the largest is {scale}"


def test_every_twin_has_a_case():
    assert {name for _, name in TWINS} == set(CASES)


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("device", "name"), TWINS)
def test_twin_equals_reference(device, name, size, dtype, layout):
    twin = ops.implementation(name, device, None)
    law = getattr(reference, name)
    assert twin is not law
    for seed in range(3):
        rng = random.Random(f"{name} {size} {dtype} {seed}")
        torch.manual_seed(rng.randint(0, 1 << 30))
        case = CASES[name](size, dtype, rng)
        args = case.args
        if layout == "strided":
            args = [strided(a, rng) if isinstance(a, Tensor) else a for a in args]
        if name.startswith("select"):
            assert torch.equal(twin(*args), law(*case.args))
            continue
        # Half types are held to the reference in float32: their own reference rounds too.
        exact = [a.float() if isinstance(a, Tensor) and a.dtype == torch.bfloat16 else a for a in case.args]
        shapes = law(*case.args)
        shapes = shapes if isinstance(shapes, tuple) else (shapes,)
        cotangents = [torch.randn(s.shape) for s in shapes]
        given = [strided(c, rng) for c in cotangents] if layout == "strided" else cotangents
        got, wanted = run(twin, case, args, given), run(law, case, exact, cotangents)
        assert [g.dtype for g in got[: len(shapes)]] == [s.dtype for s in shapes]
        for number, (g, w) in enumerate(zip(got, wanted, strict=True)):
            assert_near(g, w, TOLERANCE[dtype], f"seed {seed}, output or gradient {number}")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["attention", "experts", "linear"])
def test_bfloat16_on_a_processor_without_products_of_it(name, size, monkeypatch):
    monkeypatch.setenv("FOURFOLD_MATRIX", "off")
    for file in ("attention", "linear"):
        monkeypatch.setattr(sys.modules[f"fourfold.ops.cpu.{file}"], "HALF", False)
    test_twin_equals_reference("cpu", name, size, torch.bfloat16, "contiguous")


@pytest.mark.parametrize("tokens", [3, LONG + 5])
def test_streams_copied_by_expansion(tokens):
    """The embedding enters all streams as one row with stride 0."""
    torch.manual_seed(0)
    row = torch.randn(tokens, 6)
    pre, post, comb = torch.rand(tokens, 4), torch.rand(tokens, 4), torch.rand(tokens, 4, 4)
    x, y = row[:, None].expand(-1, 4, -1), torch.randn(tokens, 6)
    torch.testing.assert_close(ops.read_streams(x, pre), row * pre.sum(-1, keepdim=True))
    wanted = post[..., None] * y[:, None] + comb.sum(1)[..., None] * row[:, None]
    torch.testing.assert_close(ops.mix_streams(x, y, post, comb), wanted)


@pytest.mark.parametrize("tokens", [3, LONG + 5])
def test_a_half_sublayer_writes_to_float32_streams(tokens):
    """What autocast does: x, post and comb float32, y bfloat16; its gradient comes back in its own dtype."""
    torch.manual_seed(0)
    x, post, comb = torch.randn(tokens, 4, 6), torch.rand(tokens, 4), torch.rand(tokens, 4, 4)
    y = torch.randn(tokens, 6, dtype=torch.bfloat16, requires_grad=True)
    out = ops.mix_streams(x, y, post, comb)
    torch.testing.assert_close(out, reference.mix_streams(x, y.detach().float(), post, comb))
    out.sum().backward()
    torch.testing.assert_close(y.grad.float()[:, 0], post.sum(-1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("tokens", [3, LONG])
@pytest.mark.parametrize("size", [80.0, 300.0])
def test_saturated_maps_stay_finite(tokens, size):
    """Biases far outside the range of exp: gates at their limits, gradients without NaN."""
    n = 4
    base = (torch.randn(n * (n + 2), generator=torch.Generator().manual_seed(0)).sign() * size).requires_grad_()
    x, fn, scale = torch.randn(tokens, n, 3), torch.zeros(n * (n + 2), n * 3), torch.ones(3)
    maps = ops.hyper_maps(x, fn, base, scale, True, 20, 1e-6, 1e-6)
    wanted = reference.hyper_maps(x, fn, base, scale, True, 20, 1e-6, 1e-6)
    for got, want in zip(maps, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    sum(m.sum() for m in maps).backward()
    assert base.grad.isfinite().all()


def test_backend_reference_switches_all_twins_off(monkeypatch):
    monkeypatch.setenv("FOURFOLD_BACKEND", "reference")
    for _, name in TWINS:
        assert ops.implementation(name, "cpu", "reference") is getattr(reference, name)
    called = []
    monkeypatch.setattr("fourfold.ops.cpu.select_topk", lambda *a: called.append(a))
    visible = torch.ones(1, 1, 3, dtype=torch.bool)
    ops.implementation.cache_clear()
    assert ops.select_topk(torch.tensor([[[0.0, 2.0, 1.0]]]), visible, 2).tolist() == [[[False, True, True]]]
    assert not called
    monkeypatch.setenv("FOURFOLD_BACKEND", "cpu")
    ops.select_topk(torch.zeros(1, 1, 3), visible, 2)
    assert called
    ops.implementation.cache_clear()


@pytest.mark.parametrize("name", ["attention", "select_topk"])
def test_unknown_backend_is_refused_by_name(name, monkeypatch):
    monkeypatch.setenv("FOURFOLD_BACKEND", "abacus")
    with pytest.raises(ValueError, match="FOURFOLD_BACKEND.*abacus.*reference"):
        getattr(ops, name)(torch.zeros(1, 1, 1), torch.ones(1, 1, 1, dtype=torch.bool), 1)


def test_other_devices_use_the_reference():
    assert ops.implementation("attention", "meta", None) is reference.attention
