"""A model in this process: what ``fourfold.load`` gives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from fourfold.config_media import MediaConfig
from fourfold.media.audio import decode_audio
from fourfold.media.image import decode_image
from fourfold.media.limits import Limits, MediaError
from fourfold.media.video import decode_video
from fourfold.model.sequence import Document, pack
from fourfold.model.transformer import Model
from fourfold.serve.engine import Engine
from fourfold.serve.request import Delta, Finished, Request, Sampling
from fourfold.text.chat import Media, Message
from fourfold.text.formats import ChatFormat, default_chat, load_chat
from fourfold.text.tokenizer import Tokenizer
from fourfold.weights.checkpoint import load_model, resolve

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}

# A file, its bytes, or what it decodes to: an image, a sound, or (frames, seconds, sound) of a video.
Source = str | Path | bytes | np.ndarray | tuple


def decode_media(modality: str, source: Source, config: MediaConfig, mime: str | None = None) -> Media:
    """A file, its bytes (called ``mime`` by the sender), or decoded input, as an input of the model.

    Raises MediaError if the model lacks the modality or the content cannot be decoded within the limits.
    """
    if modality not in config.modalities:
        raise MediaError(f"{modality}: this model takes only {', '.join(('text', *config.modalities))}")
    if isinstance(source, (np.ndarray, tuple)):
        return Media(modality, source)
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    limits = Limits.of(config)
    if modality == "image":
        return Media("image", np.asarray(decode_image(data, limits, mime)))
    if modality == "video":
        return Media("video", decode_video(data, limits, mime))
    assert config.audio is not None
    return Media("audio", decode_audio(data, config.audio.sample_rate, config.audio.max_seconds, limits, mime))


def _chat(path: Path, tokenizer: Tokenizer) -> ChatFormat:
    if path.is_dir():
        return load_chat(path, None, tokenizer)
    from fourfold.weights.gguf_tokenizer import gguf_chat

    return gguf_chat(path, tokenizer)


class LocalModel:
    """Model, tokenizer, chat format and config, with an engine that starts at the first ``generate``.

    ``engine_options``: arguments of that engine, to be set before.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, name: str = "", chat: ChatFormat | None = None) -> None:
        self.name = name
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.chat = chat or default_chat(tokenizer)
        self.path: Path | None = None
        self.engine_options: dict[str, Any] = {}
        self.config = model.cfg

    @classmethod
    def load(
        cls, name: str | Path, dtype: str | None = None, quant: str | None = None, progress: bool = False
    ) -> LocalModel:
        """The bundled model called ``name``, or the one in the directory or GGUF file ``name``.

        dtype: None is float32; quant: "int8", "int4" or "fp8" of the large weights, made while loading; progress: a
        bar on stderr. Raises ValueError if there is no such model, or for a dtype or quant that is none.
        """
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype: is {dtype!r}; choose one of {', '.join(DTYPES)}")
        directory = resolve(str(name))
        model, tokenizer = load_model(directory, DTYPES[dtype or "float32"], quant, progress)
        loaded = cls(model, tokenizer, Path(name).name, _chat(directory, tokenizer))
        loaded.path = directory
        return loaded

    @cached_property
    def engine(self) -> Engine:
        return Engine(self.model, self.tokenizer, self.chat, **self.engine_options)

    def close(self) -> None:
        """Ends the engine's thread, if it was started."""
        if "engine" in self.__dict__:
            self.engine.close()
            del self.__dict__["engine"]

    @overload
    def generate(self, prompt: str | Sequence[Message], *, stream: Literal[False] = False, **options: Any) -> str: ...
    @overload
    def generate(self, prompt: str | Sequence[Message], *, stream: Literal[True], **options: Any) -> Iterator[str]: ...
    def generate(self, prompt: str | Sequence[Message], *, stream: bool = False, **options: Any) -> str | Iterator[str]:
        """The answer to a question or a conversation, whole or (``stream``) in pieces; options as :meth:`events`."""
        text = (e.text for e in self.events(prompt, **options) if isinstance(e, Delta) and e.kind == "content")
        return text if stream else "".join(text)

    def events(
        self,
        prompt: str | Sequence[Message],
        *,
        images: Iterable[Source] = (),
        audios: Iterable[Source] = (),
        videos: Iterable[Source] = (),
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        thinking: bool = False,
        effort: str | int | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> Iterator[Delta | Finished]:
        """As :meth:`generate`, but also the reasoning, the tool calls and, at the end, the usage.

        A prompt that is text is one user message, its media before the text; ``effort`` is how long to think, by a
        name (``low`` to ``max``) or, for DeepSeek-V4.1, a number to 100. Raises ValueError on bad input.
        """
        media = [
            decode_media(modality, source, self.config.media)
            for modality, sources in (("image", images), ("audio", audios), ("video", videos))
            for source in sources
        ]
        if isinstance(prompt, str):
            prompt = [Message("user", [*media, prompt])]
        elif media:
            raise ValueError("images, audios, videos: put them into the content of the messages")
        document = self.engine.encode(list(prompt), tools, thinking, effort)
        sampling = Sampling(temperature, top_p, top_k, seed)
        budget = self.chat.budget(effort)
        return self._run(Request(document, sampling, max_tokens, tuple(stop), thinking, budget, bool(tools)))

    def complete(
        self,
        text: str,
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> str:
        """How ``text`` goes on, outside any conversation. Raises ValueError on bad input."""
        sampling = Sampling(temperature, top_p, top_k, seed)
        events = self._run(Request(self.engine.encode_text(text), sampling, max_tokens, tuple(stop)))
        return "".join(e.text for e in events if isinstance(e, Delta))

    def _run(self, request: Request) -> Iterator[Delta | Finished]:
        handle = self.engine.submit(request)

        def events() -> Iterator[Delta | Finished]:
            try:
                yield from handle
            finally:
                handle.cancel()  # the caller stopped listening

        return events()

    def answers(self, conversations: Sequence[Sequence[Message]], thinking: bool, max_tokens: int) -> list[str]:
        """The greedy answers to many conversations, which the engine runs together."""
        documents = (self.engine.encode(list(messages), None, thinking) for messages in conversations)
        handles = [self.engine.submit(Request(d, Sampling(0.0), max_tokens, (), thinking)) for d in documents]
        return ["".join(e.text for e in h if isinstance(e, Delta) and e.kind == "content") for h in handles]

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """float32 [T, vocab]: for each of T text tokens, the logits of the token after it. Scores one sequence."""
        if not 1 <= len(ids) <= self.config.max_position_embeddings:
            raise ValueError(f"ids: has {len(ids)} tokens; must have 1 to {self.config.max_position_embeddings}")
        if not all(0 <= id < self.config.vocab_size for id in ids):
            raise ValueError(f"ids: must be between 0 and {self.config.vocab_size - 1}")
        device = next(self.model.parameters()).device
        return self.model(pack([Document.text(ids)]).to(device)).logits.float().cpu()
