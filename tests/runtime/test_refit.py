"""Adapters are exchanged in finished bundles: the same engine as one built with them, and the base to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from optpass.capture.sources import capture
from optpass.cli import app
from optpass.errors import UserError, WeightError
from optpass.ir.hashing import file_digest
from optpass.ir.safetensors_io import read_safetensors
from optpass.ir.slots import kept_bytes
from optpass.passes.cast import CastFloats
from optpass.passes.merge_lora import MergeLora
from optpass.pipeline.apply import apply
from optpass.pipeline.passes import Context
from optpass.pipeline.recipe import Recipe, Step
from optpass.pipeline.registry import pass_class
from optpass.pipeline.request import Request
from optpass.runtime.loading import load
from optpass.runtime.refit import refit
from optpass.runtime.workfolder import alone
from optpass.targets.onnxruntime import OnnxRuntime
from optpass.targets.program import ProgramTarget

X = torch.randn(2, 8, 6, 6)
MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 12, 3, groups=3)
        self.linear, self.plain = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x):
        return self.plain(torch.relu(self.linear(self.grouped(torch.relu(self.conv(x))).mean((2, 3)))))

def build():
    return Net()

def build_inputs():
    return {"x": torch.zeros(2, 8, 6, 6)}
"""
SHAPES = {"conv": (12, 8, 3, 3), "grouped": (12, 4, 3, 3), "linear": (16, 12)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("model")
    (folder / "net.py").write_text(MODEL)
    space: dict[str, Any] = {}
    exec(MODEL, space)
    torch.manual_seed(3)
    save_file(space["build"]().state_dict(), folder / "net.safetensors")
    return f"{folder / 'net.py'}:build", folder / "net.safetensors"


def adapter(path: Path, seed: int, modules: tuple[str, ...] = tuple(SHAPES), rank: int = 2) -> Path:
    """A PEFT folder of plain LoRA with random factors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in modules:
        out, *rest = SHAPES.get(name, (16, 12))
        kernel = (1,) * (len(rest) - 1)
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, *rest, generator=generator) / 4
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, rank, *kernel, generator=generator) / 4
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 3, "target_modules": list(modules)}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def build(model: tuple[str, Path], out: Path, steps: list[Step]) -> Path:
    recipe = Recipe("t", "", {}, tuple(steps), (), "onnxruntime", OnnxRuntime(threads=1))
    checkpoint, weights = model
    apply(recipe, Request(checkpoint, out, weights=weights, baseline=False))
    return out


def merging(path: Path, **options: Any) -> Step:
    return Step("merge-lora", MergeLora(adapter=path, **options))


def contents(bundle: Path) -> dict[str, str]:
    return {path.relative_to(bundle).as_posix(): file_digest(path) for path in bundle.rglob("*") if path.is_file()}


def engine(bundle: Path) -> dict[str, str]:
    return {name: digest for name, digest in contents(bundle).items() if ".onnx" in name}


def test_refitted_is_rebuilt_to_the_byte(model: tuple[str, Path], tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "first", 1), adapter(tmp_path / "second", 2, rank=3)
    bundle = build(model, tmp_path / "a", [merging(first, mode="refit")])
    other = build(model, tmp_path / "b", [merging(second, mode="refit", scale=0.5)])
    before = contents(bundle)
    done = refit(bundle, [(second, 0.5)])
    assert engine(bundle) == engine(other)
    changed = {name for name, digest in contents(bundle).items() if before[name] != digest}
    assert changed == {"full.onnx.slots.data", "refit/slots.json", "manifest.json"}
    assert done.tensors == 3
    assert done.content == ("second × 0.5",)


def test_the_report_says_what_the_result_is_compared_with(model: tuple[str, Path], tmp_path: Path) -> None:
    bundle = build(model, tmp_path / "a", [merging(adapter(tmp_path / "first", 1))])
    report = json.loads((bundle / "report.json").read_text())
    assert report["added"] == ["merge-lora"]
    assert report["engine_difference"]["relative_error"] < 1e-5
    assert "went through merge-lora too" in (bundle / "report.html").read_text("utf-8")
    plain = build(model, tmp_path / "b", [])
    assert json.loads((plain / "report.json").read_text())["added"] == []


def test_without_an_adapter_the_bytes_are_the_base_model_s(model: tuple[str, Path], tmp_path: Path) -> None:
    bundle = build(model, tmp_path / "a", [merging(adapter(tmp_path / "first", 1), mode="refit")])
    nothing = build(model, tmp_path / "b", [merging(tmp_path / "first", mode="refit", scale=0.0)])
    refit(bundle, [])
    assert engine(bundle) == engine(nothing)
    plain = build(model, tmp_path / "c", [])
    assert torch.equal(load(bundle)(X), load(plain)(X))


def test_several_adapters_and_a_cast_after_them(model: tuple[str, Path], tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "first", 1), adapter(tmp_path / "second", 2, ("linear",))
    half = Step("cast", CastFloats(dtype="float16"))
    bundle = build(model, tmp_path / "a", [merging(first, mode="refit"), half])
    both = MergeLora(adapter=({"path": first, "scale": 2.0}, {"path": second, "scale": -1.0}), mode="refit")
    other = build(model, tmp_path / "b", [Step("merge-lora", both), half])
    refit(bundle, [(first, 2.0), (second, -1.0)])
    assert engine(bundle) == engine(other)


def test_a_branch_takes_other_adapters(model: tuple[str, Path], tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "first", 1), adapter(tmp_path / "second", 2, ("conv", "linear"))
    kept = build(model, tmp_path / "a", [merging(first, mode="keep", rank=4)])
    slots = (kept / "full.onnx.slots.data").stat().st_size
    for given in ([(first, 1.0)], [(second, 0.7)], [(first, -1.0), (second, 2.0)]):
        refit(kept, given)
        adapters = tuple({"path": path, "scale": scale} for path, scale in given)
        merged = build(model, tmp_path / f"m{len(given)}{given[0][0].name}", [Step("m", MergeLora(adapter=adapters))])
        torch.testing.assert_close(load(kept)(X), load(merged)(X), rtol=1e-5, atol=1e-5)
    assert (kept / "full.onnx.slots.data").stat().st_size == slots
    refit(kept, [])
    plain = build(model, tmp_path / "plain", [])
    torch.testing.assert_close(load(kept)(X), load(plain)(X), rtol=1e-6, atol=1e-6)


def test_a_copy_is_changed_and_the_bundle_stays(model: tuple[str, Path], tmp_path: Path) -> None:
    bundle = build(model, tmp_path / "a", [merging(adapter(tmp_path / "first", 1), mode="refit")])
    before = contents(bundle)
    refit(bundle, [(adapter(tmp_path / "second", 2), 1.0)], out=tmp_path / "copy")
    assert contents(bundle) == before
    assert engine(tmp_path / "copy") != engine(bundle)
    load(tmp_path / "copy")
    with pytest.raises(UserError, match="exists"):
        refit(bundle, [], out=tmp_path / "copy")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "copy", "first", "second"}


@pytest.mark.parametrize("mode", ["refit", "keep"])
def test_what_lies_beside_the_engine_is_foreseen(mode: str, model: tuple[str, Path], tmp_path: Path) -> None:
    bundle = build(model, tmp_path / "a", [merging(adapter(tmp_path / "first", 1), mode=mode)])
    program = capture(model[0], weights=model[1])
    step = merging(tmp_path / "first", mode=mode)
    after = step.record.run(program.copy(), Context())
    stored = read_safetensors(bundle / "refit" / "base.safetensors") if mode == "refit" else {}
    assert kept_bytes(after.used_weights()) == sum(expression.nbytes for expression in stored.values())
    assert (bundle / "refit" / "base.safetensors").exists() == (mode == "refit")


def test_a_target_that_cannot_exchange_says_so(model: tuple[str, Path], tmp_path: Path) -> None:
    steps = (merging(adapter(tmp_path / "first", 1), mode="refit"),)
    recipe = Recipe("t", "", {}, steps, (), "program", ProgramTarget())
    with pytest.raises(UserError, match=r"cannot exchange weights after the build"):
        apply(recipe, Request(model[0], tmp_path / "out", weights=model[1]))
    assert not (tmp_path / "out").exists()


def damaged(path: Path, change: Any) -> Path:
    from safetensors.torch import load_file

    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return path


KEY = "base_model.model.linear.lora_{}.weight"


@pytest.mark.parametrize(
    ("mode", "change", "error", "says"),
    [
        ("refit", lambda t: t.update({KEY.format("A"): torch.full((2, 12), torch.nan)}), WeightError, r"lora_A.*NaN"),
        ("refit", lambda t: t.pop(KEY.format("B")), UserError, "lora_A"),
        ("refit", lambda t: t.update({KEY.format("A"): torch.zeros(2, 13)}), UserError, r"16, 13.*\[16, 12\]"),
        (
            "refit",
            lambda t: t.update({k.replace("linear", "plain"): t.pop(k) for k in list(t) if "linear" in k}),
            UserError,
            "exchangeable weight of plain",
        ),
        ("keep", lambda t: None, UserError, r"rank 9 .* room for 2.*rank: 9"),
    ],
)
def test_what_does_not_fit_changes_nothing(
    mode: str, change: Any, error: type[Exception], says: str, model: tuple[str, Path], tmp_path: Path
) -> None:
    bundle = build(model, tmp_path / "a", [merging(adapter(tmp_path / "first", 1), mode=mode)])
    before = contents(bundle)
    bad = damaged(adapter(tmp_path / "bad", 2, rank=9 if mode == "keep" else 2), change)
    with pytest.raises(error, match=says):
        refit(bundle, [(bad, 1.0)])
    assert contents(bundle) == before


def test_the_command(model: tuple[str, Path], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    bundle = build(model, tmp_path / "a", [merging(adapter(tmp_path / "first", 1), mode="refit")])
    second = adapter(tmp_path / "second", 2)
    done = CliRunner().invoke(app, ["refit", str(bundle), str(second), "--scale", "0.5", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tensors"] == 3
    done = CliRunner().invoke(app, ["refit", str(bundle), "--base"])
    assert done.exit_code == 0
    assert "no adapter; 3 tensors" in " ".join(done.stdout.split())
    for wrong in (
        [],
        ["--base", "--scale", "1", "--scale", "2"],
        ["--base", "--scale", "1"],
        [str(second), "--scale", "inf"],
    ):
        assert isinstance(CliRunner().invoke(app, ["refit", str(bundle), *wrong]).exception, (UserError, SystemExit))


@pytest.mark.parametrize("mode", ["refit", "keep"])
def test_slots_go_through_every_pass_behind_them(mode: str, model: tuple[str, Path], tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "first", 1), adapter(tmp_path / "second", 2)
    behind = [Step(name, pass_class(name)()) for name in ("reparameterize", "fuse-projections", "simplify")]
    bundle = build(model, tmp_path / "a", [merging(first, mode=mode), *behind])
    other = build(model, tmp_path / "b", [merging(second, mode=mode), *behind])
    refit(bundle, [(second, 1.0)])
    assert engine(bundle) == engine(other)


def test_a_key_that_fits_nowhere_is_an_error_for_a_model_that_a_function_makes(
    model: tuple[str, Path], tmp_path: Path
) -> None:
    """The function's name is no module that was captured alone, outside of which keys would be harmless."""
    misspelt = damaged(
        adapter(tmp_path / "first", 1),
        lambda tensors: tensors.update(
            {k.replace("linear", "linaer"): tensors.pop(k) for k in list(tensors) if "linear" in k}
        ),
    )
    with pytest.raises(UserError, match=r"linaer; did you mean 'linear'"):
        build(model, tmp_path / "a", [merging(misspelt, mode="refit")])


def test_component_prefixes_mean_the_same_as_in_the_build(model: tuple[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "unet.safetensors"
    save_file(
        {f"unet.linear.lora_{side}.weight": torch.ones(shape) for side, shape in (("A", (2, 12)), ("B", (16, 2)))}, file
    )
    bundle = build(model, tmp_path / "a", [merging(file, mode="refit")])
    before = engine(bundle)
    refit(bundle, [(file, 1.0)])
    assert engine(bundle) == before


def test_a_bundle_is_refitted_by_one_at_a_time(model: tuple[str, Path], tmp_path: Path) -> None:
    bundle = build(model, tmp_path / "a", [merging(adapter(tmp_path / "first", 1), mode="refit")])
    with alone(bundle), pytest.raises(UserError, match="another process is at work"):
        refit(bundle, [])
    with alone(bundle, shared=True):
        refit(bundle, [], out=tmp_path / "copy")
        with pytest.raises(UserError, match="another process is at work"):
            refit(bundle, [])
    refit(bundle, [])


def test_copies_of_what_cannot_be_written_can(model: tuple[str, Path], tmp_path: Path) -> None:
    bundle = build(model, tmp_path / "a", [merging(adapter(tmp_path / "first", 1), mode="refit")])
    for path in [bundle, *bundle.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    refit(bundle, [], out=tmp_path / "copy")
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "copy", tmp_path / "copy" / "refit"))
    with pytest.raises(UserError, match="inside of"):
        refit(bundle, [], out=bundle / "copy")
