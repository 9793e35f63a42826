"""Early fusion: which rows are the embedders', and what they depend on."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fourfold.model.embedders import coord_features
from fourfold.model.sequence import (
    AUDIO,
    END,
    IMAGE,
    MODALITIES,
    NEWLINE,
    NO_MARK,
    START,
    TEXT,
    VIDEO,
    Document,
    Packed,
    Patches,
    pack,
)
from tests.model import tiny

CFG = tiny.config(media=tiny.MEDIA)


def batch() -> Packed:
    """Three documents with every modality and every mark."""
    packed = pack([tiny.document(CFG, 60, seed) for seed in (0, 1, 2)])
    pairs = set(zip(packed.modality.tolist(), packed.marks.tolist(), strict=True))
    assert {(IMAGE, START), (IMAGE, NEWLINE), (IMAGE, END), (VIDEO, NO_MARK), (AUDIO, NO_MARK)} <= pairs
    return packed


@torch.no_grad()
def test_rows_by_hand():
    """Text keeps its token's row; a patch is two linear maps plus its place; a mark is a learned row."""
    made, packed = tiny.model(CFG), batch()
    rows = made.embed(packed)[:, 0]
    where = {name: p.index.tolist() for name, p in packed.patches.items()}
    for t in range(len(packed)):
        kind, mark = int(packed.modality[t]), int(packed.marks[t])
        if kind == TEXT:
            wanted = made.embed_tokens.weight[packed.tokens[t]]
        else:
            embedder, name = made.media.embedders[MODALITIES[kind]], MODALITIES[kind]
            if mark != NO_MARK:
                wanted = embedder.delimiters[[START, NEWLINE, END].index(mark)]
            else:
                n = where[name].index(t)
                values, place = packed.patches[name].values[n], packed.patches[name].coords[n]
                hidden = embedder.in_proj.weight @ values + embedder.in_proj.bias
                hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
                wanted = embedder.out_proj.weight @ hidden + embedder.out_proj.bias
                wanted = wanted + embedder.coord_proj.weight @ coord_features(place[None])[0]
        torch.testing.assert_close(rows[t], wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_placeholder_token_is_replaced():
    made, packed = tiny.model(CFG), batch()
    before = made.embed(packed)
    made.embed_tokens.weight[list(tiny.PLACEHOLDERS.values())] += 1
    media = packed.modality != TEXT
    assert torch.equal(made.embed(packed)[media], before[media])


@torch.no_grad()
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("modality", ["image", "video", "audio"])
def test_time_row_and_column_matter(modality, axis):
    made, packed = tiny.model(CFG), batch()
    patches = packed.patches[modality]
    coords = patches.coords.clone()
    coords[:, axis] += 1
    elsewhere = dataclasses.replace(patches, coords=coords)
    moved = dataclasses.replace(packed, patches=packed.patches | {modality: elsewhere})
    change = (made.embed(moved) - made.embed(packed)).abs().amax((1, 2))
    assert (change[patches.index] > 1e-3).all()
    change[patches.index] = 0
    assert not change.any()


def test_coordinates_are_told_apart_over_their_range():
    """64 x 64 patches and the tenths of a minute all have features of their own, within [-1, 1]."""
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(64.0), torch.arange(64.0))
    times = torch.zeros(600, 3)
    times[:, 0] = torch.arange(600) / 10
    for coords in (grid, times):
        features = coord_features(coords)
        assert features.abs().max() <= 1 + 1e-6
        distances = torch.cdist(features, features).fill_diagonal_(9)
        assert distances.min() > 1e-3


@pytest.mark.parametrize("lacking", ["image", "video", "audio"])
def test_a_foreign_modality_is_refused_by_name(lacking):
    made = tiny.model(CFG.replace(**{f"media.{lacking}": None}))
    with pytest.raises(ValueError, match=f"modality.*{lacking}"):
        tiny.logits(made, *(tiny.document(CFG, 60, seed) for seed in (0, 1, 2)))


def test_every_foreign_modality_is_named():
    documents = [tiny.document(CFG, 60, seed) for seed in (0, 1, 2)]
    with pytest.raises(ValueError, match="audio, image, video"):
        tiny.logits(tiny.model(tiny.config()), *documents)


def test_marks_alone_need_no_patches():
    """A chunk of a prefill may hold only the end of a span."""
    made = tiny.model(CFG)
    one = torch.tensor([tiny.PLACEHOLDERS[IMAGE]])
    document = Document(one, torch.tensor([IMAGE]), torch.tensor([END]), torch.tensor([-100]))
    with torch.no_grad():
        assert torch.equal(made.embed(pack([document]))[0, 0], made.media.embedders["image"].delimiters[2])


def test_embedders_learn_from_the_first_step():
    made, packed = tiny.model(CFG).train(), batch()
    made(packed).logits.square().sum().backward()
    for name, p in made.media.named_parameters():
        assert p.grad is not None and p.grad.any(), name


def test_patches_follow_their_document():
    """Slices and packs keep each patch at its own position."""
    documents = [tiny.document(CFG, 40, seed) for seed in (0, 1)]
    whole, pieces = pack(documents), [d.slice(a, b) for d in documents for a, b in ((0, 13), (13, 14), (14, 40))]
    again = pack(pieces)
    for name, patches in whole.patches.items():
        assert isinstance(again.patches[name], Patches)
        for part in ("index", "values", "coords"):
            assert torch.equal(getattr(again.patches[name], part), getattr(patches, part))
