"""Bundles appear whole or not at all, replace nobody's folder, and their manifests stay inside."""

from __future__ import annotations

import errno
import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loops import cached

from optpass.errors import UserError
from optpass.ir.hashing import file_digest
from optpass.ir.program import Program
from optpass.pipeline.target import LoweredEntry
from optpass.runtime.bundle import BundleWriter, read_manifest, verify_files
from optpass.runtime.loading import load

Write = Callable[..., Path]


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_manifest_hashes_every_file_but_itself(bundle: Path, program: Program) -> None:
    manifest = read_manifest(bundle)
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert set(manifest.files) == files - {"manifest.json"}
    assert all(record.sha256 == file_digest(bundle / name) for name, record in manifest.files.items())
    entry = manifest.entries["full"]
    assert [record.spec() for record in entry.inputs] == list(program.entries["full"].inputs)
    assert entry.call() == program.entries["full"].signature
    assert manifest.target.name == "program"


def test_nothing_is_left_beside_a_finished_bundle(bundle: Path) -> None:
    assert contents(bundle.parent) == {"bundle"}


@pytest.mark.parametrize("error", [RuntimeError("engine"), KeyboardInterrupt(), UserError("bad")])
@pytest.mark.parametrize("exists", [False, True])
def test_an_interrupted_write_leaves_what_was_there(
    error: BaseException, exists: bool, tmp_path: Path, program: Program, write_bundle: Write
) -> None:
    out = tmp_path / "out"
    if exists:
        write_bundle(out, program)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def interrupted() -> None:
        with BundleWriter(out, force=exists) as writer:
            (writer.folder / "full.onnx").write_bytes(b"half")
            raise error

    with pytest.raises(type(error)):
        interrupted()
    assert contents(tmp_path) == ({"out"} if exists else set())
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_an_existing_folder_is_refused_before_any_work(bundle: Path) -> None:
    with pytest.raises(UserError, match="--force"), BundleWriter(bundle):
        pytest.fail("the context was entered")


@pytest.mark.parametrize("kind", ["stranger", "other manifest", "file", "link"])
def test_force_never_deletes_what_is_no_bundle(kind: str, bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("precious")
    elif kind == "link":
        out.symlink_to(bundle)
    else:
        out.mkdir()
        (out / "precious").write_text("precious")
        if kind == "other manifest":
            (out / "manifest.json").write_text('{"name": "a web app", "icons": []}')
    with pytest.raises(UserError, match="not a bundle"), BundleWriter(out, force=True):
        pytest.fail("the context was entered")
    assert out.exists()


def test_force_replaces_a_bundle_at_the_end(bundle: Path, program: Program, write_bundle: Write) -> None:
    (bundle / "old").write_text("old")
    write_bundle(bundle, program, force=True)
    assert not (bundle / "old").exists()
    verify_files(bundle, read_manifest(bundle))
    assert contents(bundle.parent) == {"bundle"}


def test_force_takes_an_empty_folder(tmp_path: Path, program: Program, write_bundle: Write) -> None:
    (tmp_path / "out").mkdir()
    write_bundle(tmp_path / "out", program, force=True)
    assert read_manifest(tmp_path / "out").entries


def test_a_failed_rename_puts_the_old_bundle_back(
    bundle: Path, program: Program, write_bundle: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def failing(path: Path, target: Any) -> Any:
        if ".partial-" in path.name:
            raise OSError(errno.EIO, "input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="input/output"):
        write_bundle(bundle, program, force=True)
    verify_files(bundle, read_manifest(bundle))
    assert contents(bundle.parent) == {"bundle"}


def test_a_disk_that_fills_says_how_much_and_leaves_nothing(
    tmp_path: Path, program: Program, write_bundle: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("optpass.ir.safetensors_io.tensor_bytes", full)
    with pytest.raises(UserError, match=r"it needs [\d,]+ bytes or more, and the disk has [\d,]+ free"):
        write_bundle(tmp_path / "out", program)
    assert contents(tmp_path) == set()


def test_a_disk_too_small_is_refused_before_lowering(
    tmp_path: Path, program: Program, write_bundle: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 0, 100))
    monkeypatch.setattr("optpass.targets.program.save_program", lambda *a, **k: pytest.fail("lowering began"))
    with pytest.raises(UserError, match="the disk has 100 free"):
        write_bundle(tmp_path / "out", program)
    assert contents(tmp_path) == set()


def test_components_travel_and_are_hashed(pipeline: tuple[Path, Program], tmp_path: Path, write_bundle: Write) -> None:
    _, program = pipeline
    manifest = read_manifest(write_bundle(tmp_path / "out", program))
    assert manifest.components == "components"
    assert "components/vae/diffusion_pytorch_model.safetensors" in manifest.files
    assert "components/unet/diffusion_pytorch_model.safetensors" not in manifest.files


def test_a_report_without_engines_is_a_bundle(pipeline: tuple[Path, Program], tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "out") as writer:
        (writer.folder / "report.json").write_text("{}")
        engines: dict[str, LoweredEntry] = {}
        writer.finish(program=pipeline[1], target="onnxruntime", options={}, engines=engines)
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.entries, manifest.components, list(manifest.files)) == ({}, None, ["report.json"])


def edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "no manifest of optpass"),
        ('{"name": "a web app"}', "no manifest of optpass"),
        ('{"schema_version": 99}', "newer optpass"),
        ('{"schema_version": 1}', "'files' is required"),
    ],
)
def test_a_damaged_manifest_is_a_clear_error(text: str, message: str, bundle: Path) -> None:
    (bundle / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_manifest(bundle)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("loop", "sample"), "latents"),
        (("loop", "schedule"), {"every": 2, "within": []}),
        (("loop", "schedule"), {"every": 10**30}),
        (("loop", "signature", "arguments", "children", "sample", "name"), []),
        (("entries", "reuse", "details", "entry"), "other"),
    ],
)
def test_a_damaged_loop_is_a_clear_error(
    place: tuple[str, ...], value: Any, tmp_path: Path, write_bundle: Write
) -> None:
    bundle = write_bundle(tmp_path / "looped", cached()[0])

    def change(data: dict[str, Any]) -> None:
        for key in place[:-1]:
            data = data[key]
        data[place[-1]] = value

    edit(bundle, change)
    with pytest.raises(UserError):
        load(bundle)


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no bundle"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret", "program/../../secret", "leak", "..\\secret", "a\0b"])
@pytest.mark.parametrize("place", ["files", "engine", "components"])
def test_no_path_leaves_the_bundle(name: str, place: str, bundle: Path) -> None:
    (bundle.parent / "secret").write_text("secret")
    (bundle / "leak").symlink_to("../secret")

    def change(data: dict[str, Any]) -> None:
        if place == "files":
            data["files"][name] = {"sha256": "0", "bytes": 6}
        elif place == "engine":
            data["entries"]["full"]["engine"] = name
        else:
            data["components"] = name

    edit(bundle, change)
    with pytest.raises(UserError, match="outside the bundle; refused"):
        read_manifest(bundle)


def test_a_changed_byte_names_the_file(bundle: Path) -> None:
    path = bundle / "program" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"program/weights\.safetensors is not the file that was written"):
        verify_files(bundle, read_manifest(bundle))


def test_a_missing_file_is_named(bundle: Path) -> None:
    (bundle / "program" / "full.pt2").unlink()
    with pytest.raises(UserError, match=r"program/full\.pt2 is missing"):
        verify_files(bundle, read_manifest(bundle))


def test_an_engine_without_a_hash_is_refused(bundle: Path) -> None:
    edit(bundle, lambda data: data["files"].pop("program/program.json"))
    with pytest.raises(UserError, match="no hash of the engine"):
        verify_files(bundle, read_manifest(bundle))
