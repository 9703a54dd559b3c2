"""The onnxruntime target: numerics against eager, names, streaming, options, and everything it refuses."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir
import onnxruntime
import pytest
import torch
from torch import nn

from optpass.capture.export import build_fake, export_program
from optpass.errors import MissingValuesError, UserError, WeightError
from optpass.evaluate.trials import random_inputs
from optpass.ir.hashing import HashedFile, file_digest
from optpass.ir.program import Origin, Program
from optpass.ir.weights import Constant, Expression, Shape, WeightStore
from optpass.pipeline.registry import target_class
from optpass.pipeline.target import LoweredEntry, Lowering, Runner
from optpass.runtime.bundle import BundleWriter, read_manifest, verify_files
from optpass.runtime.module import EngineModule
from optpass.targets.onnxruntime import OnnxRuntime
from optpass.testing import capture_module


def record(entry: LoweredEntry) -> dict[str, Any]:
    """The entry as the manifest has it."""
    return {"engine": entry.main, "outputs": [spec.as_json() for spec in entry.outputs], "details": entry.details}


def runner(folder: Path, entry: LoweredEntry, **options: Any) -> Runner:
    return OnnxRuntime.load(folder, record(entry), options)


@pytest.mark.parametrize("name", ["resnet", "svd_unet", "transformer"])
def test_agrees_with_the_eager_module_to_1e_4(name: str, captured: Any, lowered: Any) -> None:
    program, module, inputs = captured(name)
    folder, entry = lowered(name)
    graph = program.entries["full"]
    engine = EngineModule(graph.signature, graph.inputs, graph.outputs, runner(folder, entry))
    arguments = graph.signature.arguments.unflatten(inputs)
    with torch.no_grad():
        expected, found = module(**arguments), engine(**arguments)
    assert type(found) is type(expected)
    for key in expected:
        assert float(expected[key].abs().max()) > 0.1
        torch.testing.assert_close(found[key], expected[key], atol=1e-4, rtol=1e-4)


def test_inputs_and_outputs_have_the_signatures_names(lowered: Any) -> None:
    folder, _ = lowered("resnet")
    model = onnx_ir.load(folder / "full.onnx")
    assert [value.name for value in model.graph.inputs] == ["image"]
    assert [value.name for value in model.graph.outputs] == ["features", "logits"]


def test_an_output_named_like_an_input_gets_a_name_of_its_own(lowered: Any) -> None:
    folder, _ = lowered("svd_unet")
    model = onnx_ir.load(folder / "full.onnx")
    assert [value.name for value in model.graph.outputs] == ["sample.out"]


class Passed(nn.Module):
    """Returns its input, one value twice, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y = x.sin()
        return {"same": nn.functional.dropout(x, training=False), "once": y, "again": y, "buffer": self.table}


def test_outputs_that_are_inputs_weights_or_each_other_keep_their_names(tmp_path: Path) -> None:
    program, module = capture_module(Passed, x=torch.zeros(2, 3))
    OnnxRuntime().lower(program, Lowering(tmp_path))
    session = onnxruntime.InferenceSession(tmp_path / "full.onnx")
    assert [value.name for value in session.get_inputs()] == ["x"]
    x = torch.randn(2, 3)
    expected = module(x)
    assert [value.name for value in session.get_outputs()] == list(expected)
    for found, value in zip(session.run(None, {"x": x.numpy()}), expected.values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(found), value)


@pytest.mark.parametrize("name", ["svd_unet", "transformer"])
def test_nodes_carry_module_paths(name: str, captured: Any, lowered: Any) -> None:
    folder, entry = lowered(name)
    modules = dict(captured(name)[1].named_modules())
    names = [node.name for node in onnx_ir.load(folder / entry.main).graph]
    paths = [name.rpartition("/")[0] for name in names]
    assert len(set(names)) == len(names)
    assert entry.details["named_nodes"] == 1.0
    assert all(path == "(root)" or path in modules for path in paths)
    heavy = [node for node in onnx_ir.load(folder / entry.main).graph if node.op_type in ("Conv", "MatMul", "Gemm")]
    assert heavy
    assert all(not node.name.startswith("(root)") for node in heavy)


def test_no_weight_is_transposed_when_the_engine_loads(captured: Any, lowered: Any) -> None:
    folder, _ = lowered("svd_unet")
    graph = onnx_ir.load(folder / "full.onnx").graph
    transposed = [node for node in graph if node.op_type == "Transpose" and node.inputs[0].name in graph.initializers]
    assert transposed == []


class Counted(Expression):
    """A weight that knows how many of its kind are alive, and counts its reads."""

    alive, peak, reads = 0, 0, 0

    def __init__(self, shape: Shape) -> None:
        self.shape, self.dtype = shape, torch.float32

    def evaluate(self) -> torch.Tensor:
        tensor = torch.ones(self.shape)
        Counted.reads += 1
        Counted.alive += 1
        Counted.peak = max(Counted.peak, Counted.alive)
        import weakref

        weakref.finalize(tensor, Counted.gone)
        return tensor

    @staticmethod
    def gone() -> None:
        Counted.alive -= 1

    def operands(self) -> tuple[Expression, ...]:
        return ()

    def __str__(self) -> str:
        return "counted"


def test_large_weights_are_evaluated_once_and_one_at_a_time(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(256, 256, bias=False), nn.ReLU())))

    program, _ = capture_module(build, input=torch.zeros(4, 7, 256))
    large = WeightStore({name: Counted(expression.shape) for name, expression in program.weights.items()})
    Counted.alive = Counted.peak = Counted.reads = 0
    OnnxRuntime().lower(Program(program.entries, large, program.origin), Lowering(tmp_path))
    assert Counted.reads == 6
    assert Counted.peak == 1
    assert (tmp_path / "full.onnx.data").stat().st_size >= 6 * 256 * 256 * 4


@pytest.mark.parametrize(
    "options",
    [
        {"optimize": False},
        {"opset": 21},
        {"threads": 1, "graph_optimization": "none", "execution": "parallel", "spinning": False},
    ],
)
def test_every_option_gives_the_same_result(options: dict[str, Any], captured: Any, tmp_path: Path) -> None:
    program, module, inputs = captured("resnet")
    target = OnnxRuntime.of("onnxruntime", options)
    entry = target.lower(program, Lowering(tmp_path))["full"]
    with torch.no_grad():
        expected = module(**inputs)
    found = runner(tmp_path, entry, **target.as_options())(inputs)
    torch.testing.assert_close(found["logits"], expected["logits"], atol=1e-5, rtol=1e-5)


def test_session_options_arrive_in_onnx_runtime(lowered: Any) -> None:
    folder, entry = lowered("resnet")
    target = OnnxRuntime(threads=3, execution="parallel", graph_optimization="basic", spinning=False, providers="cpu")
    session = target._session(folder / entry.main)
    options = session.get_session_options()
    assert options.intra_op_num_threads == 3
    assert options.execution_mode.name == "ORT_PARALLEL"
    assert options.graph_optimization_level.name == "ORT_ENABLE_BASIC"
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert session.get_providers() == ["CPUExecutionProvider"]


def test_engines_of_a_process_share_an_arena_and_nothing_else(lowered: Any) -> None:
    """Answers that are still held are not written over by the other engine, nor from another thread."""
    engines = [lowered(name) for name in ("resnet", "transformer")]
    options = OnnxRuntime()._session(engines[0][0] / engines[0][1].main).get_session_options()
    assert options.get_session_config_entry("session.use_env_allocators") == "1"
    runners = [runner(folder, entry) for folder, entry in engines]
    inputs = [random_inputs([spec.at({}) for spec in entry.inputs], {}, 1) for _, entry in engines]
    expected = [
        {name: value.clone() for name, value in run(given).items()} for run, given in zip(runners, inputs, strict=True)
    ]
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(runners[index % 2], inputs[index % 2]) for index in range(12)]
    for index, answer in enumerate(answers):
        for name, value in answer.result().items():
            assert torch.equal(value, expected[index % 2][name])


def test_half_precision_weights_run(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Linear(8, 4)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.conv(image.half())).mean((2, 3))
            return self.fc(x).float()

    module, mode = build_fake(Net, torch.float16)
    torch.manual_seed(0)
    real = Net().half().eval()
    weights = {name: Constant(value) for name, value in real.state_dict().items()}
    program = export_program(module, mode, {"image": torch.zeros(2, 3, 6, 6)}, weights, Origin("test"))
    entry = OnnxRuntime().lower(program, Lowering(tmp_path))["full"]
    image = torch.randn(2, 3, 6, 6)
    found = runner(tmp_path, entry)({"image": image})["output"]
    with torch.no_grad():
        expected = real(image)
    assert found.dtype == torch.float32
    # fp16 has 11 bits: 5e-4 relative, over values around 1.
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float64, "f64")])
def test_unsupported_dtypes_are_refused_with_the_module_path(dtype: torch.dtype, name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.to(dtype)).float()

    module, mode = build_fake(Net, dtype)
    program = export_program(module, mode, {"x": torch.zeros(2, 3)}, None, Origin("test"))
    found = OnnxRuntime().supports(program)
    assert any(item.path == "fc" and item.operator == "linear" and name in item.reason for item in found)


class Divided(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(x, 2, divisor_override=3)


def test_a_pool_with_a_divisor_of_its_own_is_refused() -> None:
    program, _ = capture_module(Divided, x=torch.zeros(1, 2, 4, 4))
    [found] = OnnxRuntime().supports(program)
    assert found.operator == "avg_pool2d"
    assert "divisor_override" in found.reason


class Mode(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mode(x).values


class Eigenvalues(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvalsh(x)


def test_an_operator_without_translation_is_refused_with_its_place() -> None:
    module, mode = build_fake(lambda: nn.Sequential(nn.ReLU(), Mode()))
    program = export_program(module, mode, {"input": torch.zeros(3, 3)}, None, Origin("test"))
    (found,) = OnnxRuntime().supports(program)
    assert (found.path, found.operator) == ("1", "mode")
    assert "ONNX" in found.reason


def test_an_operator_that_decomposes_to_one_without_translation_fails_clearly(tmp_path: Path) -> None:
    program, _ = capture_module(lambda: nn.Sequential(Eigenvalues()), input=torch.zeros(3, 3))
    with pytest.raises(UserError, match=r"ONNX cannot express this graph.*_linalg_eigh"):
        OnnxRuntime().lower(program, Lowering(tmp_path))


@pytest.mark.parametrize("name", ["resnet", "svd_unet", "transformer"])
def test_supported_programs_are_not_refused(name: str, captured: Any) -> None:
    assert OnnxRuntime().supports(captured(name)[0]) == []


def test_nan_in_a_weight_names_the_weight(captured: Any, tmp_path: Path) -> None:
    program, _, _ = captured("resnet")
    broken = program.weights["skip.weight"].evaluate().clone()
    broken[0, 0] = float("nan")
    with pytest.raises(WeightError, match=r"skip\.weight"):
        OnnxRuntime().lower(program.with_weights({"skip.weight": Constant(broken)}), Lowering(tmp_path))
    OnnxRuntime().lower(
        program.with_weights({"skip.weight": Constant(broken)}), Lowering(tmp_path, allow_nonfinite=True)
    )


def test_a_structure_only_program_is_refused(tmp_path: Path) -> None:
    module, mode = build_fake(lambda: nn.Linear(3, 2))
    program = export_program(module, mode, {"input": torch.zeros(2, 3)}, None, Origin("test"))
    with pytest.raises(MissingValuesError, match="structure-only"):
        OnnxRuntime().lower(program, Lowering(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_onnx_runtime_refuses_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "full.onnx").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"ONNX Runtime cannot run full\.onnx"):
        OnnxRuntime()._session(tmp_path / "full.onnx")


@pytest.mark.parametrize(("limit", "level"), [(1 << 30, "ORT_ENABLE_ALL"), (0, "ORT_DISABLE_ALL")])
def test_a_large_engine_is_tried_without_copies_of_its_weights(
    limit: int, level: str, captured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    seen: list[Any] = []
    real = onnxruntime.InferenceSession

    def session(path: str, options: Any, providers: list[str]) -> Any:
        seen.append(options.graph_optimization_level.name)
        return real(path, options, providers=providers)

    monkeypatch.setattr("optpass.targets.onnxruntime.LARGE", limit)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    OnnxRuntime().lower(captured("resnet")[0], Lowering(tmp_path))
    assert seen == [level]


def test_external_data_outside_the_bundle_is_refused(lowered: Any, tmp_path: Path) -> None:
    import onnx

    folder, entry = lowered("transformer")
    model = onnx.load(folder / entry.main, load_external_data=False)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "stolen.data").write_bytes((folder / "full.onnx.data").read_bytes())
    for tensor in model.graph.initializer:
        for item in tensor.external_data:
            if item.key == "location":
                item.value = "../stolen.data"
    (tmp_path / "bundle" / "full.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="cannot run"):
        OnnxRuntime()._session(tmp_path / "bundle" / "full.onnx")


def test_cuda_where_there_is_none_says_what_to_install(lowered: Any) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has CUDA")
    folder, entry = lowered("resnet")
    with pytest.raises(UserError, match="onnxruntime-gpu"):
        runner(folder, entry, providers="cuda")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> Any:
        return None if name == "onnxscript" else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(UserError, match=r"onnxscript.*pip install 'optpass\[onnxruntime\]'"):
        target_class("onnxruntime").check_installed("onnxruntime")


def test_unknown_and_bad_options_are_refused() -> None:
    with pytest.raises(UserError, match="'threads'"):
        OnnxRuntime.of("onnxruntime", {"thread": 2})
    with pytest.raises(UserError, match="opset"):
        OnnxRuntime.of("onnxruntime", {"opset": 11})


def test_the_class_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    code = "import sys, optpass.targets.onnxruntime as t; print([m for m in sys.modules if m.startswith('onnx')])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def two_entries(program: Program) -> Program:
    """The same graph twice, as a pass leaves it that splits a model into a full and a reduced call."""
    graph = program.entries["full"]
    return replace(program, entries={"full": graph, "reuse": graph.copy()})


def test_entries_share_one_data_file(captured: Any, tmp_path: Path) -> None:
    program, module, inputs = captured("svd_unet")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    OnnxRuntime().lower(program, Lowering(tmp_path / "one"))
    entries = OnnxRuntime().lower(two_entries(program), Lowering(tmp_path / "two"))
    alone = (tmp_path / "one" / "full.onnx.data").stat().st_size
    shared = tmp_path / "two" / "weights.onnx.data"
    assert {path.name for path in shared.parent.iterdir()} == {"full.onnx", "reuse.onnx", shared.name}
    assert shared.stat().st_size <= 1.02 * alone
    with torch.no_grad():
        expected = module(**inputs).sample
    for entry in entries.values():
        found = runner(shared.parent, entry)(inputs)["sample"]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_data_is_hashed_as_it_is_written(captured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, _, _ = captured("svd_unet")
    read: list[str] = []
    monkeypatch.setattr("optpass.runtime.bundle.file_digest", lambda path: read.append(path.name) or file_digest(path))
    with BundleWriter(tmp_path / "out") as writer:
        engines = OnnxRuntime().lower(two_entries(program), Lowering(writer.folder))
        writer.finish(program=program, target="onnxruntime", options={}, engines={"full": engines["full"]})
    assert sorted(read) == ["full.onnx", "reuse.onnx"]
    data = tmp_path / "out" / "weights.onnx.data"
    manifest = read_manifest(tmp_path / "out")
    assert manifest.files[data.name].sha256 == hashlib.sha256(data.read_bytes()).hexdigest()
    verify_files(tmp_path / "out", manifest)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(UserError, match=r"weights\.onnx\.data is not the file that was written"):
        verify_files(tmp_path / "out", manifest)


def test_a_model_without_large_weights_has_no_data_file(tmp_path: Path) -> None:
    program, _ = capture_module(lambda: nn.Sequential(nn.ReLU()), input=torch.zeros(2, 3))
    entry = OnnxRuntime().lower(program, Lowering(tmp_path))["full"]
    assert ([path.name for path in tmp_path.iterdir()], entry.digests) == (["full.onnx"], {})


def test_a_disk_that_fills_while_weights_stream_is_one_clear_error(
    captured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, _, _ = captured("svd_unet")
    written = HashedFile.write

    def full(file: HashedFile, data: Any) -> None:
        if file.size > 1000:
            raise OSError(errno.ENOSPC, "No space left on device")
        written(file, data)

    monkeypatch.setattr(HashedFile, "write", full)
    with pytest.raises(UserError, match=r"cannot write .*full\.onnx\.data: No space left"):
        OnnxRuntime().lower(program, Lowering(tmp_path))
    assert not (tmp_path / "full.onnx.data").exists()
