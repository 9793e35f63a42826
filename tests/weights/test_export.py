"""Models leave in the formats that others read, come back the same, and go from any format into any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from fourfold.model.sequence import Document
from fourfold.model.transformer import Model
from fourfold.weights import formats
from fourfold.weights.checkpoint import load_model, open_source, save_model
from fourfold.weights.export import convert, export_model
from fourfold.weights.families import FAMILIES
from fourfold.weights.families.base import FLOAT32
from fourfold.weights.families.entries import by_disk_name
from fourfold.weights.tensors import CheckpointError
from tests.model import tiny
from tests.weights.released import VOCAB, tiny_config
from tests.weights.test_load import equal, text

JUDGED = [name for name in FAMILIES if name not in ("deepseek", "deepseek_v41")]  # transformers has no class of these
BAR = 2e-5


def stored(directory: Path) -> dict[str, tuple[str, list[int]]]:
    """dtype and shape of every tensor of a directory."""
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                view = file.get_slice(name)
                found[name] = (view.get_dtype(), view.get_shape())
    return found


@torch.no_grad()
def judged(directory: Path, document: Document) -> torch.Tensor:
    judge = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", experts_implementation="eager")
    return judge(input_ids=document.tokens[None], use_cache=False).logits[0]


# ---------------------------------------------------------------- others read what we write


@pytest.mark.parametrize("dialect", ["released", "transformers"])
@pytest.mark.parametrize("name", JUDGED)
def test_transformers_loads_what_is_written_and_agrees(name, dialect, models, family_tokenizer, tmp_path, caplog):
    written = export_model(models[name], family_tokenizer, tmp_path / "out", name, dialect)
    assert (written.family, written.dialect, written.storage) == (name, dialect, "fp32")
    ours = tiny.logits(models[name], text())
    assert (judged(written.path, text()) - ours).abs().max() <= BAR
    equal(load_model(written.path)[0], models[name])
    assert open_source(written.path).dialect == ("transformers" if name != "deepseek_v4" else dialect)
    assert AutoTokenizer.from_pretrained(written.path).encode("the fox", add_special_tokens=False) == (
        family_tokenizer.encode("the fox")
    )


def test_a_model_of_our_own_making_that_v4_can_express(family_tokenizer, tmp_path):
    """Composed by hand, not read from anywhere: wider, deeper, other ratios."""
    cfg = tiny_config(
        "deepseek_v4",
        num_hidden_layers=5,
        hidden_size=32,
        **{
            "attention.compress_ratios": [8, 4, 0, 4, 8],
            "residual.hc_mult": 3,
            "moe.num_hash_layers": 0,
            "mtp.num_layers": 0,
        },
    )
    model = tiny.model(cfg, seed=3)
    for dialect in ("released", "transformers"):
        path = export_model(model, family_tokenizer, tmp_path / dialect, "deepseek_v4", dialect).path
        assert (judged(path, text(60)) - tiny.logits(model, text(60))).abs().max() <= BAR


# ---------------------------------------------------------------- number formats


@pytest.mark.parametrize(
    ("name", "storage"),
    [(name, storage) for name, family in FAMILIES.items() for storage in family.storages if storage != "fp32"],
)
def test_every_storage_comes_back_as_its_formats_round(name, storage, models, family_tokenizer, tmp_path):
    """What is loaded is, number by number, what each tensor's format makes of the original."""
    model, family = models[name], FAMILIES[name]
    directory = export_model(model, family_tokenizer, tmp_path / "out", name, storage=storage).path
    loaded = load_model(directory)[0].state_dict()
    state = model.state_dict()
    plan = family.plan(model.cfg, "released")
    parameters = dict(model.named_parameters())
    for disk, pieces in by_disk_name(plan, {name: tuple(t.shape) for name, t in state.items()}).items():
        parts = [
            [t[p.ours][p.leaf.leading][p.leaf.start :][: p.leaf.shape[0]] for t in (state, loaded)] for p in pieces
        ]
        before, after = (torch.cat(side, dim=pieces[0].leaf.part.dim) for side in zip(*parts, strict=True))
        if pieces[0].ours in parameters and not pieces[0].ours.endswith(FLOAT32):
            kind = storage if storage == "bf16" else family.tensor_format(disk, storage)
            encoded = formats.encode(before, kind, disk)
            before = formats.decode(encoded.pop("weight"), *encoded.values())
        assert torch.equal(before, after), disk


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v32", "deepseek_v4", "deepseek_v41"])
def test_what_steers_is_never_fp8(name, models, family_tokenizer, tmp_path):
    storage = FAMILIES[name].storages[-1]
    directory = export_model(models[name], family_tokenizer, tmp_path / "out", name, storage=storage).path
    found = stored(directory)
    steering = ("norm", "embed.weight", "embed_tokens", "head.weight", "gate.weight", "weights_proj", "eh_proj", "ape")
    for tensor, (dtype, _) in found.items():
        if any(part in tensor for part in steering) and ".engram.embed." not in tensor:
            assert dtype in ("BF16", "F32"), tensor
        if "hc_" in tensor or tensor.endswith(("attn_sink", "gate.bias", "e_score_correction_bias", ".ape")):
            assert dtype == "F32", tensor
        if tensor.endswith("tid2eid"):
            assert dtype == "I64"
    kinds = {dtype for dtype, _ in found.values()}
    assert kinds >= ({"F8_E4M3", "F32", "BF16"} if "3" in name else {"F8_E4M3", "F8_E8M0", "I8", "F32", "BF16"})
    config = json.loads((directory / "config.json").read_text())
    block = [32, 32] if name == "deepseek_v41" else [128, 128]
    assert config["quantization_config"]["weight_block_size"] == block and config["torch_dtype"] == "bfloat16"
    if name == "deepseek_v4":
        assert config["expert_dtype"] == "fp4"


# ---------------------------------------------------------------- shards


def test_shards_hold_no_more_than_the_limit(models, family_tokenizer, tmp_path):
    one = export_model(models["deepseek_v3"], family_tokenizer, tmp_path / "one", "deepseek_v3")
    many = export_model(models["deepseek_v3"], family_tokenizer, tmp_path / "many", "deepseek_v3", shard_bytes=20_000)
    assert (one.tensors, one.bytes) == (many.tensors, many.bytes)
    assert [p.name for p in one.path.glob("*.safetensors")] == ["model.safetensors"]
    shards = sorted(many.path.glob("*.safetensors"))
    count = len(shards)
    assert count > 5 and [p.name for p in shards] == [
        f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)
    ]
    index = json.loads((many.path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == many.bytes and len(index["weight_map"]) == many.tensors
    for path in shards:
        with safe_open(path, "pt") as file:
            sizes = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118
        assert sum(sizes) <= 20_000 or len(sizes) == 1
    equal(load_model(many.path)[0], models["deepseek_v3"])


# ---------------------------------------------------------------- converting


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_again(name, models, directories, tmp_path):
    """Released, our own, released in shards: no bit is lost, and without a name the right family is found."""
    own = convert(directories[name], tmp_path / "own")
    assert own.family == "native" and own.storage == "fp32"
    equal(load_model(own.path)[0], models[name])
    back = convert(own.path, tmp_path / "back", shard_bytes=30_000)
    assert back.family == name
    equal(load_model(back.path)[0], models[name])
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        if file != "model.safetensors":
            assert json.loads((back.path / file).read_text()) == json.loads((directories[name] / file).read_text())
    assert stored(back.path) == stored(directories[name])


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v4", "deepseek_v41"])
def test_low_precision_is_widened_and_narrowed_again_without_loss(name, models, family_tokenizer, tmp_path):
    """fp8 and fp4 are exact in bfloat16, and what they were they become again where scales are powers of two."""
    storage = FAMILIES[name].storages[-1]
    low = export_model(models[name], family_tokenizer, tmp_path / "low", name, storage=storage).path
    wide = convert(low, tmp_path / "wide", storage="fp32").path
    equal(load_model(wide)[0], load_model(low)[0])
    if name != "deepseek_v3":
        again = convert(wide, tmp_path / "again", name, storage=storage).path
        equal(load_model(again)[0], load_model(low)[0])


def test_what_says_how_to_talk_goes_along(copied, tmp_path):
    source = copied("deepseek_v4")
    (source / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    (source / "encoding").mkdir()
    (source / "encoding" / "words.py").write_text("TOOLS = 'words'\n")
    (source / "encoding" / "weights.bin").write_bytes(b"x")
    (source / "notes.txt").write_text("stays")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"eos_token_id": [1, 5]}))
    (source / "generation_config.json").unlink()
    out = convert(source, tmp_path / "out").path
    assert (out / "tokenizer_config.json").read_text() == '{"eos_token": "x"}'
    assert [p.name for p in (out / "encoding").iterdir()] == ["words.py"] and not (out / "notes.txt").exists()
    assert "eos_token_id" in json.loads((out / "generation_config.json").read_text())


def test_progress_goes_to_stderr(directories, tmp_path, capfd):
    convert(directories["llama"], tmp_path / "out", progress=True)
    out, err = capfd.readouterr()
    assert not out and "writing" in err


# ---------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def native(family_tokenizer, tmp_path_factory) -> Path:
    """One of our own that no family can express."""
    cfg = tiny.config(vocab_size=VOCAB, media=tiny.MEDIA, **{"engram.layer_ids": [1], "engram.vocab_size": 101})
    directory = tmp_path_factory.mktemp("native") / "model"
    save_model(directory, tiny.model(cfg), family_tokenizer)
    return directory


def refused(*arguments, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_a_family_cannot_express_is_refused_by_name(native, tmp_path):
    said = refused(native, tmp_path / "out", "deepseek_v3")
    assert "engram.layer_ids = [1]" in said and "more fields" in said
    said = refused(native, tmp_path / "out")
    assert "no released family can express this model" in said and "engram.layer_ids" in said
    assert list(tmp_path.iterdir()) == []


def test_numbers_without_a_place_are_refused(models, family_tokenizer, tmp_path):
    """V2's routers have no bias: one that is not zero would be lost."""
    model = Model(models["deepseek_v2"].cfg)
    model.load_state_dict(models["deepseek_v2"].state_dict())
    model.layers[2].mlp.gate.bias[1] = 0.5
    with pytest.raises(CheckpointError, match="layers.2.mlp.gate.bias other than zero"):
        export_model(model, family_tokenizer, tmp_path / "out", "deepseek_v2")
    model = Model(models["deepseek_v41"].cfg)
    model.load_state_dict(models["deepseek_v41"].state_dict())
    model.compression.ids[3] += 1
    with pytest.raises(CheckpointError, match="compression.ids"):
        export_model(model, family_tokenizer, tmp_path / "out", "deepseek_v41")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"family": "gpt"}, "family: is 'gpt'"),
        ({"family": "llama", "dialect": "old"}, "dialect: is 'old'"),
        ({"family": "llama", "storage": "fp8"}, "storage: is 'fp8'"),
        ({"storage": "fp8+fp4"}, "storage: is 'fp8+fp4'"),
        ({"family": "qwen2"}, "attention.qkv_bias"),
    ],
)
def test_a_target_that_is_none_is_refused(options, said, directories, tmp_path):
    assert said in refused(directories["llama"], tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_v41_has_no_dialect_of_transformers(directories, tmp_path):
    assert "deepseek_v41 has released" in refused(
        directories["deepseek_v41"], tmp_path / "out", "deepseek_v41", "transformers"
    )


def test_nothing_is_overwritten(directories, tmp_path):
    (tmp_path / "out").mkdir()
    convert(directories["llama"], tmp_path / "out")  # an empty directory is as good as none
    for there in (tmp_path / "out", directories["llama"]):
        assert "is there already" in refused(directories["llama"], there)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_source_with_nan_leaves_nothing(number, copied, tmp_path):
    from tests.weights.test_load import change

    for name in ("llama", "deepseek_v3"):
        key = (
            "model.layers.1.mlp.down_proj.weight"
            if name == "llama"
            else "model.layers.1.mlp.experts.3.down_proj.weight"
        )
        source = change(copied(name), lambda t, k=key: t[k].__setitem__((2, 2), number))
        assert f"{key} holds NaN or infinity" in refused(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_broken_source_is_refused_before_anything_is_written(copied, tmp_path):
    source = copied("llama")
    (source / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused(source, tmp_path / "out")
    assert "neither bundled" in refused(tmp_path / "nothing", tmp_path / "out")


def test_a_full_disk_leaves_nothing(directories, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fourfold.weights.export.save_file", full)
    assert "cannot be written" in refused(directories["llama"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
