"""What long work tells of itself."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float], None]
"""Called with a stage's name and the fraction of it that is done."""
DETAIL = " · "
"""Between a stage's name and what is told of it while it runs."""
