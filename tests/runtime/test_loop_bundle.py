"""A loop in a bundle: engines that share weights, one module to call, and manifests that lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import Eager, cached, generation

import optpass
from optpass.errors import UserError
from optpass.ir.loop import every
from optpass.runtime.looped import LoopModule

CONTEXT = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("target", ["onnxruntime", "program"])
def test_a_bundle_runs_its_schedule(target, tmp_path, write_bundle):
    program, net = cached(every(3, ("full", "reuse")))
    module = optpass.load(write_bundle(tmp_path / "bundle", program, target=target))
    assert isinstance(module, LoopModule)
    found = generation(module, 0, 7, CONTEXT)
    for a, b in zip(found, generation(Eager(net, lambda step: step % 3 == 0), 0, 7, CONTEXT), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert module.statistics == {"full": 3, "reuse": 4}


def edited(bundle: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["loop"]["variants"].update(reuse=["other"]), "the entry 'other', which is not there"),
        (lambda m: m["loop"].update(schedule={"every": 1}), "never comes to the variant 'reuse'"),
        (lambda m: m["loop"].update(schedule={"never": 1}), "damaged"),
        (lambda m: m["loop"].update(variants={}), "damaged"),
        (lambda m: m["loop"]["states"]["deep"].update(shape=[2, 9]), "the state is deep"),
        (lambda m: m["loop"].pop("states"), "damaged"),
        (lambda m: m["entries"].pop("reuse"), "the entry 'reuse', which is not there"),
        (lambda m: m["loop"].update(schedule={"policy": {"wish": {}}}), "unknown policy 'wish'"),
        (lambda m: m["loop"].update(schedule={"policy": {"threshold": {}}}), "threshold"),
        (lambda m: m["loop"].update(schedule={"policy": {"threshold": {"threshold": 1}}}), "which no entry tells"),
    ],
)
def test_a_loop_that_is_not_legal_is_not_run(change, message, tmp_path, write_bundle):
    bundle = edited(write_bundle(tmp_path / "bundle", cached()[0]), change)
    with pytest.raises(UserError, match=message):
        optpass.load(bundle)
