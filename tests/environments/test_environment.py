"""Where an environment is looked for, and what a user reads who has none."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from optpass.environments.environment import RECORD, Environment, home
from optpass.errors import UserError

VENDOR = Environment(
    name="some-vendor", first=("torch==2.13.0",), requirements=("sdk==1",), gigabytes=2.5, licence="theirs"
)


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTPASS_HOME", str(tmp_path))
    monkeypatch.delenv(VENDOR.variable, raising=False)


def recorded(**changes: object) -> None:
    VENDOR.folder.mkdir(parents=True)
    record = {"python": sys.executable, "requirements": ["torch==2.13.0", "sdk==1"], **changes}
    (VENDOR.folder / RECORD).write_text(json.dumps(record))


def test_none_is_told_with_the_command_and_the_size() -> None:
    with pytest.raises(UserError, match=r"'some' cannot be used.*\(2.5 GB\) with: optpass targets install some$"):
        VENDOR.interpreter("some")


def test_an_installed_one_is_used() -> None:
    recorded()
    assert VENDOR.lacks() == ""
    assert VENDOR.interpreter("some") == Path(sys.executable)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"python": "/nowhere/python"}, "is gone"), ({"requirements": ["sdk==0"]}, "another version of optpass")],
)
def test_one_that_does_not_fit_is_to_be_replaced(changes: dict[str, object], reason: str) -> None:
    recorded(**changes)
    with pytest.raises(UserError, match=f"{reason}.*--force"):
        VENDOR.interpreter("some")


def test_a_record_that_does_not_read_is_none() -> None:
    VENDOR.folder.mkdir(parents=True)
    (VENDOR.folder / RECORD).write_text("{half")
    assert VENDOR.record() is None


def test_a_variable_names_another_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert VENDOR.variable == "OPTPASS_TARGET_PYTHON_SOME_VENDOR"
    monkeypatch.setenv(VENDOR.variable, sys.executable)
    assert VENDOR.interpreter("some") == Path(sys.executable)
    monkeypatch.setenv(VENDOR.variable, "/nowhere/python")
    with pytest.raises(UserError, match="SOME_VENDOR names /nowhere/python, which is no interpreter"):
        VENDOR.interpreter("some")


def test_home_is_the_platforms_place_for_user_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPTPASS_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert home() == Path("/data/optpass")
    monkeypatch.delenv("XDG_DATA_HOME")
    assert home() == Path.home() / ".local" / "share" / "optpass"
