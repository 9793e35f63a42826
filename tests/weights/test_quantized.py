"""Quantised directories: written whole or not at all, and loaded as what was written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import fourfold
from fourfold.cli import main
from fourfold.eval import fidelity
from fourfold.model.transformer import Model
from fourfold.quant.model import quantize_model
from fourfold.quant.modules import ALL_KINDS, QuantizedWeight
from fourfold.weights import quantized
from fourfold.weights.checkpoint import load_model, load_tokenizer, open_source, resolve, save_model
from fourfold.weights.export import convert
from fourfold.weights.quantized import Shards, quantize
from fourfold.weights.tensors import CheckpointError, SafetensorsReader
from tests.model import tiny

MAKES = {
    "mla": {
        "attention.q_lora_rank": 10,
        "residual.kind": "mhc",
        "media": tiny.MEDIA,
        "moe.n_routed_experts": 6,
        "moe.num_experts_per_tok": 2,
        "moe.moe_intermediate_size": 8,
        "moe.n_shared_experts": 1,
        "moe.first_k_dense_replace": 1,
        "mtp.num_layers": 1,
        "engram.layer_ids": [1],
        "engram.vocab_size": 101,
        "engram.head_dim": 4,
        "indexer.mode": "sparse",
        "indexer.n_heads": 4,
        "indexer.head_dim": 8,
        "indexer.topk": 5,
    },
    "compressed": tiny.COMPRESSED,
    "gqa": {"attention.kind": "gqa", "attention.qkv_bias": True},
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve("nano"))


@pytest.fixture(scope="module", params=MAKES)
def wide(request, tmp_path_factory, tokenizer) -> Path:
    """A directory in bf16."""
    directory = tmp_path_factory.mktemp("wide") / request.param
    model = tiny.model(tiny.config(vocab_size=tokenizer.vocab_size, **MAKES[request.param]), 0)
    save_model(directory, model, tokenizer, torch.bfloat16)
    return directory


@pytest.fixture(scope="module")
def small(tmp_path_factory, tokenizer) -> Path:
    """One make of them in int4."""
    model = tiny.model(tiny.config(vocab_size=tokenizer.vocab_size, intermediate_size=80, **MAKES["mla"]), 0)
    place = tmp_path_factory.mktemp("small")
    save_model(place / "wide", model, tokenizer, torch.bfloat16)
    quantize(place / "wide", place / "int4", "int4", shard_bytes=20_000)
    return place / "int4"


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(*(t.view(torch.uint8) if t.element_size() == 1 else t for t in (a, b)))


def assert_same(got: Model, wanted: Model) -> None:
    a, b = got.state_dict(), wanted.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert same(a[name], b[name]), name


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize(("kind", "group"), [("int8", 32), ("int4", 32), ("int4", 128), ("fp8", 32)])
def test_what_loads_is_the_wide_model_quantised(wide, kind, group, tmp_path, monkeypatch):
    monkeypatch.setattr(quantized, "CHUNK", 1)  # rows in many pieces
    written = quantize(wide, tmp_path / "q", kind, group, shard_bytes=30_000)
    assert written.kind == kind and written.method == "nearest" and written.tokens == 0
    assert len(list((tmp_path / "q").glob("model-*-of-*.safetensors"))) > 2
    assert (
        written.bytes
        == json.loads((tmp_path / "q" / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    )
    section = json.loads((tmp_path / "q" / "config.json").read_text())["quantization"]
    assert section["kind"] == kind and section.get("group") == (group if kind == "int4" else None)
    model, tokenizer = load_model(tmp_path / "q")
    assert_same(model, quantize_model(load_model(wide)[0], kind, group))
    batch = [tiny.document(model.cfg, 20, seed=0)]
    again = tmp_path / "again"
    save_model(again, model, tokenizer)  # a quantised model is saved like any other
    assert_same(load_model(again)[0], model)
    assert torch.equal(tiny.logits(load_model(again)[0], *batch), tiny.logits(model, *batch))
    half = load_model(again, torch.bfloat16, quant=kind)[0]
    assert {m.dtype for m in half.modules() if isinstance(m, QuantizedWeight)} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_bundled_model(kind, tmp_path, capsys):
    assert main(["quantize", "nano", str(tmp_path / "q"), "--to", kind, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    size = sum(file.stat().st_size for file in (tmp_path / "q").glob("*.safetensors"))
    assert said["bytes"] < size < said["bytes"] + 60_000
    assert main(["inspect", str(tmp_path / "q"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    label = "int4 in 32s" if kind == "int4" else kind
    assert found["faults"] == [] and found["storage"]["dense_ffn"] == {label: 294_912}
    assert found["storage"]["routed_experts"] == {label: found["params"]["by_part"]["routed_experts"]}
    model = fourfold.load(str(tmp_path / "q"))
    assert model.generate("What is 2 + 3?", max_tokens=8).strip() == "5"
    model.close()
    if kind != "int4":
        return
    plain = fourfold.load("nano", quant="int4")
    assert_same(model.model, plain.model)
    plain.close()


def test_calibrated(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FOURFOLD_DATA", str(tmp_path / "nothing"))
    monkeypatch.setattr(fidelity, "DOCUMENTS", 10)
    monkeypatch.setattr(
        fidelity, "SUITES", {name: fidelity.SUITES[name] for name in ("arithmetic", "tones", "fashion")}
    )
    arguments = [
        "--to",
        "int4",
        "--calibrate",
        "--tokens",
        "600",
        "--samples",
        "1",
        "--report",
        str(tmp_path / "r.json"),
    ]
    assert main(["quantize", "nano", str(tmp_path / "q"), *arguments]) == 0
    shown = capsys.readouterr().out
    assert "chosen on" in shown and "arithmetic" in shown and "KL, nats" in shown
    said = json.loads((tmp_path / "r.json").read_text())
    score = said["report"]["tokens"]["skills"]
    assert 0 < score["kl"] < 0.05 and score["same_choice"] > 0.8
    assert 0.9 < score["perplexity"] / score["perplexity_reference"] < 1.1
    assert said["report"]["bytes"]["quantised"] < 0.6 * said["report"]["bytes"]["bf16"]
    assert said["report"]["tasks"].keys() == {"arithmetic", "tones"}  # what needs no corpus
    assert json.loads((tmp_path / "q" / "config.json").read_text())["quantization"]["method"] == "gptq"
    assert not torch.equal(
        *(
            load_model(p, quant="int4")[0].state_dict()["layers.1.mlp.down_proj.codes"]
            for p in (tmp_path / "q", resolve("nano"))
        )
    )


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.int8, torch.float8_e4m3fn, torch.int64]),
            st.lists(st.integers(1, 5), min_size=1, max_size=3),
        ),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 400),
    st.randoms(use_true_random=False),
)
def test_rows_in_any_order_make_the_files_that_safetensors_reads(tmp_path_factory, tensors, limit, rng):
    directory = tmp_path_factory.mktemp("shards")
    wanted = {f"t{i}": torch.randint(0, 100, shape).to(dtype) for i, (dtype, shape) in enumerate(tensors)}
    shards = Shards(directory, {n: t.to("meta") for n, t in wanted.items()}, limit)
    pieces = []
    for name, tensor in wanted.items():
        for index in range(len(tensor)) if tensor.dim() == 3 else [None]:
            of = tensor if index is None else tensor[index]
            pieces += [(name, () if index is None else (index,), row, of[row : row + 1]) for row in range(len(of))]
    rng.shuffle(pieces)
    for piece in pieces:
        shards.put(*piece)
    shards.close()
    shards.write_index()
    reader = SafetensorsReader(directory)
    assert set(reader.names()) == set(wanted)
    assert all(same(reader.read(name), tensor) for name, tensor in wanted.items())
    theirs = {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}
    assert all(same(theirs[name], tensor) for name, tensor in wanted.items())


# ---------------------------------------------------------------- whole or not at all


def test_a_broken_off_run_leaves_nothing(tmp_path, monkeypatch):
    calls = []

    def stop(self, *args):
        calls.append(args)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return plain(self, *args)

    plain = Shards.put
    monkeypatch.setattr(Shards, "put", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize("nano", tmp_path / "q", "int8")
    assert list(tmp_path.iterdir()) == []

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Shards, "put", full)
    assert main(["quantize", "nano", str(tmp_path / "q"), "--to", "int8"]) == 2
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 5))
    with pytest.raises(CheckpointError, match="needs .* bytes, 5 are free"):
        quantize("nano", tmp_path / "q", "int8")


def test_refusals(small, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    for arguments, message in (
        (["nano", str(tmp_path / "full"), "--to", "int4"], "is there already"),
        (["nano", str(tmp_path / "q"), "--to", "int3"], "'int3' is unknown; choose one of int8, int4, fp8"),
        (["nano", str(tmp_path / "q"), "--to", "int4", "--group", "48"], "group: is 48; choose one of 32, 64, 128"),
        ([str(small), str(tmp_path / "q"), "--to", "int4"], "holds int4 already"),
        (["nano", str(tmp_path / "q"), "--to", "int4", "--calibrate", "nowhere.txt"], "nowhere.txt is not a file"),
        (["nano", str(tmp_path / "q"), "--to", "fp8", "--calibrate"], "fp8 rounds to the nearest"),
        (["nano", str(tmp_path / "q"), "--to", "int4", "--tokens", "0"], "--tokens: is 0; must be at least 1"),
        (["nowhere", str(tmp_path / "q"), "--to", "int4"], "'nowhere' is neither"),
    ):
        assert main(["quantize", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "q").exists()
    with pytest.raises(CheckpointError, match="holds int4; convert the model"):
        convert(small, tmp_path / "q")
    with pytest.raises(CheckpointError, match="hold int4, which cannot become int8"):
        load_model(small, quant="int8")


# ---------------------------------------------------------------- damaged files


def damaged(small: Path, tmp_path: Path) -> tuple[Path, dict[str, Tensor], dict]:
    """A copy in one file, to be changed and written back."""
    directory = tmp_path / "damaged"
    shutil.copytree(small, directory)
    tensors = {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}
    for file in directory.glob("model*"):
        file.unlink()
    return directory, tensors, json.loads((directory / "config.json").read_text())


CODES, SCALES = "layers.0.mlp.gate_proj.codes", "layers.0.mlp.gate_proj.scales"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: t[SCALES].fill_(torch.nan), f"{SCALES} holds NaN or infinity"),
        (lambda t, c: t[SCALES].fill_(torch.inf), f"{SCALES} holds NaN or infinity"),
        (lambda t, c: t[SCALES].neg_(), f"{SCALES} holds scales that are not positive"),
        (lambda t, c: t.update({SCALES: t[SCALES].repeat(1, 2)}), f"{SCALES} has shape"),
        (lambda t, c: t.update({CODES: t[CODES].to(torch.int8)}), f"{CODES} is stored as I8, must be U8"),
        (lambda t, c: t.pop(SCALES), f"{SCALES} is missing"),
        (lambda t, c: t.pop(CODES), f"{CODES} is missing"),
        (lambda t, c: c["quantization"].update(group=64), "has shape"),
        (lambda t, c: c["quantization"].update(kind="int3"), "'int3' is unknown"),
        (lambda t, c: c["quantization"].update(kind="fp8"), "must be F8_E4M3"),
        (lambda t, c: c["quantization"]["weights"].append("norm.weight"), "cannot hold norm.weight quantised"),
        (
            lambda t, c: c["quantization"]["weights"].remove("layers.0.mlp.gate_proj.weight"),
            "gate_proj.weight is missing",
        ),
        (lambda t, c: c.update(quantization=[]), "quantization: must be a table"),
        (lambda t, c: c.pop("quantization"), "is not part of this model"),
    ],
)
def test_damaged_files_are_refused(small, tmp_path, change, message):
    directory, tensors, config = damaged(small, tmp_path)
    change(tensors, config)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_model(directory)


def test_damaged_codes_of_other_kinds(tmp_path):
    for kind, name in (("int8", "layers.0.mlp.gate_proj.codes"), ("fp8", "layers.0.mlp.gate_proj.codes")):
        quantize("nano", tmp_path / kind, kind)
        tensors = load_file(tmp_path / kind / "model.safetensors")
        tensors[name].view(torch.uint8)[3, 4] = 128 if kind == "int8" else 127
        save_file(tensors, tmp_path / kind / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"{name} holds {'-128' if kind == 'int8' else 'NaN'}"):
            load_model(tmp_path / kind)


def test_bad_weights_are_named(tmp_path, tokenizer):
    model = tiny.model(tiny.config(vocab_size=tokenizer.vocab_size, **MAKES["mla"]), 0)
    with torch.no_grad():
        model.layers[1].mlp.down_proj[3, 2, 1] = torch.inf
    save_model(tmp_path / "wide", model, tokenizer)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj holds NaN or infinity"):
        quantize(tmp_path / "wide", tmp_path / "q", "int4")
    assert not (tmp_path / "q").exists()


# ---------------------------------------------------------------- memory


def test_no_wide_model_is_ever_made(small, monkeypatch):
    """Loading allocates parameters on the meta device alone, and codes."""
    source = open_source(small)
    assert all(tensor.is_meta for tensor in source.wanted.values())
    assert sum(t.nbytes for t in load_model(small)[0].state_dict().values()) < 2.6 * sum(
        file.stat().st_size for file in small.glob("*.safetensors")
    )  # what is kept is bf16 on disk


MEASURED = """
import sys
from pathlib import Path
import torch
import fourfold.weights.quantized as quantized

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

torch.set_num_threads(1)
quantized.CHUNK = 1 << 16
quantized.quantize(sys.argv[1], sys.argv[2] + "/first", "int4")
before = peak()
quantized.quantize(sys.argv[3], sys.argv[2] + "/second", "int4")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read where Linux tells it")
def test_the_peak_is_some_rows_and_a_stack_of_the_mapped_file(tmp_path, tokenizer):
    big = {"hidden_size": 256, "attention.kind": "gqa", "tie_word_embeddings": True}
    moe = {"moe.n_routed_experts": 32, "moe.num_experts_per_tok": 2, "moe.moe_intermediate_size": 256}
    moe |= {"moe.first_k_dense_replace": 0}
    for name, overrides in (("little", {}), ("big", big | moe)):
        cfg = tiny.config(vocab_size=tokenizer.vocab_size, **overrides)
        save_model(tmp_path / name, Model(cfg).bfloat16(), tokenizer)
    size = (tmp_path / "big" / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "little"), str(tmp_path), str(tmp_path / "big")]
    out = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert size > 40e6 and out < 0.4 * size, (out, size)
