"""Recipes: YAML → a checked list of passes, gates and a target, before any work starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Step:
    """One pass of a recipe: its registered name and its resolved record."""

    name: str
    record: Pass


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. ``dtype`` is what the checkpoint is captured in, ``auto`` its own dtype."""

    name: str
    description: str
    inputs: Sizes
    steps: tuple[Step, ...]
    gates: tuple[Gate, ...]
    target_name: str
    target: Target
    dtype: str = AUTO

    def as_document(self) -> dict[str, Any]:
        """The recipe with every option resolved, as it goes into the lock file."""
        return {
            "name": self.name,
            "description": self.description,
            "inputs": {name: as_written(shape) for name, shape in self.inputs.items()},
            "dtype": self.dtype,
            "passes": [{step.name: step.record.as_options()} for step in self.steps],
            "gates": [gate.as_document() for gate in self.gates],
            "target": {self.target_name: self.target.as_options()},
        }


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
    return make_recipe(data, default_name=path.stem, overrides=overrides, target=target)


def make_recipe(
    data: Mapping[str, Any],
    *,
    default_name: str = "recipe",
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    target: str | None = None,
) -> Recipe:
    """A recipe from its document; see :func:`load_recipe`."""
    document = validated(_Document, data, f"recipe {data.get('name') or default_name!r}")
    pending = {name: dict(options) for name, options in (overrides or {}).items()}
    used: set[str] = set()

    def resolved(item: Named, noun: str) -> tuple[str, dict[str, Any]]:
        name, options = _named(item, noun)
        used.add(name)
        return name, {**options, **pending.get(name, {})}

    steps = tuple(_step(*resolved(item, "pass")) for item in document.passes)
    target_name, target_options = resolved(target or document.target, "target")
    target_record = target_class(target_name).of(target_name, target_options)
    if stray := set(pending) - used:
        name = sorted(stray)[0]
        raise UserError(f"--set {name}.…: the recipe has no {name!r}{nearest(name, used)}")
    gates = tuple(gate_of(gate, [step.name for step in steps]) for gate in document.gates)
    recipe = Recipe(
        document.name or default_name,
        document.description,
        {name: _sizes(name, shape) for name, shape in document.inputs.items()},
        steps,
        gates,
        target_name,
        target_record,
        document.dtype,
    )
    precision(recipe.dtype)
    check_legality(recipe)
    return recipe


def check_legality(recipe: Recipe) -> None:
    """Refuse lists of passes that cannot mean anything, before a weight is read.

    Raises:
        UserError: a ``retrain`` pass is followed by nothing that trains.
    """
    for index, step in enumerate(recipe.steps):
        if step.record.contract.kind != "retrain":
            continue
        if not any(later.record.heals for later in recipe.steps[index + 1 :]):
            raise UserError(
                f"pass {step.name!r} makes new parameters whose quality is undefined: "
                "put a healing pass after it in the recipe"
            )


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


def _step(name: str, options: Mapping[str, Any]) -> Step:
    return Step(name, pass_class(name).from_options(options, owner=f"pass {name}"))
