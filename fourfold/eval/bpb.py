"""Bits per byte on held-out prose, beside a byte unigram, gzip and xz, and the model with its context cut."""

from __future__ import annotations

import math
from typing import Any

import torch

from fourfold.data import corpus as corpora
from fourfold.data.baselines import text_baseline
from fourfold.data.suites import TEXTS, texts
from fourfold.eval import Subject
from fourfold.model.sequence import Document, pack
from fourfold.text.chat import Text

CUT = 8  # tokens of context left in the control


def run(model: Subject, settings: dict[str, Any]) -> dict[str, Any]:
    """settings: samples (default 100 texts a source), seed, task (one source). Raises ValueError if it is unknown."""
    samples, seed = settings.get("samples", 100), settings.get("seed", 0)
    sources = [settings["task"]] if "task" in settings else list(TEXTS)
    corpus = corpora.load(None)
    scores: dict[str, dict[str, float]] = {}
    for source in sources:
        found = texts(source, corpus, samples, seed=seed)
        scores[source] = {"n": len(found), "bpb": bits_per_byte(model, found)}
        scores[source] |= {f"context_{CUT}": bits_per_byte(model, found, CUT)}
        scores[source] |= text_baseline(source, corpus, samples, seed=seed)
    return {"suite": "bpb", "model": model.name, "scores": scores, "settings": {"samples": samples, "seed": seed}}


@torch.inference_mode()
def bits_per_byte(model: Subject, found: list[str], context: int | None = None) -> float:
    """Mean over all bytes of all texts, each as the model is given plain text; ``context``: tokens seen at most."""
    bits, total = 0.0, 0
    for text in found:
        ids = [id for piece in model.chat.continue_text(text) if isinstance(piece, Text) for id in piece.ids]
        chunk = len(ids) if context is None else context + 1
        pieces = [ids[start : start + chunk] for start in range(0, len(ids) - 1, chunk - 1)]
        documents = [Document.text(piece) for piece in pieces if len(piece) > 1]
        packed = pack(documents)
        losses = torch.nn.functional.cross_entropy(
            model.model(packed, logits="target").logits, packed.targets[packed.targets >= 0], reduction="sum"
        )
        bits += float(losses) / math.log(2)
        total += len(text.encode())
    return bits / total
