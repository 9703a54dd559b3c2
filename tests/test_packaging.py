"""The wheel, installed into a fresh environment, contains passes, targets and recipes."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # From a copy: a build in place leaves build/ and egg-info behind in the checkout.
    names = ("optpass", "passes", "targets", "recipes", "pyproject.toml", "README.md", "LICENSE")
    source.mkdir()
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in names), str(source)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(source)], check=True)
    [built] = folder.glob("optpass-*.whl")
    return built


def test_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for expected in ("optpass/passes/cast.py", "optpass/targets/onnxruntime.py", "optpass/recipes/export.yaml"):
        assert expected in names
    assert "optpass/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "passes", "targets"))]


def test_runs_in_a_fresh_environment(wheel, tmp_path):
    # The environment is fresh; its dependencies are this one's, which are gigabytes to install again.
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    target = next((venv / "lib").glob("python*/site-packages"))
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(install, check=True)
    here = next(p for p in sys.path if p.endswith("site-packages"))
    # addsitedir would also run this environment's .pth files, the editable install's among them.
    (target / "dependencies.pth").write_text(f"{here}\n")
    outcome = subprocess.run(
        [str(venv / "bin" / "optpass"), "passes", "--json"], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    names = [item["name"] for item in json.loads(outcome.stdout)["passes"]]
    assert {"cast", "single-token-attention"} <= set(names)
    where = "import optpass.passes.cast as m; print(m.__file__)"
    found = subprocess.run([str(python), "-c", where], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert str(venv) in found.stdout
