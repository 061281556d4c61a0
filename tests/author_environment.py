"""Environments of a plugin author: packages installed beside NEXUS, commands run where only they are visible.

Nothing comes from the network: wheels are built with the build tools that are here, and heavy packages are shared.
"""

from __future__ import annotations

import os
import site
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent


@dataclass(frozen=True)
class AuthorEnvironment:
    """A virtual environment of its own, which also sees what this one has installed, NEXUS included."""

    folder: Path

    @classmethod
    def create(cls, folder: Path) -> AuthorEnvironment:
        run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
        environment = cls(folder)
        shared = "".join(f"import site; site.addsitedir({place!r})\n" for place in site.getsitepackages())
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        (folder / "lib" / version / "site-packages" / "shared.pth").write_text(shared)
        return environment

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    def install(self, wheel: Path) -> None:
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet", "--no-index", "--no-deps"]
        run([*pip, str(wheel)])


def build_wheel(project: Path, out: Path) -> Path:
    """The wheel of a project, built offline."""
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out)]
    run([sys.executable, "-m", "pip", "wheel", *options, str(project)])
    (wheel,) = out.glob("*.whl")
    return wheel


def run(
    command: list[str], *, cwd: Path | None = None, expect: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A finished command; fails the test with all that it said unless it ends with the exit code `expect`."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | environment
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == expect, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done


def install_module(target: Path, name: str, code: str, entry: str | None = None) -> None:
    """A one-module plugin in a folder that is put on PYTHONPATH, with the metadata that an installer leaves.

    entry: the entry point's value, by default the module.
    """
    target.mkdir(parents=True, exist_ok=True)
    (target / f"{name}.py").write_text(dedent(code))
    metadata = target / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "INSTALLER").write_text("pip\n")
    (metadata / "RECORD").write_text(f"{name}.py,,\n{name}-1.0.dist-info/METADATA,,\n")
    (metadata / "entry_points.txt").write_text(f"[nexus.plugins]\n{name} = {entry or name}\n")
