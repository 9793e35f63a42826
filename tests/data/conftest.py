"""A tiny made-up corpus: every shard the skills read, with nothing fetched."""

from __future__ import annotations

import numpy as np
import pytest

from fourfold.config_media import AudioConfig, ImageConfig, MediaConfig, VideoConfig
from fourfold.data.corpus import Corpus, Shard, flatten, load, split_of, write_shard
from fourfold.data.labels import CLOTHES, DIGITS, EMOJI, SOUNDS, WORDS
from fourfold.text.tokenizer import Tokenizer, train_tokenizer


def speech_shard(name: str, voices: tuple[str, ...], split: str) -> Shard:
    rng = np.random.default_rng(list(name.encode()))
    rows = [(word, voice) for word in DIGITS + WORDS for voice in voices]
    flat, offsets = flatten([rng.integers(-9000, 9000, 1600).astype(np.int16) for _ in rows], np.int16)
    columns = {
        "label": np.array([word for word, _ in rows]),
        "voice": np.array([voice for _, voice in rows]),
        "split": np.repeat(split, len(rows)),
    }
    return Shard(name, {"wave": flat, "offsets": offsets}, columns, "made up", "A")


def text_shard(name: str, sources: tuple[str, ...]) -> Shard:
    words = "the quick brown fox jumps over a lazy dog while rain falls on the old stone bridge".split()
    rng = np.random.default_rng(list(name.encode()))
    rows = [(source, f"{source}{n}", " ".join(rng.choice(words, 300))) for source in sources for n in range(40)]
    flat, offsets = flatten([np.frombuffer(text.encode(), np.uint8) for *_, text in rows], np.uint8)
    columns = {
        "source": np.array([row[0] for row in rows]),
        "key": np.array([row[1] for row in rows]),
        "split": np.array(["test" if name == "heldout_text" else split_of(row[1]) for row in rows]),
    }
    return Shard(name, {"text": flat, "offsets": offsets}, columns, "made up", "A")


def emoji_shard(name: str, styles: tuple[str, ...], tier: str) -> Shard:
    rng = np.random.default_rng(list(name.encode()))
    concepts = [(f"{group}{n}", f"{group} {n}", group) for group in EMOJI for n in range(20)]
    rows = [(style, *concept) for style in styles for concept in concepts]
    columns = {
        "style": np.array([row[0] for row in rows]),
        "key": np.array([row[1] for row in rows]),
        "label": np.array([row[2] for row in rows]),
        "category": np.array([row[3] for row in rows]),
        "split": np.array([split_of(row[1]) for row in rows]),
    }
    images = rng.integers(0, 256, (len(rows), 48, 48, 4), dtype=np.uint8)
    return Shard(name, {"images": images}, columns, "made up", tier)


def made_up_shards() -> list[Shard]:
    rng = np.random.default_rng(0)
    labels = np.array(CLOTHES * 5)
    fashion = Shard(
        "fashion",
        {"images": rng.integers(0, 256, (50, 28, 28), dtype=np.uint8)},
        {"label": labels, "split": np.repeat(["train", "test"], [40, 10])},
        "made up",
        "A",
    )
    kinds = sorted(set(SOUNDS.values()))
    flat, offsets = flatten([rng.integers(-9000, 9000, 900).astype(np.int16) for _ in kinds], np.int16)
    sounds = {
        "label": np.array(kinds),
        "key": np.array(kinds),
        "split": np.array(["test"] + ["train"] * (len(kinds) - 1)),
    }
    facts = {"country": np.array(["France"]), "capital": np.array(["Paris"]), "split": np.array(["train"])}
    definitions = {"word": np.array(["dog"]), "gloss": np.array(["a domestic animal"]), "split": np.array(["train"])}
    return [
        fashion,
        emoji_shard("emoji", ("noto", "flat"), "A"),
        emoji_shard("twemoji", ("twemoji",), "B"),
        text_shard("text", ("wordnet", "python", "kjv")),
        text_shard("heldout_text", ("sqlite",)),
        speech_shard("speech", ("flite-slt", "espeak-en-us+f1", "hibari-heart"), "train"),
        speech_shard("unseen_voice", ("flite-rms",), "test"),
        speech_shard("human_voice", ("human-allison",), "test"),
        Shard("sounds", {"wave": flat, "offsets": offsets}, sounds, "made up", "A"),
        Shard("facts", {}, facts, "made up", "A"),
        Shard("definitions", {}, definitions, "made up", "A"),
    ]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    for shard in made_up_shards():
        write_shard(shard, folder)
    return load(folder)


@pytest.fixture(scope="session")
def tokenizer(corpus: Corpus) -> Tokenizer:
    return train_tokenizer(corpus.texts(), 320)


@pytest.fixture(scope="session")
def media() -> MediaConfig:
    return MediaConfig(image=ImageConfig(), video=VideoConfig(max_patches=16), audio=AudioConfig())
