"""Caches in every format: what comes out is what the rounded rows give, however they are read."""

from __future__ import annotations

import random

import pytest
import torch

from fourfold import ops
from fourfold.model.cache import Cache, layout
from tests.model import tiny
from tests.model.test_cache import SPARSE

SCALED = [torch.int8, torch.float8_e4m3fn]
SHAPES = {
    "dense": {},
    "gqa": {"attention.kind": "gqa"},
    "flat": SPARSE,
    "two levels": SPARSE | {"indexer.block_size": 2, "indexer.candidate_blocks": 3},
    "compressed": tiny.COMPRESSED,
    "compressed, mhc": tiny.COMPRESSED | {"residual.kind": "mhc"},
}


def documents(seed):
    rng = random.Random(seed)
    batch = [tiny.text(n, seed=n) for n in (33, 20, 1)]
    return batch, [tiny.random_chunks(len(d), rng) for d in batch]


@torch.no_grad()
@pytest.mark.parametrize("dtype", SCALED, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_format_gives_what_its_decoded_rows_give(shape, dtype, monkeypatch):
    """To the last bit: the same pages in float32, each row and what asks for it rounded as the format does."""
    made = tiny.model(tiny.config(**SHAPES[shape]))
    batch, chunks = documents(1)
    size = 2 * layout(made.cfg).multiple
    got = tiny.decode(made, batch, chunks, size, dtype=dtype)

    def rounded(self, name, values):
        parts = self.pool.layout.slots[name].parts
        return ops.decode_rows(ops.encode_rows(values, parts, dtype), parts)

    monkeypatch.setattr(Cache, "_encoded", rounded)
    for where in (ops.cpu.index, ops.reference.index):
        monkeypatch.setattr(where, "queries_for", lambda _, q: q.bfloat16().to(q.dtype))
    for one, wanted in zip(got, tiny.decode(made, batch, chunks, size), strict=True):
        assert torch.equal(one, wanted)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, *SCALED], ids=str)
@pytest.mark.parametrize("shape", ["dense", "gqa", "compressed", "compressed, mhc"])
def test_rounded_rows_give_nearly_the_same_answer(shape, dtype):
    made = tiny.model(tiny.config(**SHAPES[shape] | {"indexer.mode": "off"}))
    batch, chunks = documents(2)
    got = torch.cat(tiny.decode(made, batch, chunks, 2 * layout(made.cfg).multiple, dtype=dtype))
    wanted = torch.cat([tiny.logits(made, d) for d in batch])
    error = (got - wanted).abs().mean() / wanted.std()
    assert 0 < error < {torch.float8_e4m3fn: 0.05}.get(dtype, 0.02)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", SCALED, ids=str)
def test_rows_with_scales_are_not_decoded_as_if_they_had_none(dtype):
    """One position a step, as the call of all layers takes it where pages are plain."""
    made = tiny.model(tiny.config(**SHAPES["compressed, mhc"] | {"indexer.mode": "off"})).eval()
    document = tiny.text(33, seed=3)
    steps = [document], [[1] * len(document)], 2 * layout(made.cfg).multiple
    got, wanted = (torch.cat(tiny.decode(made, *steps, dtype=d)) for d in (dtype, torch.float32))
    assert 0 < (got - wanted).abs().mean() / wanted.std() < 0.05
