"""Target ``ethos-u``: int8 programs for Arm's microNPUs, in ``.pte`` files, and Arm's reference model of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from optpass.environments.environment import Environment
from optpass.environments.target import RebuildingTarget, coverage
from optpass.environments.worker import Worker
from optpass.errors import UserError
from optpass.interchange.storage import save_program
from optpass.ir.graph import Graph
from optpass.ir.program import Program
from optpass.pipeline.target import Execution, Footprint, LoweredEntry, Lowering, Unsupported
from optpass.quantization.form import INTEGER, QuantizationForm

FALLBACK = "the NPU takes no such operator: the processor beside it runs it"
COMPILER = 700 << 20
"""Memory of the compiler's process before it has read a weight."""
LOWERED_COPIES = 4
SHOWN = 8


class EthosU(RebuildingTarget):
    """``.pte`` files of ExecuTorch for Arm's Ethos-U NPUs, one per entry, compiled by Vela.

    The NPUs compute in integers alone: a Program must have been quantised, every operator of it, to int8. One
    of which nothing would run on the NPU is refused. Compiled in ExecuTorch's environment (``optpass targets install
    ethos-u``). What runs here is Arm's reference model of TOSA, the form that Vela compiles: numerics
    are the NPU's, times are not. It needs the saved Program, which therefore stays beside the engine.
    """

    device: Literal[
        "ethos-u55-32",
        "ethos-u55-64",
        "ethos-u55-128",
        "ethos-u55-256",
        "ethos-u65-256",
        "ethos-u65-512",
        "ethos-u85-128",
        "ethos-u85-256",
        "ethos-u85-512",
        "ethos-u85-1024",
        "ethos-u85-2048",
    ] = Field("ethos-u85-256", description="the NPU and its multiply-accumulates a cycle; engines run on no other")
    system_config: str = Field("", description="a system of Vela's Arm/vela.ini; Vela's choice for the device if empty")
    memory_mode: str = Field("", description="a memory mode of Vela's Arm/vela.ini; Vela's choice if empty")

    name: ClassVar[str] = "ethos-u"
    script: ClassVar[Path] = Path(__file__).with_name("workers") / "ethos_u.py"
    # The same packages as target executorch's: whichever is installed serves both.
    environment: ClassVar[Environment] = Environment(
        name="executorch",
        first=("torch==2.13.0",),
        requirements=("executorch[ethos-u]==1.5.1",),
        gigabytes=1.8,
        licence="BSD-3-Clause; Vela and the TOSA tools are Apache-2.0",
    )
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset(
        {torch.float32, torch.int64, torch.int32, torch.int16, torch.int8, torch.bool}
    )
    floats: ClassVar[frozenset[torch.dtype]] = frozenset({torch.float32})
    quantization: ClassVar[QuantizationForm] = replace(INTEGER, integer_bias=True)

    def runs(self) -> Execution:
        """Arm's reference model computes what the NPU does, at the speed of this CPU."""
        return "emulated"

    def supports(self, program: Program) -> list[Unsupported]:
        """As every target of this kind, and Programs that are not quantised: Vela would give the NPU nothing."""
        found = super().supports(program)
        reason = "Ethos-U computes in int8 alone, and this is not quantised; put the pass 'quantize' into the recipe"
        for name, graph in program.entries.items():
            if not _quantised(graph):
                found.append(Unsupported(f"({name})", "floating graph", reason))
        return found

    def predict(self, program: Program) -> Footprint:
        """Files: the weights in the engine, and in the saved Program beside it."""
        weights = program.used_weights().nbytes
        memory = COMPILER + LOWERED_COPIES * weights
        return Footprint(2 * weights, memory, 0, memory)

    def _lowered(self, program: Program, lowering: Lowering) -> dict[str, LoweredEntry]:
        saved = lowering.folder / "program"
        written = save_program(
            program,
            saved,
            allow_nonfinite=lowering.allow_nonfinite,
            progress=lambda fraction: lowering.progress("write the weights", fraction),
        )
        digests = {f"program/{name}": digest for name, digest in written.items()}
        return {name: self._entry(name, program, lowering, saved, digests) for name in program.entries}

    def _entry(
        self, name: str, program: Program, lowering: Lowering, saved: Path, digests: Mapping[str, str]
    ) -> LoweredEntry:
        graph, path = program.entries[name], lowering.folder / f"{name}.pte"
        lowering.progress("compile for Ethos-U", 0.0)
        worker, found = self._build(saved, name, path)
        lowering.progress("compile for Ethos-U", 1.0)
        if not found["npu"]:
            raise UserError(f"target {self.name!r}: nothing of {name!r} runs on the {self.device}: {_refusals(found)}")
        self._keep(path, worker)
        return LoweredEntry(
            path.name,
            graph.inputs,
            graph.outputs,
            {
                "bytes": found["bytes"],
                "nodes": found["operators"],
                "device": self.device,
                "delegates": found["delegates"],
                "source": saved.name,
            },
            digests,
            coverage=coverage(found["operators"], found["npu"], found["left"], FALLBACK),
        )

    def _build(self, source: Path, entry: str, engine: Path) -> tuple[Worker, Mapping[str, Any]]:
        """The process that built ``engine`` from an entry of the saved Program, and what it says of it."""
        worker = self.worker()
        found: Mapping[str, Any] = worker.ask(
            "lower",
            program=str(source.absolute()),
            entry=entry,
            device=self.device,
            engine=str(engine.absolute()),
            system=self.system_config,
            memory=self.memory_mode,
        )
        return worker, found


def _quantised(graph: Graph) -> bool:
    return any("quantized_decomposed" in str(node.target) for node in graph.calls)


def _refusals(found: Mapping[str, Any]) -> str:
    """The places that were left, with reasons; what repeats is told once."""
    told = dict.fromkeys(f"{each['path']}: {each['operator']}: {each['reason'] or FALLBACK}" for each in found["left"])
    more = f"; and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
    return "; ".join(list(told)[:SHOWN]) + more or "Vela gave it no operator"
