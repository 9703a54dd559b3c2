"""new-pass: what it writes works; what it refuses, it refuses before it writes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from optpass.errors import UserError
from optpass.pipeline.scaffold import new_pass

ROOT = Path(__file__).parents[2]
CHECKOUT = """\
# a comment that stays
[project]
name = "optpass"

[project.entry-points."optpass.passes"]
cast = "optpass.passes.cast:CastFloats"

[tool.other]
key = 1
"""


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "passes").mkdir()
    (tmp_path / "tests" / "passes").mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text(CHECKOUT)
    return tmp_path


def points(project: Path) -> dict[str, str]:
    return tomllib.loads((project / "pyproject.toml").read_text())["project"]["entry-points"]["optpass.passes"]


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def refused(name: str, folder: Path, package: str | None = None) -> str:
    before = files(folder)
    with pytest.raises(UserError) as caught:
        new_pass(name, destination=folder, package=package)
    assert files(folder) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_into_a_checkout(checkout):
    written = new_pass("drop-ones", destination=checkout)
    assert [str(path.relative_to(checkout)) for path in written] == [
        "passes/drop_ones.py",
        "tests/passes/test_drop_ones.py",
        "pyproject.toml",
    ]
    assert points(checkout) == {
        "cast": "optpass.passes.cast:CastFloats",
        "drop-ones": "optpass.passes.drop_ones:DropOnes",
    }
    line = 'drop-ones = "optpass.passes.drop_ones:DropOnes"\n'
    assert (checkout / "pyproject.toml").read_text().replace(line, "") == CHECKOUT
    assert "from optpass.passes.drop_ones import DropOnes" in (checkout / "tests/passes/test_drop_ones.py").read_text()


def test_the_generated_pass_and_test_work(tmp_path):
    new_pass("drop-ones", destination=tmp_path, package="my_passes")
    new_pass("drop-more", destination=tmp_path, package="my_passes")
    project = tmp_path / "my_passes"
    assert points(project) == {
        "drop-ones": "my_passes.drop_ones:DropOnes",
        "drop-more": "my_passes.drop_more:DropMore",
    }
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests"],
        cwd=project,
        env={"PYTHONPATH": str(project), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "6 passed" in run.stdout, run.stdout + run.stderr


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="ruff is not installed")
def test_what_goes_into_a_checkout_is_clean(checkout):
    for path in new_pass("drop-ones", destination=checkout)[:2]:
        for command in (["check"], ["format", "--check"]):
            lint = subprocess.run(
                [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(path.relative_to(checkout)), "-"],
                cwd=ROOT,
                input=path.read_text(),
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert lint.returncode == 0, lint.stdout + lint.stderr


def test_into_an_existing_project_without_the_table(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "my-passes"\nversion = "1"\n')
    (tmp_path / "src" / "my_passes").mkdir(parents=True)
    (tmp_path / "src" / "my_passes" / "__init__.py").write_text("KEPT = 1\n")
    written = new_pass("drop-ones", destination=tmp_path, package="my_passes")
    assert tmp_path / "src" / "my_passes" / "drop_ones.py" in written
    assert points(tmp_path) == {"drop-ones": "my_passes.drop_ones:DropOnes"}
    assert (tmp_path / "src" / "my_passes" / "__init__.py").read_text() == "KEPT = 1\n"


@pytest.mark.parametrize("name", ["Drop", "drop_ones", "1drop", "drop-", "-drop", "drop--ones", "", "../evil", "class"])
def test_refuses_names(checkout, name):
    assert "lower case with hyphens" in refused(name, checkout)


@pytest.mark.parametrize("package", ["my-passes", "../up", "My", "for", ""])
def test_refuses_packages(tmp_path, package):
    assert "as Python imports it" in refused("drop-ones", tmp_path, package)


def test_refuses_what_is_taken(checkout):
    assert "installed already" in refused("cast", checkout)
    new_pass("drop-ones", destination=checkout)
    assert "is there already" in refused("drop-ones", checkout)
    (checkout / "passes" / "drop_ones.py").unlink()
    assert "is there already" in refused("drop-ones", checkout)
    (checkout / "tests" / "passes" / "test_drop_ones.py").unlink()
    assert "registers a pass 'drop-ones' already" in refused("drop-ones", checkout)


def test_refuses_places(tmp_path):
    assert "no optpass checkout" in refused("drop-ones", tmp_path)
    (tmp_path / "my_passes").mkdir()
    (tmp_path / "my_passes" / "thesis.txt").write_text("mine")
    assert "has files and no pyproject.toml" in refused("drop-ones", tmp_path, "my_passes")
    assert "--package" in refused("drop-ones", tmp_path, "optpass")


def test_refuses_a_project_file_it_cannot_edit(checkout):
    (checkout / "pyproject.toml").write_text("[project\n")
    assert "not valid TOML" in refused("drop-ones", checkout)
    inline = '[project]\nname = "optpass"\nentry-points = {"optpass.passes" = {cast = "x:Y"}}\n'
    (checkout / "pyproject.toml").write_text(inline)
    assert "by hand" in refused("drop-ones", checkout)
