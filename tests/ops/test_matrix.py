"""Half types that nobody learns from, by the matrix unit where there is one, and with it left aside."""

from __future__ import annotations

import random

import pytest
import torch

from fourfold.ops import reference
from fourfold.ops.cpu import attention, experts, native, wide_linear

UNIT = pytest.mark.parametrize("matrix", ["on", "off"])
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def unit(matrix, monkeypatch):
    monkeypatch.setenv("FOURFOLD_MATRIX", matrix)


@UNIT
def test_the_unit_can_be_left_aside(matrix):
    assert not (matrix == "off" and native.matrix_unit())


@UNIT
@pytest.mark.parametrize("seed", range(30))
def test_attention(seed, matrix):
    """Ragged lengths and widths, a query that sees nothing, masks with strides."""
    rng, _ = random.Random(seed), torch.manual_seed(seed)
    batch, queries, keys = rng.randint(1, 2), rng.choice([1, 7, 64, 65, 150]), rng.choice([1, 15, 16, 33, 64, 217])
    groups, share, dim, width = (
        rng.choice([1, 2]),
        rng.choice([1, 3, 8]),
        rng.choice([1, 24, 33, 64]),
        rng.choice([5, 16, 40]),
    )
    q = torch.randn(batch, queries, groups * share, dim, dtype=HALF)
    k, v = torch.randn(batch, keys, groups, dim, dtype=HALF), torch.randn(batch, keys, groups, width, dtype=HALF)
    visible = torch.rand(batch, queries, keys) < rng.choice([0.02, 0.5, 1.0])
    visible[..., keys // 3 : keys // 2] = False
    sinks = torch.randn(groups * share, dtype=HALF) if seed % 3 else None
    if sinks is None:
        visible[..., -1] |= ~visible.any(-1)
    lying = visible.transpose(1, 2).contiguous().transpose(1, 2) if seed % 2 else visible
    got = attention(q, k, v, lying, dim**-0.5, sinks)
    exact = None if sinks is None else sinks.float()
    wanted = reference.attention(q.float(), k.float(), v.float(), visible, dim**-0.5, exact)
    assert got.dtype == HALF
    torch.testing.assert_close(got.float(), wanted, rtol=2e-2, atol=2e-2)


@UNIT
def test_sinks_that_learn_alone_keep_their_gradient(matrix):
    torch.manual_seed(0)
    q, k = torch.randn(1, 70, 2, 32, dtype=HALF), torch.randn(1, 70, 1, 32, dtype=HALF)
    visible, sinks = torch.ones(1, 70, 70, dtype=torch.bool).tril(), torch.randn(2, requires_grad=True)
    got, wanted = (
        torch.autograd.grad(attend(x, y, y, visible, 0.2, sinks).float().square().sum(), sinks)[0]
        for attend, x, y in ((attention, q, k), (reference.attention, q.float(), k.float()))
    )
    assert float(wanted.abs().max()) > 0.1
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)


@UNIT
@pytest.mark.parametrize("seed", range(8))
def test_experts(seed, matrix):
    """Experts that nobody chose, and counts that fill no tile; each token gets what it gets alone with others."""
    rng, _ = random.Random(seed), torch.manual_seed(seed)
    tokens, number, per_token, limit = (
        rng.choice([90, 301]),
        rng.choice([4, 9]),
        rng.choice([3, 4]),
        rng.choice([0.0, 0.7]),
    )
    d, width = rng.choice([32, 96]), rng.choice([32, 64])
    x, weights = torch.randn(tokens, d, dtype=HALF), torch.rand(tokens, per_token)
    gate_up = (torch.randn(number + 2, 2 * width, d) / d**0.5).to(HALF)
    down = (torch.randn(number + 2, d, width) / width**0.5).to(HALF)
    indices = torch.rand(tokens, number).topk(per_token).indices + 1
    got = experts(x, indices, weights, gate_up, down, limit)
    wanted = reference.experts(x.float(), indices, weights, gate_up.float(), down.float(), limit)
    assert got.dtype == HALF
    torch.testing.assert_close(got.float(), wanted, rtol=2e-2, atol=4e-2)
    if native.matrix_unit():
        assert torch.equal(experts(x[3:], indices[3:], weights[3:], gate_up, down, limit), got[3:])


@UNIT
@pytest.mark.parametrize("of_weight", [HALF, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(9, 40, 32), (64, 32, 64), (301, 24, 96), (600, 67, 32), (50, 3, 33)])
def test_wide_linear(shape, of_weight, matrix):
    """Half numbers are multiplied exactly and summed in float32."""
    torch.manual_seed(0)
    rows, outs, d = shape
    x, weight = torch.randn(rows, d, dtype=HALF), torch.randn(outs, d, dtype=of_weight)
    with torch.no_grad():
        got = wide_linear(x, weight)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, (x.double() @ weight.double().T).float(), rtol=1e-5, atol=1e-4)
