"""``optpass targets``: what engines can be made here, and environments for those that need one of their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from optpass import console
from optpass.cli_options import Debug, Json
from optpass.errors import UserError

if TYPE_CHECKING:
    from optpass.pipeline.target import Target

app = typer.Typer(name="targets", help="List the targets, or install what one needs.", invoke_without_command=True)


@app.callback()
def targets(context: typer.Context, as_json: Json = False, debug: Debug = False) -> None:
    """List the installed targets and whether what they need is here, or why not."""
    if context.invoked_subcommand:
        return None
    from optpass.pipeline.registry import target_class, target_names

    found = {name: target_class(name) for name in target_names()}
    if as_json:
        return console.print_json({"targets": [_facts(name, target) for name, target in found.items()]})
    rows = [[name, target.lacks(name) or "ready", target.summary()] for name, target in found.items()]
    return console.out.print(console.table("", ("target", "here", "what it makes"), rows, left=3))


def _facts(name: str, target: type[Target]) -> dict[str, Any]:
    environment = target.environment
    return {
        "name": name,
        "summary": target.summary(),
        "lacks": target.lacks(name),
        "missing": target.missing_packages(),
        "extra": target.extra,
        "options": list(target.model_fields),
        "environment": environment
        and {
            "name": environment.name,
            "lacks": environment.lacks(),
            "record": environment.record(),
            "folder": str(environment.folder),
            "variable": environment.variable,
            "requirements": [*environment.first, *environment.requirements],
            "gigabytes": environment.gigabytes,
            "licence": environment.licence,
        },
    }


@app.command()
def install(
    name: Annotated[str, typer.Argument(help="A target that needs an environment of its own.")],
    path: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads the annotation at run time
        typer.Option("--path", help="Where its packages go; by default under the user's data folder."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an installed one, once the new one is whole.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Install the environment of target NAME: a virtual environment, filled by pip."""
    from optpass.environments.install import install as install_environment
    from optpass.pipeline.registry import target_class

    target = target_class(name)
    if target.environment is None:
        how = f": it needs pip install 'optpass[{target.extra}]'" if target.extra else ": it needs nothing more"
        raise UserError(f"target {name!r} has no environment of its own{how}")
    console.err.print(
        f"{name}: {target.environment.gigabytes:g} GB; licence: {target.environment.licence}", markup=False
    )
    with console.progress_display() as progress:
        record = install_environment(target.environment, path=path, force=force, progress=progress)
    if as_json:
        return console.print_json(dict(record))
    return console.out.print(f"{name}: {len(record['installed'])} packages in {record['folder']}", markup=False)
