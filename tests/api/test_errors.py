"""Every bad request is refused with its reason and the field's name; none is ignored, none breaks the server."""

import json

import pytest

from tests.api.media import audio_part, image_part, png, url, video_part, wav


def body(content="hello", **more):
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 2, **more}


def refusal(client, sent, status=400):
    data = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
    reply = client.post("/v1/chat/completions", content=data, headers={"content-type": "application/json"})
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(reply.json()) == {"error"} and set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["message"]
    return error


@pytest.mark.parametrize(
    "change, param",
    [
        ({"temprature": 1}, "temprature"),
        ({"metadata": {}}, "metadata"),
        ({"min_p": 0.1}, "min_p"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": "4"}, "max_completion_tokens"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, None),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, None),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"store": True}, "store"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "not a name"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools[0].function.strict"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"thinking": {"type": "maybe"}}, "thinking.type"),
        ({"thinking": True}, "thinking"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"thinking": {"type": "disabled"}, "reasoning_effort": "high"}, None),
        ({"user": "x" * 513}, "user"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"model": 3}, "model"),
    ],
)
def test_fields(client, change, param):
    assert refusal(client, body(**change))["param"] == param


@pytest.mark.parametrize(
    "message, param",
    [
        ({"role": "robot", "content": "x"}, "messages[0]"),
        ({"content": "x"}, "messages[0]"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": 3}, "messages[0].content"),
        ({"role": "user", "content": "x", "name": "ann"}, "messages[0].name"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}, "messages[0].content[0].x"),
        ({"role": "user", "content": ["a"]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "input_file"}]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "messages[0].content[0].image_url"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content[0].image_url.url"),
        (
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": url("image/png", png()), "detail": "low"}}],
            },
            "messages[0].content[0].image_url.detail",
        ),
        ({"role": "tool", "content": "x"}, "messages[0].tool_call_id"),
        ({"role": "assistant", "content": "x", "tool_calls": [{"id": "a"}]}, "messages[0].tool_calls[0].type"),
        (
            {
                "role": "assistant",
                "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{"}}],
            },
            "messages[0].tool_calls[0].arguments",
        ),
    ],
)
def test_messages(client, message, param):
    assert refusal(client, body(messages=[message]))["param"] == param


@pytest.mark.parametrize(
    "role, more", [("system", {}), ("developer", {}), ("assistant", {}), ("tool", {"tool_call_id": "a"})]
)
def test_only_users_may_send_media(client, role, more):
    for part in (image_part(), audio_part(), video_part()):
        error = refusal(client, body(messages=[{"role": role, "content": [part], **more}]))
        assert (
            error["param"].startswith("messages[0]") and part["type"] in error["message"] and role in error["message"]
        )


@pytest.mark.parametrize(
    "part, param, words",
    [
        (
            {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
            "image_url.url",
            "fetching URLs is off",
        ),
        ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, "image_url.url", "fetching URLs is off"),
        (
            {"type": "video_url", "video_url": {"url": "http://127.0.0.1/a.mp4"}},
            "video_url.url",
            "fetching URLs is off",
        ),
        ({"type": "image_url", "image_url": {"url": "data:image/png,abc"}}, "image_url.url", "base64"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}}, "image_url.url", "not base64"),
        ({"type": "image_url", "image_url": {"url": url("image/png", b"")}}, "image_url.url", "image"),
        ({"type": "image_url", "image_url": {"url": url("image/png", png()[:40])}}, "image_url.url", "image"),
        ({"type": "image_url", "image_url": {"url": url("image/png", b"<svg/>")}}, "image_url.url", "no known format"),
        ({"type": "image_url", "image_url": {"url": url("image/png", wav())}}, "image_url.url", "is wav"),
        (
            {"type": "image_url", "image_url": {"url": url("image/jpeg", png())}},
            "image_url.url",
            "declared image/jpeg but is png",
        ),
        ({"type": "input_audio", "input_audio": {"data": "!", "format": "wav"}}, "input_audio.data", "not base64"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, "input_audio.data", "audio"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "exe"}}, "input_audio.format", "Input"),
        (audio_part(wav(seconds=4.5)), "input_audio.data", "limit of 4 s"),
        ({"type": "video_url", "video_url": {"url": url("video/mp4", png())}}, "video_url.url", "is png"),
    ],
)
def test_media(client, part, param, words):
    error = refusal(client, body([{"type": "text", "text": "look"}, part]))
    assert error["param"] == f"messages[0].content[1].{param}"
    assert words in error["message"]


def test_no_more_media_than_allowed(client):
    assert "at most 32" in refusal(client, body([image_part()] * 33))["message"]


def test_what_does_not_fit_the_context_is_refused_with_the_numbers(client):
    error = refusal(client, body("a" * 600))
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded") and "512" in error["message"]
    error = refusal(client, body("a", max_tokens=512))
    assert (error["param"], error["code"]) == ("max_tokens", "context_length_exceeded") and "512" in error["message"]


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"3", b'{"model": NaN}', b"\xff", b'"\\ud800"', b"[" * 100_000])
def test_what_is_no_request(client, data):
    refusal(client, data)


def test_other_models_other_types_other_paths(client):
    error = refusal(client, body(model="gpt"), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    reply = client.post("/v1/chat/completions", content=json.dumps(body()), headers={"content-type": "text/plain"})
    assert reply.status_code == 415 and "application/json" in reply.json()["error"]["message"]
    assert client.get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert client.get("/v1/chat/completions").status_code == 405
    assert client.get("/v1/models/gpt").status_code == 404


def test_a_body_that_is_too_large(locked):
    headers = {"authorization": "Bearer sesame", "content-type": "application/json"}
    for content in (b"x" * 2001, iter([b"x" * 1500, b"x" * 1500])):  # with and without its length announced
        reply = locked.post("/v1/chat/completions", content=content, headers=headers)
        assert reply.status_code == 413 and reply.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize(
    "headers", [{}, {"authorization": "Bearer nope"}, {"authorization": "Bearer "}, {"authorization": "Bearer é"}]
)
def test_a_key_is_asked_for(locked, headers):
    raw = {k: v.encode() for k, v in headers.items()}
    for reply in (locked.get("/v1/models", headers=raw), locked.post("/v1/chat/completions", json=body(), headers=raw)):
        assert reply.status_code == 401 and reply.json()["error"]["type"] == "authentication_error"


def test_health_and_the_page_need_no_key(locked):
    assert locked.get("/health").json()["status"] == "ok"
    assert locked.get("/").status_code == 200
    assert locked.get("/v1/models", headers={"authorization": "Bearer sesame"}).json()["data"][0]["id"] == "tiny"


def test_models_say_what_they_take(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert model["context_window"] == 512 and model["input_modalities"] == ["text", "image", "video", "audio"]
    assert client.get("/v1/models/tiny").json() == model


def test_the_page_uses_nothing_from_elsewhere(client):
    for path in ("/", "/style.css", "/app.js", "/examples.js", "/request.js"):
        reply = client.get(path)
        assert reply.status_code == 200
        assert "http://" not in reply.text.replace("http://www.w3.org/2000/svg", "") and "https://" not in reply.text
        assert reply.headers["content-security-policy"].startswith("default-src 'self'")
    assert client.get("/../api/app.py").status_code == 404
