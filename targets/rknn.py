"""Target ``rknn``: ``.rknn`` models for the NPUs of Rockchip's chips, and the toolkit's simulator of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from optpass.environments.environment import Environment
from optpass.environments.target import RebuildingTarget, coverage
from optpass.environments.worker import Worker
from optpass.interchange.onnx_file import module_path
from optpass.interchange.onnx_folder import OnnxFolder, write_onnx_folder
from optpass.ir.program import Program
from optpass.pipeline.target import Execution, Footprint, LoweredEntry, Lowering

FALLBACK = "the NPU has no kernel for it: the chip's CPU runs it"
COMPILER = 600 << 20
"""Memory of the toolkit's process before it has read a model."""
BUILD_COPIES = 6
OPSET = 19
"""The latest operator set that the toolkit reads."""


class Rknn(RebuildingTarget):
    """``.rknn`` files of RKNN-Toolkit2, one per entry, for one Rockchip platform.

    Compiled in the toolkit's own environment (``optpass targets install rknn``). Floating Programs compute in
    float16 on the NPU, whatever their own dtype; quantised ones (symmetric int8) in int8. What runs here is the
    toolkit's simulator: numerics are the NPU's, times are not. It rebuilds the model from the ONNX files that
    therefore stay beside the engine.
    """

    platform: Literal["rk3588", "rk3576", "rk3566", "rk3568", "rk3562", "rv1126b", "rv1106", "rv1103"] = Field(
        "rk3588", description="the chip; engines run on no other"
    )
    optimization_level: int = Field(3, ge=0, le=3, description="of the toolkit's own rewrites")

    name: ClassVar[str] = "rknn"
    script: ClassVar[Path] = Path(__file__).with_name("workers") / "rknn.py"
    environment: ClassVar[Environment] = Environment(
        name="rknn",
        requirements=("rknn-toolkit2==2.5.0", "setuptools<81"),
        gigabytes=5.6,
        licence="Rockchip's own licence: for use with Rockchip's chips",
        pythons=("3.11", "3.12", "3.10"),
    )
    floats: ClassVar[frozenset[torch.dtype]] = frozenset({torch.float32, torch.float16})
    dtypes: ClassVar[frozenset[torch.dtype]] = floats | {
        torch.int64,
        torch.int32,
        torch.int8,
        torch.uint8,
        torch.bool,
    }

    def runs(self) -> Execution:
        """The simulator computes as the NPU does, at the speed of this CPU."""
        return "emulated"

    def predict(self, program: Program) -> Footprint:
        """Files: the weights as ONNX, and in float16; the toolkit's process holds them several times over."""
        weights = program.used_weights().nbytes
        return Footprint(2 * weights, COMPILER + BUILD_COPIES * weights, 0, COMPILER + BUILD_COPIES * weights)

    def _lowered(self, program: Program, lowering: Lowering) -> dict[str, LoweredEntry]:
        files = write_onnx_folder(
            program,
            lowering.folder,
            opset=OPSET,
            allow_nonfinite=lowering.allow_nonfinite,
            progress=lowering.progress,
        )
        return {name: self._entry(name, program, lowering, files) for name in program.entries}

    def _entry(self, name: str, program: Program, lowering: Lowering, files: OnnxFolder) -> LoweredEntry:
        graph, source, path = program.entries[name], files.paths[name], lowering.folder / f"{name}.rknn"
        lowering.progress("compile for RKNN", 0.0)
        worker, found = self._build(source, name, path)
        lowering.progress("compile for RKNN", 1.0)
        left = [{**each, "path": _place(each["name"], source)} for each in found["left"]]
        details = {
            "bytes": found["bytes"],
            "nodes": found["operators"],
            "platform": self.platform,
            "int8_operators": found["integer"],
            "source": source.name,
            **({"rewrites_left_out": found["left_out"]} if found["left_out"] else {}),
            **({"compiler_errors": found["complaints"]} if found["complaints"] else {}),
        }
        self._keep(path, worker)
        entry = LoweredEntry(path.name, graph.inputs, graph.outputs, details, files.digests, files.slotted)
        return replace(entry, coverage=coverage(found["operators"], found["native"], left, FALLBACK))

    def _build(self, source: Path, entry: str, engine: Path) -> tuple[Worker, Mapping[str, Any]]:
        """The process that built ``engine``, and what it says of it."""
        worker = self.worker()
        found: Mapping[str, Any] = worker.ask(
            "build",
            onnx=str(source.absolute()),
            platform=self.platform,
            engine=str(engine.absolute()),
            optimization_level=self.optimization_level,
        )
        return worker, found


def _place(name: str, source: Path) -> str:
    """The module path of an operator that the toolkit names, cut short, after a node or a value of the file."""
    import onnx

    nodes = onnx.load(str(source), load_external_data=False).graph.node
    paths = [module_path(node.name) for node in nodes if node.name.startswith(name) or _made_from(name, node.output)]
    return _common(paths) if paths else module_path(name) if "/" in name else "(root)"


def _made_from(name: str, values: Sequence[str]) -> bool:
    """Whether ``name`` is a value's, with what the toolkit's rewrites put behind it."""
    return any(name == value or name.startswith((f"{value}_", f"{value}-", f"{value}#")) for value in values if value)


def _common(paths: Sequence[str]) -> str:
    """The deepest module that holds all of ``paths``."""
    parts = [path.split(".") for path in paths]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared) or "(root)"
