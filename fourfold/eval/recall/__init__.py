"""Long-context recall: documents with hidden answers, read once each, then asked every question from those pages."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fourfold import ops
from fourfold.config import ModelConfig
from fourfold.data.recall import Query, Recall, document
from fourfold.eval import Subject
from fourfold.eval.media import wilson
from fourfold.model.cache import Cache, PagePool, SequenceState
from fourfold.model.mla import gather_above
from fourfold.model.probe import Probe
from fourfold.model.sequence import Document, pack
from fourfold.model.transformer import Model
from fourfold.text.chat import Text

Answer = Callable[[Recall], list[list[int]]]
SCORES = 2**26  # query-key pairs of one chunk of the prefill: what bounds its memory


def run_suite(
    suite: str, tasks: Sequence[str], model: Subject, settings: dict[str, Any], answer: Answer | None = None
) -> dict[str, Any]:
    """Every task x length x depth, ``samples`` documents each.

    settings: length (one or several, default 1024), task (one of ``tasks``), samples (default 20), seed, depths
    (shares; drawn for each document if not given), cache_format (one of ``ops.ROW_FORMATS``, default fp32),
    without_engram (the model loses its tables), partial (file that keeps what is done; a rerun goes on from it).
    answer: the tokens said to each query of a document; the model's greedy ones if None. Where the model's indexers
    work in two levels, ``kept`` says for each length and layer what share of the flat indexer's choice they make.
    Raises ValueError for a setting out of range, or if ``partial`` was begun with other settings.
    """
    lengths = settings.get("length", 1024)
    lengths = [lengths] if isinstance(lengths, int) else list(lengths)
    samples, seed = settings.get("samples", 20), settings.get("seed", 0)
    depths = settings.get("depths") or [None]
    if settings.get("task", tasks[0]) not in tasks:
        raise ValueError(f"task: {settings['task']!r} is unknown; choose one of {', '.join(tasks)}")
    if (numbers := settings.get("cache_format", "fp32")) not in ops.ROW_FORMATS:
        raise ValueError(f"cache_format: {numbers!r} is unknown; choose one of {', '.join(ops.ROW_FORMATS)}")
    if samples < 1 or min(lengths) < 5:
        raise ValueError(f"samples ({samples}) must be at least 1, length ({min(lengths)}) at least 5")
    chosen = [settings["task"]] if "task" in settings else list(tasks)
    said = {"length": lengths, "samples": samples, "seed": seed, "depths": depths, "task": chosen}
    if "cache_format" in settings:
        said["cache_format"] = numbers
    if settings.get("without_engram"):
        if not model.model.engrams:
            raise ValueError(f"without_engram: {model.name} has no Engram tables")
        said["without_engram"] = True
        model.model.engrams.clear()
    done = _begin(settings.get("partial"), {"suite": suite, "model": model.name, **said})
    kept: dict[int, list[float]] = defaultdict(list)
    answer = answer or (lambda made: greedy(model, made, kept, dtype=ops.ROW_FORMATS[numbers]))
    cells = [(t, n, d, i) for n in lengths for t in chosen for d in depths for i in range(samples)]
    for number, (task, length, depth, sample) in enumerate(cells):
        if (task, length, depth, sample) in done:
            continue
        made = document(task, model.tokenizer, length, seed * 1_000_003 + sample, depth=depth)
        kept.clear()
        shares = [score(model, task, q, ids) for q, ids in zip(made.queries, answer(made), strict=True)]
        mean_kept = {str(layer): math.fsum(all) / len(all) for layer, all in kept.items()}
        line = {"task": task, "length": length, "depth": depth, "sample": sample, "shares": shares, "kept": mean_kept}
        done[task, length, depth, sample] = line
        _append(settings.get("partial"), line)
        if sys.stderr.isatty():
            print(f"\r{number + 1}/{len(cells)} {task} {length}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    grid: dict[tuple[str, int, float | None], list[float]] = defaultdict(list)
    for task, length, depth, sample in cells:
        grid[task, length, depth] += done[task, length, depth, sample]["shares"]
    scores = {task: summary([s for key, all in grid.items() if key[0] == task for s in all]) for task in chosen}
    listed = [{"task": t, "length": n, "depth": d, **summary(shares)} for (t, n, d), shares in grid.items()]
    by_layer = {str(n): _mean_kept([done[cell]["kept"] for cell in cells if cell[1] == n]) for n in lengths}
    report = {"suite": suite, "model": model.name, "scores": scores, "settings": said, "cells": listed}
    return report | ({"kept": by_layer} if any(by_layer.values()) else {})


def _mean_kept(documents: list[dict[str, float]]) -> dict[str, float]:
    """Over the documents, for each layer that any of them has."""
    layers = dict.fromkeys(layer for document in documents for layer in document)
    return {layer: math.fsum(d[layer] for d in documents if layer in d) / len(documents) for layer in layers}


def summary(shares: Sequence[float]) -> dict[str, float]:
    """shares: of each query, how many of its values were given. Accuracy counts the queries where all were."""
    accuracy = sum(share == 1 for share in shares) / len(shares)
    low, high = wilson(accuracy, len(shares))
    return {"n": len(shares), "accuracy": accuracy, "ci95": (high - low) / 2, "recall": math.fsum(shares) / len(shares)}


def score(model: Subject, task: str, query: Query, said: Sequence[int]) -> float:
    """The share of a query's values that the answer gives, as whole words; of MQAR, whether the token is right."""
    if task == "mqar":
        return float(list(said[:1]) == query.answer)
    words = set(re.findall(r"\w+", model.tokenizer.decode(said).split("\n")[0]))
    return sum(value in words for value in query.values) / len(query.values)


@torch.inference_mode()
def greedy(
    model: Subject,
    made: Recall,
    kept: dict[int, list[float]] | None = None,
    page_size: int = 64,
    dtype: torch.dtype = torch.float32,
) -> list[list[int]]:
    """The greedy answer to each query, no longer than the right one; the context is read once for all of them.

    kept: layer -> shares (``Probe.kept``), to which those of the questions and answers are added.
    """
    network = model.model
    device = next(network.parameters()).device
    prefix = [id for piece in model.chat.continue_text("") if isinstance(piece, Text) for id in piece.ids]
    ids = [*prefix, *made.context.tolist()]
    longest = max(len(query.tokens) + len(query.answer) for query in made.queries)
    size = math.lcm(page_size, PagePool(network.cfg, 1, math.lcm(page_size, 128)).layout.multiple)
    pool = PagePool(network.cfg, -(-len(ids) // size) + -(-longest // size) + 2, size, dtype, device)
    state = SequenceState()
    chunk = max(64, min(2048, int(SCORES / min(len(ids), _reach(network.cfg)))))
    for start in range(0, len(ids), chunk):
        _read(network, pool, state, ids[start : start + chunk])
    answers = []
    for query in made.queries:
        branch, probe = fork(pool, state), None if kept is None else Probe()
        said = [_read(network, pool, branch, query.tokens, probe)]
        while len(said) < len(query.answer):
            said.append(_read(network, pool, branch, said[-1:], probe))
        pool.release(branch.pages)
        answers.append(said)
        if kept is not None and probe is not None:
            for layer, shares in probe.kept.items():
                kept.setdefault(layer, []).extend(torch.cat([s.flatten() for s in shares]).tolist())
    return answers


def _reach(cfg: ModelConfig) -> float:
    """Keys that a chunk of the prefill may hold scores of at once: all, unless a selection is streamed."""
    streamed = cfg.attention.kind == "mla" and cfg.indexer.mode == "sparse"
    return gather_above(cfg) if streamed else math.inf


def fork(pool: PagePool, state: SequenceState) -> SequenceState:
    """A sequence that goes on from ``state`` by itself: full pages are shared, the one still growing is copied."""
    full = state.length // pool.page_size
    branch = SequenceState(state.pages[:full], state.length, list(state.history), state.tail)
    pool.retain(branch.pages)
    if state.length % pool.page_size:
        other = SequenceState()
        pool.reserve(other, 1)
        to, source = pool.use_all([other.pages[0], state.pages[full]])
        pool.data[to] = pool.data[source]
        branch.pages += other.pages
    return branch


def _read(network: Model, pool: PagePool, state: SequenceState, ids: Sequence[int], probe: Probe | None = None) -> int:
    """Reads tokens into the cache; the likeliest next one."""
    packed = pack([Document.text(ids)], starts=[state.length]).to(pool.data.device)
    return int(network(packed, cache=Cache(pool, [state]), probe=probe, logits="last").logits[-1].argmax())


def _begin(partial: Path | None, header: dict[str, Any]) -> dict[tuple[str, int, float | None, int], dict[str, Any]]:
    """What a file of an interrupted run holds; a new file begins with the settings."""
    if partial is None:
        return {}
    if not partial.exists():
        _append(partial, header)
        return {}
    lines = list(_whole_lines(partial))
    if not lines or lines[0] != header:
        raise ValueError(f"{partial}: was begun with other settings; remove it to start anew")
    return {(e["task"], e["length"], e["depth"], e["sample"]): e for e in lines[1:]}


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Its objects; a last line that was cut off is removed, so that the next one stands alone."""
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    yield from (json.loads(line) for line in whole.splitlines())


def _append(partial: Path | None, line: dict[str, Any]) -> None:
    if partial is not None:
        with partial.open("a") as file:
            file.write(json.dumps(line) + "\n")
