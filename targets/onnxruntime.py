"""Target ``onnxruntime``: ONNX files that run in ONNX Runtime, on the CPU or on CUDA where it is there."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.fx import Node

from optpass.errors import UserError
from optpass.interchange.onnx_file import OPSET
from optpass.interchange.onnx_folder import OnnxFolder, write_onnx_folder
from optpass.ir.graph import Graph, path_of
from optpass.ir.program import Program
from optpass.ir.weights import WeightStore
from optpass.pipeline.onnx_support import NODE_IN_MEMORY, exporting_memory, onnx_unsupported
from optpass.pipeline.target import Footprint, LoweredEntry, Lowering, Runner, Target, Unsupported
from optpass.quantization.form import CPU, QuantizationForm

SUPPORTED = frozenset(
    {torch.float32, torch.float16, torch.int64, torch.int32, torch.int16, torch.uint16, torch.int8, torch.uint8}
    | {torch.bool}
)
LEVELS = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "none": "ORT_DISABLE_ALL",
}
ERRORS_ONLY = 3
LARGE = 1 << 30
RUNTIME = 50 << 20
"""What stays with ONNX Runtime itself."""
NODE_ON_DISK, LETTER_ON_DISK = 140, 33
"""Bytes of a node, and for each letter of its module path, which stands in it with those of all modules around."""
MACHINE_WORD = 4
CONVOLUTIONS = ("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.conv_transpose", "aten.convolution")


class OnnxRuntime(Target):
    """ONNX files with external data, one per entry, run by ONNX Runtime.

    fp32 and fp16 graphs run on every provider (the CPU computes fp16 in fp32, which takes longer than fp32
    weights do; ``--dtype float32`` trades size for that). bf16, fp64 and complex
    graphs are refused: its CPU kernels for convolution and matrix products lack them.
    """

    threads: int = Field(0, ge=0, description="threads of one operator; 0 takes as many as PyTorch does")
    opset: int = Field(OPSET, ge=18, le=23, description="ONNX operator set of the files")
    optimize: bool = Field(True, description="fold constants and simplify the ONNX graph before it is written")
    graph_optimization: Literal["all", "extended", "basic", "none"] = Field(
        "all", description="ONNX Runtime's own fusions when the engine is loaded"
    )
    providers: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes CUDA where it is installed")
    execution: Literal["sequential", "parallel"] = Field(
        "sequential", description="parallel runs independent branches side by side"
    )
    spinning: bool = Field(
        True, description="threads wait busily between the operators of a call (faster, never after it)"
    )

    floats: ClassVar[frozenset[torch.dtype]] = frozenset({torch.float32, torch.float16})
    exchanges: ClassVar[bool] = True
    quantization: ClassVar[QuantizationForm] = CPU
    wide_activations: ClassVar[bool] = True
    extra: ClassVar[str] = "onnxruntime"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")

    def supports(self, program: Program) -> list[Unsupported]:
        """Operators without a translation to ONNX, and dtypes without kernels, by module path."""
        return [
            found for graph in program.entries.values() for found in onnx_unsupported(graph, SUPPORTED, "ONNX Runtime")
        ]

    def predict(self, program: Program) -> Footprint:
        """Files: the weights, and for each node its ONNX translation with its module path.

        A session that is loaded to run holds every weight in the form that its kernels want, in 32 bits; beside
        it stays the plain form of a convolution's, and the stored form of what was converted from 16 bits. Files
        above 1 GiB are checked without that (:meth:`lower`).
        """
        parts = [_footprint(graph, program.weights) for graph in program.entries.values()]
        return Footprint(
            disk=sum(part.disk for part in parts) + program.used_weights().nbytes,
            lowering=max(part.lowering for part in parts),
            checking=max(part.checking for part in parts),
            loaded=sum(part.loaded for part in parts),
        )

    def lower(self, program: Program, lowering: Lowering) -> dict[str, LoweredEntry]:
        """Write ``ENTRY.onnx`` for every entry and load each once.

        The weights of one entry go to ``ENTRY.onnx.data``; several entries share ``weights.onnx.data``.
        Files above 1 GiB are loaded without ONNX Runtime's own optimisations, which would copy the weights.

        Raises:
            MissingValuesError: the Program was captured structure-only.
            UserError: the graph has no ONNX form, or ONNX Runtime cannot run it.
        """
        files = write_onnx_folder(
            program,
            lowering.folder,
            opset=self.opset,
            optimize=self.optimize,
            allow_nonfinite=lowering.allow_nonfinite,
            progress=lowering.progress,
        )
        return {name: self._lowered(name, program, lowering, files) for name in program.entries}

    def _lowered(self, name: str, program: Program, lowering: Lowering, files: OnnxFolder) -> LoweredEntry:
        graph, path, facts = program.entries[name], files.paths[name], files.facts[name]
        lowering.progress("load the engine", 0.0)
        # Loaded to run, an engine holds every weight once more, packed for its kernels.
        session = self._session(path, light=facts.bytes > LARGE)
        lowering.progress("load the engine", 1.0)
        details = {
            "bytes": facts.bytes,
            "nodes": facts.nodes,
            "opset": self.opset,
            "named_nodes": round(facts.named, 4),
            "provider": session.get_providers()[0],
        }
        return LoweredEntry(path.name, graph.inputs, graph.outputs, details, files.digests, files.slotted)

    @classmethod
    def load(cls, folder: Path, entry: Mapping[str, Any], options: Mapping[str, Any]) -> Runner:
        """A session of one entry's file.

        Raises:
            UserError: ONNX Runtime refuses the file, or has no CUDA where that is asked for.
        """
        session = cls.of("onnxruntime", options)._session(folder / str(entry["engine"]))
        names = [str(output["name"]) for output in entry["outputs"]]

        def run(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            feeds = {name: tensor.numpy() for name, tensor in tensors.items()}
            results = session.run(None, feeds)
            return {name: torch.from_numpy(value) for name, value in zip(names, results, strict=True)}

        return run

    def _session(self, path: Path, *, light: bool = False) -> Any:
        import onnxruntime

        try:
            return onnxruntime.InferenceSession(str(path), self._session_options(light), providers=self._providers())
        except UserError:
            raise
        except Exception as error:
            # ONNX Runtime's errors share no base class but Exception.
            message = str(error).strip().splitlines()[0]
            raise UserError(f"ONNX Runtime cannot run {path.name}: {message}") from error

    def _session_options(self, light: bool) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads or torch.get_num_threads()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, LEVELS[self.graph_optimization])
        parallel = self.execution == "parallel"
        options.execution_mode = getattr(onnxruntime.ExecutionMode, "ORT_PARALLEL" if parallel else "ORT_SEQUENTIAL")
        # Memory patterns assume one order of execution.
        options.enable_mem_pattern = not parallel
        options.log_severity_level = ERRORS_ONLY
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self.spinning else "0")
        # Threads that go on spinning after a call would compete with the pipeline's PyTorch parts.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self._providers() == ["CPUExecutionProvider"]:
            _register_arena()
            options.add_session_config_entry("session.use_env_allocators", "1")
            # What lies in the arena stays there; weights go when their session does.
            options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        if light:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.add_session_config_entry("session.disable_prepacking", "1")
        return options

    def _providers(self) -> list[str]:
        import onnxruntime

        available = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        if self.providers == "cuda" and not available:
            raise UserError(
                "ONNX Runtime has no CUDA here: install onnxruntime-gpu in place of onnxruntime, or set providers: auto"
            )
        gpu = ["CUDAExecutionProvider"] if available and self.providers != "cpu" else []
        return [*gpu, "CPUExecutionProvider"]


@cache
def _register_arena() -> None:
    """One arena for the activations of all sessions of this process.

    The engines of a loop run one after another; an arena of its own for each would keep the activations of all.
    """
    import onnxruntime

    kind, memory = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, onnxruntime.OrtMemType.DEFAULT
    onnxruntime.create_and_register_allocator(onnxruntime.OrtMemoryInfo("Cpu", kind, 0, memory), None)


def _footprint(graph: Graph, weights: WeightStore) -> Footprint:
    """One entry's, its weights on disk left out: entries share them."""
    read = weights.restricted(graph.weight_names)
    convolved = {str(operand.target) for node in graph.calls if _convolves(node) for operand in node.all_input_nodes}
    loaded = 0
    for name, expression in read.items():
        wide = expression.numel * max(expression.dtype.itemsize, MACHINE_WORD)
        loaded += wide * (2 if name in convolved else 1) + (expression.nbytes if wide > expression.nbytes else 0)
    nodes = NODE_IN_MEMORY * len(graph.calls)
    return Footprint(
        disk=sum(NODE_ON_DISK + LETTER_ON_DISK * len(path_of(node)) for node in graph.calls),
        lowering=exporting_memory(graph, weights),
        checking=RUNTIME + nodes + (0 if read.nbytes > LARGE else loaded),
        loaded=RUNTIME + nodes + loaded,
    )


def _convolves(node: Node) -> bool:
    return str(node.target).startswith(CONVOLUTIONS)
