"""The pass over a whole model; formats and formulas have their tests in tests/adapters."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from adapted_layers import Layers, example
from safetensors.torch import save_file

from optpass.capture.sources import capture
from optpass.errors import ContractError, UserError, WeightError
from optpass.evaluate.difference import program_difference
from optpass.ir.text import program_text
from optpass.ir.weights import Absent
from optpass.passes.merge_lora import MergeLora
from optpass.pipeline.apply import apply
from optpass.pipeline.manager import run_pass, run_passes
from optpass.pipeline.recipe import Step, make_recipe
from optpass.pipeline.request import Request
from optpass.pipeline.verification import Verification
from optpass.testing import capture_module, randomised

CONFIGS = Path(__file__).parents[1] / "configs"
Shapes = dict[str, tuple[int, ...]]


def lora(
    path: Path, layers: dict[str, tuple[int, ...]], *, rank: int = 2, seed: int = 0, **extra: torch.Tensor
) -> Path:
    """An adapter file for weights of the given shapes, all values random."""
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(extra)
    for name, shape in layers.items():
        ones = (1,) * (len(shape) - 2)
        tensors[f"{name}.lora_A.weight"] = torch.randn((rank, *shape[1:]), generator=generator) * 0.3
        tensors[f"{name}.lora_B.weight"] = torch.randn((shape[0], rank, *ones), generator=generator) * 0.3
    save_file(tensors, path)
    return path


Q, CONV = {"block.to_q": (12, 8)}, {"conv_in": (8, 4, 3, 3)}


@pytest.fixture
def layers():
    return capture_module(Layers, x=example())[0]


def step(adapter, **options) -> Step:
    return Step("merge-lora", MergeLora.from_options({"adapter": adapter, **options}, owner="pass merge-lora"))


def test_golden(layers, tmp_path):
    """The graph stays; one weight becomes an update over lazy leaves."""
    after, record = run_pass(layers, step(lora(tmp_path / "rain.safetensors", Q), scale=0.5))
    before, found = program_text(layers).splitlines(), program_text(after).splitlines()
    [(was, now)] = [pair for pair in zip(before, found, strict=True) if pair[0] != pair[1]]
    leaf = was.removeprefix("  @block.to_q.weight = ").removesuffix(" : f32[12, 8]")
    down, up = (f"rain.safetensors[block.to_q.lora_{side}.weight]" for side in "AB")
    assert now == f"  @block.to_q.weight = update({leaf}, scale({up}, 0.5), {down}) : f32[12, 8]"
    assert record.sites == ("block.to_q",)
    assert record.before.totals == record.after.totals
    rain = tmp_path / "rain.safetensors"
    assert record.files == {rain.as_posix(): hashlib.sha256(rain.read_bytes()).hexdigest()}


def test_a_second_run_finds_it_merged(layers, tmp_path):
    again = step(lora(tmp_path / "rain.safetensors", {**Q, **CONV}))
    after, _ = run_pass(layers, again)
    _, record = run_pass(after, again)
    assert not record.modified
    assert [(item.path, item.reason) for item in record.declined if "already" in item.reason] == [
        (path, "the adapter is in it already") for path in ("block.to_q", "conv_in")
    ]
    # Another file of the same name is another adapter.
    (tmp_path / "other").mkdir()
    _, record = run_pass(after, step(lora(tmp_path / "other" / "rain.safetensors", Q, seed=1)))
    assert record.sites == ("block.to_q",)


def test_adapters_add_up(layers, tmp_path):
    rain = lora(tmp_path / "rain.safetensors", {**Q, **CONV})
    snow = lora(tmp_path / "snow.safetensors", Q, rank=3, seed=1)
    both = step([{"path": rain, "scale": 0.5}, {"path": str(snow), "scale": -2}])
    after, record = run_pass(layers, both)
    assert Counter(record.sites) == {"block.to_q": 1, "conv_in": 1}
    one, _ = run_pass(layers, step(rain, scale=0.5))
    two, _ = run_pass(one, step(snow, scale=-2.0))
    assert program_difference(two, after).relative_error <= 1e-6
    assert program_difference(both.record.reference(layers), after).relative_error <= 1e-5
    assert program_difference(layers, after).relative_error > 1e-3


def test_the_contract_is_held_against_the_branches(layers, tmp_path, monkeypatch):
    merge = step(lora(tmp_path / "rain.safetensors", {**Q, **CONV}))
    _, [record] = run_passes(layers, [merge], [Verification()])
    assert record.facts["verified"].startswith("held")
    half, _ = capture_module(lambda: Layers().half(), x=example(torch.float16))
    _, [record] = run_passes(half, [merge], [Verification()])
    assert record.facts["verified"].startswith("held")
    # A merge that forgets the strength is found out.
    monkeypatch.setattr("optpass.passes.merge_lora.merged", lambda base, found: found[0][0].delta(base.shape, 2.0))
    with pytest.raises(ContractError, match="largest relative difference"):
        run_passes(layers, [merge], [Verification()])


def test_what_conflicts(layers, tmp_path):
    rain = lora(tmp_path / "rain.safetensors", Q)
    (tmp_path / "copy.safetensors").write_bytes(rain.read_bytes())
    with pytest.raises(UserError, match=r"rain\.safetensors and .*copy\.safetensors are the same adapter"):
        run_pass(layers, step([{"path": rain}, {"path": tmp_path / "copy.safetensors"}]))
    magnitude = {"block.to_q.lora_magnitude_vector": torch.ones(12)}
    a = lora(tmp_path / "a.safetensors", Q, **magnitude)
    b = lora(tmp_path / "b.safetensors", Q, seed=1, **magnitude)
    with pytest.raises(UserError, match=r"both are DoRA magnitudes of block\.to_q\.weight"):
        run_pass(layers, step([{"path": a}, {"path": b}]))
    _, record = run_pass(layers, step([{"path": a}, {"path": rain}]))
    assert record.sites == ("block.to_q",)


def test_bad_options(layers, tmp_path):
    with pytest.raises(UserError, match=r"at least 1 item"):
        step([])
    with pytest.raises(UserError, match="no adapter at nowhere"):
        run_pass(layers, step("nowhere"))
    for options in ({"scale": float("nan")}, {"mode": "merg"}, {"adapter": [{"file": "a"}]}):
        with pytest.raises(UserError, match=r"pass merge-lora"):
            step(**{"adapter": "a", **options})


def test_a_broken_factor_is_found_before_anything_is_written(layers, tmp_path):
    path = lora(tmp_path / "rain.safetensors", Q, **{"conv_in.lora_A.weight": torch.full((2, 4, 3, 3), torch.nan)})
    with pytest.raises(UserError, match=r"conv_in\.lora_A\.weight' is half of a pair"):
        run_pass(layers, step(path))
    path = lora(tmp_path / "rain.safetensors", Q, rank=2)
    broken = {"block.to_k.lora_A.weight": torch.full((2, 12), torch.nan), "block.to_k.lora_B.weight": torch.ones(6, 2)}
    with pytest.raises(WeightError, match=r"block\.to_k\.lora_A\.weight' holds NaN or Inf"):
        run_pass(layers, step(lora(tmp_path / "rain.safetensors", Q, **broken)))


def test_structure_only(layers, tmp_path):
    absent = layers.with_weights({name: Absent(name, w.shape, w.dtype) for name, w in layers.weights.items()})
    after, record = run_pass(absent, step(lora(tmp_path / "rain.safetensors", Q)))
    assert record.sites == ("block.to_q",)
    assert not after.weights["block.to_q.weight"].has_values


PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")


def test_stable_diffusion_1_5(tmp_path):
    """16 transformer blocks with two attentions of four linears and a feed-forward of two: 160 linears."""
    program = capture(CONFIGS / "sd15-unet", structure_only=True)
    named = {name.removesuffix(".weight"): tuple(weight.shape) for name, weight in program.weights.items()}
    adapted = {f"unet.{path}": shape for path, shape in named.items() if path.endswith(PROJECTIONS)}
    after, record = run_pass(program, step(lora(tmp_path / "style.safetensors", adapted, rank=1)))
    assert len(record.sites) == len(set(record.sites)) == 160
    assert sum(".attn" in path for path in record.sites) == 128
    assert len([name for name in after.weights if after.weights[name] is not program.weights[name]]) == 160
    assert record.before.totals == record.after.totals


FACTORY = """
import torch
from adapted_layers import Layers, example

def model():
    torch.manual_seed(0)
    return Layers()

def model_inputs():
    return {"x": example()}
"""


def test_in_a_bundle(tmp_path):
    """With an open batch and open sizes, at whose ends the contract is held; the adapter's hash in the lock file."""
    (tmp_path / "model.py").write_text(FACTORY)
    adapter = lora(tmp_path / "style.safetensors", {**Q, **CONV})
    document = {
        "inputs": {"x": ["1..4", 4, "4..12", "4..12"]},
        "passes": [{"merge-lora": {"adapter": str(adapter)}}],
        "target": "program",
    }
    weights = tmp_path / "model.safetensors"
    save_file(randomised(Layers()).state_dict(), weights)
    request = Request(f"{tmp_path / 'model.py'}:model", tmp_path / "out", weights=weights, baseline=False, samples=0)
    apply(make_recipe(document), request)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["dimensions"]) == 3
    assert report["passes"][0]["sites"] == 2
    assert report["passes"][0]["verified"].startswith("held")
    lock = yaml.safe_load((tmp_path / "out" / "recipe.lock.yaml").read_text())
    assert lock["files"] == {adapter.as_posix(): hashlib.sha256(adapter.read_bytes()).hexdigest()}
    options = {"adapter": str(adapter), "scale": 1.0, "mode": "merge", "rank": None, "strict": True}
    assert lock["passes"] == [{"merge-lora": options}]


@pytest.mark.parametrize(
    ("first", "second"), [("refit", "refit"), ("keep", "keep"), ("keep", "refit"), ("refit", "keep")]
)
def test_a_weight_has_one_exchangeable_content(first, second, layers, tmp_path):
    """A refit would fill both slots with the new adapter, and so add it twice."""
    rain, snow, conv = (
        lora(tmp_path / f"{name}.safetensors", at, seed=seed)
        for name, at, seed in (("rain", Q, 0), ("snow", Q, 1), ("conv", CONV, 2))
    )
    once, _ = run_pass(layers, step(rain, mode=first))
    with pytest.raises(UserError, match=r"block\.to_q\.weight .*already \(rain.safetensors × 1\)"):
        run_pass(once, step(snow, mode=second))
    assert not run_pass(once, step(rain, mode=second))[1].modified
    assert run_pass(once, step(conv, mode=second))[1].sites == ("conv_in",)
