"""The official client against the real server."""

import contextlib
import json
import select
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import httpx
import openai
import pytest

from tests.api.media import audio_part, image_part, video_part


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def ask(client, content="hello", **options):
    return client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": content}], **{"max_tokens": 8, "temperature": 0, **options}
    )


def idle(server, seconds=10):
    """Whether the engine runs out of work within some seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        health = httpx.get(f"{server.url}/health").json()
        if not health["running"] and not health["waiting"]:
            return True
        time.sleep(0.02)
    return False


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "tiny" and "audio" in model.input_modalities
    assert client.models.retrieve("tiny").id == "tiny"


def test_whole_and_streamed(client):
    reply = ask(client, max_tokens=20)
    assert reply.choices[0].finish_reason in ("stop", "length")
    chunks = list(ask(client, max_tokens=20, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == reply.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == reply.usage.completion_tokens
    assert chunks[-1].usage.total_tokens == reply.usage.total_tokens


@pytest.mark.parametrize("make, kind", [(image_part, "image"), (audio_part, "audio"), (video_part, "video")])
def test_media_are_seen_and_counted(client, make, kind):
    plain = ask(client, [{"type": "text", "text": "what is it?"}]).usage
    reply = ask(client, [make(), {"type": "text", "text": "what is it?"}]).usage
    seen = reply.prompt_tokens_details.model_dump()[f"{kind}_tokens"]
    assert seen > 3 and reply.prompt_tokens == plain.prompt_tokens + seen


def test_thinking(client):
    options = {"temperature": 1, "seed": 1, "max_tokens": 30, "reasoning_effort": "low"}
    message = ask(client, **options).choices[0].message
    assert message.reasoning_content
    deltas = [c.choices[0].delta for c in ask(client, stream=True, **options)]
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == message.reasoning_content


def test_the_second_identical_request_hits_the_cache(client):
    content = [image_part(), {"type": "text", "text": "what is this picture of, and why? " * 4}]
    first, second = ask(client, content, user="ann"), ask(client, content, user="ann")
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    hit = second.usage.prompt_tokens_details.cached_tokens
    assert hit == second.usage.prompt_cache_hit_tokens == (second.usage.prompt_tokens - 1) // 16 * 16 > 0
    assert second.usage.prompt_cache_miss_tokens == second.usage.prompt_tokens - hit
    assert first.choices[0].message.content == second.choices[0].message.content


def test_errors_become_the_clients_exceptions(client):
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, temperature=3)
    assert error.value.param == "temperature" and "2" in error.value.body["message"]
    with pytest.raises(openai.BadRequestError, match="Unknown field: colour"):
        ask(client, extra_body={"colour": "red"})
    with pytest.raises(openai.BadRequestError, match="fetching URLs is off"):
        ask(client, [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}])
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, max_tokens=100_000)
    assert error.value.code == "context_length_exceeded"


def test_a_body_over_the_limit(server):
    """Refused by its announced length, before it is sent."""
    with contextlib.closing(HTTPConnection(server.url.removeprefix("http://"), timeout=10)) as connection:
        connection.putrequest("POST", "/v1/chat/completions")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(49 << 20))
        connection.endheaders()
        reply = connection.getresponse()
        assert reply.status == 413 and json.loads(reply.read())["error"]["code"] == "request_too_large"


def test_many_clients_at_once_get_what_each_would_get_alone(client, server):
    questions = ["a", "tell me of the fox", "jumps over the lazy dog " * 6, "again?"]
    contents = [*questions, [image_part(), {"type": "text", "text": "?"}], [video_part(), audio_part()]]
    alone = [ask(client, c, max_tokens=16, user="alone").choices[0].message.content for c in contents]
    with ThreadPoolExecutor(12) as pool:
        jobs = [
            pool.submit(lambda c: ask(client, c, max_tokens=16, user="together").choices[0].message.content, c)
            for c in contents * 3
        ]
        together = [job.result() for job in jobs]
    assert together == alone * 3
    assert idle(server)


def test_leaving_a_stream_stops_the_work(client, server):
    stream = ask(client, max_tokens=450, temperature=1, seed=2, stream=True)
    next(iter(stream))
    assert not idle(server, 0.05)
    stream.close()
    assert idle(server, 1.0)


def test_hanging_up_on_a_whole_answer_stops_the_work(server):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 450, "seed": 2}
    with contextlib.closing(HTTPConnection(server.url.removeprefix("http://"), timeout=10)) as connection:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        while idle(server, 0.01):
            assert not select.select([connection.sock], [], [], 0)[0], "it was answered before anybody hung up"
    assert idle(server, 1.0)


def test_a_key(start):
    server = start("--api-key", "sesame")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="sesame", max_retries=0) as client:
        assert ask(client).choices
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="guess", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            ask(client)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_answer_under_way_finish(start, how):
    server = start()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = iter(ask(client, max_tokens=100, temperature=1, seed=2, stream=True))
        next(stream)
        server.process.send_signal(how)
        assert list(stream)[-1].choices[0].finish_reason in ("stop", "length")
    assert server.process.wait(10) == 0
