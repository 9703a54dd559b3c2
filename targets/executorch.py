"""Target ``executorch``: ``.pte`` files for ExecuTorch, whose XNNPACK delegate runs on the CPUs of phones, and here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from optpass.environments.environment import Environment
from optpass.environments.target import ApartTarget, coverage
from optpass.environments.worker import Worker
from optpass.interchange.storage import save_program
from optpass.ir.program import Program
from optpass.pipeline.target import Execution, Footprint, LoweredEntry, Lowering
from optpass.quantization.form import INTEGER, QuantizationForm

PORTABLE = "the delegate takes no such operator here: ExecuTorch's portable kernels run it, slowly"
COMPILER = 700 << 20
"""Memory of the compiler's process before it has read a weight."""
LOWERED_COPIES = 3


class ExecuTorch(ApartTarget):
    """``.pte`` files of ExecuTorch, one per entry, with an XNNPACK, Core ML or Vulkan delegate, or none.

    Compiled in ExecuTorch's own environment (``optpass targets install executorch``). ``xnnpack`` and ``portable``
    engines run here, in a process of their own: latencies include the exchange of tensors with it, a copy and a
    message. ``coreml`` and ``vulkan`` are compiled only. Quantised Programs become XNNPACK's int8 kernels where their
    operators have them.
    """

    backend: Literal["xnnpack", "coreml", "vulkan", "portable"] = Field(
        "xnnpack", description="the delegate: what runs an operator that it takes; portable kernels run the others"
    )

    name: ClassVar[str] = "executorch"
    script: ClassVar[Path] = Path(__file__).with_name("workers") / "executorch.py"
    environment: ClassVar[Environment] = Environment(
        name="executorch",
        first=("torch==2.13.0",),
        requirements=("executorch[ethos-u]==1.5.1",),
        gigabytes=1.8,
        licence="BSD-3-Clause; Vela and the TOSA tools are Apache-2.0",
    )
    quantization: ClassVar[QuantizationForm] = INTEGER
    floats: ClassVar[frozenset[torch.dtype]] = frozenset({torch.float32, torch.float16})
    dtypes: ClassVar[frozenset[torch.dtype]] = floats | {
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    }

    def runs(self) -> Execution:
        """XNNPACK and the portable kernels are in the runtime that comes with the compiler."""
        return "native" if self.backend in ("xnnpack", "portable") else "elsewhere"

    def predict(self, program: Program) -> Footprint:
        """Files: the weights. The compiler's process holds them several times over."""
        weights = program.used_weights().nbytes
        return Footprint(weights, COMPILER + LOWERED_COPIES * weights, 0, COMPILER + 2 * weights)

    def _lowered(self, program: Program, lowering: Lowering) -> dict[str, LoweredEntry]:
        with self.worker() as worker:
            saved = worker.folder / "program"
            save_program(
                program,
                saved,
                allow_nonfinite=lowering.allow_nonfinite,
                progress=lambda fraction: lowering.progress("write the weights", fraction),
            )
            return {name: self._entry(name, program, lowering, worker, saved) for name in program.entries}

    def _entry(self, name: str, program: Program, lowering: Lowering, worker: Worker, saved: Path) -> LoweredEntry:
        graph, path = program.entries[name], lowering.folder / f"{name}.pte"
        lowering.progress("compile for ExecuTorch", 0.0)
        found: dict[str, Any] = worker.ask(
            "lower", program=str(saved), entry=name, backend=self.backend, engine=str(path.absolute())
        )
        lowering.progress("compile for ExecuTorch", 1.0)
        covered = coverage(found["operators"], found["delegated"], found["left"], PORTABLE)
        return LoweredEntry(
            path.name,
            graph.inputs,
            graph.outputs,
            {"bytes": found["bytes"], "nodes": found["operators"], "backend": self.backend},
            coverage=None if self.backend == "portable" else covered,
        )
