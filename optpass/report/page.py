"""A report's mapping → everything the page's template prints, with no value left to be missing."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from optpass.report import charts, units
from optpass.report.animation import Reel, reel
from optpass.report.calibration_view import CalibrationView, calibration_view
from optpass.report.charts import Chart
from optpass.report.clips import Clips
from optpass.report.coverage_view import CoverageView, coverage_view
from optpass.report.ladder_view import RungView, ladder_view
from optpass.report.loop_view import LoopView, loop_view
from optpass.report.pass_views import COSTS, PassView, Verdict, changes, pass_views, verdict
from optpass.report.reading import amount, figure, mappings, plain, section, text
from optpass.report.scatter import Plot, plots
from optpass.report.sensitivity_view import SensitivityView, sensitivity_view
from optpass.report.structure_view import structure_charts
from optpass.report.summary import Tile, lede, tiles
from optpass.report.training_view import TrainingView, training_views

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class EngineView:
    """One engine file."""

    entry: str
    file: str
    size: str
    nodes: str
    details: Pairs
    coverage: CoverageView | None


@dataclass(frozen=True)
class GateView:
    """One gate: what it bounds and whether it held."""

    after: str
    metric: str
    bound: str
    value: str
    verdict: Verdict
    how: str


@dataclass(frozen=True)
class ComponentView:
    """One component of a pipeline: what was done to it, what it costs, how well its engines agree."""

    name: str
    class_name: str
    passes: str
    target: str
    changes: Mapping[str, units.Change]
    error: str
    latency: str


@dataclass(frozen=True)
class Page:
    """What ``page.jinja`` prints. Texts are untrusted and escaped there; SVG and PNG are made here."""

    name: str
    description: str
    created: str
    version: str
    structure_only: bool
    lede: tuple[str, ...]
    tiles: tuple[Tile, ...]
    checkpoint: Pairs
    checkpoint_name: str
    target_name: str
    target_options: Pairs
    target_verdict: Verdict | None
    engine_size: str
    passes: tuple[PassView, ...]
    totals: Mapping[str, units.Change]
    cost_labels: Pairs
    entries: tuple[tuple[str, Mapping[str, units.Change]], ...]
    charts: tuple[Chart, ...]
    plots: tuple[Plot, ...]
    ladder: tuple[RungView, ...]
    loop: LoopView | None
    calibration: CalibrationView | None
    sensitivity: SensitivityView | None
    trainings: tuple[TrainingView, ...]
    latency_chart: Chart | None
    latency_words: tuple[str, ...]
    reel: Reel | None
    sample_facts: Pairs
    quality: tuple[tuple[str, str, str], ...]
    gates: tuple[GateView, ...]
    engines: tuple[EngineView, ...]
    components: tuple[ComponentView, ...]
    engine_difference: Pairs
    recipe: str
    command: str
    machine: Pairs


def page_of(report: Mapping[str, Any], clips: Clips | None) -> Page:
    """The page of a report; keys that are missing leave their part of the page out."""
    passes = pass_views(report)
    totals = changes(report.get("before"), report.get("after"))
    target, checkpoint = section(report, "target"), section(report, "checkpoint")
    engines = tuple(_engine(record) for record in mappings(report, "engines"))
    return Page(
        name=text(report, "name") or "unnamed recipe",
        description=text(report, "description"),
        created=text(report, "created").replace("T", " ").replace("+00:00", " UTC"),
        version=text(report, "optpass"),
        structure_only=bool(report.get("structure_only")),
        lede=tuple(lede(report, passes, totals)),
        tiles=tuple(tiles(report, totals)),
        checkpoint=_checkpoint(report),
        checkpoint_name=text(checkpoint, "name") or "checkpoint",
        target_name=text(target, "name"),
        target_options=_pairs(section(target, "options")),
        target_verdict=_target_verdict(target),
        engine_size=_engine_size(report),
        passes=passes,
        totals=totals,
        cost_labels=tuple((key, label) for key, label, _ in COSTS),
        entries=_entries(report),
        charts=(*_charts(passes, totals), *structure_charts(report)),
        plots=plots(report),
        ladder=ladder_view(report),
        loop=loop_view(report),
        calibration=calibration_view(report),
        sensitivity=sensitivity_view(report),
        trainings=training_views(report),
        latency_chart=_latency_chart(section(report, "latency")),
        latency_words=_latency_words(section(report, "latency")),
        reel=None if clips is None or not len(clips.after) else reel(clips),
        sample_facts=_sample_facts(section(report, "samples")),
        quality=_quality(section(report, "samples")),
        gates=tuple(_gate(record) for record in mappings(report, "gates")),
        engines=engines,
        components=tuple(_component(record) for record in mappings(report, "components")),
        engine_difference=_difference(section(report, "engine_difference")),
        recipe=_yaml(report.get("recipe")),
        command=_command(report),
        machine=_machine(report),
    )


def _checkpoint(report: Mapping[str, Any]) -> Pairs:
    record = section(report, "checkpoint")
    names = (("class", "class"), ("component", "component"), ("kind", "kind"), ("pipeline", "pipeline"))
    facts = [(label, text(record, key)) for key, label in names if record.get(key) not in (None, "", False)]
    shapes = section(report, "inputs") or section(section(report, "recipe"), "inputs")
    facts += [(f"input {name}", _shape(shape)) for name, shape in shapes.items()]
    return (*facts, ("sha256", text(record, "sha256"))) if record.get("sha256") else tuple(facts)


def _shape(shape: Any) -> str:
    return " × ".join(str(size) for size in shape) if isinstance(shape, (list, tuple)) else plain(shape)


def _pairs(record: Mapping[str, Any]) -> Pairs:
    return tuple((str(key), plain(value)) for key, value in record.items())


def _target_verdict(target: Mapping[str, Any]) -> Verdict | None:
    words = text(target, "verified")
    return verdict(words) if words else None


def _engine_size(report: Mapping[str, Any]) -> str:
    sizes = [amount(record, "bytes") for record in mappings(report, "engines")]
    known = [value for value in sizes if value is not None]
    return units.size(sum(known)) if known and len(known) == len(sizes) else ""


def _engine(record: Mapping[str, Any]) -> EngineView:
    size, nodes = amount(record, "bytes"), amount(record, "nodes")
    return EngineView(
        text(record, "entry"),
        text(record, "file"),
        units.NO_VALUE if size is None else units.size(size),
        units.NO_VALUE if nodes is None else f"{nodes:,.0f}",
        _pairs({key: value for key, value in section(record, "details").items() if key != "coverage"}),
        coverage_view(record),
    )


def _component(record: Mapping[str, Any]) -> ComponentView:
    checkpoint, passes = section(record, "checkpoint"), mappings(record, "passes")
    error = figure(section(record, "engine_difference"), "relative_error")
    ratio = figure(section(section(record, "latency"), "ratio"), "median")
    return ComponentView(
        text(checkpoint, "component"),
        text(checkpoint, "class"),
        ", ".join(text(item, "name") for item in passes) or "none",
        text(section(record, "target"), "name"),
        changes(record.get("before"), record.get("after")),
        units.NO_VALUE if error is None else units.scientific(error),
        units.NO_VALUE if ratio is None else f"{ratio:.2f}",
    )


def _entries(report: Mapping[str, Any]) -> tuple[tuple[str, Mapping[str, units.Change]], ...]:
    before, after = (section(section(report, side), "entries") for side in ("before", "after"))
    return tuple((str(name), changes(before.get(name), after.get(name))) for name in {**before, **after})


def _charts(passes: tuple[PassView, ...], totals: Mapping[str, units.Change]) -> tuple[Chart, ...]:
    if not passes:
        return ()
    found: list[Chart | None] = [
        charts.waterfall(key, label, totals[key], [charts.Step(item.title, item.changes[key]) for item in passes])
        for key, label, _ in COSTS
    ]
    found.append(charts.errors([(item.title, item.relative_error, item.bound) for item in passes]))
    timed = [(item.title, item.seconds) for item in passes if item.seconds is not None]
    found.append(charts.durations(timed, units.seconds))
    return tuple(chart for chart in found if chart is not None)


def _latency_chart(latency: Mapping[str, Any]) -> Chart | None:
    timings = []
    for side in ("before", "after"):
        record = section(latency, side)
        median = amount(record, "median")
        if median is None:
            continue
        low, high, runs = (amount(record, key) for key in ("p10", "p90", "runs"))
        timings.append(
            charts.Timing(
                text(record, "label") or side,
                median,
                median if low is None else low,
                median if high is None else high,
                None if runs is None else int(runs),
            )
        )
    return charts.latencies(timings, text(latency, "unit") or "ms")


def _latency_words(latency: Mapping[str, Any]) -> tuple[str, ...]:
    ratio, told = section(latency, "ratio"), []
    middle = amount(ratio, "median")
    if middle is not None:
        low = amount(ratio, "p10" if "p10" in ratio else "min")
        high = amount(ratio, "p90" if "p90" in ratio else "max")
        name = "10th to 90th percentile" if "p10" in ratio else "least to most"
        spread = "" if low is None or high is None else f" ({name}: {low:.3f} to {high:.3f})"
        told.append(f"Pair by pair, after takes {middle:.3f} of the time of before{spread}; below 1 is faster.")
    if note := text(latency, "note"):
        told.append(f"{note[:1].upper()}{note[1:].rstrip('.')}.")
    return tuple(told)


def _sample_facts(samples: Mapping[str, Any]) -> Pairs:
    psnr = figure(samples, "psnr")
    facts = [(key, plain(samples[key])) for key in ("steps", "guidance", "seed") if samples.get(key) is not None]
    for key in ("steps", "guidance"):
        if samples.get(f"{key}_before") not in (None, samples.get(key)):
            facts.append((f"{key} of the original", plain(samples[f"{key}_before"])))
    return (*facts, ("PSNR", units.decibels(psnr))) if psnr is not None else tuple(facts)


def _quality(samples: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    before, after = section(samples, "quality_before"), section(samples, "quality_after")
    return tuple(
        (
            str(name).replace("_", " ").replace("frechet", "Fréchet"),
            _quality_value(name, before),
            _quality_value(name, after),
        )
        for name in {**before, **after}
    )


def _quality_value(name: str, side: Mapping[str, Any]) -> str:
    value = figure(side, name)
    if value is None:
        return units.NO_VALUE
    return f"{100 * value:.1f} %" if name == "frame_accuracy" else units.figures(value)


def _gate(record: Mapping[str, Any]) -> GateView:
    value, low, high = (figure(record, key) for key in ("value", "min", "max"))
    bounds = [f"at least {low:g}"] if low is not None else []
    bounds += [f"at most {high:g}"] if high is not None else []
    state = (
        Verdict("good", "✓", "held")
        if record.get("held") is True
        else Verdict(
            "bad", "✗", "did not hold: rolled back" if record.get("on_failure") == "rollback" else "did not hold"
        )
        if record.get("held") is False
        else Verdict("open", "○", "not checked")
    )
    measured = [f"{key} {plain(record[key])}" for key in ("clips", "steps", "seed") if record.get(key) is not None]
    how = ", ".join([*measured, *([text(record, "note")] if record.get("note") else [])])
    shown = units.NO_VALUE if value is None else f"{value:.4g}".replace("inf", "∞").replace("nan", "NaN")
    return GateView(text(record, "after"), text(record, "metric"), " and ".join(bounds), shown, state, how)


def _difference(record: Mapping[str, Any]) -> Pairs:
    if not record:
        return ()
    return (
        ("largest absolute error", units.scientific(figure(record, "max_abs"))),
        ("largest relative error", units.scientific(figure(record, "relative_error"))),
        ("signal to noise", units.decibels(figure(record, "snr"))),
    )


def _yaml(document: Any) -> str:
    if not document:
        return ""
    try:
        return yaml.safe_dump(document, sort_keys=False, default_flow_style=None, allow_unicode=True, width=10_000)
    except yaml.YAMLError:
        return plain(document)


def _command(report: Mapping[str, Any]) -> str:
    if given := text(report, "command"):
        return given
    checkpoint = text(section(report, "checkpoint"), "name") or "CHECKPOINT"
    flag = " --structure-only" if report.get("structure_only") else ""
    return f"optpass apply recipe.yaml {shlex.quote(checkpoint)} -o out{flag}"


def _machine(report: Mapping[str, Any]) -> Pairs:
    record = section(report, "machine")
    facts = [(str(key), plain(value)) for key, value in record.items() if value not in (None, "")]
    whole = amount(report, "seconds")
    return (*facts, ("whole run", units.seconds(whole))) if whole is not None else tuple(facts)
