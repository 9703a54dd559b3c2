"""ONNX Runtime's engines of Programs, for pages that time them beside each other."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from optpass.evaluate.latency import Comparison, compare_latency
from optpass.evaluate.trials import random_inputs
from optpass.ir.program import Program
from optpass.pipeline.registry import target_class
from optpass.pipeline.target import Lowering, Runner


def engine(program: Program) -> Runner:
    """``program`` in ONNX Runtime on one thread, from a file that is gone again."""
    target: Any = target_class("onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        entry = target(threads=1).lower(program, Lowering(Path(folder)))["full"]
        record = {"engine": entry.main, "outputs": [spec.as_json() for spec in entry.outputs], "details": entry.details}
        return target.load(Path(folder), record, {"threads": 1})  # type: ignore[no-any-return]


def timed(before: Program, after: Program, *, runs: int, warmup: int) -> Comparison:
    """The time of a random call of ``after`` beside ``before``, in turn."""
    inputs = random_inputs(before.entries["full"].inputs_at(), {}, seed=0)
    return compare_latency(("before", engine(before)), ("after", engine(after)), [inputs], runs=runs, warmup=warmup)
