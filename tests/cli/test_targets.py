"""``optpass targets`` and ``optpass targets install``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTPASS_HOME", str(tmp_path))
    for name in ("EXECUTORCH", "RKNN"):
        monkeypatch.delenv(f"OPTPASS_TARGET_PYTHON_{name}", raising=False)


def test_what_is_missing_is_told_with_its_command(optpass, monkeypatch):
    found = {item["name"]: item for item in optpass("targets", "--json").json["targets"]}
    assert found["program"]["lacks"] == ""
    assert found["program"]["environment"] is None
    assert found["rknn"]["lacks"] == "needs: optpass targets install rknn (5.6 GB)"
    assert found["rknn"]["environment"]["lacks"] == "its environment is not installed here"
    assert found["ethos-u"]["environment"]["folder"] == found["executorch"]["environment"]["folder"]
    monkeypatch.setenv("OPTPASS_TARGET_PYTHON_EXECUTORCH", sys.executable)
    found = {item["name"]: item for item in optpass("targets", "--json").json["targets"]}
    assert found["executorch"]["lacks"] == found["ethos-u"]["lacks"] == ""


def test_only_targets_with_an_environment_are_installed(optpass):
    outcome = optpass("targets", "install", "onnxruntime")
    assert outcome.code == 2
    assert "pip install 'optpass[onnxruntime]'" in outcome.err
    outcome = optpass("targets", "install", "rknm")
    assert outcome.code == 2
    assert "did you mean 'rknn'" in outcome.err


def test_a_folder_that_is_there_is_not_written_into(optpass, tmp_path):
    outcome = optpass("targets", "install", "executorch", "--path", tmp_path)
    assert outcome.code == 2
    assert "exists" in outcome.err
    assert "BSD-3-Clause" in outcome.err


def test_apply_without_the_environment_says_so_before_any_work(optpass, unet_folder, tmp_path):
    outcome = optpass("apply", "export", unet_folder, "-o", tmp_path / "out", "--target", "executorch")
    assert outcome.code == 2
    assert "optpass targets install executorch" in outcome.err
    assert not (tmp_path / "out").exists()
