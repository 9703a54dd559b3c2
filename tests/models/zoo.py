"""What happens to a model of the zoo: saved, captured, lowered, run, and compared with eager at every stage."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from case import Case
from torch import Tensor, nn

from optpass.analysis.cost import measure
from optpass.capture.inputs import BUILDERS, Inputs, given_inputs
from optpass.capture.inputs_timm import timm_inputs
from optpass.capture.sources import capture
from optpass.capture.spans import Span
from optpass.capture.timm_import import timm_importable
from optpass.errors import OptpassError
from optpass.evaluate.difference import outputs_difference, program_runner
from optpass.evaluate.trials import random_inputs
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


def run_dynamic(case: Case, folder: Path) -> Facts:
    """``case`` with all of ``case.dynamic`` open: one engine, run at both ends of the ranges.

    A dimension with a limit (``dynamic:NAME``, or ``dynamic:OTHER,NAME`` where it fails beside another)
    is opened besides, to see it fail.
    """
    facts = Facts(case.name)
    model = small_model(case)
    source, options = saved(case, model, folder / "model")
    model = model.get_submodule(case.component)
    declared = inputs_of(case, model)
    opens: dict[str, Collection[str]] = {stage: stage.partition(":")[2].split(",") for stage in _limits(case)}
    if case.dynamic:
        opens["dynamic"] = case.dynamic
    for stage, names in opens.items():
        with suppress(StageError), facts.stage(stage):
            program = capture(source, inputs=opened(case, declared, names), **options)
            facts.engine_error = _dynamic_error(case, model, program, folder / stage)
    return facts


def _dynamic_error(case: Case, model: nn.Module, program: Program, folder: Path) -> float:
    graph = program.entries[ENTRY]
    folder.mkdir()
    engine = engine_of(program, folder, OnnxRuntime(threads=1).lower(program, Lowering(folder))[ENTRY])
    errors = []
    for sizes in graph.dimensions.alternatives():
        tensors = random_inputs(graph.inputs_at(sizes), program.ranges, seed=2)
        expected = eager(program, model, tensors)
        error_of(case, expected, program_runner(program, ENTRY)(tensors))
        errors.append(error_of(case, expected, engine(tensors)))
    if not errors:
        raise DisagreementError(f"no sizes to try: {graph.dimensions}")
    return max(errors)


def limited(case: Case) -> list[str]:
    """The dimensions of which the case says why they cannot stay open."""
    return [stage.partition(":")[2].split(",")[-1] for stage in _limits(case)]


def _limits(case: Case) -> list[str]:
    return [stage for stage in case.limits if stage.startswith("dynamic:")]


def inputs_of(case: Case, model: Any) -> Inputs:
    """The declared inputs of the small model: names of its dimensions, default sizes."""
    from optpass.capture import inputs_diffusers
    from optpass.capture.inputs_transformers import transformers_inputs

    assert inputs_diffusers
    if case.factory is not None:
        return given_inputs(model, case.inputs)
    if found := timm_inputs(model):
        return found
    if builder := BUILDERS.get(type(model).__name__):
        return builder(model.config if "_class_name" in case.config else model.config.to_dict())
    return transformers_inputs(model, model.config.to_dict())


def opened(case: Case, declared: Inputs, names: Collection[str]) -> dict[str, list[Any]]:
    """The sizes of ``case`` with the dimensions ``names`` open, from half to twice their size (a batch from 1)."""
    found: dict[str, list[Any]] = {}
    known = dict(declared.sizes)
    for name, sizes in case.inputs.items():
        dims = declared.tensors[name].dims if name in declared.tensors else (name,)
        known |= {dim: size for dim, size in zip(dims, sizes, strict=True) if isinstance(dim, str)}
        found[name] = [_span(case, dim, size) if dim in names else size for dim, size in zip(dims, sizes, strict=True)]
    said = {dim for name in found if name in declared.tensors for dim in declared.tensors[name].dims}
    return found | {name: [_span(case, name, known[name])] for name in names if name not in said}


def _span(case: Case, name: str, size: int) -> Span:
    return Span(*case.spans.get(name, (max(1, size // 2), size * 2)))


def small_model(case: Case) -> nn.Module:
    """The eager model at its small size, nothing left at zero or one."""
    torch.manual_seed(0)
    return randomised(_built(case).eval())


def _built(case: Case) -> nn.Module:
    if case.factory is not None:
        return case.factory()
    config = json.loads(json.dumps(dict(case.config)))
    if "_class_name" in config:
        import diffusers

        model: nn.Module = getattr(diffusers, config["_class_name"]).from_config(config)
        return model
    if "architecture" in config:
        return timm_model(config)
    import transformers

    built: nn.Module = getattr(transformers, config["architectures"][0])(
        transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)
    )
    return built


def timm_model(config: Mapping[str, Any]) -> nn.Module:
    """What timm builds from the arguments that ``config`` records."""
    with timm_importable():
        timm = pytest.importorskip("timm", reason="timm is an optional extra")
    arguments = {**config.get("model_args", {}), "pretrained_cfg": config.get("pretrained_cfg")}
    model: nn.Module = timm.create_model(config["architecture"], num_classes=config["num_classes"], **arguments)
    return model


def saved(case: Case, model: Any, folder: Path) -> tuple[str, dict[str, Any]]:
    """The model as a checkpoint that its library writes: the source for ``capture`` and its options."""
    if "architecture" in case.config:
        from timm.models import save_for_hf

        save_for_hf(model, folder, safe_serialization=True)
        return str(folder), {}
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


def check_dynamic(case: Case, facts: Facts) -> None:
    """Assert that the dimensions which should stay open do, and that those with a limit fail as stated."""
    assert "dynamic" not in facts.failures, f"{case.name}: {facts.failures['dynamic']}"
    for stage in _limits(case):
        limit, failure = case.limits[stage], facts.failures.get(stage)
        assert failure is not None, f"{case.name}: {stage} stays open now: take its limit out"
        assert re.search(limit, failure), f"{case.name}: {stage} fails with another error: {failure}"


def config_file(config: Mapping[str, Any], folder: Path) -> Path:
    """``config`` as a folder that holds nothing else: a structure-only checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)), "utf-8")
    return folder


def full_parameters(case: Case) -> int:
    """Floating values that a checkpoint of the published configuration holds; nothing is exported."""
    from optpass.capture.export import build_fake

    assert case.full is not None
    module, _ = build_fake(lambda: _built(Case(case.name, case.full or {})))
    tensors = {id(value): value for value in module.state_dict(keep_vars=True).values()}
    return sum(value.numel() for value in tensors.values() if value.is_floating_point())
