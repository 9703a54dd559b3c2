"""What a recipe says about a pipeline's components, and what comes of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import optpass as library
from optpass.errors import GateError, UserError
from optpass.evaluate.quality import psnr
from optpass.pipeline.apply import Applied, apply
from optpass.pipeline.recipe import make_recipe
from optpass.pipeline.request import Request
from optpass.runtime.module import EngineModule

Folder = Callable[[str], Path]
CAST = {"cast": {"dtype": "float16"}}


def applied(document: Mapping[str, Any], folder: Path, out: Path, **options: Any) -> Applied:
    recipe = make_recipe({"target": "program", **document})
    return apply(recipe, Request(str(folder), out, baseline=False, **{"verify": "never", **options}))


def lowered(made: Applied) -> dict[str, list[str]]:
    components = made.report["components"]
    return {c["checkpoint"]["component"]: [item["name"] for item in c["passes"]] for c in components}


def test_without_components_the_denoiser_alone_is_lowered(pipeline_folder: Folder, tmp_path: Path) -> None:
    made = applied({}, pipeline_folder("dit"), tmp_path / "out")
    assert "components" not in made.report
    assert not (made.folder / "vae").exists()
    assert (made.folder / "components" / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    pipeline = library.load_pipeline(made.folder)
    assert isinstance(pipeline.transformer, EngineModule)
    assert type(pipeline.vae).__name__ == "AutoencoderKL"


@pytest.mark.parametrize(
    ("components", "expected"),
    [
        ({"vae": {"passes": [CAST]}}, {"transformer": ["cast"], "vae": ["cast"]}),
        (["vae"], {"transformer": ["cast"], "vae": []}),
        ({"*": None, "vae": "keep"}, {"transformer": ["cast"]}),
    ],
)
def test_named_components_are_lowered_and_the_others_kept(
    components: Any, expected: dict[str, list[str]], pipeline_folder: Folder, tmp_path: Path
) -> None:
    document = {"passes": [{"cast": {"dtype": "bfloat16"}}], "components": components}
    made = applied(document, pipeline_folder("dit"), tmp_path / "out")
    assert lowered(made) == expected
    pipeline = library.load_pipeline(made.folder)
    assert isinstance(pipeline.vae, EngineModule) == ("vae" in expected)


def test_the_denoiser_can_be_kept_and_passes_stay_with_their_component(pipeline_folder: Folder, tmp_path: Path) -> None:
    components = {"transformer": "keep", "vae": {"passes": [CAST]}}
    made = applied({"components": components}, pipeline_folder("dit"), tmp_path / "out")
    assert lowered(made) == {"vae": ["cast"]}
    assert made.report["checkpoint"]["component"] == "vae"
    assert type(library.load_pipeline(made.folder).transformer).__name__ == "DiTTransformer2DModel"
    assert library.load(made.folder).signature.method == "decode"


def test_a_batch_may_stay_open(pipeline_folder: Folder, tmp_path: Path) -> None:
    components = {"transformer": "keep", "vae": {"inputs": {"batch": "1..4"}}}
    made = applied({"components": components}, pipeline_folder("dit"), tmp_path / "out")
    pipeline = library.load_pipeline(made.folder)
    for labels in ([1], [1, 2, 3]):
        assert pipeline(labels, num_inference_steps=2, output_type="np").images.shape == (len(labels), 16, 16, 3)


def test_the_call_gives_every_component_its_size(pipeline_folder: Folder, tmp_path: Path) -> None:
    document = {"components": "all", "call": {"height": 16, "width": 40, "num_images_per_prompt": 2}}
    made = applied(document, pipeline_folder("stable-diffusion-tiny"), tmp_path / "out")
    inputs = {item["checkpoint"]["component"]: item["inputs"] for item in made.report["components"]}
    assert inputs["unet"]["sample"] == [4, 4, 8, 20]
    assert inputs["unet"]["encoder_hidden_states"] == [4, 16, 16]
    assert inputs["vae"]["x"] == [2, 4, 8, 20]
    assert inputs["text_encoder"]["input_ids"] == [1, 16]
    assert json.loads((made.folder / "manifest.json").read_text())["call"] == document["call"]


def test_a_half_precision_pipeline_stays_half_where_its_models_allow_it(
    pipeline_folder: Folder, tmp_path: Path
) -> None:
    from diffusers import DiTPipeline

    original = DiTPipeline.from_pretrained(pipeline_folder("dit"))
    DiTPipeline.from_pretrained(pipeline_folder("dit"), torch_dtype=torch.float16).save_pretrained(tmp_path / "half")
    made = applied({"components": "all"}, tmp_path / "half", tmp_path / "out")
    pipeline = library.load_pipeline(made.folder)
    transformer, vae = pipeline.transformer, pipeline.vae
    assert [str(spec) for spec in transformer.inputs] == [
        "hidden_states: f16[2, 4, 8, 8]",
        "timestep: f32[2]",
        "class_labels: i64[2]",
    ]
    # AutoencoderKL says of itself that half precision overflows in it.
    assert [str(spec) for spec in vae.inputs] == ["z: f32[1, 4, 8, 8]"]
    assert {transformer.dtype, vae.dtype, pipeline.dtype} == {torch.float32}
    found, expected = (
        torch.as_tensor(
            pipe([3], num_inference_steps=3, generator=torch.Generator().manual_seed(1), output_type="np").images
        )
        for pipe in (pipeline, original)
    )
    assert float((found - expected).abs().max()) < 0.02


def test_a_gate_of_a_component(pipeline_folder: Folder, tmp_path: Path) -> None:
    components = {"transformer": "keep", "vae": {"passes": [CAST]}}
    gate = {"component": "vae", "after": "cast", "metric": "snr"}
    document = {"components": components, "gates": [{**gate, "min": 20}]}
    [held] = applied(document, pipeline_folder("dit"), tmp_path / "out").report["gates"]
    assert held["component"] == "vae"
    assert held["value"] > 20
    with pytest.raises(GateError, match="gate after 'vae: cast': snr is"):
        applied({**document, "gates": [{**gate, "min": 200}]}, pipeline_folder("dit"), tmp_path / "strict")
    reproducer = tmp_path / "strict.reproducer"
    recipe = make_recipe(yaml.safe_load((reproducer / "recipe.yaml").read_text()))
    with pytest.raises(GateError):
        apply(recipe, Request(str(reproducer / "program"), tmp_path / "again"))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"components": {"vea": {}}}, "runs no model 'vea' that the recipe lowers; did you mean 'vae'"),
        ({"components": {"vae": {"pases": []}}}, "components: vae: unknown key 'pases'; did you mean 'passes'"),
        ({"components": {"vae": "kep"}}, "components"),
        ({"components": {"transformer": "keep"}}, "keeps every component of"),
        (
            {"passes": [CAST], "components": {"transformer": {"passes": [CAST]}}},
            "'passes' and passes of transformer",
        ),
        ({"components": "all", "call": {"heigth": 8}}, "a DiTPipeline takes no 'heigth'"),
        ({"components": {"vae": {"inputs": {"y": [1]}}}}, "the pipeline gives vae no input 'y'"),
        (
            {"components": ["vae"], "gates": [{"after": "cast", "component": "vae", "metric": "snr", "min": 1}]},
            "'after' names 'cast', not a pass of vae in this recipe",
        ),
    ],
)
def test_mistakes(document: dict[str, Any], message: str, pipeline_folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        applied(document, pipeline_folder("dit"), tmp_path / "out")
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_components_of_a_model_alone_are_refused(pipeline_folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no pipeline folder"):
        applied({"components": "all"}, pipeline_folder("dit") / "transformer", tmp_path / "out")


def test_a_pipeline_of_no_known_class_is_not_run(pipeline_folder: Folder, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(pipeline_folder("dit"), tmp_path / "pipeline")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "os"}))
    with pytest.raises(UserError, match="names the pipeline 'os', which diffusers does not have"):
        applied({"components": "all"}, folder, tmp_path / "out")
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["os", "system"]}))
    with pytest.raises(UserError, match=r"'scheduler' is a os\.system, which is no class of diffusers or transformers"):
        applied({"components": "all"}, folder, tmp_path / "out")


@pytest.mark.slow
def test_the_trained_clips_are_the_same_with_every_component_lowered(moving_digits: Path, tmp_path: Path) -> None:
    from optpass.runtime.class_to_video import ClassToVideoPipeline

    document = {"passes": ["single-token-attention"], "components": "all", "target": "onnxruntime"}
    made = applied(document, moving_digits, tmp_path / "out", verify="auto")
    assert lowered(made) == {"unet": ["single-token-attention"], "vae": [], "class_encoder": []}
    seeds = list(range(4))
    pipeline, original = library.load_pipeline(made.folder), ClassToVideoPipeline.load(moving_digits)
    pairs = [
        [torch.as_tensor(pipe([3 + seed], seeds=[seed]).frames) for pipe in (original, pipeline)] for seed in seeds
    ]
    expected, found = (torch.cat(side) for side in zip(*pairs, strict=True))
    assert psnr(expected, found) >= 40
    assert psnr(expected[:1], expected[1:2]) < 20
