"""The command line: parses, calls the library, prints. Exit 0 done, 1 our fault, 2 yours, 3 a gate."""

from __future__ import annotations

import gc
import shlex
import sys
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from optpass import __version__, cli_targets, console
from optpass.cli_options import Debug, Json
from optpass.errors import OptpassError, UserError
from optpass.quiet import quiet_imports

if TYPE_CHECKING:
    from optpass.capture.spans import Size

app = typer.Typer(
    name="optpass",
    help="Apply a recipe of optimisation passes to a vision model's checkpoint and emit a deployable engine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Inputs = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads the annotation at run time
    typer.Option(
        "--inputs",
        metavar="NAME=1x4x64x64",
        help="Size of an input, or of a dimension that inputs share; 1..4 or 64..512:8 stays open. Repeat for several.",
    ),
]
Weights = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--weights", help="Weights of a Python factory: .safetensors, or .pth (loaded weights-only)."),
]
Component = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--component", help="A component of a pipeline folder (default: its denoiser), or a module of a model."
    ),
]
Dtype = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--dtype", metavar="auto|float32|float16|bfloat16", help="Capture in this dtype; auto is the checkpoint's own."
    ),
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings.")]
StructureOnly = Annotated[
    bool, typer.Option("--structure-only", help="Read no weights: costs and the report, no engine.")
]
Unhealed = Annotated[
    bool, typer.Option("--unhealed", help="Take passes that need training without it; quality is then undefined.")
]


@app.command()
def apply(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of an installed recipe.")],
    checkpoint: Annotated[str, typer.Argument(help="Folder, .pt2, or file.py:function.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The bundle's folder; it must not exist.")],
    target: Annotated[Optional[str], typer.Option("--target", help="Instead of the recipe's.")] = None,  # noqa: UP045
    settings: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", metavar="PASS.OPTION=VALUE", help="Override an option of a pass or the target."),
    ] = None,
    inputs: Inputs = None,
    weights: Weights = None,
    component: Component = None,
    dtype: Dtype = None,
    structure_only: StructureOnly = False,
    unhealed: Unhealed = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing bundle, once the new one is finished.")
    ] = False,
    verify: Annotated[str, typer.Option(help="Execute the model to check contracts: auto, always, never.")] = "auto",
    baseline: Annotated[
        bool, typer.Option(help="Lower the original too, for latency and samples side by side.")
    ] = True,
    samples: Annotated[int, typer.Option(min=0, help="Samples generated before and after, for the report.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps of those samples.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of samples and of random inputs.")] = 0,
    print_ir: Annotated[
        str, typer.Option("--print-ir", metavar="before,after", help="Print the IR around every pass, on stderr.")
    ] = "",
    only_changed: Annotated[
        bool, typer.Option("--only-changed", help="Print the IR only of passes that modified it.")
    ] = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Carry NaN and Inf in weights over.")
    ] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Apply RECIPE to CHECKPOINT and write a bundle: engines, manifest, lock file and report."""
    from optpass.pipeline.apply import apply as apply_recipe
    from optpass.pipeline.dumps import PrintIr
    from optpass.pipeline.recipe import find_recipe, load_recipe
    from optpass.pipeline.request import Request

    _one_of("--verify", verify, ("auto", "always", "never"))
    printer = PrintIr.of(print_ir, only_changed=only_changed, write=console.err.out)
    loaded = load_recipe(find_recipe(recipe), overrides=parse_settings(settings or []), target=target)
    request = Request(
        checkpoint=checkpoint,
        out=out,
        inputs=parse_inputs(inputs or []),
        weights=weights,
        component=component,
        dtype=dtype,
        structure_only=structure_only,
        unhealed=unhealed,
        force=force,
        verify=verify,  # type: ignore[arg-type]
        baseline=baseline,
        samples=samples,
        steps=steps,
        seed=seed,
        allow_nonfinite=allow_nonfinite,
        trust_remote_code=trust_remote_code,
        command=shlex.join(["optpass", *sys.argv[1:]]),
    )
    with console.progress_display() as progress:
        applied = apply_recipe(loaded, request, callbacks=[printer], progress=progress)
    if as_json:
        console.print_json({"bundle": str(applied.folder), **applied.report})
    else:
        console.report_summary(applied.report, str(applied.folder))


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of an installed recipe.")],
    checkpoint: Annotated[str, typer.Argument(help="Folder, .pt2, or file.py:function; a config.json alone will do.")],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("-o", "--out", help="Where the bundle would go; its disk is looked at."),
    ] = None,
    target: Annotated[Optional[str], typer.Option("--target", help="Instead of the recipe's.")] = None,  # noqa: UP045
    settings: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", metavar="PASS.OPTION=VALUE", help="Override an option of a pass or the target."),
    ] = None,
    inputs: Inputs = None,
    weights: Weights = None,
    component: Component = None,
    dtype: Dtype = None,
    assume_weights: Annotated[
        bool, typer.Option("--assume-weights", help="Plan as though a checkpoint without weights had them.")
    ] = False,
    structure_only: StructureOnly = False,
    unhealed: Unhealed = False,
    force: Annotated[bool, typer.Option("--force", help="The bundle would replace an existing one.")] = False,
    verify: Annotated[str, typer.Option(help="As the apply would be given it: auto, always, never.")] = "auto",
    baseline: Annotated[bool, typer.Option(help="As the apply would be given it.")] = True,
    samples: Annotated[int, typer.Option(min=0, help="As the apply would be given it.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="As the apply would be given it.")] = 20,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Foresee what `apply` would do and take, without executing the model or reading a weight.

    Costs after each pass, memory, disk, bytes read, what the target lacks, which passes need data or training.
    Exit 0: the recipe would go through. Exit 2: it would be refused, for the reasons shown.
    """
    from optpass.console_plan import show_plan
    from optpass.pipeline.plan import NOWHERE
    from optpass.pipeline.plan import plan as plan_recipe
    from optpass.pipeline.recipe import find_recipe, load_recipe
    from optpass.pipeline.request import Request

    _one_of("--verify", verify, ("auto", "always", "never"))
    loaded = load_recipe(find_recipe(recipe), overrides=parse_settings(settings or []), target=target)
    request = Request(
        checkpoint=checkpoint,
        out=out or NOWHERE,
        inputs=parse_inputs(inputs or []),
        weights=weights,
        component=component,
        dtype=dtype,
        structure_only=structure_only,
        unhealed=unhealed,
        force=force,
        verify=verify,  # type: ignore[arg-type]
        baseline=baseline,
        samples=samples,
        steps=steps,
        trust_remote_code=trust_remote_code,
        command=shlex.join(["optpass", *sys.argv[1:]]),
    )
    with console.progress_display() as progress:
        found = plan_recipe(loaded, request, assume_weights=assume_weights, progress=progress)
    if as_json:
        console.print_json(found.as_json())
    else:
        show_plan(found.as_json())
    if found.refusals:
        raise typer.Exit(UserError.exit_code)


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="Folder, .pt2, or file.py:function.")],
    inputs: Inputs = None,
    weights: Weights = None,
    component: Component = None,
    dtype: Dtype = None,
    depth: Annotated[int, typer.Option(min=1, help="Levels of the module table.")] = 2,
    text: Annotated[bool, typer.Option("--text", help="Print the graph in the text form of the IR.")] = False,
    groups: Annotated[
        bool,
        typer.Option("--groups", help="Axes that can be pruned, with all that goes together, and why others cannot."),
    ] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a checkpoint computes and what it costs, without running it."""
    from optpass.inspection import inspect_program

    with console.progress_display() as progress:
        program, facts = inspect_program(
            checkpoint,
            inputs=parse_inputs(inputs or []),
            weights=weights,
            component=component,
            dtype=dtype or "auto",
            depth=depth,
            groups=groups,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        console.print_json(facts)
    elif groups:
        console.axes_tables(facts["axes"])
    elif text:
        from optpass.ir.text import program_text

        sys.stdout.write(program_text(program))
    else:
        _print_inspection(facts)


def _print_inspection(facts: dict[str, Any]) -> None:
    console.out.print(f"[bold]{facts['checkpoint']['class']}[/bold]  {facts['checkpoint']['name']}")
    for name, entry in facts["entries"].items():
        shapes = [f"{spec['name']} {spec['dtype']}[{', '.join(map(str, spec['shape']))}]" for spec in entry["inputs"]]
        console.out.print(f"{name}({', '.join(shapes)}), {entry['nodes']} nodes", markup=False)
        for item in entry["dimensions"]:
            steps = f" in steps of {item['step']}" if item["step"] > 1 else ""
            span = f"{item['minimum']} to {item['maximum']}{steps}; costs at {item['example']}"
            console.out.print(f"{item['name']}: {span}", markup=False)
        console.out.print()
        rows = [console.totals_row("total", entry["totals"])]
        console.out.print(console.table("", console.TOTALS_HEADERS, rows))
        console.out.print()
        console.out.print(console.cost_table("module", entry["by_module"]))
        console.out.print()
        console.out.print(console.cost_table("operator", entry["by_operator"]))
        console.uncounted(entry["uncounted"])
    console.out.print("\n1 MAC = 2 FLOP; linear, convolution, matmul and attention are counted", style="dim")


@app.command()
def passes(
    name: Annotated[Optional[str], typer.Argument(help="Show one pass in full.")] = None,  # noqa: UP045
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the installed passes, or document one."""
    from optpass.pipeline.registry import pass_class, pass_names

    if name is None:
        found = {each: pass_class(each) for each in pass_names()}
        if as_json:
            return console.print_json(
                {"passes": [{"name": n, "summary": p.summary(), "contract": str(p.contract)} for n, p in found.items()]}
            )
        rows = [[n, str(p.contract), p.summary()] for n, p in found.items()]
        return console.out.print(console.table("", ("pass", "contract", "what it does"), rows, left=3))
    facts = {"name": name, **pass_class(name).documentation()}
    if as_json:
        return console.print_json(facts)
    console.out.print(f"[bold]{name}[/bold]  contract: {facts['contract']}\n")
    console.out.print(facts["documentation"], markup=False)
    rows = [
        [option, item["type"], "required" if item["required"] else str(item["default"]), item["description"]]
        for option, item in facts["options"].items()
    ]
    if rows:
        console.out.print()
        console.out.print(console.table("", ("option", "type", "default", ""), rows, left=4))
    return None


app.add_typer(cli_targets.app)


@app.command()
def recipes(as_json: Json = False, debug: Debug = False) -> None:
    """List the installed recipes."""
    from optpass.pipeline.recipe import load_recipe
    from optpass.pipeline.registry import recipe_files

    found = {name: load_recipe(path) for name, path in recipe_files().items()}
    if as_json:
        return console.print_json(
            {"recipes": [{"name": n, "file": str(recipe_files()[n]), **r.as_document()} for n, r in found.items()]}
        )
    rows = [[n, " → ".join([*(step.name for step in r.steps), r.target_name]), r.description] for n, r in found.items()]
    return console.out.print(console.table("", ("recipe", "passes → target", "description"), rows, left=3))


@app.command()
def run(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("-o", "--out", help="Folder for what comes out; must not exist."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many samples to generate.")] = 10,
    prompt: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="What to generate, for pipelines that read text."),
    ] = None,
    image: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Image file, for pipelines that start from one."),
    ] = None,
    labels: Annotated[
        str, typer.Option(help="Class labels, comma-separated, taken in turn; the first ten by default.")
    ] = "",
    steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Sampling steps; 20, or as many as the bundle was made for."),
    ] = None,
    guidance: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Classifier-free guidance scale; the pipeline's own, or none for a bundle made so."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first sample; the next ones count up.")] = 0,
    tensors: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--input", metavar="NAME=FILE.npy", help="Call the engine once on these inputs instead."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write into an existing folder.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Generate samples with a bundle, or answer for given inputs."""
    from optpass.runtime.running import answer, sample
    from optpass.runtime.sampling import LABELS, Asked

    with console.progress_display() as progress:
        if tensors:
            facts = answer(bundle, parse_pairs("--input", tensors), out, force=force)
        else:
            facts = sample(
                bundle,
                out,
                samples=samples,
                asked=Asked(prompt, tuple(parse_labels(labels) or LABELS), steps=steps, guidance=guidance),
                image=image,
                seed=seed,
                force=force,
                progress=progress,
            )
    if as_json:
        return console.print_json(facts)
    for key, value in facts.items():
        if value is None:
            continue
        console.out.print(f"{key}: {value}", markup=False)
    return None


@app.command()
def refit(
    bundle: Annotated[Path, typer.Argument(help="A bundle built with merge-lora: {mode: refit} or {mode: keep}.")],
    adapters: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Argument(help="Adapter files or folders, instead of those that are in it; none takes them out."),
    ] = None,
    scale: Annotated[
        Optional[list[float]],  # noqa: UP045
        typer.Option("--scale", help="Strength of every adapter; or repeat it, once for each."),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("-o", "--out", help="Change a copy here, and leave the bundle as it is."),
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Take every adapter out: the base model's own weights.")] = False,
    component: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--component", help="Only this component of a pipeline."),
    ] = None,
    strict: Annotated[
        bool, typer.Option(help="Whether a tensor of an adapter that changes nothing is an error.")
    ] = True,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Put other adapters into a finished BUNDLE: only the tensors that they change are written."""
    from optpass.runtime.refit import refit as refit_bundle

    paths = list(adapters or [])
    if bool(paths) == base:
        raise UserError("name the adapters to put in, or pass --base to take all out")
    if base and scale:
        raise UserError("--base takes all adapters out: there is nothing to --scale")
    if not all(map(isfinite, scale or [])):
        raise UserError("--scale is a finite number")
    with console.progress_display() as progress:
        strengths = list(zip(paths, _strengths(scale or [1.0], len(paths)), strict=True))
        done = refit_bundle(bundle, strengths, component=component, strict=strict, out=out, progress=progress)
    if as_json:
        return console.print_json(done.as_json())
    for key, reason in done.left_out:
        console.out.print(f"left out {key}: {reason}", markup=False)
    inside = ", ".join(done.content) or "no adapter"
    megabytes = done.bytes / 2**20
    return console.out.print(
        f"{done.bundle}: {inside}; {done.tensors} tensors, {megabytes:.1f} MiB written", markup=False
    )


def _strengths(given: list[float], count: int) -> list[float]:
    if len(given) not in (1, count):
        raise UserError(f"--scale is given {len(given)} times for {count} adapters: once, or once for each")
    return given * count if len(given) == 1 else given


@app.command()
def compare(
    reference: Annotated[str, typer.Argument(help="A bundle, or a checkpoint (run by PyTorch).")],
    bundle: Annotated[Path, typer.Argument(help="The bundle to compare.")],
    samples: Annotated[int, typer.Option(min=0, help="Samples for the quality metrics; 0 leaves them out.")] = 10,
    steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Sampling steps; 20, or as many as the bundle was made for."),
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Timed calls of each, alternating.")] = 20,
    seed: Annotated[int, typer.Option()] = 0,
    modules: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="DEPTH|PATTERN",
            help="Only how far modules depart from checkpoint to engine: those so many levels deep, or '*.attn1'.",
        ),
    ] = None,
    component: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--component", help="With --modules: a lowered component (default: the denoiser)."),
    ] = None,
    bound: Annotated[float, typer.Option(help="With --modules: dB below which a stage departs.")] = 40.0,
    drop: Annotated[float, typer.Option(help="With --modules: dB below every module before, likewise.")] = 20.0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare numerics, quality and latency of a bundle with another one or its checkpoint; or module by module."""
    if modules is not None:
        from optpass.console_modules import show
        from optpass.evaluate.module_differences import module_differences

        with console.progress_display() as progress:
            found = module_differences(
                reference, bundle, modules, component=component, bound=bound, drop=drop, seed=seed, progress=progress
            ).as_json()
        return console.print_json(found) if as_json else show(found)
    from optpass.evaluate.comparison import compare as compare_models

    with console.progress_display() as progress:
        facts = compare_models(reference, bundle, samples=samples, steps=steps, runs=runs, seed=seed, progress=progress)
    if as_json:
        return console.print_json(facts)
    numeric = facts["difference"]
    console.out.print(
        f"relative error {numeric['relative_error']:.3g}, max {numeric['max_abs']:.3g}, SNR {numeric['snr']:.1f} dB"
    )
    console.out.print(console.latency_line(facts["latency"]), markup=False)
    if facts["samples"]:
        console.out.print(f"PSNR of samples at equal seeds: {facts['samples']['psnr']:.1f} dB")
        headers = ("", *facts["samples"]["quality_before"])
        rows = [
            [label, *(f"{value:.4g}" for value in facts["samples"][key].values())]
            for label, key in (("reference", "quality_before"), ("bundle", "quality_after"))
        ]
        console.out.print(console.table("", headers, rows))
    return None


@app.command()
def bench(
    bundles: Annotated[list[Path], typer.Argument(help="Bundles' folders; the others are told against the first.")],
    runs: Annotated[int, typer.Option(min=1, help="Turns of each; fewer than 8 tell no difference.")] = 20,
    warmup: Annotated[int, typer.Option(min=0, help="Calls of each before anything counts.")] = 3,
    seconds: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0, help="Measure for so long, all together, instead of --runs."),
    ] = None,
    threads: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Threads of every engine; by default as each was built for."),
    ] = None,
    batch: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Batch of engines that have it open; by default as captured."),
    ] = None,
    sample: Annotated[
        bool, typer.Option("--sample", help="Time whole generations of a denoiser, step after step by its schedule.")
    ] = False,
    steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Steps of --sample; 20, or as many as the bundle was made for."),
    ] = None,
    component: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--component", help="A lowered component of a pipeline (default: its denoiser)."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("-o", "--out", help="Write the table to FILE.md, or everything to FILE.json."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure bundles side by side: latency, throughput and memory, in alternating turns, a process each."""
    from optpass.console_bench import markdown, show
    from optpass.evaluate.bench import Effort
    from optpass.evaluate.bench import bench as measure
    from optpass.evaluate.bench_bundle import bundle_contestants

    if out is not None:
        _one_of("--out", out.suffix, (".md", ".json"))
    if steps is not None and not sample:
        raise UserError("--steps are those of --sample")
    contestants = bundle_contestants(
        bundles, component=component, threads=threads, batch=batch, steps=steps, sample=sample, seed=seed
    )
    with console.progress_display() as progress:
        found = measure(contestants, Effort(runs, warmup, seconds, threads), progress=progress)
    command = shlex.join(["optpass", *sys.argv[1:]])
    record = {"command": command, **found.as_json()}
    if out is not None:
        out.write_text(markdown(record, command) if out.suffix == ".md" else console.json_text(record), "utf-8")
    return console.print_json(record) if as_json else show(record)


@app.command("new-pass")
def new_pass(
    name: Annotated[str, typer.Argument(help="Name of the pass, in-kebab-case.")],
    directory: Annotated[
        Path, typer.Option("--directory", help="An optpass checkout, or where your package goes.")
    ] = Path(),
    package: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--package", help="Write it into this package of your own, made if it is not there."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a new pass, its test and its registration, ready to run."""
    from optpass.pipeline.scaffold import new_pass as write_pass

    written = [str(path) for path in write_pass(name, destination=directory, package=package)]
    if as_json:
        return console.print_json({"written": written})
    for path in written:
        console.out.print(path, markup=False)
    return None


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    """Apply a recipe of optimisation passes to a vision model's checkpoint and emit a deployable engine."""
    if show:
        console.out.print(f"optpass {__version__}")
        raise typer.Exit


def parse_inputs(items: Sequence[str]) -> dict[str, tuple[Size, ...]]:
    """``["sample=1x4x64x64"]`` → ``{"sample": (1, 4, 64, 64)}``; a size may be a range, ``64..512:8``.

    Raises:
        UserError: an item has another form.
    """
    from optpass.capture.spans import size_from

    return {
        name: tuple(size_from(part, f"--inputs {name}={text}") for part in text.split("x")) if text else ()
        for name, text in parse_pairs("--inputs", items).items()
    }


def parse_settings(items: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``["cast.dtype=float16"]`` → ``{"cast": {"dtype": "float16"}}``; values are YAML.

    Raises:
        UserError: an item has another form.
    """
    import yaml

    settings: dict[str, dict[str, Any]] = {}
    for place, text in parse_pairs("--set", items).items():
        name, dot, option = place.rpartition(".")
        if not dot or not name or not option:
            raise UserError(f"--set {place}={text}: expected PASS.OPTION=VALUE")
        try:
            settings.setdefault(name, {})[option] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"--set {place}={text}: the value is not valid YAML") from None
    return settings


def parse_pairs(flag: str, items: Sequence[str]) -> dict[str, str]:
    """``NAME=VALUE`` items of a repeatable flag.

    Raises:
        UserError: an item has no ``=``, or a name comes twice.
    """
    pairs: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise UserError(f"{flag} {item}: expected NAME=VALUE")
        if name in pairs:
            raise UserError(f"{flag} {name} is given twice")
        pairs[name] = value
    return pairs


def parse_labels(text: str) -> list[int] | None:
    """``"3,1,4"`` → ``[3, 1, 4]``; nothing → ``None``.

    Raises:
        UserError: a part is not a whole number.
    """
    try:
        return [int(part) for part in text.split(",")] if text else None
    except ValueError:
        raise UserError(f"--labels {text}: expected whole numbers separated by commas") from None


def _one_of(flag: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{flag} {value}: expected {', '.join(known)}")


def main() -> None:
    """Entry point of the ``optpass`` command."""
    quiet_imports()
    # Importing torch and diffusers makes a million objects that stay: collecting among them costs seconds.
    gc.set_threshold(200_000, 50, 1000)
    try:
        app()
    except KeyboardInterrupt:
        _fail("interrupted; nothing was left half-written", 130)
    except OptpassError as error:
        if "--debug" in sys.argv:
            raise
        hint = (
            f"\nreproduce with: optpass apply {error.reproducer}/recipe.yaml {error.reproducer}/program -o OUT"
            if error.reproducer
            else ""
        )
        _fail(f"{error}{hint}", error.exit_code, reproducer=error.reproducer)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        _fail(f"internal error: {type(error).__name__}: {error}\nrun again with --debug for the traceback", 1)


def _fail(message: str, code: int, *, reproducer: Path | None = None) -> None:
    if "--json" in sys.argv:
        error = {"message": message, "exit_code": code, "reproducer": str(reproducer) if reproducer else None}
        console.print_json({"error": error})
    console.err.print("[bold red]error:[/bold red]", end=" ")
    console.err.print(message, markup=False, soft_wrap=True)
    raise SystemExit(code)
