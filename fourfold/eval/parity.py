"""A checkpoint's logits beside those that transformers computes from the same directory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fourfold.eval import Subject
from fourfold.model.cache import Cache, PagePool, SequenceState
from fourfold.model.sequence import Document, pack


def run(model: Subject, settings: dict[str, Any]) -> dict[str, Any]:
    """settings: samples (default 4 sequences of random tokens), length (default 64), seed.

    ``whole`` compares logits of whole sequences, ``cached`` those computed token by token: the greatest difference,
    the same relative to the spread of the logits, and the share of positions with the same first choice. Raises
    ValueError where transformers is not installed or cannot read the directory.
    """
    samples, length, seed = settings.get("samples", 4), settings.get("length", 64), settings.get("seed", 0)
    judge = _judge(model)
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randint(model.tokenizer.vocab_size, (samples, length), generator=generator)
    with torch.inference_mode():
        wanted = judge(batch).logits.float()
        whole = torch.stack([model.model(pack([Document.text(row.tolist())])).logits.float() for row in batch])
        cached = torch.stack([_token_by_token(model, row.tolist()) for row in batch])
    scores = {name: _compare(got, wanted) for name, got in (("whole", whole), ("cached", cached))}
    settings = {"samples": samples, "length": length, "seed": seed}
    return {"suite": "parity", "model": model.name, "scores": scores, "settings": settings}


def _judge(model: Subject) -> Any:
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise ValueError("parity: needs transformers, the judge (pip install 'fourfold[hf]')") from None
    if model.path is None or not model.path.is_dir():
        raise ValueError("--model: must be a directory, which transformers reads too")
    import fourfold.weights.hf  # noqa: F401  (so that it knows our own)

    dtype = next(model.model.parameters()).dtype
    try:
        return AutoModelForCausalLM.from_pretrained(model.path, dtype=dtype, attn_implementation="eager").eval()
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"--model: transformers cannot read {model.path}: {error}") from None


def _token_by_token(model: Subject, ids: list[int]) -> Tensor:
    """float32 [T, V]."""
    cfg, parameter = model.model.cfg, next(model.model.parameters())
    state = SequenceState()
    pool = PagePool(cfg, 1, page_size=-(-len(ids) // 128) * 128, dtype=parameter.dtype)
    steps = (pack([Document.text([id])], starts=[at]) for at, id in enumerate(ids))
    return torch.cat([model.model(step, cache=Cache(pool, [state])).logits.float() for step in steps])


def _compare(got: Tensor, wanted: Tensor) -> dict[str, Any]:
    difference = float((got - wanted).abs().max())
    same = float((got.argmax(-1) == wanted.argmax(-1)).float().mean())
    return {
        "n": wanted[..., 0].numel(),
        "max_difference": difference,
        "relative": difference / float(wanted.std()),
        "same_choice": same,
    }
