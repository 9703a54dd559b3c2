"""The content of slots is exchanged in a finished bundle: those bytes and no others, all or nothing."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

from optpass.errors import UserError, WeightError
from optpass.ir.hashing import file_digest
from optpass.ir.program import Program
from optpass.ir.slots import Slot
from optpass.ir.weights import Cast, Concat, Constant, Sum
from optpass.pipeline.target import Lowering
from optpass.runtime.bundle import BundleWriter, read_manifest, verify_files
from optpass.runtime.exchange import exchange, slot_records
from optpass.runtime.loading import load
from optpass.runtime.slot_records import SLOTS, write_slots
from optpass.targets.onnxruntime import OnnxRuntime
from optpass.testing import capture_module

X = torch.randn(3, 16)


class Layers(nn.Module):
    """Two layers with equal weights, which an optimiser would make one, and a tiny one, which it would fold."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.tiny = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x):
        return self.tiny(self.first(x) + self.second(x))


def slotted(program: Program, delta: float) -> Program:
    changes = {}
    for name in ("first.weight", "second.weight", "tiny.weight"):
        base = program.weights[name]
        value = Sum(base, Constant(torch.full(base.shape, delta)))
        changes[name] = Slot(name, "merged", base, value, f"plus {delta}")
    return program.with_weights(changes)


def write(program: Program, folder: Path) -> Path:
    with BundleWriter(folder) as writer:
        target = OnnxRuntime(threads=1)
        engines = target.lower(program, Lowering(writer.folder))
        write_slots(writer.folder, engines)
        writer.finish(program=program, target="onnxruntime", options=target.as_options(), engines=engines)
    return folder


@pytest.fixture
def program() -> Program:
    program, _ = capture_module(Layers, x=X)
    equal = dict.fromkeys(("first.weight", "second.weight"), program.weights["first.weight"])
    return program.with_weights(equal)


def put(bundle: Path, delta: float | None) -> None:
    def fill(name, role, base):
        assert role == "merged"
        return base if delta is None else Sum(base, Constant(torch.full(base.shape, delta)))

    manifest = read_manifest(bundle)
    exchange(bundle, manifest, [(manifest, fill)], [f"plus {delta}"])


def contents(bundle: Path) -> dict[str, str]:
    return {path.relative_to(bundle).as_posix(): file_digest(path) for path in bundle.rglob("*") if path.is_file()}


def test_the_engine_computes_with_what_was_put_in(program: Program, tmp_path: Path) -> None:
    bundle, other = write(slotted(program, 0.5), tmp_path / "a"), write(slotted(program, -1.0), tmp_path / "b")
    assert not torch.allclose(load(bundle)(X), load(other)(X))
    put(bundle, -1.0)
    verify_files(bundle, read_manifest(bundle))
    assert torch.equal(load(bundle)(X), load(other)(X))
    assert json.loads((bundle / SLOTS).read_text())["content"] == ["plus -1.0"]


def test_only_the_slots_change_and_come_back_to_the_byte(program: Program, tmp_path: Path) -> None:
    bundle = write(slotted(program, 0.5), tmp_path / "a")
    plain = write(slotted(program, 0.0), tmp_path / "b")
    before = contents(bundle)
    put(bundle, 2.0)
    changed = {name for name, digest in contents(bundle).items() if before[name] != digest}
    assert changed == {"full.onnx.slots.data", SLOTS, "manifest.json"}
    put(bundle, None)
    assert (bundle / "full.onnx.slots.data").read_bytes() == (plain / "full.onnx.slots.data").read_bytes()
    put(bundle, 0.5)
    assert {n: d for n, d in contents(bundle).items() if before[n] != d}.keys() <= {"manifest.json", SLOTS}


def test_slots_survive_what_later_passes_make_of_them(program: Program, tmp_path: Path) -> None:
    def fused(delta: float) -> Program:
        found = slotted(program, delta)
        half = Cast(Cast(found.weights["first.weight"], torch.float16), torch.float32)
        both = Concat((half, found.weights["second.weight"]), 0)
        return found.with_weights({"first.weight": half, "second.weight": both.parts[1]})

    bundle, other = write(fused(0.5), tmp_path / "a"), write(fused(3.0), tmp_path / "b")
    put(bundle, 3.0)
    assert torch.equal(load(bundle)(X), load(other)(X))


def test_a_loaded_engine_keeps_its_weights(program: Program, tmp_path: Path) -> None:
    bundle = write(slotted(program, 0.5), tmp_path / "a")
    session = onnxruntime.InferenceSession(str(bundle / "full.onnx"))
    before = session.run(None, {"x": X.numpy()})[0]
    put(bundle, 9.0)
    assert (session.run(None, {"x": X.numpy()})[0] == before).all()


def test_nothing_is_changed_by_what_fails(program: Program, tmp_path: Path) -> None:
    bundle = write(slotted(program, 0.5), tmp_path / "a")
    before = contents(bundle)
    with pytest.raises(WeightError, match=r"first\.weight.*NaN"):
        put(bundle, float("nan"))
    assert contents(bundle) == before


def test_an_exchange_that_was_cut_short_is_refused_and_can_be_repeated(program: Program, tmp_path: Path) -> None:
    bundle = write(slotted(program, 0.5), tmp_path / "a")
    old = (bundle / "manifest.json").read_bytes()
    put(bundle, 2.0)
    (bundle / "manifest.json").write_bytes(old)
    with pytest.raises(UserError, match=r"exchange.*cut short.*optpass refit"):
        load(bundle)
    put(bundle, 2.0)
    load(bundle)


def test_a_bundle_without_slots_says_how_to_get_some(program: Program, tmp_path: Path) -> None:
    bundle = write(program, tmp_path / "a")
    manifest = read_manifest(bundle)
    with pytest.raises(UserError, match=r"merge-lora: \{mode: refit\}"):
        slot_records(bundle, manifest, manifest)


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: record["tensors"][0].update(offset=64),
        lambda record: record["tensors"][0].update(file="../outside"),
        lambda record: record["tensors"][0]["expression"].update({"is": "exec"}),
        lambda record: record["tensors"][0].update(length=3),
        lambda record: record.pop("content"),
    ],
)
def test_damaged_records_are_refused(damage, program: Program, tmp_path: Path) -> None:
    bundle = write(slotted(program, 0.5), tmp_path / "a")
    record = json.loads((bundle / SLOTS).read_text())
    damage(record)
    (bundle / SLOTS).write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"damaged|outside"):
        put(bundle, 1.0)
    assert not list(bundle.rglob("*.partial"))
