"""Target ``program``: the optimised Program itself, or an ordinary diffusers/transformers folder of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from optpass.errors import MissingValuesError, UserError
from optpass.interchange.storage import INDEX, WEIGHTS, load_program, save_program
from optpass.ir.program import Origin, Program
from optpass.ir.weights import Shape
from optpass.pipeline.target import COPIES, Footprint, LoweredEntry, Lowering, Runner, Target

WEIGHT_FILES = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}
SHOWN = 5
NODE_IN_MEMORY = 10 << 10
NODE_ON_DISK, WEIGHT_ON_DISK = 1000, 1730


class ProgramTarget(Target):
    """The Program: graphs as exported programs, weights as safetensors under their original names.

    ``layout: diffusers`` and ``layout: transformers`` make the bundle an ordinary folder besides, which
    ``from_pretrained`` loads, where every module still has the weights that its configuration says; only
    their dtypes may differ. Of a pipeline the whole folder is written, the other components as they were.
    """

    layout: Literal["program", "diffusers", "transformers"] = Field(
        "program", description="program.json alone, or a folder that from_pretrained loads as well"
    )

    structure_only: ClassVar[bool] = True

    def predict(self, program: Program) -> Footprint:
        """Files: the weights, and for each node and each weight its record in the serialised graph.

        Run by PyTorch, what it wrote stays in the mapped file.

        Raises:
            UserError: the layout does not fit the Program, as in :meth:`lower`.
        """
        if self.layout != "program":
            self._check_layout(program)
        weights = program.used_weights()
        nodes = sum(len(graph.calls) for graph in program.entries.values())
        disk = weights.nbytes + NODE_ON_DISK * nodes + WEIGHT_ON_DISK * len(weights)
        largest = max((expression.nbytes for expression in weights.values()), default=0)
        memory = NODE_IN_MEMORY * nodes + COPIES * largest
        return Footprint(disk, memory, 0, 0)

    def lower(self, program: Program, lowering: Lowering) -> dict[str, LoweredEntry]:
        """Save the Program, its weights streamed.

        Raises:
            UserError: the layout does not fit the Program's origin or what the passes did to its weights.
        """
        folder, weights = lowering.folder / "program", WEIGHTS
        details: dict[str, Any] = {}
        digests: dict[str, str] = {}
        if self.layout != "program":
            folder = lowering.folder
            weights, details, digests = self._write_library_folder(program, folder)
        written = save_program(
            program,
            folder,
            weights_file=weights,
            allow_nonfinite=lowering.allow_nonfinite,
            progress=lambda fraction: lowering.progress("write the weights", fraction),
        )
        within = folder.relative_to(lowering.folder)
        digests |= {(within / name).as_posix(): digest for name, digest in written.items()}
        return {
            name: LoweredEntry(
                (within / INDEX).as_posix(),
                graph.inputs,
                graph.outputs,
                {
                    "entry": name,
                    "layout": self.layout,
                    "nodes": len(graph.calls),
                    "bytes": program.used_weights().nbytes,
                    **details,
                },
                digests,
            )
            for name, graph in program.entries.items()
        }

    def _write_library_folder(self, program: Program, folder: Path) -> tuple[str, dict[str, Any], dict[str, str]]:
        """Configuration and other components; the path of the weights, facts for the manifest, digests of copies."""
        self._check_layout(program)
        if not program.has_values:
            raise MissingValuesError(f"layout: {self.layout} needs weight values; this Program is structure-only")
        origin = program.origin
        part, digests = folder, {}
        if origin.pipeline:
            from optpass.runtime.components import copy_components

            digests = copy_components(origin, folder)
            part = folder / origin.component
        part.mkdir(parents=True, exist_ok=True)
        (part / "config.json").write_text(json.dumps(_config(program), indent=2), encoding="utf-8")
        digests.pop((part / "config.json").relative_to(folder).as_posix(), None)
        weights = (part / WEIGHT_FILES[self.layout]).relative_to(folder).as_posix()
        return weights, {"components": "."} if origin.pipeline else {}, digests

    def _check_layout(self, program: Program) -> None:
        origin = program.origin
        if origin.library != self.layout:
            raise UserError(
                f"layout: {self.layout} needs a checkpoint of that library, and this one is {origin.kind!r}; "
                "use layout: program"
            )
        _check_unchanged(program)

    @classmethod
    def load(cls, folder: Path, entry: Mapping[str, Any], options: Mapping[str, Any]) -> Runner:
        """The entry executed by PyTorch on the CPU.

        Raises:
            UserError: the saved Program is damaged, or has no such entry.
        """
        from optpass.evaluate.difference import program_runner

        program, name = load_program((folder / str(entry["engine"])).parent), str(entry["details"].get("entry", ""))
        if name not in program.entries:
            raise UserError(f"the record of {entry['engine']} is damaged: it has no entry {name!r}")
        return program_runner(program, name)


def _config(program: Program) -> dict[str, Any]:
    config = dict(program.origin.config)
    dtypes = {e.dtype for e in program.used_weights().values() if e.dtype.is_floating_point}
    for key in ("dtype", "torch_dtype"):
        if key in config and len(dtypes) == 1:
            config[key] = str(next(iter(dtypes))).removeprefix("torch.")
    return config


def _check_unchanged(program: Program) -> None:
    """
    Raises:
        UserError: weights are missing, new, or of another shape than the configuration says.
    """
    groups, found = _expected(program.origin), program.used_weights()
    known = {name: shape for names, shape in groups.items() for name in names}
    problems = [
        f"{name} is {list(found[name].shape)} where the config says {list(known[name])}"
        for name in found
        if name in known and tuple(found[name].shape) != known[name]
    ]
    problems += [
        f"{name} is new" for name in found if name not in known and not getattr(found[name], "computed", False)
    ]
    problems += [f"{names[0]} is gone" for names in groups if not any(name in found for name in names)]
    if problems:
        shown = "; ".join(problems[:SHOWN]) + (f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else "")
        raise UserError(
            f"the passes changed what {program.origin.class_name} is made of, so from_pretrained cannot load it: "
            f"{shown}. Use layout: program"
        )


def _expected(origin: Origin) -> dict[tuple[str, ...], Shape]:
    """Shapes of the weights that the library's class saves, under all names that a tied tensor has."""
    from optpass.capture.export import build_fake

    module, _ = build_fake(_builder(origin))
    saved = module.state_dict(keep_vars=True)
    groups: dict[int, list[str]] = {}
    shapes: dict[int, Shape] = {}
    for named in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
        for name, tensor in named:
            # Integer buffers (position ids, batch counters) are the constructor's own.
            if name in saved and tensor.is_floating_point():
                groups.setdefault(id(tensor), []).append(name)
                shapes[id(tensor)] = tuple(tensor.shape)
    return {tuple(names): shapes[key] for key, names in groups.items()}


def _builder(origin: Origin) -> Callable[[], nn.Module]:
    """What builds the module; a saved Program's class name reaches nothing but the library's model classes.

    Raises:
        UserError: the class or the model type is none of the library's.
    """
    name, config = origin.class_name, dict(origin.config)
    if origin.library == "diffusers":
        import diffusers

        if name in diffusers._import_structure["models"]:
            return lambda: getattr(diffusers, name).from_config(config)
    else:
        import transformers

        found, kind = getattr(transformers, name, None), config.get("model_type")
        is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
        if found is not None and is_model and kind in transformers.CONFIG_MAPPING:
            return lambda: found(transformers.CONFIG_MAPPING[kind].from_dict(config))
    raise UserError(f"{origin.library} has no model class {name!r}; use layout: program")
