"""``passes``, ``targets``, ``recipes``, ``inspect``, ``--help``: what a person looks at first."""

from __future__ import annotations

import subprocess
import sys

import pytest

from optpass import __version__


def test_help_and_version(optpass):
    outcome = optpass("--help")
    assert outcome.code == 0
    for command in ("apply", "plan", "inspect", "passes", "targets", "recipes", "run", "compare", "new-pass"):
        assert command in outcome.out
    assert optpass("--version").out.strip() == f"optpass {__version__}"


@pytest.mark.parametrize("command", ["passes", "targets", "recipes"])
def test_listings_as_table_and_json(optpass, command):
    plain = optpass(command)
    assert plain.code == 0, plain.err
    outcome = optpass(command, "--json")
    assert outcome.code == 0
    names = [item["name"] for item in outcome.json[command]]
    assert names
    for name in names:
        assert name in plain.out


def test_one_pass_in_full(optpass):
    outcome = optpass("passes", "cast")
    assert outcome.code == 0
    assert "dtype" in outcome.out
    assert optpass("passes", "cast", "--json").json["contract"] == "approximate"
    wrong = optpass("passes", "casst")
    assert wrong.code == 2
    assert "did you mean 'cast'" in wrong.err


def test_inspect_table_json_and_text(optpass, unet_folder):
    facts = optpass("inspect", unet_folder, "--json").json
    totals = facts["entries"]["full"]["totals"]
    assert totals == facts["totals"]
    from diffusers import UNet2DModel

    assert totals["parameters"] == UNet2DModel.from_pretrained(unet_folder).num_parameters()
    plain = optpass("inspect", unet_folder)
    assert plain.code == 0
    assert "down_blocks" in plain.out
    text = optpass("inspect", unet_folder, "--text").out
    assert text.startswith("full(sample: f32[1, 3, 16, 16]")


def test_help_does_not_import_torch():
    code = "import sys; sys.argv = ['optpass', '--help']\ntry:\n  from optpass.cli import main; main()\n"
    code += "except SystemExit: pass\nassert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
