"""``optpass apply`` end to end on a small model, and everything a user can get wrong."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import yaml

import optpass as library

RECIPE = {"name": "small", "passes": [{"cast": {"dtype": "float16"}}], "target": "onnxruntime"}


@pytest.fixture
def recipe(tmp_path):
    def write(**changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**RECIPE, **changes}))
        return path

    return write


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir())


def test_bundle_from_a_model_folder(optpass, unet_folder, recipe, tmp_path):
    out = tmp_path / "bundle"
    outcome = optpass("apply", recipe(passes=[]), unet_folder, "-o", out, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["bundle"] == str(out)
    assert {"manifest.json", "recipe.lock.yaml", "report.html", "report.json"} <= set(leftovers(out))
    lock = yaml.safe_load((out / "recipe.lock.yaml").read_text())
    assert len(lock["checkpoint"]["sha256"]) == 64
    assert lock["tools"]["torch"] == torch.__version__
    from diffusers import UNet2DModel

    eager = UNet2DModel.from_pretrained(unet_folder).eval()
    engine = library.load(out)
    sample = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = eager(sample, torch.tensor(500.0)).sample
    found = engine(sample, torch.tensor(500.0))
    assert type(found).__name__ == "UNet2DOutput"
    assert float((found.sample - expected).abs().max() / expected.abs().max()) < 1e-5
    assert engine(sample, 500, return_dict=False)[0].shape == expected.shape


def test_a_lock_file_is_applied_again(optpass, unet_folder, recipe, tmp_path):
    steps = [{"prune-blocks": {"count": 1, "importance": "macs"}}]
    locks = []
    first, second = tmp_path / "first", tmp_path / "second"
    for source, out in ((recipe(passes=steps), first), (first / "recipe.lock.yaml", second)):
        outcome = optpass("apply", source, unet_folder, "-o", out, "--structure-only")
        assert outcome.code == 0, outcome.err
        locks.append((out / "recipe.lock.yaml").read_text())
    assert locks[0] == locks[1]
    [step] = yaml.safe_load(locks[1])["passes"]
    assert (len(step["prune-blocks"]["remove"]), step["prune-blocks"]["count"]) == (1, None)


def test_json_has_the_documented_keys(optpass, unet_folder, recipe, tmp_path):
    outcome = optpass("apply", recipe(), unet_folder, "-o", tmp_path / "b", "--json", "--no-baseline")
    assert outcome.code == 0, outcome.err
    [item] = outcome.json["passes"]
    assert {"name", "modified", "sites", "declined", "seconds", "before", "after"} <= set(item)
    totals = {"parameters", "macs", "macs_attention", "weight_bytes", "peak_activation_bytes"}
    for side in (item["before"], item["after"]):
        assert set(side["totals"]) == totals
        assert set(side["entries"]["full"]["totals"]) == totals
    assert item["modified"] is True
    assert item["after"]["totals"]["weight_bytes"] * 2 == item["before"]["totals"]["weight_bytes"]
    assert item["difference"]["relative_error"] > 0


def test_structure_only_emits_the_report_without_engines(optpass, unet_folder, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(unet_folder / "config.json", bare)
    refused = optpass("apply", "half-precision", bare, "-o", tmp_path / "x")
    assert refused.code == 2
    assert "--structure-only" in refused.err
    assert not (tmp_path / "x").exists()
    outcome = optpass("apply", "half-precision", bare, "-o", tmp_path / "r", "--structure-only", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["structure_only"] is True
    assert outcome.json["engines"] == []
    assert (tmp_path / "r" / "report.html").is_file()
    loaded = optpass("run", tmp_path / "r")
    assert loaded.code == 2


def test_print_ir_goes_to_stderr_and_only_when_changed(optpass, unet_folder, recipe, tmp_path):
    twice = recipe(passes=[{"cast": {"dtype": "float16"}}, "single-token-attention"])
    flags = ("--structure-only", "--json", "--print-ir", "before,after", "--only-changed")
    outcome = optpass("apply", twice, unet_folder, "-o", tmp_path / "b", *flags)
    assert outcome.code == 0, outcome.err
    json.loads(outcome.out)
    assert "; IR before cast" in outcome.err
    assert "; IR after cast" in outcome.err
    assert "single-token-attention\n" not in outcome.err


def test_existing_output_is_refused_and_replaced_with_force(optpass, unet_folder, recipe, tmp_path):
    out = tmp_path / "bundle"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    path = recipe(passes=[])
    outcome = optpass("apply", path, unet_folder, "-o", out)
    assert outcome.code == 2
    assert "--force" in outcome.err
    assert optpass("apply", path, unet_folder, "-o", out, "--force").code == 2
    assert (out / "precious.txt").read_text() == "mine"
    shutil.rmtree(out)
    assert optpass("apply", path, unet_folder, "-o", out, "--no-baseline").code == 0
    before = json.loads((out / "report.json").read_text())["created"]
    assert optpass("apply", path, unet_folder, "-o", out, "--no-baseline", "--force").code == 0
    assert json.loads((out / "report.json").read_text())["created"] >= before
    assert leftovers(tmp_path) == ["bundle", "recipe.yaml", "unet"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("apply", "no-such-recipe", "{unet}", "-o", "{out}"), "no recipe 'no-such-recipe'"),
        (("apply", "export", "/nowhere/model", "-o", "{out}"), "/nowhere/model"),
        (("apply", "export", "{unet}", "-o", "{out}", "--target", "tensorrtt"), "unknown target 'tensorrtt'"),
        (("apply", "export", "{unet}", "-o", "{out}", "--set", "cast.dtype=float16"), "the recipe has no 'cast'"),
        (("apply", "half-precision", "{unet}", "-o", "{out}", "--set", "cast.dtpe=x"), "did you mean 'dtype'"),
        (("apply", "export", "{unet}", "-o", "{out}", "--set", "nonsense"), "expected NAME=VALUE"),
        (
            ("apply", "export", "{unet}", "-o", "{out}", "--inputs", "sample=1xtwo"),
            "--inputs sample=1xtwo: a size is a positive whole number, or a range as 1..4",
        ),
        (("apply", "export", "{unet}", "-o", "{out}", "--inputs", "smaple=1x3x16x16"), "did you mean 'sample'"),
        (("apply", "export", "{unet}", "-o", "{out}", "--verify", "maybe"), "expected auto, always, never"),
        (("apply", "export", "{unet}", "-o", "{out}", "--dtype", "flaot16"), "did you mean 'float16'"),
        (("apply", "export", "{unet}", "-o", "{out}", "--print-ir", "during"), "expected before, after"),
    ],
)
def test_users_mistakes_exit_2_with_one_message_and_leave_nothing(optpass, unet_folder, tmp_path, arguments, message):
    out = tmp_path / "out"
    outcome = optpass(*(str(a).format(unet=unet_folder, out=out) for a in arguments))
    assert outcome.code == 2
    assert message in " ".join(outcome.err.split())
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    assert leftovers(tmp_path) == ["unet"]


def test_an_error_with_json_is_one_object_too(optpass, tmp_path):
    outcome = optpass("apply", "export", tmp_path / "none", "-o", tmp_path / "out", "--json")
    assert outcome.code == 2
    assert outcome.json["error"]["exit_code"] == 2
    assert str(tmp_path / "none") in outcome.json["error"]["message"]


def test_nan_in_weights_is_named_and_nothing_is_written(optpass, unet_folder, recipe, tmp_path):
    from safetensors.torch import load_file, save_file

    file = unet_folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["mid_block.resnets.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, file)
    outcome = optpass("apply", recipe(passes=[]), unet_folder, "-o", tmp_path / "b", "--verify", "never")
    assert outcome.code == 2
    assert "mid_block.resnets.0.conv1.weight" in outcome.err
    assert "NaN" in outcome.err
    assert leftovers(tmp_path) == ["recipe.yaml", "unet"]


def test_overflow_in_a_half_precision_cast_is_named(optpass, unet_folder, recipe, tmp_path):
    from safetensors.torch import load_file, save_file

    file = unet_folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.weight"][0, 0, 0, 0] = 1e6
    save_file(weights, file)
    outcome = optpass("apply", recipe(), unet_folder, "-o", tmp_path / "b", "--verify", "never")
    assert outcome.code == 2
    assert "conv_in.weight" in outcome.err


def test_gate_stops_the_run_with_exit_3_and_keeps_the_reproducer(optpass, unet_folder, recipe, tmp_path):
    gates = [{"after": "cast", "metric": "relative_error", "max": 1e-9}]
    out = tmp_path / "bundle"
    outcome = optpass("apply", recipe(gates=gates), unet_folder, "-o", out)
    assert outcome.code == 3
    assert "relative_error" in outcome.err
    assert not out.exists()
    reproducer = tmp_path / "bundle.reproducer"
    assert str(reproducer) in outcome.err.replace("\n", "")
    again = optpass("apply", reproducer / "recipe.yaml", reproducer / "program", "-o", tmp_path / "again")
    assert again.code == 3
    assert "relative_error" in again.err


def test_a_gate_that_holds_is_in_the_report(optpass, unet_folder, recipe, tmp_path):
    gates = [{"after": "cast", "metric": "snr", "min": 20}]
    outcome = optpass("apply", recipe(gates=gates), unet_folder, "-o", tmp_path / "b", "--json", "--no-baseline")
    assert outcome.code == 0, outcome.err
    [gate] = outcome.json["gates"]
    assert gate["held"] is True
    assert 20 < gate["value"] < 120


def test_run_answers_for_given_inputs(optpass, unet_folder, recipe, tmp_path):
    assert optpass("apply", recipe(passes=[]), unet_folder, "-o", tmp_path / "b", "--no-baseline").code == 0
    np.save(tmp_path / "sample.npy", np.ones((1, 3, 16, 16), dtype=np.float32))
    np.save(tmp_path / "t.npy", np.float32(10))
    pairs = ("--input", f"sample={tmp_path}/sample.npy", "--input", f"timestep={tmp_path}/t.npy")
    outcome = optpass("run", tmp_path / "b", *pairs, "-o", tmp_path / "answers", "--json")
    assert outcome.code == 0, outcome.err
    answer = np.load(tmp_path / "answers" / "outputs.npz")["sample"]
    direct = library.load(tmp_path / "b")(torch.ones(1, 3, 16, 16), 10).sample
    assert np.allclose(answer, direct.numpy(), atol=1e-6)
    np.save(tmp_path / "wrong.npy", np.ones((1, 3, 8, 8), dtype=np.float32))
    wrong = optpass("run", tmp_path / "b", "--input", f"sample={tmp_path}/wrong.npy", *pairs[2:])
    assert wrong.code == 2
    assert "built for" in wrong.err
    pickled = optpass("run", tmp_path / "b", "--input", f"sample={__file__}", *pairs[2:])
    assert pickled.code == 2


def test_compare_a_bundle_with_its_checkpoint(optpass, unet_folder, recipe, tmp_path):
    assert optpass("apply", recipe(passes=[]), unet_folder, "-o", tmp_path / "b", "--no-baseline").code == 0
    outcome = optpass("compare", unet_folder, tmp_path / "b", "--runs", 3, "--json")
    assert outcome.code == 0, outcome.err
    facts = outcome.json
    assert facts["difference"]["relative_error"] < 1e-5
    assert facts["latency"]["before"]["runs"] == 3
    assert facts["samples"] is None


def test_program_target_is_a_checkpoint_again(optpass, unet_folder, recipe, tmp_path):
    path = recipe(target="program")
    assert optpass("apply", path, unet_folder, "-o", tmp_path / "p", "--json").code == 0
    outcome = optpass("apply", recipe(passes=[]), tmp_path / "p", "-o", tmp_path / "b", "--json", "--no-baseline")
    assert outcome.code == 0, outcome.err
    direct = optpass("inspect", tmp_path / "p", "--json").json
    assert direct["totals"] == outcome.json["before"]["totals"]
