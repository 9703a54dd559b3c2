"""Installing: whole or not at all, and every way in which it can go wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from optpass.environments import install as installing
from optpass.environments.environment import RECORD, Environment
from optpass.environments.install import install
from optpass.errors import UserError

VENDOR = Environment(name="vendor", first=("torch==1",), requirements=("sdk==2",), gigabytes=0.001, licence="theirs")


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTPASS_HOME", str(tmp_path))


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands of an installation, in which virtual environments are made and pip only noted."""
    return _recording(monkeypatch, lambda command: None)


def _recording(monkeypatch: pytest.MonkeyPatch, act: Callable[[Sequence[str]], None]) -> list[list[str]]:
    noted: list[list[str]] = []

    def run(command: Sequence[str], log: Path, failure: str) -> str:
        noted.append(list(command))
        if "venv" in command:
            python = Path(command[-1], "bin", "python")
            python.parent.mkdir(parents=True)
            python.write_text("#!/bin/sh\n")
            python.chmod(0o755)
        act(command)
        return "sdk==2\n" if "freeze" in command else ""

    monkeypatch.setattr(installing, "_run", run)
    return noted


@pytest.mark.slow
def test_a_real_one_of_a_package_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    stages: list[str] = []
    own = Environment(name="own", requirements=("pip",), gigabytes=0.05, licence="MIT")
    record = install(own, progress=lambda stage, fraction: stages.append(stage))
    assert own.lacks() == ""
    assert own.interpreter("own") == Path(record["python"])
    assert stages[:2] == ["make the environment", "install pip"]


def test_torch_goes_first_alone_and_pins_what_follows(commands: list[list[str]]) -> None:
    record = install(VENDOR)
    pip = [command for command in commands if "install" in command]
    assert [command[-1] for command in pip] == ["torch==1", "sdk==2"]
    constraint = Path(pip[1][pip[1].index("--constraint") + 1])
    assert constraint.read_text() == "torch==1\n"
    assert any("check" in command for command in commands)
    assert VENDOR.lacks() == ""
    assert record["installed"] == ["sdk==2"]


def test_an_installed_one_is_replaced_only_when_asked(commands: list[list[str]]) -> None:
    first = install(VENDOR)
    with pytest.raises(UserError, match=r"is installed in .*--force"):
        install(VENDOR)
    second = install(VENDOR, force=True)
    assert not Path(first["folder"]).exists()
    assert Path(second["folder"]).is_dir()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("pip cannot install sdk==2")])
def test_one_that_fails_leaves_what_was_there(
    error: BaseException, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = install(VENDOR)

    def fail(command: Sequence[str]) -> None:
        if command[-1] == "sdk==2":
            raise error

    _recording(monkeypatch, fail)
    with pytest.raises(type(error)):
        install(VENDOR, force=True)
    assert VENDOR.record() == before
    assert [path.name for path in VENDOR.folder.glob("venv-*")] == [Path(before["folder"]).name]


def test_what_a_killed_one_left_is_not_taken_for_whole_and_goes(commands: list[list[str]]) -> None:
    leftover = VENDOR.folder / "venv-00000000"
    leftover.mkdir(parents=True)
    assert VENDOR.lacks()
    install(VENDOR)
    assert not leftover.exists()


def test_a_place_of_the_users_own(commands: list[list[str]], tmp_path: Path) -> None:
    record = install(VENDOR, path=tmp_path / "here")
    assert record["folder"] == str(tmp_path / "here")
    assert (VENDOR.folder / RECORD).is_file()
    with pytest.raises(UserError, match="exists"):
        install(VENDOR, path=tmp_path / "here", force=True)


def test_what_pip_says_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; sys.stderr.write('ERROR: No matching distribution found for sdk\\n'); sys.exit(1)"
    with pytest.raises(UserError, match=r"pip cannot: ERROR: No matching distribution.*log"):
        installing._run([sys.executable, "-c", script], tmp_path / "log", "pip cannot")


def test_a_full_disk_and_a_missing_python_are_told_before(commands: list[list[str]]) -> None:
    big: Any = {"requirements": (), "licence": ""}
    with pytest.raises(UserError, match=r"needs 1500000\.0 GB"):
        install(Environment(name="big", gigabytes=1e6, **big))
    with pytest.raises(UserError, match=r"needs Python 2\.0; this is 3"):
        install(Environment(name="old", gigabytes=0.001, pythons=("2.0",), **big))
    assert not commands
