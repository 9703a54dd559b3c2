"""The iree target: numerics on the CPU, modules for other devices, and errors by module path."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("iree.compiler", reason="pip install 'optpass[iree]'")
pytest.importorskip("iree.runtime", reason="pip install 'optpass[iree]'")

from optpass.errors import UserError
from optpass.pipeline.target import LoweredEntry, Lowering, Runner
from optpass.targets.iree import Iree, _place
from optpass.testing import capture_module


def runner(folder: Path, entry: LoweredEntry, **options: Any) -> Runner:
    record = {
        "engine": entry.main,
        "inputs": [spec.as_json() for spec in entry.inputs],
        "outputs": [spec.as_json() for spec in entry.outputs],
        "details": dict(entry.details),
    }
    return Iree.load(folder, record, options)


def test_two_entries_agree_with_the_eager_module_to_1e_4(captured: Any, tmp_path: Path) -> None:
    program, module, inputs = captured("resnet")
    graph = program.entries["full"]
    entries = Iree().lower(replace(program, entries={"full": graph, "reuse": graph.copy()}), Lowering(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"full.vmfb", "full.irpa", "reuse.vmfb", "reuse.irpa"}
    with torch.no_grad():
        expected = module(**inputs)
    for entry in entries.values():
        found = runner(tmp_path, entry)(inputs)
        assert list(found) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("backend", "chip"),
    [("cuda", "sm_86"), ("rocm", "gfx1100"), ("vulkan-spirv", "adreno"), ("metal-spirv", ""), ("llvm-cpu", "skylake")],
)
def test_other_devices_are_compiled_for_and_not_run(backend: str, chip: str, tmp_path: Path) -> None:
    program, _ = capture_module(lambda: nn.Sequential(nn.Linear(32, 16), nn.GELU()), input=torch.zeros(4, 32))
    target = Iree.of("iree", {"backend": backend, "chip": chip})
    entry = target.lower(program, Lowering(tmp_path))["full"]
    assert target.runs() == "elsewhere"
    assert (tmp_path / entry.main).stat().st_size > 1000
    assert entry.details["backend"] == backend


class Sampled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.grid_sample(x, x.new_zeros(1, 4, 4, 2) + x.mean(), mode="bicubic", align_corners=False)


def test_an_operator_that_iree_lacks_names_its_module(tmp_path: Path) -> None:
    program, _ = capture_module(lambda: nn.Sequential(nn.ReLU(), Sampled()), input=torch.zeros(1, 2, 4, 4))
    with pytest.raises(UserError, match=r"IREE cannot compile 1 \(GridSample\): failed to legalize"):
        Iree().lower(program, Lowering(tmp_path))


def test_a_line_of_the_module_is_found_in_the_onnx_file(tmp_path: Path) -> None:
    from optpass.interchange.onnx_folder import write_onnx_folder

    program, _ = capture_module(lambda: nn.Sequential(nn.ReLU(), nn.Tanh(), nn.ReLU()), input=torch.zeros(3, 3))
    source = write_onnx_folder(program, tmp_path).paths["full"]
    mlir = tmp_path / "full.mlir"
    mlir.write_text(
        "".join(f'    %{i} = torch.operator "onnx.{name}"\n' for i, name in enumerate(("Relu", "Tanh", "Relu")))
    )
    assert [_place(source, mlir, line) for line in (1, 2, 3)] == ["0 (Relu)", "1 (Tanh)", "2 (Relu)"]


def test_a_chip_that_does_not_exist_is_a_clear_error(tmp_path: Path) -> None:
    program, _ = capture_module(lambda: nn.Sequential(nn.ReLU()), input=torch.zeros(3, 3))
    with pytest.raises(UserError, match=r"IREE cannot compile .*missing GPU target"):
        Iree(backend="cuda", chip="sm_1").lower(program, Lowering(tmp_path))
    with pytest.raises(UserError, match="takes no chip"):
        Iree(backend="metal-spirv", chip="m1").lower(program, Lowering(tmp_path))


def test_a_damaged_module_is_a_clear_error(tmp_path: Path) -> None:
    program, _ = capture_module(lambda: nn.Sequential(nn.ReLU()), input=torch.zeros(3, 3))
    graph = program.entries["full"]
    (tmp_path / "full.vmfb").write_bytes(b"no module")
    with pytest.raises(UserError, match=r"IREE cannot load full\.vmfb \(built by 3\.13"):
        runner(tmp_path, LoweredEntry("full.vmfb", graph.inputs, graph.outputs, {"iree": "3.13"}))
