"""Packing: nothing lost, nothing cut, nothing waits for ever, and hardly a position empty."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.data.pack import Batches, best_fit
from fourfold.model.sequence import IGNORE, Document
from fourfold.text.tokenizer import Tokenizer

ROW = 64


class Lengths:
    """A feed of documents of given lengths, over and over; each token says which document it is of."""

    def __init__(self, lengths: Sequence[int], tokenizer: Tokenizer) -> None:
        self.lengths, self.tokenizer, self.at = lengths, tokenizer, 0

    def draw(self) -> tuple[int, Document]:
        self.at += 1
        return self.at - 1, self._document(self.at - 1)

    def again(self, tickets: Sequence[int]) -> list[Document]:
        return [self._document(ticket) for ticket in tickets]

    def state(self) -> int:
        return self.at

    def restore(self, state: int) -> None:
        self.at = state

    def _document(self, number: int) -> Document:
        return Document.text([1000 + number] * self.lengths[number % len(self.lengths)])


@given(st.lists(st.integers(1, 20), min_size=1, max_size=9), st.integers(20, 40))
def test_best_fit_leaves_the_least_room_there_is(lengths: list[int], row: int) -> None:
    chosen = best_fit(lengths, row)
    others = range(1, len(lengths))
    sums = {sum(lengths[i] for i in (0, *some)) for k in range(len(lengths)) for some in combinations(others, k)}
    assert chosen[0] == 0 and len(set(chosen)) == len(chosen)
    assert sum(lengths[i] for i in chosen) == max(s for s in sums if s <= row)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, ROW), min_size=1, max_size=30),
    waiting=st.integers(1, 12),
    rows=st.integers(1, 3),
    stop=st.integers(0, 6),
)
def test_packing_keeps_its_promises(
    tokenizer: Tokenizer, lengths: list[int], waiting: int, rows: int, stop: int
) -> None:
    batches = Batches(Lengths(lengths, tokenizer), ROW, rows, waiting)
    state: Any = None
    packs = []
    for step in range(8):
        if step == stop:
            state = json.dumps(batches.state())
        packs.append(next(batches))
        assert len(batches.held) < waiting
    seen: list[int] = []
    for packed in packs:
        bounds = packed.cu_seqlens.tolist()
        assert len(packed) == rows * ROW and bounds[0] == 0 and bounds[-1] == len(packed)
        for start, end in zip(bounds, bounds[1:], strict=False):
            assert start // ROW == (end - 1) // ROW, "in one row"
            tokens, targets = packed.tokens[start:end], packed.targets[start:end]
            assert packed.positions[start:end].tolist() == list(range(end - start)) and len(tokens.unique()) == 1
            if tokens[0] >= 1000:
                number = int(tokens[0]) - 1000
                seen.append(number)
                assert end - start == lengths[number % len(lengths)], "whole"
                assert targets[-1] == IGNORE and torch.equal(targets[:-1], tokens[1:])
            else:
                assert (targets == IGNORE).all()
    held = [number for number, _ in batches.held]
    assert sorted(seen + held) == list(range(batches.next)), "each once, or waiting"
    resumed = Batches(Lengths(lengths, tokenizer), ROW, rows, waiting)
    resumed.restore(json.loads(state))
    assert all(torch.equal(next(resumed).tokens, packed.tokens) for packed in packs[stop:])


def test_rows_are_nearly_full_on_realistic_lengths(tokenizer: Tokenizer) -> None:
    """Log-normal text, as of web pages (long ones split at the row), chats, and media of nearly one length."""
    rng = np.random.default_rng(0)
    row = 1024
    text = np.concatenate([[row] * (n // row) + [n % row or row] for n in rng.lognormal(6, 1.2, 400).astype(int) + 2])
    chats, pictures = rng.lognormal(5, 0.8, 400).astype(int) + 8, rng.integers(76, 84, 300)
    lengths = rng.permutation(np.minimum(np.concatenate([text, chats, pictures]), row)).tolist()
    shares = {}
    for waiting in (1, 16, 64):
        batches = Batches(Lengths(lengths, tokenizer), row, 4, waiting)
        for _ in range(40):
            next(batches)
        shares[waiting] = batches.filled / batches.emitted
    assert shares[1] < 0.6 < 0.97 < shares[16] <= shares[64] and shares[64] > 0.995, shares
