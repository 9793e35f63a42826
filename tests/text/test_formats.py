"""Which format a directory speaks."""

import json
import shutil

import pytest

from fourfold.text.chat import ChatError, Message
from fourfold.text.chat_dsml import DsmlChat
from fourfold.text.chat_jinja import JinjaChat
from fourfold.text.dsml import V4, V41
from fourfold.text.formats import NativeChat, NoChat, default_chat, load_chat, make_chat
from fourfold.text.stream import StreamParser
from fourfold.text.tokenizer import train_tokenizer

from . import released, templates
from .conftest import CORPUS
from .released import BOS, EOS, ids, read, small, v4_files, v4_tokenizer

HELLO = [Message("user", "hello")]


def write(directory, **files):
    """config={...} becomes config.json; text stays text."""
    for name, content in files.items():
        if isinstance(content, str):
            (directory / f"{name}.jinja").write_text(content)
        else:
            (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def test_the_native_tokens_mean_the_native_format(tmp_path):
    tokenizer = train_tokenizer(CORPUS, 440)
    write(tmp_path, config={"model_type": "deepseek_v4"}, tokenizer_config={"chat_template": "x"})
    chat = load_chat(tmp_path, "deepseek_v4", tokenizer)
    assert isinstance(chat, NativeChat) and isinstance(default_chat(tokenizer), NativeChat)
    assert chat.stops == {1} and chat.bos == 0 and chat.end_of_thinking == 8
    assert read(chat.encode(HELLO, thinking=True), tokenizer) == "<|bos|><|user|>hello<|assistant|><think>"
    assert read(chat.continue_text("fox"), tokenizer) == "<|bos|>fox"
    assert [chat.budget(effort) for effort in ("minimal", "high", "max", None, 7)] == [64, 4096, None, None, None]
    with pytest.raises(ChatError, match="response_format"):
        chat.encode(HELLO, response_format={})


@pytest.mark.parametrize(
    ("channel", "tools", "names"),
    [
        ("reasoning", False, {"<|eos|>", "</think>"}),
        ("reasoning", True, {"<|eos|>", "</think>"}),
        ("content", False, {"<|eos|>"}),
        ("content", True, {"<|eos|>", "<tool_call>"}),
        ("tool_call", True, {"</tool_call>"}),
    ],
)
def test_what_the_native_format_allows(channel, tools, names):
    tokenizer = train_tokenizer(CORPUS, 440)
    allowed = NativeChat(tokenizer).allowed(channel, tools)
    assert {tokenizer.mark(i) for i in allowed} == names


@pytest.mark.parametrize(
    ("kind", "marks", "dialect"),
    [("deepseek_v4", released.V4, V4), ("deepseek_v41", released.V41, V41), ("deepseek_v41_text", released.V41, V41)],
)
def test_v4_and_v41_go_by_their_model_type(tmp_path, kind, marks, dialect):
    write(tmp_path, config={"model_type": kind, "eos_token_id": 1})
    for said in (kind, None):
        chat = load_chat(tmp_path, said, small(marks))
        assert isinstance(chat, DsmlChat) and chat.dialect == dialect
        assert (chat.bos, chat.stops) == (0, {1})
    assert read(chat.continue_text("fox"), chat.tokenizer) == f"{BOS}fox"


def test_the_real_files_of_v4(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(v4_files() / name, tmp_path / name)
    write(tmp_path, config={"model_type": "deepseek_v4"}, generation_config={"eos_token_id": 1, "bos_token_id": 0})
    chat = load_chat(tmp_path, None, v4_tokenizer())
    assert isinstance(chat, DsmlChat) and ids(chat.encode(HELLO))[0] == 0


def test_v4_with_a_foreign_tokenizer_has_no_v4_format(tmp_path):
    write(tmp_path, config={"model_type": "deepseek_v4"})
    assert isinstance(load_chat(tmp_path, None, small(released.QWEN)), NoChat)


def test_a_template_and_its_special_tokens(tmp_path):
    about = {"bos_token": {"content": BOS, "__type": "AddedToken"}, "eos_token": EOS, "chat_template": templates.V31}
    chat = load_chat(write(tmp_path, tokenizer_config=about), "deepseek_v3", small(released.V3))
    assert isinstance(chat, JinjaChat) and (chat.bos, chat.stops) == (0, {1})
    assert read(chat.encode(HELLO), chat.tokenizer) == f"{BOS}<｜User｜>hello<｜Assistant｜></think>"
    assert chat.budget("low") is None

    write(tmp_path, chat_template="{{ eos_token + messages[0].content }}")  # a file of its own counts more
    chat = load_chat(tmp_path, "deepseek_v3", small(released.V3))
    assert read(chat.encode(HELLO), chat.tokenizer) == f"{EOS}hello"


def test_named_templates(tmp_path):
    listed = [{"name": "default", "template": "{{ 'a' }}"}, {"name": "tool_use", "template": "{{ 'b' }}"}, {"name": 3}]
    chat = load_chat(write(tmp_path, tokenizer_config={"chat_template": listed}), None, small(released.QWEN))
    assert read(chat.encode(HELLO), chat.tokenizer) == "a"
    write(tmp_path, tokenizer_config={"chat_template": listed[1:]})
    with pytest.raises(ChatError, match="default.*tool_use"):
        load_chat(tmp_path, None, small(released.QWEN))


def test_every_id_that_ends_an_answer_counts(tmp_path):
    tokenizer = small(released.QWEN)
    write(
        tmp_path,
        config={"eos_token_id": 0, "bos_token_id": 0},
        generation_config={"eos_token_id": [2, 0, 99_999]},
        tokenizer_config={"eos_token": "<|im_end|>", "bos_token": None, "chat_template": templates.QWEN},
    )
    chat = load_chat(tmp_path, "qwen2", tokenizer)
    assert chat.stops == {0, 2}
    assert chat.bos is None and read(chat.continue_text("fox"), tokenizer) == "fox"  # a null is a no


def test_names_from_ids_where_nothing_names_them(tmp_path):
    write(tmp_path, config={"text_config": {"eos_token_id": 1}}, generation_config={"bos_token_id": 0})
    write(tmp_path, chat_template="{{ bos_token + messages[0].content + eos_token }}")
    chat = load_chat(tmp_path, "llama", small(released.V3))
    assert (chat.bos, chat.stops) == (0, {1})
    assert read(chat.encode(HELLO), chat.tokenizer) == f"{BOS}hello{EOS}"


def test_a_model_without_a_template_continues_text_and_refuses_to_chat(tmp_path):
    write(tmp_path, config={"eos_token_id": 1, "bos_token_id": 0})
    tokenizer = small(released.V3)
    chat = load_chat(tmp_path, "llama", tokenizer)
    assert isinstance(chat, NoChat)
    with pytest.raises(ChatError, match="no chat template"):
        chat.encode(HELLO)
    assert ids(chat.continue_text("fox")) == [0, *tokenizer.encode("fox")]
    assert isinstance(chat.parser(True, True), StreamParser) and chat.parser(True).channel == "content"
    assert chat.allowed("content", True) == {1}
    assert isinstance(default_chat(tokenizer), NoChat)


def test_make_chat_from_parts():
    tokenizer = small(released.V3)
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": None}
    chat = make_chat(tokenizer, {"default": "{{ bos_token }}{{ pad_token }}{{ messages[0].content }}"}, names, [1])
    assert read(chat.encode(HELLO), tokenizer) == f"{BOS}hello" and chat.bos == 0
    assert make_chat(tokenizer, {}, names, [1], add_bos=False).bos is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("generation_config.json", "\x80"),
        ("tokenizer_config.json", "[" * 100_000),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}'),
        ("chat_template.jinja", "{{"),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ChatError, match=name.split(".")[0] if "%" not in content else "chat_template"):
        load_chat(tmp_path, "llama", small(released.V3))


def test_a_model_converted_to_our_format_still_speaks_its_own(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "fourfold"}))
    assert isinstance(load_chat(tmp_path, None, small(released.V4)), DsmlChat)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v32"}))
    assert isinstance(load_chat(tmp_path, None, small(released.V4)), NoChat)  # its tokens, but not its rules
