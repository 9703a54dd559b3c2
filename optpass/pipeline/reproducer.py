"""On failure: the Program just before, a one-pass recipe, and the error; enough to run it again alone."""

from __future__ import annotations

import shutil
import traceback
from pathlib import Path
from typing import Any

import yaml

from optpass.errors import UserError
from optpass.ir.text import program_text
from optpass.pipeline.gates import LATENCY
from optpass.pipeline.manager import Event


class Reproducer:
    """Callback that writes ``folder`` when a pass or a check after it fails.

    ``written`` is the folder once it exists, so that the message can name it.
    """

    def __init__(
        self, folder: Path, *, gates: list[dict[str, Any]] | None = None, target: dict[str, Any] | None = None
    ) -> None:
        """``gates`` and ``target`` are the recipe's; the latter is needed by gates that time its engines."""
        self.folder = folder
        self.gates = gates or []
        self.target = target
        self.written: Path | None = None

    def __call__(self, event: Event) -> None:
        if event.kind != "failed" or isinstance(event.error, (UserError, KeyboardInterrupt)):
            return  # a user's mistake is reproduced by the command itself
        from optpass.interchange.storage import save_program
        from optpass.runtime.components import copy_components

        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        save_program(event.before, self.folder / "program", allow_nonfinite=True)
        # Beside the program, where loading looks for them: quality gates need the rest of the pipeline.
        copy_components(event.original.origin, self.folder / "components")
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(self._recipe(event), sort_keys=False), "utf-8")
        (self.folder / "before.txt").write_text(program_text(event.before), "utf-8")
        lines = traceback.format_exception(event.error) if event.error else []
        (self.folder / "error.txt").write_text("".join(lines), "utf-8")
        self.written = self.folder

    def _recipe(self, event: Event) -> dict[str, Any]:
        name = event.step.name
        gates = [gate for gate in self.gates if gate.get("after", name) == name]
        return {
            "name": f"reproduce-{name}",
            "description": f"optpass apply recipe.yaml program -o out  # {type(event.error).__name__}",
            "passes": [{name: event.step.record.as_options()}],
            "gates": gates,
            "target": self.target if any(LATENCY in gate for gate in gates) else "program",
            **({"unhealed": True} if event.step.record.promise.kind == "retrain" else {}),
        }
