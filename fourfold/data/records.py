"""One sample, whatever file it came from -> documents: plain text, a conversation, or media with their caption."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fourfold.config_media import MediaConfig
from fourfold.media.audio import decode_audio
from fourfold.media.image import decode_image
from fourfold.media.limits import Limits, MediaError
from fourfold.media.processor import build_document
from fourfold.media.video import decode_video
from fourfold.model.sequence import Document
from fourfold.text.chat import Media, Message, Text, ToolCall, encode_chat
from fourfold.text.tokenizer import Tokenizer

EXTENSIONS = {
    "image": ("png", "jpg", "jpeg", "webp", "bmp"),
    "audio": ("wav", "mp3", "flac", "ogg", "opus", "m4a"),
    "video": ("mp4", "webm", "mkv", "avi", "mov", "gif"),
}
MODALITY = {extension: modality for modality, names in EXTENSIONS.items() for extension in names}
MAX_MEDIA = 64  # of one sample


class RecordError(ValueError):
    """A sample that cannot be trained on; the message says why."""


@dataclass(frozen=True)
class Record:
    """``values``: its fields; ``files``: the bytes of its media by name, which ``messages`` may refer to."""

    values: Mapping[str, Any]
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Reader:
    """Makes documents of at most ``max_tokens`` positions. ``text`` and ``messages`` are the names of the fields.

    ``messages``, in the style of OpenAI, wins over ``text``; what the assistant says is learnt. Plain text is learnt
    from its first token to ``<|eos|>``; media beside it come before it. ``split``: plain text that is too long becomes
    several documents, the last token of each the first of the next, instead of an error.
    """

    tokenizer: Tokenizer
    media: MediaConfig
    max_tokens: int
    text: str = "text"
    messages: str = "messages"
    split: bool = False

    def documents(self, record: Record) -> list[Document]:
        """Raises ValueError (RecordError, MediaError, ChatError, TokenizerError) for a sample to leave out."""
        values = record.values
        if not isinstance(values, Mapping):
            raise RecordError(f"is a {type(values).__name__}, not an object with fields")
        supply = Supply(record, self.media)
        if values.get(self.messages) is not None:
            messages = [_message(entry, index, supply) for index, entry in enumerate(_list(values, self.messages))]
            tools = _list(values, "tools") if values.get("tools") else None
            documents = [self._build(encode_chat(messages, self.tokenizer, tools, add_generation_prompt=False))]
        else:
            documents = self._plain(values.get(self.text), supply)
        for document in documents:
            if len(document) > self.max_tokens:
                raise RecordError(f"too long: {len(document)} positions, at most {self.max_tokens}")
            if not bool((document.targets >= 0).any()):
                raise RecordError("empty: nothing in it is learnt")
        return documents

    def _plain(self, text: Any, supply: Supply) -> list[Document]:
        if text is None:
            raise RecordError(f"empty: has neither {self.text!r} nor {self.messages!r}")
        if not isinstance(text, str):
            raise RecordError(f"{self.text}: is a {type(text).__name__}, not text")
        if not text.strip():
            raise RecordError(f"empty: {self.text} is blank")
        begin, end = self.tokenizer.special("<|bos|>"), self.tokenizer.special("<|eos|>")
        ids = self.tokenizer.encode(text)
        if media := supply.all():
            return [self._build([Text([begin], False), *media, Text([*ids, end], True)])]
        ids = [begin, *ids, end]
        if len(ids) <= self.max_tokens or not self.split:
            return [Document.text(ids)]
        return [Document.text(ids[at : at + self.max_tokens]) for at in range(0, len(ids) - 1, self.max_tokens - 1)]

    def _build(self, pieces: list[Any]) -> Document:
        return build_document(pieces, self.media, self.tokenizer)


class Supply:
    """The media of one record: by name, in the order of its ``images``, ``videos`` and ``audios``, or all."""

    def __init__(self, record: Record, config: MediaConfig) -> None:
        self.files, self.config, self.taken = record.files, config, 0
        self.listed = {
            modality: iter(_list(record.values, f"{modality}s") if record.values.get(f"{modality}s") else ())
            for modality in EXTENSIONS
        }
        single = {modality: record.values.get(modality) for modality in EXTENSIONS}
        self.single = {modality: value for modality, value in single.items() if value is not None}

    def all(self) -> list[Media]:
        """What stands beside plain text: files by name, then the fields."""
        found = [(MODALITY[_extension(name)], data) for name, data in sorted(self.files.items())]
        found += [(modality, value) for modality, values in self.listed.items() for value in values]
        found += list(self.single.items())
        return [self.decode(modality, source) for modality, source in found]

    def next(self, modality: str) -> Media:
        """The next one that is listed."""
        source = next(self.listed[modality], None)
        if source is None:
            source = self.single.pop(modality, None)
        if source is None:
            raise RecordError(f"{modality}: messages ask for more than the sample has")
        return self.decode(modality, source)

    def decode(self, modality: str, source: Any) -> Media:
        """``source``: bytes, {"bytes": ...}, the name or extension of a file of the sample, or a data URL."""
        self.taken += 1
        if self.taken > MAX_MEDIA:
            raise RecordError(f"media: more than {MAX_MEDIA} in one sample")
        if modality not in self.config.modalities:
            raise MediaError(f"{modality}: the model takes only {', '.join(('text', *self.config.modalities))}")
        data, limits = self._bytes(modality, source), Limits.of(self.config)
        if modality == "image":
            return Media("image", np.asarray(decode_image(data, limits)))
        if modality == "video":
            return Media("video", decode_video(data, limits))
        assert self.config.audio is not None
        return Media("audio", decode_audio(data, self.config.audio.sample_rate, self.config.audio.max_seconds, limits))

    def _bytes(self, modality: str, source: Any) -> bytes:
        if isinstance(source, Mapping):  # as Hugging Face stores it, with a name that means nothing here
            source = source.get("bytes")
        if isinstance(source, bytes):
            return source
        if not isinstance(source, str):
            raise RecordError(f"{modality}: must be bytes, the name of a file of the sample, or a data URL")
        if source.startswith("data:"):
            head, _, body = source.partition(",")
            if not head.endswith(";base64"):
                raise RecordError(f"{modality}: a data URL must be base64")
            return decode_base64(body, modality)
        names = [name for name in self.files if source in (name, name.rpartition("/")[2], name.partition(".")[2])]
        if len(names) != 1:
            raise RecordError(f"{modality}: {source[:80]!r} is no file of the sample; nothing else is opened")
        return self.files[names[0]]


def decode_base64(text: Any, modality: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError) as error:
        raise RecordError(f"{modality}: is not base64 ({error})") from error


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _list(values: Mapping[str, Any], name: str) -> list[Any]:
    value = values[name]
    if not isinstance(value, (list, tuple)):
        raise RecordError(f"{name}: must be a list, not {type(value).__name__}")
    return list(value)


def _message(entry: Any, index: int, supply: Supply) -> Message:
    where = f"messages[{index}]"
    if not isinstance(entry, Mapping):
        raise RecordError(f"{where}: must be an object")
    content = entry.get("content")
    if isinstance(content, (list, tuple)):
        content = list(_parts(content, where, supply))
    elif content is None and entry.get("tool_calls"):
        content = ""
    elif not isinstance(content, str):
        raise RecordError(f"{where}.content: must be text or a list of parts")
    calls = entry.get("tool_calls") or ()
    if not isinstance(calls, (list, tuple)):
        raise RecordError(f"{where}.tool_calls: must be a list")
    return Message(
        role=str(entry.get("role")),
        content=content,
        reasoning=_string(entry.get("reasoning_content"), f"{where}.reasoning_content") or None,
        tool_calls=[_call(call, f"{where}.tool_calls[{n}]") for n, call in enumerate(calls)],
        tool_call_id=entry.get("tool_call_id"),
    )


def _call(call: Any, where: str) -> ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise RecordError(f"{where}.function: is missing")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, str):
        raise RecordError(f"{where}.function: needs a name and arguments, both text")
    return ToolCall(str(call.get("id")), name, arguments)


def _parts(parts: list[Any] | tuple[Any, ...], where: str, supply: Supply) -> Iterator[str | Media]:
    for n, part in enumerate(parts):
        name = f"{where}.content[{n}]"
        if not isinstance(part, Mapping):
            raise RecordError(f"{name}: must be an object with a type")
        kind = str(part.get("type"))
        modality = kind.removeprefix("input_").removesuffix("_url")
        if kind == "text":
            yield _string(part.get("text"), f"{name}.text")
        elif kind == "input_audio":
            body = part.get(kind)
            data = body.get("data") if isinstance(body, Mapping) else None
            yield supply.decode("audio", decode_base64(data, "audio"))
        elif modality in EXTENSIONS:
            source = part.get(kind)
            if isinstance(source, Mapping) and "url" in source:
                source = source["url"]
            yield supply.next(modality) if source is None else supply.decode(modality, source)
        else:
            raise RecordError(f"{name}.type: is {kind[:40]!r}; choose text, image, video or audio")


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str) and value is not None:
        raise RecordError(f"{name}: must be text, not {type(value).__name__}")
    return value or ""
