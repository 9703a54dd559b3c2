"""``optpass plan``: table, JSON, exit codes."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def checkpoint(tmp_path):
    """A factory with weights beside it: captured in no time."""
    import torch
    from safetensors.torch import save_file

    (tmp_path / "small.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)\n\n"
        "    def forward(self, x):\n"
        "        y = self.first(x)\n"
        "        return self.last(torch.cdist(y, y) @ y)\n\n\n"
        "def build():\n    return Net()\n"
    )
    generator = torch.Generator().manual_seed(0)
    shapes = {"first.weight": (8, 6), "first.bias": (8,), "last.weight": (3, 8), "last.bias": (3,)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(weights, tmp_path / "weights.safetensors")
    return f"{tmp_path / 'small.py'}:build", "--inputs", "x=5x6", "--weights", tmp_path / "weights.safetensors"


def test_json_has_the_documented_keys(optpass, checkpoint):
    outcome = optpass("plan", "half-precision", *checkpoint, "--json")
    assert outcome.code == 0, outcome.err
    facts = outcome.json
    assert facts["goes_through"] is True
    assert facts["refusals"] == []
    assert {"memory", "disk", "read", "executes", "warnings", "recipe", "components"} <= set(facts)
    [part] = facts["components"]
    [cast] = part["passes"]
    assert cast["status"] == "run"
    assert cast["after"]["totals"]["weight_bytes"] * 2 == part["before"]["totals"]["weight_bytes"]
    assert part["before"]["entries"]["full"]["uncounted"] == {"cdist": {"count": 1, "paths": ["(root)"]}}
    assert {stage["name"] for stage in part["stages"]} >= {"capture", "verify cast", "lower", "latency"}


def test_table_names_passes_stages_and_what_is_not_counted(optpass, checkpoint):
    outcome = optpass("plan", "half-precision", *checkpoint)
    assert outcome.code == 0, outcome.err
    for words in ("captured", "cast (4 sites)", "executed before and after", "lower the original", "would go through"):
        assert words in outcome.out
    assert "not counted: cdist" in outcome.out
    assert "not counted: cdist" in optpass("inspect", *checkpoint).out


def test_a_refusal_exits_2_and_shows_the_reasons(optpass, checkpoint, tmp_path):
    bare = [*checkpoint[:3]]
    outcome = optpass("plan", "half-precision", *bare)
    assert outcome.code == 2
    assert "would be refused" in outcome.out
    assert "has no weights" in " ".join(outcome.out.split())
    refused = optpass("plan", "half-precision", *bare, "--json")
    assert refused.code == 2
    assert json.loads(refused.out)["goes_through"] is False
    assert optpass("plan", "half-precision", *bare, "--assume-weights").code == 0
    assert optpass("plan", "half-precision", *checkpoint, "-o", tmp_path).code == 2
    illegal = optpass("plan", "half-precision", *checkpoint, "--set", "cast.dtpe=x")
    assert illegal.code == 2
    assert "did you mean 'dtype'" in illegal.err
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("__")) == [
        "small.py",
        "weights.safetensors",
    ]
