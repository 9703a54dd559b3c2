"""Target ``openvino``: OpenVINO IR, run on the CPU, or on Intel's GPU or NPU where they are there."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from optpass.errors import UserError
from optpass.interchange.onnx_file import OPSET, OnnxFacts, module_path
from optpass.interchange.onnx_folder import write_onnx_folder
from optpass.interchange.openvino_ir import SharedIr, converted
from optpass.ir.program import Program
from optpass.ir.weights import Expression, dtype_from_name
from optpass.pipeline.onnx_support import exporting_memory, onnx_unsupported
from optpass.pipeline.target import Coverage, Footprint, LoweredEntry, Lowering, Runner, Target, Unsupported
from optpass.quantization.form import CPU, QuantizationForm
from optpass.quiet import first_lines

if TYPE_CHECKING:
    import openvino

SUPPORTED = frozenset(
    {
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    }
)
PRODUCTS = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul", "ScaledDotProductAttention"})
"""Layer types of the executed graph in which the multiplications are."""
INTEGER = {"u8": "i8"}
"""Layers are named by the precision of their first input; int8 kernels take both kinds."""
REFERENCE = "Reference"
"""The type of a layer that runs in OpenVINO's own plain C++, for want of a kernel."""
SILENT = frozenset({"Const", "Input", "Output"})
LARGE = 1 << 30
WEIGHTS = "weights.bin"
SHOWN = 5
RUNTIME, NODE_LOADED, NODE_ON_DISK = 20 << 20, 60 << 10, 1000
"""Memory that stays with OpenVINO itself, and of a node when it is compiled; its bytes in the XML. On TAEF2's decoder,
a ViT-Ti and a video UNet."""
MACHINE_WORD = 4
GROUP = 32
"""Inputs that share a scale, where activations are quantised at run time: OpenVINO's own default."""


class OpenVino(Target):
    """OpenVINO IR, one per entry, that share one file of weights.

    Computes in f32 unless ``precision`` says otherwise. OpenVINO's own choice, ``auto``, is bf16 on processors that
    have it: 48 dB of signal to noise where f32 has over 100. 16-bit weights stay 16 bits wide in the file.
    """

    device: Literal["CPU", "GPU", "NPU", "AUTO"] = Field("CPU", description="AUTO takes the best that is there")
    precision: Literal["auto", "f32", "bf16", "f16"] = Field(
        "f32", description="what floating layers compute in; auto is the device's own choice"
    )
    activations: Literal["float", "int8"] = Field(
        "float", description="of layers whose weights alone are int8 or int4: int8 quantises their inputs at run time"
    )
    threads: int = Field(0, ge=0, description="threads of one call; 0 takes as many as PyTorch does")
    hint: Literal["latency", "throughput"] = Field("latency", description="throughput serves several calls at a time")
    streams: int = Field(0, ge=0, description="calls that run at a time; 0 leaves it to the hint")
    half: bool = Field(False, description="store 32-bit weights in 16")
    cache: bool = Field(
        False, description="keep compiled engines in the user's cache folder, so that the next load is faster"
    )
    opset: int = Field(OPSET, ge=18, le=23, description="ONNX operator set on the way")
    optimize: bool = Field(True, description="fold constants and simplify the ONNX graph on the way")

    quantization: ClassVar[QuantizationForm] = CPU
    floats: ClassVar[frozenset[torch.dtype]] = frozenset({torch.float32, torch.float16, torch.bfloat16})
    extra: ClassVar[str] = "openvino"
    packages: ClassVar[tuple[str, ...]] = ("openvino", "onnx", "onnx_ir", "onnxscript")

    def supports(self, program: Program) -> list[Unsupported]:
        """Operators without a translation to ONNX, and dtypes that OpenVINO lacks, by module path."""
        return [found for graph in program.entries.values() for found in onnx_unsupported(graph, SUPPORTED, "OpenVINO")]

    def predict(self, program: Program) -> Footprint:
        """Files: the weights once, and for each node its record in the XML; the ONNX form beside them is temporary.

        Loaded, a model holds every weight in 32 bits, packed for its kernels.
        """
        used = program.used_weights()
        graphs = program.entries.values()
        loaded = 0
        for graph in graphs:
            read = program.weights.restricted(graph.weight_names)
            words = sum(max(expression.nbytes, MACHINE_WORD * expression.numel) for expression in read.values())
            loaded += RUNTIME + NODE_LOADED * len(graph.calls) + words
        nodes = sum(len(graph.calls) for graph in graphs)
        stored = sum(self._stored(expression) for expression in used.values())
        return Footprint(
            disk=stored + NODE_ON_DISK * nodes,
            # A converted model holds its constants.
            lowering=max(exporting_memory(graph, program.weights) for graph in graphs) + used.nbytes,
            checking=0 if used.nbytes > LARGE else loaded,
            loaded=loaded,
        )

    def _stored(self, expression: Expression) -> int:
        halved = self.half and expression.dtype is torch.float32
        return expression.nbytes // 2 if halved else expression.nbytes

    def lower(self, program: Program, lowering: Lowering) -> dict[str, LoweredEntry]:
        """Write ``ENTRY.xml`` for every entry, ``weights.bin`` for all, and load each once.

        The ONNX form is temporary. Where weights take more than 1 GiB, the device is asked what of the graph it
        takes, and no engine is made.

        Raises:
            MissingValuesError: the Program was captured structure-only.
            UserError: the graph has no ONNX form, OpenVINO cannot convert or compile it, or the device is not there.
        """
        self.check_machine()
        weights = lowering.folder / WEIGHTS
        with tempfile.TemporaryDirectory(dir=lowering.folder, prefix="onnx-") as temporary:
            files = write_onnx_folder(
                program,
                Path(temporary),
                opset=self.opset,
                optimize=self.optimize,
                allow_nonfinite=lowering.allow_nonfinite,
                progress=lowering.progress,
            )
            sizes: dict[str, int] = {}
            with SharedIr(weights) as shared:
                for name, path in files.paths.items():
                    lowering.progress("convert to OpenVINO IR", len(sizes) / len(files.paths))
                    sizes[name] = shared.add(converted(path), lowering.folder / f"{name}.xml", half=self.half)
            lowering.progress("convert to OpenVINO IR", 1.0)
        return {
            name: self._lowered(name, program, lowering, facts, sizes[name], {weights.name: shared.digest})
            for name, facts in files.facts.items()
        }

    def _lowered(
        self,
        name: str,
        program: Program,
        lowering: Lowering,
        facts: OnnxFacts,
        size: int,
        digests: Mapping[str, str],
    ) -> LoweredEntry:
        graph, path = program.entries[name], lowering.folder / f"{name}.xml"
        details: dict[str, Any] = {
            "bytes": size,
            "nodes": facts.nodes,
            "opset": self.opset,
            "named_nodes": round(facts.named, 4),
            "device": self.device,
        }
        covered = None
        lowering.progress("load the engine", 0.0)
        if size > LARGE:
            self._query(path)
        else:
            found = layers(self._compiled(path))
            details["kernels"], covered = kernels(found), coverage(found)
        lowering.progress("load the engine", 1.0)
        return LoweredEntry(path.name, graph.inputs, graph.outputs, details, digests, coverage=covered)

    @classmethod
    def load(cls, folder: Path, entry: Mapping[str, Any], options: Mapping[str, Any]) -> Runner:
        """One entry's compiled model. Calls may come from several threads; answers belong to the caller.

        Raises:
            UserError: OpenVINO refuses the file, or the device is not there.
        """
        target = cls.of("openvino", options)
        target.check_machine()
        return Requests(target._compiled(folder / str(entry["engine"])), entry)

    def check_machine(self) -> None:
        """
        Raises:
            UserError: this machine has no such device, or no driver of it.
        """
        import openvino

        available = openvino.Core().available_devices
        if self.device != "AUTO" and not any(name.split(".")[0] == self.device for name in available):
            raise UserError(
                f"OpenVINO finds no {self.device} here, only {', '.join(available)}: install the device's driver, "
                "or set device: CPU or AUTO"
            )

    def _properties(self) -> dict[str, Any]:
        properties: dict[str, Any] = {
            "PERFORMANCE_HINT": self.hint.upper(),
            # An int8 form of activations that the Program says nothing about is not the same function.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP if self.activations == "int8" else 0,
        }
        if self.precision != "auto":
            properties["INFERENCE_PRECISION_HINT"] = self.precision
        if self.device == "CPU":
            properties["INFERENCE_NUM_THREADS"] = self.threads or torch.get_num_threads()
        if self.streams:
            properties["NUM_STREAMS"] = str(self.streams)
        if self.cache:
            home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            properties["CACHE_DIR"] = str(Path(home, "optpass", "openvino"))
        return properties

    def _read(self, path: Path) -> tuple[openvino.Core, openvino.Model]:
        import openvino

        core = openvino.Core()
        return core, core.read_model(path, path.with_name(WEIGHTS))

    def _compiled(self, path: Path) -> openvino.CompiledModel:
        try:
            core, model = self._read(path)
            return core.compile_model(model, self.device, self._properties())
        except Exception as error:
            # OpenVINO's errors share no base class but Exception.
            raise UserError(f"OpenVINO cannot run {path.name} on {self.device}: {first_lines(error, 12)}") from error

    def _query(self, path: Path) -> None:
        """
        Raises:
            UserError: the device has no kernel for something in the model; the message names the nodes.
        """
        core, model = self._read(path)
        taken = core.query_model(model, self.device)
        missing = [node.friendly_name for node in model.get_ordered_ops() if node.friendly_name not in taken]
        if missing:
            raise UserError(f"OpenVINO's {self.device} cannot run {len(missing)} nodes: {', '.join(missing[:SHOWN])}")


class Requests:
    """A compiled model as a :data:`~optpass.pipeline.target.Runner`: a request for every call in progress.

    Tensors are handed over without a copy, both ways, but for outputs of open sizes.
    """

    def __init__(self, compiled: openvino.CompiledModel, entry: Mapping[str, Any]) -> None:
        self.compiled = compiled
        self.inputs = [str(spec["name"]) for spec in entry["inputs"]]
        self.outputs = [(str(spec["name"]), dtype_from_name(spec["dtype"])) for spec in entry["outputs"]]
        self._idle: SimpleQueue[openvino.InferRequest] = SimpleQueue()

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            request = self._idle.get_nowait()
        except Empty:
            request = self.compiled.create_infer_request()
        try:
            return self._answered(request, tensors)
        finally:
            self._idle.put(request)

    def _answered(self, request: openvino.InferRequest, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = [tensors[name].contiguous() for name in self.inputs]
        for index, tensor in enumerate(given):
            request.set_input_tensor(index, _shared(tensor))
        answers: dict[str, Tensor] = {}
        for index, (name, dtype) in enumerate(self.outputs):
            shape = self.compiled.outputs[index].partial_shape
            if shape.is_static:
                answers[name] = torch.empty(tuple(shape.to_shape()), dtype=dtype)
                request.set_output_tensor(index, _shared(answers[name]))
        request.infer()
        for index, (name, dtype) in enumerate(self.outputs):
            if name not in answers:
                answers[name] = _copied(request.get_output_tensor(index), dtype)
        return {name: answers[name] for name, _ in self.outputs}


def _shared(tensor: Tensor) -> openvino.Tensor:
    """The same memory as an OpenVINO tensor."""
    import openvino

    if tensor.dtype is torch.bfloat16:
        # NumPy has no bf16.
        bits = tensor.view(torch.uint16).numpy()
        return openvino.Tensor(bits, openvino.Shape(list(tensor.shape)), openvino.Type.bf16)
    return openvino.Tensor(tensor.numpy(), shared_memory=True)


def _copied(tensor: openvino.Tensor, dtype: torch.dtype) -> Tensor:
    if dtype is torch.bfloat16:
        return torch.from_numpy(tensor.data.view("uint16").copy()).view(torch.bfloat16)
    return torch.from_numpy(tensor.data.copy())


@dataclass(frozen=True)
class Layer:
    """One of the layers that run: its type and precision, and the graph's nodes that are in it."""

    kind: str
    precision: str
    nodes: tuple[str, ...]


def layers(compiled: openvino.CompiledModel) -> list[Layer]:
    """What runs when ``compiled`` is called, in order; constants, inputs and outputs left out."""

    def fact(layer: openvino.Node, key: str) -> str:
        return str(layer.rt_info[key].astype(str)) if key in layer.rt_info else ""

    return [
        Layer(
            fact(layer, "layerType"),
            fact(layer, "runtimePrecision"),
            tuple(filter(None, fact(layer, "originalLayersNames").split(","))),
        )
        for layer in compiled.get_runtime_model().get_ordered_ops()
        if fact(layer, "layerType") not in SILENT
    ]


def kernels(found: Iterable[Layer]) -> dict[str, int]:
    """How many layers with products run in which precision, most first: ``{"i8": 53, "f32": 2}``."""
    counted = Counter(INTEGER.get(layer.precision, layer.precision) for layer in found if layer.kind in PRODUCTS)
    return dict(counted.most_common())


def coverage(found: Sequence[Layer]) -> Coverage:
    """Layers for which the device has kernels; what runs in OpenVINO's own C++ instead is ``elsewhere``."""
    others = [layer for layer in found if layer.kind == REFERENCE]
    reason = "no kernel of the device, runs in OpenVINO's reference implementation"
    return Coverage(
        len(found),
        len(found) - len(others),
        tuple(Unsupported(module_path(node), node, reason) for layer in others for node in layer.nodes[:1]),
    )
