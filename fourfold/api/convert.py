"""From the wire to the engine: messages, media and options."""

from __future__ import annotations

import base64
import binascii
import json

from fourfold.api.errors import ApiError
from fourfold.api.schemas import (
    AssistantMessage,
    AudioPart,
    ChatRequest,
    ImagePart,
    MessageParam,
    TextPart,
    ToolMessage,
    VideoPart,
)
from fourfold.config_media import MediaConfig
from fourfold.serve.engine import Engine
from fourfold.serve.local import decode_media
from fourfold.serve.request import Request, Sampling
from fourfold.text.chat import ChatError, Media, Message, ToolCall

MAX_MEDIA = 32

AUDIO_MIME = {
    "wav": "audio/wav",
    "mp3": "audio/mpeg",
    "flac": "audio/flac",
    "ogg": "audio/ogg",
    "opus": "audio/opus",
    "m4a": "audio/mp4",
    "mp4": "audio/mp4",
    "webm": "audio/webm",
}


def to_request(body: ChatRequest, engine: Engine) -> Request:
    """Decodes media and builds the prompt; slow, so not for the event loop. Raises ApiError or ValueError."""
    effort = body.reasoning_effort
    thinking = body.thinking.type == "enabled" if body.thinking else effort not in (None, "none")
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] if body.tool_choice != "none" else []
    isolation = body.model_dump(include={"user", "user_id", "cache_salt"}, exclude_none=True)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    try:
        prompt = engine.encode(to_messages(body.messages, engine.config.media), tools or None, thinking, effort)
    except ChatError as error:
        raise ApiError(str(error), param=str(error).split(":")[0], code="invalid_value") from error
    return Request(
        prompt=prompt,
        sampling=Sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=body.top_k or 0,
            seed=body.seed,
        ),
        max_tokens=body.max_completion_tokens or body.max_tokens,
        stop=tuple(stop),
        thinking=thinking,
        thinking_budget=engine.chat.budget(effort),
        tools=bool(tools),
        salt=json.dumps(isolation) if isolation else "",
    )


def to_messages(messages: list[MessageParam], config: MediaConfig) -> list[Message]:
    parts = [part for message in messages if isinstance(message.content, list) for part in message.content]
    count = sum(not isinstance(part, TextPart) for part in parts)
    if count > MAX_MEDIA:
        message = f"messages: hold {count} media; at most {MAX_MEDIA} are allowed"
        raise ApiError(message, param="messages", code="invalid_value")
    return [_message(message, f"messages[{index}]", config) for index, message in enumerate(messages)]


def _message(message: MessageParam, name: str, config: MediaConfig) -> Message:
    content: str | list[str | Media] = (
        message.content
        if isinstance(message.content, str)
        else [
            part.text if isinstance(part, TextPart) else _media(part, f"{name}.content[{index}]", config)
            for index, part in enumerate(message.content or ())
        ]
    )
    role = "system" if message.role == "developer" else message.role
    if isinstance(message, ToolMessage):
        return Message(role, content, tool_call_id=message.tool_call_id)
    if isinstance(message, AssistantMessage):
        calls = tuple(ToolCall(c.id, c.function.name, c.function.arguments) for c in message.tool_calls or ())
        return Message(role, content, message.reasoning_content, calls)
    return Message(role, content)


def _media(part: ImagePart | VideoPart | AudioPart, name: str, config: MediaConfig) -> Media:
    if isinstance(part, ImagePart):
        modality, param = "image", f"{name}.image_url.url"
        mime, data = _data_url(part.image_url.url, param)
    elif isinstance(part, VideoPart):
        modality, param = "video", f"{name}.video_url.url"
        mime, data = _data_url(part.video_url.url, param)
    else:
        modality, param = "audio", f"{name}.input_audio.data"
        mime, data = AUDIO_MIME[part.input_audio.format], _base64(part.input_audio.data, param)
    try:
        return decode_media(modality, data, config, mime)
    except ValueError as error:
        raise ApiError(f"{param}: {error}", param=param, code=f"invalid_{modality}") from error


def _data_url(url: str, param: str) -> tuple[str, bytes]:
    """(label, content) of a base64 data URL."""
    if not url.startswith("data:"):
        message = f"{param}: fetching URLs is off; send the content as a data: URL"
        raise ApiError(message, param=param, code="url_not_allowed")
    label, comma, content = url[len("data:") :].partition(",")
    mime, *options = label.split(";")
    if not comma or "base64" not in options:
        raise ApiError(f"{param}: must be data:TYPE;base64,CONTENT", param=param, code="invalid_value")
    return mime, _base64(content, param)


def _base64(text: str, param: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(f"{param}: is not base64 ({error})", param=param, code="invalid_value") from error
