"""From logits to token ids, one for each row of a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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


NUCLEUS = 256  # likeliest ids that are looked at first for top_p


@dataclass(frozen=True)
class Choice:
    """One row to choose a token for: how, without which ids (int64 [k]), and at which point of [0, 1)."""

    sampling: Sampling
    banned: Tensor
    point: float = 0.0


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator, banned: Tensor) -> int:
    """One id drawn from ``logits`` (float [vocab]). Raises FloatingPointError if the logits are not finite."""
    if not torch.isfinite(logits).all():
        raise FloatingPointError("the model's logits are not finite")
    point = draw(generator) if sampling.temperature else 0.0
    return sample_rows(logits[None], [Choice(sampling, banned, point)])[0]


def draw(generator: torch.Generator) -> float:
    """The next point of a request's own sequence, uniform in [0, 1)."""
    return float(torch.rand((), dtype=torch.float64, generator=generator))


def sample_rows(logits: Tensor, choices: Sequence[Choice]) -> list[int]:
    """One id for each row of ``logits`` (float [rows, vocab], finite).

    The draw inverts the cumulative distribution in id order at the row's point: noise in the last bits of the
    logits moves the borders a little, but never reorders the ids; and no row depends on another.
    """
    logits = logits.to("cpu", torch.float64, copy=True)
    for banned, rows in _by_identity([c.banned for c in choices]):
        if len(rows) == len(choices):
            logits[:, banned] = -torch.inf
        else:
            logits[torch.tensor(rows)[:, None], banned] = -torch.inf
    best = logits.argmax(-1)
    hot = [row for row, choice in enumerate(choices) if choice.sampling.temperature]
    if not hot:
        return best.tolist()
    drawn = _draw_rows(logits[hot] if len(hot) < len(choices) else logits, [choices[row] for row in hot])
    best[hot] = drawn
    return best.tolist()


def _draw_rows(logits: Tensor, choices: Sequence[Choice]) -> Tensor:
    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float64)[:, None]

    vocab = logits.shape[-1]
    probabilities = torch.softmax(logits / column(c.sampling.temperature for c in choices), -1)
    limits = [c.sampling.top_k or vocab for c in choices]
    if min(limits) < vocab:
        most = min(max(k for k in limits if k < vocab), vocab)
        kept = probabilities.topk(most, -1)
        inside = torch.arange(most) < torch.tensor(limits)[:, None]
        cut = torch.zeros_like(probabilities).scatter(-1, kept.indices, kept.values * inside)
        limited = torch.tensor(limits)[:, None] < vocab
        probabilities = torch.where(limited, cut, probabilities)
    if min(c.sampling.top_p for c in choices) < 1:
        mass = column(c.sampling.top_p for c in choices)
        probabilities = probabilities.masked_fill(~_nucleus(probabilities, mass) & (mass < 1), 0.0)
    cumulative = probabilities.cumsum(-1)
    points = column(c.point for c in choices) * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, points, right=True).squeeze(-1)
    if int(found.max()) == vocab:  # a point so close to one that it was rounded up
        possible = torch.arange(vocab).expand_as(probabilities).masked_fill(probabilities == 0, -1).amax(-1)
        found = torch.minimum(found, possible)
    return found


def _nucleus(probabilities: Tensor, mass: Tensor) -> Tensor:
    """bool [rows, vocab]: the fewest likeliest ids that have ``mass`` [rows, 1] of the whole; one at least.

    Only where the first few do not suffice are all of a row sorted; which rows share the call changes nothing.
    """
    wanted = mass * probabilities.sum(-1, keepdim=True)
    inside = torch.zeros_like(probabilities, dtype=torch.bool)
    values, ids = probabilities.topk(min(NUCLEUS, probabilities.shape[-1]), -1)
    before = values.cumsum(-1) - values  # the mass of the likelier ids; the likeliest always stays
    inside.scatter_(-1, ids, before < wanted)
    wide = (before[:, -1:] < wanted).squeeze(-1).nonzero().squeeze(-1)
    if len(wide) and len(ids[0]) < probabilities.shape[-1]:
        values, ids = probabilities[wide].sort(descending=True, stable=True)
        before = values.cumsum(-1) - values
        inside[wide] = torch.zeros_like(inside[wide]).scatter(-1, ids, before < wanted[wide])
    return inside


def _by_identity(tensors: Sequence[Tensor]) -> list[tuple[Tensor, list[int]]]:
    """Each different tensor with the rows that have it."""
    groups: dict[int, tuple[Tensor, list[int]]] = {}
    for row, tensor in enumerate(tensors):
        groups.setdefault(id(tensor), (tensor, []))[1].append(row)
    return list(groups.values())


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
