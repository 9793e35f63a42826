"""One step's input: decoding sequences are a few token ids each, chunks of prompts are documents."""

from __future__ import annotations

import torch

from fourfold.model.sequence import IGNORE, MODALITIES, Document, Packed, join_patches

Chunk = list[int] | Document  # text that was generated, or positions of any kind


def pack_step(chunks: list[Chunk], starts: list[int]) -> Packed:
    """Lays chunks end to end, each from its own position on. The logits of "target" positions are those of each
    chunk's last position, and of every position of a chunk of ids (all of whose next tokens are wanted).

    Without a document in it (most steps) this makes six tensors, however many sequences there are.
    """
    lengths = [len(chunk) for chunk in chunks]
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    total = bounds[-1]
    tokens = torch.tensor([id for chunk in chunks if isinstance(chunk, list) for id in chunk], dtype=torch.int64)
    positions = torch.tensor(
        [p for start, length in zip(starts, lengths, strict=True) for p in range(start, start + length)]
    )
    modality, marks, targets = torch.zeros(3, total, dtype=torch.int64)  # TEXT and NO_MARK are 0
    patches = {}
    documents = [(n, chunk) for n, chunk in enumerate(chunks) if isinstance(chunk, Document)]
    if documents:
        texts, tokens = tokens, torch.empty(total, dtype=torch.int64)
        taken = 0
        for n, chunk in enumerate(chunks):
            here = slice(bounds[n], bounds[n + 1])
            if isinstance(chunk, Document):
                tokens[here], modality[here], marks[here] = chunk.tokens, chunk.modality, chunk.marks
                targets[bounds[n] : bounds[n + 1] - 1] = IGNORE
            else:
                tokens[here] = texts[taken : taken + len(chunk)]
                taken += len(chunk)
        for name in MODALITIES[1:]:
            parts = [(bounds[n], chunk.patches[name]) for n, chunk in documents if name in chunk.patches]
            if parts:
                patches[name] = join_patches(parts)
    return Packed(tokens, positions, modality, marks, targets, torch.tensor(bounds), patches)
