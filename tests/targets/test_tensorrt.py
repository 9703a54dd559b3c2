"""The tensorrt target, ahead of time for RTX: what it writes, what every GPU lacks, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("tensorrt_rtx", reason="pip install 'optpass[tensorrt]'")

from optpass.capture.export import build_fake, export_program
from optpass.capture.spans import Span
from optpass.errors import MissingValuesError, UserError
from optpass.interchange import tensorrt_engine
from optpass.interchange.onnx_folder import write_onnx_folder
from optpass.interchange.tensorrt_engine import Building, build_engine
from optpass.ir.program import Origin, Program
from optpass.ir.weights import Constant
from optpass.pipeline.apply import apply
from optpass.pipeline.recipe import load_recipe
from optpass.pipeline.request import Request
from optpass.pipeline.target import Lowering
from optpass.targets.tensorrt import GENERATIONS, TensorRT, _profiles
from optpass.testing import capture_module, randomised

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")


@pytest.mark.parametrize("name", ["resnet", "transformer"])
def test_one_engine_for_several_architectures(name: str, captured: Any, tmp_path: Path) -> None:
    program, _, _ = captured(name)
    target = TensorRT.of("tensorrt", {"edition": "rtx", "compute_capabilities": ["SM86", "SM89", "SM120"]})
    entry = target.lower(program, Lowering(tmp_path))["full"]
    assert [path.name for path in tmp_path.iterdir()] == ["full.engine"]
    assert entry.details["bytes"] == (tmp_path / "full.engine").stat().st_size
    assert entry.details["compute_capabilities"] == ["SM86", "SM89", "SM120"]
    assert "licence" in entry.details["licence"]
    assert sum(entry.details["layers"].values()) > 2
    assert entry.coverage is not None
    assert entry.coverage.native == entry.coverage.operators == entry.details["nodes"]


def test_the_engine_is_hashed_as_it_is_written(captured: Any, tmp_path: Path) -> None:
    from optpass.ir.hashing import file_digest

    entry = TensorRT(edition="rtx").lower(captured("resnet")[0], Lowering(tmp_path))["full"]
    assert entry.digests == {"full.engine": file_digest(tmp_path / "full.engine")}


class Attention(nn.Module):
    """Self-attention of two heads of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(64, 192)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.project(x).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(*heads.unbind()).transpose(1, 2).flatten(2)


def half(build: Any, dtype: torch.dtype = torch.float16, **inputs: Tensor) -> Program:
    module, mode = build_fake(build, dtype)
    weights = {name: Constant(value.to(dtype)) for name, value in randomised(build()).state_dict().items()}
    return export_program(module, mode, {k: v.to(dtype) for k, v in inputs.items()}, weights, Origin("test"))


def test_attention_becomes_one_kernel(tmp_path: Path) -> None:
    program = half(Attention, x=torch.zeros(2, 16, 64))
    assert TensorRT(edition="rtx").lower(program, Lowering(tmp_path))["full"].details["fused_attentions"] == 1


CASES = {
    "linear": (lambda: nn.Linear(16, 16), torch.zeros(4, 16)),
    "convolution": (lambda: nn.Conv2d(4, 8, 3), torch.zeros(1, 4, 6, 6)),
    "convolution of volumes": (lambda: nn.Conv3d(4, 8, 3), torch.zeros(1, 4, 6, 6, 6)),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_what_is_refused_is_what_the_builder_refuses(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """For every architecture: the table that speaks before the builder is right, both ways."""
    build, example = CASES[case]
    program = half(build, dtype, input=example)
    path = write_onnx_folder(program, tmp_path).paths["full"]
    for name in GENERATIONS:
        refused = TensorRT(edition="rtx", compute_capabilities=(name,)).supports(program)
        try:
            build_engine(path, tmp_path / "engine", Building("rtx", (name,)))
            built = True
        except UserError:
            built = False
        assert built == (not refused), (name, refused)
        assert all(name in item.reason for item in refused)


def test_a_refusal_names_module_architecture_and_remedy(captured: Any) -> None:
    target = TensorRT.of("tensorrt", {"compute_capabilities": ["SM75", "SM86"]})
    [found] = [item for item in target.supports(captured("resnet")[0]) if item.path == "fc"]
    assert found.operator == "linear"
    assert found.reason == (
        "SM75 (Turing) has no f32 matrix products; capture in float16, or leave SM75 out of compute_capabilities"
    )


def test_what_the_builder_says_is_one_error_with_the_module(captured: Any, tmp_path: Path) -> None:
    target = TensorRT(edition="rtx", compute_capabilities=("SM75",))
    with pytest.raises(UserError, match=r"cannot build full: fc: .*FP32 GEMM is not supported"):
        target.lower(captured("resnet")[0], Lowering(tmp_path))
    assert list(tmp_path.iterdir()) == []
    # The log is one for the process: the next build does not carry the last one's errors.
    TensorRT(edition="rtx").lower(captured("resnet")[0], Lowering(tmp_path))


class Determinant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.det(x)


def test_an_operator_that_the_parser_lacks_is_named_with_its_place(tmp_path: Path) -> None:
    program, _ = capture_module(lambda: nn.Sequential(nn.Linear(3, 3), Determinant()), input=torch.zeros(3, 3))
    with pytest.raises(UserError, match=r"cannot take full: 1: Det: no such operator in TensorRT's ONNX parser"):
        TensorRT(edition="rtx").lower(program, Lowering(tmp_path))
    assert list(tmp_path.iterdir()) == []


class Quantised(nn.Module):
    def __init__(self, zero: int) -> None:
        super().__init__()
        self.zero, self.linear = zero, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        form = (0.05, self.zero, -128, 127, torch.int8)
        held = torch.ops.quantized_decomposed.quantize_per_tensor(x, *form)
        return self.linear(torch.ops.quantized_decomposed.dequantize_per_tensor(held, *form))


@pytest.mark.parametrize("zero", [0, 3])
def test_asymmetric_quantisation_is_refused_before_the_parser_does(zero: int) -> None:
    import torch.ao.quantization.fx._decomposed

    program, _ = capture_module(lambda: Quantised(zero), x=torch.zeros(2, 8))
    found = [item for item in TensorRT(edition="rtx").supports(program) if "zero point" in item.reason]
    assert [item.path for item in found] == (["(root)", "(root)"] if zero else [])
    assert all("symmetric form alone" in item.reason for item in found)


def test_open_sizes_become_a_profile(capture_shared: Any, tmp_path: Path) -> None:
    spans = {"batch": Span(1, 8), "tokens": Span(4, 32)}
    program = capture_shared(lambda: nn.Linear(8, 4), {"input": ("batch", "tokens", 8)}, spans)
    profile = _profiles(program.entries["full"])["input"]
    assert (profile.smallest, profile.largest) == ((1, 4, 8), (8, 32, 8))
    assert profile.usual == program.entries["full"].inputs_at()[0].shape
    TensorRT(edition="rtx").lower(program, Lowering(tmp_path))
    assert (tmp_path / "full.engine").stat().st_size > 0


def test_entries_have_an_engine_each(captured: Any, tmp_path: Path) -> None:
    program, _, _ = captured("resnet")
    graph = program.entries["full"]
    twice = replace(program, entries={"full": graph, "reuse": graph.copy()})
    entries = TensorRT(edition="rtx").lower(twice, Lowering(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full.engine", "reuse.engine"]
    assert {entry.main for entry in entries.values()} == {"full.engine", "reuse.engine"}


@no_gpu
def test_without_a_gpu_engines_are_compiled_and_not_run(tmp_path: Path, tiny_classifier: Any) -> None:
    assert TensorRT().runs() == "elsewhere"
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def net():\n    torch.manual_seed(0)\n    return nn.Linear(4, 4)\n"
        "def net_inputs():\n    return {'input': torch.zeros(2, 4)}\n"
    )
    torch.manual_seed(0)
    torch.save(nn.Linear(4, 4).state_dict(), tmp_path / "net.pth")
    (tmp_path / "r.yaml").write_text("name: r\npasses: []\ntarget: tensorrt\n")
    request = Request(f"{tmp_path / 'net.py'}:net", tmp_path / "out", weights=tmp_path / "net.pth")
    report = apply(load_recipe(tmp_path / "r.yaml"), request).report
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["verified"] == "compiled-only"
    assert report["target"]["verified"].startswith("compiled only: engines of target 'tensorrt' do not run")
    assert (report["engine_difference"], report["latency"]) == (None, None)


@no_gpu
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edition": "datacenter"}, "tensorrt is not installed"),
        ({"timing_cache": "times"}, "timing_cache is for datacenter"),
        ({"refit": True}, "no refittable engine ahead of time"),
    ],
)
def test_options_that_cannot_hold_here_are_refused(
    options: dict[str, Any], message: str, captured: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        TensorRT.of("tensorrt", options).lower(captured("resnet")[0], Lowering(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_unknown_architectures_are_refused() -> None:
    with pytest.raises(UserError, match="Input should be 'SM75'"):
        TensorRT.of("tensorrt", {"compute_capabilities": ["SM90"]})
    with pytest.raises(UserError, match="name one at least"):
        TensorRT.of("tensorrt", {"compute_capabilities": []})


def test_datacenter_is_taken_where_it_is_and_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        tensorrt_engine.importlib.util, "find_spec", lambda name: object() if name == "tensorrt" else real(name)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert TensorRT()._edition() == "datacenter"
    assert TensorRT().runs() == "native"
    assert TensorRT(compute_capabilities=("SM86",))._edition() == "rtx"
    assert TensorRT(edition="rtx")._edition() == "rtx"


def test_a_structure_only_program_is_refused(tmp_path: Path) -> None:
    module, mode = build_fake(lambda: nn.Linear(3, 2))
    program = export_program(module, mode, {"input": torch.zeros(2, 3)}, None, Origin("test"))
    with pytest.raises(MissingValuesError, match="structure-only"):
        TensorRT(edition="rtx").lower(program, Lowering(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_class_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    code = "import sys, optpass.targets.tensorrt; print([m for m in sys.modules if m.startswith(('onnx', 'tensorrt'))])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
