"""Speculative decoding with the model's own MTP block.

After each step the block guesses, for every sequence that decodes, the token after the one just sampled; the next
step computes both positions in its one forward. The model then samples the next token as it always does, at the
point of the request's own random sequence that is due. If that token is the guess, the second position counts and
gives one more token; if not, it is taken back. So the answer is the same, token for token, with and without guesses:
greedy or not, and for every seed.

The guess is drawn from the block's distribution at that very point, so where the two distributions agree the guess
is right; for greedy answers it is the block's likeliest token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fourfold.model.cache import Cache, PagePool, SequenceState
from fourfold.model.cache import layout as cache_layout
from fourfold.model.transformer import Model
from fourfold.serve.batch import Chunk, pack_step
from fourfold.serve.running import Running
from fourfold.serve.sampler import sample_rows

MODES = ("auto", "on", "off")
AUTO_STREAMS = 4  # sequences beyond which a second position of each costs as much as it brings
AUTO_DRAFTS = 16  # guesses of a request after which they have to pay
AUTO_ACCEPTED = 0.65  # the share of right ones that pays


def can_speculate(model: Model) -> bool:
    """Whether there is an MTP block whose cache can be kept and taken back: no compressed attention."""
    if model.mtp is None or cache_layout(model.cfg).tail_width:
        return False
    return not (model.cfg.mtp.normed_input and model.cfg.residual.kind == "mhc_single_pass")


class Speculator:
    """Keeps the cache of the MTP block, in the same pages as the trunk's, and makes the guesses.

    A page that is shared was computed with one following token of many, which its last row in this block depends on;
    that may spoil a guess, never an answer.
    """

    def __init__(self, model: Model, pool: PagePool, mode: str) -> None:
        self.drafted = self.accepted = 0
        self._model, self._pool, self._mode = model, pool, mode
        self._streams: Tensor | None = None
        self._hook = model.layers[-1].register_forward_hook(self._keep)

    def close(self) -> None:
        self._hook.remove()

    def _keep(self, _: Any, __: Any, streams: Tensor) -> None:
        self._streams = streams

    def settled(self, right: bool) -> None:
        self.drafted, self.accepted = self.drafted + 1, self.accepted + right

    @torch.inference_mode()
    def guess(self, batch: list[tuple[Running, int, int]]) -> None:
        """Runs the block over what the last forward computed and sets the ``draft`` of each sequence that decodes.

        batch: each sequence, the row of that forward where it begins, and the position it began at; what counts of it
        by now may be less than what was computed, or nothing.
        """
        streams, self._streams = self._streams, None
        assert streams is not None and self._model.mtp is not None
        decoding = sum(not r.prefilling for r, _, _ in batch)
        wanted = [(r, row, start) for r, row, start in batch if self._worth(r, decoding)]
        if not wanted:
            return
        device = self._pool.data.device
        chunks: list[Chunk] = [r.computed(start) for r, _, start in wanted]
        following = [id for r, _, start in wanted for id in r.tokens(start + 1, r.state.length + 1)]
        rows = [row + n for (_, row, _), chunk in zip(wanted, chunks, strict=True) for n in range(len(chunk))]
        packed = pack_step(chunks, [start for _, _, start in wanted]).to(device)
        states = [SequenceState(r.state.pages, start) for r, _, start in wanted]
        ctx = self._model.context(packed, Cache(self._pool, states), None)
        trunk = streams[rows]
        if self._model.cfg.mtp.normed_input:
            trunk = self._model.norm(self._model.collapse(trunk, ctx))[:, None].expand_as(trunk)
        embedded = self._model.embed_tokens(torch.tensor(following, device=device))
        hidden = self._model.mtp(trunk, embedded, ctx, cached=True)
        last = (packed.cu_seqlens[1:] - 1).tolist()
        ready = [(r, at) for (r, _, _), at in zip(wanted, last, strict=True) if self._may_guess(r)]
        if ready:
            logits = self._model.head(hidden[[at for _, at in ready]]).float().cpu()
            ids = sample_rows(logits.nan_to_num(), [r.choice() for r, _ in ready])
            for (running, _), id in zip(ready, ids, strict=True):
                running.draft = id

    def _worth(self, running: Running, decoding: int) -> bool:
        if self._mode == "on" or running.prefilling:
            return True
        pays = running.drafted < AUTO_DRAFTS or running.accepted >= AUTO_ACCEPTED * running.drafted
        return decoding <= AUTO_STREAMS and pays

    @staticmethod
    def _may_guess(running: Running) -> bool:
        """Whether a guess can help: the answer may have two more tokens, and the next one is not given anyway."""
        room = running.max_tokens - len(running.ids) >= 2
        return not running.prefilling and room and running.forced() is None
