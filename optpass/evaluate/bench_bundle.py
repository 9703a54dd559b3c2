"""A bundle as a contestant of a benchmark: how its engines are called, and what a call makes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optpass.errors import UserError
from optpass.evaluate.bench_process import Contestant
from optpass.evaluate.bench_worker import Ready
from optpass.evaluate.walks import period, timed_calls
from optpass.ir.dimensions import Dimensions
from optpass.ir.interface import Interface
from optpass.ir.loop import Loop
from optpass.pipeline.registry import target_class
from optpass.runtime.bundle import PartRecord, TargetRecord, read_manifest, verify_files
from optpass.runtime.loading import load_part
from optpass.runtime.looped import LoopModule
from optpass.runtime.module import EngineModule

BATCH = "batch"


def bundle_contestants(
    folders: Sequence[Path],
    *,
    component: str | None = None,
    threads: int | None = None,
    batch: int | None = None,
    steps: int | None = None,
    sample: bool = False,
    seed: int = 0,
) -> list[Contestant]:
    """The bundles in ``folders``, labelled by as much of their paths as tells them apart; :func:`ready` loads them.

    Raises:
        UserError: one is named twice.
    """
    if len({folder.resolve() for folder in folders}) != len(folders):
        raise UserError("a bundle is named twice: copy it, to see what noise makes of equal engines")
    names = [folder.name for folder in folders]
    labels = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    options = {
        "component": component,
        "threads": threads,
        "batch": batch,
        "steps": steps,
        "sample": sample,
        "seed": seed,
    }
    return [
        Contestant(label, f"{__name__}:ready", {"folder": str(folder), **options})
        for folder, label in zip(folders, labels, strict=True)
    ]


def ready(
    folder: str,
    component: str | None,
    threads: int | None,
    batch: int | None,
    steps: int | None,
    sample: bool,
    seed: int,
) -> Ready:
    """A bundle's engine, or the denoiser's of a pipeline, called on seeded random inputs.

    A loop is walked through its schedule. With ``sample``, what is timed is a whole generation of ``steps`` steps
    (by default those that it was made for); else a call, in the mean of a period. ``batch`` is for engines that
    have this dimension open.

    Raises:
        UserError: there is no such bundle or component, its target does not run here or in an emulator, its batch is
            fixed at another size, or it is no loop and a sample is asked for.
    """
    home = Path(folder)
    manifest = read_manifest(home)
    verify_files(home, manifest)
    part = _with_threads(manifest.part(component), threads)
    module = load_part(home, part)
    if target_class(part.target.name).of(part.target.name, part.target.options).runs() == "emulated":
        raise UserError("its engines run in an emulator here, whose times mean nothing")
    loop = part.driven()
    if sample and loop is None:
        raise UserError("it is no denoiser that is sampled in steps: leave --sample away")
    count = steps or manifest.usual_steps
    _tell_steps(module, loop, count if sample else None)
    sizes = _sizes(module.dimensions, batch)
    call = Interface(module.inputs, module.outputs, module.dimensions)
    calls = timed_calls(call, part.input_ranges(), seed, loop=loop, sizes=sizes, steps=count if sample else None)
    items = next((spec.shape[0] for spec in call.inputs_at(sizes) if len(spec.shape) > 1), 1)

    def run() -> None:
        for inputs in calls:
            module.runner(inputs)

    return Ready(
        run,
        calls=1 if sample else len(calls),
        items=items,
        interface={spec.name: str(spec) for spec in (*module.inputs, *module.outputs)},
        facts=_facts(home, part, count if sample else None),
    )


def _with_threads(part: PartRecord, threads: int | None) -> PartRecord:
    """``part`` with its target's option of threads at ``threads``, where it has one."""
    if threads is None or "threads" not in part.target.options:
        return part
    options = {**part.target.options, "threads": threads}
    return part.model_copy(update={"target": TargetRecord(name=part.target.name, options=options)})


def _tell_steps(module: EngineModule, loop: Loop | None, steps: int | None) -> None:
    if not isinstance(module, LoopModule):
        return
    if steps is not None:
        module.steps = steps
    elif module.runner.uncounted:
        assert loop is not None
        module.steps = period(loop)


def _sizes(dimensions: Dimensions, batch: int | None) -> dict[str, int]:
    if batch is None:
        return {}
    found = dimensions.by_name.get(BATCH)
    if found is None:
        raise UserError(f"its batch is fixed: build it with --inputs {BATCH}=1..{batch}, or leave --batch away")
    if batch not in found:
        raise UserError(f"--batch {batch}: the engine was built for {found}")
    return {BATCH: batch}


def _facts(folder: Path, part: PartRecord, steps: int | None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "bundle": str(folder),
        "target": part.target.name,
        "options": dict(part.target.options),
        "entries": list(part.entries),
    }
    # 0 stands for as many as PyTorch takes, which the worker says.
    if threads := part.target.options.get("threads"):
        facts["threads"] = threads
    return facts | ({"steps": steps} if steps is not None else {})
