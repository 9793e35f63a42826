"""Multi-token prediction: V3's against the judge's own layer, V4's, which the judge drops, against a second writing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from fourfold.model.sequence import Document, pack
from fourfold.model.transformer import Model
from fourfold.weights.checkpoint import load_model
from tests.parity import oracle, reference, released
from tests.parity.reference import BAR, CSA, SLIDING
from tests.parity.worst import difference


@torch.no_grad()
def our_mtp(model: Model, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [T, V], and those of the guesses of token t + 2 for t < T - 2."""
    out = model(pack([Document.text(ids.tolist())]), mtp=True)
    assert out.mtp_logits is not None
    return out.logits, out.mtp_logits


@pytest.mark.parametrize("seed", range(10))
def test_v3(seed: int) -> None:
    model = reference.draw("deepseek_v3", seed)
    assert isinstance(model, DeepseekV3ForCausalLM)
    model.config.num_nextn_predict_layers = 1
    mtp = MtpModel(model, 1).float().eval()
    mtp.set_experts_implementation("eager")
    reference.randomise(mtp.layers, torch.Generator().manual_seed(seed))
    directory = reference.new_directory()
    embedding, head = model.get_input_embeddings().weight.data, model.lm_head.weight.data
    rows = released.latent_rows(model, "f32")
    rows += released.mtp_rows(mtp.layers[0].state_dict(), model.config.num_hidden_layers, embedding, head)
    more = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "num_nextn_predict_layers": 1}
    released.write(directory, rows, released.latent_config(model.config, **more))

    ids = reference.tokens(model.config, seed)
    with torch.no_grad():
        hidden = model.model(input_ids=ids[None], use_cache=False).last_hidden_state
        positions = torch.arange(len(ids) - 1)[None]
        guess = mtp.forward_layer(0, hidden[:, :-1], positions, None, input_ids=ids[None, 1:])
        expected = mtp._project_to_logits(guess)[0]
    logits, guesses = our_mtp(load_model(directory)[0], ids)
    assert difference("deepseek_v3 logits beside MTP", logits, reference.logits(model, ids)) <= BAR
    assert difference("deepseek_v3 MTP", guesses, expected[:-1]) <= BAR


V4_OWN = {"e_proj.weight": "bf16", "h_proj.weight": "bf16"} | dict.fromkeys(
    ("enorm.weight", "hnorm.weight", "norm.weight"), "bf16"
)
V4_HEAD = {f"hc_head.hc_{name}": f"hc_head_{name}" for name in ("fn", "base", "scale")}


@pytest.mark.parametrize("seed", [0, 3, 6, 7, 9, 11])
def test_v4(seed: int) -> None:
    """The released file carries it as ``mtp.0``; ``compress_ratios`` has an entry for it that is 0."""
    model = reference.draw("deepseek_v4", seed)
    assert model.config.compress_rates[CSA] == 4  # the released field knows no other
    donor = copy.deepcopy(model.config)  # of a block that has a window alone and routes by score
    donor.layer_types, donor.mlp_layer_types, donor.num_hidden_layers = [SLIDING], ["moe"], 1
    block = reference.build(type(model), donor, 50 + seed).state_dict()
    mtp = {name.replace("model.layers.0.", "block."): w for name, w in block.items() if ".layers.0." in name}
    mtp |= {name: block[f"model.{name}"] for name in ("norm.weight", *V4_HEAD)}
    generator, d = torch.Generator().manual_seed(seed), model.config.hidden_size
    for name in ("e_proj", "h_proj"):
        mtp[f"{name}.weight"] = torch.randn(d, d, generator=generator) * d**-0.5
    for name in ("enorm", "hnorm"):
        mtp[f"{name}.weight"] = 1 + 0.2 * torch.randn(d, generator=generator)

    rows = released.v4_rows(model.state_dict())
    rows += released.v4_block_rows(mtp, "block.", "mtp.0.")
    rows += [(f"mtp.0.{name}", mtp[name], kind) for name, kind in V4_OWN.items()]
    rows += [(f"mtp.0.{name}", mtp[theirs], "f32") for theirs, name in V4_HEAD.items()]
    rows = [(name, w, kind if kind == "i64" else "f32") for name, w, kind in rows]
    directory = reference.new_directory()
    released.write(directory, rows, released.v4_config(model.config, mtp=1))

    ids = reference.tokens(model.config, seed)
    logits, guesses = our_mtp(load_model(directory)[0], ids)
    assert difference("deepseek_v4 logits beside MTP", logits, reference.logits(model, ids)) <= BAR
    assert difference("deepseek_v4 MTP", guesses, oracle.mtp_logits(model, mtp, ids)[:-1]) <= BAR
