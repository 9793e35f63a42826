"""Directories in and out of transformers: config, tensors, tokenizer and chat template; nano exported."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fourfold.fields import ConfigError
from fourfold.model.sequence import Document
from fourfold.serve.local import LocalModel
from fourfold.text.chat import Message, Text, ToolCall, encode_chat
from fourfold.text.tokenizer import Tokenizer, TokenizerError, train_tokenizer
from fourfold.weights.checkpoint import CheckpointError, load_model, resolve, save_model
from fourfold.weights.hf import FourfoldConfig, FourfoldForCausalLM, export_hf, hf_tokenizer
from tests.model import tiny
from tests.weights.test_hf import KINDS, PAD, SPARSE, wrapped


def test_config_round_trip(tmp_path: Path) -> None:
    config = FourfoldConfig.of(tiny.config(**SPARSE), pad_token_id=PAD)
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.num_experts) == (
        24,
        4,
        4,
        8,
    )
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, FourfoldConfig) and again.native == config.native == tiny.config(**SPARSE)
    assert again.pad_token_id == PAD and again.get_text_config() is again
    assert "past_key_values" in again.keys_to_ignore_at_inference + ["loss"]  # as Trainer joins them
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(again)
    assert float(made.model.lm_head.weight.detach().std()) == pytest.approx(0.15, rel=0.1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": -1}, "hidden_size: must be > 0"),
        ({"hidden_size": "wide"}, "hidden_size: must be of type int"),
        ({"attention": {"kind": "fast"}}, "attention.kind: is 'fast'"),
        ({"moe": {"n_expert": 3}}, "moe.n_expert: is not a field"),
    ],
)
def test_a_wrong_config_is_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    FourfoldConfig.of(tiny.config()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=named):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_save_and_load(tmp_path: Path, kind: str) -> None:
    model = wrapped(kind)
    for name, buffer in model.named_buffers():
        if name.endswith("gate.bias"):
            buffer.uniform_(-0.2, 0.2)
        elif name.endswith("compression.ids"):
            buffer.copy_(torch.randperm(len(buffer)) % 20)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.generation_config.eos_token_id == 1
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    again.save_pretrained(tmp_path / "again", state_dict=again.state_dict(), max_shard_size=20_000)
    shards = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(shards) == {name.removeprefix("model.") for name in state}
    assert FourfoldForCausalLM.from_pretrained(tmp_path / "again").state_dict().keys() == state.keys()


@torch.no_grad()
def test_narrow_types_leave_the_buffers_alone(tmp_path: Path) -> None:
    wrapped("sparse").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    buffers = {name.rsplit(".", 2)[-2:][0] + "." + name.rsplit(".")[-1]: b.dtype for name, b in model.named_buffers()}
    assert buffers == {"gate.bias": torch.float32, "compression.ids": torch.int64}


def test_incomplete_directories_are_refused(tmp_path: Path) -> None:
    model = wrapped("plain")
    state = model.state_dict()
    del state["model.norm.weight"]
    state["model.extra.weight"] = torch.ones(2)
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match="norm.weight is missing; .*extra.weight is not part"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(['the quick brown fox jumps over the lazy dog, twice: {"name": 1}'] * 3, 300)


def test_a_native_directory_loads_as_it_is(tmp_path: Path, tokenizer: Tokenizer) -> None:
    made = tiny.model(tiny.config(vocab_size=310))
    save_model(tmp_path, made, tokenizer)
    model = FourfoldForCausalLM.from_pretrained(tmp_path)
    ids = tokenizer.encode("the quick dog")
    with torch.no_grad():
        got = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(got, tiny.logits(made, Document.text(ids)), atol=1e-6, rtol=0)


def test_what_transformers_saves_is_a_native_directory(tmp_path: Path, tokenizer: Tokenizer) -> None:
    cfg = tiny.config(**SPARSE, vocab_size=310)
    export_hf((tiny.model(cfg), tokenizer), tmp_path / "first")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    model.config.use_cache = False
    model.save_pretrained(tmp_path / "second", max_shard_size=50_000)
    AutoTokenizer.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    made, own = load_model(tmp_path / "second")
    state = model.state_dict()
    assert made.cfg == cfg
    assert all(torch.equal(tensor, state[f"model.{name}"]) for name, tensor in made.state_dict().items())
    assert own.encode("the quick <|eos|> dog") == tokenizer.encode("the quick <|eos|> dog")


@torch.no_grad()
def test_the_bundled_model_exported(tmp_path: Path) -> None:
    made, own = load_model(resolve("nano"))
    export_hf("nano", tmp_path / "nano")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "nano")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "nano")
    texts = ["The tower of Babel", "In 1984 there were two kings; one of them"]
    batch = theirs(texts, padding=True, return_tensors="pt")
    logits = model(**batch).logits
    encoded = [own.encode(text) for text in texts]
    packed = tiny.logits(made, *map(Document.text, encoded))
    for row, (ids, wanted) in enumerate(zip(encoded, packed.split([len(ids) for ids in encoded]), strict=True)):
        assert batch["input_ids"][row, -len(ids) :].tolist() == ids
        assert (logits[row, -len(ids) :] - wanted).abs().max() <= 1e-5
    assert model.generation_config.pad_token_id == PAD
    assert Tokenizer.load(tmp_path / "nano" / "tokenizer.json").encode(texts[1]) == own.encode(texts[1])


def test_the_exported_model_says_what_the_engine_says(tmp_path: Path) -> None:
    ours = LocalModel.load("nano")
    export_hf((ours.model, ours.tokenizer), tmp_path / "nano")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "nano")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "nano")
    questions = ["What is the capital of France?", "Count to three."]
    chats = [[{"role": "user", "content": question}] for question in questions]
    options: dict[str, Any] = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt"}
    batch = theirs.apply_chat_template(chats, **options)
    said = model.generate(**batch, max_new_tokens=30, do_sample=False)[:, batch["input_ids"].shape[1] :]
    try:
        answers = [ours.generate(question, max_tokens=30) for question in questions]
    finally:
        ours.close()
    assert theirs.batch_decode(said, skip_special_tokens=True) == answers


def test_export_needs_the_native_special_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    description = json.loads(tokenizer.backend.to_str())
    description["added_tokens"] = description["added_tokens"][3:]
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(TokenizerError, match="bos"):
        export_hf(
            (tiny.model(tiny.config(vocab_size=310)), Tokenizer.load(tmp_path / "tokenizer.json")), tmp_path / "x"
        )
    assert not (tmp_path / "x").exists()


# -- chat template

WORDS = [
    "",
    "the fox",
    "  two\n\nlines \n",
    '{"a": [1, 2]}',
    "ü 北京 🦊",
    "<b>&amp;</b>",
    "{{ x }} {% if %}",
    "the <|eos|> of",
]
TOOLS = [
    {"type": "function", "function": {"name": "look", "description": "Sees <é>", "parameters": {"type": "object"}}},
    {"name": "bare", "parameters": {}},
]


def conversation(rng: random.Random) -> list[Message]:
    messages = [Message("system", rng.choice(WORDS))] if rng.random() < 0.5 else []
    for turn in range(rng.randint(1, 3)):
        messages.append(Message("user", rng.choice(WORDS)))
        if turn and rng.random() < 0.3:
            continue
        calls = [
            ToolCall(f"call_{turn}_{n}", rng.choice(["look", 'q"uote']), '{"at":"ß <x>","n":[1,2.5,null]}')
            for n in range(rng.choice([0, 0, 1, 3]))
        ]
        messages.append(Message("assistant", rng.choice(WORDS), rng.choice([None, "", "because\n"]), calls))
        results = [Message("tool", f"result {call.id}", tool_call_id=call.id) for call in calls]
        if calls and rng.random() < 0.5:
            results.append(Message("tool", "of no call", tool_call_id="other"))
        rng.shuffle(results)
        messages += results
    return messages


def as_dict(message: Message, decoded: bool) -> dict[str, Any]:
    calls = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": json.loads(call.arguments) if decoded else call.arguments},
        }
        for call in message.tool_calls
    ]
    return {
        "role": message.role,
        "content": [{"type": "text", "text": message.content}] if decoded else message.content,
        "reasoning_content": message.reasoning,
        "tool_calls": calls or None,
        "tool_call_id": message.tool_call_id,
    }


@pytest.mark.parametrize("seed", range(40))
def test_the_chat_template_gives_the_native_tokens(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    messages, tools = conversation(rng), rng.choice([None, TOOLS])
    thinking, prompt = rng.random() < 0.5, rng.random() < 0.5
    pieces = [p for p in encode_chat(messages, tokenizer, tools, thinking, prompt) if isinstance(p, Text)]
    theirs = hf_tokenizer(tokenizer)
    dicts = [as_dict(message, decoded=rng.random() < 0.5) for message in messages]
    options: dict[str, Any] = {"tools": tools, "thinking": thinking, "add_generation_prompt": prompt}
    safe = theirs.apply_chat_template(dicts, **options, sanitize_control_tokens=True)
    assert safe["input_ids"] == [id for piece in pieces for id in piece.ids]
    if not any("<|eos|>" in str(message.content) for message in messages):
        got = theirs.apply_chat_template(dicts, **options, return_assistant_tokens_mask=True)
        assert got["input_ids"] == safe["input_ids"]
        assert got["assistant_masks"] == [int(piece.learn) for piece in pieces for _ in piece.ids]


def test_the_chat_template_refuses_what_it_cannot_say(tokenizer: Tokenizer) -> None:
    theirs = hf_tokenizer(tokenizer)
    for message in ({"role": "boss", "content": "x"}, {"role": "user", "content": [{"type": "image"}]}):
        with pytest.raises(Exception, match="boss|image"):
            theirs.apply_chat_template([message])
