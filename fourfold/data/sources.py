"""Readers of fetched packages: pictures and text. Each returns one :class:`Shard`; bytes in, arrays out."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from fourfold.data.corpus import Shard, flatten, is_test, split_of
from fourfold.data.fetch import fetch, find, run
from fourfold.data.labels import CLOTHES, emoji_names

EMOJI_SIZE = 48  # pixels a side
NOTO, FLAT, FLUENT_3D = (
    "@iconify-json/noto@1.2.9",
    "@iconify-json/fluent-emoji-flat@1.2.6",
    "@lobehub/fluent-emoji-3d@1.1.0",
)
TWEMOJI, EMOJIBASE, FLAGS = "@twemoji/svg@15.0.0", "emojibase-data@17.0.0", "flag-icons@7.5.0"


NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


def sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def read_idx(data: bytes) -> np.ndarray:
    """The IDX format of the MNIST family, unsigned bytes only."""
    if data[:3] != b"\0\0\x08":
        raise ValueError("idx: not an array of unsigned bytes")
    shape = np.frombuffer(data, ">i4", data[3], 4)
    return np.frombuffer(data, np.uint8, int(np.prod(shape)), 4 + 4 * data[3]).reshape(shape)


def fashion(cache: Path) -> Shard:
    """Fashion-MNIST, 28x28 grey: images uint8 [70000, 28, 28]; its official test set is our test split."""
    folder = fetch("apt", "dataset-fashion-mnist", cache) / "usr/share/datasets/fashion-mnist"
    names = ("train-images-idx3", "t10k-images-idx3", "train-labels-idx1", "t10k-labels-idx1")
    raw = {name: gzip.decompress((folder / f"{name}-ubyte.gz").read_bytes()) for name in names}
    train, test, *labels = (read_idx(raw[name]) for name in names)
    return Shard(
        "fashion",
        {"images": np.concatenate([train, test])},
        {
            "label": np.array(CLOTHES)[np.concatenate(labels)],
            "split": np.repeat(["train", "test"], [len(train), len(test)]),
        },
        licence="MIT (Fashion-MNIST, Zalando SE)",
        tier="A",
        hashes={f"fashion/{name}": sha256(data) for name, data in raw.items()},
    )


Concept = tuple[str, str, str, str]


def _emojibase(cache: Path) -> list[Concept]:
    """(code point, emojibase label, our name, category) of the emoji we teach."""
    entries = json.loads((fetch("npm", EMOJIBASE, cache) / "package/en/data.json").read_text())
    names = emoji_names()
    found = [
        (e["hexcode"].lower().replace("-fe0f", ""), e["label"], *names[e["label"]])
        for e in entries
        if e["label"] in names
    ]
    missing = names.keys() - {label for _, label, *_ in found}
    if missing:
        raise ValueError(f"emojibase-data has no emoji called {', '.join(sorted(missing))}")
    return found


def _iconify(folder: Path) -> dict[str, str | bytes]:
    """code point -> SVG of one Iconify set."""
    icons = json.loads((folder / "package/icons.json").read_text())
    svgs: dict[str, str | bytes] = {}
    for code, name in json.loads((folder / "package/chars.json").read_text()).items():
        alias = icons.get("aliases", {}).get(name, {})
        if set(alias) <= {"parent"} and (icon := icons["icons"].get(alias.get("parent", name))):
            width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
            svgs[code] = f'<svg {NAMESPACES} viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    return svgs


def _render(source: str | bytes) -> np.ndarray:
    """An SVG text or the bytes of a picture -> RGBA uint8 [48, 48, 4]."""
    if isinstance(source, str):
        import resvg_py  # needed to build only

        source = resvg_py.svg_to_bytes(svg_string=source, width=EMOJI_SIZE, height=EMOJI_SIZE, skip_system_fonts=True)
    picture = Image.open(io.BytesIO(source)).convert("RGBA")
    if picture.size != (EMOJI_SIZE, EMOJI_SIZE):
        picture = picture.resize(
            (EMOJI_SIZE, EMOJI_SIZE),
            Image.Resampling.BOX if picture.width % EMOJI_SIZE == 0 else Image.Resampling.LANCZOS,
        )
    return np.asarray(picture)


def _emoji_shard(
    name: str, styles: dict[str, dict[str, str | bytes]], concepts: list[Concept], licence: str, tier: str
) -> Shard:
    rows = [(style, *concept) for style in styles for concept in concepts if concept[0] in styles[style]]
    encoded = {style: [styles[style][c[0]] for c in concepts if c[0] in styles[style]] for style in styles}
    return Shard(
        name,
        {"images": np.stack([_render(styles[row[0]][row[1]]) for row in rows])},
        {
            "style": np.array([row[0] for row in rows]),
            "key": np.array([row[1] for row in rows]),
            "label": np.array([row[3] for row in rows]),
            "category": np.array([row[4] for row in rows]),
            "split": np.array([split_of(row[1]) for row in rows]),
        },
        licence=licence,
        tier=tier,
        hashes={
            f"{name}/{style}": sha256(*(s.encode() if isinstance(s, str) else s for s in sources))
            for style, sources in encoded.items()
        },
    )


def emoji(cache: Path) -> Shard:
    """images uint8 RGBA [N, 48, 48, 4]: every taught emoji in three styles; split by concept."""
    webp: dict[str, str | bytes] = {
        path.stem.replace("-fe0f", ""): path.read_bytes()
        for path in sorted((fetch("npm", FLUENT_3D, cache) / "package/assets").glob("*.webp"))
    }
    styles = {"noto": _iconify(fetch("npm", NOTO, cache)), "flat": _iconify(fetch("npm", FLAT, cache)), "3d": webp}
    licence = "Apache-2.0 (Noto Emoji, Google), MIT (Fluent Emoji, Microsoft), MIT (emojibase-data)"
    return _emoji_shard("emoji", styles, _emojibase(cache), licence, "A")


def twemoji(cache: Path) -> Shard:
    """The same emoji in a fourth style, for tests only: the split by concept stands in the labels all the same."""
    folder = fetch("npm", TWEMOJI, cache) / "package"
    svgs: dict[str, str | bytes] = {
        path.stem.replace("-fe0f", ""): path.read_text() for path in sorted(folder.glob("*.svg"))
    }
    return _emoji_shard(
        "twemoji", {"twemoji": svgs}, _emojibase(cache), "CC-BY-4.0 (Twemoji, Twitter Inc. and contributors)", "B"
    )


def wordnet_lines(folder: Path) -> list[tuple[str, str]]:
    """(headword, "dog, domestic dog (noun): a member of ...") of every synset, in the files' order."""
    lines = []
    for part, name in (("noun", "noun"), ("verb", "verb"), ("adj", "adjective"), ("adv", "adverb")):
        for line in (folder / f"data.{part}").read_text("latin-1").splitlines():
            if line.startswith("  "):  # the licence
                continue
            head, _, gloss = line.partition(" | ")
            fields = head.split()
            words = [
                re.sub(r"\(.*\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            ]
            lines.append((words[0], f"{', '.join(words[:3])} ({name}): {gloss.strip()}"))
    return lines


def clean_rst(text: str) -> str:
    """reStructuredText as plain prose: roles, directive heads, targets and underlines go, words stay."""
    text = re.sub(r":[\w:+-]+:`[!~]?([^`<]*?)(?: *<[^`>]*>)?`", r"\1", text)
    text = re.sub(r"^\s*(\.\. .*|:\w[\w -]*:.*|[=\-~^*#\"+.]{4,})$", "", text, flags=re.M)
    text = re.sub(r"``|\*\*", "", text).replace("::\n", ":\n")
    return re.sub(r"\n\s*\n+", "\n\n", text).strip()


def kjv_chapters(folder_text: Path, folder_program: Path) -> list[tuple[str, str]]:
    """(chapter, its verses without numbers), printed by the package's own reader."""
    command = [str(folder_program / "usr/bin/bible"), "-d", "bible.data", "-f", "gen1:1-rev22:21"]
    printed = run(command, "bible-kjv", folder_text / "usr/lib").decode()
    chapters: dict[str, list[str]] = {}
    for line in printed.splitlines():
        place, _, verse = line.partition(" ")
        if verse:
            chapters.setdefault(place.partition(":")[0], []).append(verse)
    return [(chapter, " ".join(verses)) for chapter, verses in chapters.items()]


def _text_shard(name: str, parts: list[tuple[str, str, str]], licence: str, split: str | None = None) -> Shard:
    """``parts``: (source, key, text)."""
    flat, offsets = flatten([np.frombuffer(text.encode(), np.uint8) for *_, text in parts], np.uint8)
    sources = sorted({source for source, *_ in parts})
    return Shard(
        name,
        {"text": flat, "offsets": offsets},
        {
            "source": np.array([source for source, *_ in parts]),
            "key": np.array([key for _, key, _ in parts]),
            "split": np.array([split or split_of(key) for _, key, _ in parts]),
        },
        licence=licence,
        tier="A",
        hashes={f"{name}/{s}": sha256(*(text.encode() for source, _, text in parts if source == s)) for s in sources},
    )


def text(cache: Path) -> Shard:
    """Prose: one item a WordNet synset (split by headword), a page of Python's documentation, a chapter of the KJV."""
    parts = [
        ("wordnet", word, line)
        for word, line in wordnet_lines(fetch("apt", "wordnet-base", cache) / "usr/share/wordnet")
    ]
    folder = find(fetch("apt", "python3.11-doc", cache), "_sources")
    for path in sorted(folder.rglob("*.rst.txt")):
        if path.name != "changelog.rst.txt":
            parts.append(("python", str(path.relative_to(folder)), clean_rst(path.read_text())))
    program = fetch("apt", "bible-kjv", cache)
    parts += [("kjv", *chapter) for chapter in kjv_chapters(fetch("apt", "bible-kjv-text", cache), program)]
    return _text_shard("text", parts, "WordNet licence (Princeton), PSF (Python documentation), public domain (KJV)")


class _Prose(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.skip = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.skip += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.skip -= tag in ("script", "style")
        if tag in ("p", "h1", "h2", "h3", "li", "tr", "pre", "div"):
            self.words.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.skip:
            self.words.append(data)


def clean_html(page: str) -> str:
    prose = _Prose()
    prose.feed(page)
    return re.sub(r"\n\s*\n+", "\n", re.sub(r"[ \t]+", " ", "".join(prose.words))).strip()


def heldout_text(cache: Path) -> Shard:
    """SQLite's documentation: a package no model of ours is trained on, for bits per byte."""
    folder = fetch("apt", "sqlite3-doc", cache)
    pages = [
        ("sqlite", path.name, clean_html(path.read_text(errors="replace"))) for path in sorted(folder.rglob("*.html"))
    ]
    return _text_shard("heldout_text", [page for page in pages if len(page[2]) > 500], "public domain (SQLite)", "test")


def facts(cache: Path) -> Shard:
    """Countries and their capitals. Learnt by heart, so there is no test split."""
    raw = (fetch("npm", FLAGS, cache) / "package/country.json").read_bytes()
    rows = sorted((c["name"], c["capital"]) for c in json.loads(raw) if c.get("iso") and c.get("capital"))
    columns = {
        "country": np.array([r[0] for r in rows]),
        "capital": np.array([r[1] for r in rows]),
        "split": np.repeat("train", len(rows)),
    }
    return Shard("facts", {}, columns, "MIT (flag-icons)", "A", hashes={"facts/countries": sha256(raw)})


# WordNet's lexicographer files in which a taught word's sense should lie, by our category of it.
SENSES = {"animal": ("05",), "food": ("13", "20"), "plant": ("20",), "nature": ("17", "19")}
ARTIFACT = ("06",)


def shorten(gloss: str, limit: int = 72) -> str:
    """The first clause of a WordNet gloss, without parentheses, cut where a clause may end; "" if it cannot be."""
    first = " ".join(re.sub(r"\([^)]*\)", " ", gloss).split(";")[0].replace(" ,", ",").split())
    if len(first) <= limit:
        return first
    ends = [
        m.start()
        for m in re.finditer(r",| (?:with|having|that|which|used|and|from|usually|native|of the genus) ", first[:limit])
    ]
    ends = [end for end in ends if end >= 20]
    return first[: ends[-1]] if ends else ""


def definitions(cache: Path) -> Shard:
    """The commonest fitting noun sense of each everyday word we teach, in a few words of WordNet. Learnt by heart."""
    folder = fetch("apt", "wordnet-base", cache) / "usr/share/wordnet"
    senses: dict[str, list[int]] = {}
    for line in (folder / "index.noun").read_text("latin-1").splitlines():
        if not line.startswith("  "):
            fields = line.split()
            senses[fields[0].replace("_", " ")] = [int(offset) for offset in fields[-int(fields[2]) :]]
    synsets = (folder / "data.noun").read_bytes()
    rows = []
    for name, category in sorted(set(emoji_names().values())):
        lines = [synsets[at : synsets.index(b"\n", at)].decode("latin-1") for at in senses.get(name, ())]
        fitting = [line for line in lines if line.split()[1] in SENSES.get(category, ARTIFACT)]
        if fitting and is_test(fitting[0].split()[4].replace("_", " ")):
            continue  # its line is held-out prose
        gloss = shorten(fitting[0].partition(" | ")[2]) if fitting else ""
        if gloss:
            rows.append((name, gloss))
    columns = {
        "word": np.array([r[0] for r in rows]),
        "gloss": np.array([r[1] for r in rows]),
        "split": np.repeat("train", len(rows)),
    }
    digest = sha256(*(f"{word}\t{gloss}".encode() for word, gloss in rows))
    return Shard("definitions", {}, columns, "WordNet licence (Princeton)", "A", hashes={"definitions/wordnet": digest})
