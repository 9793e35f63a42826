"""The same batches on one process and on many: the same losses, gradients, loads and weights."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from fourfold.fields import ConfigError
from fourfold.model.moe import Router
from fourfold.train.experts import spread_experts
from fourfold.train.parallel import Parallel, check, setup
from fourfold.train.tables import RowAdam, sparse_tables
from tests.distributed import runs
from tests.model import tiny

ALONE = Parallel(0, 1, torch.device("cpu"))
TWO = [case for case in runs.CASES.values() if case.dp_replicate * case.dp_shard == 2]
FOUR = [case for case in runs.CASES.values() if case.dp_replicate * case.dp_shard == 4]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each case saw; all together."""
    jobs = {2: [case.name for case in TWO], 4: [case.name for case in FOUR]}
    return runs.launch(jobs, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def alone():
    done = {}

    def get(case: runs.Case) -> runs.Seen:
        key = dataclasses.replace(case, name="", dp_replicate=1, dp_shard=1, ep=1, recompute=False, steps=20)
        if key not in done:
            done[key] = runs.train(key)
        return done[key]

    return get


@pytest.mark.parametrize("case", [c for c in TWO + FOUR if not c.bf16], ids=lambda c: c.name)
def test_many_processes_do_what_one_does(case, seen, alone):
    got, want = seen[case.name], alone(case)
    torch.testing.assert_close(got.losses, want.losses[: case.steps], rtol=1e-6, atol=0)
    torch.testing.assert_close(got.norms[:5], want.norms[: case.steps][:5], rtol=1e-5, atol=0)
    for loads, expected in zip(got.loads, want.loads, strict=False):
        assert torch.equal(loads, expected)
    assert set(got.gradients) == set(want.gradients)
    for name, expected in want.gradients.items():
        error = (got.gradients[name] - expected).abs().max()
        assert error <= 2e-5 * expected.abs().max() + 1e-9, name
    assert set(got.state) == set(want.state)
    if case.steps == 20:
        for name, expected in want.state.items():
            torch.testing.assert_close(got.state[name], expected, rtol=1e-3, atol=1e-3, msg=name)


def test_recomputation_in_bfloat16_changes_nothing(seen):
    plain, recomputed = seen["bf16"], seen["recompute-bf16"]
    assert plain.losses == recomputed.losses and plain.norms == recomputed.norms
    for name, expected in plain.gradients.items():
        assert torch.equal(recomputed.gradients[name], expected), name


@pytest.mark.parametrize("residual", ["plain", "mhc", "mhc_single_pass"])
def test_recomputation_changes_nothing(residual):
    case = runs.Case("", steps=2, residual=residual)
    plain, recomputed = runs.train(case), runs.train(dataclasses.replace(case, recompute=True))
    assert plain.losses == recomputed.losses and plain.norms == recomputed.norms
    assert all(torch.equal(a, b) for a, b in zip(plain.loads, recomputed.loads, strict=True))
    for name, expected in plain.gradients.items():
        assert torch.equal(recomputed.gradients[name], expected), name


def test_bfloat16_stays_close(seen, alone):
    case = runs.CASES["bf16"]
    torch.testing.assert_close(seen[case.name].losses, alone(case).losses[: case.steps], rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("sizes", "world", "said"),
    [
        ((1, 2, 1), 4, "parallel.dp_shard: .* 4"),
        ((2, 2, 3), 4, "parallel.ep: is 3; .*4"),
        ((0, 4, 1), 4, "parallel.dp_replicate: is 0"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, world, said):
    with pytest.raises(ConfigError, match=said):
        check(SimpleNamespace(dp_replicate=sizes[0], dp_shard=sizes[1], ep=sizes[2]), world)


def test_experts_must_divide():
    model, mesh = tiny.model(tiny.config(**runs.FULL)), SimpleNamespace(size=lambda _: 3)
    assert any(isinstance(m, Router) for m in model.modules())
    with pytest.raises(ConfigError, match="parallel.ep: 3 does not divide moe.n_routed_experts"):
        spread_experts(model, mesh)


def test_one_process_needs_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    parallel = setup(runs.Case(""))
    assert parallel.world == 1 and parallel.is_main and parallel.data is None
    parallel.barrier()
    assert not torch.distributed.is_initialized()


def test_clip_is_that_of_torch():
    weights = [torch.nn.Parameter(torch.randn(n)) for n in (3, 5)]
    for p in weights:
        p.grad = torch.randn_like(p)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in weights]
    for p, q in zip(weights, copies, strict=True):
        q.grad = p.grad.clone()
    want = torch.nn.utils.clip_grad_norm_(copies, 0.5)
    torch.testing.assert_close(ALONE.clip(weights, 0.5), want)
    torch.testing.assert_close([p.grad for p in weights], [q.grad for q in copies])


def test_row_adam_is_dense_adam_on_the_rows_of_the_step():
    """Dense Adam's moments, kept for all rows at every step; the weight moves where the step had a gradient."""
    model = tiny.model(tiny.config(**{"engram.layer_ids": [1], "engram.vocab_size": 11, "engram.head_dim": 4}))
    (table,) = sparse_tables(model)
    embed, optimizer = model.engrams["1"].embed, RowAdam([table], lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    twin = torch.nn.Parameter(table.detach().clone())
    dense = torch.optim.Adam([twin], lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        rows = torch.randint(0, len(table), (5,), generator=generator)
        wanted = torch.randn(5, 4, generator=generator)
        optimizer.zero_grad()
        (embed(rows) * wanted).sum().backward()
        before, unread = twin.detach().clone(), torch.ones(len(table), dtype=torch.bool)
        unread[rows] = False
        twin.grad = torch.zeros_like(twin).index_add_(0, rows, wanted)
        kept = {name: value[unread].clone() for name, value in optimizer.state.get(table, {}).items() if value.dim()}
        optimizer.step()
        dense.step()
        with torch.no_grad():
            twin[unread] = before[unread]
        torch.testing.assert_close(table, twin)
        for name, value in kept.items():
            assert torch.equal(optimizer.state[table][name][unread], value), "a row that was not read was touched"


def test_row_adam_refuses_dense_gradients():
    table = torch.nn.Parameter(torch.zeros(3, 2))
    table.grad = torch.ones_like(table)
    with pytest.raises(ValueError, match="not sparse"):
        RowAdam([table], lr=0.1).step()
