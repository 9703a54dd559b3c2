"""Target ``tensorrt``: engines for NVIDIA GPUs, built on one, or ahead of time by TensorRT for RTX."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.fx import Node

from optpass.errors import UserError
from optpass.interchange.onnx_file import OPSET, OnnxFacts
from optpass.interchange.onnx_folder import write_onnx_folder
from optpass.interchange.onnx_surgery import fusible_attention
from optpass.interchange.tensorrt_engine import Building, Edition, Profile, build_engine, installed, library, messages
from optpass.ir.graph import Graph, path_of
from optpass.ir.program import Program
from optpass.ir.text import operator_name
from optpass.ir.weights import dtype_from_name
from optpass.pipeline.onnx_support import onnx_unsupported
from optpass.pipeline.target import Coverage, Execution, Footprint, LoweredEntry, Lowering, Runner, Target, Unsupported

Capability = Literal["SM75", "SM80", "SM86", "SM89", "SM120", "SM121"]
GENERATIONS: dict[Capability, str] = {
    "SM75": "Turing",
    "SM80": "Ampere",
    "SM86": "Ampere",
    "SM89": "Ada",
    "SM120": "Blackwell",
    "SM121": "Blackwell",
}
DEFAULT: tuple[Capability, ...] = ("SM86", "SM89", "SM120")
SUPPORTED = frozenset(
    {
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.int64,
        torch.int32,
        torch.int8,
        torch.uint8,
        torch.bool,
    }
)
PRODUCTS = frozenset(
    ["addmm", "baddbmm", "bmm", "einsum", "linear", "matmul", "mm", "mv", "dot", "scaled_dot_product_attention"]
)
QUANTIZERS = ("quantized_decomposed.quantize_per_tensor", "quantized_decomposed.dequantize_per_tensor")
ZERO_POINT = 2
"""Which argument of a quantizer it is."""
LICENCE = (
    "TensorRT is under NVIDIA's own licence, which for some purposes restricts what it makes as well: "
    "read it before an engine is passed on"
)
CODE_OF_A_NODE = 15 << 10
"""Bytes that a node adds to an engine beside its weights; of a small video UNet, a ViT and a decoder."""
BUILDER, COPIES_OF_WEIGHTS = 500 << 20, 3.5
"""Memory of the builder itself, and of the weights in it: SD 1.5's 1.7 GB take 5.8 GB."""


class TensorRT(Target):
    """One TensorRT engine per entry, strongly typed: it computes in the Program's own dtypes.

    Where NVIDIA's TensorRT is installed and a GPU is there, the engine is built for that GPU and run. Elsewhere
    TensorRT for RTX compiles ahead of time: one portable engine for all ``compute_capabilities``.
    """

    edition: Literal["auto", "datacenter", "rtx"] = Field(
        "auto",
        description="auto takes datacenter where it is installed, a GPU is there, and no capabilities are asked for",
    )
    compute_capabilities: tuple[Capability, ...] | None = Field(
        None, description="GPUs that an rtx engine is for; by default SM86, SM89 and SM120"
    )
    refit: bool = Field(False, description="datacenter: leave the weights exchangeable by TensorRT's refitter")
    timing_cache: Path | None = Field(
        None, description="datacenter: a file that keeps measured kernel times for the next build"
    )
    opset: int = Field(OPSET, ge=18, le=23, description="ONNX operator set on the way")
    optimize: bool = Field(True, description="fold constants and simplify the ONNX graph on the way")

    extra: ClassVar[str] = "tensorrt"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnx_ir", "onnxscript", "tensorrt_rtx")

    @field_validator("compute_capabilities")
    @classmethod
    def _some(cls, value: tuple[Capability, ...] | None) -> tuple[Capability, ...] | None:
        if value is not None and not value:
            raise ValueError("name one at least, or leave it out")
        return value

    @classmethod
    def missing_packages(cls) -> list[str]:
        """Either edition will do."""
        missing = super().missing_packages()
        return [name for name in missing if name != "tensorrt_rtx" or not installed("datacenter")]

    def runs(self) -> Execution:
        """On a GPU that the engine is for."""
        if not torch.cuda.is_available():
            return "elsewhere"
        if self._edition() == "datacenter":
            return "native"
        major, minor = torch.cuda.get_device_capability()
        return "native" if installed("rtx") and f"SM{major}{minor}" in self._capabilities() else "elsewhere"

    def _edition(self) -> Edition:
        if self.edition != "auto":
            return self.edition
        built_here = self.compute_capabilities is None and installed("datacenter") and torch.cuda.is_available()
        return "datacenter" if built_here else "rtx"

    def _capabilities(self) -> tuple[Capability, ...]:
        if self._edition() == "datacenter":
            return ()
        return tuple(dict.fromkeys(self.compute_capabilities or DEFAULT))

    def supports(self, program: Program) -> list[Unsupported]:
        """Operators without a translation to ONNX, dtypes and operators that a GPU lacks, by module path."""
        found = [item for graph in program.entries.values() for item in onnx_unsupported(graph, SUPPORTED, "TensorRT")]
        for graph in program.entries.values():
            found += _asymmetric(graph)
            found += _lacking(graph, self._capabilities())
        return found

    def predict(self, program: Program) -> Footprint:
        """Engines hold their weights each, whatever entries share; the builder holds them several times."""
        sizes = [program.weights.restricted(graph.weight_names).nbytes for graph in program.entries.values()]
        nodes = sum(len(graph.calls) for graph in program.entries.values())
        onnx = super().predict(program)
        return Footprint(
            disk=sum(sizes) + CODE_OF_A_NODE * nodes,
            lowering=max(onnx.lowering, BUILDER + int(COPIES_OF_WEIGHTS * max(sizes, default=0))),
            checking=0,
            loaded=sum(sizes),
        )

    def lower(self, program: Program, lowering: Lowering) -> dict[str, LoweredEntry]:
        """Write ``ENTRY.engine`` for every entry. The ONNX form is temporary.

        Raises:
            MissingValuesError: the Program was captured structure-only.
            UserError: options contradict one another, the graph has no ONNX form, or TensorRT cannot parse or build it.
        """
        self._check_options()
        with tempfile.TemporaryDirectory(dir=lowering.folder, prefix="onnx-") as temporary:
            files = write_onnx_folder(
                program,
                Path(temporary),
                opset=self.opset,
                optimize=self.optimize,
                rewrite=fusible_attention,
                allow_nonfinite=lowering.allow_nonfinite,
                progress=lowering.progress,
            )
            return {
                name: self._built(name, program, lowering, path, files.facts[name])
                for name, path in files.paths.items()
            }

    def _check_options(self) -> None:
        edition = self._edition()
        library(edition)
        if edition == "datacenter" and self.compute_capabilities is not None:
            raise UserError("target tensorrt: datacenter builds for the GPU that is there: leave compute_capabilities")
        if edition == "datacenter" and not torch.cuda.is_available():
            raise UserError(
                "target tensorrt: datacenter needs a GPU (PyTorch finds no CUDA here); edition: rtx builds without one"
            )
        if edition == "rtx" and self.refit:
            raise UserError("target tensorrt: rtx makes no refittable engine ahead of time: refit is for datacenter")
        if edition == "rtx" and self.timing_cache is not None:
            raise UserError(
                "target tensorrt: rtx times its kernels where the engine runs: timing_cache is for datacenter"
            )

    def _built(self, name: str, program: Program, lowering: Lowering, path: Path, facts: OnnxFacts) -> LoweredEntry:
        graph, out, edition = program.entries[name], lowering.folder / f"{name}.engine", self._edition()
        capabilities = self._capabilities()
        building = Building(edition, capabilities, _profiles(graph), self.refit, self.timing_cache)
        lowering.progress("build the engine", 0.0)
        built = build_engine(path, out, building)
        lowering.progress("build the engine", 1.0)
        details: dict[str, Any] = {
            "bytes": built.bytes,
            "nodes": facts.nodes,
            "opset": self.opset,
            "named_nodes": round(facts.named, 4),
            "edition": edition,
            "version": str(library(edition).__version__),
            **({"compute_capabilities": list(capabilities)} if capabilities else {}),
            **({"layers": dict(built.layers), "fused_attentions": built.attentions} if built.layers else {}),
            "licence": LICENCE,
        }
        covered = Coverage(facts.nodes, facts.nodes)
        return LoweredEntry(out.name, graph.inputs, graph.outputs, details, {out.name: built.digest}, coverage=covered)

    @classmethod
    def load(cls, folder: Path, entry: Mapping[str, Any], options: Mapping[str, Any]) -> Runner:
        """One entry's execution context on the current GPU.

        Raises:
            UserError: the edition that built the engine is not installed, or refuses it on this GPU.
        """
        edition = entry["details"]["edition"]
        tensorrt, log = library(edition), messages(edition)
        log.clear()
        path = folder / str(entry["engine"])
        engine = tensorrt.Runtime(log).deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise UserError(f"TensorRT cannot run {path.name} on this GPU: {' '.join(log.errors)}")
        return Context(tensorrt, engine, entry)


class Context:
    """An engine as a :data:`~optpass.pipeline.target.Runner`; calls from several threads run one after another."""

    def __init__(self, tensorrt: Any, engine: Any, entry: Mapping[str, Any]) -> None:
        self.engine, self.context = engine, engine.create_execution_context()
        if self.context is None:
            raise UserError(f"TensorRT cannot run {entry['engine']}: not enough memory on the GPU")
        known = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        self.inputs = [spec["name"] for spec in entry["inputs"] if spec["name"] in known]
        # An output that is called as an input has a name of its own in ONNX.
        self.outputs = {
            spec["name"]: (f"{spec['name']}.out" if f"{spec['name']}.out" in known else spec["name"], spec["dtype"])
            for spec in entry["outputs"]
        }
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._lock = Lock()

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with self._lock, torch.cuda.stream(self.stream):
            given = {name: tensors[name].to("cuda").contiguous() for name in self.inputs}
            for name, tensor in given.items():
                self.context.set_input_shape(name, tuple(tensor.shape))
                self.context.set_tensor_address(name, tensor.data_ptr())
            found = {}
            for name, (inside, dtype) in self.outputs.items():
                shape = tuple(self.context.get_tensor_shape(inside))
                found[name] = torch.empty(shape, dtype=dtype_from_name(dtype), device="cuda")
                self.context.set_tensor_address(inside, found[name].data_ptr())
            if not self.context.execute_async_v3(self.stream.cuda_stream):
                raise UserError("TensorRT failed to run the engine")
            self.stream.synchronize()
            return {name: tensor.cpu() for name, tensor in found.items()}


def _profiles(graph: Graph) -> dict[str, Profile]:
    """A profile for every input with an open size: the ends of the ranges, tuned for the sizes of the capture."""
    if not graph.dimensions:
        return {}
    open_inputs = {spec.name for spec in graph.inputs if any(isinstance(size, str) for size in spec.shape)}
    ends = [
        {item.name: size for item, size in zip(graph.dimensions, sizes, strict=True)}
        for sizes in zip(*((item.minimum, item.example, item.maximum) for item in graph.dimensions), strict=True)
    ]
    smallest, usual, largest = ({spec.name: tuple(spec.shape) for spec in graph.inputs_at(end)} for end in ends)
    return {name: Profile(smallest[name], usual[name], largest[name]) for name in smallest if name in open_inputs}


@dataclass(frozen=True)
class Lack:
    """What some GPUs cannot do, and what to do about it.

    Found by building engines of one operator with TensorRT for RTX 1.7.1; NVIDIA's support matrix says the same of
    bf16 and fp8.
    """

    capabilities: frozenset[Capability]
    what: str
    advice: str
    concerns: Callable[[Node], bool]


def _named(node: Node) -> str:
    return operator_name(node).split(".")[0]


def _computes_in(node: Node, dtype: torch.dtype) -> bool:
    values = [node, *node.all_input_nodes]
    return any(isinstance(value.meta.get("val"), Tensor) and value.meta["val"].dtype == dtype for value in values)


def _convolves_volumes(node: Node) -> bool:
    return _named(node) in ("conv3d", "conv_transpose3d")


LACKS = (
    Lack(
        frozenset({"SM75"}),
        "bf16",
        "capture in float16",
        lambda node: _computes_in(node, torch.bfloat16),
    ),
    Lack(
        frozenset({"SM75"}),
        "f32 matrix products",
        "capture in float16",
        lambda node: _named(node) in PRODUCTS and _computes_in(node, torch.float32),
    ),
    Lack(
        frozenset({"SM75"}),
        "f32 convolutions of three dimensions",
        "capture in float16",
        lambda node: _convolves_volumes(node) and _computes_in(node, torch.float32),
    ),
    Lack(
        frozenset({"SM75", "SM80", "SM86"}),
        "fp8",
        "quantise to int8",
        lambda node: _computes_in(node, torch.float8_e4m3fn),
    ),
)


def _lacking(graph: Graph, capabilities: tuple[Capability, ...]) -> Iterator[Unsupported]:
    for lack in LACKS:
        if not (without := [name for name in capabilities if name in lack.capabilities]):
            continue
        gpus = ", ".join(f"{name} ({GENERATIONS[name]})" for name in without)
        reason = f"{gpus} has no {lack.what}; {lack.advice}, or leave {', '.join(without)} out of compute_capabilities"
        for node in graph.calls:
            if lack.concerns(node):
                yield Unsupported(path_of(node), operator_name(node), reason)


def _asymmetric(graph: Graph) -> Iterator[Unsupported]:
    for node in graph.calls:
        if str(node.target).startswith(QUANTIZERS) and node.args[ZERO_POINT] != 0:
            reason = f"quantised about the zero point {node.args[ZERO_POINT]}; TensorRT takes the symmetric form alone"
            yield Unsupported(path_of(node), operator_name(node), reason)
