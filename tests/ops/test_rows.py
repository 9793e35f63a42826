"""Rows of the cache in every format, and the kernels that read them where they lie."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from fourfold import ops
from fourfold.counts import row_bytes
from fourfold.ops import reference
from fourfold.ops.cpu import native
from fourfold.ops.cpu.index import select_positions
from fourfold.ops.cpu.latent import latent_attention
from fourfold.ops.cpu.rows import decode_rows, encode_rows

SCALED = [torch.int8, torch.float8_e4m3fn]
needs_native = pytest.mark.skipif(native.library() is None, reason="the kernels are not compiled here")


def parts_of(x: Tensor, parts: list[int]) -> list[Tensor]:
    return list(x.split(parts, dim=-1))


@pytest.mark.parametrize("dtype", ops.ROW_FORMATS.values(), ids=str)
@pytest.mark.parametrize("parts", [[1], [3, 2], [12, 4], [64, 8], [5, 1, 7]])
def test_rows_take_what_is_counted_and_come_back_near(dtype, parts):
    x = torch.randn(3, 5, sum(parts)) * torch.tensor([100.0, 1e-3, 1.0])[:, None, None]
    x[0, 0], x[1, 2, : parts[0]] = 0, 0
    rows = ops.encode_rows(x, parts, dtype)
    assert rows.dtype == dtype and rows.shape == (3, 5, ops.row_width(parts, dtype))
    assert rows[0, 0].nbytes == row_bytes(parts, dtype.itemsize)
    got = ops.decode_rows(rows, parts)
    assert torch.equal(got, ops.decode_rows(rows, parts)) and torch.equal(got[0, 0].float(), x[0, 0])
    for g, w in zip(parts_of(got.float(), parts), parts_of(x, parts), strict=True):  # each part by its own measure
        top = w.abs().amax(-1, keepdim=True)
        bound = {torch.float32: 0 * w, torch.bfloat16: w.abs() / 2**8, torch.int8: top / 253}.get(dtype)
        bound = (w.abs() / 2**4).maximum(top / 448 / 2**9) if bound is None else bound
        assert ((g - w).abs() <= bound * 1.001).all()


@pytest.mark.parametrize("dtype", SCALED, ids=str)
def test_each_part_has_a_scale_of_its_own(dtype):
    """A rotary key a thousand times the latent leaves the latent as exact as it was."""
    x = torch.randn(6, 20)
    louder = torch.cat([x[:, :16], 1000 * x[:, 16:]], dim=-1)
    alone, beside = (ops.decode_rows(ops.encode_rows(v, [16, 4], dtype), [16, 4]) for v in (x, louder))
    assert torch.equal(alone[:, :16], beside[:, :16])


@pytest.mark.parametrize("dtype", SCALED, ids=str)
def test_encoding_what_was_decoded_changes_nothing(dtype):
    once = ops.decode_rows(ops.encode_rows(torch.randn(50, 24), [16, 8], dtype), [16, 8])
    again = ops.decode_rows(ops.encode_rows(once, [16, 8], dtype), [16, 8])
    torch.testing.assert_close(again, once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", SCALED, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(dtype, bad):
    x = torch.zeros(2, 8)
    x[1, 3] = bad
    with pytest.raises(ValueError, match="cannot be quantised"):
        ops.encode_rows(x, [8], dtype)


@needs_native
@pytest.mark.parametrize("dtype", SCALED, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_the_kernels_make_and_read_the_same_bytes(dtype, seed):
    """Also where numbers lie in the middle between two codes, are tiny, or fill the range."""
    rng, _ = random.Random(seed), torch.manual_seed(seed)
    parts = [rng.choice([1, 3, 16, 33, 512]) for _ in range(rng.randint(1, 3))]
    x = torch.randn(rng.choice([0, 1, 17, 100]), 2, sum(parts)) * 10.0 ** rng.choice([-42, -38, -3, 0, 30])
    x.flatten()[:: rng.randint(2, 5)] = 0
    if seed % 2:  # whole and half codes of a scale of one
        x = (torch.randint(-254, 255, x.shape) / 2).float()
        x[..., torch.tensor([0, *parts[:-1]]).cumsum(0)] = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}[dtype]
    wanted = reference.encode_rows(x, parts, dtype)
    got = encode_rows(x, parts, dtype)
    assert got.dtype == dtype and torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(decode_rows(got, parts), reference.decode_rows(wanted, parts))
    assert torch.equal(
        encode_rows(x.bfloat16(), parts, dtype).view(torch.uint8),
        reference.encode_rows(x.bfloat16(), parts, dtype).view(torch.uint8),
    )


def in_pages(rows: Tensor, offset: int = 12) -> Tensor:
    """The same rows [P, n, w] in pages that hold other things too, random bytes."""
    pages = torch.randint(0, 100, (len(rows), offset + rows[0].nbytes + 8), dtype=torch.uint8)
    pages[:, offset : offset + rows[0].nbytes] = rows.contiguous().view(torch.uint8).flatten(1)
    return pages[:, offset : offset + rows[0].nbytes].view(rows.dtype).unflatten(-1, rows.shape[1:])


@needs_native
@pytest.mark.parametrize("dtype", SCALED, ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_latent_attention_reads_rows_as_if_they_were_decoded(dtype, seed):
    rng, _ = random.Random(seed), torch.manual_seed(seed)
    batch, heads, keys, size = (
        rng.randint(1, 3),
        rng.choice([1, 5, 16]),
        rng.choice([1, 40, 300]),
        rng.choice([1, 4, 16]),
    )
    latent, rope, nope, v = rng.choice([5, 16, 70]), rng.choice([2, 8, 33]), rng.randint(1, 20), rng.randint(1, 20)
    each = -(-keys // size)
    rows = ops.encode_rows(torch.randn(batch * each, size, latent + rope), [latent, rope], dtype)
    q, q_rope = torch.randn(batch, heads, nope), torch.randn(batch, heads, rope)
    expansions, pages = torch.randn(heads, nope + v, latent), torch.randperm(batch * each).view(batch, each)
    valid, indices = torch.rand(batch, keys) < 0.7, None
    if seed % 2:
        indices = torch.rand(batch, keys).argsort(-1)[:, : rng.randint(1, keys)]
        valid = valid.gather(1, indices)
    valid[:, 0] = True
    rest = (pages, valid, 0.3, indices)
    got = latent_attention(q, q_rope, expansions, in_pages(rows), *rest)
    decoded = ops.decode_rows(rows, [latent, rope])
    assert torch.equal(got, latent_attention(q, q_rope, expansions, decoded, *rest))
    assert torch.equal(
        reference.latent_attention(q, q_rope, expansions, in_pages(rows), *rest),
        reference.latent_attention(q, q_rope, expansions, decoded, *rest),
    )
    torch.testing.assert_close(
        got, reference.latent_attention(q, q_rope, expansions, decoded, *rest), rtol=1e-4, atol=1e-4
    )


@needs_native
@pytest.mark.parametrize("matrix", ["on", "off"])
@pytest.mark.parametrize("dtype", SCALED, ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_selection_reads_rows_as_if_they_were_decoded(dtype, seed, matrix, monkeypatch):
    """Scales are powers of two and values few, so that every way of adding up is exact and scores are often equal."""
    monkeypatch.setenv("FOURFOLD_MATRIX", matrix)
    rng, _ = random.Random(seed), torch.manual_seed(seed)
    batch, heads, dim, block = rng.randint(1, 2), rng.choice([1, 3, 16]), rng.choice([1, 8, 33]), rng.choice([1, 2, 4])
    size, queries, blocks = block * rng.choice([1, 4, 16]), rng.randint(1, 40), rng.randint(1, 6)
    past = torch.tensor([rng.randint(0, 150) for _ in range(batch)])
    each = -(-(int(past.max()) + queries) // size)
    top = {torch.int8: 127, torch.float8_e4m3fn: 448}[dtype]

    def rows(per_page: int) -> Tensor:
        x = torch.randint(-2, 3, (batch * each + 1, per_page, dim)).float()
        x[..., :1] = top  # the largest of each row, so that its scale is 1
        return ops.encode_rows(x, [dim], dtype)

    keys, summaries = rows(size), rows(size // block)
    q, weights, block_q, block_weights = (
        torch.randint(least, 3, shape).float()
        for _ in range(2)
        for least, shape in ((-2, (batch, queries, heads, dim)), (-1, (batch, queries, heads)))
    )
    pages, k = torch.randperm(batch * each).view(batch, each), rng.choice([1, 5, 64])
    asked = block_q, block_weights, blocks
    for decoded, lying in (((), ()), ((ops.decode_rows(summaries, [dim]), *asked), (in_pages(summaries), *asked))):
        wanted = reference.select_positions(q, weights, ops.decode_rows(keys, [dim]), pages, past, k, *decoded)
        for select in (select_positions, reference.select_positions):
            assert torch.equal(select(q, weights, in_pages(keys), pages, past, k, *lying), wanted)


@needs_native
@pytest.mark.parametrize("matrix", ["on", "off"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, *SCALED], ids=str)
def test_selection_by_either_unit_keeps_the_best_scores(dtype, matrix, monkeypatch):
    """Of numbers as they come: no key is kept whose exact score is below the k-th best by more than rounding."""
    monkeypatch.setenv("FOURFOLD_MATRIX", matrix)
    torch.manual_seed(0)
    for heads, dim, k in ((8, 32, 64), (9, 64, 7), (4, 24, 16)):
        keys = ops.encode_rows(torch.randn(13, 32, dim), [dim], dtype)
        q, weights, past = torch.randn(1, 5, heads, dim), torch.randn(1, 5, heads), torch.tensor([400])
        pages = torch.randperm(13)[None]
        found = select_positions(q, weights, in_pages(keys), pages, past, k)
        lying = ops.decode_rows(keys, [dim])[pages[0]].flatten(0, 1)[None].double()
        scores = reference.index_scores(q.bfloat16().double(), lying, weights.double())
        scores = scores.masked_fill(torch.arange(13 * 32) > torch.arange(400, 405)[:, None], -torch.inf)
        assert (found >= 0).all() and (found.diff() > 0).all()
        assert (scores.gather(-1, found) >= scores.topk(k).values[..., -1:] - 2e-4).all()


@needs_native
@pytest.mark.parametrize("matrix", ["on", "off"])
@pytest.mark.parametrize("summaries", [None, torch.ones(3, 4, 5, dtype=torch.bfloat16)], ids=["all", "blocks"])
def test_a_key_of_several_positions_is_seen_from_the_last_of_them_on(matrix, summaries, monkeypatch):
    monkeypatch.setenv("FOURFOLD_MATRIX", matrix)
    keys, q, weights = torch.ones(3, 8, 5, dtype=torch.bfloat16), torch.ones(1, 9, 2, 5), torch.ones(1, 9, 2)
    for select in (select_positions, reference.select_positions):
        asked = q, weights, keys, torch.tensor([[2, 0, 1]]), torch.tensor([1]), 2
        found = select(*asked, summaries, q, weights, 2, ratio=4)
        assert found[0].tolist() == [[-1, -1]] * 2 + [[0, -1]] * 4 + [[0, 1]] * 3


@needs_native
@pytest.mark.parametrize("width", [1, 15, 16, 40])
def test_every_code_is_read_as_what_it_stands_for(width):
    """All codes of fp8 (but its NaN, which no row has) and of int8, through the kernel with the weight of one."""
    for dtype, codes in ((torch.float8_e4m3fn, 256), (torch.int8, 256)):
        every = torch.arange(codes, dtype=torch.uint8)
        every = every[(every & 127) != 127] if dtype == torch.float8_e4m3fn else every
        values = every.view(dtype).float()
        head = torch.tensor([0.75, 1.0]).view(torch.uint8)
        padding = torch.zeros(ops.row_width([width, 1], dtype) - 8 - width, dtype=torch.uint8)
        rows = torch.stack([torch.cat([head, code.expand(width), padding]) for code in every]).view(dtype)[None]
        q, q_rope = torch.zeros(len(every), 1, 1), torch.zeros(len(every), 1, 1)
        expansions = torch.cat([torch.zeros(1, width), torch.eye(width)])[None]
        each = torch.arange(len(every))[:, None]  # one key a query, so that what comes out is its latent
        pages, valid = torch.zeros(len(every), 1, dtype=torch.int64), torch.ones(len(every), 1, dtype=torch.bool)
        got = latent_attention(q, q_rope, expansions, rows, pages, valid, 1.0, each)
        assert torch.equal(got[:, 0], (0.75 * values)[:, None].expand(-1, width))
