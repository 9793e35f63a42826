"""The command line: what it prints, how it ends, and that bad input costs one line that names the argument."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import fourfold
from fourfold.cli import main
from fourfold.config import ModelConfig
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
        (["chat", "nowhere"], "model: 'nowhere' is neither bundled (nano, nano-long) nor a directory"),
        (["inspect", "nowhere"], "'nowhere'"),
        (["inspect", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
        (["train", "nowhere.toml"], "nowhere.toml"),
        (["train"], "RECIPE.toml"),
        (["eval", "astrology"], "SUITE: 'astrology' is unknown; choose one of"),
        (["convert", "nano"], "DST"),
        (["convert", "nowhere", "x"], "'nowhere' is neither bundled"),
        (["convert", "nano", "x", "--family", "gpt2"], "family: is 'gpt2'; choose one of native"),
        (["convert", "nano", "x", "--dialect", "old"], "--dialect: invalid choice: 'old'"),
        (["convert", "nano", "x", "--family", "native", "--storage", "int2"], "storage: is 'int2'"),
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


def test_the_report_of_a_run_is_written_without_training(monkeypatch, tmp_path, capsys):
    """By its directory, or by its recipe, whose overrides count."""
    monkeypatch.setattr("fourfold.train.loop.train", lambda *_: pytest.fail("trained"))
    run, recipe = tmp_path / "run", tmp_path / "tiny.toml"
    recipe.write_text('out = "elsewhere"\nweights = {prose = 1.0}\nphases = [{steps = 2}]\n')
    assert "elsewhere has no metrics.jsonl" in refusal(capsys, "train", "--report", recipe)
    run.mkdir()
    assert "run has no metrics.jsonl" in refusal(capsys, "train", "--report", run)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 3.25}\n')
    for arguments in ([str(run)], [str(recipe), f"out={run}"]):
        assert main(["train", "--report", *arguments]) == 0
        path = run / "report.html"
        assert capsys.readouterr().out == f"{path}\n"
        assert "3.2500" in path.read_text()
        path.unlink()
    assert "'steps=3' cannot change a run that was" in refusal(capsys, "train", run, "steps=3", "--report")
    assert "RECIPE.toml" in refusal(capsys, "train", run)  # a directory is no recipe to train


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


def test_eval_takes_several_lengths_of_a_recall_suite_alone(model, capsys):
    from fourfold.cli.work import lengths

    assert lengths("4096") == 4096 and lengths("4K,1m") == [4096, 1 << 20]
    assert main(["eval", "bpb", "--cache-format", "fp8"]) == 2
    assert "--cache-format: bpb reads without a cache" in capsys.readouterr().err
    assert main(["eval", "bpb", "--length", "1K,2K"]) == 2
    assert "--length: bpb takes one, got 2" in capsys.readouterr().err
