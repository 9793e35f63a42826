"""Text and media laid out as one :class:`Document`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from fourfold.config_media import AudioConfig, MediaConfig
from fourfold.media.audio import audio_patches, token_seconds
from fourfold.media.image import image_patches
from fourfold.media.limits import MediaError
from fourfold.media.video import video_patches
from fourfold.media.vision import vision_patches
from fourfold.model.sequence import END, IGNORE, MODALITIES, NEWLINE, NO_MARK, START, TEXT, Document, Patches

PLACEHOLDERS = {"image": "<|image|>", "video": "<|video|>", "audio": "<|audio|>"}


class SpecialTokens(Protocol):
    """What is needed of a tokenizer."""

    def special(self, name: str) -> int: ...


class DocumentBuilder:
    """Lays out a document piece by piece; media raise :class:`MediaError` when malformed or unknown to the model.

    image: START, the patches with a NEWLINE after each row, END. video: START, the tubelets with a NEWLINE after
    each slice, END. audio: START, patches, END. The sound of a video follows slice by slice as audio spans.
    """

    def __init__(self, media_config: MediaConfig, tokenizer: SpecialTokens) -> None:
        self.config = media_config
        self._ids = {name: tokenizer.special(PLACEHOLDERS[name]) for name in media_config.embedded}
        if media_config.vision is not None:
            self._ids["image"] = media_config.vision.image_token_id
        self._length = 0
        self._tokens: list[np.ndarray] = []
        self._modality: list[np.ndarray] = []
        self._marks: list[np.ndarray] = []
        self._learn: list[np.ndarray] = []
        self._patches: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}

    def text(self, ids: Sequence[int], learn: bool = False) -> None:
        """Appends text; where ``learn``, each token is the target of the position before it."""
        tokens = np.asarray(ids, dtype=np.int64)
        self._append(tokens, TEXT, np.full(len(tokens), NO_MARK), learn)

    def image(self, image: np.ndarray) -> None:
        """uint8 [H, W, 3]."""
        if self.config.vision is not None:
            values, coords, (rows, cols) = vision_patches(image, self.config.vision)
        else:
            values, coords, (rows, cols) = image_patches(image, self._require("image"))
        row = [NO_MARK] * cols + [NEWLINE]
        self._span("image", [START, *row * rows, END], values, coords)

    def video(self, frames: np.ndarray, seconds: np.ndarray, audio: np.ndarray | None = None) -> None:
        """frames: uint8 [F, H, W, 3]; seconds: [F]; audio: float [S], from the first frame on.

        After each slice of frames comes the sound until the next slice begins. When the sound is longer than the
        model takes, each slice keeps the beginning of its own, an equal share of the limit.
        """
        cfg = self._require("video")
        values, coords, (slices, rows, cols) = video_patches(frames, seconds, cfg)
        size = rows * cols
        sounds = self._sounds(audio, coords[::size, 0]) if audio is not None else [None] * slices
        for n, sound in enumerate(sounds):
            part = slice(n * size, (n + 1) * size)
            opening, closing = [START] * (n == 0), [END] * (n == slices - 1 and sound is None)
            self._span("video", [*opening, *[NO_MARK] * size, NEWLINE, *closing], values[part], coords[part])
            if sound is not None:
                self._sound(*sound)
        if sounds[-1] is not None:
            self._span("video", [END], values[:0], coords[:0])

    def audio(self, wave: np.ndarray) -> None:
        """float [S] at the model's sample rate."""
        self._sound(*audio_patches(wave, self._require("audio")))

    def build(self) -> Document:
        """The document; a target is the next token where that is learnt text, else ``IGNORE``."""
        tokens, modality, marks = (_join(parts) for parts in (self._tokens, self._modality, self._marks))
        learn = np.concatenate([np.zeros(0, bool), *self._learn])
        targets = np.full(len(tokens), IGNORE)
        targets[:-1] = np.where(learn[1:], tokens[1:], IGNORE)
        patches = {
            name: Patches(*(torch.from_numpy(np.concatenate(p)) for p in zip(*self._patches[name], strict=True)))
            for name in MODALITIES
            if name in self._patches
        }
        return Document(
            tokens=torch.from_numpy(tokens),
            modality=torch.from_numpy(modality),
            marks=torch.from_numpy(marks),
            targets=torch.from_numpy(targets),
            patches=patches,
        )

    def _require(self, name: str) -> Any:
        config = getattr(self.config, name)
        if config is None:
            known = ", ".join(self.config.modalities) or "none"
            raise MediaError(f"{name}: the model takes no {name} (it takes: {known})")
        return config

    def _append(self, tokens: np.ndarray, modality: int, marks: np.ndarray, learn: bool) -> None:
        self._tokens.append(tokens)
        self._modality.append(np.full(len(tokens), modality))
        self._marks.append(marks)
        self._learn.append(np.full(len(tokens), learn))
        self._length += len(tokens)

    def _span(self, name: str, marks: Sequence[int], values: np.ndarray, coords: np.ndarray) -> None:
        kinds = np.array(marks, dtype=np.int64)
        if len(values):
            index = self._length + np.flatnonzero(kinds == NO_MARK)
            self._patches.setdefault(name, []).append((index, values, coords))
        self._append(np.full(len(kinds), self._ids[name]), MODALITIES.index(name), kinds, False)

    def _sound(self, values: np.ndarray, coords: np.ndarray) -> None:
        self._span("audio", [START, *[NO_MARK] * len(values), END], values, coords)

    def _sounds(self, wave: np.ndarray, starts: np.ndarray) -> list[tuple[np.ndarray, np.ndarray] | None]:
        """The sound of each slice, None where there is none."""
        cfg: AudioConfig = self._require("audio")
        values, coords = audio_patches(wave, replace(cfg, max_seconds=math.inf))
        most = int(cfg.max_seconds / token_seconds(cfg))
        share = len(values) if len(values) <= most else max(most // len(starts), 1)
        bounds = [0, *np.searchsorted(coords[:, 0], starts[1:]), len(values)]
        sounds: list[tuple[np.ndarray, np.ndarray] | None] = []
        for begin, end in itertools.pairwise(bounds):
            end = min(end, begin + share)
            sounds.append((values[begin:end], coords[begin:end]) if end > begin else None)
        return sounds


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *parts])


def build_document(pieces: Iterable[Any], media_config: MediaConfig, tokenizer: SpecialTokens) -> Document:
    """The document of ``encode_chat``'s pieces: text has ``ids`` and ``learn``, media ``modality`` and ``value``.

    Raises :class:`MediaError` for a modality that the model lacks and for malformed values.
    """
    builder = DocumentBuilder(media_config, tokenizer)
    for piece in pieces:
        if hasattr(piece, "ids"):
            builder.text(piece.ids, piece.learn)
        elif piece.modality == "image":
            builder.image(piece.value)
        elif piece.modality == "video":
            builder.video(*piece.value)
        elif piece.modality == "audio":
            builder.audio(piece.value)
        else:
            raise MediaError(f"modality: is {piece.modality!r}; choose one of {', '.join(PLACEHOLDERS)}")
    return builder.build()
