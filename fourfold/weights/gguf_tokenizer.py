"""The tokenizer and the chat template that a GGUF file carries.

The file names its way of splitting words by a keyword (``tokenizer.ggml.pre``); the patterns behind the keywords are
those of the released ``tokenizer.json`` files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from fourfold.text.formats import ChatFormat, make_chat
from fourfold.text.tokenizer import Tokenizer
from fourfold.weights.gguf import GgufFile
from fourfold.weights.tensors import CheckpointError

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # token types; others lie in the vocabulary and are never produced

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_CASED = (  # letters with case, as listed when the first DeepSeek tokenizer was made
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
DIGIT = ""  # splits off each digit
QWEN2 = (_CONTRACTIONS + r"\p{N}" + _REST,)
LLAMA3 = (_CONTRACTIONS + r"\p{N}{1,3}" + _REST,)
DEEPSEEK_LLM = (
    "[\r\n]",
    rf"\s?[{_CASED}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _CJK,
    DIGIT,
)
DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, DIGIT)
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)
GPT2 = (_GPT2,)
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")


@dataclass(frozen=True)
class Splitting:
    """What ``tokenizer.ggml.pre`` stands for. ``whole``: a word that is a token is taken without merging."""

    patterns: tuple[str, ...]
    nfc: bool = False
    whole: bool = False


SPLITTINGS = {
    "qwen2": Splitting(QWEN2, nfc=True),
    "deepseek-r1-qwen": Splitting(QWEN2, nfc=True),
    "deepseek-llm": Splitting(DEEPSEEK_LLM),
    "deepseek-coder": Splitting(DEEPSEEK_CODER),
    "deepseek-v3": Splitting(DEEPSEEK_V3),
    "llama-bpe": Splitting(LLAMA3, whole=True),
    "llama3": Splitting(LLAMA3, whole=True),
    "llama-v3": Splitting(LLAMA3, whole=True),
    "gpt-2": Splitting(GPT2),
    "default": Splitting(DEFAULT),
}


@dataclass(frozen=True)
class ChatMetadata:
    """What a chat format needs beside the tokenizer."""

    templates: dict[str, str]  # Jinja sources by name; that without a name is "default"
    names: dict[str, str | None]  # what templates call bos_token, eos_token and so on
    stop_ids: tuple[int, ...]  # ids that end a turn
    add_bos: bool  # whether plain text begins with the bos_token


def read_tokenizer(file: GgufFile) -> tuple[Tokenizer, ChatMetadata]:
    """Raises CheckpointError if the file's tokenizer is not byte-level BPE of a known kind, or is broken."""

    def fault(message: str) -> CheckpointError:
        return CheckpointError(f"{file.path}: {message}")

    fields = file.metadata
    model = fields.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise fault(f"tokenizer.ggml.model is {model!r}; byte-level BPE ('gpt2') alone can be read")
    kind = fields.get("tokenizer.ggml.pre", "default")
    if not isinstance(kind, str) or kind not in SPLITTINGS:
        raise fault(f"tokenizer.ggml.pre is {kind!r}; known: {', '.join(SPLITTINGS)}")
    tokens = _list(file, "tokenizer.ggml.tokens", str)
    merges = [tuple(merge.split(" ")) for merge in _list(file, "tokenizer.ggml.merges", str)]
    types = [NORMAL] * len(tokens)
    if "tokenizer.ggml.token_type" in fields:
        types = _list(file, "tokenizer.ggml.token_type", int)
    if len(types) != len(tokens):
        raise fault(f"tokenizer.ggml.token_type has {len(types)} entries, there are {len(tokens)} tokens")
    if wrong := next((merge for merge in merges if len(merge) != 2), None):
        raise fault(f"tokenizer.ggml.merges has {' '.join(wrong)!r}, which is no pair")
    if kind.startswith("deepseek"):
        tokens = [_with_bars(t) if types[i] == USER_DEFINED else t for i, t in enumerate(tokens)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        double = next(token for index, token in enumerate(tokens) if vocabulary[token] != index)
        raise fault(f"tokenizer.ggml.tokens has {double!r} twice")
    splitting = SPLITTINGS[kind]
    try:
        bpe = models.BPE(vocabulary, merges, ignore_merges=splitting.whole)
    except Exception as error:  # the Rust side raises plain Exception
        raise fault(f"tokenizer.ggml.merges: {error}") from None
    backend = tokenizers.Tokenizer(bpe)
    if splitting.nfc:
        backend.normalizer = normalizers.NFC()
    splits = [
        pre_tokenizers.Digits(individual_digits=True) if p == DIGIT else pre_tokenizers.Split(Regex(p), "isolated")
        for p in splitting.patterns
    ]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    for type_, add in ((CONTROL, backend.add_special_tokens), (USER_DEFINED, backend.add_tokens)):
        special = type_ == CONTROL
        add([AddedToken(t, special=special, normalized=False) for i, t in enumerate(tokens) if types[i] == type_])
    return Tokenizer(backend), _chat(file, tokens, splitting)


def _list(file: GgufFile, name: str, kind: type) -> list[Any]:
    values = file.metadata.get(name)
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise CheckpointError(f"{file.path}: {name} must be a list of type {kind.__name__}")
    return values


def _with_bars(token: str) -> str:
    """``<｜tool calls begin｜>`` -> ``<｜tool▁calls▁begin｜>``: the conversion wrote spaces for the bars."""
    return token.replace(" ", "\u2581") if token.startswith("<\uff5c") and token.endswith("\uff5c>") else token


def _chat(file: GgufFile, tokens: list[str], splitting: Splitting) -> ChatMetadata:
    faults: list[str] = []

    def said(name: str, kind: type, default: Any) -> Any:
        value = file.metadata.get(name, default)
        if value is not default and type(value) is not kind:
            faults.append(f"{file.path}: {name} must be of type {kind.__name__}")
            return default
        return value

    def identity(name: str) -> int | None:
        value: int | None = said(f"tokenizer.ggml.{name}_token_id", int, None)
        if value is not None and not 0 <= value < len(tokens):
            faults.append(f"{file.path}: tokenizer.ggml.{name}_token_id is {value}, there are {len(tokens)} tokens")
            return None
        return value

    ids = {"bos": identity("bos"), "eos": identity("eos"), "pad": identity("padding"), "unk": identity("unknown")}
    stops = dict.fromkeys(i for i in (ids["eos"], identity("eot"), identity("eom")) if i is not None)
    keys = {"default": "tokenizer.chat_template"}
    keys |= {str(name): f"tokenizer.chat_template.{name}" for name in said("tokenizer.chat_templates", list, [])}
    templates = {name: said(key, str, None) for name, key in keys.items()}
    chat = ChatMetadata(
        templates={name: text for name, text in templates.items() if text is not None},
        names={f"{name}_token": None if i is None else tokens[i] for name, i in ids.items()},
        stop_ids=tuple(stops),
        add_bos=said("tokenizer.ggml.add_bos_token", bool, splitting.whole) and ids["bos"] is not None,
    )
    if faults:
        raise CheckpointError(*faults)
    return chat


def gguf_chat(path: Path, tokenizer: Tokenizer) -> ChatFormat:
    """The chat format that a GGUF file carries for its ``tokenizer``."""
    about = read_tokenizer(GgufFile(path))[1]
    return make_chat(tokenizer, about.templates, about.names, about.stop_ids, about.add_bos)
