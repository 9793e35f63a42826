"""``POST /v1/chat/completions``: one engine answer as a JSON object or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse

from fourfold.api.errors import ApiError, translate
from fourfold.api.schemas import ChatRequest
from fourfold.serve.request import Delta, Finished, Handle, Usage
from fourfold.text.chat import parse_tool_call

KEEP_ALIVE_SECONDS = 10.0


def usage_body(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_cache_hit_tokens": usage.cached_tokens,
        "prompt_cache_miss_tokens": usage.prompt_tokens - usage.cached_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "text_tokens": usage.text_tokens,
            "image_tokens": usage.image_tokens,
            "video_tokens": usage.video_tokens,
            "audio_tokens": usage.audio_tokens,
        },
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


@dataclass
class Reply:
    """The frame around one answer: its id, its time and the model's name."""

    model: str
    fingerprint: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "system_fingerprint": self.fingerprint, "choices": choices, **more}


def tool_call_body(text: str, index: int | None = None) -> dict[str, Any]:
    """The JSON text of a call, as the engine emits it, in the wire's shape; ``index`` is given in streams."""
    call = parse_tool_call(text)
    assert call is not None  # the parser emits only calls that parse
    body = {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
    return body if index is None else {"index": index, **body}


async def whole(handle: Handle, reply: Reply, request: HttpRequest) -> Response:
    """Waits for the end, unless the client goes away first."""
    gone = asyncio.create_task(_disconnected(request))
    answer = asyncio.create_task(_collect(handle))
    try:
        await asyncio.wait((gone, answer), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            return Response(status_code=499)  # nobody reads it
        deltas, finished = answer.result()
    finally:
        handle.cancel()
        gone.cancel()
        answer.cancel()
    said = {kind: "".join(d.text for d in deltas if d.kind == kind) for kind in ("reasoning", "content")}
    calls = [tool_call_body(d.text) for d in deltas if d.kind == "tool_call"]
    content = None if calls and not said["content"] else said["content"]
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if said["reasoning"]:
        message["reasoning_content"] = said["reasoning"]
    if calls:
        message["tool_calls"] = calls
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finished.reason}
    return JSONResponse(reply.body("chat.completion", [choice], usage=usage_body(finished.usage)))


async def _collect(handle: Handle) -> tuple[list[Delta], Finished]:
    deltas: list[Delta] = []
    async for event in handle:
        if isinstance(event, Finished):
            return deltas, event
        deltas.append(event)
    raise AssertionError("an answer ends with Finished")


async def _disconnected(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def stream(handle: Handle, reply: Reply, body: ChatRequest) -> Response:
    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(_events(handle, reply, include_usage), media_type="text/event-stream", headers=headers)


async def _events(handle: Handle, reply: Reply, include_usage: bool) -> AsyncIterator[str]:
    """Chunks, a comment after a silence (so that nobody takes a long prefill for a dead connection), and ``[DONE]``."""
    more = {"usage": None} if include_usage else {}
    calls = 0

    def chunk(delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _line(reply.body("chat.completion.chunk", [choice], **more))

    try:
        yield chunk({"role": "assistant", "content": ""})
        while True:
            events = await handle.next_events(KEEP_ALIVE_SECONDS)
            if not events:
                yield ": keep-alive\n\n"
            for event in events:
                if isinstance(event, Finished):
                    yield chunk({}, event.reason)
                    if include_usage:
                        yield _line(reply.body("chat.completion.chunk", [], usage=usage_body(event.usage)))
                    yield "data: [DONE]\n\n"
                    return
                if event.kind == "tool_call":
                    yield chunk({"tool_calls": [tool_call_body(event.text, calls)]})
                    calls += 1
                else:
                    yield chunk({"reasoning_content" if event.kind == "reasoning" else "content": event.text})
    except Exception as error:  # the status line is sent already, so the stream itself must say it
        yield _line(translate(error).body)
    finally:
        handle.cancel()


def _line(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def read_body(request: HttpRequest, limit: int) -> bytes:
    """The body, refused as soon as it is known to be longer than ``limit`` bytes."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError("Content-Type must be application/json", status=415, code="unsupported_media_type")
    too_large = ApiError(f"The body is larger than {limit} bytes", status=413, code="request_too_large")
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)
