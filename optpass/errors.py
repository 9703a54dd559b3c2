"""Errors that carry an exit code and speak to the person who has to act on them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class OptpassError(Exception):
    """Base of every error that optpass raises on purpose.

    ``exit_code`` is what the command line returns: 1 our own fault, 2 the user's mistake, 3 a gate.
    ``reproducer`` is the folder that repeats the failure, where one was written.
    """

    exit_code = 1
    reproducer: Path | None = None


class UserError(OptpassError):
    """Something the user gave cannot be taken; the message says what to change."""

    exit_code = 2


class CaptureError(UserError):
    """torch.export refuses a model as it is; the message names the module where it failed."""


class WeightError(UserError):
    """A weight is missing, damaged, of the wrong shape, or holds NaN or Inf."""


class MissingValuesError(UserError):
    """Something needs weight values of a checkpoint that was captured structure-only."""


class DialectError(OptpassError):
    """A graph left the canonical dialect; names the node and, when a pass did it, the pass."""


class ContractError(OptpassError):
    """A pass did something else than what it declares about itself."""


class GateError(OptpassError):
    """A gate of the recipe did not hold."""

    exit_code = 3


MANY, NEAREST = 24, 3


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest known name, or the list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    more = f" and {len(known) - MANY} more" if len(known) > MANY else ""
    return f"; known: {', '.join(known[:MANY])}{more}" if known else ""


def nearest_paths(pattern: str, paths: Iterable[str]) -> str:
    """``"; the nearest are a.b, a.c"``: the module paths that look most like a pattern which matches none."""
    known = sorted(set(paths))
    near = difflib.get_close_matches(pattern, known, n=NEAREST, cutoff=0.3) or known[:NEAREST]
    return f"; the nearest are {', '.join(near)}" if near else "; the model has none"
