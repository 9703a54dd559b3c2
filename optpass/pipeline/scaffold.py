"""``optpass new-pass``: a working pass, its test and its registration, for the author to change."""

from __future__ import annotations

import keyword
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from optpass.errors import UserError
from optpass.pipeline.registry import PASSES, pass_names

KEBAB = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
PROJECT = "pyproject.toml"
TABLE = f'[project.entry-points."{PASSES}"]'


def new_pass(name: str, *, destination: Path, package: str | None = None) -> list[Path]:
    """Write the pass ``name``; the paths of what was written or changed.

    Without ``package``, ``destination`` is an optpass checkout: ``passes/NAME.py``,
    ``tests/passes/test_NAME.py`` and a line in ``pyproject.toml``. With it, the pass goes into that
    package: the project in ``destination`` if it is the package's, else the folder ``destination/package``,
    which is made where it is not there.

    Raises:
        UserError: the name is no kebab-case name or is taken, a file is there already, or
            ``destination`` is no checkout. Nothing is written then.
    """
    _check_names(name, package)
    place = _checkout(destination) if package is None else _own_package(destination, package)
    facts = _facts(name, place)
    written = {
        place.code / f"{facts['file']}.py": _rendered("pass.py.jinja", facts),
        place.tests / f"test_{facts['file']}.py": _rendered("test.py.jinja", facts),
    }
    if package is not None and not (place.code / "__init__.py").exists():
        written[place.code / "__init__.py"] = f'"""Passes of {package}."""\n'
    for path in written:
        if path.exists():
            raise UserError(f"{path} is there already; choose another name or remove it")
    project = place.root / PROJECT
    written[project] = (
        _registered(project, name, facts) if project.exists() else _rendered("pyproject.toml.jinja", facts)
    )
    for path, text in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(written)


@dataclass(frozen=True)
class Place:
    """Where a pass goes: the project's folder, those of code and tests, and the module's parent package."""

    root: Path
    code: Path
    tests: Path
    package: str


def _check_names(name: str, package: str | None) -> None:
    if not KEBAB.fullmatch(name) or keyword.iskeyword(name):
        raise UserError(f"a pass is named in lower case with hyphens, as 'prune-blocks', not {name!r}")
    if name in pass_names():
        raise UserError(f"a pass named {name!r} is installed already; choose another name")
    if package is None:
        return
    if not re.fullmatch(r"[a-z_][a-z0-9_]*", package) or keyword.iskeyword(package):
        raise UserError(f"a package is named as Python imports it, as 'my_passes', not {package!r}")
    if package == "optpass":
        raise UserError("'optpass' is this project; leave --package away inside a checkout, or name one of your own")


def _checkout(folder: Path) -> Place:
    if _project_name(folder) != "optpass" or not (folder / "passes").is_dir():
        raise UserError(f"{folder} is no optpass checkout; go to one, or name a package of your own with --package")
    return Place(folder, folder / "passes", folder / "tests" / "passes", "optpass.passes")


def _own_package(folder: Path, package: str) -> Place:
    is_project = _project_name(folder) == package.replace("_", "-")
    root = folder if is_project else folder / package
    if root.exists() and not is_project and any(root.iterdir()) and not (root / PROJECT).exists():
        raise UserError(f"{root} has files and no {PROJECT}; choose another place for the package")
    code = root / "src" / package if (root / "src" / package).is_dir() else root / package
    return Place(root, code, root / "tests", package)


def _project_name(folder: Path) -> str:
    path = folder / PROJECT
    if not path.is_file():
        return ""
    return re.sub(
        r"[-_.]+", "-", str(_parsed(path, path.read_text(encoding="utf-8")).get("project", {}).get("name", ""))
    )


def _facts(name: str, place: Place) -> dict[str, str]:
    file = name.replace("-", "_")
    return {
        "name": name,
        "file": file,
        "class_name": "".join(part.capitalize() for part in name.split("-")),
        "module": f"{place.package}.{file}",
        "package": place.package,
        "distribution": place.package.replace("_", "-"),
    }


def _rendered(template: str, facts: Mapping[str, str]) -> str:
    from jinja2 import Environment, StrictUndefined

    source = files("optpass.templates").joinpath(template).read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(source).render(facts)


def _registered(project: Path, name: str, facts: Mapping[str, str]) -> str:
    """The text of ``project`` with one entry point more, everything else as it was."""
    text = project.read_text(encoding="utf-8")
    value = f"{facts['module']}:{facts['class_name']}"
    if name in _points(project, text):
        raise UserError(f"{project} registers a pass {name!r} already; choose another name")
    line = f'{name} = "{value}"'
    if re.search(rf"^{re.escape(TABLE)}$", text, re.MULTILINE):
        changed = text.replace(f"{TABLE}\n", f"{TABLE}\n{line}\n", 1)
    else:
        changed = f"{text.rstrip()}\n\n{TABLE}\n{line}\n"
    try:
        held = _points(project, changed).get(name) == value
    except UserError:
        held = False
    if not held:
        raise UserError(f"cannot edit {project}; put {line} under {TABLE} by hand first")
    return changed


def _points(project: Path, text: str) -> Mapping[str, str]:
    points: Mapping[str, str] = _parsed(project, text).get("project", {}).get("entry-points", {}).get(PASSES, {})
    return points


def _parsed(path: Path, text: str) -> dict[str, dict[str, dict[str, dict[str, str]]]]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
