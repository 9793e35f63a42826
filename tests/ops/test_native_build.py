"""The libraries are built where a compiler is at hand, whole or not at all; one of other sources is never used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fourfold.ops.cpu import native
from fourfold.ops.cpu.native import build


@pytest.fixture
def fresh():
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def test_without_a_compiler_it_says_so_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    problem = build.build(tmp_path)
    assert problem is not None and "no C++ compiler" in problem and not list(tmp_path.iterdir())


def test_a_compiler_that_fails_leaves_nothing(tmp_path, monkeypatch):
    broken = tmp_path / "bin" / "g++"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho no space left >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    problem = build.build(tmp_path)
    assert problem is not None and "no space left" in problem and sorted(tmp_path.iterdir()) == [broken.parent]


@pytest.mark.parametrize("content", [None, b"", b"not a library"])
def test_a_library_that_is_missing_or_broken_is_left_aside(fresh, tmp_path, monkeypatch, content):
    paths = {level: tmp_path / f"{level}.so" for level in build.LEVELS}
    for path in paths.values():
        if content is not None:
            path.write_bytes(content)
    monkeypatch.setattr(build, "library", paths.get)
    assert native.library() is None and not any(map(build.is_current, paths.values()))


def test_where_there_is_a_compiler_the_kernels_are_there():
    """Else every test of theirs would be skipped and nobody would know."""
    assert build.compiler() is None or native.library() is not None


@pytest.mark.skipif(native.library() is None, reason="the kernels are not compiled here")
def test_a_library_of_other_sources_is_left_aside(fresh, monkeypatch, caplog):
    libraries = [build.library(level) for level in build.LEVELS]
    assert all(map(build.is_current, libraries)) and build.build() is None
    monkeypatch.setattr(build, "fingerprint", lambda: "0123456789abcdef")
    assert native.library() is None and "other sources" in caplog.text and not any(map(build.is_current, libraries))


@pytest.mark.skipif(native.library() is None, reason="the kernels are not compiled here")
def test_run_as_a_program():
    command = [sys.executable, "-m", "fourfold.ops.cpu.native.build"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "libfourfold" in done.stdout and not done.stderr


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="runs the narrower kernels by itself")
def test_the_kernels_of_narrower_processors_pass_the_same_tests():
    """Torch takes the level from the environment, and so do the kernels."""
    files = ["rows", "twins"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    where = Path(__file__).parent
    done = subprocess.run(
        [*command, *(str(where / f"test_{name}.py") for name in files)],
        env=os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "FOURFOLD_MATRIX": "off"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
