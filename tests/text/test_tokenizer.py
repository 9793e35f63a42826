import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.text.tokenizer import SPECIALS, Tokenizer, TokenizerError, compress_vocabulary, train_tokenizer

from .conftest import CORPUS

TOKENIZER = train_tokenizer(CORPUS, 440)
written = st.text(st.characters(exclude_categories=["Cs"]))
with_names = st.lists(st.one_of(written, st.sampled_from(SPECIALS))).map("".join)


@settings(deadline=None, max_examples=200)
@given(with_names)
def test_text_comes_back_and_never_becomes_a_special(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode(ids, skip_special=False) == text
    assert not any(TOKENIZER.is_special(i) for i in ids)
    assert b"".join(map(TOKENIZER.token_bytes, ids)) == text.encode()


def test_specials_have_the_fixed_ids(tokenizer):
    assert [tokenizer.special(name) for name in SPECIALS] == list(range(16))
    assert [i for i in range(tokenizer.vocab_size) if tokenizer.is_special(i)] == list(range(16))
    with pytest.raises(TokenizerError, match="<|nothing|>"):
        tokenizer.special("<|nothing|>")
    with pytest.raises(TokenizerError):
        tokenizer.special("the")  # a word is not a special token


@pytest.mark.parametrize("name", SPECIALS)
def test_a_special_written_by_a_user_is_plain_text(tokenizer, name):
    ids = tokenizer.encode(f"a {name} b")
    assert tokenizer.special(name) not in ids
    assert tokenizer.decode(ids) == f"a {name} b"


def test_skip_special(tokenizer):
    ids = [0, *tokenizer.encode("fox"), 7, 1]
    assert tokenizer.decode(ids) == "fox"
    assert tokenizer.decode(ids, skip_special=False) == "<|bos|>fox<think><|eos|>"


def test_digits_are_split_one_by_one(tokenizer):
    assert len(tokenizer.encode("12345678901234567890")) == 20
    assert [tokenizer.decode([i]) for i in tokenizer.encode("x 3.14")][-4:] == ["3", ".", "1", "4"]


def test_training_learns_words_and_is_deterministic(tokenizer):
    assert len(tokenizer.encode(" the")) == 1
    again = train_tokenizer(iter(CORPUS), 440)
    assert again.backend.to_str() == tokenizer.backend.to_str()
    assert tokenizer.vocab_size == 440


def test_text_that_names_specials_trains_as_text():
    tokenizer = train_tokenizer(["<|bos|> <|bos|> <|bos|>"] * 5, 300)
    assert tokenizer.special("<|bos|>") == 0
    assert 0 not in tokenizer.encode("<|bos|>")


def test_all_bytes_are_in_the_vocabulary(tokenizer):
    single = {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
    assert {bytes([b]) for b in range(256)} <= single


def test_vocabulary_too_small():
    with pytest.raises(TokenizerError, match="vocab_size.*272"):
        train_tokenizer(["a"], 271)


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    text = "The quick <|eos|> größe 42 🙂"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.special("<|audio|>") == 15


@pytest.mark.parametrize("content", [None, "", "{}", "not json", "\x00"])
def test_load_refuses_what_is_no_tokenizer(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TokenizerError, match="tokenizer.json"):
        Tokenizer.load(path)


def test_load_refuses_another_kind_of_tokenizer(tokenizer, tmp_path):
    description = json.loads(tokenizer.backend.to_str())
    description["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(TokenizerError, match="ByteLevel"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_truncation_and_padding_of_a_file_are_ignored(tokenizer, tmp_path):
    description = json.loads(tokenizer.backend.to_str())
    description["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode("a b c d") == tokenizer.encode("a b c d")


def test_added_token_of_a_foreign_file_is_not_injected_either(tokenizer, tmp_path):
    description = json.loads(tokenizer.backend.to_str())
    description["added_tokens"].append(
        {**description["added_tokens"][0], "id": 600, "content": "｜mark｜", "special": False}
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    mark = loaded.special("｜mark｜")
    assert loaded.vocab_size == mark + 1
    assert mark not in loaded.encode("｜mark｜")
    assert loaded.token_bytes(mark).decode() == "｜mark｜"


def test_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(TokenizerError, match="text.*surrogate"):
        tokenizer.encode("ab\ud800")


def test_broken_and_unknown_ids_decode(tokenizer):
    first = tokenizer.encode("丨")[:1]
    assert tokenizer.decode(first) == "\ufffd"
    assert tokenizer.decode([10**6]) == ""
    assert tokenizer.token_bytes(10**6) == b""


def test_compression_merges_case_accents_and_spacing(tokenizer):
    compressed = compress_vocabulary(tokenizer)
    assert len(compressed) == tokenizer.vocab_size
    assert compressed[:16] == list(range(16))  # specials come first and differ

    # Numbered in order of first appearance, without gaps.
    seen = list(dict.fromkeys(compressed))
    assert seen == list(range(len(seen)))
    assert len(seen) < tokenizer.vocab_size


def test_compression_keeps_apart_what_is_no_whole_character(tokenizer):
    compressed = compress_vocabulary(tokenizer)
    lone = [i for i in range(tokenizer.vocab_size) if len(b := tokenizer.token_bytes(i)) == 1 and b[0] >= 128]
    assert len({compressed[i] for i in lone}) == len(lone) == 128


@pytest.mark.parametrize(
    "alike",
    [
        ["é", "É", "e", "E", "\uff25"],
        ["\u00e9", "e\u0301"],
        [" word", "word", " WORD", "Word"],
        [" ", "  ", "\n", "\t"],
    ],
)
def test_tokens_that_read_alike_share_an_id(alike):
    tokenizer = train_tokenizer([f"{text} {text}{end}" for text in alike for end in ("", "x", ".")] * 9, 400)
    compressed = compress_vocabulary(tokenizer)
    whole = {tokenizer.token_bytes(i).decode(errors="replace"): compressed[i] for i in range(tokenizer.vocab_size)}
    assert len({whole[text] for text in alike}) == 1
    assert whole[alike[0]] != whole["."]
