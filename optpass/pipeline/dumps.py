"""Callback that prints the IR around passes, as MLIR's ``--print-ir-before`` and ``-after`` do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from optpass.errors import UserError
from optpass.ir.text import program_text
from optpass.pipeline.manager import Event


@dataclass(frozen=True)
class PrintIr:
    """Prints before and/or after each pass; with ``only_changed``, of passes that modified the Program."""

    before: bool
    after: bool
    only_changed: bool
    write: Callable[[str], None]

    @staticmethod
    def of(when: str, *, only_changed: bool, write: Callable[[str], None]) -> PrintIr:
        """From the text of ``--print-ir``: ``before``, ``after`` or both, comma-separated.

        Raises:
            UserError: another word is in it.
        """
        words = {word.strip() for word in when.split(",") if word.strip()}
        if words - {"before", "after"}:
            raise UserError(f"--print-ir {when}: expected before, after, or before,after")
        return PrintIr("before" in words, "after" in words, only_changed, write)

    def __call__(self, event: Event) -> None:
        if event.kind != "finished" or event.record is None or event.after is None:
            return
        if self.only_changed and not event.record.modified:
            return
        if self.before:
            self.write(f"; IR before {event.step.name}\n{program_text(event.before)}")
        if self.after:
            self.write(f"; IR after {event.step.name}\n{program_text(event.after)}")
