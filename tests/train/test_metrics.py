"""What a run tells, by value, and its report."""

from __future__ import annotations

import base64
import io
import json
import math

import pytest
import torch
from PIL import Image

from fourfold.counts import training_flops
from fourfold.model.probe import Probe
from fourfold.model.sequence import IGNORE, IMAGE, VIDEO, pack
from fourfold.train import metrics, report
from fourfold.train.loop import train, trained_config
from fourfold.train.recipe import Phase
from tests.model import tiny
from tests.train import conftest

EXPERTS = {"moe.n_routed_experts": 4, "moe.num_experts_per_tok": 2, "media": tiny.MEDIA}


def test_losses_go_to_the_media_of_their_document():
    """Of three documents: text; an image; an image and a video, which counts for both."""
    documents = [tiny.text(4, seed=i) for i in range(3)]
    documents[1].modality[0] = IMAGE
    documents[2].modality[:2] = torch.tensor([IMAGE, VIDEO])
    documents[2].targets[0] = IGNORE
    packed = pack(documents)
    losses = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 30.0, 100.0, 200.0])
    sums = metrics.modality_sums(losses, packed)
    assert sums.tolist() == [[6, 360, 300, 0], [3, 5, 2, 0]]
    assert metrics.modality_losses(sums) == {"loss_text": 2, "loss_image": 72, "loss_video": 150}


def test_balance_by_value():
    values = metrics.expert_balance({"a": torch.tensor([[4, 0, 0, 0], [4, 4, 4, 0]]), "b": torch.ones(2, 4)})
    assert values == {"max_violation": pytest.approx(0.5), "dead_experts": 0.5}
    assert metrics.expert_balance({}) == {}


def test_bias_range_by_value():
    model = tiny.model(tiny.config(**EXPERTS))
    for router in (m for m in model.modules() if hasattr(m, "media_bias")):
        router.bias.zero_()
        router.media_bias.zero_()
    model.layers[1].mlp.gate.bias.copy_(torch.tensor([0.1, -0.2, 0.0, 0.0]))
    assert metrics.bias_range(model) == {"bias_range": pytest.approx(0.3)}
    model.layers[2].mlp.gate.media_bias[1, 2] = 0.5  # rows are not compared with one another
    assert metrics.bias_range(model) == {"bias_range": pytest.approx(0.5)}
    assert metrics.bias_range(tiny.model(tiny.config())) == {}


@pytest.mark.parametrize(("spread", "wanted"), [(0.0, 1.0), (1e4, math.log(2) / math.log(4))])
def test_router_entropy_by_value(spread, wanted):
    """Equal scores: all that there can be; two experts alone: that of a coin."""
    model = tiny.model(tiny.config(**EXPERTS | {"moe.scoring_func": "softmax"}))
    with torch.no_grad():
        for layer in model.layers[1:]:
            layer.mlp.gate.weight.zero_()
            hook = layer.mlp.gate.register_forward_hook(
                lambda _, __, out: (*out[:2], (spread * torch.tensor([1.0, 1.0, 0.0, 0.0])).softmax(-1).expand(7, 4))
            )
            assert hook is not None
        into: dict[str, float] = {}
        with metrics.router_entropy(model, into):
            model(pack([tiny.text(7)]))
    assert into == {"router_entropy": pytest.approx(wanted)}
    model(pack([tiny.text(7)]))  # no longer watched
    assert len(into) == 1


def test_gain_is_there_where_streams_mix():
    assert metrics.stream_gain(None) == metrics.stream_gain(Probe()) == {}
    probe = Probe(stream_maps={0: torch.eye(2)[None] * 2})
    assert metrics.stream_gain(probe) == {"gain_forward": 2.0, "gain_backward": 2.0}


def test_throughput_by_value():
    """Two steps of 0.5 and 1.5 s, documents of 10 and 30 positions: the mean position lies in one of 25."""
    cfg, speed = tiny.config(), metrics.Throughput(peak=1e9)
    for seconds in (0.5, 1.5):
        speed.add([pack([tiny.text(10)]), pack([tiny.text(30)])], seconds)
    values = speed.read(cfg)
    assert values["seconds"] == 1.0 and values["tokens_per_second"] == 40.0
    assert values["mfu"] == pytest.approx(training_flops(cfg, 25) * 40 / 1e9)
    assert values["peak_flops"] == 1e9 and values["peak_memory"] > 2**20
    speed.add([pack([tiny.text(8)])], 2.0)
    assert speed.read(None).keys() == {"seconds", "tokens_per_second", "peak_memory"}
    assert metrics.measured_peak(torch.device("cpu"), bf16=True) > 1e8


def test_flops_are_those_of_the_phase():
    model = tiny.model(tiny.config(**{"mtp.num_layers": 1, "indexer.mode": "sparse", "attention.q_lora_rank": 10}))
    assert trained_config(model, Phase(1, "sparse", 0.3)).mtp.num_layers == 1
    assert trained_config(model, Phase(1, "sparse")).mtp.num_layers == 0
    model.set_indexer_mode("warmup")
    assert trained_config(model, Phase(1, "warmup")) is None


def test_what_is_not_finite_is_null_in_the_file(tmp_path):
    with metrics.Metrics(tmp_path, 0) as log:
        log.write(1, {"loss": 2.0, "grad_norm": 1.0})
        log.write(2, {"loss": math.nan, "grad_norm": math.inf})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # a line cut short
    wanted = [{"step": 1, "loss": 2.0, "grad_norm": 1.0}, {"step": 2, "loss": None, "grad_norm": None}]
    assert metrics.read_metrics(tmp_path) == wanted
    with metrics.Metrics(tmp_path, 1) as log:
        log.write(2, {"loss": 1.0})
    assert [line["loss"] for line in metrics.read_metrics(tmp_path)] == [2.0, 1.0]


def test_a_run_tells_and_reports(recipe):
    run = train(recipe, ["peak_flops=1e9"])
    lines = conftest.metrics(run)
    always = {"loss", "lr", "grad_norm", "skipped", "positions", "router_entropy", "bias_range", "max_violation"}
    always |= {"dead_experts", "gain_forward", "seconds", "tokens_per_second", "peak_memory"}
    for line in lines:
        assert always <= line.keys() and 0 < line["router_entropy"] <= 1 and line["skipped"] == 0
        assert ("mfu" in line) == (line["step"] != 4)  # the warm-up
    assert any("loss_audio" in line or "loss_image" in line for line in lines[:4])
    page = (run / "report.html").read_text()
    assert "assumed in the recipe" in page and "1e+09 FLOP/s" in page
    pictures = [part.split('"')[0] for part in page.split('src="data:image/png;base64,')[1:]]
    assert len(pictures) == len(report.PLOTS)
    for picture in pictures:
        with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
            assert image.format == "PNG" and len(image.convert("L").getcolors(99999)) > 3


# ---------------------------------------------------------------- the report


def test_a_report_of_what_there_is(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"out": "<script>", "peak_flops": 0.0}))
    lines = [{"step": 1, "loss": 3.0, "mfu": 0.5, "peak_flops": 2e9}, {"step": 2, "loss": None, "skipped": 1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = report.write_report(tmp_path)
    page = path.read_text()
    assert page.count("<img") == 1 and "<script>" not in page and "&lt;script&gt;" in page
    assert "<th>skipped steps</th><td>1</td>" in page
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "recipe.json", "report.html"]


def test_a_gap_is_a_gap():
    lines = [{"step": 1, "a": 1.0}, {"step": 2, "a": None}, {"step": 3}, {"step": 4, "a": 2.0, "b": None}]
    drawn = report.curves(lines, ("a", "b", "c"))
    assert drawn.keys() == {"a"} and drawn["a"][0] == [1, 2, 4] and math.isnan(drawn["a"][1][1])


def test_a_run_that_logged_nothing_has_no_report(tmp_path):
    with pytest.raises(ValueError, match="no metrics.jsonl"):
        report.write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failed_report_leaves_the_one_before(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    before = report.write_report(tmp_path).read_text()

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(report.os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        report.write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == before
