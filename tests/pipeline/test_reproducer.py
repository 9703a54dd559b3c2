"""A failure leaves the Program just before it and a one-pass recipe that fails the same way."""

from __future__ import annotations

import pytest
import torch
import yaml

from optpass.errors import OptpassError, UserError
from optpass.evaluate.difference import program_difference
from optpass.ir.program import Program
from optpass.ir.text import program_text
from optpass.pipeline.contract import approximate
from optpass.pipeline.manager import run_passes
from optpass.pipeline.passes import Context, Pass
from optpass.pipeline.recipe import Step
from optpass.pipeline.reproducer import Reproducer


class Fragile(Pass):
    """Fails with whatever it is told to."""

    contract = approximate()
    mistake: bool = False
    level: int = 3

    def run(self, program: Program, context: Context) -> Program:
        raise UserError("yours") if self.mistake else RuntimeError("ours")


@pytest.fixture
def program(capture_module, tiny_classifier):
    return capture_module(tiny_classifier, input=torch.empty(2, 6))[0]


def test_what_is_written_runs_again(program, tmp_path):
    from optpass.capture.sources import capture

    reproducer = Reproducer(tmp_path / "r", gates=[{"after": "fragile", "metric": "snr", "min": 1.0}])
    with pytest.raises(OptpassError, match="RuntimeError: ours"):
        run_passes(program, [Step("fragile", Fragile(level=7))], [reproducer])
    assert reproducer.written == tmp_path / "r"
    recipe = yaml.safe_load((tmp_path / "r" / "recipe.yaml").read_text("utf-8"))
    assert recipe["passes"] == [{"fragile": {"mistake": False, "level": 7}}]
    assert recipe["gates"][0]["metric"] == "snr"
    assert "RuntimeError: ours" in (tmp_path / "r" / "error.txt").read_text("utf-8")
    loaded = capture(tmp_path / "r" / "program")
    assert program_text(loaded, weights=False) == program_text(program, weights=False)
    assert program_difference(program, loaded).max_abs == 0
    with pytest.raises(OptpassError, match="RuntimeError: ours"):
        run_passes(loaded, [Step("fragile", Fragile(**recipe["passes"][0]["fragile"]))])


def test_a_users_mistake_leaves_nothing(program, tmp_path):
    reproducer = Reproducer(tmp_path / "r")
    with pytest.raises(UserError, match="yours"):
        run_passes(program, [Step("fragile", Fragile(mistake=True))], [reproducer])
    assert reproducer.written is None
    assert not (tmp_path / "r").exists()
