"""What of a pipeline folder travels with an engine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from optpass.errors import UserError
from optpass.ir.program import Program
from optpass.runtime.components import component_files, copy_components


def test_other_components_travel_code_and_optimised_weights_do_not(pipeline: tuple[Path, Program]) -> None:
    _, program = pipeline
    assert sorted(component_files(program.origin)) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_a_model_alone_has_no_components(program: Program) -> None:
    assert component_files(program.origin) == {}


def test_a_link_inside_the_folder_arrives_as_its_file(pipeline: tuple[Path, Program], tmp_path: Path) -> None:
    folder, program = pipeline
    (folder / "vae" / "copy.json").symlink_to("config.json")
    copy_components(program.origin, tmp_path / "out")
    assert not (tmp_path / "out" / "vae" / "copy.json").is_symlink()
    assert (tmp_path / "out" / "vae" / "copy.json").read_text() == "{}"


@pytest.mark.parametrize("target", ["/etc/hostname", "../../secret", "/etc"])
def test_a_link_out_of_the_folder_is_refused(target: str, pipeline: tuple[Path, Program], tmp_path: Path) -> None:
    folder, program = pipeline
    (tmp_path / "secret").write_text("secret")
    (folder / "vae" / "leak").symlink_to(target)
    with pytest.raises(UserError, match="leak is a link that leaves"):
        component_files(program.origin)


def test_the_hub_caches_links_into_its_blobs_are_taken(pipeline: tuple[Path, Program], tmp_path: Path) -> None:
    from dataclasses import replace

    folder, program = pipeline
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir(parents=True)
    os.renames(folder, snapshot)
    os.rename(snapshot / "vae" / "config.json", blobs / "123")
    (snapshot / "vae" / "config.json").symlink_to("../../../blobs/123")
    copy_components(replace(program.origin, path=snapshot), tmp_path / "out")
    assert (tmp_path / "out" / "vae" / "config.json").read_text() == "{}"
