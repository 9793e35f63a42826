"""The lightning indexer: its scores, its selection, and how it learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fourfold import ops
from fourfold.config import IndexerConfig
from fourfold.model.cache import Cache, PagePool, SequenceState
from fourfold.model.indexer import (
    IDLE_PRICE,
    PEAK,
    index_loss,
    index_recall,
    index_target,
    shared_positions,
    two_level_loss,
)
from fourfold.model.probe import Probe
from fourfold.model.sequence import pack
from tests.model import plain, tiny

SPARSE = {
    "indexer.mode": "sparse",
    "indexer.n_heads": 3,
    "indexer.head_dim": 8,
    "indexer.topk": 4,
    "indexer.layers_per_indexer": 2,
    "num_hidden_layers": 5,
}


def indexed(**overrides):
    return tiny.model(tiny.config(**SPARSE | overrides))


@torch.no_grad()
@pytest.mark.parametrize("q_lora_rank", [0, 10])
def test_scores_by_loops(q_lora_rank):
    """Queries from the normalised latent, LayerNorm with bias on the key, half-split rotation of the first dims."""
    made = indexed(**{"attention.q_lora_rank": q_lora_rank})
    indexer, rope = made.layers[2].self_attn.indexer, made.cfg.attention.qk_rope_head_dim
    assert indexer.k_norm.eps == 1e-6
    torch.nn.init.normal_(indexer.k_norm.bias)
    x, latent = torch.randn(7, 24), torch.randn(7, q_lora_rank or 24)
    q = F.linear(latent, indexer.wq_b.weight).unflatten(-1, (3, 8))
    k = F.linear(x, indexer.wk.weight)
    k = (k - k.mean(-1, keepdim=True)) / (k.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    k = (k * indexer.k_norm.weight + indexer.k_norm.bias)[:, None]
    places = torch.arange(7)
    q, k = (torch.cat([plain.rotate(t[..., :rope], places, 1e4, False), t[..., rope:]], dim=-1) for t in (q, k))
    w = F.linear(x, indexer.weights_proj.weight) * 3**-0.5 * 8**-0.5
    selection = indexer(x, latent, made.context(pack([tiny.text(7)]), None, None))
    for t in range(7):
        scores = [sum(float(w[t, h] * (q[t, h] @ k[s, 0]).clamp_min(0)) for h in range(3)) for s in range(t + 1)]
        torch.testing.assert_close(selection.scores[0][0, t, : t + 1], torch.tensor(scores), rtol=1e-4, atol=1e-5)
        best = sorted(range(t + 1), key=lambda s: (-float(selection.scores[0][0, t, s]), -s))[:4]
        assert selection.chosen[0][0, t].nonzero()[:, 0].tolist() == sorted(best)


@torch.no_grad()
def test_a_group_of_layers_shares_one_selection():
    made, probe = indexed(), Probe()
    assert [i for i, b in enumerate(made.layers) if b.self_attn.indexer is not None] == [0, 2, 4]
    made(pack([tiny.text(30)]), probe=probe)
    chosen = [probe.selected[layer][0] for layer in range(5)]
    assert torch.equal(chosen[0], chosen[1]) and torch.equal(chosen[2], chosen[3])
    assert not torch.equal(chosen[1], chosen[2]) and not torch.equal(chosen[3], chosen[4])
    assert (chosen[0].sum(-1) == torch.arange(1, 31).clamp_max(4)).all()


@torch.no_grad()
@pytest.mark.parametrize("mode", ["dense", "warmup", "sparse"])
def test_layers_before_the_first_indexer_see_what_is_near_alone(mode):
    """Their last topk positions, in rows that hold several documents as well, and whatever the others do."""
    made, probe = indexed(**{"indexer.first_layer": 2, "indexer.mode": mode}), Probe()
    assert [i for i, b in enumerate(made.layers) if b.self_attn.indexer is not None] == [2, 4]
    made(pack([tiny.text(9), tiny.text(3)], row=12), probe=probe)
    place = torch.arange(12)
    document = (place >= 9).int()
    near = (place <= place[:, None]) & (place > place[:, None] - 4) & (document == document[:, None])
    for layer in (0, 1):
        assert torch.equal(probe.selected[layer][0][0], near)
    assert not torch.equal(probe.selected[2][0][0], near)


@torch.no_grad()
def test_the_probe_sees_the_selection_of_prefill_and_decode_alike():
    made, whole, document = indexed(), Probe(), tiny.text(12)
    made(pack([document]), probe=whole)
    pool, state = PagePool(made.cfg, 3, 4), SequenceState()
    for start, stop in ((0, 9), (9, 10), (10, 12)):
        part = Probe()
        made(pack([document.slice(start, stop)], starts=[start]), cache=Cache(pool, [state]), probe=part)
        for layer in range(5):
            assert torch.equal(part.selected[layer][0], whole.selected[layer][0][:, start:stop, :stop])


@torch.no_grad()
def test_equal_scores_choose_the_most_recent_keys():
    made, probe = indexed(), Probe()
    made.layers[0].self_attn.indexer.weights_proj.weight.zero_()
    made(pack([tiny.text(12)]), probe=probe)
    assert torch.equal(probe.selected[0][0][0], torch.ones(12, 12, dtype=torch.bool).tril().triu(-3))


@torch.no_grad()
def test_attention_sees_the_chosen_keys_alone():
    """With the recency rule for a selection, sparse attention is a sliding window."""
    made = indexed(**{"num_hidden_layers": 1, "indexer.topk": 2})
    made.layers[0].self_attn.indexer.weights_proj.weight.zero_()
    tokens = tiny.text(10).tokens
    before = tiny.logits(made, tiny.Document.text(tokens))
    tokens[3] = (tokens[3] + 1) % tiny.VOCAB
    moved = (tiny.logits(made, tiny.Document.text(tokens)) - before).abs().amax(-1) > 1e-6
    assert moved.nonzero()[:, 0].tolist() == [3, 4]


@torch.no_grad()
@pytest.mark.parametrize("topk", [20, 21, 64])
def test_a_selection_of_everything_is_dense(topk):
    made, document = indexed(**{"indexer.topk": topk}), tiny.text(20)
    sparse, decoded = tiny.logits(made, document), tiny.decode(made, [document], [[12, *[1] * 8]])[0]
    made.set_indexer_mode("dense")
    assert torch.equal(sparse, tiny.logits(made, document))
    assert torch.equal(decoded, tiny.decode(made, [document], [[12, *[1] * 8]])[0])


@torch.no_grad()
def test_warmup_attends_densely():
    made, document = indexed(), tiny.text(20)
    sparse = tiny.logits(made, document)
    made.set_indexer_mode("warmup")
    warm = tiny.logits(made, document)
    made.set_indexer_mode("dense")
    assert torch.equal(warm, tiny.logits(made, document)) and not torch.equal(warm, sparse)


def test_mode_of_a_model_without_indexers_stays_off():
    made = tiny.model(tiny.config())
    made.set_indexer_mode("sparse")
    assert made.cfg.indexer.mode == "off"
    with pytest.raises(ValueError, match="indexer.mode.*sometimes"):
        indexed().set_indexer_mode("sometimes")


# ---------------------------------------------------------------- learning


def test_kl_is_zero_where_scores_match_the_target():
    target = torch.rand(2, 5, 9) * 3  # summed over heads: not normalised
    keys = torch.rand(2, 5, 9) < 0.6
    keys[..., 0] = True
    assert index_loss(target, target.log() + 7, keys).abs() < 1e-6
    assert index_loss(target, torch.zeros_like(target), keys) > 0.01


def test_kl_by_loops_over_the_given_keys_alone():
    target, scores = torch.rand(2, 3, 6), torch.randn(2, 3, 6)
    keys = torch.rand(2, 3, 6) < 0.6
    keys[..., 2] = True
    total = 0.0
    for b in range(2):
        for t in range(3):
            on = keys[b, t]
            p = target[b, t, on] / target[b, t, on].sum()
            total += float((p * (p.log() - scores[b, t, on].log_softmax(-1))).sum())
    assert float(index_loss(target, scores, keys)) == pytest.approx(total, rel=1e-5)


def test_skipped_positions_count_as_so_many_keys_of_little_attention():
    """As if each key below the mean were there that often, with its attention shared out."""
    torch.manual_seed(0)
    target, scores, often = torch.rand(1, 1, 8), torch.randn(1, 1, 8), 3
    target = target / target.sum()
    times = torch.where(target[0, 0] * 8 < 1, often, 1)
    assert 8 < int(times.sum()) < 8 * often
    copies = [x.repeat_interleave(times, -1) for x in (target / times, scores)]
    everything = torch.ones(1, 1, int(times.sum()), dtype=torch.bool)
    crowd = torch.full((1, 1), float(often))
    with_crowd = index_loss(target, scores, everything[..., :8], crowd)
    torch.testing.assert_close(with_crowd, index_loss(*copies, everything))
    assert with_crowd > index_loss(target, scores, everything[..., :8])


def test_kl_pushes_scores_towards_the_target():
    scores = torch.zeros(1, 1, 3, requires_grad=True)
    index_loss(torch.tensor([[[0.7, 0.2, 0.1]]]), scores, torch.ones(1, 1, 3, dtype=torch.bool)).backward()
    torch.testing.assert_close(scores.grad[0, 0], 1 / 3 - torch.tensor([0.7, 0.2, 0.1]))


def test_kl_of_a_head_that_sees_nothing_of_a_key_is_finite():
    target = torch.tensor([[[1.0, 0.0]]])
    scores = torch.zeros(1, 1, 2, requires_grad=True)
    loss = index_loss(target, scores, torch.ones(1, 1, 2, dtype=torch.bool))
    loss.backward()
    assert loss.isfinite() and scores.grad.isfinite().all()


def test_target_and_recall():
    probs = torch.rand(2, 4, 3, 5, requires_grad=True)
    target = index_target(probs)
    torch.testing.assert_close(target, probs.detach().sum(1))
    assert not target.requires_grad
    chosen = torch.zeros(2, 3, 5, dtype=torch.bool)
    assert index_recall(target, chosen) == 0 and float(index_recall(target, ~chosen)) == pytest.approx(6)
    chosen[..., 1] = True
    torch.testing.assert_close(index_recall(target, chosen), (target[..., 1] / target.sum(-1)).sum())


@pytest.mark.parametrize("mode", ["warmup", "sparse"])
@pytest.mark.parametrize("mtp", [0, 1])
def test_the_kl_trains_the_indexers_and_nothing_else(mode, mtp):
    made = indexed(**{"mtp.num_layers": mtp, "residual.kind": "mhc", "attention.q_lora_rank": 10}).train()
    made.set_indexer_mode(mode)
    output = made(pack([tiny.text(20), tiny.text(7)]), mtp=bool(mtp))
    output.index_loss.backward()
    learnt = {name for name, p in made.named_parameters() if p.grad is not None and p.grad.any()}
    owned = {name for name, _ in made.named_parameters() if ".indexer." in name}
    assert learnt == owned
    assert (output.index_recall is not None) == (mode == "warmup")


@pytest.mark.parametrize("mode", ["dense", "warmup", "sparse"])
def test_the_language_loss_never_trains_an_indexer(mode):
    made = indexed(**{"mtp.num_layers": 1}).train()
    made.set_indexer_mode(mode)
    output = made(pack([tiny.text(20)]), mtp=True)
    (output.logits.square().sum() + output.mtp_logits.square().sum()).backward()
    for name, p in made.named_parameters():
        assert (p.grad is None or not p.grad.any()) == (".indexer." in name), name


@torch.no_grad()
def test_dense_mode_and_evaluation_measure_nothing():
    made, packed = indexed().train(), pack([tiny.text(9)])
    made.set_indexer_mode("dense")
    assert made(packed).index_loss is None
    made.set_indexer_mode("sparse")
    assert made.eval()(packed).index_loss is None


@torch.no_grad()
def test_sparse_loss_is_over_the_selected_keys():
    """Changing a score that is not selected leaves the loss as it is."""
    made, probe = indexed(**{"num_hidden_layers": 1}).train(), Probe()
    packed, attention = pack([tiny.text(20)]), made.layers[0].self_attn
    loss = made(packed, probe=probe).index_loss
    chosen, forward = probe.selected[0][0], attention.indexer.forward

    def lowered(*args):
        selection = forward(*args)
        selection.scores[0] = selection.scores[0].masked_fill(~chosen, -123.0)
        return selection

    attention.indexer.forward = lowered
    torch.testing.assert_close(made(packed).index_loss, loss)


TWO_LEVELS = {"indexer.block_size": 4, "indexer.candidate_blocks": 3}


@torch.no_grad()
@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("chunks", [[64], [1] * 64, [3, 30, 1, 1, 17, 12], [8, 8, 48]], ids=str)
def test_two_levels_choose_alike_however_a_sequence_is_cut(chunks, kernels, monkeypatch):
    monkeypatch.setenv("FOURFOLD_KERNELS", kernels)
    made, document, whole, cut = indexed(**TWO_LEVELS), tiny.text(64), Probe(), Probe()
    wanted = made(pack([document]), probe=whole).logits
    cache = Cache(PagePool(made.cfg, 20, page_size=8), [SequenceState(), SequenceState()])
    done, logits, other = 0, [], tiny.text(64)
    for n in chunks:  # beside another sequence that grows at its own pace
        beside = other.slice(done // 2, (done + n) // 2)
        parts = pack([document.slice(done, done + n), beside], starts=[s.length for s in cache.states])
        logits.append(made(parts, cache=cache, probe=cut).logits[:n])
        done += n
    torch.testing.assert_close(torch.cat(logits), wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_two_levels_look_into_the_best_blocks_and_those_of_the_newest_keys():
    positions, keys = torch.arange(64)[None], torch.randn(1, 64, 8)
    q, weights = torch.randn(1, 64, 2, 8), torch.rand(1, 64, 2)
    summaries = ops.block_summaries(keys, 4)
    looked_into = ops.candidate_keys(q, summaries, weights, positions, 4, 3, 64, 6)[0].unflatten(-1, (16, 4)).all(-1)
    scores = ops.index_scores(q, summaries, weights)[0]
    for t in range(64):
        first, own = max(t - 5, 0) // 4, t // 4
        best = sorted(range(first), key=lambda i: (float(scores[t, i]), i))[-2:]
        assert looked_into[t].nonzero()[:, 0].tolist() == sorted([*best, *range(first, own + 1)])
    made, probe = indexed(**TWO_LEVELS), Probe()
    made(pack([tiny.text(64)]), probe=probe)
    for chosen in probe.selected.values():
        assert torch.equal(chosen[0][0].sum(-1), torch.arange(1, 65).clamp_max(4))
        assert not (chosen[0][0] & (torch.arange(64) > torch.arange(64)[:, None])).any()


@torch.no_grad()
def test_with_room_for_all_blocks_two_levels_are_one(monkeypatch):
    """They choose what one level does whose scores below one count as one, which is not what it does else."""
    two, more, less = (indexed(**TWO_LEVELS | {"indexer.candidate_blocks": n}) for n in (16, 99, 3))
    more.load_state_dict(two.state_dict())
    less.load_state_dict(two.state_dict())
    flat, packed = indexed(), pack([tiny.text(64)])
    flat.load_state_dict(two.state_dict(), strict=False)
    wanted = two(packed).logits
    assert torch.equal(more(packed).logits, wanted)
    assert not torch.equal(less(packed).logits, wanted)
    assert not torch.equal(flat(packed).logits, wanted)
    monkeypatch.setattr(IndexerConfig, "floor", 1.0)
    assert torch.equal(flat(packed).logits, wanted)


@torch.no_grad()
def test_nothing_later_changes_what_two_levels_choose():
    made, document = indexed(**TWO_LEVELS), tiny.text(64)
    whole = made(pack([document])).logits
    for length in (13, 16, 37, 48):
        torch.testing.assert_close(made(pack([document.slice(0, length)])).logits, whole[:length], rtol=1e-5, atol=1e-5)


def test_shared_positions():
    found = torch.tensor([[[0, 3, 5, -1], [1, 2, 3, 4]]])
    wanted = torch.tensor([[[0, 5, 6, -1], [1, 2, 3, 4]]])
    torch.testing.assert_close(shared_positions(found, wanted), torch.tensor([[2 / 3, 1.0]]))


def test_two_levels_learn_the_peaks_and_pay_for_the_rest_by_loops():
    """Of keys and of blocks that a query sees wholly: divergence from the peaks of the attention, weighted by what
    falls there, and a price for each positive score of less than the mean; a learnt query counts more in both."""
    torch.manual_seed(0)
    queries, size, count = 40, 4, 10
    target = (3 * torch.randn(2, queries, 41)).exp()
    scores = torch.randn(2, queries, 41, requires_grad=True)
    blocks = torch.randn(2, queries, count, requires_grad=True)
    visible = torch.ones(queries, 41, dtype=torch.bool).tril().expand(2, -1, -1).clone()
    visible[1, 9:, :7] = False  # another sequence of the row
    target = target.masked_fill(~visible, 0)
    crowd, learnt = 1 + 9 * torch.rand(2, queries), torch.rand(2, queries) < 0.4
    loss = two_level_loss(target, scores, blocks, visible, crowd, learnt)

    def level(mass: dict[int, float], row: torch.Tensor, often: float, price: float) -> torch.Tensor:
        total = sum(mass.values())
        share = {i: m / total if total else 0.0 for i, m in mass.items()}
        minor = {i: share[i] * len(mass) < 1 for i in mass}
        row = [x.relu() if price and minor.get(i) else x for i, x in enumerate(row)]
        norm = sum((row[i].exp() * (often if minor[i] else 1) for i in mass), torch.zeros(()))
        wrong = torch.zeros(())
        for i, p in share.items():
            if p:
                wrong = wrong + p * (torch.tensor(p / (often if minor[i] else 1)).log() - row[i] + norm.log())
        idle = sum((row[i] for i in mass if minor[i]), torch.zeros(())) if price else 0.0
        return total * wrong / learnt.float().mean() + price * idle

    wanted, dropped = torch.zeros(()), 0
    for b in range(2):
        for t in range(queries):
            seen = visible[b, t].nonzero()[:, 0].tolist()
            part = {i: float(target[b, t, i] / target[b, t].sum()) for i in seen}
            peaks = {i: p if p >= PEAK and learnt[b, t] else 0.0 for i, p in part.items()}
            dropped += sum(p > 0 for p in part.values()) - sum(p > 0 for p in peaks.values())
            peaks = {i: p / (sum(peaks.values()) or 1) for i, p in peaks.items()}
            whole = [i for i in range(count) if all(size * i + j in peaks for j in range(size))]
            price = IDLE_PRICE / float(learnt.float().mean()) if learnt[b, t] else IDLE_PRICE
            wanted = wanted + level(peaks, scores[b, t], float(crowd[b, t]), price)
            if whole:
                mass = {i: sum(peaks[size * i + j] for j in range(size)) for i in whole}
                wanted = wanted + level(mass, blocks[b, t], float(crowd[b, t]), 0.0)
    assert dropped > 50
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-3)
    for grad in torch.autograd.grad(loss, [scores, blocks]):
        assert grad.isfinite().all() and float(grad.abs().max()) > 0


def test_a_row_shorter_than_a_block_has_no_second_level():
    target, visible = torch.rand(1, 3, 3), torch.ones(3, 3, dtype=torch.bool).tril()[None]
    given = torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool)
    loss = two_level_loss(target, torch.randn(1, 3, 3), torch.zeros(1, 3, 0), visible, *given)
    assert loss.isfinite() and loss > 0


def test_a_key_worth_finding_is_not_lost_among_its_neighbours():
    keys = torch.randn(3, 11, 16)
    found = ops.block_summaries(keys, 4)
    assert found.shape == (3, 2, 16)
    for b in range(3):
        for i in range(2):
            assert found[b, i].tolist() == [max(column) for column in keys[b, 4 * i : 4 * i + 4].T.tolist()]


@torch.no_grad()
@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("two", [False, True])
def test_scores_below_the_floor_leave_the_place_to_newer_keys(two, kernels, monkeypatch):
    monkeypatch.setenv("FOURFOLD_KERNELS", kernels)
    keys = -torch.ones(1, 64, 4)
    keys[0, 20:30] = -0.5
    keys[0, [3, 17, 40]] = 1.0
    keys[0, 60:] = 2.0
    q, weights = torch.ones(1, 1, 2, 4), torch.tensor([[[1.0, -3.0]]])
    q[..., 1, :] = -1.0  # most keys score -12, ten of them -6, a few 4 or 8
    given = q, weights, keys, torch.tensor([[0]]), torch.tensor([63]), 12
    summaries = (ops.block_summaries(keys, 4), q, weights, 16) if two else ()
    found = ops.select_positions(*given, *summaries, floor=0.0)
    assert found[0, 0].tolist() == [3, 17, 40, *range(55, 64)]
    if not two:
        assert ops.select_positions(*given)[0, 0].tolist() == [3, 17, *range(25, 30), 40, *range(60, 64)]
    wanted = ops.reference.select_positions(*given, *summaries, floor=0.0)
    assert torch.equal(found, wanted)


@torch.no_grad()
@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_blocks_below_the_floor_are_still_told_apart(kernels, monkeypatch):
    """The best block scores -1, all others -2; its one key that is wanted is above the floor."""
    monkeypatch.setenv("FOURFOLD_KERNELS", kernels)
    keys = torch.zeros(1, 64, 4)
    keys[0, :, 0] = 2.0
    keys[0, 12:16, 0] = 1.0
    keys[0, 13, 1] = 5.0
    q, block_q = torch.eye(4)[1].expand(1, 1, 1, 4), torch.eye(4)[0].expand(1, 1, 1, 4)
    level = ops.block_summaries(keys, 4), block_q, torch.full((1, 1, 1), -1.0), 2
    given = q, torch.ones(1, 1, 1), keys, torch.tensor([[0]]), torch.tensor([63]), 4
    assert ops.select_positions(*given, *level, floor=1.0)[0, 0].tolist() == [13, 61, 62, 63]


def test_an_indexer_of_two_levels_learns_its_summaries_too():
    ids = pack([tiny.text(40)])
    losses, taught = [], []
    for blocks in (0, 2):
        torch.manual_seed(1)
        made = indexed(**{"indexer.block_size": 4, "indexer.candidate_blocks": blocks}).train()
        made.set_indexer_mode("warmup")
        losses.append(made(ids).index_loss)
        grads = torch.autograd.grad(losses[-1], [made.layers[0].self_attn.indexer.wk.weight])
        assert float(grads[0].abs().max()) > 0
        taught.append(grads[0])
    assert losses[1] > losses[0]
    assert float((taught[1] - taught[0]).abs().max()) > 1e-3 * float(taught[0].abs().max())  # by the summaries
