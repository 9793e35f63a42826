"""Compiles the CPU kernels while the package is installed, where a compiler is at hand; without them it works too."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("fourfold/ops/cpu/native")


class KernelBuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        # loaded by its path: torch, which the package itself imports, is not there while it is being built
        spec = importlib.util.spec_from_file_location("native_build", Path(self.root) / NATIVE / "build.py")
        assert spec is not None and spec.loader is not None
        native_build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native_build)
        if problem := native_build.build():
            self.app.display_warning(f"CPU kernels are not compiled, slower ones will run: {problem}")
        elif version != "editable":
            made = map(native_build.library, native_build.LEVELS)
            build_data["artifacts"] += [f"/{NATIVE}/{path.name}" for path in made]
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
