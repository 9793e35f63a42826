"""The twins in Triton: in its interpreter on a CPU, compiled where there is a GPU; and none of it where not asked."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from fourfold import ops
from fourfold.ops import reference

INSTALLED = find_spec("triton") is not None


def run(*program: str, **changes: str) -> str:
    """In a process of its own: whether Triton interprets is decided when it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", *program],
        env=os.environ | changes,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(not INSTALLED, reason="needs triton, which is for Linux")
def test_every_twin_agrees_with_its_reference_in_the_interpreter():
    said = run("tests.ops.triton_cases", "cpu", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert all(f"{name} agrees" in said for name in ops.TWINS["triton"])


@pytest.mark.skipif(not INSTALLED, reason="needs triton, which is for Linux")
def test_every_kernel_compiles_for_a_gpu(tmp_path):
    run("tests.ops.triton_compile", TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.skipif(not (INSTALLED and torch.cuda.is_available()), reason="needs a GPU")
def test_every_twin_agrees_with_its_reference_on_a_gpu():
    run("tests.ops.triton_cases", "cuda")


def test_a_gpu_without_triton_uses_the_reference(monkeypatch):
    monkeypatch.setattr("fourfold.ops.find_spec", lambda name: None)
    ops.implementation.cache_clear()
    for name in ops.TWINS["triton"]:
        assert ops.implementation(name, "cuda", None) is getattr(reference, name)
    with pytest.raises(ValueError, match=r"FOURFOLD_BACKEND.*triton.*not installed"):
        ops.implementation("rms_norm", "cpu", "triton")
    ops.implementation.cache_clear()


def test_work_on_a_cpu_imports_no_twin_in_triton():
    code = "import sys, torch; from fourfold import ops; ops.rms_norm(torch.ones(1, 4), torch.ones(4), 1e-6); "
    code += "ops.index_scores(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 4), torch.ones(1, 1, 1)); "
    code += "assert 'fourfold.ops.triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
