"""The training stream: document number n is a pure function of (seed, n), so a position is one integer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fourfold.config_media import MediaConfig
from fourfold.data.corpus import Corpus
from fourfold.data.items import Item, pick
from fourfold.data.skills import SKILLS, Made
from fourfold.media.processor import build_document
from fourfold.model.sequence import Document
from fourfold.text.chat import Message, encode_chat
from fourfold.text.tokenizer import Tokenizer

MAX_PROSE = 256  # tokens of one piece of prose
SYSTEMS = ("You are a helpful assistant.", "Answer briefly.", "You are Fourfold nano.", "Be concise and correct.")
OPENERS = ("greeting", "text_tasks", "arithmetic")  # what an earlier turn of a chat is about

# Shares of documents that suit the bundled model; see `shares` for what they come to in tokens.
NANO_WEIGHTS = {
    "prose": 0.09,
    "greeting": 0.02,
    "define": 0.02,
    "capitals": 0.02,
    "arithmetic": 0.09,
    "arithmetic_thinking": 0.07,
    "recall": 0.10,
    "text_tasks": 0.08,
    "fashion": 0.10,
    "emoji": 0.14,
    "emoji_group": 0.02,
    "shapes": 0.05,
    "speech": 0.11,
    "tones": 0.03,
    "sounds": 0.01,
    "motion": 0.05,
}


class Mixture(Iterator[Document]):
    """An endless stream of documents, skills drawn by weight.

    weights: skill -> share of documents, any positive scale. ``position`` is the number of the next document;
    ``document(n)`` gives any one. Raises ValueError for an unknown skill, one whose shard is not built or
    whose modality ``media`` lacks, or a negative weight.
    """

    def __init__(
        self,
        weights: dict[str, float],
        corpus: Corpus,
        tokenizer: Tokenizer,
        media: MediaConfig,
        split: str = "train",
        seed: int = 0,
    ) -> None:
        for name, weight in weights.items():
            if name not in SKILLS:
                raise ValueError(f"mixture: {name!r} is no skill; choose from {', '.join(SKILLS)}")
            if not weight >= 0:
                raise ValueError(f"mixture.{name}: weight must be >= 0, not {weight}")
            if SKILLS[name].modality not in ("text", *media.modalities):
                raise ValueError(f"mixture.{name}: needs {SKILLS[name].modality}, which the model does not read")
            for shard in SKILLS[name].shards:
                if not len(corpus[shard].rows(split="train")):
                    raise ValueError(f"mixture.{name}: shard {shard!r} has nothing to train on")
                if corpus[shard].tier != "A":
                    raise ValueError(f"mixture.{name}: shard {shard!r} is of tier {corpus[shard].tier}, for tests only")
        total = sum(weights.values())
        if not total > 0:
            raise ValueError("mixture: needs at least one positive weight")
        self.names = tuple(weights)
        self.edges = np.cumsum([w / total for w in weights.values()])
        self.corpus, self.tokenizer, self.media, self.split, self.seed = corpus, tokenizer, media, split, seed
        self.position = 0

    def skill(self, number: int) -> str:
        """Which skill document ``number`` is of."""
        return self._choose(self._generator(number))

    def document(self, number: int) -> Document:
        """Document ``number``, the same whenever it is asked for."""
        rng = self._generator(number)
        made = SKILLS[self._choose(rng)].make(self.corpus, rng, self.split)
        return self._prose(made) if isinstance(made, str) else self._chat(made, rng)

    def __next__(self) -> Document:
        self.position += 1
        return self.document(self.position - 1)

    def _generator(self, number: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, number]))

    def _choose(self, rng: np.random.Generator) -> str:
        return self.names[min(int(np.searchsorted(self.edges, rng.random(), side="right")), len(self.names) - 1)]

    def _prose(self, text: str) -> Document:
        ids = self.tokenizer.encode(text)[: MAX_PROSE - 1]
        return Document.text([self.tokenizer.special("<|bos|>"), *ids])

    def _chat(self, item: Item, rng: np.random.Generator) -> Document:
        """The item as a conversation, sometimes with a system prompt or after another exchange."""
        messages = item.conversation()
        if rng.random() < 0.1:
            earlier: Made = SKILLS[pick(rng, OPENERS)].make(self.corpus, rng, self.split)
            messages = [*earlier.conversation(), *messages] if isinstance(earlier, Item) else messages
        if rng.random() < 0.1:
            messages = [Message("system", pick(rng, SYSTEMS)), *messages]
        pieces = encode_chat(messages, self.tokenizer, add_generation_prompt=False)
        return build_document(pieces, self.media, self.tokenizer)


def shares(mixture: Mixture, documents: int = 2000) -> dict[str, dict[str, float]]:
    """Of the first documents, by skill: its share of documents and of tokens, mean tokens and targets of a document."""
    lengths: dict[str, list[tuple[int, int]]] = {name: [] for name in mixture.names}
    for number in range(documents):
        document = mixture.document(number)
        lengths[mixture.skill(number)].append((len(document), int((document.targets >= 0).sum())))
    total = sum(length for pairs in lengths.values() for length, _ in pairs)
    return {
        name: {
            "documents": len(pairs) / documents,
            "tokens": sum(length for length, _ in pairs) / total,
            "mean_tokens": float(np.mean([length for length, _ in pairs])),
            "mean_targets": float(np.mean([targets for _, targets in pairs])),
        }
        for name, pairs in lengths.items()
        if pairs
    }
