"""The Python session of docs/attention.md."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_session_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    [session] = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "attention.md").read_text("utf-8"), re.M | re.S)
    exec(compile(session, "docs/attention.md", "exec"), {})
