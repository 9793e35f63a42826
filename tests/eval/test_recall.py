"""Recall suites: scores of subjects whose answers are known, shared reading, and going on after an interruption."""

import pytest
import torch

import fourfold
from fourfold import ops
from fourfold.data.recall import NEEDLES, document
from fourfold.eval import mqar, needle, recall
from fourfold.eval.recall import heatmap
from fourfold.model.cache import PagePool, SequenceState
from fourfold.serve.local import LocalModel
from tests.serve.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def subject():
    return LocalModel(tiny_model(), tiny_tokenizer(), "tiny")


def right(made):
    return [query.answer for query in made.queries]


def run(subject, answer, **settings):
    settings = {"length": [1024, 1500], "samples": 2, "depths": [0.0, 1.0], "task": "niah_multiquery", **settings}
    return recall.run_suite("needle", tuple(NEEDLES), subject, settings, answer)


def test_right_answers_score_one_and_wrong_ones_nothing(subject):
    report = run(subject, right)
    score = report["scores"]["niah_multiquery"]
    assert score["n"] == 2 * 2 * 2 * 4 and score["accuracy"] == score["recall"] == 1 and 0 < score["ci95"] < 0.1
    assert {(c["length"], c["depth"]) for c in report["cells"]} == {(n, d) for n in (1024, 1500) for d in (0.0, 1.0)}
    wrong = run(subject, lambda made: [made.queries[i - 1].answer for i in range(len(made.queries))])
    assert wrong["scores"]["niah_multiquery"]["recall"] == 0


def test_some_of_the_values_count_as_recall_but_not_as_right(subject):
    def half(made):
        return [subject.tokenizer.encode(" " + ", ".join(q.values[:2]) + ".\n9") for q in made.queries]

    score = run(subject, half, task="niah_multivalue")["scores"]["niah_multivalue"]
    assert score["accuracy"] == 0 and score["recall"] == 0.5


def test_a_value_inside_a_longer_word_or_after_the_answer_does_not_count(subject):
    query = document("niah_single_1", subject.tokenizer, 1024, 0).queries[0]
    for text in (f" 1{query.values[0]}.", f" none.\n{query.values[0]}"):
        assert recall.score(subject, "niah_single_1", query, subject.tokenizer.encode(text)) == 0


def test_answers_from_shared_pages_are_those_of_each_question_alone(subject):
    made = document("mqar", subject.tokenizer, 200, 0)
    together = recall.greedy(subject, made, page_size=16)
    for query, said in zip(made.queries, together, strict=True):
        ids = [subject.tokenizer.special("<|bos|>"), *made.context.tolist(), *query.tokens]
        assert said == [int(subject.logits(ids)[-1].argmax())]


def test_the_format_of_the_pages_is_the_one_asked_for(subject, monkeypatch):
    used = []

    def greedy(model, made, kept, dtype):
        used.append(dtype)
        return right(made)

    monkeypatch.setattr(recall, "greedy", greedy)
    report = run(subject, None, length=1024, cache_format="fp8")
    assert set(used) == {torch.float8_e4m3fn} and report["settings"]["cache_format"] == "fp8"
    with pytest.raises(ValueError, match="cache_format: 'int3' is unknown"):
        run(subject, None, cache_format="int3")


def test_a_model_can_be_asked_without_its_tables():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with torch.no_grad():
        for p in model.parameters():  # so that tables, which begin as nothing, say something
            p.add_(0.3 * torch.randn_like(p))
    whole = LocalModel(model, tokenizer, "tiny")
    ids = tokenizer.encode("What is the code of it?")
    before = whole.logits(ids)
    report = run(whole, right, length=1024, without_engram=True)
    assert report["settings"]["without_engram"] is True
    assert not torch.equal(before, whole.logits(ids))
    with pytest.raises(ValueError, match="without_engram: tiny has no Engram tables"):
        run(whole, right, without_engram=True)


@pytest.mark.parametrize("dtype", ops.ROW_FORMATS.values(), ids=str)
def test_pages_of_any_format_can_be_asked(subject, dtype):
    made = document("mqar", subject.tokenizer, 200, 0)
    answers = recall.greedy(subject, made, page_size=16, dtype=dtype)
    assert [len(said) for said in answers] == [len(query.answer) for query in made.queries]


def test_a_fork_shares_full_pages_and_copies_the_last(subject):
    pool = PagePool(subject.config, 8, 16)
    state = SequenceState()
    recall._read(subject.model, pool, state, range(20, 60))
    before = pool.data[state.pages].clone()
    branch = recall.fork(pool, state)
    assert branch.pages[:2] == state.pages[:2] and branch.pages[2] != state.pages[2]
    recall._read(subject.model, pool, branch, range(70, 75))
    assert state.length == 40 and (pool.data[state.pages] == before).all()
    pool.release(branch.pages)
    assert pool.free == 5


def test_an_interrupted_run_goes_on_where_it_was(subject, tmp_path):
    partial, asked = tmp_path / "out.partial.jsonl", []

    def stops(made):
        asked.append(made)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return right(made)

    with pytest.raises(KeyboardInterrupt):
        run(subject, stops, partial=partial)
    with partial.open("a") as file:
        file.write('{"task": "niah')  # cut off while it was written
    assert run(subject, stops, partial=partial) == run(subject, right)
    assert len(asked) == 4 + 5
    with pytest.raises(ValueError, match="other settings"):
        run(subject, right, partial=partial, seed=1)


def test_what_two_levels_keep_of_the_flat_choice_is_told_by_length_and_layer():
    def report(**indexer):
        model = LocalModel(tiny_model(**indexer), tiny_tokenizer(), "tiny")
        return mqar.run(model, {"length": [40, 200], "samples": 2})

    assert "kept" not in report()
    kept = report(block_size=4, candidate_blocks=12)["kept"]
    assert kept["40"] == {"0": 1, "2": 1}  # all blocks are candidates
    assert all(0.1 < share < 1 for share in kept["200"].values()) and set(kept["200"]) == {"0", "2"}


def test_the_bundled_long_model_finds_its_needles_in_two_levels():
    model = fourfold.load("nano-long", dtype="bf16")
    settings = {"task": "niah_multiquery", "length": [2048, 16384], "samples": 2, "cache_format": "bf16", "seed": 9}
    report = needle.run(model, settings)
    assert report["scores"]["niah_multiquery"]["n"] == 16
    assert report["scores"]["niah_multiquery"]["accuracy"] > 0.9
    assert report["kept"]["16384"]["2"] > 0.99


def test_a_suite_runs_a_model_and_its_map_is_drawn(subject, tmp_path):
    report = mqar.run(subject, {"length": 64, "samples": 2})
    assert report["suite"] == "mqar" and report["scores"]["mqar"]["n"] == 8
    heatmap.draw(report["cells"], tmp_path / "map.svg")
    assert "<svg" in (tmp_path / "map.svg").read_text()
    with pytest.raises(ValueError, match="task"):
        mqar.run(subject, {"task": "vt"})
