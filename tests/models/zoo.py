"""What happens to a model of the zoo: saved, captured, lowered, run, and compared with eager at every stage."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from case import Case
from torch import Tensor, nn

from optpass.analysis.cost import measure
from optpass.capture.sources import capture
from optpass.errors import OptpassError
from optpass.evaluate.difference import outputs_difference, program_runner, random_inputs
from optpass.ir.dialect import verify_shapes
from optpass.ir.program import Program
from optpass.pipeline.target import LoweredEntry, Lowering
from optpass.runtime.module import EngineModule
from optpass.targets.onnxruntime import OnnxRuntime
from optpass.testing import randomised

ENTRY = "full"
STAGES = ("capture", "program", "onnx", "ort")
"""In order; a stage that fails ends the row. ``onnx`` covers ONNX Runtime's loading, ``ort`` its numbers."""

FACTORIES: dict[str, Callable[[], nn.Module]] = {}
"""What the factory files that :func:`saved` writes import."""


@dataclass
class Facts:
    """What one case gave; ``failures`` has the error of the stage that ended it."""

    name: str
    nodes: int = 0
    parameters: int = 0
    onnx_nodes: int = 0
    program_error: float | None = None
    engine_error: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage and keep its error, which goes on as :class:`StageError`."""
        start = time.perf_counter()
        try:
            yield
        except (OptpassError, DisagreementError) as error:
            self.failures[name] = str(error)
            raise StageError from error
        finally:
            self.seconds[name] = time.perf_counter() - start


class StageError(Exception):
    """A stage failed; the later ones have nothing to work on."""


class DisagreementError(Exception):
    """Numbers differ by more than the case allows, or there are none to compare."""


def run(case: Case, folder: Path) -> Facts:
    """Everything about ``case`` at its small size; ``folder`` is empty and receives checkpoint and engine."""
    facts = Facts(case.name)
    model = small_model(case)
    source, options = saved(case, model, folder / "model")
    model = model.get_submodule(case.component)
    try:
        with facts.stage("capture"):
            program = capture(source, inputs=case.inputs, **options)
        graph = program.entries[ENTRY]
        facts.nodes, facts.parameters = len(graph.calls), measure(program).totals.parameters
        tensors = random_inputs(graph.inputs_at(), program.ranges, seed=1)
        expected = eager(program, model, tensors)
        with facts.stage("program"):
            verify_shapes(program)
            facts.program_error = error_of(case, expected, program_runner(program, ENTRY)(tensors))
        with facts.stage("onnx"):
            (folder / "engine").mkdir()
            entry = OnnxRuntime(threads=1).lower(program, Lowering(folder / "engine"))[ENTRY]
            facts.onnx_nodes = entry.details["nodes"]
        with facts.stage("ort"):
            facts.engine_error = error_of(case, expected, engine_of(program, folder / "engine", entry)(tensors))
    except StageError:
        pass
    return facts


def small_model(case: Case) -> nn.Module:
    """The eager model at its small size, nothing left at zero or one."""
    torch.manual_seed(0)
    return randomised(_built(case).eval())


def _built(case: Case) -> nn.Module:
    if case.factory is not None:
        return case.factory()
    if "_class_name" in case.config:
        import diffusers

        model: nn.Module = getattr(diffusers, case.config["_class_name"]).from_config(dict(case.config))
        return model
    import transformers

    config = transformers.CONFIG_MAPPING[case.config["model_type"]].from_dict(dict(case.config))
    built: nn.Module = getattr(transformers, case.config["architectures"][0])(config)
    return built


def saved(case: Case, model: Any, folder: Path) -> tuple[str, dict[str, Any]]:
    """The model as a checkpoint that its library writes: the source for ``capture`` and its options."""
    if case.factory is None:
        model.save_pretrained(folder)
        return str(folder), {"component": case.component} if case.component else {}
    from safetensors.torch import save_model

    folder.mkdir()
    FACTORIES[case.name] = case.factory
    save_model(model, str(folder / "model.safetensors"))
    (folder / "factory.py").write_text(f"from zoo import FACTORIES\n\nmodel = FACTORIES[{case.name!r}]\n", "utf-8")
    return f"{folder / 'factory.py'}:model", {"weights": folder / "model.safetensors"}


def eager(program: Program, model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the library's own model computes, by the names of the Program's outputs."""
    signature = program.entries[ENTRY].signature
    with torch.no_grad():
        result = model(**signature.arguments.unflatten(tensors))
    return signature.output.flatten(result)


def engine_of(
    program: Program, folder: Path, entry: LoweredEntry
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """The engine behind the captured module's own call."""
    signature = program.entries[ENTRY].signature
    record = {"engine": entry.main, "outputs": [spec.as_json() for spec in entry.outputs]}
    runner = OnnxRuntime.load(folder, record, {"threads": 1})
    module = EngineModule(signature, entry.inputs, entry.outputs, runner, dimensions=program.entries[ENTRY].dimensions)
    return lambda tensors: signature.output.flatten(module(**signature.arguments.unflatten(tensors)))


def error_of(case: Case, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """The worst output's max|a−b| / max|a|.

    Raises:
        DisagreementError: above the case's ``rtol``, or an output is zero or not finite, which proves nothing.
    """
    for name, value in expected.items():
        if not value.isfinite().all() or float(value.abs().max()) < 1e-3:
            raise DisagreementError(f"the eager model's {name} is no reference: max {float(value.abs().max()):.3g}")
    error = outputs_difference(expected, found).relative_error
    if not error <= case.rtol:
        raise DisagreementError(f"relative error {error:.3g}, above {case.rtol:g}")
    return error


def check(case: Case, facts: Facts) -> None:
    """Assert that every stage did what the case says: worked, or failed with exactly the stated error."""
    for stage in STAGES:
        limit, failure = case.limits.get(stage), facts.failures.get(stage)
        if limit is None:
            assert failure is None, f"{case.name}: {stage}: {failure}"
        else:
            assert failure is not None, f"{case.name}: {stage} works now: take its limit out"
            assert re.search(limit, failure), f"{case.name}: {stage} fails with another error: {failure}"
        if failure is not None:
            return


def config_file(config: Mapping[str, Any], folder: Path) -> Path:
    """``config`` as a folder that holds nothing else: a structure-only checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)), "utf-8")
    return folder


def full_parameters(case: Case) -> int:
    """Parameters of the published configuration, as its library builds it; nothing is exported."""
    from optpass.capture.export import build_fake

    assert case.full is not None
    module, _ = build_fake(lambda: _built(Case(case.name, case.full or {})))
    return sum(parameter.numel() for parameter in module.parameters())
