"""A model by its hub id: fetched once by ``huggingface_hub``, then read from its cache."""

from __future__ import annotations

import re
from pathlib import Path

from fourfold.weights.tensors import CheckpointError

FILES = ["*.json", "*.safetensors", "*.jinja", "encoding/*"]  # never pickles, never code that would be run


def is_hub_id(name: str) -> bool:
    """``owner/model``, unless a folder of the owner's name lies here: then it is a path with a slip of the pen."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not Path(name).parent.is_dir()


def from_hub(name: str) -> Path:
    """The directory in the local cache. Raises CheckpointError if neither the cache nor the hub has the model."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=FILES, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        pass  # not here yet, or not whole
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(f"model: {name!r} is no directory here and cannot be had from the hub: {error}") from None
