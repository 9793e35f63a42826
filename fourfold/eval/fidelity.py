"""How far a model is from the one that it was made of, most often by quantising: token by token, and task by task."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fourfold.config_media import MediaConfig
from fourfold.data import corpus as corpora
from fourfold.data.suites import SUITES, TEXTS, suite, texts
from fourfold.eval import Subject
from fourfold.eval.media import accuracy, answer, medium
from fourfold.model.sequence import Document, pack
from fourfold.model.transformer import Model
from fourfold.quant.calibrate import built_corpus, calibration_documents, in_batches, skills_at_hand
from fourfold.text.tokenizer import Tokenizer, TokenizerError
from fourfold.weights.checkpoint import load_model, resolve

DOCUMENTS, TEXT_SAMPLES = 200, 10
SKIPPED = 65_536  # positions at the start of a file, which may have been calibrated on
ROW = 1024

Sets = dict[str, tuple[list[Document], int]]  # name -> documents, and the bytes of text they stand for (0: not text)


def run(model: Subject, settings: dict[str, Any]) -> dict[str, Any]:
    """settings: task, the model to compare with (default: nano); samples (documents, default 200), seed."""
    reference, samples, seed = settings.get("task", "nano"), settings.get("samples", DOCUMENTS), settings.get("seed", 0)
    wide, _ = load_model(resolve(reference))
    scores = tokens(model.model, wide, documents(model.tokenizer, model.model.cfg.media, None, samples, seed))
    used = {"task": reference, "samples": samples, "seed": seed}
    return {"suite": "fidelity", "model": model.name, "scores": scores, "settings": used}


def compare(
    model: Subject,
    reference: Subject,
    samples: int = 50,
    data: Path | None = None,
    seed: int = 0,
    answered: dict[str, list[str]] | None = None,
) -> dict[str, Any]:
    """``tokens`` and ``tasks`` of ``model`` beside ``reference``, and the mean accuracy of both.

    samples: items a task, 0 for none; data: what to measure tokens on where the corpus and the tokenizer are not
    ours; answered: the answers of the reference by task, kept for the next call. Raises ValueError for data that
    hold nothing.
    """
    cfg = model.model.cfg.media
    found = {"tokens": tokens(model.model, reference.model, documents(model.tokenizer, cfg, data, DOCUMENTS, seed))}
    kept = {} if answered is None else answered
    tasks: dict[str, dict[str, float]] = {}
    for name in SUITES if samples and _is_ours(model.tokenizer) else ():
        try:
            items = suite(name, built_corpus(), samples, seed)
        except corpora.CorpusError:
            continue
        found_medium = medium(items[0])
        if found_medium is not None and found_medium.modality not in cfg.modalities:
            continue
        if name not in kept:
            kept[name] = answer(reference, items)
        ours = answer(model, items)
        same = sum(a == b for a, b in zip(ours, kept[name], strict=True)) / len(items)
        tasks[name] = {
            "n": len(items),
            "accuracy": accuracy(items, ours),
            "accuracy_reference": accuracy(items, kept[name]),
            "same_answer": same,
        }
    found["tasks"] = tasks
    if tasks:
        keys = ("accuracy", "accuracy_reference")
        found["mean"] = {key: sum(task[key] for task in tasks.values()) / len(tasks) for key in keys}
    return found


# ---------------------------------------------------------------- what is read


def documents(
    tokenizer: Tokenizer, media: MediaConfig, data: Path | None = None, samples: int = DOCUMENTS, seed: int = 0
) -> Sets:
    """Held-out documents of the skills, and held-out prose by source, as far as they can be made here; or, for a
    tokenizer that is not ours, what ``data`` holds after its start."""
    if not _is_ours(tokenizer):
        if data is None:
            raise ValueError("fidelity: this model's tokenizer is not ours; name a file of plain text to measure on")
        start = len(calibration_documents(data, tokenizer, media, SKIPPED, seed))
        rest = calibration_documents(data, tokenizer, media, 2 * SKIPPED, seed)[start:]
        if not rest:
            raise ValueError(f"fidelity: {data} holds no more than {SKIPPED:,} tokens, which are for calibration")
        return {"text": (rest, sum(len(tokenizer.decode(d.tokens.tolist()).encode()) for d in rest))}
    corpus, mixture = built_corpus(), skills_at_hand(tokenizer, media, "test", seed)
    found: Sets = {"skills": ([mixture.document(number) for number in range(samples)], 0)}
    for source, shard in TEXTS.items():
        if shard in corpus:
            prose = texts(source, corpus, TEXT_SAMPLES, seed=seed)
            rows = [Document.text([tokenizer.special("<|bos|>"), *tokenizer.encode(text)][:ROW]) for text in prose]
            size = sum(len(tokenizer.decode(row.tokens[1:].tolist()).encode()) for row in rows)
            found[f"prose: {source}"] = rows, size
    return found


def _is_ours(tokenizer: Tokenizer) -> bool:
    try:
        return tokenizer.special("<|bos|>") >= 0
    except TokenizerError:
        return False


# ---------------------------------------------------------------- what is measured


@torch.inference_mode()
def tokens(model: Model, reference: Model, sets: Sets) -> dict[str, dict[str, float]]:
    """Over the positions whose next token is learnt: mean ``KL(reference || model)`` in nats, the share with the same
    first choice, the perplexity of both, and of text the bits per byte of both."""
    found = {}
    for name, (rows, size) in sets.items():
        sums = SimpleNamespace(n=0, kl=0.0, same=0, ours=0.0, theirs=0.0)
        for batch in in_batches(rows):
            packed = pack(batch)
            targets = packed.targets[packed.targets >= 0, None]
            ours, theirs = (m(packed, logits="target").logits.float().log_softmax(-1) for m in (model, reference))
            sums.n += len(targets)
            sums.kl += float((theirs.exp() * (theirs - ours)).sum())
            sums.same += int((theirs.argmax(-1) == ours.argmax(-1)).sum())
            sums.ours -= float(ours.gather(-1, targets).sum())
            sums.theirs -= float(theirs.gather(-1, targets).sum())
        score = {
            "n": sums.n,
            "kl": sums.kl / sums.n,
            "same_choice": sums.same / sums.n,
            "perplexity": math.exp(sums.ours / sums.n),
            "perplexity_reference": math.exp(sums.theirs / sums.n),
        }
        if size:
            bits = 1 / math.log(2) / size
            score |= {"bits_per_byte": sums.ours * bits, "bits_per_byte_reference": sums.theirs * bits}
        found[name] = score
    return found
