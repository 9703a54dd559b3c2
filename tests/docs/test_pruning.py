"""The Python session of docs/pruning.md, run from its first line to its last."""

from __future__ import annotations

import re
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "pruning.md"
SNIPPET = re.compile(r"^```python\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_session_runs(author):
    text = GUIDE.read_text(encoding="utf-8")
    snippets = [found["text"] for found in SNIPPET.finditer(text)]
    assert len(snippets) == text.count("\n```") / 2 == 5
    # In a process of its own: it adds rules to the tables.
    author.run_python("\n".join(snippets))
