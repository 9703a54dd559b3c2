"""Recipes: YAML → a checked list of passes, gates and a target, before any work starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from optpass.capture.precision import AUTO, precision
from optpass.capture.spans import Size, Sizes, as_written, size_from
from optpass.errors import UserError, nearest
from optpass.pipeline.gates import Gate, gate_of
from optpass.pipeline.options import validated
from optpass.pipeline.passes import Pass
from optpass.pipeline.registry import pass_class, recipe_files, target_class
from optpass.pipeline.target import Target

Named = str | dict[str, dict[str, Any] | None]
ALL, OTHERS, KEEP = "all", "*", "keep"
RECORDED = ("checkpoint", "tools", "files")
"""What a lock file records beside the recipe."""


class _Section(BaseModel):
    """What a recipe says about one component of a pipeline."""

    model_config = ConfigDict(extra="forbid")

    inputs: dict[str, list[int | str] | int | str] = Field(default_factory=dict)
    passes: list[Named] = Field(default_factory=list)
    target: Named | None = None


class _Document(BaseModel):
    """The shape of a recipe file."""

    model_config = ConfigDict(extra="forbid")

    name: str = ""
    description: str = ""
    inputs: dict[str, list[int | str] | int | str] = Field(default_factory=dict)
    dtype: str = AUTO
    passes: list[Named] = Field(default_factory=list)
    gates: list[dict[str, Any]] = Field(default_factory=list)
    target: Named = "onnxruntime"
    components: Literal["all"] | list[str] | dict[str, Literal["keep"] | dict[str, Any] | None] | None = None
    call: dict[str, Any] = Field(default_factory=dict)
    unhealed: bool = False


@dataclass(frozen=True)
class Step:
    """One pass of a recipe: its registered name and its resolved record."""

    name: str
    record: Pass


@dataclass(frozen=True)
class Section:
    """What is done to one component of a pipeline; ``target`` ``None`` is the recipe's own."""

    inputs: Sizes = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    target_name: str = ""
    target: Target | None = None

    def as_document(self) -> dict[str, Any]:
        document: dict[str, Any] = {
            "inputs": {name: as_written(shape) for name, shape in self.inputs.items()},
            "passes": [{step.name: step.record.as_options()} for step in self.steps],
        }
        return document | ({"target": {self.target_name: self.target.as_options()}} if self.target else {})


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. ``dtype`` is what the checkpoint is captured in, ``auto`` its own dtype.

    ``components`` says what becomes of a pipeline's components: a :class:`Section` for one that is lowered,
    ``None`` for one that is carried as it is, under ``"*"`` for all that are not named; the whole mapping is
    ``None`` for a recipe that is about the denoiser alone. ``inputs`` and ``steps`` are the denoiser's, and
    ``call`` are arguments of the pipeline's call that give all components their sizes. ``unhealed`` accepts that
    the quality of the result is undefined: nothing trains what ``retrain`` passes left.
    """

    name: str
    description: str
    inputs: Sizes
    steps: tuple[Step, ...]
    gates: tuple[Gate, ...]
    target_name: str
    target: Target
    dtype: str = AUTO
    components: Mapping[str, Section | None] | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    unhealed: bool = False

    def of_component(self, component: str, *, denoises: bool) -> Recipe | None:
        """This recipe as it stands for one component of a pipeline alone; ``None`` when that is carried as it is.

        Raises:
            UserError: the denoiser has passes of its own beside the recipe's.
        """
        sections = self.components or {}
        section = sections.get(component, sections.get(OTHERS))
        own = tuple(gate for gate in self.gates if gate.component == component or (denoises and not gate.component))
        if section is None and (component in sections or not denoises):
            return None
        section = section or Section()
        if denoises and section.steps and self.steps:
            raise UserError(f"the recipe has 'passes' and passes of {component}: both are the denoiser's; keep one")
        return replace(
            self,
            inputs={**(self.inputs if denoises else {}), **section.inputs},
            steps=section.steps or (self.steps if denoises else ()),
            gates=own,
            target_name=section.target_name or self.target_name,
            target=section.target or self.target,
            components=None,
        )

    def with_steps(self, component: str, steps: tuple[Step, ...]) -> Recipe:
        """This recipe with other ``steps`` for ``component``, which has steps."""
        sections = self.components or {}
        section = sections.get(component, sections.get(OTHERS))
        if section is None or not section.steps:
            return replace(self, steps=steps)
        return replace(self, components={**sections, component: replace(section, steps=steps)})

    def as_document(self) -> dict[str, Any]:
        """The recipe with every option resolved, as it goes into the lock file."""
        document: dict[str, Any] = {
            "name": self.name,
            "description": self.description,
            "inputs": {name: as_written(shape) for name, shape in self.inputs.items()},
            "dtype": self.dtype,
            "passes": [{step.name: step.record.as_options()} for step in self.steps],
            "gates": [gate.as_document() for gate in self.gates],
            "target": {self.target_name: self.target.as_options()},
        }
        if self.components is not None:
            sections = {name: section.as_document() if section else KEEP for name, section in self.components.items()}
            document |= {"components": sections}
        document |= {"unhealed": True} if self.unhealed else {}
        return document | ({"call": dict(self.call)} if self.call else {})


def find_recipe(name: str) -> Path:
    """The file of a recipe given as a path or by the name of an installed one.

    Raises:
        UserError: there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = recipe_files()
    if name in known:
        return known[name]
    raise UserError(f"no recipe {name!r}: neither a file nor an installed recipe{nearest(name, known)}")


def load_recipe(
    path: Path, *, overrides: Mapping[str, Mapping[str, Any]] | None = None, target: str | None = None
) -> Recipe:
    """Read and check a recipe file; ``overrides`` are options by pass (or target) name, ``target`` replaces the target.

    A lock file is a recipe too: what it records beside one is left out.

    Raises:
        UserError: the file is not YAML, not a recipe, or names something unknown.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read recipe {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"recipe {path} is not a recipe: expected a mapping with 'passes', got {type(data).__name__}")
    if {"checkpoint", "tools"} <= data.keys():
        data = {key: value for key, value in data.items() if key not in RECORDED}
    return make_recipe(data, default_name=path.stem, overrides=overrides, target=target, folder=path.parent)


def make_recipe(
    data: Mapping[str, Any],
    *,
    default_name: str = "recipe",
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    target: str | None = None,
    folder: Path | None = None,
) -> Recipe:
    """A recipe from its document; see :func:`load_recipe`. Files that it names may lie in ``folder``."""
    document = validated(_Document, data, f"recipe {data.get('name') or default_name!r}")
    pending = {name: dict(options) for name, options in (overrides or {}).items()}
    used: set[str] = set()

    def resolved(item: Named, noun: str) -> tuple[str, dict[str, Any]]:
        name, options = _named(item, noun)
        used.add(name)
        return name, {**options, **pending.get(name, {})}

    def section_of(name: str, given: Any) -> Section | None:
        if given == KEEP:
            return None
        part = validated(_Section, given or {}, f"components: {name}")
        chosen = target or part.target
        lowering = resolved(chosen, "target") if chosen and part.target else ("", {})
        return Section(
            {key: _sizes(key, shape) for key, shape in part.inputs.items()},
            tuple(_step(*resolved(item, "pass"), folder) for item in part.passes),
            lowering[0],
            target_class(lowering[0]).of(*lowering) if lowering[0] else None,
        )

    steps = tuple(_step(*resolved(item, "pass"), folder) for item in document.passes)
    sections = _sections(document.components, section_of)
    target_name, target_options = resolved(target or document.target, "target")
    target_record = target_class(target_name).of(target_name, target_options)
    if stray := set(pending) - used:
        name = sorted(stray)[0]
        raise UserError(f"--set {name}.…: the recipe has no {name!r}{nearest(name, used)}")
    recipe = Recipe(
        document.name or default_name,
        document.description,
        {name: _sizes(name, shape) for name, shape in document.inputs.items()},
        steps,
        tuple(gate_of(gate, _pass_names(steps, sections or {})) for gate in document.gates),
        target_name,
        target_record,
        document.dtype,
        sections,
        document.call,
        document.unhealed,
    )
    precision(recipe.dtype)
    return recipe


def _sections(document: Any, section_of: Callable[[str, Any], Section | None]) -> dict[str, Section | None] | None:
    """``components:`` in any of its forms → sections by component name; ``None`` when there is none."""
    if document is None:
        return None
    if document == ALL:
        return {OTHERS: section_of(OTHERS, None)}
    if isinstance(document, list):
        return {name: section_of(name, None) for name in document}
    return {name: section_of(name, given) for name, given in document.items()}


def _pass_names(steps: tuple[Step, ...], sections: Mapping[str, Section | None]) -> Callable[[str], list[str]]:
    """For a component's name, those of its passes; for the empty name, those of the recipe's own."""

    def names(component: str) -> list[str]:
        section = sections.get(component, sections.get(OTHERS)) if component else None
        return [step.name for step in (section.steps if section else () if component else steps)]

    return names


def check_legality(recipe: Recipe) -> None:
    """Refuse lists of passes that cannot mean anything, before a weight is read.

    Raises:
        UserError: a ``retrain`` pass is followed by nothing that trains, and the recipe does not accept that;
            or a gate cannot be checked for the target.
    """
    for gate in recipe.gates:
        section = (recipe.components or {}).get(gate.component) if gate.component else None
        lowering = section if section and section.target else recipe
        assert lowering.target is not None
        refuse_gates([gate], lowering.target_name, lowering.target)
    sections = (recipe, *(recipe.components or {}).values())
    undefined = [name for section in sections if section is not None for name in unhealed(section.steps)]
    if undefined and not recipe.unhealed:
        raise UserError(
            f"the quality of what {', '.join(dict.fromkeys(undefined))} leaves is undefined: put a healing pass after "
            "it in the recipe; or take the result as it is (--unhealed, or 'unhealed: true' in the recipe), "
            "or its costs alone (--structure-only)"
        )


def refuse_gates(gates: Sequence[Gate], target_name: str, target: Target) -> None:
    """
    Raises:
        UserError: one of ``gates`` cannot be checked for what is lowered to ``target``.
    """
    for gate in gates:
        # A target that is not installed is refused as such, and may not be able to say how it runs.
        if not target.missing_packages() and (reason := gate.refuses(target_name, target)):
            raise UserError(reason)


def unhealed(steps: Sequence[Step]) -> list[str]:
    """The ``retrain`` passes among ``steps`` that no later one heals, by name."""
    healed = max((index for index, step in enumerate(steps) if step.record.heals), default=-1)
    return [step.name for step in steps[healed + 1 :] if step.record.promise.kind == "retrain"]


def _named(item: Named, noun: str) -> tuple[str, dict[str, Any]]:
    if isinstance(item, str):
        return item, {}
    if len(item) != 1:
        raise UserError(f"a {noun} is a name or {{name: options}}, got the keys {', '.join(map(repr, item))}")
    (name, options), *_ = item.items()
    return name, dict(options or {})


def _sizes(name: str, shape: list[int | str] | int | str) -> tuple[Size, ...]:
    """The sizes of one input; a dimension that inputs share, by its name, may stand without brackets."""
    return tuple(size_from(size, f"inputs: {name}") for size in (shape if isinstance(shape, list) else [shape]))


def _step(name: str, options: Mapping[str, Any], folder: Path | None) -> Step:
    return Step(name, pass_class(name).from_options(options, owner=f"pass {name}", folder=folder))
