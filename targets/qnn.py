"""Target ``qnn``: context binaries for the HTP of Qualcomm's Snapdragon chips."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from optpass.errors import UserError, nearest
from optpass.interchange.onnx_file import OPSET, OnnxFacts, module_path
from optpass.interchange.onnx_folder import write_onnx_folder
from optpass.interchange.onnx_surgery import biases_first, dequantise_weights, fusible_attention
from optpass.interchange.qnn_context import Compiled, Device, compile_context, context_session
from optpass.ir.graph import Graph
from optpass.ir.program import Program
from optpass.pipeline.onnx_support import onnx_unsupported
from optpass.pipeline.target import Coverage, Execution, Footprint, LoweredEntry, Lowering, Runner, Target, Unsupported
from optpass.quantization.form import INTEGER, QuantizationForm

DEVICES = {
    "sm8450": Device(69, 36),
    "sm8550": Device(73, 43),
    "sm8650": Device(75, 57),
    "sm8750": Device(79, 69),
    "sm8850": Device(81, 87),
    "x-elite": Device(73, 60),
}
"""Chips by name: Snapdragon 8 Gen 1, Gen 2, Gen 3, Elite, Elite Gen 5, and X Elite (SC8380XP)."""
SUPPORTED = frozenset(
    {
        torch.float32,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.uint16,
        torch.int8,
        torch.uint8,
        torch.bool,
    }
)
HALF = 2
COMPILER, COPIES_OF_WEIGHTS = 600 << 20, 6.8
"""Memory of the compiler itself, and of the weights in it: SD 1.5's 1.7 GB take 12.3 GB."""
SHOWN = 10


class Qnn(Target):
    """One HTP context per entry: an ONNX file of one ``EPContext`` node, and its binary, for onnxruntime-qnn.

    Floating graphs compute in f16, whatever they are stored in; capture in float16 to see that in the Program.
    Quantised ones compute in int8 where quantizers stand around an operator, or with activations of 16 bits.
    """

    soc: str = Field(description="the chip: sm8450, sm8550, sm8650, sm8750, sm8850 or x-elite")
    fallback: Literal["refuse", "cpu"] = Field(
        "refuse", description="what becomes of operators that the HTP lacks; cpu lets the phone's processor run them"
    )
    effort: int = Field(3, ge=0, le=3, description="what the compiler spends on the order of the graph; 3 is most")
    opset: int = Field(OPSET, ge=18, le=23, description="ONNX operator set on the way")
    optimize: bool = Field(True, description="fold constants and simplify the ONNX graph on the way")

    floats: ClassVar[frozenset[torch.dtype]] = frozenset({torch.float32, torch.float16})
    # The HTP gives every operator's result a scale of its own.
    quantization: ClassVar[QuantizationForm] = replace(INTEGER, handing_on=False)
    wide_activations: ClassVar[bool] = True
    extra: ClassVar[str] = "qnn"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnx_ir", "onnxscript", "onnxruntime", "onnxruntime_qnn")

    @field_validator("soc")
    @classmethod
    def _known(cls, soc: str) -> str:
        name = soc.lower()
        if name not in DEVICES:
            raise ValueError(f"no chip {soc!r} is known{nearest(name, DEVICES)}")
        return name

    def runs(self) -> Execution:
        """In the emulator on x86; on a Snapdragon itself."""
        return "emulated" if platform.machine().lower() in ("x86_64", "amd64") else "native"

    def supports(self, program: Program) -> list[Unsupported]:
        """Open sizes, operators without a translation to ONNX, and dtypes that the HTP lacks, by module path."""
        found = [item for graph in program.entries.values() for item in _open_sizes(graph)]
        for graph in program.entries.values():
            found += onnx_unsupported(graph, SUPPORTED, "the HTP")
        return found

    def predict(self, program: Program) -> Footprint:
        """Contexts hold their weights each, in f16 at most; the compiler holds them several times."""
        read = [program.weights.restricted(graph.weight_names) for graph in program.entries.values()]
        sizes = [sum(item.numel * min(item.dtype.itemsize, HALF) for item in weights.values()) for weights in read]
        onnx = super().predict(program)
        return Footprint(
            disk=sum(sizes),
            lowering=max(onnx.lowering, COMPILER + int(COPIES_OF_WEIGHTS * max(sizes, default=0))),
            checking=0,
            loaded=sum(sizes),
        )

    def lower(self, program: Program, lowering: Lowering) -> dict[str, LoweredEntry]:
        """Write ``ENTRY.onnx`` and ``ENTRY_qnn.bin`` for every entry. The ONNX form with weights is temporary.

        Raises:
            MissingValuesError: the Program was captured structure-only.
            UserError: the graph has no ONNX form, the compiler refuses it, or operators would fall to the CPU and
                ``fallback`` does not allow that; the message names their modules.
        """
        with tempfile.TemporaryDirectory(dir=lowering.folder, prefix="onnx-") as temporary:
            files = write_onnx_folder(
                program,
                Path(temporary),
                opset=self.opset,
                optimize=self.optimize,
                rewrite=lambda model: (fusible_attention(model), biases_first(model)),
                allow_nonfinite=lowering.allow_nonfinite,
                progress=lowering.progress,
            )
            return {
                name: self._compiled(name, program.entries[name], lowering, path, files.facts[name])
                for name, path in files.paths.items()
            }

    def _compiled(self, name: str, graph: Graph, lowering: Lowering, path: Path, facts: OnnxFacts) -> LoweredEntry:
        out, device = lowering.folder / f"{name}.onnx", DEVICES[self.soc]
        lowering.progress("compile for the HTP", 0.0)
        found = compile_context(path, out, device, self.effort)
        # Integer weights stay integers only where a product's result is quantised too.
        alone = {node for node, kind in found.fallen if kind == "DequantizeLinear"}
        if real := dequantise_weights(path, alone) if alone else 0:
            found = compile_context(path, out, device, self.effort)
        lowering.progress("compile for the HTP", 1.0)
        covered = self._coverage(name, found, facts)
        details = {
            "bytes": sum(file.stat().st_size for file in lowering.folder.glob(f"{name}*") if file.is_file()),
            "nodes": facts.nodes,
            "opset": self.opset,
            "named_nodes": round(facts.named, 4),
            "soc": self.soc,
            "htp_arch": f"v{device.architecture}",
            "soc_model": device.model,
            "subgraphs": found.subgraphs,
            **({"real_weights": real} if real else {}),
        }
        return LoweredEntry(out.name, graph.inputs, graph.outputs, details, coverage=covered)

    def _coverage(self, name: str, found: Compiled, facts: OnnxFacts) -> Coverage:
        native = facts.nodes - len(found.fallen)
        elsewhere = tuple(
            Unsupported(module_path(node), kind, f"the HTP of {self.soc} has no kernel for it")
            for node, kind in found.fallen
        )
        if not found.subgraphs or native <= 0:
            raise UserError(f"nothing of {name} runs on the HTP of {self.soc}: {facts.nodes} operators fall to the CPU")
        if elsewhere and self.fallback == "refuse":
            shown = "\n  ".join(f"{item.path}: {item.operator}" for item in elsewhere[:SHOWN])
            more = f"\n  and {len(elsewhere) - SHOWN} more" if len(elsewhere) > SHOWN else ""
            raise UserError(
                f"the HTP of {self.soc} has no kernels for {len(elsewhere)} operators of {name}; "
                f"fallback: cpu lets the phone's processor run them:\n  {shown}{more}"
            )
        return Coverage(facts.nodes, native, elsewhere)

    @classmethod
    def load(cls, folder: Path, entry: Mapping[str, Any], options: Mapping[str, Any]) -> Runner:
        """A session of one entry's context, on the HTP or in its emulator, which takes seconds to minutes a call.

        Raises:
            UserError: ONNX Runtime refuses the file.
        """
        target = cls.of("qnn", options)
        session = context_session(folder / str(entry["engine"]), DEVICES[target.soc], target.effort)
        names = [str(output["name"]) for output in entry["outputs"]]
        known = {value.name for value in session.get_inputs()}

        def run(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            feeds = {name: tensor.numpy() for name, tensor in tensors.items() if name in known}
            results = session.run(None, feeds)
            return {name: torch.from_numpy(value) for name, value in zip(names, results, strict=True)}

        return run


def _open_sizes(graph: Graph) -> Iterator[Unsupported]:
    for spec in graph.inputs:
        if any(isinstance(size, str) for size in spec.shape):
            reason = "contexts of the HTP have fixed sizes; give one size in inputs"
            yield Unsupported("(interface)", f"{spec.name} {list(spec.shape)}", reason)
