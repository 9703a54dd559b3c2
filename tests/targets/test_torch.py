"""The torch target: what a package computes, what it returns, and everything it refuses."""

from __future__ import annotations

import shutil
import zipfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import nn

from optpass.capture.export import build_fake, export_program
from optpass.capture.spans import Span
from optpass.errors import MissingValuesError, UserError, WeightError
from optpass.ir.program import Origin
from optpass.ir.weights import Constant
from optpass.pipeline.target import LoweredEntry, Lowering, Runner
from optpass.targets import torch as module
from optpass.targets.torch import Torch, _blamed, _constant, _with_arithmetic
from optpass.testing import capture_module

compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs g++: apt install g++")


def runner(folder: Path, entry: LoweredEntry, **options: Any) -> Runner:
    record = {
        "engine": entry.main,
        "inputs": [spec.as_json() for spec in entry.inputs],
        "outputs": [spec.as_json() for spec in entry.outputs],
        "details": dict(entry.details),
    }
    return Torch.load(folder, record, options)


class Net(nn.Module):
    """Returns what it computes twice, its input, a weight and a whole number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Linear(8, 4)

    def forward(self, image: torch.Tensor, index: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.fc(self.norm(self.conv(image)).mean((2, 3)))
        return {"y": y, "z": y, "image": image, "bias": self.fc.bias, "index": index + 1}


@compiles
def test_a_package_computes_the_module_and_shares_no_memory(tmp_path: Path) -> None:
    program, module = capture_module(Net, image=torch.zeros(2, 3, 6, 5), index=torch.zeros(1, dtype=torch.long))
    entry = Torch().lower(program, Lowering(tmp_path))["full"]
    assert [path.name for path in tmp_path.iterdir()] == ["full.pt2"]
    run = runner(tmp_path, entry)
    given = {"image": torch.randn(2, 3, 6, 5), "index": torch.tensor([4])}
    with torch.no_grad():
        expected, found = module(**given), run(given)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)
    owned = [tensor.untyped_storage().data_ptr() for tensor in (*given.values(), *found.values())]
    assert len(set(owned)) == len(owned)
    found["bias"].zero_()
    torch.testing.assert_close(run(given)["bias"], expected["bias"])


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("options", [{"max_autotune": True}, {"matmul_precision": "high", "device": "cpu"}])
def test_options_give_the_same_result(options: dict[str, Any], captured: Any, tmp_path: Path) -> None:
    program, module, inputs = captured("resnet")
    target = Torch.of("torch", options)
    entry = target.lower(program, Lowering(tmp_path))["full"]
    with torch.no_grad():
        expected = module(**inputs)
    found = runner(tmp_path, entry, **target.as_options())(inputs)
    torch.testing.assert_close(found["logits"], expected["logits"], atol=1e-4, rtol=1e-4)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("name", ["svd_unet", "transformer"])
def test_agrees_with_the_eager_module_to_1e_4(name: str, captured: Any, tmp_path: Path) -> None:
    program, module, inputs = captured(name)
    entry = Torch().lower(program, Lowering(tmp_path))["full"]
    arguments = program.entries["full"].signature.arguments.unflatten(inputs)
    with torch.no_grad():
        expected = module(**arguments).sample
    torch.testing.assert_close(runner(tmp_path, entry)(inputs)["sample"], expected, atol=1e-4, rtol=1e-4)


@compiles
@pytest.mark.slow
def test_open_sizes_are_served(tmp_path: Path, capture_shared: Any) -> None:
    program = capture_shared(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU()),
        {"input": ("batch", 3, "height", "width")},
        {"batch": Span(1, 4), "height": Span(4, 16), "width": Span(4, 16)},
    )
    run = runner(tmp_path, Torch().lower(program, Lowering(tmp_path))["full"])
    module = program.entries["full"].module(program.weights)
    for shape in [(1, 3, 4, 16), (3, 3, 9, 5)]:
        given = torch.randn(shape)
        torch.testing.assert_close(run({"input": given})["output"], module(given)[0], atol=1e-5, rtol=1e-5)


def test_outputs_that_no_input_reaches_are_known() -> None:
    program, _ = capture_module(Net, image=torch.zeros(2, 3, 6, 5), index=torch.zeros(1, dtype=torch.long))
    assert list(_constant(program.entries["full"])) == ["bias"]


def test_a_message_about_an_operator_names_its_modules() -> None:
    program, _ = capture_module(Net, image=torch.zeros(2, 3, 6, 5), index=torch.zeros(1, dtype=torch.long))
    graph = program.entries["full"]
    assert _blamed(graph, "LoweringException\n  target: aten.conv2d.default\n args[0]") == "conv"
    assert _blamed(graph, "out of memory") == "this graph"


def test_without_a_compiler_nothing_starts(captured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"finds no 'no-such-compiler' here: install g\+\+"):
        Torch().lower(captured("resnet")[0], Lowering(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none_is_refused(captured: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no CUDA device here"):
        Torch(device="cuda").lower(captured("resnet")[0], Lowering(tmp_path))


def test_a_structure_only_program_is_refused(tmp_path: Path) -> None:
    module, mode = build_fake(lambda: nn.Linear(3, 2))
    program = export_program(module, mode, {"input": torch.zeros(2, 3)}, None, Origin("test"))
    with pytest.raises(MissingValuesError, match="structure-only"):
        Torch().lower(program, Lowering(tmp_path))


@compiles
def test_nan_in_a_weight_names_the_weight(captured: Any, tmp_path: Path) -> None:
    program, _, _ = captured("resnet")
    broken = Constant(torch.full(program.weights["skip.weight"].shape, torch.nan))
    with pytest.raises(WeightError, match=r"skip\.weight"):
        Torch().lower(program.with_weights({"skip.weight": broken}), Lowering(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; os.kill(os.getpid(), 11)", r"dies of SIGSEGV where it loads full\.pt2.*Set LD_PRELOAD"),
        ("raise SystemExit('no such kernel')", r"cannot load full\.pt2, which it compiled: no such kernel"),
        ("print('loaded')", None),
    ],
)
def test_what_was_compiled_is_loaded_in_a_process_of_its_own(
    code: str, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOADING", code)
    with pytest.raises(UserError, match=message) if message else nullcontext():
        module._check_loads(tmp_path / "full.pt2")


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"), reason="the loader of this PyTorch dies of a package without engines"
)
def test_a_damaged_package_is_a_clear_error(captured: Any, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "full.pt2", "w") as archive:
        archive.writestr("full/archive_format", "pt2")
    graph = captured("resnet")[0].entries["full"]
    entry = LoweredEntry("full.pt2", graph.inputs, graph.outputs, {"device": "cpu", "constant": []})
    with pytest.raises(UserError, match=r"PyTorch cannot load full\.pt2"):
        runner(tmp_path, entry)


def test_what_the_machine_lacks_is_said_before_anything_is_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optpass.pipeline.apply import apply
    from optpass.pipeline.recipe import Recipe
    from optpass.pipeline.request import Request

    monkeypatch.setenv("CXX", "no-such-compiler")
    recipe = Recipe("bare", "", {}, (), (), "torch", Torch())
    with pytest.raises(UserError, match="finds no 'no-such-compiler' here"):
        apply(recipe, Request(str(tmp_path / "no-such-checkpoint"), tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


class Layers(nn.Module):
    """Two linears with a nonlinearity between, wide enough for integer kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize(
    "options",
    [
        {"form": "portable", "calls": 2},
        {"scheme": "w8"},
        {"scheme": "w4", "group_size": 32, "symmetric": False},
    ],
)
def test_weights_of_integers_become_arithmetic(options: dict[str, Any]) -> None:
    pytest.importorskip("nncf", reason="pip install 'optpass[quantization]'")
    from optpass.evaluate.difference import program_difference
    from optpass.ir.quantized import DEQUANTIZE_CHANNELS, DEQUANTIZE_GROUPS
    from optpass.passes.quantize import Quantize
    from optpass.pipeline.manager import run_pass
    from optpass.pipeline.recipe import Step

    program, _ = capture_module(Layers, x=torch.zeros(4, 64))
    quantised, _ = run_pass(program, Step("quantize", Quantize(**options)))
    found = _with_arithmetic(quantised.entries["full"])
    targets = {node.target for node in found.calls}
    assert not targets & {DEQUANTIZE_CHANNELS, DEQUANTIZE_GROUPS}
    arithmetic = replace(quantised, entries={"full": found})
    assert program_difference(quantised, arithmetic).relative_error <= 1e-6


@compiles
@pytest.mark.slow
def test_quantised_layers_run_right(tmp_path: Path) -> None:
    pytest.importorskip("nncf", reason="pip install 'optpass[quantization]'")
    from optpass.evaluate.difference import program_runner
    from optpass.passes.quantize import Quantize
    from optpass.pipeline.manager import run_pass
    from optpass.pipeline.recipe import Step

    program, _ = capture_module(Layers, x=torch.zeros(4, 64))
    quantised, _ = run_pass(program, Step("quantize", Quantize(form="portable", calls=2)))
    run = runner(tmp_path, Torch().lower(quantised, Lowering(tmp_path))["full"])
    given = {"x": torch.randn(4, 64)}
    torch.testing.assert_close(
        run(given)["output"], program_runner(quantised, "full")(given)["output"], atol=1e-4, rtol=0
    )
