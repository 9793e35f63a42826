"""The Engram study: its arms cost the same, its needles are held apart, and a tiny run ends in a table and a figure."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fourfold.model.sequence import Document, pack

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"


@pytest.fixture(scope="module")
def study() -> Any:
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("study_engram")
    finally:
        sys.path.remove(str(BENCH))


def test_all_arms_have_the_parameters_of_the_moe_arm(study: Any) -> None:
    whole = study.counted("moe", study.config("moe"))
    for arm, (kind, share) in study.ARMS.items():
        model = study.build(arm)
        size = study.counted(arm, model.cfg)
        assert size["total"] == sum(p.numel() for p in model.parameters()) == sum(size["by_part"].values())
        row = model.cfg.engram.head_dim * (model.cfg.engram.max_ngram - 1) * model.cfg.engram.n_heads
        assert 0 <= whole["total"] - size["total"] < 12 * row, arm  # the next primes of all tables together
        assert 0 <= whole["active"] - size["active"] < 3 * model.cfg.hidden_size, arm
        if kind:
            idle = study.BASE["moe"]["n_routed_experts"] - study.BASE["moe"]["num_experts_per_tok"]
            given = whole["by_part"]["routed_experts"] - size["by_part"]["routed_experts"]
            per_expert = whole["by_part"]["routed_experts"] // study.BASE["moe"]["n_routed_experts"]
            assert given == round(share * idle) * per_expert
            assert size["by_part"]["engram_tables"] == pytest.approx(given, rel=0.02)


def test_the_bigram_arm_adds_the_row_of_two_tokens_and_no_later_one(study: Any) -> None:
    torch.manual_seed(0)
    model = study.build("bigram 25").eval()
    bigram, found = model.engrams["0"], []
    bigram.register_forward_hook(lambda module, args, out: found.append(out - args[0]))
    with torch.no_grad():
        model(pack([Document.text([5, 6, 7, 6, 7]), Document.text([6, 7])]))
    rows = found[0][:, 0]
    torch.testing.assert_close(rows[4], rows[2])
    torch.testing.assert_close(rows[6], rows[2])
    assert (rows[1] - rows[3]).abs().max() > 1e-2  # 5 6 and 7 6
    assert (rows[3] - rows[5]).abs().max() > 1e-2  # 7 6 and the beginning, 6
    assert (bigram.embed.weight - rows[2]).abs().amax(-1).min() < 1e-6


@pytest.mark.parametrize("task", ["mq", "mv", "vt"])
def test_needles_of_the_test_split_never_stand_in_a_lesson(study: Any, task: str) -> None:
    text = np.frombuffer(b"prose " * 200, np.uint8)
    pairs: dict[str, set[tuple[int, int]]] = {"train": set(), "test": set()}
    for split, found in pairs.items():
        rng = np.random.default_rng(3)
        for _ in range(200):
            made = study.document(task, 64, rng, split, text)
            context = bytes(made.context.tolist())
            assert len(context) + sum(len(q.tokens) + len(q.answer) for q in made.queries) == 64
            needles = [(a, b) for a, b in zip(context, context[1:], strict=False) if a >= 128 and b >= 128]
            found.update(needles)
            for query in made.queries:
                assert query.answer == expected(task, query.tokens[1], needles)
    assert len(pairs["train"]) > 900
    assert len(pairs["test"]) > 500
    assert not pairs["train"] & pairs["test"]


@pytest.mark.parametrize("task", ["mq", "mv", "vt"])
def test_short_lessons_have_any_number_of_needles_that_fits(study: Any, task: str) -> None:
    rng, text, found = np.random.default_rng(3), np.frombuffer(b"prose " * 20, np.uint8), set()
    for _ in range(100):
        made = study.document(task, 32, rng, "train", text, fewer=True)
        needles = made.context.tolist().count(ord("["))
        assert len(made.context) + sum(len(q.tokens) + len(q.answer) for q in made.queries) == 32
        assert sum(len(q.answer) for q in made.queries) == needles
        found.add(needles)
    assert found == {1, 2, 3, 4}


def test_copies_hold_no_needle_of_the_test_split(study: Any) -> None:
    rng, apart = np.random.default_rng(3), importlib.import_module("_needles").APART
    for _ in range(200):
        made = study.copy(16, rng)
        names = made.context.tolist()
        assert len(set(names)) == 8
        assert made.queries[0].tokens + made.queries[0].answer == names
        assert not apart[names[:-1], names[1:]].any()


def expected(task: str, asked: int, needles: list[tuple[int, int]]) -> list[int]:
    """The answer by reading the needles."""
    if task != "vt":
        return [value for key, value in needles if key == asked]
    chain = [asked]
    for first, second in needles:
        if first == chain[-1]:
            chain.append(second)
    return chain[1:]


def test_a_tiny_study_is_kept_reported_and_not_done_twice(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(40):  # by name, a tenth is held out
        (folder / f"module_{number}.py").write_text(f'"""{"Paths and cycles of a graph. " * 20}"""\n')
    out, plot = tmp_path / "cells.jsonl", tmp_path / "figure.svg"
    command = [sys.executable, "bench/study_engram.py", "--steps", "2", "--seeds", "1", "--documents", "2"]
    command += ["--threads", "1", "--text", str(folder), "--out", str(out), "--plot", str(plot)]
    command += ["--cells", "arm=engram 25,arm=bigram 25"]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    cells = [json.loads(line) for line in out.read_text().splitlines()]
    assert [cell["arm"] for cell in cells] == ["moe", "engram 25", "bigram 25"]  # moe is what equal loss is equal to
    for cell in cells:
        assert cell["loss"] == cell["curve"][-1][1] > 0
        assert {*cell["unseen"]} == {*cell["seen"]} == {"mq", "mv", "vt"}
        assert {*cell["unseen"]["mq"]} == {"64", "128", "256"}
        looks = [step for step, bits, _ in cell["curve"] if bits <= cells[0]["loss"]]
        reached = cell["equal_loss"] and cell["equal_loss"]["step"]
        assert reached == (looks[0] if looks and cell["arm"] != "moe" else None)
    assert plot.read_text().startswith("<?xml")
    again = subprocess.run([*command, "--report"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "1 of 1 cells are done" in again
    assert "2 of 2 cells are done" in again
    assert len(out.read_text().splitlines()) == 3
    for line in ("| engram 25 | 1 |", "| bigram 25 | 17 |", "Equal loss"):
        assert line in first
        assert line in again


def test_a_study_that_is_stopped_begins_no_other_arm(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    def stop(cell: dict[str, Any], **how: Any) -> dict[str, Any]:
        begun.append(cell["arm"])
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "work", stop)
    monkeypatch.setattr("signal.signal", lambda *given: None)
    monkeypatch.setattr(sys, "argv", ["study", "--text", str(tmp_path), "--out", str(tmp_path / "cells.jsonl")])
    study.main()
    assert begun == ["moe"]
