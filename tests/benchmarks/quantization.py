"""int8 on the CPU beside NNCF alone, ONNX Runtime's quantize_static and Olive: latency in turn, held-out error.

python tests/benchmarks/quantization.py --out docs/results/quantization.md

Every engine of a model is built first; then all are called in turn, round after round, in one process. Ratios are of
the medians of pairs within a round. The error is that of held-out calls, against PyTorch in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import quantization_peers as peers
import torch
from quantization_models import CALIBRATION, HELD_OUT, Subject, subjects

import optpass
from optpass.pipeline.apply import apply
from optpass.pipeline.recipe import load_recipe
from optpass.pipeline.records import machine_text
from optpass.pipeline.request import Request

ROUNDS, WARMUP = 40, 5
OURS = "optpass"
LIMIT = 900
NOISE = 0.03
"""Ratios nearer to 1 than this are called the same."""
SQNR_MARGIN = 1.0


@dataclass
class Row:
    """One engine of one model: milliseconds of a call, signal to quantisation noise in dB; or why there is none."""

    model: str
    runtime: str
    form: str
    tool: str
    median: float | None = None
    p10: float | None = None
    p90: float | None = None
    sqnr: float | None = None
    error: str = ""


Build = Callable[[], peers.Runner]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default="resnet50,dit,moving-digits,digits-vit")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--limit", type=int, default=LIMIT, help="seconds in which an engine is to be built")
    options = parser.parse_args()
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    found: dict[str, list[Row]] = kept(options.out.with_suffix(".json"))
    with tempfile.TemporaryDirectory() as temporary:
        known = subjects(Path(temporary))
        for name in options.models.split(","):
            subject = known[name]()
            found[name] = measured(subject, Path(temporary, f"{name}.engines"), threads, options.rounds, options.limit)
            print(table(found[name]), flush=True)
            # What is done stays done, whatever the next model does.
            records = {key: [asdict(row) for row in rows] for key, rows in found.items()}
            options.out.with_suffix(".json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    rows = [row for each in found.values() for row in each]
    options.out.write_text(page(rows, options.rounds), encoding="utf-8")
    if broken := failures(rows):
        raise SystemExit("\n".join(broken))


def kept(path: Path) -> dict[str, list[Row]]:
    """The rows of models that were measured before."""
    if not path.exists():
        return {}
    return {name: [Row(**row) for row in rows] for name, rows in json.loads(path.read_text("utf-8")).items()}


def measured(subject: Subject, folder: Path, threads: int, rounds: int, limit: int) -> list[Row]:
    """Build every engine, then call them in turn."""
    folder.mkdir()
    built: list[tuple[Row, peers.Runner]] = []
    rows: list[Row] = []
    for (runtime, form, tool), build in builds(subject, folder, threads):
        row = Row(subject.title, runtime, form, tool)
        rows.append(row)
        try:
            started = time.perf_counter()
            with within(limit):
                built.append((row, build()))
            print(f"{subject.title}: {tool} {form} for {runtime}: {time.perf_counter() - started:.0f} s", flush=True)
        except Exception as error:
            row.error = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:160]}"
            print(f"{subject.title}: {tool} {form} for {runtime}: {row.error}", flush=True)
    with torch.no_grad():
        references = [subject.module(*call.values()).numpy() for call in subject.others]
    for row, run in built:
        row.sqnr = sqnr(references, [run(peers.arrays(call)) for call in subject.others])
    times: dict[int, list[float]] = {index: [] for index in range(len(built))}
    call = peers.arrays(subject.others[0])
    turns = random.Random(0)
    for number in range(WARMUP + rounds):
        # Another order in every round: what an engine leaves behind meets each of the others.
        for index in turns.sample(range(len(built)), len(built)):
            started = time.perf_counter()
            built[index][1](call)
            if number >= WARMUP:
                times[index].append((time.perf_counter() - started) * 1e3)
    for index, (row, _) in enumerate(built):
        tenths = quantiles(times[index], n=10, method="inclusive")
        row.median, row.p10, row.p90 = median(times[index]), tenths[0], tenths[-1]
    return rows


def builds(subject: Subject, folder: Path, threads: int) -> Iterator[tuple[tuple[str, str, str], Build]]:
    source = peers.export(subject, folder / "exported.onnx")
    calls = folder / "calls"
    calls.mkdir()
    for index, call in enumerate(subject.calls):
        torch.save(call, calls / f"{index:03}.pt")

    def ours(target: str, passes: list[Any], **options: Any) -> Build:
        return lambda: own(subject, folder, calls, {target: {**options, "threads": threads}}, passes)

    file = folder / "nncf.onnx"

    def nncf() -> Path:
        return file if file.exists() else peers.nncf_onnx(subject, source, file)

    quantized = [{"quantize": {"data": str(calls), "calls": len(subject.calls), "keep": subject.keep}}]
    yield ("ONNX Runtime", "fp32", OURS), ours("onnxruntime", [])
    yield ("ONNX Runtime", "fp32", "torch.onnx"), lambda: peers.ort_runner(source, threads)
    yield ("ONNX Runtime", "int8", OURS), ours("onnxruntime", quantized)
    yield ("ONNX Runtime", "int8", "NNCF on ONNX"), lambda: peers.ort_runner(nncf(), threads)
    static = folder / "static.onnx"
    yield (
        ("ONNX Runtime", "int8", "quantize_static"),
        lambda: peers.ort_runner(peers.ort_static(subject, source, static), threads),
    )
    yield (
        ("ONNX Runtime", "int8", "Olive"),
        lambda: peers.ort_runner(peers.olive(subject, source, folder / "olive"), threads),
    )
    for precision, form in (("f32", "fp32"), ("bf16", "bf16")):
        yield ("OpenVINO", form, OURS), ours("openvino", [], precision=precision)
        yield ("OpenVINO", form, "torch.onnx"), lambda p=precision: peers.openvino_runner(source, threads, p)
    yield ("OpenVINO", "int8", OURS), ours("openvino", quantized)
    yield ("OpenVINO", "int8", "NNCF on ONNX"), lambda: peers.openvino_runner(nncf(), threads)
    yield ("OpenVINO", "int8", "NNCF on FX"), lambda: peers.openvino_runner(peers.nncf_fx(subject), threads)


def own(subject: Subject, folder: Path, calls: Path, target: dict[str, Any], passes: list[Any]) -> peers.Runner:
    """The engine of a bundle, made as a user makes it."""
    out = Path(tempfile.mkdtemp(dir=folder)) / "bundle"
    recipe = out.with_suffix(".yaml")
    document = {"name": "benchmark", "dtype": "float32", "passes": [*subject.passes, *passes], "target": target}
    sizes = {name: list(value.shape) for name, value in subject.calls[0].items() if value.ndim}
    recipe.write_text(json.dumps({**document, "inputs": sizes}), encoding="utf-8")
    apply(load_recipe(recipe), Request(str(subject.checkpoint), out, verify="never", samples=0))
    module = optpass.load(out)

    def run(call: peers.Arrays) -> np.ndarray[Any, Any]:
        outputs = module.runner({s.name: torch.from_numpy(call[s.name]).to(s.dtype) for s in module.inputs})
        return next(iter(outputs.values())).numpy()

    return run


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """
    Raises:
        TimeoutError: what is inside takes longer.
    """

    def stop(*_: object) -> None:
        raise TimeoutError(f"not built within {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def sqnr(references: list[Any], found: list[Any]) -> float:
    signal = sum(float((reference.astype(np.float64) ** 2).sum()) for reference in references)
    noise = sum(float(((a.astype(np.float64) - b) ** 2).sum()) for a, b in zip(references, found, strict=True))
    return 10 * float(np.log10(signal / noise)) if noise else 300.0


def cells(rows: list[Row]) -> Iterator[tuple[Row, list[Row]]]:
    """Our engine of each model, runtime and form, and those of others."""
    for row in rows:
        if row.tool == OURS:
            same = [r for r in rows if (r.model, r.runtime, r.form) == (row.model, row.runtime, row.form)]
            yield row, [other for other in same if other is not row and other.median is not None]


def failures(rows: list[Row]) -> list[str]:
    """Cells in which ours is not the fastest within noise, or noisier than the best of others by more than 1 dB."""
    found = []
    for row, others in cells(rows):
        where = f"{row.model}, {row.form} in {row.runtime}"
        if row.median is None:
            found.append(f"{where}: {row.error}")
            continue
        if others and (ratio := row.median / min(other.median for other in others)) > 1 + NOISE:  # type: ignore[type-var]
            found.append(f"{where}: {ratio:.3f} of the fastest other's time")
        if row.form == "int8" and others:
            best = max(other.sqnr for other in others)  # type: ignore[type-var]
            if row.sqnr < best - SQNR_MARGIN:  # type: ignore[operator]
                found.append(f"{where}: {row.sqnr:.1f} dB, the best other has {best:.1f}")
    return found


def table(rows: list[Row]) -> str:
    lines = ["| model | runtime | form | by | ms (p10 … p90) | SQNR, dB |", "|---|---|---|---|---:|---:|"]
    for row in rows:
        if row.median is None:
            lines.append(f"| {row.model} | {row.runtime} | {row.form} | {row.tool} | {row.error} | |")
            continue
        tool = f"**{row.tool}**" if row.tool == OURS else row.tool
        timing = f"{row.median:.1f} ({row.p10:.1f} … {row.p90:.1f})"
        lines.append(f"| {row.model} | {row.runtime} | {row.form} | {tool} | {timing} | {row.sqnr:.1f} |")
    return "\n".join(lines)


def page(rows: list[Row], rounds: int) -> str:
    broken = failures(rows)
    verdict = "\n".join(f"- {line}" for line in broken) if broken else "In every cell."
    return f"""# int8 on the CPU, beside other tools

    make bench-quantization

{machine_text()}.
All engines of a model are called once a round, in random order, {rounds} rounds; medians of a call. The error
is that of {HELD_OUT} held-out calls against PyTorch in float32; calibration is {CALIBRATION} others, the same for all.
ONNX Runtime has no bf16 kernels on x86. All tools have their defaults; ours leaves the UNet's projections around
residual blocks real (`keep: "*.conv_shortcut"`, as `sensitivity` finds).

{table(rows)}

Ours is the fastest or within {NOISE:.0%} of it, at no more than {SQNR_MARGIN:g} dB below the best other:

{verdict}
"""


if __name__ == "__main__":
    main()
