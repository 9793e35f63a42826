"""What must hold of any model: random configurations, random documents with media."""

from __future__ import annotations

import copy
import dataclasses
import math
import random

import pytest
import torch

from fourfold.model.cache import Cache, PagePool, SequenceState, layout
from fourfold.model.sequence import TEXT, Document, pack
from fourfold.model.transformer import Model
from fourfold.ops.cpu import streams
from tests.model import tiny

SEEDS = range(24)
TOLERANCE = 1e-5


def drawn(seed: int) -> tuple[Model, random.Random]:
    return tiny.model(tiny.random_config(seed), seed), random.Random(seed)


def documents(made: Model, rng: random.Random, count: int) -> list[Document]:
    return [tiny.document(made.cfg, rng.choice([1, 2, 9, 17, 30]), rng.randint(0, 1 << 30)) for _ in range(count)]


def assert_same(got: torch.Tensor, wanted: torch.Tensor, what: object = None) -> None:
    assert got.shape == wanted.shape
    error = (got - wanted).abs().max().item() if got.numel() else 0.0
    assert error <= TOLERANCE, f"{what}: off by {error}"


def changed(document: Document, at: int) -> Document:
    """The document with another token, or other numbers in the patch, at one position; None if that is a mark."""
    tokens, patches = document.tokens.clone(), dict(document.patches)
    tokens[at] = (tokens[at] + 1) % tiny.VOCAB
    for name, p in document.patches.items():
        hit = p.index == at
        patches[name] = dataclasses.replace(p, values=p.values + hit[:, None].float())
    return dataclasses.replace(document, tokens=tokens, patches=patches)


def test_the_draws_cover_every_block():
    configs = [tiny.random_config(seed) for seed in SEEDS]
    for name, values in {
        "attention.kind": {"mla", "gqa"},
        "attention.q_lora_rank": {0, 10},
        "indexer.mode": {"off", "dense", "sparse"},
        "moe.n_routed_experts": {0, 8},
        "moe.n_group": {1, 4},
        "moe.scoring_func": {"sigmoid", "sqrtsoftplus", "softmax"},
        "residual.kind": {"plain", "hc", "mhc"},
        "rope.factor": {1.0, 8.0},
    }.items():
        table, field = name.split(".")
        assert values <= {getattr(getattr(cfg, table), field) for cfg in configs}, name
    assert len({bool(c.engram.layer_ids) for c in configs}) == len({bool(c.media.modalities) for c in configs}) == 2


@pytest.mark.parametrize("seed", SEEDS)
def test_the_future_changes_nothing(seed):
    """A later token or patch leaves every earlier logit as it is, and moves its own."""
    made, rng = drawn(seed)
    document = tiny.document(made.cfg, 24, seed)
    before = tiny.logits(made, document)
    media = [t for p in document.patches.values() for t in p.index.tolist()]
    text = (document.modality == TEXT).nonzero()[:, 0].tolist()
    for at in {23, *rng.sample(text, 3), *media[:2]}:
        if document.modality[at] != TEXT and at not in media:
            continue  # a mark's row is learned: nothing to change
        after = tiny.logits(made, changed(document, at))
        assert_same(after[:at], before[:at], at)
        assert (after[at] - before[at]).abs().max() > 1e-4


@pytest.mark.parametrize("seed", SEEDS)
def test_packed_is_as_alone(seed):
    made, rng = drawn(seed)
    batch = documents(made, rng, 5)
    together = tiny.logits(made, *batch).split([len(d) for d in batch])
    for got, document in zip(together, batch, strict=True):
        assert_same(got, tiny.logits(made, document), len(document))


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_are_as_unpacked(seed):
    """Laid into rows of 20, several to a row, attention runs as a [B, 20] batch."""
    made, rng = drawn(seed)
    lengths = [n for _ in range(3) for n in rng.choice([[20], [13, 7], [1, 18, 1], [5, 5, 10]])]
    batch = [tiny.document(made.cfg, n, seed + i) for i, n in enumerate(lengths)]
    assert_same(tiny.logits(made, *batch, row=20), tiny.logits(made, *batch))


@pytest.mark.parametrize("seed", SEEDS)
def test_prefill_is_as_chunks_is_as_single_tokens(seed):
    """Sequences of different lengths and at different stages share each step; pages hold rubbish at first."""
    made, rng = drawn(seed)
    batch = documents(made, rng, 4)
    wanted = [tiny.logits(made, d) for d in batch]
    singles = [[1] * len(d) for d in batch]
    whole = [[len(d)] for d in batch]
    chunks = [tiny.random_chunks(len(d), rng) for d in batch]
    for plan in (whole, chunks, singles):
        got = tiny.decode(made, batch, plan, page_size=rng.choice([1, 3, 4, 64]) * layout(made.cfg).multiple, fill=1e3)
        for one, want in zip(got, wanted, strict=True):
            assert_same(one, want, plan)


@torch.no_grad()
@pytest.mark.parametrize("seed", SEEDS)
def test_a_shared_prefix_is_as_an_own_one(seed):
    """Full pages of a common beginning serve two sequences, which then go their own ways."""
    made, rng = drawn(seed)
    size = math.lcm(4, layout(made.cfg).multiple)
    prefix = tiny.document(made.cfg, 3 * size, seed)
    tails = [tiny.text(rng.randint(1, 9), seed=i) for i in (1, 2)]
    pool, first = PagePool(made.cfg, 16, size), SequenceState()
    made(pack([prefix]), cache=Cache(pool, [first]))
    pool.retain(first.pages)
    second = SequenceState(list(first.pages), first.length, list(first.history), first.tail)
    shared = pool.data[first.pages].clone()
    packed = pack(tails, starts=[3 * size] * 2)
    got = made(packed, cache=Cache(pool, [first, second])).logits.split([len(t) for t in tails])
    assert first.pages[:3] == second.pages[:3] and not set(first.pages[3:]) & set(second.pages[3:])
    assert torch.equal(pool.data[first.pages[:3]], shared)
    for part, tail in zip(got, tails, strict=True):
        whole = join(prefix, tail)
        assert_same(part, tiny.logits(made, whole)[3 * size :])


def join(a: Document, b: Document) -> Document:
    columns = (torch.cat([getattr(a, c), getattr(b, c)]) for c in ("tokens", "modality", "marks", "targets"))
    return Document(*columns, a.patches)


@pytest.mark.parametrize("seed", range(8))
def test_the_backend_does_not_matter(seed, monkeypatch):
    """Logits and gradients of a batch long enough for every faster twin, against the reference alone. A gradient may
    also be as far from that of float64 as twice the reference's own: near the root in Engram's gate that is much."""
    monkeypatch.setattr(streams, "LONG", 100)
    made, _ = drawn(seed)
    packed = pack([tiny.document(made.cfg, n, seed + n) for n in (200, 60, 40)])
    got = {}
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        monkeypatch.setenv("FOURFOLD_BACKEND", backend)
        made.to(dtype).zero_grad()
        out = made(packed).logits
        out.square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
        got[backend, dtype] = out.detach(), gradients
    twin, plain, exact = got.values()
    assert_same(twin[0], plain[0])
    assert twin[1].keys() == plain[1].keys()
    for name, grad in plain[1].items():
        error, own = ((each[1][name] - exact[1][name]).abs().max() for each in (twin, plain))
        assert error <= 1e-4 * grad.abs().max() + 1e-6 + 2 * own, name


@torch.no_grad()
@pytest.mark.parametrize("seed", range(6))
def test_the_order_of_a_batch_does_not_matter(seed):
    made, rng = drawn(seed)
    batch = documents(made, rng, 4)
    got = tiny.logits(made, *reversed(batch)).split([len(d) for d in reversed(batch)])
    for one, document in zip(reversed(got), batch, strict=True):
        assert_same(one, tiny.logits(made, document))


@torch.no_grad()
@pytest.mark.parametrize("seed", range(12))
def test_bfloat16_is_near_float32(seed):
    made, rng = drawn(seed)
    batch = documents(made, rng, 4)
    wanted = tiny.logits(made, *batch)
    got = tiny.logits(copy.deepcopy(made).bfloat16(), *batch)
    assert got.dtype == torch.float32 and got.isfinite().all()
    assert (got - wanted).abs().mean() < 0.15 * wanted.std()
    decoded = torch.cat(tiny.decode(copy.deepcopy(made).bfloat16(), batch, [[1] * len(d) for d in batch]))
    assert (decoded - wanted).abs().mean() < 0.15 * wanted.std()


@pytest.mark.parametrize("seed", range(12))
def test_training_is_as_evaluation(seed):
    """No dropout, no noise: the training pass gives the same logits and a finite gradient for all it uses."""
    made, rng = drawn(seed)
    batch = documents(made, rng, 3)
    wanted = tiny.logits(made, *batch)
    got = made.train()(pack(batch)).logits
    assert_same(got.detach(), wanted)
    got.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in made.parameters())
