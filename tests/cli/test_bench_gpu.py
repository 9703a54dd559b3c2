"""`make bench-gpu` without a GPU: it says so; the same code runs at small size on the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optpass.pipeline.registry import target_class

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=580)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_the_reason(tmp_path: Path) -> None:
    outcome = run("--out", tmp_path / "gpu.md")
    assert outcome.returncode == 3
    assert "bench-gpu: no GPU to measure on: " in outcome.stderr.splitlines()[-1]
    assert not (tmp_path / "gpu.md").exists()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnxruntime", "torch"])
def test_the_same_code_measures_on_the_cpu(target: str, tmp_path: Path) -> None:
    if target_class(target).missing_packages():
        pytest.skip(f"target {target} is not installed")
    options = ("--device", "cpu", "--size", "tiny", "--models", "SD 1.5", "--precisions", "fp32", "--runs", 8)
    outcome = run(*options, "--target", target, "--out", tmp_path / "gpu.md")
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    page = (tmp_path / "gpu.md").read_text("utf-8")
    assert "# Denoisers on the CPU" in page
    rows = [line.split("|")[1].strip(" \\*") for line in page.splitlines() if line.startswith("| ")][1:]
    assert rows[:2] == ["eager", "torch.compile"]
    assert rows[-2:] == ["optpass", "optpass, one step of 3"]
    assert "Not measured" not in page
