"""Models by their hub id, from a cache on this machine; nothing is fetched here."""

from __future__ import annotations

import huggingface_hub
import pytest

from fourfold.weights.checkpoint import CheckpointError, load_model, resolve
from fourfold.weights.hub import FILES, is_hub_id
from tests.parity.reference import make


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache as huggingface_hub lays it out: names that link to blobs, and a branch that names a snapshot."""
    root = tmp_path / "hub"
    revision = "0123456789abcdef0123456789abcdef01234567"
    snapshot = root / "models--owner--tiny.model" / "snapshots" / revision
    blobs, refs = snapshot.parents[1] / "blobs", snapshot.parents[1] / "refs"
    for folder in (snapshot, blobs, refs):
        folder.mkdir(parents=True)
    (refs / "main").write_text(revision)
    for number, path in enumerate(make("llama", 0).directory.iterdir()):
        (blobs / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(blobs / str(number))
    asked = []

    def download(name, *, local_files_only=False, **options):
        asked.append((name, local_files_only, options["allow_patterns"]))
        if not local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("no network in a test")
        return original(name, cache_dir=root, local_files_only=True, **options)

    original = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_a_cached_model_loads_without_a_network(cache):
    path = resolve("owner/tiny.model")
    model, _ = load_model(path)
    assert model.cfg.attention.kind == "gqa"
    assert cache == [("owner/tiny.model", True, FILES)]


def test_what_nobody_has_is_one_clear_error(cache):
    with pytest.raises(CheckpointError, match="'owner/other' is no directory here and cannot be had from the hub"):
        resolve("owner/other")
    assert [local for _, local, _ in cache] == [True, False]


@pytest.mark.parametrize("name", ["nano", "a/b/c", "/etc/passwd", "../x", "owner/", "~/x", "tests/nothing", "./x"])
def test_paths_are_never_asked_of_the_hub(name):
    assert not is_hub_id(name)


def test_pickles_are_not_fetched():
    assert not any(pattern.endswith((".bin", ".pt", ".pth", ".py", "*")) and "/" not in pattern for pattern in FILES)
