"""``build``: fetch, convert, check and write the corpora a recipe needs; what is already whole is not done again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fourfold.data import sources, voices
from fourfold.data.corpus import Shard, read_shard, write_shard
from fourfold.data.fetch import FetchError, cache_folder

HASHES = Path(__file__).with_name("hashes.json")


@dataclass(frozen=True)
class Source:
    """One shard: how it is made, and the skill that is lost without it. ``version`` grows when ``make`` changes."""

    make: Callable[[Path], Shard]
    skill: str
    version: int = 1


SMOKE = {
    "fashion": Source(sources.fashion, "naming clothes in pictures"),
    "emoji": Source(sources.emoji, "naming things in pictures, and all motion clips"),
    "text": Source(sources.text, "language modelling"),
    "facts": Source(sources.facts, "capitals"),
    "definitions": Source(sources.definitions, "saying what a thing is"),
    "speech": Source(voices.speech, "hearing digits and words"),
    "heldout_text": Source(sources.heldout_text, "the bits-per-byte test"),
    "twemoji": Source(sources.twemoji, "the unseen-style picture test"),
    "unseen_voice": Source(voices.unseen_voice, "the unseen-voice test"),
    "human_voice": Source(voices.human_voice, "the human-voice test"),
    "sounds": Source(voices.sounds, "naming sounds"),
}

RECIPES = {"smoke": SMOKE}


@dataclass
class Report:
    """What ``build`` did. missing: shard -> why; mismatched: extracted items that are not the recorded ones."""

    shards: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    mismatched: list[str] = field(default_factory=list)


def mismatches(hashes: dict[str, str], table: dict[str, str]) -> list[str]:
    """The items whose recorded hash is another one. An item that was never recorded is not a mismatch."""
    return sorted(item for item, digest in hashes.items() if table.get(item, digest) != digest)


def build(
    name: str = "smoke",
    out_dir: str | Path | None = None,
    progress: Callable[[str], None] = print,
    recipes: dict[str, dict[str, Source]] = RECIPES,
    table: dict[str, str] | None = None,
) -> Report:
    """Builds the shards of recipe ``name`` into ``out_dir`` (default: the data folder, ``.data``).

    A package that cannot be had costs its shard, not the build: the report and a progress line say which
    skill is lost. A shard whose extracted items differ from the recorded hashes is kept, with a warning.
    Raises ValueError on an unknown name.
    """
    if name not in recipes:
        raise ValueError(f"data build: {name!r} is unknown; choose one of {', '.join(recipes)}")
    folder = Path(out_dir) if out_dir is not None else cache_folder() / name
    recorded = json.loads(HASHES.read_text()) if table is None else table
    report = Report()
    for number, (shard_name, source) in enumerate(recipes[name].items(), 1):
        head = f"[{number}/{len(recipes[name])}] {shard_name}"
        start = time.monotonic()
        shard = _built(folder, shard_name, source.version)
        if shard is None:
            progress(f"{head}: building")
            try:
                shard = source.make(cache_folder() / "cache")
            except (FetchError, OSError, ImportError, ValueError) as error:
                report.missing[shard_name] = str(error)
                progress(f"{head}: MISSING, so no {source.skill}: {error}")
                continue
            shard.version = source.version
            write_shard(shard, folder)
        report.shards.append(shard_name)
        size = sum(array.nbytes for array in shard.arrays.values()) / 1e6
        progress(f"{head}: {len(shard)} items, {size:.1f} MB, {time.monotonic() - start:.1f} s")
        for item in mismatches(shard.hashes, recorded):
            report.mismatched.append(item)
            progress(f"{head}: WARNING: {item} is not what was recorded; results may differ from those published")
    return report


def _built(folder: Path, name: str, version: int) -> Shard | None:
    """The shard if it is there, whole and of this version."""
    try:
        shard = read_shard(folder, name)
    except (OSError, ValueError, KeyError):
        return None
    return shard if shard.version == version else None
