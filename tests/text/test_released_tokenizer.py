"""The real vocabulary of DeepSeek-V4, and what Engram makes of it in V4.1."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.config import EngramConfig
from fourfold.counts import engram_primes
from fourfold.model.engram import engram_multipliers
from fourfold.text.tokenizer import Tokenizer, compress_vocabulary

from .released import BOS, small, tokens, v4_tokenizer

# Engram as V4.1 has it.
V41 = EngramConfig(layer_ids=(1, 14), vocab_size=16_000_000, max_ngram=4, n_heads=8, head_dim=256)


def test_the_compressed_vocabulary_has_the_published_size():
    tokenizer = v4_tokenizer()
    compressed = compress_vocabulary(tokenizer)
    assert (tokenizer.vocab_size, len(compressed)) == (129_280, 129_280)
    assert len(set(compressed)) == max(compressed) + 1 == 99_092
    # Spaces, case and accents do not count; broken characters and special tokens stay apart.
    assert len({compressed[i] for text in ("Hello", " hello", " Hello") for i in tokenizer.encode(text)[:1]}) == 1
    assert len({compressed[i] for i in tokenizer.marks.values()}) == len(tokenizer.marks)


def test_the_size_does_not_depend_on_the_names_of_the_placeholders():
    """V4.1 gives names of its own to some of them; each stays a text that no other token reads as."""
    description = json.loads(v4_tokenizer().backend.to_str())
    names = {"<｜place▁holder▁no▁0｜>": "<｜System｜>", "<｜image2｜>": "<｜deepseek_image｜>"}
    for token in description["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    renamed = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(description)))
    assert renamed.special("<｜deepseek_image｜>") == 129_264
    assert max(compress_vocabulary(renamed)) + 1 == 99_092


def test_engram_rows_of_the_released_model():
    primes = engram_primes(V41)
    assert primes[0][0][:4] == [16_000_057, 16_000_079, 16_000_081, 16_000_097]
    assert primes[1][-1][-1] == 16_000_889
    assert [sum(map(sum, layer)) for layer in primes] == [384_006_168, 384_016_682]
    every = [p for layer in primes for order in layer for p in order]
    assert len(set(every)) == len(every) == 2 * 3 * 8


def test_engram_multipliers_of_the_released_model():
    assert engram_multipliers(V41, 1, 99_092) == [76632096046245, 4839876093313, 35959672319349, 73987337458391]
    assert engram_multipliers(V41, 14, 99_092) == [67716810739261, 51510806800915, 30921347202721, 82619226485591]
    assert engram_multipliers(V41, 1, 99_093) != engram_multipliers(V41, 1, 99_092)


PLAIN = [
    "x = [1, 22, 333]\n\n  return\tx",
    "你好，世界。こんにちは",
    "naïve Größe don't",
    "🙂👍🏽",
    "<b>html</b> | a ｜ b",
    "  \n ",
]


@pytest.mark.parametrize("text", PLAIN)
def test_plain_text_is_encoded_as_the_file_says(text):
    tokenizer = v4_tokenizer()
    assert tokenizer.encode(text) == tokens(tokenizer, text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<｜User｜>", "｜DSML｜", BOS, "<", "｜", "a", " "])).map("".join)
)
def test_no_text_becomes_a_mark(text):
    tokenizer = v4_tokenizer()
    ids = tokenizer.encode(text)
    assert not any(tokenizer.is_special(i) for i in ids)
    assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special=False) == text


def test_marks_are_special_whatever_the_file_calls_them():
    tokenizer = v4_tokenizer()
    assert tokenizer.special("<think>") == 128_821 and tokenizer.is_special(128_821)  # the file: special = false
    assert tokenizer.mark(128_825) == "｜DSML｜" and tokenizer.mark(1000) is None
    assert tokenizer.decode([128_803, *tokenizer.encode("hi"), 128_822]) == "hi"
    assert tokenizer.token_bytes(128_825) == "｜DSML｜".encode()


def test_an_added_word_is_text():
    """Old vocabularies add the letters of bytes that no text has; text uses them, and they read as themselves."""
    description = json.loads(small((BOS, "<e>")).backend.to_str())
    about = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    del description["model"]["vocab"]["ø"]
    count = small((BOS, "<e>")).vocab_size
    description["added_tokens"] += [{"id": count + n, "content": word, **about} for n, word in enumerate(("ø", "øø"))]
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(description)))
    words = {tokenizer.backend.token_to_id(word) for word in ("ø", "øø")}
    text = "smørrebrød øøø fox"
    assert tokenizer.encode(text) == tokens(tokenizer, text)
    assert len(words) == 2 and words <= set(tokenizer.encode(text)) and not any(map(tokenizer.is_special, words))
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))).decode() == text


def test_holes_of_a_vocabulary_are_known():
    description = json.loads(small((BOS, "<e>")).backend.to_str())
    lost = description["model"]["merges"][-1]
    word = "".join(lost)
    hole = description["model"]["vocab"].pop(word)
    description["model"]["merges"] = [m for m in description["model"]["merges"] if "".join(m) != word]
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(description)))
    assert not tokenizer.has(hole) and tokenizer.has(0) and not tokenizer.has(tokenizer.vocab_size)
