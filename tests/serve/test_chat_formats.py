"""The engine, the server and ``LocalModel`` in the chat formats of released models."""

import json

import pytest
import torch
from fastapi.testclient import TestClient

from fourfold.api.app import create_app
from fourfold.config import ModelConfig
from fourfold.serve.engine import Engine
from fourfold.serve.local import LocalModel
from fourfold.serve.request import Delta, Finished, Request, Sampling
from fourfold.text.chat import ChatError, Message
from fourfold.text.chat_dsml import DsmlChat
from fourfold.text.chat_jinja import JinjaChat
from fourfold.text.dsml import V4, V41
from fourfold.text.formats import NoChat
from fourfold.weights.checkpoint import save_model
from tests.serve.tiny import TINY, Scripted
from tests.text import released, templates
from tests.text.released import BOS, EOS, read, small, tokens

CONFIG = ModelConfig.from_dict(TINY).replace(**{"vocab_size": 520, "max_position_embeddings": 2048})
TEXT_ONLY = CONFIG.replace(**{"media.image": None, "media.video": None, "media.audio": None})
NAMES = {"bos_token": BOS, "eos_token": EOS}
CHATS = {
    "V4": DsmlChat(small(released.V4), [], V4),
    "V4.1": DsmlChat(small(released.V41), [], V41),
    "V3.1": JinjaChat(small(released.V3), 0, [1], {"default": templates.V31}, NAMES),
    "R1": JinjaChat(small(released.V3), 0, [1], {"default": templates.R1}, NAMES),
    "Qwen2": JinjaChat(small(released.QWEN), None, [0, 2], {"default": templates.QWEN}, {}),
    "none": NoChat(small(released.V3), 0, [1]),
}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALLS = {
    "V4": '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="add">\n<｜DSML｜parameter name="a" string="false">1'
    "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>" + EOS,
    "V4.1": '\n\n<｜DSML｜ calls>\n<｜DSML｜ invoke name="add">\n<｜DSML｜ parameter name="a" string="false">1'
    "</｜DSML｜ parameter>\n</｜DSML｜ invoke>\n</｜DSML｜ calls>" + EOS,
    "V3.1": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1}'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>" + EOS,
    "Qwen2": '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>',
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Scripted(TEXT_ONLY)


@pytest.fixture
def say(model):
    """Lets the model say a text in which names of special tokens mean these; an int is an id."""

    def run(name, *script, thinking=False, tools=False, max_tokens=200, **options):
        chat = CHATS[name]
        model.script = sum(([s] if isinstance(s, int) else tokens(chat.tokenizer, s) for s in script), [])
        with Engine(model, chat.tokenizer, chat, page_size=16) as engine:
            prompt = engine.encode([Message("user", "go")], [TOOL] if tools else None, thinking)
            model.prompt = len(prompt)
            wanted = Request(prompt, Sampling(0.0), max_tokens, (), thinking, tools=tools, **options)
            *deltas, finished = engine.submit(wanted)
        assert isinstance(finished, Finished) and all(isinstance(d, Delta) for d in deltas)
        kinds = {kind: "".join(d.text for d in deltas if d.kind == kind) for kind in {d.kind for d in deltas}}
        return kinds, finished

    return run


@pytest.mark.parametrize("name", CALLS)
def test_a_tool_call(say, name):
    kinds, finished = say(name, "so", CALLS[name], tools=True)
    assert finished.reason == "tool_calls" and kinds["content"] == "so"
    assert json.loads(kinds["tool_call"]) == {"name": "add", "arguments": {"a": 1}}


@pytest.mark.parametrize("name", ["V4", "V4.1", "V3.1", "R1"])
def test_reasoning_and_its_budget(say, name):
    kinds, finished = say(name, f"why</think>so{EOS}", thinking=True)
    assert kinds == {"reasoning": "why", "content": "so"} and finished.reason == "stop"
    kinds, finished = say(name, f"1234567{EOS}", thinking=True, thinking_budget=3)
    assert kinds == {"reasoning": "123", "content": "567"}  # the fourth token was replaced
    assert finished.usage.reasoning_tokens == 4


def test_r1_thinks_whether_it_is_asked_to_or_not(say):
    assert say("R1", f"why</think>so{EOS}", thinking=False)[0] == {"reasoning": "why", "content": "so"}


def test_a_model_that_cannot_think_answers_at_once(say):
    assert say("Qwen2", "so<|im_end|>", thinking=True, thinking_budget=1)[0] == {"content": "so"}


def test_every_stop_id_ends_the_answer(say):
    for end in ("<|im_end|>", "<|endoftext|>"):
        kinds, finished = say("Qwen2", f"so{end}more")
        assert kinds == {"content": "so"} and finished.reason == "stop"


@pytest.mark.parametrize("name", ["V4", "V3.1", "Qwen2"])
def test_marks_out_of_place_and_rows_without_a_token_are_never_said(say, name):
    """All else is equally likely, so the first id that is allowed comes instead: a stop."""
    tokenizer = CHATS[name].tokenizer
    banned = set(tokenizer.marks.values()) - CHATS[name].allowed("content", False)
    for id in [*banned, tokenizer.vocab_size, CONFIG.vocab_size - 1]:
        kinds, finished = say(name, id, "x", "x", max_tokens=3)
        assert kinds == {} and finished.reason == "stop" and finished.usage.completion_tokens == 1
    assert say(name, "xxx", max_tokens=3)[0] == {"content": "xxx"}


def test_without_tools_no_call_begins(say):
    kinds, _ = say("V4", "so\n\n<", "｜DSML｜", "tool_calls>", EOS)
    assert "tool_call" not in kinds and kinds["content"].startswith("so\n\n<")


def test_a_model_without_a_chat_format_continues_text(model):
    chat = CHATS["none"]
    model.script, model.prompt = tokens(chat.tokenizer, f" jumps{EOS}"), 1 + len(chat.tokenizer.encode("the fox"))
    local = LocalModel(model, chat.tokenizer, chat=chat)
    try:
        assert local.chat is local.engine.chat is chat
        assert local.complete("the fox", max_tokens=20) == " jumps"
        with pytest.raises(ChatError, match="no chat template"):
            local.generate("the fox")
    finally:
        local.close()


def test_a_directory_brings_its_chat_format(tmp_path, model):
    tokenizer = small(released.V3)
    save_model(tmp_path / "model", model, tokenizer)
    about = {**NAMES, "chat_template": templates.V31}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(about))
    chat = LocalModel.load(tmp_path / "model").chat
    assert isinstance(chat, JinjaChat) and chat.stops == {1}
    assert read(chat.encode([Message("user", "hi")]), chat.tokenizer) == f"{BOS}<｜User｜>hi<｜Assistant｜></think>"


def post(chat, model, script, **body):
    """The reply of a server to one user message."""
    with Engine(model, chat.tokenizer, chat, page_size=16) as engine:
        with TestClient(create_app(engine, "tiny")) as client:
            sent = {"model": "tiny", "messages": [{"role": "user", "content": "go"}], "temperature": 0, **body}
            tools = body.get("tools")
            thinking = body.get("reasoning_effort") is not None
            try:
                prompt = engine.encode([Message("user", "go")], tools, thinking, body.get("reasoning_effort"))
                model.prompt = len(prompt)
            except ChatError:
                pass
            model.script = tokens(chat.tokenizer, script)
            return client.post("/v1/chat/completions", json=sent)


def test_the_server_speaks_v4(model):
    reply = post(CHATS["V4"], model, CALLS["V4"], tools=[TOOL], max_tokens=300).json()["choices"][0]
    assert reply["finish_reason"] == "tool_calls" and reply["message"]["content"] is None
    assert reply["message"]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a":1}'}


@pytest.mark.parametrize("name", ["V4", "V4.1"])
def test_the_effort_goes_into_the_prompt_of_v4_and_is_no_budget(model, name):
    long = "1" * 80 + f"</think>so{EOS}"
    used = {}
    for effort in ("minimal", "max"):
        reply = post(CHATS[name], model, long, reasoning_effort=effort, max_tokens=200).json()
        assert reply["choices"][0]["message"]["reasoning_content"] == "1" * 80
        used[effort] = reply["usage"]["prompt_tokens"]
    assert used["max"] != used["minimal"]


def test_what_a_format_cannot_say_is_a_bad_request(model):
    reply = post(CHATS["none"], model, "x")
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "messages"
    plain = JinjaChat(small(released.V3), 0, [1], {"default": templates.V2}, NAMES)
    reply = post(plain, model, "x", tools=[TOOL])
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "tools"
