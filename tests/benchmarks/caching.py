"""Feature caching on moving-digits: our engines and Programs beside DeepCache's hooks, at equal seeds, in turn.

Every way makes one clip after the other way's, so that a machine that slows down slows all; what is measured of time,
error and quality is measured on these clips. Prints Markdown; ``--out FILE`` keeps it. Exits with 1 where a bound does
not hold. Needs the peers: ``pip install -e '.[peers]'``.

make bench-caching
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from caching_memory import bundles_in_memory
from caching_page import Row, bounds, page
from caching_peers import BRANCHES, deepcache, refusals
from torch import Tensor

from optpass.analysis.generation import generation_cost
from optpass.capture.sources import capture
from optpass.evaluate.quality import Evaluator, psnr
from optpass.ir.program import Program
from optpass.pipeline.apply import apply
from optpass.pipeline.manager import run_passes
from optpass.pipeline.recipe import make_recipe
from optpass.pipeline.request import Request
from optpass.runtime.class_to_video import ClassToVideoPipeline
from optpass.runtime.loading import load
from optpass.runtime.looped import program_module

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests" / "checkpoints" / "moving-digits"
PERIODS = (2, 3, 5)
BUDGETS: Mapping[int, float] = {2: 1.7, 3: 2.1, 5: 2.9}
"""Speed-ups in MACs, beside the periods of which they are those or a little more, that calibration is asked for."""
OTHER_SEED = 1000
CUTS = ("up_blocks.2.resnets.0", "up_blocks.1")
CLIPS: Mapping[int, int] = {20: 10, 50: 5}
"""Clips of each way, by the number of steps."""
WARMUP_STEPS = 6
EAGER, DEEPCACHE, PYTORCH, ENGINE = "eager", "DeepCache", "PyTorch", "ONNX Runtime"
EXACT = ("single-token-attention", "hoist-invariants")
"""Passes that save work of every step, before the cut."""


@dataclass
class Way:
    """A pipeline, who caches in it, and what it made so far: clips, seconds of the loop and of the whole call.

    ``program`` is what its UNet was made from, or for a peer the Program that computes the same. ``cpu`` are the
    process's seconds on a core during the loop, which those of other processes do not lengthen.
    """

    owner: str
    pipeline: ClassToVideoPipeline
    program: Program
    cut: str = ""
    every: int = 1
    before: Sequence[str] = ()
    steps: int | None = None
    clips: list[Tensor] = field(default_factory=list)
    loop: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)

    def generate(self, index: int, steps: int) -> None:
        """Clip ``index``: digit index mod 10, noise from that seed. The loop ends with its last step's."""
        ended = busy = 0.0

        def note(*_: Any) -> None:
            nonlocal ended, busy
            ended, busy = time.perf_counter(), time.process_time()

        start, idle = time.perf_counter(), time.process_time()
        found = self.pipeline([index % 10], num_inference_steps=steps, seed=index, callback=note)
        self.whole.append(time.perf_counter() - start)
        self.loop.append(ended - start)
        self.cpu.append(busy - idle)
        self.clips.append(found.frames)


def recipe(cut: str, every: int, before: Sequence[str] = ()) -> Any:
    """An engine of one thread of the UNet after the passes ``before``, cached at ``cut`` or not at all."""
    passes = [*before, *([{"cache-features": {"cut": cut, "every": every}}] if cut else [])]
    settings = {"inputs": {"sample": [2, 8, 4, 16, 16]}, "dtype": "float32", "passes": passes}
    return make_recipe({**settings, "target": {"onnxruntime": {"threads": 1}}})


def ways(folder: Path, numbers: Sequence[int]) -> Iterator[Way]:
    """Uncached: the eager module, the captured Program in PyTorch, its engine. Then cached, with every period.

    Last those whose computed steps were calibrated, for each of the ``numbers`` of steps.
    """
    original = capture(CHECKPOINT, inputs={"sample": (2, 8, 4, 16, 16)}, dtype=torch.float32)
    yield Way(EAGER, _pipeline(), original)
    yield Way(PYTORCH, _pipeline(program_module(original)), original)
    yield _engine(original, folder, "", 1)
    for cut in CUTS:
        for every in PERIODS:
            engine = _engine(original, folder, cut, every)
            peer = Way(DEEPCACHE, _pipeline(), engine.program, cut, every)
            deepcache(peer.pipeline, cut, every)
            yield from (peer, engine)
            if cut == CUTS[-1]:
                yield Way(PYTORCH, _pipeline(program_module(engine.program)), engine.program, cut, every)
    for every in PERIODS:
        yield _engine(original, folder, CUTS[-1], every, EXACT)
    for steps in numbers:
        for every, budget in BUDGETS.items():
            yield _calibrated(original, folder, steps, every, budget)


def _calibrated(original: Program, folder: Path, steps: int, every: int, budget: float) -> Way:
    """As many MACs as a period of ``every`` at least saves, at the steps that other seeds than the table's tell."""
    passes = [
        {"cache-features": {"cut": CUTS[-1], "every": every}},
        {"calibrate-cache": {"speedup": budget, "steps": steps, "samples": 2, "guidance": 3.0, "seed": OTHER_SEED}},
    ]
    program, _ = run_passes(original, make_recipe({"passes": passes, "target": "program"}).steps)
    assert program.loop is not None
    [computed] = [value for key, value in program.loop.schedule.as_json().items() if key == "steps"]
    listed = {"cut": CUTS[-1], "steps": computed, "of": steps}
    settings = {"inputs": {"sample": [2, 8, 4, 16, 16]}, "dtype": "float32", "passes": [{"cache-features": listed}]}
    out = folder / f"calibrated-{steps}-{every}"
    made = make_recipe({**settings, "target": {"onnxruntime": {"threads": 1}}})
    apply(made, Request(str(CHECKPOINT), out, verify="never", baseline=False, samples=0))
    return Way(ENGINE, _pipeline(load(out)), program, CUTS[-1], every, ("calibrate-cache",), steps)


def _engine(original: Program, folder: Path, cut: str, every: int, before: Sequence[str] = ()) -> Way:
    made = recipe(cut, every, before)
    program, _ = run_passes(original, made.steps)
    out = folder / "-".join((*before, cut or "uncached", str(every)))
    apply(made, Request(str(CHECKPOINT), out, verify="never", baseline=False, samples=0))
    return Way(ENGINE, _pipeline(load(out)), program, cut, every, before)


def _pipeline(unet: Any = None) -> ClassToVideoPipeline:
    made = ClassToVideoPipeline.load(CHECKPOINT, unet=unet)
    made.set_progress_bar_config(disable=True)
    return made


def measured(all_ways: list[Way], steps: int, clips: int) -> list[Row]:
    """A row for each way after ``clips`` clips of ``steps`` steps."""
    evaluator = Evaluator.load(CHECKPOINT / "evaluator")
    all_ways = [way for way in all_ways if way.steps in (None, steps)]
    for way in all_ways:
        way.generate(0, WARMUP_STEPS)
        for made in (way.clips, way.loop, way.cpu, way.whole):
            made.clear()
    for index in range(clips):
        for way in all_ways:
            way.generate(index, steps)
        print(f"{steps} steps: {index + 1} of {clips} clips", file=sys.stderr, flush=True)
    return [_row(way, all_ways, steps, evaluator) for way in all_ways]


def _row(way: Way, all_ways: list[Way], steps: int, evaluator: Evaluator) -> Row:
    """Times against the way's own uncached form and against the eager one; errors against the former's clips."""
    owner = EAGER if way.owner == DEEPCACHE else way.owner
    own = next(other for other in all_ways if other.owner == owner and other.every == 1)
    eager = next(other for other in all_ways if other.owner == EAGER)
    frames, reference = torch.cat(way.clips), torch.cat(own.clips)
    labels = torch.arange(len(way.clips)) % 10
    quality = evaluator.measure(frames, labels)
    return Row(
        owner=" + ".join((way.owner, *way.before)),
        cut=way.cut,
        branch=BRANCHES.get(way.cut),
        every=way.every,
        steps=steps,
        seconds=tuple(way.loop),
        cpu=tuple(way.cpu),
        whole=tuple(way.whole),
        own=tuple(own.loop),
        own_cpu=tuple(own.cpu),
        own_whole=tuple(own.whole),
        eager=tuple(eager.loop),
        macs=generation_cost(own.program, steps).macs / generation_cost(way.program, steps).macs,
        psnr=psnr(frames, reference),
        error=float((frames - reference).norm() / reference.norm()),
        accuracy=quality.frame_accuracy,
        distance=quality.frechet_distance,
    )


def main() -> int:
    """Measure, print and keep the page; 1 where a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="*", default=list(CLIPS), help="numbers of steps")
    parser.add_argument("--clips", type=int, help="clips of each way, in place of the usual number")
    parser.add_argument("--out", type=Path, help="write the Markdown into this file")
    arguments = parser.parse_args()
    # One thread each: what else runs on a machine disturbs the operators of several threads most.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="optpass-bench-") as home:
        everyone = list(ways(Path(home), arguments.steps))
        rows = [row for steps in arguments.steps for row in measured(everyone, steps, _clips(steps, arguments.clips))]
    with tempfile.TemporaryDirectory(prefix="optpass-bench-") as home:
        memory = bundles_in_memory(Path(home))
    verdict = bounds(rows)
    text = page(rows, memory, refusals(_pipeline), verdict)
    print(text)
    if arguments.out:
        arguments.out.write_text(f"{text}\n", "utf-8")
    return 0 if all(bound.holds for bound in verdict) else 1


def _clips(steps: int, asked: int | None) -> int:
    return asked or CLIPS.get(steps, min(CLIPS.values()))


if __name__ == "__main__":
    sys.exit(main())
