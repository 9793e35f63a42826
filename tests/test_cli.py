"""The command line: what it prints, how it ends, and that bad input costs one line that names the argument."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import fourfold
from fourfold.cli import main
from fourfold.config import PRESETS, ModelConfig
from fourfold.counts import count_parameters
from fourfold.serve.request import Delta, Finished, Usage

COMMANDS = ("serve", "chat", "generate", "inspect", "plan", "train", "eval", "data", "convert")
FOURFOLD = [sys.executable, "-m", "fourfold"]
USAGE = Usage(7, 2, 0, 1, 7, 0, 0, 0)


class FakeModel:
    """Answers like ``LocalModel`` and remembers what it was asked."""

    def __init__(self) -> None:
        self.config = ModelConfig.preset("nano")
        self.engine = object()
        self.loaded: list[tuple[str, dict]] = []
        self.asked: list[tuple[list, dict]] = []
        self.interrupt = False
        self.closed = False

    def events(self, messages, **options):
        self.asked.append((list(messages), options))
        if options["max_tokens"] == 0:
            raise ValueError("max_tokens: is 0; must be at least 1")

        def stream():
            if options["thinking"]:
                yield Delta("reasoning", "hmm")
            yield Delta("content", "four ")
            if self.interrupt:
                raise KeyboardInterrupt
            yield Delta("content", "[/b] cats")
            yield Finished("stop", USAGE)

        return stream()

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def model(monkeypatch):
    fake = FakeModel()
    monkeypatch.setattr(fourfold, "load", lambda name, **options: fake.loaded.append((name, options)) or fake)
    return fake


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a cat.png"
    Image.fromarray(np.full((16, 24, 3), 200, np.uint8)).save(path)
    return path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*FOURFOLD, *arguments], capture_output=True, text=True, timeout=60)


def refusal(capsys, *arguments: object) -> str:
    """The one line that a refused command prints."""
    try:
        status = main([str(a) for a in arguments])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2 and out == ""
    assert err.count("\n") == 1 and "Traceback" not in err
    return err


# ---------------------------------------------------------------- how it starts and ends


def test_help_names_every_command():
    result = run("--help")
    assert result.returncode == 0 and result.stderr == ""
    for command in COMMANDS:
        assert f"\n    {command} " in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: fourfold {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "COMMAND"),
        (["paint"], "'paint'"),
        (["generate"], "--prompt"),
        (["serve", "--port", "http"], "--port: 'http' is not a port"),
        (["serve", "--port", "65536"], "--port"),
        (["plan", "v4", "--vram", "24 gigs"], "--vram: '24 gigs' is not a size"),
        (["plan", "v4", "--context", "1e6"], "--context"),
        (["plan", "v4", "--quant", "int3"], "quant: 'int3'"),
        (["plan", "v4", "--context", "2000000"], "context: must be between 1 and 1048576"),
        (["plan", "v4", "--batch", "0"], "batch"),
        (["plan", "v4", "--ram-bandwidth", "0"], "ram_bandwidth"),
        (["plan", "v5"], "'v5' is neither a directory nor a file nor one of the presets"),
        (["serve", "nano", "--quant", "int3"], "--quant: invalid choice: 'int3'"),
        (["generate", "nano", "--prompt", "x", "--dtype", "int3"], "dtype: is 'int3'"),
        (["chat", "nowhere"], "model: 'nowhere' is neither bundled (nano) nor a directory"),
        (["inspect", "nowhere"], "'nowhere'"),
        (["inspect", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
        (["train", "nowhere.toml"], "nowhere.toml"),
        (["train"], "RECIPE.toml"),
        (["eval", "astrology"], "SUITE: 'astrology' is unknown; choose one of"),
        (["convert", "nano"], "DST"),
        (["convert", "nowhere", "x"], "'nowhere' is neither bundled"),
        (["convert", "nano", "x", "--family", "gpt2"], "family: is 'gpt2'; choose one of native"),
        (["convert", "nano", "x", "--dialect", "old"], "--dialect: invalid choice: 'old'"),
        (["convert", "nano", "x", "--storage", "int2"], "storage: is 'int2'"),
        (["convert", "nano", "x", "--family", "llama"], "llama cannot express"),
        (["data"], "build|list"),
        (["data", "build", "everything"], "'everything' is unknown"),
    ],
)
def test_bad_input_costs_one_line_that_names_it(arguments, named, capsys):
    assert named in refusal(capsys, *arguments)


def test_a_traceback_can_be_had(monkeypatch, capsys):
    monkeypatch.setenv("FOURFOLD_TRACEBACK", "1")
    with pytest.raises(ValueError, match="v5"):
        main(["plan", "v5"])


def test_an_interrupt_ends_with_130_and_no_traceback():
    code = """
import signal, sys, fourfold.cli, fourfold.serve.local
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
print("ready", flush=True)
sys.exit(fourfold.cli.main(["generate", "--prompt", "-"]))
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)  # it reads its prompt now, and nobody writes one
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert (process.stdout.read(), process.stderr.read().strip()) == ("", "")


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m fourfold inspect v4 --json"
    result = subprocess.run(["bash", "-c", f"set -o pipefail; {command} | head -c 1"], capture_output=True, text=True)
    assert result.stdout == "{" and result.stderr == ""


# ---------------------------------------------------------------- looking at models


def test_inspect_a_preset(capsys):
    assert main(["inspect", "v4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["params"]["total"] == 998_028_498_787
    assert found["params"]["active"] == 36_125_113_187
    assert found["params"]["by_part"]["routed_experts"] == 735_647_367_168
    assert ModelConfig.from_dict(found["config"]) == ModelConfig.preset("v4")

    assert main(["inspect", "v4"]) == 0
    table = capsys.readouterr().out
    assert "735,647,367,168" in table and "998,028,498,787" in table


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.toml")))
def test_every_preset_can_be_inspected(name, capsys):
    assert main(["inspect", name]) == 0
    shown = capsys.readouterr().out
    cfg = ModelConfig.preset(name)
    assert f"total {count_parameters(cfg)['total']:,}, active" in shown
    assert ("a sequence" in shown) == cfg.attention.is_compressed


def test_inspect_says_which_parts_the_total_leaves_out(capsys):
    outside = {"v4": "MTP, media", "v3": "MTP, router biases", "v2": "nothing", "v4.1-flash": "drafter, media"}
    for name, parts in outside.items():
        assert main(["inspect", name]) == 0
        assert f"(without {parts})" in capsys.readouterr().out


def released_directory(path: Path, dialect: str, storage: str) -> ModelConfig:
    """A tiny V3 with one MTP layer, all zeros but for the shapes."""
    import torch
    from safetensors.torch import save_file as save_tensors

    from fourfold.model.transformer import Model
    from fourfold.weights.families import FAMILIES
    from fourfold.weights.families.entries import disk_shapes
    from fourfold.weights.formats import encode

    smaller = {"vocab_size": 280, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 24}
    smaller |= {"attention.num_attention_heads": 2, "attention.q_lora_rank": 16, "attention.kv_lora_rank": 16}
    smaller |= {"moe.n_routed_experts": 8, "moe.moe_intermediate_size": 16, "moe.first_k_dense_replace": 1}
    cfg = ModelConfig.preset("v3", **smaller, **{"moe.n_group": 2, "moe.topk_group": 2, "moe.num_experts_per_tok": 3})
    family = FAMILIES["deepseek_v3"]
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Model(cfg).state_dict().items()}
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in disk_shapes(family.plan(cfg, dialect), shapes).items():
        kind = storage if storage == "bf16" else family.tensor_format(name, storage)
        stem, _, last = name.rpartition(".")
        for suffix, tensor in encode(torch.zeros(shape), kind).items():
            tensors[f"{stem}.{suffix}" if last == "weight" else name] = tensor
    path.mkdir()
    save_tensors(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(family.to_config(cfg, dialect)))
    return cfg


@pytest.mark.parametrize("dialect", ["released", "transformers"])
def test_inspect_a_released_directory(dialect, tmp_path, capsys):
    cfg = released_directory(tmp_path / "tiny", dialect, "fp8")
    assert main(["inspect", str(tmp_path / "tiny"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["params"] == count_parameters(cfg)
    assert (found["family"], found["dialect"], found["faults"]) == ("deepseek_v3", dialect, [])
    experts = found["params"]["by_part"]["routed_experts"]
    assert found["storage"]["routed_experts"] == {"F8_E4M3 + F32": experts}
    assert found["storage"]["embedding"] == {"BF16": 280 * 32}
    for part in ("attention", "dense_ffn", "router", "shared_experts", "norms"):
        assert sum(found["storage"][part].values()) == found["params"]["by_part"][part]
    assert any(t["name"].endswith("weight_scale_inv") for t in found["tensors"])

    assert main(["inspect", str(tmp_path / "tiny")]) == 0
    shown = capsys.readouterr().out
    assert f"(deepseek_v3, {dialect})" in shown and "F8_E4M3 + F32" in shown and "would not load" not in shown


def test_inspect_says_what_would_not_load(tmp_path, capsys):
    released_directory(tmp_path / "tiny", "released", "bf16")
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config | {"vocab_size": 281}))
    assert main(["inspect", str(tmp_path / "tiny")]) == 0
    shown = capsys.readouterr().out
    assert "would not load: lm_head.weight has shape [280, 32], the model's is [281, 32]" in shown


def test_a_directory_without_weights_is_known_by_its_config(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(ModelConfig.preset("v4-mini").to_dict()))
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["params"] == count_parameters(ModelConfig.preset("v4-mini")) and "tensors" not in found
    assert main(["plan", str(tmp_path), "--ram", "64GiB"]) == 0


def test_a_directory_that_is_wrong_is_refused(tmp_path, capsys):
    assert "config.json" in refusal(capsys, "inspect", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert "model_type: is 'gpt2'" in refusal(capsys, "inspect", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": "wide"}))
    assert "hidden_size: must be of type int" in refusal(capsys, "plan", tmp_path)


def test_a_broken_gguf_file_is_refused(tmp_path, capsys):
    path = tmp_path / "broken.gguf"
    for content in (b"", b"GGUF", b"GGML" + bytes(60)):
        path.write_bytes(content)
        assert "broken.gguf" in refusal(capsys, "inspect", path)
        assert "broken.gguf" in refusal(capsys, "generate", path, "--prompt", "x")


def test_inspect_a_weights_file_reads_its_header(tmp_path, capsys):
    path = tmp_path / "weights.safetensors"
    save_file({"a.weight": np.zeros((3, 5), np.float16), "b": np.zeros(2, np.int64)}, path)
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "tensors": [
            {"name": "a.weight", "dtype": "F16", "shape": [3, 5]},
            {"name": "b", "dtype": "I64", "shape": [2]},
        ]
    }
    assert main(["inspect", str(path)]) == 0
    assert "2 tensors, 17 numbers" in capsys.readouterr().out


def test_a_huge_weights_file_is_not_read_but_for_its_header(tmp_path, capsys):
    shape = [1 << 18, 1 << 17]  # 64 GiB, a hole on disk
    size = 2 * shape[0] * shape[1]
    header = json.dumps({"x": {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}}).encode()
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    start = time.monotonic()
    assert main(["inspect", str(path), "--json"]) == 0
    assert time.monotonic() - start < 5
    assert json.loads(capsys.readouterr().out)["tensors"][0]["shape"] == shape


@pytest.mark.parametrize(
    "content", [b"", b"\x10", b"\xff" * 64, struct.pack("<Q", 3) + b"{]}", struct.pack("<Q", 1 << 40)]
)
def test_a_broken_weights_file_is_refused(content, tmp_path, capsys):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    assert "broken.safetensors: cannot be read" in refusal(capsys, "inspect", path)


def test_a_truncated_weights_file_is_refused(tmp_path, capsys):
    path = tmp_path / "cut.safetensors"
    save_file({"a": np.zeros((30, 50), np.float32)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    assert "cut.safetensors: cannot be read: it is cut off at byte" in refusal(capsys, "inspect", path)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pkl"])
def test_a_pickle_is_refused_unopened(name, tmp_path, capsys):
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert "only .safetensors and .gguf files are read" in refusal(capsys, "inspect", path)
    assert not (tmp_path / "sprung").exists()


def test_plan_as_json(capsys):
    assert main("plan v4 --quant int4 --vram 80GiB --ram 512GiB --disk 2TB --context 1048576 --json".split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True and found["limited_by"] == "ram"
    assert found["memories"][0] == {"name": "vram", "capacity": 80 * 1024**3, "bandwidth": 1000e9}
    assert found["parameters"] == 998_028_498_787


def test_plan_as_a_table_says_what_it_assumes(capsys):
    assert main("plan v4 --ram 64GiB --disk 100GB".split()) == 0
    shown = capsys.readouterr().out
    assert "does not fit" in shown and "routed experts" in shown
    assert "assumed:" in shown and "not modelled:" in shown and "50 GB/s" in shown
    assert main("plan nano --ram 1GiB --disk 0 --ram-bandwidth 10GB".split()) == 0
    shown = capsys.readouterr().out
    assert "fits; at most" in shown and "limited by reading ram" in shown and "10 GB/s" in shown


def test_plan_looks_at_this_machine_by_default(capsys):
    assert main(["plan", "nano", "--json"]) == 0
    vram, ram, disk = json.loads(capsys.readouterr().out)["memories"]
    assert vram["capacity"] == 0 and ram["capacity"] > 2**28 and disk["capacity"] > 0


# ---------------------------------------------------------------- talking to a model


def test_generate_prints_the_answer_alone(model, capsys):
    assert main(["generate", "--prompt", "2 + 2?", "--system", "Be brief.", "--think"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("four [/b] cats\n", "hmm")
    [(messages, options)] = model.asked
    assert [(m.role, m.content) for m in messages] == [("system", "Be brief."), ("user", ["2 + 2?"])]
    assert options == {"max_tokens": None, "temperature": 0.0, "top_p": 1.0, "seed": None, "thinking": True}
    assert model.closed


def test_generate_as_json(model, capsys):
    arguments = "generate nano --prompt hi --json --think --max-tokens 5 --temperature 0.5 --top-p 0.9 --seed 3"
    assert main(arguments.split()) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["content"], said["reasoning"], said["finish_reason"]) == ("four [/b] cats", "hmm", "stop")
    assert said["usage"]["prompt_tokens"] == 7
    options = model.asked[0][1]
    assert options == {"max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 3, "thinking": True}


def test_generate_reads_its_prompt_from_standard_input(model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    assert main(["generate", "--prompt", "-"]) == 0
    assert model.asked[0][0][0].content == ["from a pipe\n"]
    assert model.loaded == [("nano", {"dtype": None, "quant": None, "progress": False})]


def test_generate_attaches_media_before_the_text(model, picture, capsys):
    assert main(["generate", "--prompt", "What?", "--image", str(picture), "--image", str(picture)]) == 0
    [message] = model.asked[0][0]
    *images, text = message.content
    assert text == "What?"
    assert [(m.modality, m.value.shape) for m in images] == [("image", (16, 24, 3))] * 2


def test_generate_refuses_what_it_cannot_read(model, tmp_path, capsys):
    noise = tmp_path / "noise.png"
    noise.write_bytes(b"no picture")
    assert "image" in refusal(capsys, "generate", "--prompt", "x", "--image", noise)
    assert "absent.wav" in refusal(capsys, "generate", "--prompt", "x", "--audio", tmp_path / "absent.wav")
    assert "max_tokens" in refusal(capsys, "generate", "--prompt", "x", "--max-tokens", "0")
    model.config = model.config.replace(**{"media.image": None})
    assert "image" in refusal(capsys, "generate", "--prompt", "x", "--image", noise)
    assert model.closed


def chat(monkeypatch, *lines: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return main(["chat"])


def test_chat_keeps_the_conversation(model, monkeypatch, capsys):
    assert chat(monkeypatch, "hello", "/think", "", "again", "/exit", "never") == 0
    assert capsys.readouterr().out == "four [/b] cats\nhmmfour [/b] cats\n"
    first, second = model.asked
    assert [m.content for m in first[0]] == [["hello"]]
    assert [(m.role, m.content) for m in second[0]] == [
        ("user", ["hello"]),
        ("assistant", "four [/b] cats"),
        ("user", ["again"]),
    ]
    assert (first[1]["thinking"], second[1]["thinking"]) == (False, True)
    assert model.closed


def test_chat_ends_with_its_input(model, monkeypatch):
    assert chat(monkeypatch, "hello") == 0


def test_chat_attaches_files_to_the_next_message(model, monkeypatch, picture, tmp_path, capsys):
    notes = tmp_path / "notes.txt"
    notes.write_text("the key is 7")
    assert chat(monkeypatch, f"/image {picture}", f"/file {notes}", "What is it?", "And now?") == 0
    image, text, question = model.asked[0][0][0].content
    assert (image.value.shape, text, question) == ((16, 24, 3), "the key is 7", "What is it?")
    assert model.asked[1][0][-1].content == ["And now?"]


def test_chat_survives_bad_commands_and_refused_turns(model, monkeypatch, tmp_path, capsys):
    model_options = ["/image", f"/audio {tmp_path}/absent.wav", "/dance", "/", "fine"]
    assert chat(monkeypatch, *model_options) == 0
    out, err = capsys.readouterr()
    assert "/image: name a file" in err and "absent.wav" in err and err.count("/reset") == 2
    assert out == "four [/b] cats\n"

    monkeypatch.setattr(sys, "stdin", io.StringIO("refused\nrefused again\n"))
    assert main(["chat", "--max-tokens", "0"]) == 0
    assert capsys.readouterr().err.count("max_tokens: is 0") == 2
    assert [len(messages) for messages, _ in model.asked[-2:]] == [1, 1]


def test_chat_forgets_on_reset(model, monkeypatch, picture):
    assert chat(monkeypatch, "hello", f"/image {picture}", "/reset", "who?") == 0
    assert [m.content for m in model.asked[-1][0]] == [["who?"]]


def test_an_interrupt_ends_the_answer_and_not_the_chat(model, monkeypatch, capsys):
    model.interrupt = True
    assert chat(monkeypatch, "first", "second") == 0
    assert [m.content for m in model.asked[1][0]] == [["first"], "four ", ["second"]]


def test_an_interrupt_at_the_prompt_leaves_the_chat(model, monkeypatch):
    def interrupted(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert main(["chat"]) == 130
    assert model.closed


def test_serve_hands_over_the_engine(model, monkeypatch):
    served = {}

    def run_server(engine, name, **options):
        served.update(engine=engine, name=name, **options)

    monkeypatch.setenv("FOURFOLD_API_KEY", "secret")
    monkeypatch.setattr("fourfold.api.server.run_server", run_server)
    assert main(["serve", "runs/mine", "--port", "0", "--dtype", "bf16", "--quant", "int4"]) == 0
    assert model.loaded == [("runs/mine", {"dtype": "bf16", "quant": "int4", "progress": False})]
    assert served == {"engine": model.engine, "name": "mine", "host": "127.0.0.1", "port": 0, "api_key": "secret"}


# ---------------------------------------------------------------- training, evaluation, data


def test_train_checks_its_arguments_first_and_passes_them_on(monkeypatch, tmp_path, capsys):
    recipe = tmp_path / "tiny.toml"
    recipe.write_text("steps = 1\n")
    trained = []
    monkeypatch.setattr("fourfold.train.loop.train", lambda path, overrides: trained.append((path, overrides)))
    assert "steps: write key=value" in refusal(capsys, "train", recipe, "steps")
    assert main(["train", str(recipe), "steps=2", "model.residual.kind=plain"]) == 0
    assert trained == [(recipe, ["steps=2", "model.residual.kind=plain"])]


def test_eval_runs_a_suite_and_keeps_its_scores(model, monkeypatch, tmp_path, capsys):
    settings = {"samples": 4, "seed": 1}
    report = {"suite": "coin", "model": "nano", "scores": {"heads": {"n": 4, "accuracy": 0.5}}, "settings": settings}
    (tmp_path / "coin.py").write_text(
        f"def run(model, settings):\n    assert settings == {settings}, settings\n    return {report}\n"
    )
    import fourfold.eval

    monkeypatch.setattr(fourfold.eval, "__path__", [*fourfold.eval.__path__, str(tmp_path)])
    out = tmp_path / "scores.json"
    assert main(["eval", "coin", "--samples", "4", "--seed", "1", "--quant", "int8", "--json", str(out)]) == 0
    assert model.loaded == [("nano", {"dtype": None, "quant": "int8", "progress": False})]
    assert json.loads(out.read_text()) == report
    shown = capsys.readouterr().out
    assert "heads" in shown and "0.5" in shown
    assert model.closed


def test_data_lists_and_builds(monkeypatch, tmp_path, capsys):
    from fourfold.data.build import Report

    assert main(["data", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["smoke"]
    assert main(["data", "list"]) == 0
    assert "smoke" in capsys.readouterr().out

    built = []

    def build(name, out, missing):
        built.append((name, out))
        return Report(missing=missing)

    monkeypatch.setattr("fourfold.data.build.build", lambda name, out: build(name, out, {}))
    assert main(["data", "build", "smoke", "--out", str(tmp_path)]) == 0
    monkeypatch.setattr("fourfold.data.build.build", lambda name, out: build(name, out, {"text": "no network"}))
    assert main(["data", "build", "smoke"]) == 1
    assert built == [("smoke", tmp_path), ("smoke", None)]


def test_convert_there_and_back(tmp_path, capsys):
    import torch

    from fourfold.text.tokenizer import train_tokenizer

    cfg = released_directory(tmp_path / "tiny", "released", "fp8")
    train_tokenizer(["a"], cfg.vocab_size).save(tmp_path / "tiny" / "tokenizer.json")
    assert main(["convert", str(tmp_path / "tiny"), str(tmp_path / "ours"), "--storage", "fp32"]) == 0
    assert f"{tmp_path / 'ours'}: native" in capsys.readouterr().out
    back = [str(tmp_path / "ours"), str(tmp_path / "theirs")]
    assert main(["convert", *back, "--family", "deepseek_v3", "--dialect", "transformers", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["path"], said["family"], said["storage"]) == (str(tmp_path / "theirs"), "deepseek_v3", "fp32")
    assert main(["inspect", str(tmp_path / "theirs"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["dialect"], found["faults"], found["params"]) == ("transformers", [], count_parameters(cfg))
    with contextlib.closing(fourfold.load(str(tmp_path / "theirs"), quant="int8")) as model:
        assert torch.equal(model.logits([0, 1]), torch.zeros(2, cfg.vocab_size))
    assert "is there already" in refusal(capsys, "convert", *back)
