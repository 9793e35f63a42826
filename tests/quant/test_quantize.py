"""Codes chosen on real inputs lose less than the nearest ones, and what a config says of them is checked."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fourfold import ops
from fourfold.config_media import MediaConfig
from fourfold.model.transformer import Model
from fourfold.quant import calibrate as calibration
from fourfold.quant.calibrate import Hessian, calibrate, calibration_documents, collect, in_batches
from fourfold.quant.gptq import gptq
from fourfold.quant.model import prepare, quantizable, quantize_model
from fourfold.quant.modules import ALL_KINDS, FP8_BLOCK, QuantizedLinear, QuantizedTable, QuantizedWeight
from fourfold.quant.section import Quantization, quantization_of
from fourfold.weights.checkpoint import load_tokenizer, resolve
from tests.model import tiny

MOE = {
    "moe.n_routed_experts": 6,
    "moe.num_experts_per_tok": 2,
    "moe.moe_intermediate_size": 8,
    "moe.n_shared_experts": 1,
    "moe.first_k_dense_replace": 1,
    "mtp.num_layers": 1,
    "engram.layer_ids": [1],
    "engram.vocab_size": 101,
    "engram.head_dim": 4,
}


def made() -> Model:
    return tiny.model(tiny.config(**MOE), 0)


def documents(model: Model, n: int = 30) -> list:
    return [tiny.document(model.cfg, 40, seed=seed) for seed in range(n)]


def inputs(columns: int, n: int = 400, seed: int = 0) -> Tensor:
    """Inputs that go together and differ in size, as those of real layers do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)[:, None]
    return torch.randn(n, columns, generator=generator) @ mixing


def dequantized(codes: Tensor, scales: Tensor, kind: str, group: int, columns: int) -> Tensor:
    return ops.dequantize_int8(codes, scales) if kind == "int8" else ops.dequantize_int4(codes, scales, group, columns)


# ---------------------------------------------------------------- rounding


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("kind", "group"), [("int4", 32), ("int4", 64), ("int4", 128), ("int8", 32)])
def test_outputs_are_nearer_than_those_of_the_nearest_codes(kind, group, act_order):
    columns = 160  # no multiple of 64 or 128: the last group is short
    w, x = torch.randn(24, columns, generator=torch.Generator().manual_seed(1)), inputs(columns)
    nearest = ops.quantize_int8(w) if kind == "int8" else ops.quantize_int4(w, group)
    chosen = gptq(w, x.T @ x / len(x), kind, group, act_order)
    assert [t.dtype for t in chosen] == [t.dtype for t in nearest]
    assert [t.shape for t in chosen] == [t.shape for t in nearest]
    off = [(x @ (dequantized(*pair, kind, group, columns) - w).T).square().mean() for pair in (chosen, nearest)]
    assert off[0] < 0.6 * off[1]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.sampled_from((32, 64, 128)), st.integers(0, 2**16))
def test_inputs_that_do_not_go_together_leave_the_nearest_codes(rows, columns, group, seed):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    codes, scales = gptq(w, torch.eye(columns), "int4", group, search=False)
    wanted = ops.quantize_int4(w, group)
    assert torch.equal(scales, wanted[1])
    off = ops.unpack_nibbles(codes, columns).int() - ops.unpack_nibbles(wanted[0], columns).int()
    assert off.abs().max() <= 1 and (off != 0).float().mean() <= 0.02 + 1 / off.numel()  # ties alone


def test_inputs_that_are_never_there_and_bad_hessians():
    w = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    for hessian in (torch.zeros(40, 40), torch.diag(torch.arange(40.0) > 20).float()):
        codes, scales = gptq(w, hessian, "int4")
        assert (ops.dequantize_int4(codes, scales, 32, 40) - w).abs().max() < 0.6
    with pytest.raises(ValueError, match=r"finite hessian of shape \[40, 40\], not \[39, 39\]"):
        gptq(w, torch.eye(39), "int4")
    with pytest.raises(ValueError, match="finite hessian"):
        gptq(w, torch.full((40, 40), torch.nan), "int4")
    with pytest.raises(ValueError, match="not of fp8"):
        gptq(w, torch.eye(40), "fp8")
    with pytest.raises(ValueError, match="NaN"):
        gptq(torch.full((3, 40), torch.nan), torch.eye(40), "int4")


# ---------------------------------------------------------------- calibration


@torch.no_grad()
def test_hessians_are_those_of_what_the_layers_read():
    model = made()
    seen: list[Tensor] = []
    names = [n for n in quantizable(model) if n.startswith("layers.1.")]
    stack = model.layers[1].mlp.gate_up_proj
    units = [(n, e) for n in names for e in (range(len(stack)) if "shared" not in n and "mlp." in n else [None])]
    hook = model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    found = collect(model, in_batches(documents(model, 5)), units)
    hook.remove()
    x = torch.cat(seen)
    assert found["layers.1.self_attn.o_proj.weight", None].count == len(x) == 200
    assert torch.allclose(found["layers.1.self_attn.o_proj.weight", None].total, x.T @ x, atol=1e-4)
    for child in ("gate_up_proj", "down_proj"):
        routed = [found[f"layers.1.mlp.{child}", e] for e in range(6)]
        assert sum(hessian.count for hessian in routed) == 2 * 200
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())
    assert model.layers[1].mlp.dispatch is None


def test_a_calibrated_model_is_nearer_and_the_same_each_time():
    original = made()
    seen, unseen = documents(original), documents(original, 36)[30:]
    wanted = tiny.logits(original, *unseen).log_softmax(-1)

    def off(model: Model) -> float:
        got = tiny.logits(model, *unseen).log_softmax(-1)
        return float((wanted.exp() * (wanted - got)).sum(-1).mean())

    models = [copy.deepcopy(original) for _ in range(2)]
    chosen = [calibrate(model, seen, "int4") for model in models]
    assert chosen[0].keys() == chosen[1].keys()
    for unit, pair in chosen[0].items():
        assert all(torch.equal(a, b) for a, b in zip(pair, chosen[1][unit], strict=True)), unit
    assert {name for name, _ in chosen[0]} == {n for n in quantizable(original) if not n.endswith("embed.weight")}
    nearest = quantize_model(copy.deepcopy(original), "int4")
    table = nearest.engrams["1"].embed.dequantize()
    with torch.no_grad():
        models[0].engrams["1"].embed.weight.copy_(table)
    assert off(models[0]) < 0.9 * off(nearest)


def test_a_small_budget_takes_more_passes_and_finds_all():
    model = made()
    units = [u for p in calibration._passes(model, dict(model.named_parameters()), 2**31) for u in p]
    few = list(calibration._passes(model, dict(model.named_parameters()), 4 * 24**2 * 3))
    assert [u for p in few for u in p] == units and max(map(len, few)) > 1
    assert units[0][0].startswith("layers.0") and units[-1][0].startswith("mtp")
    places = [name.split(".")[:2] for name, _ in units]
    assert places.index(["engrams", "1"]) < places.index(["layers", "1"])


def test_what_hardly_anything_came_to_is_rounded_to_the_nearest():
    model = made()
    wanted = quantize_model(copy.deepcopy(model), "int4")
    chosen = calibrate(model, documents(model, 1)[:1], "int4")  # 40 tokens of 24 inputs; few for an expert
    stack = wanted.layers[1].mlp.gate_up_proj
    same = [torch.equal(chosen["layers.1.mlp.gate_up_proj", e][1], stack.scales[e]) for e in range(6)]
    assert any(same)


@pytest.mark.parametrize(("kind", "message"), [("fp8", "fp8 rounds to the nearest"), ("int3", "'int3' is unknown")])
def test_kinds_that_are_not_calibrated(kind, message):
    with pytest.raises(ValueError, match=message):
        calibrate(made(), [], kind)


def test_documents_to_calibrate_on(tmp_path, monkeypatch):
    monkeypatch.setenv("FOURFOLD_DATA", str(tmp_path / "nothing"))
    tokenizer, media = load_tokenizer(resolve("nano")), MediaConfig()
    made_up = calibration_documents(None, tokenizer, media, 500)
    assert 500 <= sum(map(len, made_up)) < 2500
    again = calibration_documents(None, tokenizer, media, 500)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(made_up, again, strict=True))
    text = tmp_path / "a.txt"
    text.write_text("Here is some text to run through a model. " * 300)
    assert max(map(len, calibration_documents(text, tokenizer, media, 1500))) == 1024
    samples = tmp_path / "a.jsonl"
    samples.write_text(
        '{"text": "one"}\n{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    assert len(calibration_documents(samples, tokenizer, media, 1500)) == 2  # and not the same again and again
    text.write_bytes(b"\xff\xfe\x00")
    for bad, message in ((text, "neither .jsonl nor text"), (tmp_path / "none.txt", "is not a file")):
        with pytest.raises(ValueError, match=message):
            calibration_documents(bad, tokenizer, media)
    text.write_text("")
    with pytest.raises(ValueError, match="holds nothing"):
        calibration_documents(text, tokenizer, media)


def test_hessian_counts():
    hessian = Hessian(torch.zeros(2, 2))
    hessian.add(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    assert hessian.count == 2 and hessian.total.tolist() == [[1.0, 2.0], [2.0, 5.0]]


# ---------------------------------------------------------------- modules


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**16))
def test_fp8_in_blocks(rows, columns, seed):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    linear = QuantizedLinear((rows, columns), "fp8")
    starts = list(range(0, rows, 128))
    for start in reversed(starts):
        linear.put(None, start, w[start : start + 128])
    off = (linear.weight - w).abs()
    assert bool((off <= torch.maximum(w.abs() / 16, torch.tensor(float(w.abs().max()) / 448 / 2**9))).all())
    table = QuantizedTable((rows, columns), "fp8", torch.float32, "cpu")
    table.codes, table.scales = linear.codes, linear.scales
    some = torch.tensor([[0, rows - 1], [rows // 2, 0]])
    assert torch.equal(table(some), linear.weight[some])
    linear.bfloat16()
    assert linear.codes.dtype == torch.float8_e4m3fn and linear.scales.dtype == torch.float32


def test_fp8_rows_come_in_whole_blocks():
    linear = QuantizedLinear((300, 8), "fp8")
    for start, stop in ((0, 100), (1, 129), (128, 200)):
        with pytest.raises(ValueError, match="cut a block of 128"):
            linear.put(None, start, torch.zeros(stop - start, 8))
    linear.put(None, 256, torch.zeros(44, 8))
    assert FP8_BLOCK == (128, 128)


@pytest.mark.parametrize("group", [64, 128])
def test_groups(group):
    w, x = torch.randn(6, 200), torch.randn(3, 200)
    linear = QuantizedLinear((6, 200), "int4", group=group)
    linear.put(None, 0, w)
    wanted = ops.dequantize_int4(*ops.quantize_int4(w, group), group, 200)
    assert torch.equal(linear.weight, wanted) and (linear(x) - x @ wanted.T).abs().max() < 0.5
    assert linear.state_dict()["scales"].shape == (6, -(-200 // group))


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_some_weights_alone(kind):
    model = made()
    some = [n for n in quantizable(model) if "mlp" in n]
    made_of = prepare(model, kind, only=some)
    assert made_of.keys() == set(some)
    assert {n for n, m in model.named_modules() if isinstance(m, QuantizedWeight)} == {
        n.removesuffix(".weight") for n in some
    }
    with pytest.raises(ValueError, match="cannot hold layers.0.self_attn.kv_b_proj.weight quantised"):
        prepare(made(), kind, only=["layers.0.self_attn.kv_b_proj.weight"])


# ---------------------------------------------------------------- the section of config.json


def test_section_round_trip():
    model = quantize_model(made(), "int4", 64)
    section = quantization_of(model)
    assert section is not None and set(section.weights) == set(quantizable(made()))
    assert Quantization.from_dict(section.to_dict()) == section
    assert quantization_of(made()) is None
    model.layers[0].mlp.gate_proj = QuantizedLinear((32, 24), "int8")
    with pytest.raises(ValueError, match="several kinds"):
        quantization_of(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "int3"}, "'int3' is unknown"),
        ({"kind": ["int4"]}, "is unknown"),
        ({"kind": None}, "None is unknown"),
        ({"group": 48}, "group: is 48; choose one of 32, 64, 128"),
        ({"group": "32"}, "group: is '32'"),
        ({"weights": "all"}, "must be a list of names"),
        ({"weights": [1]}, "must be a list of names"),
        ({"method": "magic"}, "method: is 'magic'"),
        ({"bits": 4}, "quantization.bits: is unknown"),
    ],
)
def test_sections_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Quantization.from_dict({"kind": "int4", "group": 32, "weights": []} | change)
    with pytest.raises(ValueError, match="must be a table"):
        Quantization.from_dict([])
