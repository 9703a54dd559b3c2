"""Plans against the applies that they foresee: costs and reading exactly, disk to 2 %, memory within a band."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from optpass.ir.program import Program
from optpass.ir.safetensors_io import Stored
from optpass.pipeline import plan as planning
from optpass.pipeline.apply import apply
from optpass.pipeline.contract import approximate, exact
from optpass.pipeline.passes import Context, Pass
from optpass.pipeline.plan import NOWHERE, Plan, plan
from optpass.pipeline.recipe import Recipe, Step, find_recipe, load_recipe, make_recipe
from optpass.pipeline.request import Request

TOLERANCE = 0.02
BAND = (0.7, 1.05)
"""Measured peak over foreseen peak: a plan may ask for two fifths too much, and hardly for too little."""
INTERVAL = 0.02


@dataclass(frozen=True)
class Run:
    """A finished ``optpass apply``: its peak RssAnon, the bundle's bytes, its report."""

    memory: int
    disk: int
    report: dict[str, Any]


def measured_apply(recipe: str, checkpoint: Path, out: Path, *flags: str) -> Run:
    """Apply in a process of its own, whose anonymous memory is sampled every 20 ms."""
    program = "import sys; from optpass.cli import main; sys.argv[0] = 'optpass'; main()"
    command = [sys.executable, "-c", program, "apply", recipe, str(checkpoint), "-o", str(out), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (out.parent / f"{out.name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _anonymous_bytes(process.pid))
            time.sleep(INTERVAL)
    assert process.returncode == 0, (out.parent / f"{out.name}.log").read_text()
    disk = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return Run(peak, disk, json.loads((out / "report.json").read_text()))


def _anonymous_bytes(pid: int) -> int:
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) << 10 if found else 0


def planned(recipe: str | dict[str, Any], *, assume_weights: bool = False, **request: Any) -> Plan:
    loaded = make_recipe(recipe) if isinstance(recipe, dict) else load_recipe(find_recipe(recipe))
    return plan(loaded, Request(**{"out": NOWHERE, **request}), assume_weights=assume_weights)


def assert_foreseen(found: Plan, run: Run) -> None:
    """Costs exactly, disk to 2 %, memory within the band."""
    [part] = found.components
    assert found.refusals == ()
    assert part.cost.as_json() == run.report["before"]
    assert [item.as_json()["after"] for item in part.passes] == [item["after"] for item in run.report["passes"]]
    assert found.bundle == pytest.approx(run.disk, rel=TOLERANCE)
    assert BAND[0] <= run.memory / found.memory <= BAND[1], (run.memory, found.memory, part.stages)


@pytest.fixture
def linux():
    if not Path("/proc/self/status").exists():
        pytest.skip("anonymous memory is read from /proc")


def test_moving_digits_as_foreseen(moving_digits, tmp_path, linux):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("inputs: {sample: [2, 8, 4, 16, 16]}\npasses: [single-token-attention]\n")
    run = measured_apply(str(recipe), moving_digits, tmp_path / "bundle", "--samples", "2", "--steps", "2")
    found = planned(str(recipe), checkpoint=str(moving_digits), samples=2, steps=2)
    assert_foreseen(found, run)
    [part] = found.components
    assert part.evidence == "numerics, latency and samples"
    assert run.report["target"]["verified"] == "numerics"
    assert run.report["samples"] is not None


@pytest.mark.slow
def test_components_of_a_pipeline_as_foreseen(moving_digits, tmp_path, linux):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("passes: [single-token-attention]\ncomponents: all\n")
    run = measured_apply(str(recipe), moving_digits, tmp_path / "bundle", "--verify", "never")
    found = planned(str(recipe), checkpoint=str(moving_digits), verify="never")
    assert found.refusals == ()
    assert len(found.components) > 1
    assert found.bundle == pytest.approx(run.disk, rel=TOLERANCE)
    assert BAND[0] <= run.memory / found.memory <= BAND[1]


def write_dit(folder: Path, *, heads: int, layers: int) -> None:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=64,
        num_layers=layers,
        in_channels=4,
        sample_size=16,
        num_embeds_ada_norm=1000,
    )
    _write(model, folder)


def write_resnet(folder: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    _write(ResNetForImageClassification(ResNetConfig(depths=[2, 2, 2, 2])), folder)


def write_unet(folder: Path) -> None:
    from diffusers import UNetSpatioTemporalConditionModel

    torch.manual_seed(0)
    model = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32, 32, 32),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        cross_attention_dim=16,
        num_attention_heads=(1, 2, 4, 4),
        num_frames=2,
        sample_size=16,
    )
    _write(model, folder)


def _write(model: Any, folder: Path) -> None:
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    model.save_pretrained(folder)


MODELS = {
    "resnet-45-mb": (write_resnet, {}),
    "dit-45-mb": (write_dit, {"heads": 8, "layers": 2}),
    "dit-400-mb": (write_dit, {"heads": 12, "layers": 8}),
    "unet-of-3500-nodes": (write_unet, {}),
}
CASES = [
    ("resnet-45-mb", "export", "auto"),
    ("resnet-45-mb", "half-precision", "never"),
    ("dit-45-mb", "half-precision", "auto"),
    ("dit-400-mb", "export", "never"),
    ("unet-of-3500-nodes", "export", "never"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "recipe", "verify"), CASES)
def test_larger_models_as_foreseen(tmp_path, linux, model, recipe, verify):
    write, sizes = MODELS[model]
    write(tmp_path / "model", **sizes)
    run = measured_apply(recipe, tmp_path / "model", tmp_path / "bundle", "--verify", verify)
    assert_foreseen(planned(recipe, checkpoint=str(tmp_path / "model"), verify=verify), run)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet-45-mb", "unet-of-3500-nodes"])
def test_the_program_target_as_foreseen(tmp_path, linux, model):
    write, sizes = MODELS[model]
    write(tmp_path / "model", **sizes)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("passes: [{cast: {dtype: bfloat16}}]\ntarget: program\n")
    run = measured_apply(str(recipe), tmp_path / "model", tmp_path / "bundle", "--verify", "never")
    assert_foreseen(planned(str(recipe), checkpoint=str(tmp_path / "model"), verify="never"), run)


@pytest.fixture
def counted(monkeypatch):
    """Bytes of the checkpoint's files that become values of weights."""
    read = {"bytes": 0}
    evaluate = Stored.evaluate

    def counting_evaluate(self):
        read["bytes"] += self.nbytes
        return evaluate(self)

    monkeypatch.setattr(Stored, "evaluate", counting_evaluate)
    return read


MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256))
        self.head = nn.Linear(256, 3)

    def forward(self, x):
        y = self.body(x)
        return self.head(torch.softmax(y @ y.mT, -1) @ y)

def build():
    return Net()
"""


@pytest.fixture
def small(tmp_path) -> dict[str, Any]:
    """A request for a small factory with weights."""
    from safetensors.torch import save_file

    (tmp_path / "small.py").write_text(MODEL)
    scope: dict[str, Any] = {}
    exec(MODEL, scope)
    torch.manual_seed(0)
    save_file(scope["build"]().state_dict(), tmp_path / "weights.safetensors")
    return {
        "checkpoint": f"{tmp_path / 'small.py'}:build",
        "weights": tmp_path / "weights.safetensors",
        "inputs": {"x": (5, 256)},
    }


HALF = {
    "passes": [{"cast": {"dtype": "float16"}}],
    "gates": [{"after": "cast", "metric": "snr", "min": 10}],
    "target": "onnxruntime",
}


@pytest.mark.parametrize("flags", [{}, {"verify": "never"}], ids=["auto", "never"])
def test_reading_as_foreseen_and_nothing_read_to_foresee_it(small, tmp_path, counted, flags):
    recipe = HALF if not flags else {**HALF, "gates": []}
    found = planned(recipe, **small, **flags)
    assert counted["bytes"] == 0
    apply(make_recipe(recipe), Request(out=tmp_path / "bundle", **small, **flags))
    # The ONNX optimiser folds a few small weights, which it reads once more.
    assert found.read <= counted["bytes"] <= found.read * 1.02
    assert found.read > 0


def test_what_a_pass_drops_is_read_to_identify_the_checkpoint(small, tmp_path, counted):
    recipe = with_steps(Step("drop-body", DropBody()))
    found = plan(recipe, Request(out=NOWHERE, verify="never", **small))
    apply(recipe, Request(out=tmp_path / "bundle", verify="never", **small))
    assert {stage.name: stage.read for stage in found.components[0].stages}["identify the checkpoint"] > 256 * 256 * 4
    assert found.read <= counted["bytes"] <= found.read * 1.02


def test_work_as_foreseen(small, tmp_path, monkeypatch):
    """Calls of the model by PyTorch and by the engines, counted, times the MACs of one."""
    from optpass.evaluate import difference
    from optpass.targets.onnxruntime import OnnxRuntime

    calls = {"torch": 0, "engine": 0}

    def counting(kind, make):
        def runner(*arguments):
            run = make(*arguments)

            def counted_run(tensors):
                calls[kind] += 1
                return run(tensors)

            return counted_run

        return runner

    monkeypatch.setattr(difference, "_graph_runner", counting("torch", difference._graph_runner))
    load = OnnxRuntime.load.__func__
    monkeypatch.setattr(OnnxRuntime, "load", classmethod(counting("engine", load)))
    found = planned(HALF, **small)
    apply(make_recipe(HALF), Request(out=tmp_path / "bundle", **small))
    macs = found.components[0].cost.totals.macs
    assert macs > 0
    # A cast changes no MAC, so every call costs the same.
    assert sum(stage.macs for stage in found.components[0].stages) == macs * (calls["torch"] + calls["engine"])


def test_evidence_and_verification_follow_the_size_limits(small, monkeypatch):
    light = planned(HALF, **small).components[0]
    assert light.passes[0].verification == "executed before and after"
    assert light.evidence == "numerics and latency"
    assert light.temporary > 0
    monkeypatch.setattr("optpass.pipeline.verification.MACS_LIMIT", 1)
    large = planned(HALF, **small).components[0]
    assert "--verify always" in large.passes[0].verification
    assert large.evidence.startswith("not collected: too large")
    assert large.temporary == 0
    assert planned(HALF, **small, verify="always").components[0].evidence == "numerics and latency"
    assert planned(HALF, **small, verify="never").components[0].evidence == "not collected: switched off"
    assert planned(HALF, **small, verify="always", baseline=False).components[0].evidence == "numerics"


def test_operators_that_the_target_lacks_are_named_with_their_modules(small):
    found = planned({"passes": [{"cast": {"dtype": "bfloat16"}}], "target": "onnxruntime"}, **small)
    assert len(found.refusals) == 1
    assert "cannot take" in found.refusals[0]
    places = {(item.path, item.operator) for item in found.components[0].unsupported}
    assert ("body.0", "linear") in places


def test_what_an_apply_refuses_a_plan_refuses(small, tmp_path, monkeypatch):
    bare = {**small, "weights": None}
    [reason] = planned(HALF | {"gates": []}, **bare).refusals
    assert "has no weights" in reason
    assumed = planned(HALF, assume_weights=True, **bare)
    assert assumed.refusals == ()
    assert any("assumed" in warning for warning in assumed.warnings)
    assert assumed.bundle == pytest.approx(planned(HALF, **small).bundle, rel=1e-6)
    refused = planned(HALF | {"passes": [{"cast": {"dtype": "float16", "keep": ["nowhere.*"]}}]}, **small)
    assert refused.components[0].passes[0].status == "refused"
    assert "matches no module" in refused.refusals[0]
    existing = planned(HALF, **small, out=tmp_path)
    assert "exists" in existing.refusals[0]
    layout = planned({"passes": [], "target": {"program": {"layout": "transformers"}}}, **small)
    assert "needs a checkpoint of that library" in layout.refusals[0]
    quality = planned(HALF | {"gates": [{"after": "cast", "metric": "psnr", "min": 3}]}, **small)
    assert "pipeline" in quality.refusals[0]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    full = planned(HALF, **small, out=tmp_path / "bundle")
    assert len(full.refusals) == 1
    assert f"no space at {tmp_path}" in full.refusals[0]


def test_memory_that_is_not_there_is_a_warning(small, monkeypatch):
    monkeypatch.setattr(planning, "_available_memory", lambda: 1 << 20)
    found = planned(HALF, **small)
    assert found.refusals == ()
    assert "are available now" in found.warnings[0]


class Calibrate(Pass):
    """Looks at values, which a plan does not have."""

    contract = approximate()
    executes: ClassVar[bool] = True
    needs: ClassVar[str] = "calibration samples"

    def run(self, program: Program, context: Context) -> Program:
        raise AssertionError("a plan does not execute")


class Finicky(Pass):
    """Wants what :class:`Calibrate` would have made."""

    contract = exact()

    def requires(self, program: Program) -> list[str]:
        return ["nothing is calibrated"]

    def run(self, program: Program, context: Context) -> Program:
        return program


class DropBody(Pass):
    """Returns the head of the input, so that the body's weights are read by nobody."""

    contract = approximate()

    def run(self, program: Program, context: Context) -> Program:
        graph = program.entries["full"]
        [body] = [node for node in graph.calls if str(node.meta["path"]) == "body.2"]
        body.replace_all_uses_with(graph.placeholders[0])
        context.rewrote(body)
        graph.remove_dead_code()
        return program


def with_steps(*steps: Step) -> Recipe:
    return replace(make_recipe({"passes": [], "target": "onnxruntime"}), steps=steps)


def test_a_pass_that_executes_is_not_run_and_what_follows_says_so(small, tmp_path):
    cast = make_recipe(HALF).steps[0]
    found = plan(
        with_steps(Step("calibrate", Calibrate()), cast, Step("finicky", Finicky())), Request(out=NOWHERE, **small)
    )
    assert found.refusals == ()
    calibrate, second, third = found.components[0].passes
    assert (calibrate.status, calibrate.needs, calibrate.record) == ("not run", ("calibration samples",), None)
    assert (second.status, second.assumes) == ("run", ("calibrate",))
    assert second.record is not None
    assert (third.status, third.assumes) == ("not run", ("calibrate",))
    assert "cannot be foreseen" in third.note
    bare = Request(**{**small, "out": NOWHERE, "structure_only": True})
    refused = plan(with_steps(Step("calibrate", Calibrate())), bare)
    assert "needs weight values" in refused.refusals[0]


def test_after_a_refused_pass_nothing_is_reached(small):
    found = plan(with_steps(Step("finicky", Finicky()), Step("calibrate", Calibrate())), Request(out=NOWHERE, **small))
    assert found.refusals == ("pass 'finicky' cannot run: nothing is calibrated",)
    assert [item.status for item in found.components[0].passes] == ["refused", "not reached"]


def test_structure_only_takes_a_report_and_no_engine(small):
    found = planned(HALF | {"gates": []}, **small, structure_only=True)
    assert found.refusals == ()
    assert found.bundle < 1 << 20
    assert found.components[0].footprint is None
    saved = planned({"passes": [], "target": "program"}, **small, structure_only=True)
    assert saved.bundle < 1 << 20
