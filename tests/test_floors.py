"""The house rules that a machine can check: who may import whom, and what nobody may do."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fourfold"
SOURCES = {str(path.relative_to(ROOT)): path for path in sorted(PACKAGE.rglob("*.py"))}
MAX_LINES = 500
COMPILER = PACKAGE / "ops/cpu/native/build.py"  # starts one while the package is installed, and only then


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, '.'); {command}"],
        cwd=folder,
        env={**os.environ, "COLUMNS": "200"},  # one contract, one line
        capture_output=True,
        text=True,
    )


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    found = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return [(ast.unparse(node.func), node) for node in found]


def test_imports_go_down():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("model/norm.py", "from fourfold.text import tokenizer", "Imports go down the floors"),
        ("serve/request.py", "import fourfold.plan", "Imports go down the floors"),
        ("media/image.py", "from fourfold.model.transformer import Model", "Text, media and data know nothing"),
        ("counts.py", "import torch", "without torch"),
    ],
)
def test_an_import_that_goes_up_is_caught(tmp_path, module, line, contract):
    for name, path in SOURCES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    changed = tmp_path / "fourfold" / module
    changed.write_text(changed.read_text() + f"\n{line}\n")
    result = lint_imports(tmp_path)
    assert result.returncode != 0
    broken = [row for row in result.stdout.splitlines() if "BROKEN" in row]
    assert any(contract in row for row in broken), result.stdout + result.stderr


def test_the_command_line_and_the_planner_start_without_torch():
    code = (
        "import sys, fourfold, fourfold.cli, fourfold.counts, fourfold.plan;"
        "fourfold.cli.build_parser();"
        "sys.exit(', '.join({'torch', 'numpy', 'fastapi', 'rich'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_is_one_concept(name):
    assert len(SOURCES[name].read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_is_ever_unpickled(name):
    used = imports(SOURCES[name])
    assert not {n for n in used if n.split(".")[0] in {"pickle", "shelve", "marshal", "dill", "joblib"}}
    for function, call in calls(SOURCES[name]):
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if function == "torch.load":
            assert arguments.get("weights_only") == "True"
        assert arguments.get("allow_pickle", "False") == "False"
        assert function not in ("eval", "exec")


@pytest.mark.parametrize("floor", ["api", "media", "model", "ops", "serve", "text", "weights"])
def test_what_a_server_runs_opens_no_connection(floor):
    for path in (PACKAGE / floor).rglob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"urllib", "requests", "httpx", "aiohttp", "ftplib"}, path
        assert "subprocess" not in roots or path == COMPILER, path


@pytest.mark.parametrize("floor", ["model", "ops"])
def test_modules_do_no_input_output_and_know_no_cluster(floor):
    for path in (PACKAGE / floor).rglob("*.py"):
        used = imports(path)
        assert not any(name.startswith("torch.distributed") for name in used), path
        assert "open" not in {function for function, _ in calls(path)}, path


def test_the_model_reads_like_the_paper():
    assert len((PACKAGE / "model" / "transformer.py").read_text().splitlines()) < 350
