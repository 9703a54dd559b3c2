"""Target ``coreml``: Core ML packages (``.mlpackage``) for Apple's CPUs, GPUs and Neural Engine."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.export import ExportedProgram

from optpass.analysis.operators import aten
from optpass.errors import MissingValuesError, UserError
from optpass.evaluate.widened import widened
from optpass.interchange.exported import to_exported
from optpass.ir.graph import Graph, path_of, shape_of
from optpass.ir.program import Program
from optpass.ir.safetensors_io import checked
from optpass.ir.text import operator_name
from optpass.ir.weights import dtype_from_name, dtype_name
from optpass.pipeline.target import Execution, Footprint, LoweredEntry, Lowering, Runner, Target, Unsupported
from optpass.quiet import first_lines, quiet, quiet_export

if TYPE_CHECKING:
    from coremltools.models import MLModel

DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32})
"""Of inputs and outputs; Core ML itself has f32, f16 and i32."""
RANK = 4
"""Dimensions of a value that a group norm of Core ML's frontend takes: it adds one, of the five that there can be."""
FLOAT, COPIES_HELD = 4, 3
"""Bytes of a weight while it is converted, and how many of each there are then."""
UNITS = {"all": "ALL", "cpu": "CPU_ONLY", "cpu-and-gpu": "CPU_AND_GPU", "cpu-and-ne": "CPU_AND_NE"}


class CoreMl(Target):
    """Core ML packages, one per entry: compiled anywhere, run on macOS.

    The graph is converted in float32, and computes and stores what ``precision`` says. Quantised graphs
    are refused.
    """

    precision: Literal["f16", "f32"] = Field("f16", description="of weights and operators; the Neural Engine takes f16")
    compute_units: Literal["all", "cpu", "cpu-and-gpu", "cpu-and-ne"] = Field(
        "all", description="what may run it, when it is loaded"
    )
    minimum_deployment_target: Literal["iOS15", "iOS16", "iOS17", "iOS18"] = Field(
        "iOS17", description="oldest system that must run it (iOS17 is macOS 14); newer ones have more operators"
    )

    extra: ClassVar[str] = "coreml"
    packages: ClassVar[tuple[str, ...]] = ("coremltools",)

    def runs(self) -> Execution:
        """On macOS."""
        return "native" if sys.platform == "darwin" else "elsewhere"

    def supports(self, program: Program) -> list[Unsupported]:
        """Operators that Core ML's frontend lacks and PyTorch cannot take apart, and dtypes, by module path."""
        return [found for graph in program.entries.values() for found in _unsupported(graph)]

    def predict(self, program: Program) -> Footprint:
        """Files: the weights of every entry, in ``precision``; converting holds them in float32 several times."""
        counts = [
            sum(expression.numel for expression in program.weights.restricted(graph.weight_names).values())
            for graph in program.entries.values()
        ]
        width = 2 if self.precision == "f16" else FLOAT
        return Footprint(width * sum(counts), COPIES_HELD * FLOAT * max(counts), 0, width * sum(counts))

    def lower(self, program: Program, lowering: Lowering) -> dict[str, LoweredEntry]:
        """Write ``ENTRY.mlpackage`` for every entry.

        Raises:
            MissingValuesError: the Program was captured structure-only.
            UserError: Core ML cannot convert the graph.
        """
        if not program.has_values:
            raise MissingValuesError("Core ML packages need weight values; the checkpoint was captured structure-only")
        wide = widened(program)
        return {name: self._lowered(name, program, wide, lowering) for name in program.entries}

    def _lowered(self, name: str, program: Program, wide: Program, lowering: Lowering) -> LoweredEntry:
        graph, path = wide.entries[name].copy(), lowering.folder / f"{name}.mlpackage"
        _flatten_group_norms(graph)
        lowering.progress(f"convert {name}", 0.0)
        exported = _exported(graph, wide, lowering)
        model = self._converted(exported, graph)
        model.save(str(path))
        lowering.progress(f"convert {name}", 1.0)
        description = model.get_spec().description
        details = {
            "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
            "nodes": len(graph.calls),
            "precision": self.precision,
            "minimum_deployment_target": self.minimum_deployment_target,
            # The frontend has names of its own, in the order of the call.
            "features": {
                "inputs": [item.name for item in description.input],
                "outputs": [item.name for item in description.output],
            },
        }
        original = program.entries[name]
        return LoweredEntry(path.name, original.inputs, original.outputs, details)

    def _converted(self, exported: ExportedProgram, graph: Graph) -> MLModel:
        with _quiet():
            import coremltools

            kind = coremltools.precision.FLOAT16 if self.precision == "f16" else coremltools.precision.FLOAT32
            try:
                model: MLModel = coremltools.convert(
                    exported,
                    convert_to="mlprogram",
                    compute_precision=kind,
                    minimum_deployment_target=getattr(coremltools.target, self.minimum_deployment_target),
                    skip_model_load=True,
                )
            except Exception as error:
                # Its errors share no base class but Exception.
                raise UserError(f"Core ML cannot convert {_blamed(graph, error)}: {first_lines(error)}") from error
        return model

    @classmethod
    def load(cls, folder: Path, entry: Mapping[str, Any], options: Mapping[str, Any]) -> Runner:
        """One entry's package, on macOS.

        Raises:
            UserError: this is another system, or Core ML refuses the package.
        """
        target, path = cls.of("coreml", options), folder / str(entry["engine"])
        if target.runs() != "native":
            raise UserError(f"{path.name} runs on macOS; this is {sys.platform}")
        with _quiet():
            import coremltools

            try:
                units = getattr(coremltools.ComputeUnit, UNITS[target.compute_units])
                model = coremltools.models.MLModel(str(path), compute_units=units)
            except Exception as error:
                raise UserError(f"Core ML cannot load {path.name}: {first_lines(error)}") from error
        features = entry["details"]["features"]
        inputs = list(zip([spec["name"] for spec in entry["inputs"]], features["inputs"], strict=True))
        outputs = list(zip(entry["outputs"], features["outputs"], strict=True))

        def run(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found = model.predict({feature: _given(tensors[name]) for name, feature in inputs})
            return {
                spec["name"]: torch.from_numpy(found[feature])
                .reshape(found[feature].shape)
                .to(dtype_from_name(spec["dtype"]))
                for spec, feature in outputs
            }

        return run


def _given(tensor: Tensor) -> Any:
    """A tensor as Core ML takes it: f32 or i32, one dimension at least."""
    wide = tensor.float() if tensor.is_floating_point() else tensor.to(torch.int32)
    return (wide if wide.ndim else wide.reshape(1)).numpy()


def _unsupported(graph: Graph) -> Iterator[Unsupported]:
    for spec in (*graph.inputs, *graph.outputs):
        if spec.dtype not in DTYPES:
            yield Unsupported("(interface)", spec.name, f"Core ML takes no {dtype_name(spec.dtype)}")
    with _quiet():
        from coremltools.converters.mil.frontend.torch import is_torch_fx_node_supported
    for node in graph.calls:
        target: Any = node.target
        if str(target).startswith("quantized_decomposed."):
            reason = "Core ML's frontend does not take this form of quantisation; leave quantize out"
            yield Unsupported(path_of(node), operator_name(node), reason)
        elif isinstance(target, torch._ops.OpOverload) and not is_torch_fx_node_supported(node):
            from torch._decomp import decomposition_table

            if target not in decomposition_table and not target._can_decompose():
                yield Unsupported(path_of(node), operator_name(node), "Core ML's frontend has no such operator")


def _flatten_group_norms(graph: Graph) -> None:
    """group_norm(x) → reshape(group_norm(reshape(x))) where x has more than four dimensions.

    The frontend makes a sixth of the groups otherwise, and Core ML has values of five at most.
    """
    for node in graph.calls:
        if node.target is not aten.group_norm.default or len(shape_of(node)) <= RANK:
            continue
        (values, *others), shape = node.args, graph.sizes(node)
        with graph.before(node):
            flat = graph.call(aten.reshape.default, values, [*shape[:2], -1], like=node)
            normed = graph.call(aten.group_norm.default, flat, *others, like=node, **node.kwargs)
            back = graph.call(aten.reshape.default, normed, shape, like=node)
        node.replace_all_uses_with(back)
        graph.fx.erase_node(node)


def _exported(graph: Graph, program: Program, lowering: Lowering) -> ExportedProgram:
    """``graph`` in the operators that the frontend takes, over the weights' values."""
    from torch.export import default_decompositions

    with _quiet():
        from coremltools.converters.mil.frontend.torch import is_torch_fx_node_supported

        exported: ExportedProgram
        known = default_decompositions()
        lacking = {node.target for node in graph.calls if not is_torch_fx_node_supported(node)}
        exported = to_exported(graph).run_decompositions({key: known[key] for key in lacking if key in known})
    for name in list(exported.state_dict):
        value = checked(name, program.weights[name], allow_nonfinite=lowering.allow_nonfinite)
        exported.state_dict[name] = nn.Parameter(value, requires_grad=False) if value.is_floating_point() else value
    return exported


def _blamed(graph: Graph, error: Exception) -> str:
    """Where the node is that an error names; the graph as a whole where it names none."""
    words = set(str(error).replace("'", " ").replace('"', " ").replace(",", " ").split())
    places = dict.fromkeys(path_of(node) for node in graph.calls if node.name in words)
    return ", ".join(places) or "this graph"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without coremltools' warnings about versions and its own progress bars."""
    with ExitStack() as stack:
        stack.enter_context(quiet("coremltools", logging.CRITICAL))
        stack.enter_context(quiet_export())
        bars = sys.modules.get("tqdm")
        if bars is not None:
            stack.enter_context(_silent(bars))
        yield


@contextmanager
def _silent(bars: Any) -> Iterator[None]:
    """tqdm's bars are disabled when they are made."""
    made = bars.tqdm.__init__
    bars.tqdm.__init__ = lambda bar, *args, **options: made(bar, *args, **{**options, "disable": True})
    try:
        yield
    finally:
        bars.tqdm.__init__ = made
