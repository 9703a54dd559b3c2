"""Module paths against the patterns of a pass's options: ``down_blocks.*``, ``*.norm*``."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether the module ``path``, or one that it lies in, matches a pattern."""
    parts = path.split(".")
    modules = [".".join(parts[: count + 1]) for count in range(len(parts))]
    return any(fnmatchcase(module, pattern) for pattern in patterns for module in modules)
