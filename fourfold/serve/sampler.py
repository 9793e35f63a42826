"""From logits to one token id."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.serve.request import Sampling


def make_generator(sampling: Sampling) -> torch.Generator:
    """A request's own source of randomness, so that no other request can change its answer."""
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator, banned: Tensor) -> int:
    """One id drawn from ``logits`` (float [vocab]) without the ``banned`` ids (int64 [k]).

    The draw inverts the cumulative distribution in id order: noise in the last bits of the logits moves the
    borders a little, but never reorders the ids. Raises FloatingPointError if the logits are not finite.
    """
    logits = logits.to("cpu", torch.float64)
    if not torch.isfinite(logits).all():
        raise FloatingPointError("the model's logits are not finite")
    logits = logits.index_fill(0, banned, -torch.inf)
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / sampling.temperature, -1)
    if sampling.top_k and sampling.top_k < len(probabilities):
        kept = probabilities.topk(sampling.top_k).indices
        probabilities = torch.zeros_like(probabilities).index_copy(0, kept, probabilities[kept])
    if sampling.top_p < 1:
        ordered, ids = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # the mass of the likelier ids; the likeliest always stays
        outside = ids[before >= sampling.top_p * float(ordered.sum())]
        probabilities = probabilities.index_fill(0, outside, 0.0)
    cumulative = probabilities.cumsum(-1)
    point = torch.rand((), dtype=torch.float64, generator=generator) * cumulative[-1]
    index = int(torch.searchsorted(cumulative, point, right=True))
    return min(index, int(probabilities.nonzero()[-1]))


class StopFilter:
    """Passes text on until a stop string appears; holds back what may be the beginning of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """The text that is safe to show, and whether a stop string ended it."""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` with which ``stop`` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
