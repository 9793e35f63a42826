"""A prefix outlives the server that computed it, and the bill says so."""

import signal

import httpx


def ask(server, user):
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "the quick brown fox jumps over the lazy dog " * 6}],
        "max_tokens": 8,
        "temperature": 0,
        "user_id": user,
    }
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    return answer["choices"][0]["message"]["content"], answer["usage"]


def test_a_prefix_survives_a_restart_for_its_user_alone(start, tmp_path):
    options = ("--memory", "100MiB", "--context-cache", str(tmp_path / "cache"), "--context-cache-size", "10MB")
    first = start(*options)
    cold, usage = ask(first, "ann")
    assert usage["prompt_cache_hit_tokens"] == 0
    first.stop()

    second = start(*options)
    warm, usage = ask(second, "ann")
    assert warm == cold
    assert usage["prompt_cache_hit_tokens"] == (usage["prompt_tokens"] - 1) // 16 * 16
    assert usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"]
    assert ask(second, "bob")[1]["prompt_cache_hit_tokens"] == 0
    health = httpx.get(f"{second.url}/health").json()
    assert health["disk_pages"] > 0 and health["disk_bytes"] <= 10**7
    second.process.send_signal(signal.SIGKILL)  # what is on disk is whole at any moment
    second.process.wait(20)

    third = start(*options)
    again, usage = ask(third, "ann")
    assert again == cold and usage["prompt_cache_hit_tokens"] > 0
