"""Training agrees with ``transformers``: the same weights, the same batches, the same losses for 200 steps.

Both sides take plain steps: mean cross-entropy, clipped gradients, AdamW over all parameters alike.

In float64 they agree to 1e-12. In float32 a token may sooner or later find its last chosen and its first refused
expert closer together than rounding reaches: it is routed elsewhere, the loss jumps by 5e-4, and what follows is chaos,
up to 2e-2. (Rounding reaches far. Where the terms of a gradient cancel, an element of 1e-8 has an error of 1e-7; Adam
divides it by its own size and steps by the whole learning rate, perhaps the wrong way.) Of 18 runs, nine seeds of each
case, so part by more than 1e-4: ours from the judge 6, ours from itself in float64 6, the judge from itself in float64
6. Therefore in float32 the judge's choices of experts are replayed to ours, and to ours in float64, which both are held
to: rounding alone can take the judge 1e-4 away from it (on an Intel Xeon 9.5e-5, ours 4.1e-5; on an AMD EPYC ours
and the judge agree to 2e-5 in all 18 runs). A few tokens at most of a run (4 and 1) would have chosen otherwise.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from fourfold.config import MoEConfig
from fourfold.model import moe
from fourfold.model.sequence import Document, pack
from fourfold.model.transformer import Model
from fourfold.weights.checkpoint import load_model
from tests.parity import reference, worst

LOSS_BAR, GRADIENT_BAR = 1e-4, 1e-5  # greatest absolute differences
EXACT_BAR = 1e-10  # of the loss, in float64
CHOICES_BAR = 2e-4  # share of tokens that would have chosen other experts, in float32
STEPS, BATCH, LENGTH, VOCABULARY = 200, 4, 32, 272
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 32,
    "moe_intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
}
CASES = {
    "flat": {"num_hidden_layers": 2, "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "q_lora_rank": None},
    "grouped": {"num_hidden_layers": 3, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "q_lora_rank": 10},
}
Step = Callable[[Tensor], float]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The tensors are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def judge(case: str) -> DeepseekV3ForCausalLM:
    made = reference.build(DeepseekV3ForCausalLM, DeepseekV3Config(**COMMON, **CASES[case]), seed=0)
    return made.train()


@functools.cache
def start(case: str) -> Model:
    return read(judge(case))


def read(judge: nn.Module) -> Model:
    """A model of ours, from what the judge wrote."""
    directory = reference.new_directory()
    judge.save_pretrained(directory)
    reference.write_tokenizer(directory)
    return load_model(directory)[0].train()


def batches(steps: int) -> list[Tensor]:
    """int64 [BATCH, LENGTH] each. A token is one of the four that may follow the one before: there is much to learn."""
    generator = torch.Generator().manual_seed(7)
    following = torch.randint(VOCABULARY, (VOCABULARY, 4), generator=generator)
    drawn = []
    for _ in range(steps):
        ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
        choices = torch.randint(4, ids.shape, generator=generator)
        for t in range(1, LENGTH):
            ids[:, t] = following[ids[:, t - 1], choices[:, t]]
        drawn.append(ids)
    return drawn


def judge_loss(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def our_loss(model: Model, ids: Tensor) -> Tensor:
    packed = pack([Document.text(row) for row in ids.tolist()], row=LENGTH)
    return F.cross_entropy(model(packed, logits="target").logits, packed.targets[packed.targets >= 0])


def losses(model: nn.Module, loss_of: Callable[[nn.Module, Tensor], Tensor], steps: int, **settings: float) -> Tensor:
    """The loss of each step of training ``model``."""
    optimizer = torch.optim.AdamW(model.parameters(), **SETTINGS | settings)
    seen = []
    for ids in batches(steps):
        loss = loss_of(model, ids)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return torch.tensor(seen, dtype=torch.float64)


@pytest.fixture
def wide_islands(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the judge always computes in float32 (norms, softmax, router) it computes in float64. (Ours follows its
    input; the rotary tables stay float32 on both sides.)"""
    wide = SimpleNamespace(**{**vars(torch), "float32": torch.float64})
    monkeypatch.setattr(modeling_deepseek_v3, "torch", wide)


@functools.cache
def judged(case: str) -> tuple[Tensor, list[Tensor]]:
    """The judge's losses, and what its routers chose, int64 [T, K] each."""
    model, chosen = copy.deepcopy(judge(case)), []
    for module in model.modules():
        if isinstance(module, DeepseekV3TopkRouter):
            module.register_forward_hook(lambda _, inputs, out: chosen.append(out[2]))
    return losses(model, judge_loss, STEPS), chosen


def replayed(
    case: str, steps: int, patch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32, **settings: float
) -> tuple[Tensor, float]:
    """Our losses by the judge's choices, and the share of tokens that would have chosen otherwise."""
    choices, others, choose = iter(judged(case)[1]), [], moe.choose_experts

    def replay(biased: Tensor, cfg: MoEConfig) -> Tensor:
        given, own = next(choices), choose(biased, cfg)
        others.append((given.sort().values != own.sort().values).any(-1))
        return given

    with patch.context() as patched:
        patched.setattr(moe, "choose_experts", replay)
        got = losses(copy.deepcopy(start(case)).to(dtype), our_loss, steps, **settings)
    return got, torch.cat(others).double().mean().item()


@pytest.mark.parametrize("case", CASES)
def test_200_steps(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, _ = judged(case)
    got, others = replayed(case, STEPS, monkeypatch)
    assert wanted[-20:].mean() < wanted[:20].mean() - 0.3, "the judge learns nothing: there is nothing to compare"
    exact, _ = replayed(case, STEPS, monkeypatch, torch.float64)
    assert (got - exact).abs().max() < LOSS_BAR
    assert worst.difference("deepseek_v3 loss, 200 steps", got, wanted) < LOSS_BAR + (wanted - exact).abs().max()
    assert others < CHOICES_BAR


@pytest.mark.parametrize("case", CASES)
def test_200_steps_in_float64(case: str, wide_islands: None) -> None:
    wanted = losses(copy.deepcopy(judge(case)).double(), judge_loss, STEPS)
    got = losses(copy.deepcopy(start(case)).double(), our_loss, STEPS)
    assert worst.difference("deepseek_v3 loss, 200 steps, float64", got, wanted) < EXACT_BAR


@pytest.mark.parametrize("case", CASES)
def test_our_rounding_is_no_coarser(case: str, request: pytest.FixtureRequest) -> None:
    """The gradients in float32 against those in float64, ours and the judge's: as far on average."""
    (ids,) = batches(1)

    def gradient(model: nn.Module, loss_of: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        loss_of(model, ids).backward()
        return torch.cat([p.grad.double().flatten() for p in model.parameters()])

    sides = ((judge(case), judge_loss), (start(case), our_loss))
    narrow = [gradient(copy.deepcopy(model), loss_of) for model, loss_of in sides]
    request.getfixturevalue("wide_islands")
    wide = [gradient(copy.deepcopy(model).double(), loss_of) for model, loss_of in sides]
    theirs, ours = ((a - b).square().mean().sqrt() for a, b in zip(narrow, wide, strict=True))
    assert 0 < ours < 1.5 * theirs


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_the_first_step(case: str) -> None:
    """The judge's are written as if they were weights, and so arrive under our names."""
    (ids,) = batches(1)
    theirs, ours = copy.deepcopy(judge(case)), copy.deepcopy(start(case))
    judge_loss(theirs, ids).backward()
    our_loss(ours, ids).backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    wanted = dict(read(theirs).named_parameters())
    for name, parameter in ours.named_parameters():
        assert wanted[name].any(), f"{name}: the judge has no gradient"
        assert worst.difference("deepseek_v3 gradient, first step", parameter.grad, wanted[name]) < GRADIENT_BAR, name


@pytest.mark.parametrize("wrong", [{"lr": 1.01e-3}, {"weight_decay": 0.0}, {"betas": (0.9, 0.97)}], ids=str)
def test_a_small_mistake_is_found(wrong: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    steps = STEPS // 4
    got, _ = replayed("flat", steps, monkeypatch, **wrong)
    assert (got - judged("flat")[0][:steps]).abs().max() > 3 * LOSS_BAR
