import json

import pytest

from fourfold.model.transformer import Model
from fourfold.serve.engine import Engine
from fourfold.serve.request import Delta, Finished, Handle, Usage
from tests.api.media import audio_part, image_part, video_part


def body(content="hello", **more):
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 6,
        "temperature": 0,
        **more,
    }


def post(client, sent):
    reply = client.post("/v1/chat/completions", json=sent)
    assert reply.status_code == 200, reply.text
    return reply.json()


def events(client, sent):
    """The JSON objects of a stream; checks its form."""
    with client.stream("POST", "/v1/chat/completions", json={**sent, "stream": True}) as reply:
        assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream")
        blocks = "".join(reply.iter_text()).split("\n\n")
    assert blocks.pop() == "" and blocks.pop() == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks if not block.startswith(":")]


def test_the_shape_of_an_answer(client):
    reply = post(client, body())
    assert reply["object"] == "chat.completion" and reply["model"] == "tiny" and reply["id"].startswith("chatcmpl-")
    (choice,) = reply["choices"]
    assert choice["index"] == 0 and choice["finish_reason"] in ("stop", "length")
    assert choice["message"]["role"] == "assistant" and isinstance(choice["message"]["content"], str)
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens"] == usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_cache_hit_tokens"]
    assert usage["prompt_tokens_details"]["text_tokens"] == usage["prompt_tokens"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 0}


def test_a_stream_says_the_same_as_a_whole_answer(client):
    for options in ({}, {"thinking": {"type": "enabled"}, "max_tokens": 20}, {"temperature": 1, "seed": 4}):
        sent = body("tell me", **options)
        message = post(client, sent)["choices"][0]["message"]
        chunks = events(client, sent)
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert {c["object"] for c in chunks} == {"chat.completion.chunk"} and len({c["id"] for c in chunks}) == 1
        deltas = [c["choices"][0]["delta"] for c in chunks]
        assert "".join(d.get("content", "") for d in deltas) == message["content"]
        assert "".join(d.get("reasoning_content", "") for d in deltas) == message.get("reasoning_content", "")
        reasons = [c["choices"][0]["finish_reason"] for c in chunks]
        assert reasons[:-1] == [None] * (len(reasons) - 1) and reasons[-1] in ("stop", "length")
        assert all("usage" not in c for c in chunks)


def test_usage_comes_with_the_last_chunk_if_asked_for(client):
    chunks = events(client, body(stream_options={"include_usage": True}))
    assert all(c["usage"] is None for c in chunks[:-1])
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 0


def test_every_medium_is_counted(client):
    parts = [image_part(), audio_part(), video_part(), {"type": "text", "text": "what is it?"}]
    usage = post(client, body(parts))["usage"]
    details = usage["prompt_tokens_details"]
    assert all(details[f"{kind}_tokens"] > 3 for kind in ("image", "audio", "video", "text"))
    assert sum(details[f"{kind}_tokens"] for kind in ("image", "audio", "video", "text")) == usage["prompt_tokens"]


def test_the_second_time_the_prompt_comes_from_the_cache_unless_users_differ(client):
    sent = body([image_part(), {"type": "text", "text": "what is this picture of? " * 4}])
    first, second = post(client, sent), post(client, sent)
    assert first["usage"]["prompt_cache_hit_tokens"] == 0
    assert second["usage"]["prompt_cache_hit_tokens"] == (second["usage"]["prompt_tokens"] - 1) // 16 * 16 > 0
    assert first["choices"] == second["choices"]
    for isolated in ({"user": "ann"}, {"user_id": "ann"}, {"cache_salt": "ann"}):
        assert post(client, {**sent, **isolated})["usage"]["prompt_cache_hit_tokens"] == 0
        assert post(client, {**sent, **isolated})["usage"]["prompt_cache_hit_tokens"] > 0


def test_one_seed_one_answer(client):
    sent = body(temperature=1.5, seed=11, max_tokens=20)
    assert post(client, sent)["choices"] == post(client, sent)["choices"]
    others = {post(client, {**sent, "seed": s})["choices"][0]["message"]["content"] for s in range(5)}
    assert len(others) > 1


def test_thinking_by_either_name(client):
    for option in ({"thinking": {"type": "enabled"}}, {"reasoning_effort": "low"}):
        reply = post(client, body(max_tokens=30, temperature=1, seed=1, **option))
        assert reply["choices"][0]["message"]["reasoning_content"]
        assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    for option in ({"thinking": {"type": "disabled"}}, {"reasoning_effort": "none"}):
        reply = post(client, body(**option))
        assert "reasoning_content" not in reply["choices"][0]["message"]


def test_minimal_effort_is_a_budget(client):
    reply = post(client, body(max_tokens=200, temperature=1, seed=1, reasoning_effort="minimal"))
    assert 0 < reply["usage"]["completion_tokens_details"]["reasoning_tokens"] <= 65


def test_fields_that_ask_for_nothing_are_accepted(client):
    neutral = {
        "n": 1, "logprobs": False, "top_logprobs": 0, "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0,
        "parallel_tool_calls": True, "response_format": {"type": "text"}, "modalities": ["text"], "store": False,
        "service_tier": "auto", "stop": None, "tools": None, "tool_choice": "none", "user": None,
        "top_p": 1, "top_k": 0,
    }  # fmt: skip
    assert post(client, body(**neutral))["choices"] == post(client, body())["choices"]


def test_whole_conversations_are_accepted(client):
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be brief"}]},
        {"role": "user", "content": [image_part(), {"type": "text", "text": "add"}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "thanks"},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    used = post(client, {**body(), "messages": messages, "tools": tools})["usage"]["prompt_tokens"]
    sent = {**body(), "messages": messages, "tools": tools, "tool_choice": "none"}
    unused = post(client, sent)["usage"]["prompt_tokens"]
    assert used > unused  # without tools neither their schemas nor old reasoning are in the prompt


@pytest.fixture
def scripted(monkeypatch):
    """The engine answers with these events, whatever is asked."""

    def script(*events):
        def submit(self, request):
            handle = Handle()
            for event in events:
                handle.put(event)
            return handle

        monkeypatch.setattr(Engine, "submit", submit)

    return script


CALLS = [Delta("tool_call", f'{{"name": "add", "arguments": {{"a": {n}}}}}') for n in (1, 2)]
END = Finished("tool_calls", Usage(3, 2, 0, 0, 3, 0, 0, 0))


def test_tool_calls(client, scripted):
    scripted(*CALLS, END)
    choice = post(client, body())["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert [c["function"] for c in choice["message"]["tool_calls"]] == [
        {"name": "add", "arguments": '{"a":1}'},
        {"name": "add", "arguments": '{"a":2}'},
    ]
    assert len({c["id"] for c in choice["message"]["tool_calls"]}) == 2


def test_tool_calls_in_a_stream(client, scripted):
    scripted(Delta("content", "well"), *CALLS, END)
    chunks = [c["choices"][0] for c in events(client, body())]
    calls = [call for c in chunks for call in c["delta"].get("tool_calls", ())]
    assert [c["index"] for c in calls] == [0, 1] and all(c["type"] == "function" and c["id"] for c in calls)
    assert chunks[-1]["finish_reason"] == "tool_calls"


def test_a_failure_after_the_start_is_said_in_the_stream_and_by_status_otherwise(client, engine, monkeypatch):
    def broken(self, *_, **__):
        raise RuntimeError("a wire came loose")

    monkeypatch.setattr(Model, "forward", broken)
    reply = client.post("/v1/chat/completions", json=body("anything new"))
    assert reply.status_code == 503 and reply.json()["error"]["type"] == "server_error"
    with client.stream("POST", "/v1/chat/completions", json=body("anything new", stream=True)) as stream:
        blocks = "".join(stream.iter_text()).split("\n\n")
    assert json.loads(blocks[-2].removeprefix("data: "))["error"]["code"] == "engine_error"
    monkeypatch.undo()
    post(client, body("anything new"))
