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
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_models import SIZES, Model

from optpass.console_bench import markdown
from optpass.errors import OptpassError, UserError
from optpass.evaluate.bench import Effort, bench
from optpass.evaluate.bench_bundle import bundle_contestants
from optpass.evaluate.bench_process import Contestant
from optpass.pipeline.apply import apply
from optpass.pipeline.recipe import make_recipe
from optpass.pipeline.registry import pass_names, target_names
from optpass.pipeline.request import Request

PEERS = Path(__file__).with_name("gpu_peers.py")
PACKAGES = {"deepcache": "DeepCache", "cache_dit": "cache_dit"}
BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "int8": 2}
"""Of a weight on the device; int8 engines of the torch target hold their weights in bfloat16."""
ROOM = 1.3
"""What a contestant takes beyond its weights, as a factor."""
NO_GPU = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--models", nargs="+", help="of those of this size; all by default")
    parser.add_argument("--precisions", nargs="+", choices=list(BYTES), default=list(BYTES))
    parser.add_argument("--target", default="torch", help="another target, on the CPU")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--out", type=Path, help="write the tables to this file too")
    options = parser.parse_args()
    if reason := _unfit(options.device, options.target):
        print(reason, file=sys.stderr)
        return NO_GPU
    models = SIZES[options.size]
    if unknown := set(options.models or ()) - set(models):
        parser.error(f"--models {', '.join(sorted(unknown))}: expected {', '.join(models)}")
    parts = [f"# Denoisers on {_device_name(options.device)}", "", f"`{shlex.join(sys.argv)}`", ""]
    for name in options.models or models:
        with tempfile.TemporaryDirectory() as folder:
            parts += _model_tables(name, models[name], Path(folder), options)
    page = "\n".join(parts) + "\n"
    print(page)
    if options.out:
        options.out.write_text(page, encoding="utf-8")
    return 0


def _unfit(device: str, target: str) -> str:
    """Why nothing can be measured here; empty where it can."""
    if device == "cuda" and not torch.cuda.is_available():
        build = "this build of PyTorch has no CUDA" if torch.version.cuda is None else "PyTorch finds no GPU"
        return f"bench-gpu: no GPU to measure on: {build} ({torch.__version__})"
    return "" if target in target_names() else f"bench-gpu: target {target!r} is not installed"


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "the CPU"


def _model_tables(name: str, model: Model, folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """A section of Markdown for each precision."""
    checkpoint = folder / "checkpoint"
    weights = model.write(checkpoint) // 2
    for precision in options.precisions:
        yield from (f"## {name}, {precision}", "")
        if precision not in model.precisions:
            yield from ("Left out: its weights and activations are too large in this precision.", "")
            continue
        contestants, notes = _contestants(model, checkpoint, folder / precision, precision, options)
        for group in _groups(contestants, weights * BYTES[precision], options.device):
            found, label = _measured(group, options.runs), f"{name}, {precision}: {', '.join(c.label for c in group)}"
            yield found if isinstance(found, str) else markdown(found, label)
            yield ""
        yield from (*(f"- {note}" for note in notes), "")
        shutil.rmtree(folder / precision, ignore_errors=True)


def _measured(group: Sequence[Contestant], runs: int) -> Mapping[str, Any] | str:
    """The record of a benchmark, or why there is none."""
    try:
        return bench(group, Effort(runs=runs)).as_json()
    except OptpassError as error:
        return f"Not measured: {error}"


def _contestants(
    model: Model, checkpoint: Path, folder: Path, precision: str, options: argparse.Namespace
) -> tuple[list[Contestant], list[str]]:
    """PyTorch's own, then ours; and why some are missing."""
    shared = {"folder": str(checkpoint), "device": options.device, "precision": precision, "inputs": dict(model.inputs)}
    found = [Contestant("eager", f"{PEERS}:eager", shared), Contestant("torch.compile", f"{PEERS}:compiled", shared)]
    notes = []
    if importlib.util.find_spec(PACKAGES[model.peer]):
        arguments = {**shared, **model.peer_options}
        found.append(Contestant(f"{model.peer}, eager", f"{PEERS}:{model.peer}", arguments))
    else:
        notes.append(f"{PACKAGES[model.peer]} is not installed: pip install -e '.[peers]'")
    for label, caching in (("optpass", []), (f"optpass, one step of {model.every}", [model.caching])):
        try:
            found.append(_bundle(label, caching, model, checkpoint, folder, precision, options))
        except UserError as error:
            notes.append(f"{label} is missing: {error}")
    return found, notes


def _bundle(
    label: str,
    caching: Sequence[Mapping[str, Any]],
    model: Model,
    checkpoint: Path,
    folder: Path,
    precision: str,
    options: argparse.Namespace,
) -> Contestant:
    recipe = make_recipe(
        {
            "name": label,
            "dtype": "float32",
            "inputs": {name: list(shape) for name, shape in model.inputs.items()},
            "passes": [*caching, *_precision_passes(precision)],
            "target": {options.target: _target_options(options, precision)},
        }
    )
    out = folder / ("cached" if caching else "plain")
    folder.mkdir(exist_ok=True)
    apply(recipe, Request(str(checkpoint), out, verify="never", baseline=False, samples=0))
    [contestant] = bundle_contestants([out])
    return Contestant(label, contestant.loader, contestant.arguments)


def _precision_passes(precision: str) -> list[dict[str, Any]]:
    if precision == "int8":
        if "quantize" not in pass_names():
            raise UserError("the pass quantize is not installed")
        return [{"quantize": {"scheme": "int8"}}]
    return [{"cast": {"dtype": "bfloat16"}}] if precision == "bf16" else []


def _target_options(options: argparse.Namespace, precision: str) -> dict[str, Any]:
    if options.target != "torch":
        return {}
    return {"device": options.device, "matmul_precision": "high" if precision == "tf32" else "highest"}


def _groups(contestants: Sequence[Contestant], nbytes: float, device: str) -> list[list[Contestant]]:
    """All at once where they fit on the device, else each beside the first."""
    first, *others = contestants
    if device == "cpu" or len(contestants) * ROOM * nbytes < torch.cuda.mem_get_info()[0]:
        return [list(contestants)]
    return [[first, other] for other in others]


if __name__ == "__main__":
    sys.exit(main())
