"""The command line's word for how the engine uses the machine."""

import pytest
import torch

import fourfold
from fourfold.cli import main
from fourfold.serve.local import LocalModel
from tests.serve.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def local(monkeypatch):
    local = LocalModel(tiny_model(), tiny_tokenizer())
    monkeypatch.setattr(fourfold, "load", lambda name, **options: local)
    yield local
    local.close()


def test_serve_passes_them_on(local, monkeypatch, tmp_path):
    stats = {}

    def run_server(engine, name, **options):
        stats.update(engine.stats(), budget=engine.budget)

    monkeypatch.setattr("fourfold.api.server.run_server", run_server)
    cache = str(tmp_path / "cache")
    assert (
        main(
            [
                "serve",
                "--memory",
                "60MiB",
                "--context-cache",
                cache,
                "--context-cache-size",
                "1MB",
                "--cache-format",
                "fp8",
            ]
        )
        == 0
    )
    assert 50 * 2**20 < stats["budget"].total <= 60 * 2**20 and stats["disk_pages"] == 0
    assert local.engine._disk.quota == 10**6 and local.engine._pool.data.dtype == torch.float8_e4m3fn


def test_pages_may_lie_in_a_file(local, monkeypatch, tmp_path, capsys):
    stats = {}

    def run_server(engine, name, **options):
        stats.update(engine.stats(), budget=engine.budget)

    monkeypatch.setattr("fourfold.api.server.run_server", run_server)
    pages, size = str(tmp_path / "pages"), ["--context-pages-size", "1MiB"]
    assert main(["serve", "--memory", "60MiB", "--context-pages", pages, *size]) == 0
    budget = stats["budget"]
    assert stats["resident_bytes"] == 0 and budget.pages == 2**20 // budget.page
    assert local.engine._pool.backing is not None and local.engine._file.data.nbytes <= 2**20
    local.close()
    (tmp_path / "file").write_text("")
    assert main(["serve", "--context-pages", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err


def test_a_model_too_large_is_refused_before_it_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(fourfold, "load", lambda *_, **__: pytest.fail("it was loaded"))
    for command in (["serve"], ["chat"], ["generate", "--prompt", "hi"]):
        assert main([*command, "--memory", "1MiB"]) == 2
        assert "memory: is 1 MiB; the weights as fp32 take" in capsys.readouterr().err


def test_a_cache_directory_that_cannot_be_is_bad_input(local, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["generate", "--prompt", "hi", "--context-cache", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err


def test_speculate_needs_an_mtp_block(local, capsys):
    assert main(["generate", "--prompt", "hi", "--speculate", "on"]) == 2
    assert "speculate: this model has no MTP block" in capsys.readouterr().err
