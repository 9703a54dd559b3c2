"""Target ``iree``: IREE modules (``.vmfb``) with their weights beside them, for CPUs, GPUs and Vulkan."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from optpass.errors import UserError
from optpass.interchange.onnx_file import OPSET, OnnxFacts, module_path
from optpass.interchange.onnx_folder import write_onnx_folder
from optpass.ir.graph import path_of
from optpass.ir.program import Program
from optpass.ir.text import operator_name
from optpass.pipeline.onnx_support import onnx_unsupported
from optpass.pipeline.target import Execution, LoweredEntry, Lowering, Runner, Target, Unsupported

if TYPE_CHECKING:
    import iree.runtime as runtime

SUPPORTED = frozenset(
    {torch.float32, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}
)
SCOPE = "model"
"""The name that a module looks its weights up under."""
EXTERNAL = 64
"""Weights of so many elements lie beside the module, smaller ones in it."""
ERROR = re.compile(r"\.mlir:(\d+):\d+: error: (.*)")
OPERATION = re.compile(r'torch\.operator "onnx\.(\w+)"')
FLAGS = {
    "llvm-cpu": ("--iree-hal-target-device=local", "--iree-hal-local-target-device-backends=llvm-cpu"),
    "cuda": ("--iree-hal-target-device=cuda",),
    "rocm": ("--iree-hal-target-device=hip",),
    "vulkan-spirv": ("--iree-hal-target-device=vulkan",),
    "metal-spirv": ("--iree-hal-target-device=metal",),
}
CHIPS = {
    "llvm-cpu": ("--iree-llvmcpu-target-cpu", "host"),
    "cuda": ("--iree-cuda-target", "sm_80"),
    "rocm": ("--iree-rocm-target", "gfx1100"),
    "vulkan-spirv": ("--iree-vulkan-target", ""),
}
"""The compiler's flag for the kind of chip, and what it is where the recipe says nothing."""


class Iree(Target):
    """IREE modules, one per entry, each with an archive of its weights.

    ``llvm-cpu`` runs here; the others are compiled, and run where there is such a device. A module for ``llvm-cpu`` is
    native code: load only what somebody you trust has built. Quantised graphs are refused for Vulkan, whose
    code generation cannot take them.
    """

    backend: Literal["llvm-cpu", "cuda", "rocm", "vulkan-spirv", "metal-spirv"] = Field(
        "llvm-cpu", description="what the module is compiled for"
    )
    chip: str = Field(
        "",
        pattern=r"^[\w.+-]*$",
        description="host, generic or an LLVM name of a CPU; sm_86 (cuda); gfx1100 (rocm); adreno, rdna3 … (vulkan)",
    )
    opset: int = Field(OPSET, ge=18, le=23, description="ONNX operator set on the way")

    floats: ClassVar[frozenset[torch.dtype]] = frozenset({torch.float32, torch.float16})
    extra: ClassVar[str] = "iree"
    packages: ClassVar[tuple[str, ...]] = ("iree.compiler", "iree.runtime", "onnx", "onnx_ir", "onnxscript")

    def runs(self) -> Execution:
        """On this CPU, where the module was compiled for it or for any."""
        here = self.backend == "llvm-cpu" and self.chip in ("", "host", "generic")
        return "native" if here else "elsewhere"

    def check_machine(self) -> None:
        """
        Raises:
            UserError: the backend takes no chip, and one is named.
        """
        if self.chip and self.backend not in CHIPS:
            raise UserError(f"backend {self.backend} takes no chip; leave {self.chip!r} out")

    def supports(self, program: Program) -> list[Unsupported]:
        """Operators without a translation to ONNX, dtypes without code, and quantised layers for Vulkan."""
        graphs = program.entries.values()
        found = [item for graph in graphs for item in onnx_unsupported(graph, SUPPORTED, "IREE")]
        return found + (list(_quantised(program)) if self.backend == "vulkan-spirv" else [])

    def lower(self, program: Program, lowering: Lowering) -> dict[str, LoweredEntry]:
        """Write ``ENTRY.vmfb`` and ``ENTRY.irpa`` for every entry; importer and compiler run as processes.

        Raises:
            MissingValuesError: the Program was captured structure-only.
            UserError: the graph has no ONNX form, or IREE cannot import or compile it.
        """
        self.check_machine()
        with tempfile.TemporaryDirectory(dir=lowering.folder, prefix="onnx-") as temporary:
            files = write_onnx_folder(
                program,
                Path(temporary),
                opset=self.opset,
                allow_nonfinite=lowering.allow_nonfinite,
                progress=lowering.progress,
            )
            return {
                name: self._lowered(name, program, path, files.facts[name], lowering)
                for name, path in files.paths.items()
            }

    def _lowered(self, name: str, program: Program, source: Path, facts: OnnxFacts, lowering: Lowering) -> LoweredEntry:
        graph, engine = program.entries[name], lowering.folder / f"{name}.vmfb"
        archive, mlir = engine.with_suffix(".irpa"), source.with_suffix(".mlir")
        lowering.progress(f"compile {name}", 0.0)
        importing = ["-m", "iree.compiler.tools.import_onnx", str(source), "-o", str(mlir), "--large-model"]
        external = ["--externalize-params", "--params-scope", SCOPE, "--save-params-to", str(archive)]
        _run([sys.executable, *importing, *external, "--num-elements-threshold", str(EXTERNAL)], source, mlir)
        lowering.progress(f"compile {name}", 0.1)
        _run([_compiler(), str(mlir), "--iree-input-type=onnx", *self._flags(), "-o", str(engine)], source, mlir)
        lowering.progress(f"compile {name}", 1.0)
        details = {
            "bytes": engine.stat().st_size + archive.stat().st_size,
            "nodes": facts.nodes,
            "named_nodes": round(facts.named, 4),
            "backend": self.backend,
            "chip": self._chip(),
            "iree": version("iree-base-compiler"),
        }
        return LoweredEntry(engine.name, graph.inputs, graph.outputs, details)

    def _chip(self) -> str:
        return self.chip or CHIPS.get(self.backend, ("", ""))[1]

    def _flags(self) -> list[str]:
        chip = self._chip()
        return [*FLAGS[self.backend], *([f"{CHIPS[self.backend][0]}={chip}"] if chip else [])]

    @classmethod
    def load(cls, folder: Path, entry: Mapping[str, Any], options: Mapping[str, Any]) -> Runner:
        """One entry's module on this machine's CPU; calls from several threads take turns.

        Raises:
            UserError: IREE refuses the module or its weights: another version wrote them, or they are damaged.
        """
        path = folder / str(entry["engine"])
        try:
            call = _function(path)
        except Exception as error:
            # IREE's errors are RuntimeError, ValueError and its own.
            said = str(error).strip().splitlines()[0][:300]
            raise UserError(
                f"IREE cannot load {path.name} (built by {entry['details'].get('iree')}): {said}"
            ) from error
        inputs = [str(spec["name"]) for spec in entry["inputs"]]
        outputs = [str(spec["name"]) for spec in entry["outputs"]]
        lock = Lock()

        def run(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            given = [tensors[name].contiguous().numpy() for name in inputs]
            with lock:
                found = call(*given)
                results = found if isinstance(found, (tuple, list)) else [found]
                arrays = [result.to_host().copy() for result in results]
            return {name: torch.from_numpy(array) for name, array in zip(outputs, arrays, strict=True)}

        return run


def _function(path: Path) -> Any:
    """The module's one function, with its weights."""
    import iree.runtime as runtime

    instance = runtime.VmInstance()
    device = runtime.get_device("local-task")
    modules: list[runtime.VmModule] = [runtime.create_hal_module(instance, device)]
    archive = path.with_suffix(".irpa")
    if archive.is_file():
        index = runtime.ParameterIndex()
        index.load(str(archive))
        modules.append(runtime.create_io_parameters_module(instance, index.create_provider(scope=SCOPE)))
    main = runtime.VmModule.mmap(instance, str(path))
    context = runtime.SystemContext(vm_modules=[*modules, main], config=runtime.Config(device=device))
    (name,) = (name for name in main.function_names if not name.startswith("__") and not name.endswith("$async"))
    return context.modules[main.name][name]


def _compiler() -> str:
    from iree.compiler.tools.binaries import find_tool

    return str(find_tool("iree-compile"))


def _run(command: list[str], source: Path, mlir: Path) -> None:
    """
    Raises:
        UserError: the tool fails or is killed; the message names the module where it says which operation.
    """
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return
    if done.returncode < 0:
        kind = signal.Signals(-done.returncode).name
        why = "out of memory, most likely" if kind == "SIGKILL" else "a crash of the compiler"
        raise UserError(f"IREE's compiler was ended by {kind} ({why}) at {source.name}")
    found = ERROR.search(done.stderr)
    if found is None or not mlir.is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"IREE cannot compile {source.name}: {lines[-1] if lines else done.returncode}")
    raise UserError(f"IREE cannot compile {_place(source, mlir, int(found[1]))}: {found[2].strip()[:300]}")


def _place(source: Path, mlir: Path, number: int) -> str:
    """The module path and ONNX operator of what stands in a line of the imported module.

    Nodes are imported in order: the third Conv of the one is the third of the other.
    """
    import onnx_ir

    lines = mlir.read_text("utf-8").splitlines()
    if not (found := OPERATION.search(lines[number - 1])):
        return source.name
    operator = found[1]
    before = sum(f'"onnx.{operator}"' in line for line in lines[: number - 1])
    nodes = [node for node in onnx_ir.load(source).graph if node.op_type == operator]
    return f"{module_path(nodes[before].name or '')} ({operator})" if before < len(nodes) else operator


def _quantised(program: Program) -> Iterator[Unsupported]:
    reason = "IREE's Vulkan code generation cannot take quantised layers; leave quantize out, or take another backend"
    for graph in program.entries.values():
        for node in graph.calls:
            if str(node.target).startswith("quantized_decomposed."):
                yield Unsupported(path_of(node), operator_name(node), reason)
