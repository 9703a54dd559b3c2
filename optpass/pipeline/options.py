"""Typed options: the fields of passes and targets, which are recipe keys and ``--set`` names too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo

from optpass.errors import UserError, nearest

Model = TypeVar("Model", bound=BaseModel)
FOLDER = "folder"


def _beside_recipe(path: Path, info: ValidationInfo) -> Path:
    folder = (info.context or {}).get(FOLDER)
    beside = None if folder is None or path.is_absolute() else Path(folder, path)
    return beside if beside is not None and beside.exists() else path


RecipePath = Annotated[Path, AfterValidator(_beside_recipe)]
"""The type of an option that names a file: relative to the recipe's folder where it lies there, else as given."""


class Options(BaseModel):
    """A frozen record whose fields are its options; unknown ones are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=False)

    @classmethod
    def from_options(cls, options: Mapping[str, Any], *, owner: str, folder: Path | None = None) -> Self:
        """Build from recipe options; ``owner`` names the pass or target in messages, ``folder`` is the recipe's.

        Raises:
            UserError: an option is unknown (the nearest known one is named) or has a bad value.
        """
        for key in options:
            if key not in cls.model_fields:
                raise UserError(
                    f"{owner}: unknown option {key!r}{nearest(str(key), cls.model_fields) or '; it has none'}"
                )
        return validated(cls, options, owner, folder)

    def as_options(self) -> dict[str, Any]:
        """All options with their resolved values, as JSON."""
        return self.model_dump(mode="json")


def type_text(annotation: Any) -> str:
    """An option's type as a recipe's author reads it: ``merge | keep``, ``list of str``, ``path``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " | ".join(map(type_text, arguments))
    if origin in (tuple, list):
        return f"list of {type_text(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"{{{', '.join(annotation.model_fields)}}}"
    if annotation in (Path, None, type(None)):
        return "path" if annotation is Path else "none"
    return str(getattr(annotation, "__name__", annotation))


def validated(model: type[Model], data: Mapping[str, Any], owner: str, folder: Path | None = None) -> Model:
    """``model`` from ``data``, with pydantic's complaints as one readable :class:`UserError`."""
    try:
        return model.model_validate(dict(data), context={FOLDER: folder})
    except ValidationError as error:
        raise UserError(f"{owner}: {'; '.join(_complaint(model, e) for e in error.errors())}") from None


def _complaint(model: type[BaseModel], error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {place!r}{nearest(str(error['loc'][-1]), model.model_fields)}"
    if error["type"] == "missing":
        return f"{place!r} is required"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{place!r}: {message}" if place else message
