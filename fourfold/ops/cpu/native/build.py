"""Compiles the kernels of this directory into one shared library beside them.

``python -m fourfold.ops.cpu.native.build`` does it by hand. Plain Python without dependencies, for it also runs while
the package is being installed. Only a call builds; nothing is ever compiled while a model runs.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = HERE / "libfourfold.so"
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
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted([*sources(), *HERE.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def compiler() -> str | None:
    """$CXX, or the first of the usual names that is there."""
    return next(filter(None, map(shutil.which, filter(None, [os.environ.get("CXX"), "g++", "c++", "clang++"]))), None)


def is_current(library: Path = LIBRARY) -> bool:
    return library.exists() and fingerprint().encode() in library.read_bytes()


def build(library: Path = LIBRARY) -> str | None:
    """Builds ``library`` unless it is current. Returns None, or why it could not be built; never raises for that."""
    if is_current(library):
        return None
    cxx = compiler()
    if cxx is None:
        return "no C++ compiler was found (set CXX, or install g++)"
    scratch = library.with_name(f".{library.name}.{os.getpid()}")
    stamp = f'-DFINGERPRINT="{fingerprint()}"'
    try:
        done = subprocess.run(
            [cxx, *FLAGS, stamp, *map(str, sources()), "-o", str(scratch)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            return f"{cxx} failed: {done.stderr.strip()[-2000:]}"
        scratch.replace(library)  # whole or not at all
    except OSError as error:
        return str(error)
    finally:
        scratch.unlink(missing_ok=True)
    return None


if __name__ == "__main__":
    if problem := build():
        sys.exit(f"native kernels: not built: {problem}")
    print(f"native kernels: {LIBRARY}")
