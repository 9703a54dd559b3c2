"""What each target makes of each model: time, memory and size of the build, what runs natively, and how exact it is.

python tests/benchmarks/targets.py --targets openvino,iree --models vit,taef2 --out docs/results/targets.md

A target with options is written as a recipe writes it: ``--target 'tensorrt: {compute_capabilities: [SM86]}'``;
passes too: ``--passes '[quantize: {scheme: int8}]' --form int8``. Rows are merged with those in the JSON lines beside
``--out``: one for each target with its options, model and form. A model is applied by the command, in a process of its
own; the engine is then compared with ONNX Runtime's of the same Program, where it runs here. What fails becomes a row
with the message.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from checkpoints import write_checkpoint
from watched import watch

ROOT = Path(__file__).parents[2]
ASSETS = Path(os.environ.get("OPTPASS_ASSETS", ROOT.parent / "shared" / "assets"))
OPTPASS = str(Path(sys.executable).parent / "optpass")
REFERENCE = "onnxruntime"
FORM = "as stored"
RUNS, WARMUP, TRIALS = 15, 3, 2
MB, GB = 1e6, 1e9
LOG = re.compile(r" \(its whole log: [^)]*\)?")


@dataclass(frozen=True)
class Model:
    """A checkpoint: how it comes to lie in a folder, and flags of ``apply``.

    A ``large`` one is built and not run, unless asked.
    """

    title: str
    write: Callable[[Path], str]
    flags: tuple[str, ...] = ()
    large: bool = False


@dataclass
class Row:
    """One build. Seconds, bytes, decibels and milliseconds; ``None`` where a thing was not or cannot be measured.

    ``snr`` is the engine's against ONNX Runtime's of the same Program, ``snr_checkpoint`` against the checkpoint
    computed in float32; ``load`` is that of the machine while ``milliseconds`` were measured; ``coverage`` as
    :class:`optpass.pipeline.target.Coverage` has it, without the places.
    """

    model: str
    target: str
    options: dict[str, Any]
    form: str
    seconds: float | None = None
    resident: int | None = None
    bytes: int | None = None
    verified: str = ""
    coverage: dict[str, int] | None = None
    kernels: dict[str, int] | None = None
    snr: float | None = None
    snr_checkpoint: float | None = None
    milliseconds: float | None = None
    load: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    error: str = ""

    @property
    def busy(self) -> bool:
        """Whether others used the machine while times were taken, which then say nothing."""
        return self.load is None or self.load > 1.5 * (os.cpu_count() or 1)

    @property
    def key(self) -> tuple[str, str, str, str]:
        return (self.model, self.target, json.dumps(self.options, sort_keys=True), self.form)


def _vit(folder: Path) -> str:
    """ViT-Ti/16 with random weights: 12 layers, 197 tokens."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768, num_labels=1000)
    ViTForImageClassification(config).save_pretrained(folder)
    return str(folder)


def _sd15(folder: Path) -> str:
    write_checkpoint(ROOT / "tests" / "configs" / "sd15-unet", folder)
    return str(folder)


def _checkpoint(name: str) -> Callable[[Path], str]:
    return lambda folder: str(ROOT / "tests" / "checkpoints" / name)


TAEF2 = ASSETS / "taef2" / "taef2_decoder.pth"
MODELS = {
    "moving-digits": Model("moving-digits UNet, 5.2 M, video", _checkpoint("moving-digits")),
    "vit": Model("ViT-Ti/16, 12 layers, random weights", _vit),
    "digits-vit": Model("digits-vit, 12 layers", _checkpoint("digits-vit")),
    "taef2": Model(
        "TAEF2 decoder, 96×64 pixels", _checkpoint("taef2.py:decoder"), ("--weights", str(TAEF2), "--dtype", "float32")
    ),
    "sd15": Model("SD 1.5 UNet, 860 M, random float16 weights", _sd15, large=True),
}


@dataclass(frozen=True)
class Plan:
    """What is to be measured: targets with their options, passes in front, and how the rows call that."""

    targets: tuple[tuple[str, dict[str, Any]], ...]
    passes: list[Any]
    form: str
    dtype: str | None
    run_large: bool


def build(plan: Plan, model: Model, checkpoint: str, target: tuple[str, dict[str, Any]], out: Path) -> dict[str, Any]:
    """Apply to ``checkpoint``: the command's report, wall seconds and peak resident bytes.

    Raises:
        SystemExit: the command failed; with its output.
    """
    recipe = out.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump({"name": "bench", "passes": plan.passes, "target": {target[0]: target[1]}}))
    verify = "auto" if plan.run_large or not model.large else "never"
    flags = [*model.flags, *(["--dtype", plan.dtype] if plan.dtype else []), "--no-baseline", "--verify", verify]
    found = watch([OPTPASS, "apply", str(recipe), checkpoint, "-o", str(out), "--json", "--samples", "0", *flags])
    return {"report": json.loads(found.printed), "seconds": found.wall, "resident": found.resident}


def measure(plan: Plan, name: str, checkpoint: str, folder: Path) -> Iterator[Row]:
    """A row for every target of the plan."""
    model = MODELS[name]
    reference: Path | None = None
    if plan.run_large or not model.large:
        reference = folder / "reference"
        try:
            build(plan, model, checkpoint, (REFERENCE, {}), reference)
        except SystemExit as error:
            print(f"{name}: no reference: {_said(error)}", file=sys.stderr)
            reference = None
    for index, (target, options) in enumerate(plan.targets):
        row = Row(name, target, options, plan.form, versions=_versions(target))
        out = folder / f"{index}"
        try:
            found = build(plan, model, checkpoint, (target, options), out)
        except SystemExit as error:
            row.error = _said(error)
        else:
            _fill(row, found, out)
            if reference is not None and row.verified == "numerics":
                _compare(row, reference, out)
        yield row


def _fill(row: Row, found: Mapping[str, Any], out: Path) -> None:
    manifest = json.loads((out / "manifest.json").read_text("utf-8"))
    row.seconds, row.resident = round(found["seconds"], 1), found["resident"]
    row.verified = manifest["verified"]
    entries = list(manifest["entries"].values())
    written = {"report.html", "report.json", "recipe.lock.yaml", "manifest.json"}
    files = {file: item["bytes"] for file, item in manifest["files"].items()}
    row.bytes = sum(size for file, size in files.items() if file not in written and not file.startswith("components/"))
    covered = [entry["details"]["coverage"] for entry in entries if entry["details"].get("coverage")]
    if covered:
        row.coverage = {key: sum(item[key] for item in covered) for key in ("operators", "native")}
    row.kernels = entries[0]["details"].get("kernels")
    difference = found["report"].get("engine_difference")
    row.snr_checkpoint = difference and difference["snr"]


def _compare(row: Row, reference: Path, out: Path) -> None:
    command = [sys.executable, __file__, "--measure", str(reference), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        row.error = f"the engine does not run: {done.stderr.strip().splitlines()[-1][:300]}"
        return
    found = json.loads(done.stdout.splitlines()[-1])
    row.snr, row.milliseconds, row.load = found["snr"], found["milliseconds"], found["load"]


def compared(reference: Path, out: Path) -> dict[str, Any]:
    """How near two bundles of one model are on random inputs, in dB; the second's median time, if it runs natively."""
    from statistics import median
    from time import perf_counter

    import optpass
    from optpass.evaluate.difference import runners_difference
    from optpass.evaluate.trials import random_inputs
    from optpass.pipeline.registry import target_class
    from optpass.runtime.bundle import read_manifest

    before, after, manifest = optpass.load(reference), optpass.load(out), read_manifest(out)
    trials = [random_inputs(after.inputs_at(), manifest.input_ranges(), seed) for seed in range(TRIALS)]
    found: dict[str, Any] = {"snr": runners_difference(before.runner, after.runner, trials).as_dict()["snr"]}
    times = []
    if target_class(manifest.target.name).of(manifest.target.name, manifest.target.options).runs() == "native":
        for _ in range(WARMUP + RUNS):
            start = perf_counter()
            after.runner(trials[0])
            times.append((perf_counter() - start) * 1e3)
    return found | {"milliseconds": median(times[WARMUP:]) if times else None, "load": os.getloadavg()[0]}


def _said(error: SystemExit) -> str:
    """What a failed command said, in one line, without the place of its log."""
    return LOG.sub("", _quoted(error))


def _quoted(error: SystemExit) -> str:
    lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
    said = next((line for line in lines if line.startswith("{")), "")
    if said:
        try:
            return str(json.loads(said)["error"])[:400]
        except (ValueError, KeyError, TypeError):
            pass
    start = next(
        (index for index, line in enumerate(lines) if line.lower().startswith("error")), max(len(lines) - 3, 0)
    )
    return " ".join(lines[start:])[:400]


def _versions(target: str) -> dict[str, str]:
    """Versions of the packages that the target's extra names."""
    from importlib.metadata import requires

    found = {}
    for line in requires("optpass") or []:
        if f'extra == "{target}"' not in line:
            continue
        name = line.split(";")[0].split("[")[0].split(">")[0].split("=")[0].split("<")[0].strip()
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def merged(path: Path, rows: Iterable[Row]) -> list[Row]:
    """``rows`` in place of those of equal keys in the JSON lines of ``path``, which is written anew."""
    kept = [Row(**json.loads(line)) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []
    table = {row.key: row for row in [*kept, *rows]}
    order = list(MODELS)
    found = sorted(table.values(), key=lambda row: (order.index(row.model), row.form, row.target, row.key))
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in found), "utf-8")
    return found


INTRODUCTION = (
    "What every target makes of the same models. Seconds and peak resident memory are those of the whole `optpass "
    "apply` in a process of its own, evidence included. *Native* is the share of the engine's operators that the "
    "device's own kernels run, as its compiler says. The signal-to-noise ratios are the worst output's over random "
    "inputs: against ONNX Runtime's engine of the same Program, and against the checkpoint in float32 (what a form "
    "costs is in the second alone). Times are medians on this machine, of engines that run here at their own speed; "
    "an engine that was compiled and not run has none, and *busy* is where others used the machine meanwhile (the "
    "times are in the rows, with the load)."
)


def page(rows: list[Row]) -> str:
    """The Markdown page."""
    lines = ["# Targets", "", INTRODUCTION]
    for name in dict.fromkeys(row.model for row in rows):
        lines += ["", f"## {MODELS[name].title}", "", HEADER, f"|{'---|' * HEADER.count(' | ')}---|"]
        lines += [_line(row) for row in rows if row.model == name]
    lines += ["", "Printed by `python tests/benchmarks/targets.py`; its rows are in [targets.json](targets.json)."]
    return "\n".join(lines) + "\n"


HEADER = "| target | form | build s | peak GB | engine MB | native | dB to ORT | dB to checkpoint | ms | |"


def _line(row: Row) -> str:
    options = ", ".join(f"{key} {_written(value)}" for key, value in row.options.items())
    label = f"{row.target} ({options})" if options else row.target
    if row.error:
        return f"| {label} | {row.form} | | | | | | | | {row.error.replace('|', '/')} |"
    covered = f"{row.coverage['native']} of {row.coverage['operators']}" if row.coverage else ""
    kinds = ", ".join(f"{count} {kind}" for kind, count in (row.kernels or {}).items())
    notes = ["compiled only" if row.verified == "compiled-only" else "", kinds and f"products: {kinds}"]
    cells = [
        _number(row.seconds, 1),
        _number(row.resident and row.resident / GB, 2),
        _number(row.bytes and row.bytes / MB, 1),
        covered,
        _number(row.snr, 1),
        _number(row.snr_checkpoint, 1),
        "busy" if row.milliseconds and row.busy else _number(row.milliseconds, 1),
        "; ".join(filter(None, notes)),
    ]
    return f"| {label} | {row.form} | {' | '.join(cells)} |"


def _written(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _named(written: str) -> tuple[str, dict[str, Any]]:
    """``name``, or ``name: {option: value}`` as in a recipe."""
    found = yaml.safe_load(written)
    if isinstance(found, str):
        return found, {}
    [(name, options)] = found.items()
    return name, dict(options or {})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="", help="names, with commas")
    parser.add_argument("--target", action="append", default=[], help="one with options, as in a recipe")
    parser.add_argument("--models", default="moving-digits,vit,taef2", help=", ".join(MODELS))
    parser.add_argument("--passes", default="[]", help="YAML list of passes in front of the target")
    parser.add_argument("--form", default=FORM, help="how rows call what the passes make (int8, fp16 …)")
    parser.add_argument("--dtype", help="dtype of the capture; by default the checkpoint's own")
    parser.add_argument("--run-large", action="store_true", help="run large models too")
    parser.add_argument("--out", type=Path, help="the Markdown file; its rows go to the .json beside it")
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measure, and write rows and page."""
    arguments = _arguments()
    if arguments.measure:
        print(json.dumps(compared(*arguments.measure)))
        return 0
    named = [_named(name) for name in (*filter(None, arguments.targets.split(",")), *arguments.target)]
    passes = yaml.safe_load(arguments.passes)
    plan = Plan(tuple(named), passes, arguments.form, arguments.dtype, arguments.run_large)
    rows: list[Row] = []
    for name in arguments.models.split(","):
        with tempfile.TemporaryDirectory(prefix="optpass-targets-") as home:
            checkpoint = MODELS[name].write(Path(home, "checkpoint"))
            for row in measure(plan, name, checkpoint, Path(home)):
                print(json.dumps(asdict(row)), flush=True)
                rows.append(row)
                if arguments.out:
                    found = merged(arguments.out.with_suffix(".json"), [row])
                    arguments.out.write_text(page(found), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
