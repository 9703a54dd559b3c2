"""Every snippet of docs/authoring.md, run in order as a newcomer would, in an environment of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "authoring.md"
SNIPPET = re.compile(r"^```(?P<language>\w+)(?: file=(?P<file>\S+))?\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def followed(author):
    """The author's folder after the guide, and what each shell snippet printed."""
    printed, session = [], []
    for snippet in SNIPPET.finditer(GUIDE.read_text(encoding="utf-8")):
        text = snippet["text"]
        if snippet["file"]:
            (author.folder / snippet["file"]).write_text(text, encoding="utf-8")
        elif snippet["language"] == "sh":
            printed.append(author.sh(text))
        else:
            assert snippet["language"] == "python"
            session.append(text)
    author.run_python("\n".join(session))
    return author, printed


def test_every_fence_is_a_snippet_that_runs():
    text = GUIDE.read_text(encoding="utf-8")
    assert len(SNIPPET.findall(text)) == text.count("\n```") / 2 > 8


def test_the_commands_do_what_the_guide_says(followed):
    _, printed = followed
    assert "my_passes/my_passes/drop_times_one.py" in printed[0]
    assert "3 passed" in printed[1]
    assert "x · 1 → x" in printed[1]
    assert "drop-times-one" in "".join(printed[2:])


def test_a_strangers_pass_is_listed_and_runs_from_a_recipe(followed):
    author, _ = followed
    assert "drop-times-one" in author.sh("optpass passes")
    report = json.loads((author.folder / "out" / "report.json").read_text(encoding="utf-8"))
    [record] = report["passes"]
    assert record["name"] == "drop-times-one"
    assert record["modified"]
    assert record["sites"] == 2
    found = author.run_python(
        "from optpass.pipeline.registry import pass_names, pass_class\n"
        "from optpass.pipeline.recipe import load_recipe\n"
        "from pathlib import Path\n"
        "print('drop-times-one' in pass_names(), pass_class('drop-times-one').__module__,"
        " load_recipe(Path('recipe.yaml')).steps[0].name)\n"
    )
    assert found.split() == ["True", "my_passes.drop_times_one", "drop-times-one"]
