"""The qnn target: contexts for Snapdragon's HTP, run in its emulator, and everything it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnxruntime_qnn", reason="pip install 'optpass[qnn]'")

from optpass.capture.spans import Span
from optpass.errors import UserError
from optpass.evaluate.difference import tensor_difference
from optpass.pipeline.target import LoweredEntry, Lowering, Runner
from optpass.targets.qnn import DEVICES, Qnn
from optpass.testing import capture_module


def runner(folder: Path, entry: LoweredEntry, **options: Any) -> Runner:
    record = {
        "engine": entry.main,
        "inputs": [spec.as_json() for spec in entry.inputs],
        "outputs": [spec.as_json() for spec in entry.outputs],
        "details": entry.facts(),
    }
    return Qnn.load(folder, record, {"soc": "sm8650", **options})


def test_a_context_runs_in_the_emulator_as_the_module_does(captured: Any, tmp_path: Path) -> None:
    program, module, inputs = captured("resnet")
    entry = Qnn(soc="sm8650").lower(program, Lowering(tmp_path))["full"]
    [node] = onnx.load(tmp_path / entry.main, load_external_data=False).graph.node
    assert node.op_type == "EPContext"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full.onnx", "full_qnn.bin"]
    assert entry.details["bytes"] == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert entry.coverage is not None
    assert entry.coverage.native == entry.coverage.operators == entry.details["nodes"]
    with torch.no_grad():
        expected = module(**inputs)
    found = runner(tmp_path, entry)(inputs)
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        # f16 throughout: 11 bits in every tensor on the way; few logits make a noisy ratio.
        assert tensor_difference(tensor, found[name]).snr > (60 if name == "features" else 52)


def test_a_transformer_takes_whole_numbers(captured: Any, tmp_path: Path) -> None:
    program, module, inputs = captured("transformer")
    entry = Qnn(soc="sm8750").lower(program, Lowering(tmp_path))["full"]
    with torch.no_grad():
        [expected] = module(**program.entries["full"].signature.arguments.unflatten(inputs)).values()
    [found] = runner(tmp_path, entry, soc="sm8750")(inputs).values()
    assert tensor_difference(expected, found).snr > 45


class Determinant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.det(x)


def determinant() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Determinant())


def test_an_operator_without_a_kernel_is_refused_with_its_place(tmp_path: Path) -> None:
    program, _ = capture_module(determinant, input=torch.zeros(1, 4, 4))
    with pytest.raises(UserError, match=r"no kernels for 1 operators of full; fallback: cpu .*\n  2: Det"):
        Qnn(soc="sm8650").lower(program, Lowering(tmp_path))


def test_fallback_lets_it_run_elsewhere_and_says_so(tmp_path: Path) -> None:
    program, module = capture_module(determinant, input=torch.zeros(1, 4, 4))
    entry = Qnn(soc="sm8650", fallback="cpu").lower(program, Lowering(tmp_path))["full"]
    assert entry.coverage is not None
    assert entry.coverage.operators - entry.coverage.native == 1
    assert [(item.path, item.operator) for item in entry.coverage.elsewhere] == [("2", "Det")]
    given = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0))
    [found] = runner(tmp_path, entry, fallback="cpu")({"input": given}).values()
    with torch.no_grad():
        torch.testing.assert_close(found, module(given), rtol=2e-2, atol=2e-3)


def test_nothing_on_the_htp_is_refused_whatever_the_fallback(tmp_path: Path) -> None:
    program, _ = capture_module(lambda: nn.Sequential(Determinant()), input=torch.zeros(1, 4, 4))
    with pytest.raises(UserError, match="nothing of full runs on the HTP of sm8650"):
        Qnn(soc="sm8650", fallback="cpu").lower(program, Lowering(tmp_path))


def test_entries_have_a_context_each(captured: Any, tmp_path: Path) -> None:
    program, _, _ = captured("resnet")
    graph = program.entries["full"]
    twice = replace(program, entries={"full": graph, "reuse": graph.copy()})
    entries = Qnn(soc="sm8550").lower(twice, Lowering(tmp_path))
    assert {entry.main for entry in entries.values()} == {"full.onnx", "reuse.onnx"}
    assert (tmp_path / "reuse_qnn.bin").is_file()


def test_open_sizes_are_refused_before_any_work(capture_shared: Any) -> None:
    program = capture_shared(lambda: nn.Linear(8, 4), {"input": ("batch", 8)}, {"batch": Span(1, 8)})
    [found] = Qnn(soc="sm8650").supports(program)
    assert (found.path, found.operator) == ("(interface)", "input ['batch', 8]")
    assert "fixed sizes" in found.reason


@pytest.mark.parametrize(("soc", "message"), [("sm8660", "did you mean 'sm8650'"), ("tensor g4", "known: sm8450")])
def test_an_unknown_chip_names_the_nearest(soc: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Qnn.of("qnn", {"soc": soc})


def test_names_of_chips_are_taken_in_any_case() -> None:
    assert Qnn(soc="SM8650").soc == "sm8650"
    assert all(name == name.lower() for name in DEVICES)


def test_a_compiler_that_dies_is_one_clear_error(
    captured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(UserError, match="QNN cannot compile full"):
        Qnn(soc="sm8650").lower(captured("resnet")[0], Lowering(tmp_path))


@pytest.mark.parametrize(
    ("status", "said", "expected"),
    [
        (-9, "", "killed, most likely for want of memory"),
        (
            -11,
            "\x1b[1;31m2026 x [E:onnxruntime:, q.cc:1 F] Bad graph\x1b[0m",
            "died of signal 11; its last words: Bad graph",
        ),
        (1, "noise\nRuntimeError: no context", "RuntimeError: no context"),
    ],
)
def test_what_a_dead_compiler_said_is_kept(status: int, said: str, expected: str) -> None:
    from optpass.interchange.qnn_context import _reason

    assert expected in _reason(status, said)


@pytest.mark.parametrize(("activations", "least"), [(8, 32), (16, 55)])
def test_quantised_products_run_and_those_with_real_results_keep_their_values(
    tmp_path: Path, activations: int, least: float
) -> None:
    from optpass.pipeline.manager import run_pass
    from optpass.pipeline.recipe import Step
    from optpass.pipeline.registry import pass_class

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))

    program, _ = capture_module(build, input=torch.zeros(1, 3, 12, 12))
    target = Qnn(soc="sm8650")
    step = Step(
        "quantize", pass_class("quantize").from_options({"calls": 4, "activations": activations}, owner="quantize")
    )
    quantised, _ = run_pass(program, step, target=target)
    entry = target.lower(quantised, Lowering(tmp_path))["full"]
    assert entry.coverage is not None
    assert entry.coverage.native == entry.coverage.operators
    given = {"input": torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))}
    [expected] = quantised.entries["full"].module(quantised.weights)(given["input"])
    [found] = runner(tmp_path, entry)(given).values()
    # A value at the border of two steps may fall on either side.
    assert tensor_difference(expected, found).snr > least
