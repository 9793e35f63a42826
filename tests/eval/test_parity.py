"""The suite that users run on a directory of their own."""

import json

import pytest
import torch

import fourfold
from fourfold.eval import parity
from tests.parity.reference import make


@pytest.mark.parametrize("family", ["llama", "deepseek_v4"])
def test_a_good_directory_agrees(family):
    model = fourfold.load(make(family, 0).directory)
    scores = parity.run(model, {"samples": 2, "length": 40})["scores"]
    assert scores["whole"]["n"] == scores["cached"]["n"] == 80
    for score in scores.values():
        assert score["max_difference"] <= 2e-5 and score["same_choice"] == 1.0


def test_it_sees_another_model():
    """Not the model that lies in the directory."""
    model = fourfold.load(make("llama", 0).directory)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    assert parity.run(model, {"samples": 1, "length": 8})["scores"]["whole"]["max_difference"] > 0.1


def test_the_bundled_model_is_read_by_both():
    scores = parity.run(fourfold.load("nano"), {"samples": 1, "length": 100})["scores"]
    assert scores["whole"]["max_difference"] <= 1e-5 and scores["cached"]["same_choice"] == 1.0


def test_what_transformers_does_not_know_is_said(tmp_path):
    directory = make("llama", 0).directory
    model = fourfold.load(directory)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nobody_s"}))
    model.path = tmp_path
    with pytest.raises(ValueError, match="transformers cannot read"):
        parity.run(model, {})
    model.path = None
    with pytest.raises(ValueError, match="must be a directory"):
        parity.run(model, {})
