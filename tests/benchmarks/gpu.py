"""Full-size denoisers on CUDA through the `torch` target, with and without feature caching, beside PyTorch's own ways.

Weights are random: times do not depend on them. For every model and precision one table: eager PyTorch,
`torch.compile`, DeepCache or cache-dit, and the bundles that `optpass apply` makes, in alternating turns, a process
each (`optpass bench`). Where they do not fit on the device together, each is measured beside eager PyTorch alone.

    make bench-gpu                                                             # writes docs/results/gpu.md
    python tests/benchmarks/gpu.py --device cpu --size tiny --precisions fp32  # the same code, without a GPU

Exits with 3 where there is no GPU. Needs the peers: ``pip install -e '.[peers]'``.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from gpu_models import SIZES, Model

from optpass.console_bench import markdown
from optpass.errors import OptpassError
from optpass.evaluate.bench import Effort, bench
from optpass.evaluate.bench_bundle import bundle_contestants
from optpass.evaluate.bench_process import Contestant
from optpass.pipeline.apply import apply
from optpass.pipeline.recipe import make_recipe
from optpass.pipeline.registry import target_names
from optpass.pipeline.request import Request
from optpass.runtime.bundle import MANIFEST

PEERS = Path(__file__).with_name("gpu_peers.py")
PACKAGES = {"deepcache": "DeepCache", "cache_dit": "cache_dit"}
BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "int8": 2}
"""Of a weight on the device; int8 engines of the torch target hold their weights in bfloat16."""
ROOM = 1.3
"""What a contestant takes beyond its weights, as a factor."""
NO_GPU = 3


@dataclass(frozen=True)
class Plan:
    """What is measured, and how."""

    device: str
    target: str
    precisions: Sequence[str]
    runs: int
    jobs: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--models", nargs="+", help="of those of this size; all by default")
    parser.add_argument("--precisions", nargs="+", choices=list(BYTES), default=list(BYTES))
    parser.add_argument("--target", default="torch", help="another target, on the CPU")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2, help="bundles built at once, before anything is measured")
    parser.add_argument("--folder", type=Path, help="keep checkpoints and bundles here, and use those that are here")
    parser.add_argument("--out", type=Path, help="write the tables to this file too")
    options = parser.parse_args()
    if reason := _unfit(options.device, options.target):
        print(reason, file=sys.stderr)
        return NO_GPU
    models = SIZES[options.size]
    if unknown := set(options.models or ()) - set(models):
        parser.error(f"--models {', '.join(sorted(unknown))}: expected {', '.join(models)}")
    plan = Plan(options.device, options.target, options.precisions, options.runs, options.jobs)
    command = shlex.join(["python", "tests/benchmarks/gpu.py", *sys.argv[1:]])
    lines = [f"# Denoisers on {_device_name(options.device)}", "", f"`{command}`", ""]
    for name in options.models or models:
        with _kept(options.folder, name) as folder:
            for section in _sections(name, models[name], folder, plan):
                print("\n".join(section), flush=True)
                lines += section
                if options.out:
                    options.out.write_text("\n".join(lines), encoding="utf-8")
    return 0


@contextmanager
def _kept(folder: Path | None, name: str) -> Iterator[Path]:
    """A model's folder in ``folder``; without one, a folder that is gone afterwards."""
    if folder is not None:
        yield folder / name.replace(" ", "-").lower()
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def _unfit(device: str, target: str) -> str:
    """Why nothing can be measured here; empty where it can."""
    if device == "cuda" and not torch.cuda.is_available():
        build = "this build of PyTorch has no CUDA" if torch.version.cuda is None else "PyTorch finds no GPU"
        return f"bench-gpu: no GPU to measure on: {build} ({torch.__version__})"
    return "" if target in target_names() else f"bench-gpu: target {target!r} is not installed"


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "the CPU"


def _sections(name: str, model: Model, folder: Path, plan: Plan) -> Iterator[list[str]]:
    """Lines of Markdown for each precision."""
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        model.write(checkpoint)
    weights = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) // 2
    measured = [precision for precision in plan.precisions if precision in model.precisions]
    bundles = _bundles(model, checkpoint, folder, measured, plan)
    for precision in plan.precisions:
        lines = [f"## {name}, {precision}", ""]
        if precision in measured:
            contestants, notes = _peers(model, checkpoint, precision, plan)
            for label, made in bundles[precision].items():
                if isinstance(made, str):
                    notes.append(f"{label} is missing: {made}")
                else:
                    contestants += [Contestant(label, one.loader, one.arguments) for one in bundle_contestants([made])]
            for group in _groups(contestants, weights * BYTES[precision], plan.device):
                lines += [*_table(group, f"{name}, {precision}", plan.runs), ""]
            lines += [*(f"- {note}" for note in notes), ""]
        else:
            lines += ["Left out: its weights and activations are too large in this precision.", ""]
        yield lines


def _table(group: Sequence[Contestant], title: str, runs: int) -> list[str]:
    """What was measured, and why some were not."""
    try:
        found = bench(group, Effort(runs=runs), leave_out=True, progress=_said)
    except OptpassError as error:
        return [f"Not measured: {error}"]
    label = f"{title}: {', '.join(row.latency.label for row in found.rows)}"
    missing = [f"- {name} is missing: {' '.join(reason.split())[:400]}" for name, reason in found.left_out.items()]
    return [markdown(found.as_json(), label), *missing]


def _said(stage: str, fraction: float) -> None:
    """A line where a step of a long way begins and where it ends, with the time."""
    if fraction in (0.0, 1.0) or stage.startswith("load"):
        print(f"{time.strftime('%X')} {stage} {fraction:.0%}", file=sys.stderr, flush=True)


def _peers(model: Model, checkpoint: Path, precision: str, plan: Plan) -> tuple[list[Contestant], list[str]]:
    """PyTorch's own; and why some are missing."""
    shared = {"folder": str(checkpoint), "device": plan.device, "precision": precision, "inputs": dict(model.inputs)}
    found = [Contestant("eager", f"{PEERS}:eager", shared), Contestant("torch.compile", f"{PEERS}:compiled", shared)]
    if importlib.util.find_spec(PACKAGES[model.peer]) is None:
        return found, [f"{PACKAGES[model.peer]} is not installed: pip install -e '.[peers]'"]
    return [*found, Contestant(f"{model.peer}, eager", f"{PEERS}:{model.peer}", {**shared, **model.peer_options})], []


def _bundles(
    model: Model, checkpoint: Path, folder: Path, precisions: Sequence[str], plan: Plan
) -> dict[str, dict[str, Path | str]]:
    """Ours by precision and label: the bundle's folder, or why there is none.

    All are built before anything is measured, so that no compiler disturbs a measurement.
    """
    forms: dict[str, list[Mapping[str, Any]]] = {"optpass": [], f"optpass, one step of {model.every}": [model.caching]}
    # Threads of Inductor and of tokenizers do not survive a fork.
    with ProcessPoolExecutor(plan.jobs, mp_context=get_context("spawn")) as pool:
        futures: dict[str, dict[str, Future[Path | str]]] = {
            precision: {
                label: pool.submit(
                    _built, _recipe(label, caching, model, precision, plan), checkpoint, folder / precision / str(index)
                )
                for index, (label, caching) in enumerate(forms.items())
            }
            for precision in precisions
        }
        return {one: {label: found.result() for label, found in made.items()} for one, made in futures.items()}


def _recipe(
    label: str, caching: Sequence[Mapping[str, Any]], model: Model, precision: str, plan: Plan
) -> dict[str, Any]:
    return {
        "name": label,
        "dtype": "float32",
        "inputs": {name: list(shape) for name, shape in model.inputs.items()},
        "passes": [*caching, *_precision_passes(precision)],
        "target": {plan.target: _target_options(plan, precision)},
    }


def _built(recipe: Mapping[str, Any], checkpoint: Path, out: Path) -> Path | str:
    """The bundle ``out``, if need be built, or why there is none. Runs in a process of its own."""
    if (out / MANIFEST).exists():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    request = Request(str(checkpoint), out, verify="never", baseline=False, samples=0)
    label = f"{out.parent.name}, {recipe['name']}"
    try:
        apply(make_recipe(recipe), request, progress=lambda stage, part: _said(f"{label}: {stage}", part))
    except OptpassError as error:
        return str(error)
    return out


def _precision_passes(precision: str) -> list[dict[str, Any]]:
    if precision == "int8":
        return [{"quantize": {"scheme": "int8"}}]
    return [{"cast": {"dtype": "bfloat16"}}] if precision == "bf16" else []


def _target_options(plan: Plan, precision: str) -> dict[str, Any]:
    if plan.target != "torch":
        return {}
    return {"device": plan.device, "matmul_precision": "high" if precision == "tf32" else "highest"}


def _groups(contestants: Sequence[Contestant], nbytes: float, device: str) -> list[list[Contestant]]:
    """All at once where they fit on the device, else each beside the first."""
    first, *others = contestants
    if device == "cpu" or len(contestants) * ROOM * nbytes < torch.cuda.mem_get_info()[0]:
        return [list(contestants)]
    return [[first, other] for other in others]


if __name__ == "__main__":
    sys.exit(main())
