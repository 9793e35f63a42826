"""A quantised model computes with exactly the numbers that its codes stand for, whatever way they came in."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fourfold import ops
from fourfold.model.sequence import pack
from fourfold.model.transformer import Model
from fourfold.ops.cpu.quantized import route
from fourfold.quant.model import is_kept, prepare, quantize_model
from fourfold.quant.modules import KINDS, QuantizedLinear, QuantizedStack, QuantizedTable, QuantizedWeight
from fourfold.quant.modules import pack as pack_weights
from fourfold.weights.checkpoint import load_model, resolve
from tests.model import tiny

MOE = {
    "moe.n_routed_experts": 8,
    "moe.num_experts_per_tok": 3,
    "moe.moe_intermediate_size": 8,
    "moe.n_shared_experts": 1,
    "moe.first_k_dense_replace": 1,
    "mtp.num_layers": 1,
}
ENGRAM = {"engram.layer_ids": [1], "engram.vocab_size": 101, "engram.head_dim": 4}
INDEXER = {"indexer.mode": "sparse", "indexer.n_heads": 4, "indexer.head_dim": 8, "indexer.topk": 5}
MAKES = {
    "gqa": {"attention.kind": "gqa", "attention.qkv_bias": True},
    "mla": {"attention.q_lora_rank": 10, "residual.kind": "mhc", "media": tiny.MEDIA} | MOE | ENGRAM | INDEXER,
    "compressed": tiny.COMPRESSED | MOE | {"moe.swiglu_limit": 0.5},
}


def made(make: str, seed: int = 0) -> Model:
    return tiny.model(tiny.config(**MAKES[make]), seed)


def quantized(model: Model) -> dict[str, QuantizedWeight]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedWeight)}


def with_same_numbers(original: Model, model: Model) -> Model:
    """The float model whose weights are what the quantised one's codes stand for."""
    plain = copy.deepcopy(original)
    with torch.no_grad():
        for name, weight in quantized(model).items():
            suffix = ".weight" if isinstance(weight, (QuantizedLinear, QuantizedTable)) else ""
            plain.get_parameter(name + suffix).copy_(weight.dequantize())
    return plain


def documents(model: Model) -> list:
    return [tiny.document(model.cfg, n, seed=n) for n in (1, 9, 30)]


def assert_same(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape and (got - wanted).abs().max() <= 1e-5


def assert_near(got: Tensor, wanted: Tensor) -> None:
    """The same but for a few activations that a different order of additions has rounded the other way."""
    assert got.shape == wanted.shape and (got - wanted).norm() <= 0.02 * wanted.norm()


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("switch", [("FOURFOLD_BACKEND", "reference"), ("FOURFOLD_KERNELS", "torch")])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKES)
def test_logits_are_those_of_the_dequantised_model(make, kind, switch, monkeypatch):
    monkeypatch.setenv(*switch)
    original = made(make)
    model = quantize_model(copy.deepcopy(original), kind)
    plain = with_same_numbers(original, model)
    batch = documents(model)
    assert_same(tiny.logits(model, *batch), tiny.logits(plain, *batch))
    chunks = [tiny.random_chunks(len(d), random.Random(0)) for d in batch]
    for got, wanted in zip(tiny.decode(model, batch, chunks, 8), tiny.decode(plain, batch, chunks, 8), strict=True):
        assert_same(got, wanted)  # the absorbed form of the attention among them
    if model.mtp is not None:
        with torch.no_grad():
            assert_same(*(m(pack(batch), mtp=True).mtp_logits for m in (model, plain)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKES)
def test_kernels_round_activations_and_nothing_more(make, kind):
    """Close to the dequantised model, in bits, and the same for any cut into chunks and any batch."""
    original = made(make)
    model = quantize_model(copy.deepcopy(original), kind)
    plain, batch = with_same_numbers(original, model), documents(model)
    got, wanted = (tiny.logits(m, *batch).log_softmax(-1) for m in (model, plain))
    # the median: where rounding tips the choice of an expert or a key, a few positions are further off
    assert (wanted.exp() * (wanted - got)).sum(-1).median() < 1e-3
    chunks = [tiny.random_chunks(len(d), random.Random(0)) for d in batch]
    for document, logits in zip(batch, tiny.decode(model, batch, chunks, 8), strict=True):
        assert_near(logits, tiny.logits(model, document))


@pytest.mark.parametrize("make", MAKES)
def test_int8_is_near_and_int4_less_so(make):
    original = made(make)
    batch = documents(original)
    wanted = tiny.logits(original, *batch).log_softmax(-1)
    off = {}
    for kind in KINDS:
        got = tiny.logits(quantize_model(copy.deepcopy(original), kind), *batch).log_softmax(-1)
        off[kind] = (wanted.exp() * (wanted - got)).sum(-1).mean().item()
    assert 0 < off["int8"] < off["int4"] < 0.5 and off["int8"] < 0.02, off


@pytest.mark.parametrize("make", MAKES)
def test_what_is_quantised_and_what_is_kept(make):
    original = made(make)
    model = quantize_model(copy.deepcopy(original), "int4")
    gone = dict(original.named_parameters()).keys() - dict(model.named_parameters()).keys()
    for name, parameter in original.named_parameters():
        last = name.split(".")[-2] if name.endswith(".weight") else name.split(".")[-1]
        large = last.endswith("_proj") or last in ("kv_a_proj_with_mqa", "embed")
        inside = any(part in name for part in ("indexer.", "compressor.", "media."))
        sensitive = inside or last in ("kv_b_proj", "e_proj", "h_proj", "bias")
        assert (name in gone) == (large and not sensitive), name
        if name not in gone:
            assert torch.equal(model.get_parameter(name), parameter)
    assert is_kept("lm_head") and is_kept("mtp.e_proj") and not is_kept("mtp.block.self_attn.o_proj")
    assert is_kept("layers.0.self_attn.compressor.kv_proj") and not is_kept("layers.0.self_attn.kv_proj")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKES)
def test_bytes(make, kind):
    original, model = made(make), quantize_model(made(make), kind)
    for name, weight in quantized(model).items():
        *rows, columns = weight.shape
        count = math.prod(rows)
        wanted = {
            "int8": count * (columns + 4),
            "int4": count * (math.ceil(columns / 2) + 2 * math.ceil(columns / 32)),
        }[kind]
        assert sum(b.nbytes for b in weight.buffers()) == wanted, name
        assert not list(weight.parameters()) or weight.bias is not None
    assert sum(t.nbytes for t in model.state_dict().values()) < sum(t.nbytes for t in original.state_dict().values())


# ---------------------------------------------------------------- filling and saving


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKES)
def test_pieces_in_any_order_give_the_same_codes(make, kind):
    """A model on the meta device, filled row by row as a loader would."""
    original = made(make)
    with torch.device("meta"):
        model = Model(original.cfg)
    slots = prepare(model, kind, device="cpu")
    weights = dict(original.named_parameters())
    assert slots.keys() <= weights.keys()
    rng = random.Random(0)
    pieces = []
    for name, slot in slots.items():
        *stack, height, _ = slot.shape
        for index in range(stack[0]) if stack else [None]:
            cuts = sorted({0, height, *(rng.randrange(height) for _ in range(2))})
            pieces += [(name, index, cut) for cut in zip(cuts[:-1], cuts[1:], strict=True)]
    rng.shuffle(pieces)
    for name, index, (start, stop) in pieces:
        whole = weights[name] if index is None else weights[name][index]
        slots[name].put(index, start, whole[start:stop].detach().bfloat16())
    wanted = quantize_model(copy.deepcopy(original).bfloat16(), kind)
    for name, tensor in wanted.state_dict().items():
        if name.endswith((".codes", ".scales")):
            assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKES)
def test_saved_and_loaded(make, kind, tmp_path):
    model = quantize_model(made(make), kind)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        empty = Model(model.cfg)
    prepare(empty, kind)
    empty.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(empty.state_dict()[name], tensor), name
    batch = documents(model)
    assert_same(tiny.logits(empty.eval(), *batch), tiny.logits(model, *batch))


@pytest.mark.parametrize("kind", KINDS)
def test_use_packs_the_codes_and_saving_does_not_show_it(kind):
    model, batch = quantize_model(made("mla"), kind), documents(made("mla"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = copy.deepcopy(model)
    pack_weights(model)
    if route() != "torch":
        assert all(w.held().packed != isinstance(w, QuantizedTable) for w in quantized(model).values())
    logits = tiny.logits(model, *batch)
    for other in (model, copy.deepcopy(model)):
        after = other.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
        assert torch.equal(tiny.logits(other, *batch), logits)
    tiny.logits(twin, *batch)
    twin.load_state_dict({name: tensor.clone() for name, tensor in before.items()})  # into packed weights
    assert torch.equal(tiny.logits(twin, *batch), logits)
    weight = next(w for w in quantized(model).values() if isinstance(w, QuantizedLinear))
    weight.put(None, 0, torch.ones(1, weight.shape[1]))
    assert (weight.weight[0] - 1).abs().max() < 1e-2


# ---------------------------------------------------------------- the modules


@pytest.mark.parametrize("kind", KINDS)
def test_a_cast_changes_what_comes_out_and_not_the_codes(kind):
    model = quantize_model(made("mla"), kind)
    before = {name: weight.dequantize() for name, weight in quantized(model).items()}
    model.bfloat16()
    for name, weight in quantized(model).items():
        assert torch.equal(weight.dequantize(dtype=torch.float32), before[name])
        assert weight.dequantize().dtype == torch.bfloat16
    assert tiny.logits(model, *documents(model)).isfinite().all()
    model.float().to("meta").to_empty(device="cpu")
    for weight in quantized(model).values():
        assert weight.dequantize().dtype == torch.float32
        assert weight.scales.dtype == (torch.float32 if kind == "int8" else torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 70])
def test_linear(kind, columns, monkeypatch):
    torch.manual_seed(0)
    w, bias, x = torch.randn(6, columns), nn.Parameter(torch.randn(6)), torch.randn(2, 3, columns)
    linear = QuantizedLinear((6, columns), kind, bias=bias)
    linear.put(None, 0, w)
    wanted = (
        ops.dequantize_int8(*ops.quantize_int8(w))
        if kind == "int8"
        else ops.dequantize_int4(*ops.quantize_int4(w), 32, columns)
    )
    assert torch.equal(linear.weight, wanted)
    exact = nn.functional.linear(x, wanted, bias)
    assert (linear(x) - exact).norm() <= 0.01 * exact.norm()
    monkeypatch.setenv("FOURFOLD_BACKEND", "reference")
    assert torch.equal(linear.weight, wanted) and torch.equal(linear(x), exact)
    assert linear(x.bfloat16()).dtype == torch.bfloat16
    assert set(linear.state_dict()) == {"codes", "scales", "bias"}


@pytest.mark.parametrize("kind", KINDS)
def test_stack(kind):
    w = torch.randn(4, 5, 40, generator=torch.Generator().manual_seed(0))
    stack = QuantizedStack((4, 5, 40), kind, torch.bfloat16)
    for expert in reversed(range(4)):
        stack.put(expert, 0, w[expert])
    assert len(stack) == 4 and stack[2].dtype == torch.bfloat16 and stack[2].shape == (5, 40)
    assert torch.equal(stack.dequantize()[2], stack[2])
    assert (stack.dequantize(3, torch.float32) - w[3]).abs().max() < 0.3


@pytest.mark.parametrize("kinds", [("int8", "int4"), ("int4", "fp8"), ("fp8", "fp8")])
def test_experts_of_two_kinds(kinds):
    generator = torch.Generator().manual_seed(0)
    stacks = [
        QuantizedStack(shape, kind, torch.float32)
        for shape, kind in zip(((4, 64, 48), (4, 48, 32)), kinds, strict=True)
    ]
    for stack in stacks:
        for expert in range(4):
            stack.put(expert, 0, torch.randn(stack.shape[1:], generator=generator) / 7)
    x, indices = torch.randn(5, 48, generator=generator), torch.randint(4, (5, 1), generator=generator)
    weights = torch.rand(5, 1, generator=generator)
    wanted = ops.reference.experts(x, indices, weights, *(stack.dequantize() for stack in stacks))
    with torch.inference_mode():
        out, together = stacks[0].experts(stacks[1], x, indices, weights, 0.0, ())
    assert not together and (out - wanted).norm() < 0.02 * wanted.norm()


def test_experts_that_nobody_chose_are_not_dequantised(monkeypatch):
    model = quantize_model(made("mla"), "int4")
    monkeypatch.setenv("FOURFOLD_BACKEND", "reference")
    asked: list[int] = []
    plain = ops.Quantized.dequantize

    def dequantize(weight: ops.Quantized, dtype: torch.dtype) -> Tensor:
        if any(
            weight.codes.data_ptr() in range(s.codes.data_ptr(), s.codes.data_ptr() + s.codes.nbytes) for s in stacks
        ):
            asked.append(weight.shape[0])
        return plain(weight, dtype)

    stacks = [m for m in model.modules() if isinstance(m, QuantizedStack)]
    monkeypatch.setattr(ops.Quantized, "dequantize", dequantize)
    tiny.logits(model, tiny.text(1))
    routed = sum(isinstance(m, QuantizedStack) for name, m in model.named_modules() if not name.startswith("mtp"))
    assert routed == 4 and len(asked) == routed * model.cfg.moe.num_experts_per_tok


@pytest.mark.parametrize(
    ("index", "start", "shape"),
    [
        (None, 0, (5, 40)),
        (-1, 0, (5, 40)),
        (4, 0, (5, 40)),
        (0, 1, (5, 40)),
        (0, -1, (5, 40)),
        (0, 0, (5, 39)),
        (0, 0, (40,)),
    ],
)
def test_rows_that_do_not_belong_are_refused(index, start, shape):
    with pytest.raises(ValueError, match="put: "):
        QuantizedStack((4, 5, 40), "int8").put(index, start, torch.zeros(shape))


def test_other_refusals():
    linear = QuantizedLinear((5, 40), "int4")
    with pytest.raises(ValueError, match="put: index 0"):
        linear.put(0, 0, torch.zeros(5, 40))
    with pytest.raises(ValueError, match="NaN"):
        linear.put(None, 0, torch.full((5, 40), torch.nan))
    with pytest.raises(ValueError, match="meta"):
        linear.to("meta").put(None, 0, torch.zeros(5, 40))
    with pytest.raises(ValueError, match="'int3' is unknown; choose one of int8, int4"):
        quantize_model(made("gqa"), "int3")
    model = made("mla")
    with torch.no_grad():
        model.layers[1].mlp.down_proj[3, 2, 1] = torch.inf
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: holds NaN, infinity"):
        quantize_model(model, "int8")


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_files_hold_whole_stacks(kind):
    """The bundled model quantised while it is loaded is the one quantised afterwards."""
    while_loading = load_model(resolve("nano"), quant=kind)[0].state_dict()
    after = quantize_model(load_model(resolve("nano"))[0], kind).state_dict()
    assert while_loading.keys() == after.keys()
    assert all(torch.equal(while_loading[name], tensor) for name, tensor in after.items())
