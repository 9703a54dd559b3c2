"""Target ``torch``: AOTInductor packages (``.pt2``), compiled C++ or Triton that PyTorch loads without tracing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from optpass.analysis.operators import aten
from optpass.errors import MissingValuesError, UserError
from optpass.interchange.exported import to_exported
from optpass.ir.graph import Graph, path_of, shape_of, value_of
from optpass.ir.loop import PRESENT
from optpass.ir.program import Program
from optpass.ir.quantized import DEQUANTIZE_CHANNELS, DEQUANTIZE_GROUPS
from optpass.ir.safetensors_io import checked
from optpass.pipeline.target import Footprint, LoweredEntry, Lowering, Runner, Target
from optpass.quiet import first_lines, quiet, quiet_export

FLOAT = torch.float32
LOADING = "import sys, torch, torch._inductor; torch._inductor.aoti_load_package(sys.argv[1])"
PACKED = 3
"""Times the weights that a compilation holds: their values, the constants' object file, the package."""


class Torch(Target):
    """AOTInductor packages, one per entry, with their weights inside; run by PyTorch on the CPU or on CUDA.

    An engine is native code for this kind of processor or GPU: load only what somebody you trust has built. A
    compilation takes half a minute at least, and a C++ compiler. Graphs that `quantize` made run exactly, but not in
    int8: their layers are converted back to floats.
    """

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes CUDA where it is there")
    max_autotune: bool = Field(False, description="time several kernels of each product, and take the fastest")
    matmul_precision: Literal["highest", "high"] = Field(
        "highest", description="of float32 products on CUDA; high takes tf32, of 10 bits"
    )

    def predict(self, program: Program) -> Footprint:
        """Files: the weights of every entry, in each package; compiling holds them :data:`PACKED` times."""
        sizes = [program.weights.restricted(graph.weight_names).nbytes for graph in program.entries.values()]
        return Footprint(sum(sizes), PACKED * max(sizes), 0, sum(sizes))

    def lower(self, program: Program, lowering: Lowering) -> dict[str, LoweredEntry]:
        """Compile ``ENTRY.pt2`` for every entry.

        Raises:
            MissingValuesError: the Program was captured structure-only.
            UserError: no C++ compiler or no CUDA is here, Inductor cannot compile the graph, or PyTorch crashes where
                it loads what was compiled.
        """
        if not program.has_values:
            raise MissingValuesError("AOTInductor packs weights in; the checkpoint was captured structure-only")
        self.check_machine()
        return {name: self._lowered(name, program, lowering) for name in program.entries}

    def _lowered(self, name: str, program: Program, lowering: Lowering) -> LoweredEntry:
        graph, path = program.entries[name], lowering.folder / f"{name}.pt2"
        lowering.progress(f"compile {name}", 0.0)
        started = time.perf_counter()
        exported = self._exported(graph, program, lowering)
        self._compile(exported, graph, path, lowering.folder / f"{name}.inductor")
        _check_loads(path)
        lowering.progress(f"compile {name}", 1.0)
        details = {
            "bytes": path.stat().st_size,
            "nodes": len(graph.calls),
            "device": self._device(),
            "torch": torch.__version__,
            "seconds": round(time.perf_counter() - started, 1),
            "constant": list(_constant(graph)),
        }
        return LoweredEntry(path.name, graph.inputs, graph.outputs, details)

    def _exported(self, graph: Graph, program: Program, lowering: Lowering) -> ExportedProgram:
        """``graph`` over the weights' values, on the device."""
        exported, device = to_exported(_with_arithmetic(graph)), self._device()
        for name in list(exported.state_dict):
            value = checked(name, program.weights[name], allow_nonfinite=lowering.allow_nonfinite)
            exported.state_dict[name] = nn.Parameter(value, False) if value.is_floating_point() else value
        example = tuple(torch.zeros(spec.shape, dtype=spec.dtype) for spec in graph.inputs_at())
        exported.example_inputs = (example, {})
        if device == "cuda":
            from torch.export.passes import move_to_device_pass

            exported = move_to_device_pass(exported, device)
            exported.example_inputs = (tuple(tensor.to(device) for tensor in example), {})
        return exported

    def _compile(self, exported: ExportedProgram, graph: Graph, path: Path, work: Path) -> None:
        from torch._inductor.utils import fresh_inductor_cache

        # Threads are those of the process that runs, not of the one that compiles.
        config = {"max_autotune": self.max_autotune, "cpp.dynamic_threads": True}
        precision = torch.get_float32_matmul_precision()
        work.mkdir()
        try:
            torch.set_float32_matmul_precision(self.matmul_precision)
            # Where the compiler's files lie otherwise, they stay: as large as the weights, several times.
            with quiet("torch._inductor"), quiet_export(), fresh_inductor_cache(dir=str(work)):
                torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=config)
        except Exception as error:
            # What fails inside a compilation shares no base class but Exception.
            raise UserError(
                f"AOTInductor cannot compile {_blamed(graph, str(error))}: {first_lines(error, 6)}"
            ) from error
        finally:
            torch.set_float32_matmul_precision(precision)
            shutil.rmtree(work, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path, entry: Mapping[str, Any], options: Mapping[str, Any]) -> Runner:
        """One entry's package, loaded. Outputs lie on the CPU; states of a loop stay where they were computed.

        Raises:
            UserError: PyTorch refuses the package, or there is no CUDA here for one that was compiled for it.
        """
        details = entry["details"]
        target, device = cls.of("torch", {**options, "device": details["device"]}), str(details["device"])
        target._check_device()
        path = folder / str(entry["engine"])
        try:
            with quiet("torch._inductor"):
                engine = torch._inductor.aoti_load_package(str(path))
        except Exception as error:
            raise UserError(f"PyTorch cannot load {path.name}: {first_lines(error)}") from error
        inputs = [str(spec["name"]) for spec in entry["inputs"]]
        outputs = [str(spec["name"]) for spec in entry["outputs"]]
        constant = frozenset(details["constant"])

        def run(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            given = [tensors[name].to(device) for name in inputs]
            with torch.no_grad():
                results = dict(zip(outputs, engine(*given), strict=True))
            taken = {tensor.untyped_storage().data_ptr() for tensor in given}
            return {name: _own(name, value, taken, name in constant) for name, value in results.items()}

        return run

    def _device(self) -> str:
        cuda = self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())
        return "cuda" if cuda else "cpu"

    def _check_device(self) -> None:
        if self._device() == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "PyTorch finds no CUDA device here: install its CUDA build and the driver, or set device: cpu"
            )

    def check_machine(self) -> None:
        """
        Raises:
            UserError: the device, or the compiler that Inductor needs, is not there.
        """
        self._check_device()
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise UserError(
                f"target 'torch' compiles C++ and finds no {compiler!r} here: install g++, or name a compiler by CXX"
            )


def _check_loads(path: Path) -> None:
    """
    Raises:
        UserError: a process that loads the package dies of it.
    """
    command = [sys.executable, "-c", LOADING, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        # Seen where the first libstdc++ of a process was not the one that the compiler links against.
        raise UserError(
            f"PyTorch {torch.__version__} dies of {signal.Signals(-done.returncode).name} where it loads {path.name}, "
            "which it compiled: its C++ library may not be the compiler's. Set LD_PRELOAD to what "
            "`g++ -print-file-name=libstdc++.so.6` prints, or name another compiler by CXX"
        )
    if done.returncode:
        raise UserError(f"PyTorch cannot load {path.name}, which it compiled: {done.stderr.strip()[-400:]}")


def _with_arithmetic(graph: Graph) -> Graph:
    """``graph`` with integer weights made real by arithmetic: Inductor asks for zero points where there are none."""
    if not any(node.target in (DEQUANTIZE_CHANNELS, DEQUANTIZE_GROUPS) for node in graph.calls):
        return graph
    own = graph.copy()
    for node in own.calls:
        if node.target not in (DEQUANTIZE_CHANNELS, DEQUANTIZE_GROUPS):
            continue
        integers, scale, zero = node.args[:3]
        assert isinstance(integers, Node)
        shape, grouped = list(shape_of(integers)), node.target is DEQUANTIZE_GROUPS
        size: Any = node.args[6] if grouped else 0
        axis: Any = 0 if grouped else node.args[3]
        wide = [shape[0], -1, size] if grouped else shape
        along = [shape[0], -1, 1] if grouped else [-1 if index == axis else 1 for index in range(len(shape))]
        with own.before(node):
            value = own.call(aten.to.dtype, own.call(aten.reshape.default, integers, wide, like=node), FLOAT, like=node)
            if isinstance(zero, Node):
                shift = own.call(aten.reshape.default, zero, along, like=node)
                value = own.call(aten.sub.Tensor, value, shift, like=node)
            step = own.call(aten.reshape.default, scale, along, like=node)
            value = own.call(aten.mul.Tensor, value, step, like=node)
            value = own.call(aten.reshape.default, value, shape, like=node)
            if value_of(node).dtype is not FLOAT:
                value = own.call(aten.to.dtype, value, value_of(node).dtype, like=node)
        node.replace_all_uses_with(value)
        own.fx.erase_node(node)
    return own


def _own(name: str, value: Tensor, taken: set[int], constant: bool) -> Tensor:
    """A tensor of the caller's own: engines return inputs, weights and equal outputs without a copy."""
    storage = value.untyped_storage().data_ptr()
    shared = constant or storage in taken
    taken.add(storage)
    if not name.startswith(PRESENT):
        value, shared = value.cpu(), shared and value.device.type == "cpu"
    return value.clone() if shared else value


def _constant(graph: Graph) -> Iterator[str]:
    """The outputs that depend on no input: an engine may return its own weights for them."""
    moving = set(graph.placeholders)
    for node in graph.calls:
        if moving.intersection(node.all_input_nodes):
            moving.add(node)
    returned: Any = graph.output_node.args[0]
    return (name for name, node in zip(graph.signature.outputs, returned, strict=True) if node not in moving)


def _blamed(graph: Graph, message: str) -> str:
    """Where the operators are that ``message`` names; the graph as a whole where it names none."""
    places = [path_of(node) for node in graph.calls if f"target: {node.target}" in message]
    return ", ".join(dict.fromkeys(places)) or "this graph"
