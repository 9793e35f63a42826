"""Byte-level BPE. What a user writes never becomes a special token: those enter by id alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

SPECIALS = (
    "<|bos|>",
    "<|eos|>",
    "<|pad|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<think>",
    "</think>",
    "<|tools|>",
    "</|tools|>",
    "<tool_call>",
    "</tool_call>",
    "<|image|>",
    "<|video|>",
    "<|audio|>",
)

# One digit; a word with the space or sign before it; signs; line ends; spaces.
WORDS = r"\p{N}|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class TokenizerError(ValueError):
    """A tokenizer file, text or token that cannot be used; the message names it."""


class Tokenizer:
    """A ``tokenizer.json`` whose decoder is byte-level.

    ``vocab_size`` is its largest id + 1. ``marks`` are the tokens that steer a model, name -> id: the special ones,
    and those that files add without calling them special though they are written like ``<think>`` or ``<｜User｜>``.
    Any other added token is a piece of text that the vocabulary spells as a whole.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        description = json.loads(backend.to_str())
        if "ByteLevel" not in json.dumps(description["decoder"]):
            raise TokenizerError("tokenizer: its decoder must be ByteLevel")
        self.backend = backend
        # Encoding goes through a twin that knows no added token, so none can be injected by text.
        self._plain = tokenizers.Tokenizer.from_str(json.dumps({**description, "added_tokens": []}))
        for twin in (self.backend, self._plain):
            twin.no_padding()
            twin.no_truncation()
        added = backend.get_added_tokens_decoder()
        self.marks = {t.content: index for index, t in added.items() if t.special or set(t.content) & set("<|｜")}
        self._names = {index: name for name, index in self.marks.items()}
        self._mark_pattern = _any_of(self.marks)
        self._words = {token.content: index for index, token in added.items() if index not in self._names}
        self._word_pattern = _any_of(self._words)
        self._ids = set(backend.get_vocab(with_added_tokens=True).values())
        self.vocab_size = max(self._ids) + 1

    @staticmethod
    def load(path: str | Path) -> Tokenizer:
        """Reads ``tokenizer.json``; raises :class:`TokenizerError` if it is missing or no byte-level tokenizer."""
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises plain Exception
            raise TokenizerError(f"tokenizer {path}: {error}") from error
        return Tokenizer(backend)

    def save(self, path: str | Path) -> None:
        self.backend.save(str(path))

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, in which names of special tokens are plain text.

        Raises :class:`TokenizerError` on a lone surrogate.
        """
        try:
            ids: list[int] = []
            for part in self._word_pattern.split(text) if self._words else [text]:
                word = self._words.get(part)
                ids += self._plain.encode(part, add_special_tokens=False).ids if word is None else [word]
            return ids
        except TypeError as error:
            raise TokenizerError("text: must be a string without lone surrogates") from error

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of ``ids``; broken UTF-8 becomes U+FFFD, ids outside the vocabulary are left out."""
        kept = [i for i in ids if i not in self._names] if skip_special else list(ids)
        return self.backend.decode(kept, skip_special_tokens=False)

    def special(self, name: str) -> int:
        """The id of a token such as ``<|eos|>``; raises :class:`TokenizerError` if there is none of that name."""
        if name not in self.marks:
            raise TokenizerError(f"special token {name!r} is not in the tokenizer")
        return self.marks[name]

    def is_special(self, token: int) -> bool:
        return token in self._names

    def mark(self, token: int) -> str | None:
        """The name of a special token, None for any other."""
        return self._names.get(token)

    def split_marks(self, text: str) -> list[str]:
        """``text``, which is trusted, cut before and after each name of a special token (every second part)."""
        return self._mark_pattern.split(text)

    def has(self, token: int) -> bool:
        """Whether the id stands for anything; a vocabulary may have holes."""
        return token in self._ids

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token stands for: perhaps a part of a character, nothing for an unknown id."""
        text = self.backend.id_to_token(token) or ""
        if token not in self._names and text not in self._words:
            try:
                return bytes(_byte_of()[letter] for letter in text)
            except KeyError:  # a vocabulary entry outside the byte alphabet is written as it is read
                pass
        return text.encode()


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Finds any of the names, the longest where several begin; nothing if there are none."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else r"(?!)()")


@lru_cache(maxsize=1)
def _byte_of() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable letter; this is the way back."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learns merges from ``texts``: :data:`SPECIALS` first, then the 256 bytes, then merges up to ``vocab_size``.

    Fewer ids come out if the texts hold too few pairs. Raises :class:`TokenizerError` below 272.
    """
    smallest = len(SPECIALS) + 256
    if vocab_size < smallest:
        raise TokenizerError(f"vocab_size: is {vocab_size}, must be at least {smallest}")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def compress_vocabulary(tokenizer: Tokenizer) -> list[int]:
    """Token id -> compressed id: tokens that read alike but for case, accents and spacing share one (arXiv 2601.07372).

    Compressed ids count up in order of first appearance; their number is ``max(result) + 1``.
    """
    lone_space = "\ue000"  # keeps a token that is one space from being stripped to nothing
    normaliser = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(tokenizers.Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(tokenizers.Regex(r"^ $"), lone_space),
            normalizers.Strip(),
            normalizers.Replace(lone_space, " "),
        ]
    )
    numbers: dict[str, int] = {}
    compressed = []
    for token in range(tokenizer.vocab_size):
        text = tokenizer.decode([token], skip_special=False)
        if "\ufffd" in text:
            key = tokenizer.backend.id_to_token(token) or text
        else:
            key = normaliser.normalize_str(text) or text
        compressed.append(numbers.setdefault(key, len(numbers)))
    return compressed
