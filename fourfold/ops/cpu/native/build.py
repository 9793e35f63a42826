"""Compiles the kernels of this directory into shared libraries beside them, one for each level of processors.

``python -m fourfold.ops.cpu.native.build`` does it by hand. Plain Python without dependencies, for it also runs while
the package is being installed. Only a call builds; nothing is ever compiled while a model runs.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
# What torch calls a processor's level -> the flags for it. The widths of vectors are fixed while the kernels are
# compiled (lanes.h), so that each level has a library of its own. Processors of other kinds have one.
LEVELS: dict[str, list[str]] = (
    {"AVX512": ["-march=x86-64-v4"], "AVX2": ["-march=x86-64-v3"]}
    if platform.machine().lower() in ("x86_64", "amd64")
    else {"DEFAULT": []}
)
FLAGS = [
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fno-math-errno",
    "-Wno-psabi",
    "-Wno-ignored-attributes",
]


def sources() -> list[Path]:
    return sorted(HERE.glob("*.cpp"))


def fingerprint() -> str:
    """Of everything that the library is made of: it carries this, so that an old one is never used."""
    digest = hashlib.sha256(repr((FLAGS, LEVELS)).encode())
    for path in sorted([*sources(), *HERE.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def compiler() -> str | None:
    """$CXX, or the first of the usual names that is there."""
    return next(filter(None, map(shutil.which, filter(None, [os.environ.get("CXX"), "g++", "c++", "clang++"]))), None)


def library(level: str, folder: Path = HERE) -> Path:
    return folder / f"libfourfold-{level.lower()}.so"


def is_current(path: Path) -> bool:
    return path.exists() and fingerprint().encode() in path.read_bytes()


def build(folder: Path = HERE) -> str | None:
    """Builds the libraries that are not current. Returns None, or why one could not be built; never raises for that."""
    wanted = {library(level, folder): flags for level, flags in LEVELS.items()}
    wanted = {path: flags for path, flags in wanted.items() if not is_current(path)}
    if wanted and compiler() is None:
        return "no C++ compiler was found (set CXX, or install g++)"
    with ThreadPoolExecutor() as pool:  # each waits for a compiler
        return next(filter(None, pool.map(_compile, wanted, wanted.values())), None)


def _compile(path: Path, flags: list[str]) -> str | None:
    cxx, stamp = compiler(), f'-DFINGERPRINT="{fingerprint()}"'
    assert cxx is not None
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        done = subprocess.run(
            [cxx, *FLAGS, *flags, stamp, *map(str, sources()), "-o", str(scratch)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            return f"{cxx} failed: {done.stderr.strip()[-2000:]}"
        scratch.replace(path)  # whole or not at all
    except OSError as error:
        return str(error)
    finally:
        scratch.unlink(missing_ok=True)
    return None


if __name__ == "__main__":
    if problem := build():
        sys.exit(f"native kernels: not built: {problem}")
    print("native kernels:", *map(library, LEVELS))
