from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest


class Author:
    """A shell in a folder of its own, with an environment that sees this one's packages and installs into itself."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "work"
        self.folder.mkdir()
        environment = root / "venv"
        venv.create(environment, symlinks=True)
        self.python = environment / "bin" / "python"
        paths = {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]}
        own = next((environment / "lib").iterdir()) / "site-packages"
        # addsitedir, and not plain paths: editable installs live in .pth files there.
        own.joinpath("outer.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in paths))
        self._script("pip", 'exec "$(dirname "$0")/python" -m pip --disable-pip-version-check "$@"')
        self._script("optpass", 'exec "$(dirname "$0")/python" -c "from optpass.cli import main; main()" "$@"')
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_", "PYTEST"))}
        self.variables = {
            **kept,
            "PATH": f"{self.python.parent}{os.pathsep}{kept.get('PATH', '')}",
            "PIP_NO_INDEX": "1",
        }

    def _script(self, name: str, line: str) -> None:
        path = self.python.parent / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    def sh(self, script: str) -> str:
        """Run ``script`` as a user would, stopping at the first failure; what it printed."""
        done = subprocess.run(
            ["sh", "-ec", script], cwd=self.folder, env=self.variables, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, f"$ {script}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def run_python(self, code: str) -> str:
        done = subprocess.run(
            [self.python, "-c", code], cwd=self.folder, env=self.variables, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="session")
def author(tmp_path_factory):
    if sys.platform == "win32":
        pytest.skip("the snippets are for a POSIX shell")
    return Author(tmp_path_factory.mktemp("author"))
