"""The openvino target: numerics against eager, one data file, kernels, threads, and everything it refuses."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("openvino", reason="pip install 'optpass[openvino]'")

from optpass.capture.export import build_fake, export_program
from optpass.capture.spans import Span
from optpass.errors import MissingValuesError, UserError
from optpass.evaluate.difference import tensor_difference
from optpass.evaluate.trials import random_inputs
from optpass.ir.hashing import file_digest
from optpass.ir.program import Origin, Program
from optpass.pipeline.target import LoweredEntry, Lowering, Runner
from optpass.runtime.module import EngineModule
from optpass.targets.openvino import OpenVino
from optpass.testing import capture_module


def record(entry: LoweredEntry) -> dict[str, Any]:
    """The entry as the manifest has it."""
    return {
        "engine": entry.main,
        "inputs": [spec.as_json() for spec in entry.inputs],
        "outputs": [spec.as_json() for spec in entry.outputs],
        "details": entry.details,
    }


def runner(folder: Path, entry: LoweredEntry, **options: Any) -> Runner:
    return OpenVino.load(folder, record(entry), options)


@pytest.mark.parametrize("name", ["resnet", "transformer", pytest.param("svd_unet", marks=pytest.mark.slow)])
def test_agrees_with_the_eager_module_to_1e_4(name: str, captured: Any, tmp_path: Path) -> None:
    program, module, inputs = captured(name)
    entry = OpenVino().lower(program, Lowering(tmp_path))["full"]
    graph = program.entries["full"]
    engine = EngineModule(graph.signature, graph.inputs, graph.outputs, runner(tmp_path, entry))
    arguments = graph.signature.arguments.unflatten(inputs)
    with torch.no_grad():
        expected, found = module(**arguments), engine(**arguments)
    assert type(found) is type(expected)
    for key in expected:
        assert float(expected[key].abs().max()) > 0.1
        torch.testing.assert_close(found[key], expected[key], atol=1e-4, rtol=1e-4)
    assert entry.details["kernels"].keys() == {"f32"}
    assert entry.details["named_nodes"] == 1.0


class Passed(nn.Module):
    """Takes what it does not use; returns its input, one value twice, a whole number and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(2))

    def forward(self, x: torch.Tensor, unused: torch.Tensor, index: torch.Tensor) -> dict[str, Any]:
        y = x.sin()
        return {"x": nn.functional.dropout(x, training=False), "y": y, "z": y, "index": index + 1, "b": self.table}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_inputs_and_outputs_of_any_dtype_keep_names_and_order(dtype: torch.dtype, tmp_path: Path) -> None:
    index = torch.zeros(1, dtype=torch.long)
    program, module = capture_module(Passed, x=torch.zeros(2, 3, dtype=dtype), unused=torch.zeros(()), index=index)
    entry = OpenVino().lower(program, Lowering(tmp_path))["full"]
    given = {"x": torch.randn(2, 3).to(dtype), "unused": torch.tensor(1.0), "index": torch.tensor([4])}
    before = {name: tensor.clone() for name, tensor in given.items()}
    expected, found = module(**given), runner(tmp_path, entry)(given)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        # The sine of 16 bits is computed in f32 and rounded once, as PyTorch's is.
        torch.testing.assert_close(found[name], value, atol=1e-6 if name in "yz" else 0, rtol=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.items())


def test_open_sizes_are_served(tmp_path: Path, capture_shared: Any) -> None:
    program = capture_shared(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU()),
        {"input": ("batch", 3, "height", "width")},
        {"batch": Span(1, 4), "height": Span(4, 16), "width": Span(4, 16)},
    )
    entry = OpenVino().lower(program, Lowering(tmp_path))["full"]
    run = runner(tmp_path, entry)
    module = program.entries["full"].module(program.weights)
    answers = []
    for shape in [(1, 3, 4, 16), (3, 3, 9, 5), (1, 3, 4, 16)]:
        given = torch.randn(shape)
        answers.append((run({"input": given})["output"], module(given)[0]))
    for found, expected in answers:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_calls_from_several_threads_keep_their_answers(captured: Any, tmp_path: Path) -> None:
    program, module, _ = captured("resnet")
    run = runner(tmp_path, OpenVino(hint="throughput", streams=2).lower(program, Lowering(tmp_path))["full"])
    trials = [random_inputs(program.entries["full"].inputs_at(), {}, seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(run, trials))
    with torch.no_grad():
        for given, found in zip(trials, answers, strict=True):
            torch.testing.assert_close(found["logits"], module(**given)["logits"], atol=1e-4, rtol=1e-4)


def two_entries(program: Program) -> Program:
    """The same graph twice, as a pass leaves it that splits a model into a full and a reduced call."""
    graph = program.entries["full"]
    return replace(program, entries={"full": graph, "reuse": graph.copy()})


def test_entries_share_their_weights_in_one_hashed_file(captured: Any, tmp_path: Path) -> None:
    program, module, inputs = captured("resnet")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    OpenVino().lower(program, Lowering(tmp_path / "one"))
    entries = OpenVino().lower(two_entries(program), Lowering(tmp_path / "two"))
    alone, shared = (tmp_path / name / "weights.bin" for name in ("one", "two"))
    assert {path.name for path in shared.parent.iterdir()} == {"full.xml", "reuse.xml", "weights.bin"}
    assert shared.stat().st_size == alone.stat().st_size
    assert entries["full"].digests == entries["reuse"].digests == {"weights.bin": file_digest(shared)}
    with torch.no_grad():
        expected = module(**inputs)["logits"]
    for entry in entries.values():
        torch.testing.assert_close(runner(shared.parent, entry)(inputs)["logits"], expected, atol=1e-4, rtol=1e-4)


def test_half_stores_weights_in_16_bits(captured: Any, tmp_path: Path) -> None:
    program, module, inputs = captured("resnet")
    sizes = []
    for half in (False, True):
        folder = tmp_path / str(half)
        folder.mkdir()
        entry = OpenVino(half=half).lower(program, Lowering(folder))["full"]
        sizes.append((folder / "weights.bin").stat().st_size)
    assert sizes[1] < 0.6 * sizes[0]
    with torch.no_grad():
        expected = module(**inputs)["logits"]
    # 11 bits of each weight.
    assert tensor_difference(expected, runner(folder, entry)(inputs)["logits"]).snr > 60


def test_layers_say_what_they_compute_in(captured: Any, tmp_path: Path) -> None:
    program, _, _ = captured("resnet")
    entry = OpenVino(precision="bf16").lower(program, Lowering(tmp_path))["full"]
    found = entry.details["kernels"]
    if "bf16" not in found:
        pytest.skip("this processor has no bf16")
    assert found["bf16"] >= 3


@pytest.mark.parametrize("options", [{"optimize": False}, {"opset": 21}, {"threads": 1, "device": "AUTO"}])
def test_every_option_gives_the_same_result(options: dict[str, Any], captured: Any, tmp_path: Path) -> None:
    program, module, inputs = captured("resnet")
    target = OpenVino.of("openvino", options)
    entry = target.lower(program, Lowering(tmp_path))["full"]
    with torch.no_grad():
        expected = module(**inputs)
    found = runner(tmp_path, entry, **target.as_options())(inputs)
    torch.testing.assert_close(found["logits"], expected["logits"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("half", [False, True])
def test_files_are_foreseen(half: bool, captured: Any, tmp_path: Path) -> None:
    program, _, _ = captured("transformer")
    target = OpenVino(half=half)
    foreseen = target.predict(program)
    target.lower(program, Lowering(tmp_path))
    found = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 0.8 * found < foreseen.disk < 1.4 * found
    assert foreseen.loaded > program.used_weights().nbytes


def test_a_cache_is_kept_with_the_users(captured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "out").mkdir()
    OpenVino(cache=True).lower(captured("resnet")[0], Lowering(tmp_path / "out"))
    assert list((tmp_path / "cache" / "optpass" / "openvino").glob("*.blob"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"full.xml", "weights.bin"}


class Determinant(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.det(x)


def test_an_operator_that_openvino_lacks_names_its_module(tmp_path: Path) -> None:
    program, _ = capture_module(lambda: nn.Sequential(nn.ReLU(), Determinant()), input=torch.zeros(3, 3))
    assert OpenVino().supports(program) == []
    with pytest.raises(UserError, match=re.escape("cannot convert 1 (Det): ") + ".*No conversion rule"):
        OpenVino().lower(program, Lowering(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_doubles_are_refused_with_the_module_path() -> None:
    module, mode = build_fake(lambda: nn.Sequential(nn.Linear(3, 2)), torch.float64)
    program = export_program(module, mode, {"input": torch.zeros(2, 3, dtype=torch.float64)}, None, Origin("test"))
    assert any(item.path == "0" and "OpenVINO has no f64" in item.reason for item in OpenVino().supports(program))


@pytest.mark.parametrize("device", ["GPU", "NPU"])
def test_a_device_that_is_not_there_is_refused(device: str, captured: Any, tmp_path: Path) -> None:
    import openvino

    if any(name.startswith(device) for name in openvino.Core().available_devices):
        pytest.skip(f"this machine has a {device}")
    with pytest.raises(UserError, match=rf"finds no {device} here, only CPU"):
        OpenVino.of("openvino", {"device": device}).lower(captured("resnet")[0], Lowering(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_structure_only_program_is_refused(tmp_path: Path) -> None:
    module, mode = build_fake(lambda: nn.Linear(3, 2))
    program = export_program(module, mode, {"input": torch.zeros(2, 3)}, None, Origin("test"))
    with pytest.raises(MissingValuesError, match="structure-only"):
        OpenVino().lower(program, Lowering(tmp_path))


def test_a_damaged_file_is_a_clear_error(captured: Any, tmp_path: Path) -> None:
    entry = OpenVino().lower(captured("resnet")[0], Lowering(tmp_path))["full"]
    (tmp_path / entry.main).write_text("<net>")
    with pytest.raises(UserError, match=r"OpenVINO cannot run full\.xml on CPU"):
        runner(tmp_path, entry)


def test_a_large_engine_is_asked_for_and_not_made(
    captured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optpass.targets.openvino.LARGE", 0)
    entry = OpenVino().lower(captured("resnet")[0], Lowering(tmp_path))["full"]
    assert "kernels" not in entry.details
    assert runner(tmp_path, entry)(captured("resnet")[2]).keys() == {"features", "logits"}


def test_weights_that_can_be_exchanged_are_refused(captured: Any) -> None:
    from optpass.ir.slots import Slot

    program, _, _ = captured("resnet")
    weight = program.weights["skip.weight"]
    slotted = program.with_weights({"skip.weight": Slot("skip", "delta", weight, weight, "none")})
    assert [item.path for item in OpenVino().refuses(slotted)] == ["skip.weight"]


class Layers(nn.Module):
    """Two convolutions with a nonlinearity between: OpenVINO generates code of its own for linears this small."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 32, 3), nn.Conv2d(32, 16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def test_quantised_layers_run_in_integers(tmp_path: Path) -> None:
    pytest.importorskip("nncf", reason="pip install 'optpass[quantization]'")
    from optpass.evaluate.difference import program_runner
    from optpass.passes.quantize import Quantize
    from optpass.pipeline.manager import run_pass
    from optpass.pipeline.recipe import Step

    program, _ = capture_module(Layers, x=torch.zeros(2, 16, 12, 12))
    quantised, _ = run_pass(program, Step("quantize", Quantize(form="cpu", calls=2)))
    entry = OpenVino().lower(quantised, Lowering(tmp_path))["full"]
    assert entry.details["kernels"] == {"i8": 2}
    assert entry.coverage is not None
    assert entry.coverage.native == entry.coverage.operators
    given = {"x": torch.randn(2, 16, 12, 12)}
    expected, found = program_runner(quantised, "full")(given), runner(tmp_path, entry)(given)
    # Kernels round sums that lie between two steps as they come.
    assert tensor_difference(expected["output"], found["output"]).snr > 35
