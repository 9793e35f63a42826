"""The kernels of quantised weights and latent attention against the references, by every route and instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fourfold import ops
from fourfold.ops import reference
from fourfold.ops.cpu import native, streams
from fourfold.ops.cpu import quantized as cpu
from fourfold.ops.cpu.buffers import HUGE, huge_empty
from fourfold.ops.cpu.latent import latent_attention
from fourfold.ops.cpu.threads import _limit, team, without_openmp

FORMATS = [("int8", 32), ("int4", 32), ("int4", 64), ("int4", 128)]
ROUTES = [name for name in ("native", "numba") if cpu._route(name) == name]
LEVELS = range(native.library().ff_level(9) + 1) if native.library() else []
needs_native = pytest.mark.skipif(native.library() is None, reason="the kernels are not compiled here")


@pytest.fixture(params=[*(f"native {level}" for level in LEVELS), *(r for r in ROUTES if r != "native")])
def kernels(request, monkeypatch):
    """Every route, and of the compiled one every instruction set that this processor has."""
    name, _, level = request.param.partition(" ")
    monkeypatch.setenv("FOURFOLD_KERNELS", name)
    if level:
        assert native.library().ff_level(int(level)) == int(level)
    yield name
    if level:
        native.library().ff_level(9)


def quantized(shape: tuple[int, ...], kind: str, group: int, seed: int = 0) -> ops.Quantized:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1
    codes, scales = ops.quantize_int8(w) if kind == "int8" else ops.quantize_int4(w, group)
    return ops.Quantized(codes, scales, shape, kind, group)


def packed(weight: ops.Quantized) -> ops.Quantized:
    made = cpu.pack_weight(weight.codes, weight)
    assert made.packed
    return made


def assert_near(got: Tensor, wanted: Tensor, bound: float) -> None:
    assert got.shape == wanted.shape and got.dtype == wanted.dtype and got.isfinite().all()
    assert (got - wanted).float().norm() <= bound * wanted.float().norm()


# ---------------------------------------------------------------- layout


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(1, 40), st.integers(1, 150), st.integers(0, 2))
def test_packing_loses_nothing(form, rows, columns, experts):
    weight = quantized((experts, rows, columns) if experts else (rows, columns), *form)
    made = weight.to_packed()
    assert made.packed and made.codes.shape[-1] == 64 and made.to_packed() is made
    plain = made.to_plain()
    assert torch.equal(plain.codes, weight.codes) and torch.equal(plain.scales, weight.scales)
    assert torch.equal(made.dequantize(), weight.dequantize())
    if experts:
        assert torch.equal(made[0].dequantize(), weight[0].dequantize())


def test_groups_that_cannot_be_packed():
    weight = quantized((4, 32), "int4", 16)
    with pytest.raises(ValueError, match="group: is 16"):
        weight.to_packed()
    assert ops.pack_weight(weight.codes, weight) is weight
    x = torch.randn(2, 32)
    assert torch.equal(ops.quantized_linear(x, weight), reference.quantized_linear(x, weight))


def test_large_buffers_lie_on_huge_pages():
    large, small = huge_empty((HUGE // 2 + 8,), torch.int32), huge_empty((3, 5), torch.bfloat16)
    assert large.data_ptr() % HUGE == 0 and large.numel() == HUGE // 2 + 8 and small.shape == (3, 5)
    large[-1] = 7
    assert large.clone()[-1] == 7


# ---------------------------------------------------------------- products


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("rows", "columns", "m"),
    [(16, 32, 1), (1, 1, 1), (5, 70, 3), (40, 129, 9), (33, 31, 17), (64, 256, 0), (100, 320, 8)],
)
def test_linear(kernels, form, rows, columns, m):
    weight = quantized((rows, columns), *form)
    x = torch.randn(m, columns, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(rows)
    got = cpu.quantized_linear(x, packed(weight), bias)
    assert_near(got, reference.quantized_linear(x, weight, bias), 1e-2)
    if m:  # a row by itself is the same row
        assert torch.equal(cpu.quantized_linear(x[-1], packed(weight), bias), got[-1])
    assert cpu.quantized_linear(x.bfloat16(), packed(weight)).dtype == torch.bfloat16


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(1, 70), st.integers(1, 300), st.integers(1, 20), st.floats(1e-20, 1e20))
def test_linear_over_random_shapes_and_sizes(form, rows, columns, m, size):
    weight = quantized((rows, columns), *form)
    x = size * torch.randn(m, columns, generator=torch.Generator().manual_seed(rows))
    exact = reference.quantized_linear(x.double(), weight)
    got = ops.quantized_linear(x, ops.pack_weight(weight.codes, weight)).double()
    usual = x.double().norm() * weight.dequantize().double().norm() / columns**0.5  # norm of what comes out
    assert (got - exact).norm() <= 1e-2 * (1 + 3 * exact.numel() ** -0.5) * usual  # a few numbers alone vary more


def test_zeros_outliers_and_what_is_not_a_number(kernels):
    weight = packed(quantized((20, 64), "int4", 32))
    x = torch.randn(3, 64)
    x[0], x[1, 3] = 0, 1e4
    got = cpu.quantized_linear(x, weight)
    assert got[0].eq(0).all()
    assert_near(got[1], reference.quantized_linear(x[1], weight), 1e-2)
    x[2, 40] = torch.nan
    got = cpu.quantized_linear(x, weight)
    assert got[:2].isfinite().all() and got[2].isnan().all()


@pytest.mark.parametrize("form", FORMATS[:3])
@pytest.mark.parametrize("limit", [0.0, 2.0])
@pytest.mark.parametrize(
    ("tokens", "n", "chosen", "d", "width"),
    [(1, 4, 2, 64, 32), (1, 3, 3, 33, 16), (5, 8, 3, 40, 48), (30, 3, 2, 70, 16), (9, 2, 1, 32, 20), (0, 4, 2, 32, 16)],
)
def test_experts(kernels, form, limit, tokens, n, chosen, d, width):
    generator = torch.Generator().manual_seed(tokens)
    gate_up, down = quantized((n, 2 * width, d), *form), quantized((n, d, width), *form, seed=1)
    x = 2 * torch.randn(tokens, d, generator=generator)
    indices = torch.rand(tokens, n, generator=generator).topk(chosen).indices
    weights = torch.rand(tokens, chosen, generator=generator)
    got = cpu.quantized_experts(x, indices, weights, packed(gate_up), packed(down), limit)
    assert_near(got, reference.quantized_experts(x, indices, weights, gate_up, down, limit), 1.2e-2)
    plain = ops.experts(x, indices, weights, gate_up.dequantize(), down.dequantize(), limit)
    assert_near(got, plain, 1.2e-2)
    for token in range(min(tokens, 3)):
        only = slice(token, token + 1)
        alone = cpu.quantized_experts(x[only], indices[only], weights[only], packed(gate_up), packed(down), limit)
        torch.testing.assert_close(alone, got[only], rtol=1e-5, atol=1e-6)


def test_an_expert_chosen_twice(kernels):
    gate_up, down = quantized((3, 32, 40), "int8", 32), quantized((3, 40, 16), "int8", 32)
    torch.manual_seed(0)
    x, indices, weights = torch.randn(1, 40), torch.tensor([[2, 0, 2]]), torch.tensor([[0.5, 1.0, 0.25]])
    got = cpu.quantized_experts(x, indices, weights, packed(gate_up), packed(down))
    assert_near(got, reference.quantized_experts(x, indices, weights, gate_up, down), 1.2e-2)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tokens", [1, 2, 11])
def test_an_expert_that_all_tokens_have(kernels, form, tokens):
    """Of another width than the others, and the same as adding it afterwards."""
    torch.manual_seed(tokens)
    gate_up, down = quantized((5, 64, 80), *form), quantized((5, 80, 32), *form, seed=1)
    shared = tuple(quantized(shape, *form, seed=n) for n, shape in enumerate([(48, 80), (48, 80), (80, 48)]))
    x, weights = torch.randn(tokens, 80), torch.rand(tokens, 2)
    indices = torch.rand(tokens, 5).topk(2).indices
    ready = packed(gate_up), packed(down), 7.0, tuple(map(packed, shared))
    got = cpu.quantized_experts(x, indices, weights, *ready)
    assert_near(got, reference.quantized_experts(x, indices, weights, gate_up, down, 7.0, shared), 1.2e-2)
    alone = cpu.quantized_experts(x[:1], indices[:1], weights[:1], *ready)
    torch.testing.assert_close(alone, got[:1], rtol=1e-5, atol=1e-6)


def test_gradients_pass_through_the_reference():
    weight = packed(quantized((8, 32), "int8", 32)) if ROUTES else quantized((8, 32), "int8", 32)
    x = torch.randn(2, 32, requires_grad=True)
    ops.quantized_linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(2, -1))


def test_the_torch_route_and_the_backend_switch_are_exact(monkeypatch):
    weight, x = quantized((20, 70), "int4", 32), torch.randn(3, 70)
    made = packed(weight) if ROUTES else weight
    wanted = reference.quantized_linear(x, weight)
    monkeypatch.setenv("FOURFOLD_KERNELS", "torch")
    assert cpu.pack_weight(weight.codes, weight) is weight
    assert torch.equal(ops.quantized_linear(x, made), wanted)
    monkeypatch.setenv("FOURFOLD_KERNELS", "native")
    monkeypatch.setenv("FOURFOLD_BACKEND", "reference")
    assert ops.pack_weight(weight.codes, weight) is weight
    assert torch.equal(ops.quantized_linear(x, made), wanted)
    monkeypatch.setenv("FOURFOLD_KERNELS", "fortran")
    with pytest.raises(ValueError, match="FOURFOLD_KERNELS: 'fortran' is unknown"):
        cpu.route()


# ---------------------------------------------------------------- latent attention


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "keys", "heads", "nope", "rope", "v", "latent"),
    [(1, 1, 1, 4, 2, 4, 6), (2, 300, 5, 16, 8, 12, 40), (3, 129, 16, 32, 16, 32, 128), (1, 16, 4, 1, 3, 5, 17)],
)
def test_latent_attention(batch, keys, heads, nope, rope, v, latent, dtype):
    generator = torch.Generator().manual_seed(keys)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, q_rope = draw(batch, heads, nope), draw(batch, heads, rope)
    expansions = (draw(heads, nope + v, latent) * 0.2).to(dtype)
    entries = draw(batch, keys, latent + rope).to(dtype)
    pages = torch.arange(batch)[:, None]  # a sequence is one page
    valid = torch.rand(batch, keys, generator=generator) < 0.6
    valid[:, keys // 2] = True
    got = latent_attention(q, q_rope, expansions, entries, pages, valid, 0.3)
    wide = [t.double() for t in (q, q_rope, expansions, entries)]
    assert_near(got, reference.latent_attention(*wide, pages, valid, 0.3).float(), 1e-5)
    indices = torch.randint(keys, (batch, 7), generator=generator)
    seen = torch.ones(batch, 7, dtype=torch.bool)
    got = latent_attention(q, q_rope, expansions, entries, pages, seen, 0.3, indices)
    assert_near(got, reference.latent_attention(*wide, pages, seen, 0.3, indices).float(), 1e-5)


@needs_native
def test_latent_attention_over_pages():
    """Rows of a sequence lie in pages of a pool, anywhere and in any order."""
    size, latent, rope = 8, 24, 8
    pool = torch.randn(6, 100 + size * (latent + rope))  # each page also holds other things
    pages = torch.tensor([[4, 1, 3], [0, 5, 2]])
    entries = pool[:, 100:].unflatten(-1, (size, -1))
    q, q_rope, expansions = torch.randn(2, 4, 16), torch.randn(2, 4, rope), torch.randn(4, 16 + 12, latent)
    valid = torch.arange(3 * size) < torch.tensor([[20], [9]])
    got = latent_attention(q, q_rope, expansions, entries, pages, valid, 0.2)
    assert_near(got, reference.latent_attention(q, q_rope, expansions, entries, pages, valid, 0.2), 1e-5)
    kept = entries[pages].flatten(1, 2).contiguous()  # the same rows, a sequence a page
    again = reference.latent_attention(q, q_rope, expansions, kept, torch.arange(2)[:, None], valid, 0.2)
    assert_near(got, again, 1e-5)


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing(threads):
    weight, x = packed(quantized((400, 700), "int4", 32)), torch.randn(3, 700)
    q, q_rope, expansions = torch.randn(1, 4, 16), torch.randn(1, 4, 8), torch.randn(4, 40, 32)
    entries, valid = torch.randn(1, 700, 40), torch.ones(1, 700, dtype=torch.bool)
    arguments = (q, q_rope, expansions, entries, torch.zeros(1, 1, dtype=torch.int64), valid, 0.2)
    before = torch.get_num_threads()
    wanted = cpu.quantized_linear(x, weight), latent_attention(*arguments)
    try:
        torch.set_num_threads(threads)
        for _ in range(20):
            assert torch.equal(cpu.quantized_linear(x, weight), wanted[0])
            assert torch.equal(latent_attention(*arguments), wanted[1])
    finally:
        torch.set_num_threads(before)


@needs_native
def test_callers_on_several_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    weight, x = packed(quantized((800, 700), "int8", 32)), torch.randn(6, 700)
    wanted, wrong = cpu.quantized_linear(x, weight), []

    def call() -> None:
        wrong.extend(i for i in range(30) if not torch.equal(cpu.quantized_linear(x, weight), wanted))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@needs_native
def test_after_a_fork_the_kernels_go_on():
    """The team stays behind in the parent; the child does all parts itself."""
    program = """
import os, torch
from fourfold.ops.cpu import quantized as cpu
from fourfold import ops
torch.set_num_threads(2)
w = ops.Quantized(*ops.quantize_int8(torch.randn(800, 700)), (800, 700), "int8")
w, x = cpu.pack_weight(w.codes, w), torch.randn(4, 700)
before = cpu.quantized_linear(x, w)
child = os.fork()
if child == 0:
    os._exit(0 if all(torch.equal(cpu.quantized_linear(x, w), before) for _ in range(5)) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", program], env=os.environ, timeout=60, check=False).returncode == 0


# ---------------------------------------------------------------- norm


@needs_native
@pytest.mark.parametrize(("rows", "d"), [(1, 1), (1, 2048), (3, 100), (0, 8), (2, 63)])
def test_rms_norm(rows, d):
    x, weight, residual = torch.randn(rows, d), torch.randn(d), torch.randn(rows, d)
    out, both = torch.empty(rows, d), residual.clone()
    run = native.library().ff_rms_norm
    run(x.data_ptr(), None, weight.data_ptr(), out.data_ptr(), rows, d, 1e-6)
    torch.testing.assert_close(out, reference.rms_norm(x, weight, 1e-6), rtol=1e-5, atol=1e-6)
    run(x.data_ptr(), both.data_ptr(), None, out.data_ptr(), rows, d, 1e-6)
    assert torch.equal(both, x + residual)
    torch.testing.assert_close(out, reference.rms_norm(x + residual, None, 1e-6), rtol=1e-5, atol=1e-6)


@needs_native
@pytest.mark.parametrize("rows", [1, 16, 17, 300])
@pytest.mark.parametrize("n, d", [(1, 5), (3, 16), (4, 192), (8, 33)])
def test_hyper_connections_of_few_and_many_tokens(rows, n, d):
    generator = torch.Generator().manual_seed(rows * n)
    x, y = torch.randn(rows, n, d, generator=generator), torch.randn(rows, d, generator=generator)
    fn, base = torch.randn(n * (n + 2), n * d, generator=generator), torch.randn(n * (n + 2), generator=generator)
    arguments = (x, fn, base, torch.tensor([0.1, 0.5, 1.0]), True, 20, 1e-6, 1e-5)
    wanted = reference.hyper_maps(*arguments)
    made = streams.hyper_maps(*arguments)
    for a, b in zip(made, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    pre, post, comb = wanted
    torch.testing.assert_close(streams.read_streams(x, pre), reference.read_streams(x, pre), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        streams.mix_streams(x, y, post, comb), reference.mix_streams(x, y, post, comb), rtol=1e-5, atol=1e-5
    )


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens, d, width", [(1, 64, 48), (3, 33, 7), (16, 192, 64)])
@pytest.mark.parametrize("limit", [0.0, 0.5])
def test_experts_of_few_tokens_do_not_depend_on_the_tokens_beside(dtype, tokens, d, width, limit):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, d, generator=generator).to(dtype)
    gate_up = (torch.randn(5, 2 * width, d, generator=generator) / d**0.5).to(dtype)
    down = (torch.randn(5, d, width, generator=generator) / width**0.5).to(dtype)
    indices = torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(tokens)])
    weights = torch.rand(tokens, 3, generator=generator)
    made = ops.experts(x, indices, weights, gate_up, down, limit)
    wide = (t.float() for t in (x, gate_up, down))
    wide_x, *wide_weights = wide
    wanted = reference.experts(wide_x, indices, weights, *wide_weights, limit)
    torch.testing.assert_close(made.float(), wanted, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
    for t in range(tokens):
        alone = ops.experts(x[t : t + 1], indices[t : t + 1], weights[t : t + 1], gate_up, down, limit)
        assert torch.equal(alone[0], made[t])


@pytest.mark.skipif(_limit() is None, reason="torch without OpenMP")
def test_one_thread_can_do_without_openmp():
    """Torch's operations there run alone; the team keeps its size, and other threads keep theirs."""
    before, others = torch.get_num_threads(), []
    try:
        torch.set_num_threads(3)
        with pytest.raises(KeyError), without_openmp():
            assert (torch.get_num_threads(), team()) == (1, 3)
            with without_openmp():
                assert (torch.get_num_threads(), team()) == (1, 3)
            assert (torch.get_num_threads(), team()) == (1, 3)
            asker = threading.Thread(target=lambda: others.extend((torch.get_num_threads(), team())))
            asker.start()
            asker.join()
            raise KeyError
        assert others == [3, 3]
        assert (torch.get_num_threads(), team()) == (3, 3)
    finally:
        torch.set_num_threads(before)
