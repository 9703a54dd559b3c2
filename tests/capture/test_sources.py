"""The choice among source kinds, weight files in folders, and the checkpoint's digest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from optpass.capture.checkpoint_weights import folder_weights, weight_file
from optpass.capture.digest import checkpoint_digest, weight_files
from optpass.capture.sources import KINDS, capture
from optpass.errors import UserError, WeightError

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.safetensors", "", "it holds weights and no model; give the model as path/to/file.py:function"),
        ("x.onnx", "", "it is a file of type '.onnx'"),
        ("x.py", "", r"name the function that builds the model: x\.py:function"),
        ("x.json", "{}", "names no diffusers class"),
        ("folder/readme.md", "", r"the folder holds readme\.md"),
        ("folder/manifest.json", "{}", "it is a bundle, which holds engines and no program"),
    ],
)
def test_an_unknown_source_is_refused_with_what_is_there_and_what_is_known(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(UserError, match=message) as refusal:
        capture(path.parent if path.parent != tmp_path else path)
    assert all(kind.DESCRIPTION in str(refusal.value) for kind in KINDS)


def test_a_missing_or_empty_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file or folder"):
        capture(tmp_path / "gone")
    with pytest.raises(UserError, match="the folder is empty"):
        capture(tmp_path)


def test_a_missing_weight_file_is_refused(unet_folder: Path) -> None:
    with pytest.raises(UserError, match="no weight file at"):
        capture(unet_folder, weights=unet_folder / "gone.safetensors")


def test_weights_can_be_given_apart(
    unet_folder: Path, tmp_path: Path, small_unet: Any, assert_same_function: Any
) -> None:
    shutil.move(unet_folder / WEIGHTS, tmp_path / "apart.safetensors")
    assert_same_function(capture(unet_folder, weights=tmp_path / "apart.safetensors"), small_unet)


def shard(folder: Path) -> dict[str, str]:
    """Split a folder's weights into two files and an index; the table of the index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    table = {name: f"part-{1 + (i % 2)}.safetensors" for i, name in enumerate(names)}
    for file in set(table.values()):
        save_file({name: tensors[name] for name in names if table[name] == file}, folder / file)
    write_index(folder, table)
    return table


def write_index(folder: Path, table: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": table}))


def test_shards_are_read_through_their_index(unet_folder: Path, small_unet: Any, assert_same_function: Any) -> None:
    shard(unet_folder)
    assert_same_function(capture(unet_folder), small_unet)


def test_a_missing_shard_is_named(unet_folder: Path) -> None:
    shard(unet_folder)
    (unet_folder / "part-2.safetensors").unlink()
    with pytest.raises(WeightError, match=r"names the shard 'part-2\.safetensors', which is missing"):
        capture(unet_folder)


def test_a_tensor_that_its_shard_lacks_is_named(unet_folder: Path) -> None:
    table = shard(unet_folder)
    write_index(unet_folder, {**table, "conv_in.weight": "part-2.safetensors", "conv_in.bias": "part-2.safetensors"})
    with pytest.raises(WeightError, match=r"part-2\.safetensors lacks the tensor 'conv_in\.\w+', which .* promises"):
        capture(unet_folder)


@pytest.mark.parametrize(
    "escape", ["../other/x.safetensors", "/tmp/x.safetensors", "C:\\x.safetensors", "a/../../x", ""]
)
def test_a_shard_outside_the_folder_is_refused(unet_folder: Path, escape: str) -> None:
    table = shard(unet_folder)
    write_index(unet_folder, {**table, "conv_in.weight": escape})
    with pytest.raises(UserError, match="is outside its folder; refused"):
        capture(unet_folder)


def test_links_of_a_download_cache_are_followed(unet_folder: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / "0123"
    blob.parent.mkdir()
    shutil.move(unet_folder / WEIGHTS, blob)
    (unet_folder / WEIGHTS).symlink_to(blob)
    assert capture(unet_folder).has_values


@pytest.mark.parametrize("table", [None, 3, {"a": 3}])
def test_a_damaged_index_is_refused(unet_folder: Path, table: Any) -> None:
    shard(unet_folder)
    write_index(unet_folder, table)
    with pytest.raises(WeightError, match="'weight_map' does not map tensor names to shard files"):
        capture(unet_folder)


def test_truncated_weights_are_refused(unet_folder: Path) -> None:
    data = (unet_folder / WEIGHTS).read_bytes()
    (unet_folder / WEIGHTS).write_bytes(data[:-100])
    with pytest.raises(WeightError, match="truncated: the data of"):
        capture(unet_folder)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ([WEIGHTS, "diffusion_pytorch_model.fp16.safetensors"], WEIGHTS),
        (["diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"], "diffusion_pytorch_model.bin"),
        (["model.safetensors", "pytorch_model.bin", "optimizer.bin"], "model.safetensors"),
        (["model.safetensors", "model.safetensors.index.json"], "model.safetensors.index.json"),
        (["model.safetensors.index.fp16.json"], "model.safetensors.index.fp16.json"),
        (["mine.safetensors", "training_args.bin"], "mine.safetensors"),
        (["training_args.bin", "config.json"], None),
    ],
)
def test_the_weight_file_is_chosen_by_name(tmp_path: Path, names: list[str], chosen: str | None) -> None:
    for name in names:
        (tmp_path / name).touch()
    found = weight_file(tmp_path)
    assert (found.name if found else None) == chosen


def test_several_unknown_weight_files_are_refused(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"several weight files \(a\.safetensors, b\.safetensors\).*--weights"):
        folder_weights(tmp_path)


def test_the_digest_follows_the_content_and_not_the_place(unet_folder: Path, tmp_path: Path) -> None:
    first = checkpoint_digest(capture(unet_folder))
    assert [path.name for path in weight_files(capture(unet_folder))] == [WEIGHTS]
    copy = Path(shutil.copytree(unet_folder, tmp_path / "copy"))
    assert checkpoint_digest(capture(copy)) == first
    tensors = load_file(copy / WEIGHTS)
    save_file({**tensors, "conv_in.bias": tensors["conv_in.bias"] + 1}, copy / WEIGHTS)
    assert checkpoint_digest(capture(copy)) != first
    assert checkpoint_digest(capture(unet_folder, structure_only=True)) != first


def test_the_digest_of_pickled_and_exported_weights_follows_the_content(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from torch import nn\ndef net():\n    return nn.Linear(2, 2)\n")
    digests = set()
    for value in (1.0, 2.0):
        torch.save({"weight": torch.full((2, 2), value), "bias": torch.zeros(2)}, tmp_path / f"{value}.pth")
        sizes = {"input": [1, 2]}
        program = capture(f"{tmp_path / 'net.py'}:net", weights=tmp_path / f"{value}.pth", inputs=sizes)
        digests.add(checkpoint_digest(program))
    assert len(digests) == 2


def test_a_saved_program_is_a_source(
    unet_folder: Path, tmp_path: Path, small_unet: Any, assert_same_function: Any
) -> None:
    from optpass.interchange.storage import save_program

    save_program(capture(unet_folder), tmp_path / "saved")
    program = capture(tmp_path / "saved")
    assert_same_function(program, small_unet)
    with pytest.raises(UserError, match="holds a graph of fixed sizes"):
        capture(tmp_path / "saved", inputs={"sample": [5, 2, 8, 8]})


def test_a_model_that_half_precision_does_not_suit_says_how_to_capture_it(moving_digits):
    with pytest.raises(UserError, match=r"AutoencoderTiny: at decoder.*captured in f16.*--dtype float32"):
        capture(moving_digits, component="vae")
    program = capture(moving_digits, component="vae", dtype=torch.float32)
    assert program.origin.class_name == "AutoencoderTiny"
