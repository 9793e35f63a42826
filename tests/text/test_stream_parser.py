import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.text.chat import parse_tool_call
from fourfold.text.stream import StreamParser, parse_completion
from fourfold.text.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["plain words only "] * 4, 280)  # other scripts fall apart into bytes
CALL = '{"name":"f","arguments":{"x":"你"}}'


def ids(*parts: str) -> list[int]:
    """Token ids; a part that names a special is that special."""
    out: list[int] = []
    for part in parts:
        special = part in ("<think>", "</think>", "<tool_call>", "</tool_call>", "<|eos|>", "<|image|>")
        out += [TOKENIZER.special(part)] if special else TOKENIZER.encode(part)
    return out


def stream(tokens, thinking=False):
    parser = StreamParser(TOKENIZER, thinking)
    return [event for token in tokens for event in parser.feed(token)] + parser.finish()


def joined(events):
    """Neighbouring events of one channel as one, calls apart."""
    out: list[tuple[str, str]] = []
    for channel, text in events:
        if out and out[-1][0] == channel != "tool_call":
            out[-1] = (channel, out[-1][1] + text)
        else:
            out.append((channel, text))
    return out


def test_characters_split_over_tokens_come_out_whole():
    tokens = ids("a你🙂é")
    assert len(tokens) > 4
    parser = StreamParser(TOKENIZER)
    assert [parser.feed(t) for t in tokens if parser] == [
        [("content", "a")],
        [], [], [("content", "你")],
        [], [], [], [("content", "🙂")],
        [], [("content", "é")],
    ]  # fmt: skip
    assert parser.finish() == []


def test_broken_utf8_becomes_a_replacement_character():
    tokens = ids("你")
    assert stream(tokens[:2]) == [("content", "\ufffd")]
    assert joined(stream(tokens[:2] + ids("a"))) == [("content", "\ufffda")]
    assert joined(stream([*tokens[:2], *ids("</think>"), *ids("b")], thinking=True)) == [
        ("reasoning", "\ufffd"),
        ("content", "b"),
    ]


def test_other_specials_are_left_out_even_inside_a_character():
    first, *rest = ids("你")
    assert joined(stream([first, *ids("<|image|>"), *rest, *ids("<|eos|>")])) == [("content", "你")]


def test_channels():
    tokens = ids(
        "why", "</think>", "so", "<tool_call>", CALL, "</tool_call>", "<tool_call>", CALL, "</tool_call>", "<|eos|>"
    )
    assert joined(stream(tokens, thinking=True)) == [
        ("reasoning", "why"),
        ("content", "so"),
        ("tool_call", CALL),
        ("tool_call", CALL),
    ]
    assert joined(stream(ids("a", "<think>", "b", "</think>", "c"))) == [
        ("content", "a"),
        ("reasoning", "b"),
        ("content", "c"),
    ]


def test_the_channel_tells_where_the_next_token_goes():
    parser = StreamParser(TOKENIZER, thinking=True)
    seen = []
    for token in ids("</think>", "<tool_call>", "</tool_call>"):
        seen.append(parser.channel)
        parser.feed(token)
    assert [*seen, parser.channel] == ["reasoning", "content", "tool_call", "content"]


def test_stray_marks_change_nothing():
    assert joined(stream(ids("a", "</tool_call>", "b"), thinking=True)) == [("reasoning", "ab")]
    assert joined(stream(ids("a", "</think>", "b"))) == [("content", "ab")]


@pytest.mark.parametrize(
    "body", ["{", "[]", '{"name":"f"}', '{"name":1,"arguments":{}}', '{"name":"f","arguments":[]}', "[" * 5000]
)
def test_what_is_no_call_becomes_content(body):
    assert parse_tool_call(body) is None
    assert joined(stream(ids("<tool_call>", body, "</tool_call>", "!"))) == [("content", body + "!")]


def test_a_call_that_is_cut_off_becomes_content():
    assert stream(ids("<tool_call>", '{"name":')) == [("content", '{"name":')]
    assert joined(stream(ids("<tool_call>", "x", "<tool_call>", CALL, "</tool_call>"))) == [
        ("content", "x"),
        ("tool_call", CALL),
    ]
    assert stream(ids("<tool_call>", "</tool_call>")) == []
    assert stream(ids("<tool_call>", CALL)) == [("content", CALL)]  # never closed


def test_parse_completion():
    said = ids("r", "</think>", "c", "<tool_call>", CALL, "</tool_call>")
    reasoning, content, calls = parse_completion(said, StreamParser(TOKENIZER, True))
    assert (reasoning, content) == ("r", "c")
    assert (calls[0].name, json.loads(calls[0].arguments)) == ("f", {"x": "你"})
    assert calls[0].id.startswith("call_")
    assert parse_completion(ids("c", "<|eos|>"), StreamParser(TOKENIZER)) == (None, "c", [])
    assert parse_completion([], StreamParser(TOKENIZER, True)) == (None, "", [])


@settings(deadline=None)
@given(st.lists(st.integers(min_value=3, max_value=TOKENIZER.vocab_size + 3)))
def test_any_tokens_stream_to_the_text_of_the_whole(tokens):
    marks = {TOKENIZER.special(name) for name in ("<think>", "</think>", "<tool_call>", "</tool_call>")}
    tokens = [t for t in tokens if t not in marks]
    assert "".join(text for _, text in stream(tokens)) == TOKENIZER.decode(tokens)


@settings(deadline=None)
@given(st.lists(st.one_of(st.integers(3, TOKENIZER.vocab_size - 1), st.sampled_from([7, 8, 11]))), st.booleans())
def test_each_part_between_marks_comes_out_in_full(tokens, thinking):
    parts: list[list[int]] = [[]]
    for token in tokens:
        if token in (7, 8, 11):  # <think>, </think>, <tool_call>
            parts.append([])
        elif token != 12:
            parts[-1].append(token)
    said = "".join(text for _, text in stream([t for t in tokens if t != 12], thinking))
    assert said == "".join(map(TOKENIZER.decode, parts))
