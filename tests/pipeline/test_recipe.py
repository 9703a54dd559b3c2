"""Recipes are checked whole before anything starts; every mistake has one clear message."""

from __future__ import annotations

import json

import pytest

from optpass.errors import UserError
from optpass.pipeline.apply import apply
from optpass.pipeline.plan import NOWHERE, plan
from optpass.pipeline.recipe import check_legality, find_recipe, load_recipe, make_recipe
from optpass.pipeline.registry import recipe_files
from optpass.pipeline.request import Request


def test_a_full_recipe_resolves_and_round_trips():
    document = {
        "name": "r",
        "description": "d",
        "inputs": {"sample": [2, 8, 4, 16, 16]},
        "passes": ["single-token-attention", {"cast": {"dtype": "bfloat16"}}],
        "gates": [{"after": "cast", "metric": "psnr", "min": 30}],
        "target": {"onnxruntime": {"threads": 2}},
    }
    recipe = make_recipe(document)
    assert [step.name for step in recipe.steps] == ["single-token-attention", "cast"]
    assert recipe.inputs == {"sample": (2, 8, 4, 16, 16)}
    assert recipe.target.threads == 2
    assert make_recipe(recipe.as_document()).as_document() == recipe.as_document()


def test_overrides_reach_passes_and_target():
    recipe = make_recipe(
        {"passes": [{"cast": {"dtype": "float16"}}]},
        overrides={"cast": {"dtype": "bfloat16"}, "onnxruntime": {"threads": 1}},
    )
    assert recipe.steps[0].record.dtype == "bfloat16"
    assert recipe.target.threads == 1
    assert make_recipe({"target": "onnxruntime"}, target="program").target_name == "program"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"passes": ["single-token-atention"]}, "unknown pass 'single-token-atention'; did you mean 'single-token-a"),
        ({"passes": [{"cast": {"dtyp": "float16"}}]}, "pass cast: unknown option 'dtyp'; did you mean 'dtype'"),
        ({"passes": [{"cast": {"dtype": "float17"}}]}, "pass cast: 'dtype'"),
        ({"passs": []}, "unknown key 'passs'; did you mean 'passes'"),
        ({"target": "onnxruntme"}, "unknown target 'onnxruntme'; did you mean 'onnxruntime'"),
        ({"target": {"onnxruntime": {"thread": 2}}}, "unknown option 'thread'; did you mean 'threads'"),
        ({"passes": [{"cast": {}, "export": {}}]}, "a pass is a name or"),
        ({"passes": "cast"}, "'passes'"),
        ({"inputs": {"sample": ["a"]}}, "inputs: sample: a size is a positive whole number, or a range"),
        ({"gates": [{"speed": {"max_ratio": 1.0}}]}, "gate kind 'speed' is not built"),
        ({"passes": ["export"]}, "unknown pass 'export'"),
        (
            {"passes": ["single-token-attention"], "gates": [{"after": "cast", "metric": "psnr", "min": 1}]},
            "'cast', not a pass of this recipe",
        ),
        (
            {"passes": ["single-token-attention"], "gates": [{"after": "single-token-attention", "metric": "psnr"}]},
            "'min' or 'max'",
        ),
        (
            {"passes": [{"cast": {"dtype": "float16"}}], "gates": [{"after": "cast", "metric": "psnrr", "min": 3}]},
            "unknown metric 'psnrr'; did you mean 'psnr'",
        ),
        (
            {"passes": [{"cast": {"dtype": "float16"}}], "gates": [{"after": "cast", "metric": "psnr", "mn": 3}]},
            "unknown key 'mn'",
        ),
    ],
)
def test_mistakes(document, message):
    with pytest.raises(UserError, match=message):
        make_recipe(document)


def test_set_for_a_pass_that_the_recipe_lacks():
    with pytest.raises(UserError, match=r"--set cast\.…: the recipe has no 'cast'"):
        make_recipe({"passes": ["single-token-attention"]}, overrides={"cast": {"dtype": "float16"}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("passes: [a\nb: {", "not valid YAML"),
        ("- a\n- b", "expected a mapping"),
        ("just words", "expected a mapping"),
        ("passes: !!python/object/apply:os.system ['echo hi > owned']", "not valid YAML"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(path)
    assert not (tmp_path / "owned").exists()


def test_binary_and_missing_files(tmp_path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match="cannot read recipe"):
        load_recipe(path)
    with pytest.raises(UserError, match="did you mean 'moving-digits'"):
        find_recipe("moving-digit")


def test_every_shipped_recipe_loads():
    assert {"moving-digits", "mobilevd-cross-attention", "half-precision", "export"} <= set(recipe_files())
    for path in recipe_files().values():
        assert load_recipe(path).description


def test_steps_are_replaced_where_they_stand():
    other = make_recipe({"passes": [{"cast": {"dtype": "float16"}}]}).steps
    alone = make_recipe({"passes": ["simplify"]})
    assert alone.with_steps("unet", other).steps == other
    both = make_recipe({"passes": ["simplify"], "components": {"unet": {}, "vae": {"passes": ["simplify"]}}})
    changed = both.with_steps("vae", other)
    assert changed.components["vae"].steps == other
    assert changed.steps == both.steps
    assert both.with_steps("unet", other).steps == other


ADAPTED = {"cache-features": {"cut": "up_blocks.1", "adaptor": "resnet", "width": 32}}


def test_what_needs_training_is_refused_unless_it_is_accepted():
    recipe = make_recipe({"passes": [ADAPTED]})
    with pytest.raises(UserError, match="what cache-features leaves is undefined: put a healing pass after it"):
        check_legality(recipe)
    component = make_recipe({"components": {"unet": {"passes": [ADAPTED]}}})
    with pytest.raises(UserError, match="cache-features"):
        check_legality(component)
    accepted = make_recipe({"passes": [ADAPTED], "unhealed": True})
    check_legality(accepted)
    assert accepted.as_document()["unhealed"] is True
    assert "unhealed" not in recipe.as_document()
    check_legality(make_recipe({"passes": [{"cache-features": {"cut": "up_blocks.1"}}]}))


def test_costs_alone_need_no_training(tmp_path):
    layers = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
    config = {"_class_name": "UNet2DModel", "sample_size": 8, "norm_num_groups": 4, "layers_per_block": 1, **layers}
    (tmp_path / "config.json").write_text(json.dumps({**config, "add_attention": False}))
    recipe = make_recipe({"passes": [{"steps": {"steps": 4}}]})
    found = apply(recipe, Request(str(tmp_path), tmp_path / "costs", structure_only=True))
    assert found.report["unhealed"] == ["steps"]
    with pytest.raises(UserError, match="undefined"):
        apply(recipe, Request(str(tmp_path), tmp_path / "engines"))
    assert any("undefined" in reason for reason in plan(recipe, Request(str(tmp_path), NOWHERE)).refusals)
    accepted = plan(recipe, Request(str(tmp_path), NOWHERE, unhealed=True), assume_weights=True)
    assert not accepted.refusals
    assert accepted.recipe.unhealed
