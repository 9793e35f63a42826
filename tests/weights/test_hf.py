"""The native model inside transformers: what is padded, cached, searched or trained there gives what ours gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from fourfold.model.sequence import Document, pack
from fourfold.model.transformer import Model
from fourfold.weights.hf import FourfoldCache, FourfoldForCausalLM, pack_padded
from tests.model import tiny

PAD = 2
SPARSE: dict[str, Any] = {
    "attention.q_lora_rank": 10,
    "indexer.mode": "sparse",
    "indexer.n_heads": 8,
    "indexer.head_dim": 8,
    "indexer.topk": 5,
    "indexer.layers_per_indexer": 2,
    "moe.n_routed_experts": 8,
    "moe.num_experts_per_tok": 3,
    "moe.moe_intermediate_size": 8,
    "moe.first_k_dense_replace": 1,
    "residual.kind": "mhc",
    "residual.hc_mult": 2,
    "engram.layer_ids": [1],
    "engram.vocab_size": 101,
    "engram.head_dim": 4,
    "engram.compressed_vocab_size": 20,
    "mtp.num_layers": 1,
}
CSA2: dict[str, Any] = tiny.COMPRESSED | {
    "attention.kind": "csa2",
    "num_hidden_layers": 4,
    "attention.compress_ratios": [0, 4, 4, 4],
    "attention.kv_source_layer_ids": [1],
    "attention.index_source_layer_ids": [1, 2, 3],
    "attention.candidate_source_layer_id": 2,
    "attention.candidate_topk_blocks": 2,
    "attention.candidate_block_size": 2,
    "residual.kind": "mhc_single_pass",
    "residual.hc_mult": 2,
}
KINDS = {
    "plain": {"tie_word_embeddings": True},
    "gqa": {"attention.kind": "gqa"},
    "sparse": SPARSE,
    "compressed": tiny.COMPRESSED,
    "csa2": CSA2,
}


def wrapped(kind: str, **kwargs: Any) -> FourfoldForCausalLM:
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": PAD}
    return FourfoldForCausalLM.of(tiny.model(tiny.config(**KINDS[kind])), **ids | kwargs)


def native(model: FourfoldForCausalLM, ids: list[int]) -> Tensor:
    """Logits by the native model of the same weights."""
    made = Model(model.config.native).eval()
    made.load_state_dict({n.removeprefix("model."): t for n, t in model.state_dict().items()})
    return tiny.logits(made, Document.text(ids))


def rows(*lengths: int) -> list[list[int]]:
    return [tiny.text(n, seed).tokens.clamp_min(3).tolist() for seed, n in enumerate(lengths)]


def padded(batch: list[list[int]], side: str, fill: int = PAD, extra: int = 0) -> dict[str, Tensor]:
    width = max(map(len, batch)) + extra
    pads = [[fill] * (width - len(row)) for row in batch]
    masks = [[0] * (width - len(row)) for row in batch]
    ones = [[1] * len(row) for row in batch]
    beside = [(pads, batch), (masks, ones)] if side == "left" else [(batch, pads), (ones, masks)]
    ids, mask = ([a + b for a, b in zip(left, right, strict=True)] for left, right in beside)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def greedy(model: FourfoldForCausalLM, ids: list[int], n: int) -> list[int]:
    """What the native model says, computed anew for each token."""
    said: list[int] = []
    while len(said) < n and 1 not in said:
        said.append(int(native(model, ids + said)[-1].argmax()))
    return said


# -- forward


def test_pack_padded_lays_rows_end_to_end() -> None:
    packed = pack_padded(**padded([[5, 6], [7, 8, 9], [4]], "left"))
    assert packed.tokens.tolist() == [5, 6, 7, 8, 9, 4]
    assert packed.positions.tolist() == [0, 1, 0, 1, 2, 0]
    assert packed.cu_seqlens.tolist() == [0, 2, 5, 6]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side_changes_no_bit(kind: str, side: str) -> None:
    model, batch = wrapped(kind), rows(5, 19, 11)
    narrow = model(**padded(batch, "right")).logits
    wide = padded(batch, side, fill=7, extra=13)
    got = model(**wide).logits
    assert got.dtype == torch.float32
    for row, ids in enumerate(batch):
        mine = got[row][wide["attention_mask"][row] == 1]
        assert torch.equal(mine, narrow[row, : len(ids)])
        torch.testing.assert_close(mine, native(model, ids), atol=2e-5, rtol=0)
        assert not got[row][wide["attention_mask"][row] == 0].any()


@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_any_model_agrees_with_itself(seed: int) -> None:
    model = FourfoldForCausalLM.of(tiny.model(tiny.random_config(seed)))
    batch = rows(9, 20)
    got = model(**padded(batch, "left")).logits
    for row, ids in enumerate(batch):
        torch.testing.assert_close(got[row, -len(ids) :], native(model, ids), atol=2e-5, rtol=0)


@torch.no_grad()
def test_logits_to_keep() -> None:
    model, batch = wrapped("sparse"), padded(rows(5, 9), "left")
    whole = model(**batch).logits
    torch.testing.assert_close(model(**batch, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(**batch, logits_to_keep=torch.tensor([8, 1])).logits, whole[:, [8, 1]])


@torch.no_grad()
def test_positions_that_start_again_start_a_sequence() -> None:
    model, batch = wrapped("sparse"), rows(5, 9, 3)
    flat = torch.tensor([sum(batch, [])])
    positions = torch.cat([torch.arange(len(row)) for row in batch])[None]
    flash = {"cu_seq_lens_q": torch.tensor([0, 5, 14, 17]), "max_length_q": 9}
    got = model(flat, position_ids=positions, **flash).logits[0].split([5, 9, 3])
    for mine, ids in zip(got, batch, strict=True):
        torch.testing.assert_close(mine, native(model, ids), atol=2e-5, rtol=0)


@torch.no_grad()
def test_packed_media_pass_through() -> None:
    cfg = tiny.config(**SPARSE, media=tiny.MEDIA)
    made, packed = tiny.model(cfg), pack([tiny.document(cfg, 30, 1), tiny.document(cfg, 20, 2)])
    got = FourfoldForCausalLM.of(made)(packed=packed).logits
    assert got.shape == (1, 50, tiny.VOCAB)
    torch.testing.assert_close(got[0], made(packed).logits, atol=1e-6, rtol=0)


@torch.no_grad()
def test_outputs_as_in_transformers() -> None:
    model, batch = wrapped("plain"), padded(rows(4, 6), "right")
    assert model(**batch).past_key_values is None
    loss, logits = model(**batch, labels=batch["input_ids"], return_dict=False)
    assert loss.ndim == 0 and logits.shape == (2, 6, tiny.VOCAB)
    hidden = model.base_model(**batch).last_hidden_state
    torch.testing.assert_close(hidden @ model.get_output_embeddings().weight.T, logits, atol=1e-6, rtol=0)
    assert wrapped("gqa").get_output_embeddings() is not None
    assert model.get_input_embeddings() is model.model.embed_tokens


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"attention_mask": torch.tensor([[1, 0, 1, 1]])}, "attention_mask: row 0 has a hole"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask: has shape"),
        ({"attention_mask": torch.ones(1, 9)}, "attention_mask: has 9 columns"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "attention_mask: has shape"),
        ({"attention_mask": torch.zeros(1, 4)}, "input_ids: there is no token"),
        ({"position_ids": torch.tensor([[1, 2, 3, 4]])}, "position_ids: must count"),
        ({"position_ids": torch.tensor([[0, 1, 3, 4]])}, "position_ids: must count"),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 4])}, "cu_seq_lens_q: must lie"),
        ({"use_cache": True}, "use_cache: no gradient"),
        ({"labels": torch.ones(1, 4, dtype=torch.long), "logits_to_keep": 1}, "labels: have shape"),
        ({"packed": pack([tiny.text(3)])}, "input_ids: give either"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named.replace("[", r"\[")):
        wrapped("plain")(torch.tensor([[3, 4, 5, 6]]), **arguments)


@pytest.mark.parametrize("name", ["inputs_embeds", "output_hidden_states", "output_attentions", "pixel_values"])
def test_arguments_it_cannot_honour_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        wrapped("plain")(torch.tensor([[3, 4]]), **{name: torch.ones(1)})


# -- cache and generation


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_chunks_equal_the_whole(kind: str) -> None:
    model, batch = wrapped(kind), padded(rows(30, 71), "left")
    whole = model(**batch).logits
    past, parts, at = None, [], 0
    for n in (40, 1, 17, 1, 12):
        mask = batch["attention_mask"][:, : at + n]
        out = model(batch["input_ids"][:, at : at + n], mask, past_key_values=past, use_cache=True)
        past, at = out.past_key_values, at + n
        parts.append(out.logits)
        assert past.get_seq_length() == at
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-5, rtol=0)


@torch.no_grad()
def test_the_cache_is_not_confused() -> None:
    model, batch = wrapped("plain"), padded(rows(3, 6), "left")
    past = model(**batch, use_cache=True).past_key_values
    new = torch.tensor([[5], [5]])
    for arguments, named in (
        ({"attention_mask": torch.ones(2, 7)}, "does not mask what it masked"),
        ({"attention_mask": torch.ones(2, 1)}, "has 1 columns, cache and input have 7"),
        ({"position_ids": torch.tensor([[0], [0]])}, "position_ids"),
    ):
        with pytest.raises(ValueError, match=named):
            model(new, past_key_values=past, **arguments)
    with pytest.raises(ValueError, match="holds 2 rows, the batch has 1"):
        model(new[:1], past_key_values=past)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_in_batches_equals_greedy_alone(kind: str) -> None:
    model, batch = wrapped(kind), rows(4, 23, 12)
    said = model.generate(**padded(batch, "left"), max_new_tokens=20, do_sample=False)[:, 23:]
    for row, ids in enumerate(batch):
        expected = greedy(model, ids, 20)
        assert said[row].tolist()[: len(expected)] == expected
        assert all(token == PAD for token in said[row].tolist()[len(expected) :])


@pytest.mark.parametrize("kind", ["sparse", "compressed", "csa2"])
def test_beams_with_a_cache_equal_beams_without(kind: str) -> None:
    model, batch = wrapped(kind), padded(rows(4, 35), "left")
    options: dict[str, Any] = {"max_new_tokens": 40, "num_beams": 4, "num_return_sequences": 2, "do_sample": False}
    scores = {"output_scores": True, "return_dict_in_generate": True}
    cached = model.generate(**batch, **options, **scores)
    anew = model.generate(**batch, **options, **scores, use_cache=False)
    assert torch.equal(cached.sequences, anew.sequences)
    torch.testing.assert_close(cached.sequences_scores, anew.sequences_scores, atol=1e-5, rtol=0)


def test_beams_find_what_a_search_of_all_finds() -> None:
    model, ids = wrapped("plain"), rows(6)[0]
    first = native(model, ids)[-1].log_softmax(-1)
    both = torch.stack([first[t] + native(model, [*ids, t])[-1].log_softmax(-1) for t in range(tiny.VOCAB)])
    both[1] = -torch.inf  # what ends after one token is not as long
    best = divmod(int(both.argmax()), tiny.VOCAB)
    options: dict[str, Any] = {"num_beams": tiny.VOCAB, "min_new_tokens": 2, "max_new_tokens": 2, "do_sample": False}
    said = model.generate(torch.tensor([ids]), **options)
    assert tuple(said[0, -2:].tolist()) == best


def test_sampling_with_a_cache_equals_sampling_without() -> None:
    model, batch = wrapped("sparse"), padded(rows(4, 9), "left")
    said = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        options: dict[str, Any] = {"do_sample": True, "top_p": 0.9, "max_new_tokens": 15, "use_cache": use_cache}
        said.append(model.generate(**batch, **options))
    assert torch.equal(*said)


def test_generation_goes_on_from_a_cache() -> None:
    model, ids = wrapped("sparse", eos_token_id=None), torch.tensor(rows(9))
    whole = model.generate(ids, max_new_tokens=12, do_sample=False)
    half = model.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    more = model.generate(half.sequences, past_key_values=half.past_key_values, max_new_tokens=7, do_sample=False)
    assert torch.equal(more, whole)


def test_what_generation_cannot_do_is_said() -> None:
    model = wrapped("plain")
    with pytest.raises(ValueError, match="pad on the left"):
        model.generate(**padded(rows(3, 6), "right"), max_new_tokens=2)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(torch.tensor(rows(9)), prompt_lookup_num_tokens=2, max_new_tokens=2)
    with pytest.raises(ValueError, match="max_position_embeddings"):
        model.generate(torch.tensor(rows(250)), max_new_tokens=20, do_sample=False, eos_token_id=None)


@torch.no_grad()
def test_rows_of_a_cache_share_full_pages_and_no_others() -> None:
    model = wrapped("plain")
    past = model(torch.tensor(rows(70)), use_cache=True).past_key_values
    assert isinstance(past, FourfoldCache)
    past.batch_repeat_interleave(3)
    pages = [state.pages for state in past.states]
    assert [len(p) for p in pages] == [3, 3, 3] and len({p[0] for p in pages}) == 1 and len({p[2] for p in pages}) == 3
    past.batch_select_indices(torch.tensor([True, False, True]))
    past.reorder_cache(torch.tensor([1, 1]))
    assert past.pool.references(past.states[0].pages[0]) == 2
    assert past.pool.free + 4 == len(past.pool.data)


# -- training


def plain_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:-1], labels[1:])


def test_the_loss_does_not_see_padding() -> None:
    model, batch = wrapped("sparse"), rows(5, 12)
    losses = [plain_loss(native(model, ids), torch.tensor(ids)) for ids in batch]
    expected = (losses[0] * 4 + losses[1] * 11) / 15
    for side in ("left", "right"):
        inputs = padded(batch, side)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        torch.testing.assert_close(model(**inputs, labels=labels).loss, expected, atol=1e-5, rtol=0)
        split = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(30)).loss
        torch.testing.assert_close(split, expected / 2, atol=1e-5, rtol=0)
    flat = torch.tensor([sum(batch, [])])
    positions = torch.cat([torch.arange(len(row)) for row in batch])[None]
    torch.testing.assert_close(model(flat, position_ids=positions, labels=flat).loss, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_gradients_are_the_same(kind: str) -> None:
    gradients = []
    inputs = padded(rows(9, 21), "left")
    for checkpointing in (False, True):
        model = wrapped(kind).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, again = gradients
    assert plain.keys() == again.keys() and "model.embed_tokens.weight" in plain
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_checkpointing_runs_blocks_again() -> None:
    model, runs = wrapped("sparse").train(), []
    model.activation_checkpointing_enable()
    model.model.layers[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    ids = torch.tensor(rows(9))
    loss = model(ids, labels=ids).loss
    assert len(runs) == 1 and "forward" not in vars(model.model.layers[0])
    loss.backward()
    assert len(runs) == 2


def test_reentrant_checkpointing_is_refused() -> None:
    model = wrapped("plain").train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        model(torch.tensor([[3, 4]]))


def test_it_learns() -> None:
    model = wrapped("sparse").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    inputs, losses = padded(rows(9, 14), "left"), []
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for _ in range(8):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


@torch.no_grad()
def test_copies_and_types() -> None:
    model, ids = wrapped("sparse"), torch.tensor(rows(12))
    twin = copy.deepcopy(model)
    before = model(ids).logits
    twin.model.embed_tokens.weight.zero_()
    assert torch.equal(model(ids).logits, before) and not torch.equal(twin(ids).logits, before)
    narrow = model.to(torch.bfloat16)(ids).logits
    assert narrow.dtype == torch.float32 and narrow.isfinite().all()
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= 15


def test_the_vocabulary_keeps_its_size() -> None:
    model = wrapped("plain")
    assert model.resize_token_embeddings(tiny.VOCAB) is model.get_input_embeddings()
    for arguments in ({"new_num_tokens": tiny.VOCAB + 1}, {"pad_to_multiple_of": 8}):
        with pytest.raises(ValueError, match="vocab_size"):
            model.resize_token_embeddings(**arguments)
