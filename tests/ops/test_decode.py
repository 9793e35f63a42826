"""A decoded token through many layers in one call: against the reference, and against the modules it stands for."""

from __future__ import annotations

import random
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fourfold import ops
from fourfold.model import decode
from fourfold.model.cache import Cache, PagePool, SequenceState
from fourfold.model.sequence import pack
from fourfold.ops import reference
from fourfold.ops.cpu import native
from fourfold.ops.cpu.decode import decode_layers
from fourfold.ops.reference.decode import DecodeLayer, DecodeLayers, DecodeState, Pooling, Site
from tests.model import tiny

needs_native = pytest.mark.skipif(native.library() is None, reason="the kernels are not compiled here")
PAGE = 16


def random_case(seed: int, rows: int | None = None) -> tuple[Tensor, DecodeLayers, DecodeState]:
    """Layers of every kind, and sequences of any length: at their first token, at the end of a group, far on."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    d, n, heads, groups = rng.choice([8, 33, 64]), rng.choice([1, 2, 4]), rng.choice([2, 4, 10]), rng.choice([1, 2])
    head, rope, rank, o_rank = rng.choice([6, 16, 40]), rng.choice([2, 4, 6]), rng.choice([5, 16]), rng.choice([3, 8])
    window, index_heads, index_head = rng.choice([1, 2, 9, 40]), rng.choice([1, 8]), rng.choice([6, 16])
    experts, width = rng.choice([1, 6]), rng.choice([7, 32])
    per_token, tail, page = rng.randint(1, experts), 0, 0

    def weight(*shape: int) -> Tensor:
        return torch.randn(shape) * shape[-1] ** -0.5

    def site() -> Site:
        return Site(weight(n * (n + 2), n * d), torch.randn(n * (n + 2)), torch.rand(3), torch.rand(d) + 0.5)

    def pooling(width: int, overlaps: bool, ratio: int) -> Pooling:
        out = 2 * width if overlaps else width
        gate, bias = (weight(out, d), torch.randn(ratio, out)) if rng.random() < 0.8 else (None, None)
        return Pooling(weight(out, d), gate, bias, torch.rand(width) + 0.5)

    def tail_rows(rows: int, width: int) -> int:
        nonlocal tail
        tail += rows * width
        return tail - rows * width

    def slot(width: int, ratio: int) -> int:
        nonlocal page
        page += width * PAGE // ratio
        return page - width * PAGE // ratio

    made = []
    for kind in [rng.choice(["window", "all", "selecting"]) for _ in range(rng.randint(1, 3))]:
        ratio = {"window": 0, "selecting": rng.choice([2, 4])}.get(kind, rng.choice([1, 4, 8]))
        overlaps, selects = kind == "selecting", kind == "selecting" and rng.random() < 0.8
        pending = (2 * ratio if overlaps else ratio) - 1
        routed, shared = rng.random() < 0.8, rng.random() < 0.7
        wide = rng.choice([5, 48])
        shared = shared or not routed
        hashed = routed and rng.random() < 0.3
        made.append(
            DecodeLayer(
                site(), weight(rank, d), torch.rand(rank) + 0.5, weight(heads * head, rank), weight(head, d),
                torch.rand(head) + 0.5, weight(groups * o_rank, heads * head // groups), weight(d, groups * o_rank),
                torch.randn(heads), pooling(head, overlaps, ratio) if ratio else None,
                pooling(index_head, True, ratio) if selects else None,
                weight(index_heads * index_head, rank) if selects else None,
                weight(index_heads, d) if selects else None,
                site(), weight(experts, d) if routed else None,
                torch.randn(experts) if routed and not hashed and rng.random() < 0.7 else None,
                torch.randint(experts, (9, per_token)) if hashed else None,
                weight(experts, 2 * width, d) if routed else None, weight(experts, d, width) if routed else None,
                *((weight(wide, d), weight(wide, d), weight(d, wide)) if shared else [None] * 3),
                ratio, overlaps, tail_rows(window - 1, head),
                tail_rows(pending, (4 if overlaps else 2) * head) if ratio else 0,
                tail_rows(pending, 4 * index_head) if selects else 0,
                slot(head, ratio) if ratio else 0, slot(index_head, ratio) if selects else 0,
            )
        )  # fmt: skip
    layers = DecodeLayers(
        tuple(made), torch.rand(2, rope // 2), (1.0, 1.1), heads, groups, window, rng.choice([1, 5, 100]), index_heads,
        per_token, rng.choice(["sigmoid", "sqrtsoftplus", "softmax"]), rng.random() < 0.5, 1.3, rng.choice([0.0, 0.5]),
        rng.choice([1, 20]), 1e-6, 1e-6,
    )  # fmt: skip
    rows = rows or rng.choice([1, 1, 3, 9])
    positions = torch.tensor([rng.choice([0, 1, 3, 7, 30, rng.randrange(200), 399]) for _ in range(rows)])
    tables = torch.randperm(rows * 25).view(rows, 25)
    state = DecodeState(
        positions, torch.randint(9, (rows,)), [torch.randn(tail) for _ in range(rows)], torch.full((rows, tail), 7.0),
        torch.randn(rows * 25, page + 3), PAGE, tables,
    )  # fmt: skip
    return torch.randn(rows, n, d), layers, state


def cast(value: Any, dtype: torch.dtype) -> Any:
    """The same with weights of another dtype."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    if isinstance(value, tuple):
        return tuple(cast(v, dtype) for v in value)
    if is_dataclass(value):
        return replace(value, **{f.name: cast(getattr(value, f.name), dtype) for f in fields(value)})
    return value


def copied(state: DecodeState, dtype: torch.dtype = torch.float32) -> DecodeState:
    return replace(state, new_tails=state.new_tails.clone(), pages=state.pages.to(dtype).clone())


@needs_native
@pytest.mark.parametrize("seed", range(60))
def test_layers_of_every_kind(seed):
    streams, layers, state = random_case(seed)
    mine, law = copied(state), copied(state)
    got = decode_layers(streams, layers, mine, 0, len(layers.layers))
    wanted = reference.decode_layers(streams, layers, law, 0, len(layers.layers))
    for one, other in ((got, wanted), (mine.new_tails, law.new_tails), (mine.pages, law.pages)):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-4)


@needs_native
@pytest.mark.parametrize("seed", range(20))
def test_half_layers(seed):
    """Held to the reference in float32. One layer, and nothing to choose: rounding would choose otherwise."""
    streams, layers, state = random_case(seed)
    at = layers.layers[0]
    per_token = layers.per_token if at.router is None else len(at.router)
    tables = None if at.router_table is None else torch.arange(per_token).expand(9, -1).contiguous()
    half = cast(
        replace(layers, layers=(replace(at, router_table=tables),), per_token=per_token, topk=100), torch.bfloat16
    )
    half = replace(half, frequencies=layers.frequencies)
    streams, mine, law = streams.bfloat16(), copied(state, torch.bfloat16), copied(state, torch.bfloat16)
    law = replace(law, pages=law.pages.float())
    got = decode_layers(streams, half, mine, 0, 1)
    wanted = reference.decode_layers(streams.float(), cast(half, torch.float32), law, 0, 1)
    assert got.dtype == torch.bfloat16 and mine.pages.dtype == torch.bfloat16
    for one, other in ((got, wanted), (mine.new_tails, law.new_tails), (mine.pages, law.pages)):
        if other.numel():
            assert (one.float() - other).abs().max() <= 4e-2 * other.abs().max().clamp_min(1)


@needs_native
@pytest.mark.parametrize("seed", range(8))
def test_a_sequence_never_depends_on_those_beside_it(seed):
    streams, layers, state = random_case(seed, rows=7)
    together = decode_layers(streams, layers, copied(state), 0, len(layers.layers))
    for t in range(7):
        one = copied(state)
        one = replace(
            one, positions=state.positions[t : t + 1], tokens=state.tokens[t : t + 1], tails=state.tails[t : t + 1],
            new_tails=one.new_tails[t : t + 1], tables=state.tables[t : t + 1],
        )  # fmt: skip
        assert torch.equal(decode_layers(streams[t : t + 1], layers, one, 0, len(layers.layers)), together[t : t + 1])


@needs_native
def test_no_layers_change_nothing():
    streams, layers, state = random_case(0)
    mine = copied(state)
    assert torch.equal(decode_layers(streams, layers, mine, 1, 1), streams) and torch.equal(mine.pages, state.pages)


def test_other_dtypes_take_the_reference():
    streams, layers, state = random_case(1)
    wide = replace(cast(layers, torch.float64), frequencies=layers.frequencies)
    tails = [t.double() for t in state.tails]
    mine = replace(copied(state, torch.float64), tails=tails, new_tails=state.new_tails.double())
    law = replace(copied(state, torch.float64), tails=tails, new_tails=state.new_tails.double())
    got = decode_layers(streams.double(), wide, mine, 0, len(layers.layers))
    assert torch.equal(got, reference.decode_layers(streams.double(), wide, law, 0, len(layers.layers)))


# ---------------------------------------------------------------- in a model

CONFIG = tiny.COMPRESSED | {
    "residual.kind": "mhc",
    "moe.n_routed_experts": 4,
    "moe.num_experts_per_tok": 2,
    "moe.moe_intermediate_size": 16,
    "moe.scoring_func": "sqrtsoftplus",
}


@torch.inference_mode()
def steps(made: Any, monkeypatch: Any, count: int = 24, before: Any = None) -> tuple[list[Tensor], int]:
    """Logits of two sequences token by token, and how often the layers went through one call."""
    calls = 0
    real = ops.decode_layers

    def counted(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return real(*args)

    monkeypatch.setattr(ops, "decode_layers", counted)
    pool, states, out = PagePool(made.cfg, 20, 8), [SequenceState(), SequenceState()], []
    made(pack([tiny.text(5, 1)]), cache=Cache(pool, states[:1]))
    for turn in range(count):
        if before is not None:
            before(turn)
        pieces = [tiny.text(1, turn), tiny.text(1, turn + 100)]
        packed = pack(pieces, starts=[s.length for s in states])
        out.append(made(packed, cache=Cache(pool, states)).logits)
    monkeypatch.setattr(ops, "decode_layers", real)
    return out, calls


@needs_native
@pytest.mark.parametrize("mode", ["sparse", "off"])
def test_the_model_gives_what_its_modules_give(mode, monkeypatch):
    made = tiny.model(tiny.config(**CONFIG | {"indexer.mode": mode}))
    got, calls = steps(made, monkeypatch)
    assert calls == 24
    monkeypatch.setattr(decode, "decoder", lambda *args: None)
    monkeypatch.setattr("fourfold.model.transformer.decoder", lambda *args: None)
    wanted, calls = steps(made, monkeypatch)
    assert calls == 0
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@needs_native
def test_changed_weights_and_listeners_are_noticed(monkeypatch):
    made = tiny.model(tiny.config(**CONFIG))
    other = tiny.model(tiny.config(**CONFIG), seed=1)

    def change(turn: int) -> None:
        if turn == 4:
            made.layers[0].self_attn.q_a_proj.weight.data = other.layers[0].self_attn.q_a_proj.weight.data
        if turn == 8:
            made.layers[1].mlp = other.layers[1].mlp
        if turn == 12:
            made.load_state_dict(other.state_dict())

    got, calls = steps(made, monkeypatch, before=change)
    assert calls == 24
    monkeypatch.setattr("fourfold.model.transformer.decoder", lambda *args: None)
    made = tiny.model(tiny.config(**CONFIG))
    wanted, _ = steps(made, monkeypatch, before=change)
    for one, law in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, law, rtol=1e-3, atol=1e-4)
    monkeypatch.undo()
    heard: list[int] = []
    made.layers[0].self_attn.q_a_proj.register_forward_hook(lambda *args: heard.append(1))
    assert steps(made, monkeypatch)[1] == 0 and len(heard) == 25
