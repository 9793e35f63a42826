"""What ``/v1/chat/completions`` accepts. Unknown fields, wrong types and what cannot be honoured are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

MAX_MESSAGES = 1024
MAX_PARTS = 256
MAX_TOOLS = 128
SALT_CHARACTERS = 512

# Standard fields that are accepted only where they ask for nothing.
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), "only one answer a request is supported"),
    "logprobs": ((False,), "log probabilities are not supported"),
    "top_logprobs": ((0,), "log probabilities are not supported"),
    "logit_bias": (({},), "a logit bias is not supported"),
    "presence_penalty": ((0, 0.0), "penalties are not supported"),
    "frequency_penalty": ((0, 0.0), "penalties are not supported"),
    "parallel_tool_calls": ((True,), "parallel calls cannot be switched off"),
    "response_format": (({"type": "text"},), "only plain text is supported"),
    "modalities": ((["text"],), "only text is produced"),
    "store": ((False,), "nothing is stored"),
    "service_tier": (("auto", "default"), "there is one tier"),
}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class MediaUrl(Strict):
    url: str


class ImageUrl(MediaUrl):
    detail: Literal["auto"] | None = None


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class VideoPart(Strict):
    type: Literal["video_url"]
    video_url: MediaUrl


class InputAudio(Strict):
    data: str
    format: Literal["wav", "mp3", "flac", "ogg", "opus", "m4a", "mp4", "webm"]


class AudioPart(Strict):
    type: Literal["input_audio"]
    input_audio: InputAudio


Part = Annotated[TextPart | ImagePart | VideoPart | AudioPart, Field(discriminator="type")]
Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[Part], Tag("parts"), Field(max_length=MAX_PARTS)],
    Discriminator(lambda value: "parts" if isinstance(value, list) else "text"),
]


class FunctionCall(Strict):
    name: str
    arguments: str


class ToolCallParam(Strict):
    id: str
    type: Literal["function"]
    function: FunctionCall
    index: int | None = None  # clients send back what a stream gave them


class TextOnly(Strict):
    """Roles that may not hold media."""

    @model_validator(mode="after")
    def no_media(self) -> TextOnly:
        content = getattr(self, "content", None)
        for index, part in enumerate(content if isinstance(content, list) else ()):
            if not isinstance(part, TextPart):
                message = "content[{index}]: {type} is not allowed in a {role} message; only user messages hold media"
                role = getattr(self, "role", "")
                raise PydanticCustomError("media_role", message, {"index": index, "type": part.type, "role": role})
        return self


class SystemMessage(TextOnly):
    role: Literal["system", "developer"]
    content: Content


class UserMessage(Strict):
    role: Literal["user"]
    content: Content


class AssistantMessage(TextOnly):
    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallParam] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: None = None


class ToolMessage(TextOnly):
    role: Literal["tool"]
    content: Content
    tool_call_id: str


MessageParam = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Strict):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class Thinking(Strict):
    type: Literal["enabled", "disabled"]


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class ChatRequest(Strict):
    model: str
    messages: Annotated[list[MessageParam], Field(min_length=1, max_length=MAX_MESSAGES)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    thinking: Thinking | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    user: Annotated[str, Field(max_length=SALT_CHARACTERS)] | None = None
    user_id: Annotated[str, Field(max_length=SALT_CHARACTERS)] | None = None
    cache_salt: Annotated[str, Field(max_length=SALT_CHARACTERS)] | None = None
    n: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    logit_bias: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    parallel_tool_calls: Any = None
    response_format: Any = None
    modalities: Any = None
    store: Any = None
    service_tier: Any = None

    @field_validator(*NEUTRAL)
    @classmethod
    def asks_for_nothing(cls, value: Any, info: Any) -> Any:
        allowed, reason = NEUTRAL[info.field_name]
        if value is not None and not any(type(value) is type(v) and value == v for v in allowed):
            choices = " or ".join(repr(v) for v in allowed)
            context = {"reason": reason, "choices": choices}
            raise PydanticCustomError("unsupported", "{reason}; leave it out or send {choices}", context)
        return value

    @model_validator(mode="after")
    def consistent(self) -> ChatRequest:
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError("conflict", "max_tokens and max_completion_tokens differ; send one of them")
        off, effort = self.thinking and self.thinking.type == "disabled", self.reasoning_effort
        if self.thinking and effort and off != (effort == "none"):
            raise PydanticCustomError("conflict", "thinking and reasoning_effort contradict each other")
        if self.stream_options and not self.stream:
            raise PydanticCustomError("conflict", "stream_options is allowed only with stream: true")
        return self
