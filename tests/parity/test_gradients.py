"""Gradients agree with those of ``transformers``.

The judge's gradients are written as if they were weights and read back as a model of ours: so they arrive under our
names and in our shapes by the same way as the weights did.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from fourfold.model.sequence import Document, pack
from fourfold.weights.checkpoint import load_model
from tests.parity import reference
from tests.parity.reference import make, ours
from tests.parity.worst import SEEN

BAR = 1e-4  # relative to the largest gradient of the tensor


def expected_gradients(family: str, seed: int, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    judge = copy.deepcopy(make(family, seed).model)
    logits = judge(input_ids=ids[None], use_cache=False).logits[0]
    F.cross_entropy(logits[:-1], ids[1:]).backward()
    with torch.no_grad():
        for parameter in judge.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    directory = reference.new_directory()
    judge.save_pretrained(directory)
    reference.write_tokenizer(directory)
    return dict(load_model(directory)[0].named_parameters())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", ["llama", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4"])
def test_gradients(family: str, seed: int) -> None:
    ids = reference.tokens(make(family, seed).config, seed)
    expected = expected_gradients(family, seed, ids)
    model = copy.deepcopy(ours(family, seed)).requires_grad_()
    F.cross_entropy(model(pack([Document.text(ids.tolist())])).logits[:-1], ids[1:]).backward()
    checked = 0
    for name, parameter in model.named_parameters():
        want = expected[name]
        if "indexer" in name:  # a choice of keys has no gradient; ours learns by its own loss
            assert parameter.grad is None and not want.any(), name
            continue
        got = torch.zeros_like(want) if parameter.grad is None else parameter.grad
        size = want.abs().max().item()
        if size == 0:  # an expert that nobody chose
            assert not got.any(), name
            continue
        moe = model.cfg.moe
        if name.endswith("mlp.gate.weight") and moe.num_experts_per_tok == 1 and moe.norm_topk_prob:
            assert got.abs().max() < 1e-6 and size < 1e-6  # the weight of a lone expert is one, whatever its score
            continue
        apart = (got - want).abs().max().item() / size
        SEEN[f"{family} gradient"] = max(SEEN.get(f"{family} gradient", 0.0), apart)
        assert apart <= BAR, f"{name}: {apart:.1e}"
        checked += 1
    assert checked > 10
