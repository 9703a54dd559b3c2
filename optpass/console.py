"""What the command line shows a person: progress on stderr, tables on stdout. No decisions here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from optpass.jsonable import finite
from optpass.pipeline.progress import DETAIL
from optpass.report import units
from optpass.report.coverage_view import coverage_words
from optpass.report.sensitivity_view import CHARTED, module_row, sensitivity_words

# A pipe has no width of its own, and 80 columns break the tables.
out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
err = Console(stderr=True, highlight=False)

REASONS = 5
"""Reasons of one pass that a summary shows."""


@contextmanager
def progress_display(quiet: bool = False) -> Iterator[Callable[[str, float], None]]:
    """A callback ``(stage, fraction)`` that draws one bar a stage on stderr, with the time it took."""
    if quiet:
        yield lambda stage, fraction: None
        return
    columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), BarColumn(24), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=not err.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def update(stage: str, fraction: float) -> None:
            name = stage.partition(DETAIL)[0]
            if name not in tasks:
                tasks[name] = bars.add_task(escape(name), total=1.0)
                if not err.is_terminal:
                    err.print(f"… {escape(name)}")
            bars.update(tasks[name], completed=fraction, description=escape(stage))

        yield update


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json_text(value))


def json_text(value: Mapping[str, Any]) -> str:
    """One JSON object; NaN and infinities as null, so that every parser takes it."""
    return json.dumps(finite(value), indent=2) + "\n"


def table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> Table:
    """A plain table; the first ``left`` columns are text, the others numbers."""
    made = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, header in enumerate(headers):
        made.add_column(header, justify="left" if index < left else "right", overflow="fold", no_wrap=index == 0)
    for row in rows:
        made.add_row(*(escape(cell) for cell in row))
    return made


def millions(count: float) -> str:
    """``1524.62 M``."""
    return f"{count / 1e6:,.2f} M"


def giga(count: float) -> str:
    """``338.60 G``."""
    return f"{count / 1e9:,.2f} G"


def size(nbytes: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"


def totals_row(label: str, totals: Mapping[str, float]) -> list[str]:
    """A row of :data:`TOTALS_HEADERS`."""
    return [
        label,
        millions(totals["parameters"]),
        giga(totals["macs"]),
        giga(totals["macs_attention"]),
        size(totals["weight_bytes"]),
        size(totals["peak_activation_bytes"]),
    ]


def cost_table(noun: str, rows: Mapping[str, Mapping[str, int]]) -> Table:
    """Costs by module or operator; what costs nothing is counted in the last row."""
    costly = {name: cost for name, cost in rows.items() if cost["macs"] or cost.get("parameters")}
    columns = [key for key in ("count", "parameters", "macs") if any(key in cost for cost in rows.values())]
    shown: dict[str, Callable[[int], str]] = {"count": str, "parameters": millions, "macs": giga}
    cells = [[name, *(shown[key](cost[key]) for key in columns)] for name, cost in costly.items()]
    if free := len(rows) - len(costly):
        cells.append([f"{free} more without cost", *("" for _ in columns)])
    titles = {"count": "count", "parameters": "parameters", "macs": "MACs"}
    return table("", (noun, *(titles[key] for key in columns)), cells)


def axes_tables(axes: Mapping[str, Any]) -> None:
    """Groups of axes that can be cut together, and the reasons why others cannot be."""
    rows = [
        [item["path"], item["kind"], str(item["size"]), _weights(item["slices"]), str(len(item["norms"]) or "")]
        for item in axes["groups"]
    ]
    out.print(table("can be pruned", ("module", "kind", "size", "goes together", "norms"), rows, left=2))
    out.print()
    # A kernel is no axis that anybody would ask about.
    rows = [
        [item["path"], item["size"], item["reason"], _weights(item["slices"])]
        for item in axes["fixed"]
        if any(slice_["role"] for slice_ in item["slices"])
    ]
    out.print(table("cannot", ("module", "size", "it", "has it"), rows))
    out.print("\n--json has every slice of every weight", style="dim")


def _weights(slices: Sequence[Mapping[str, Any]]) -> str:
    names = {item["weight"] for item in slices}
    return f"{len(names)} weight{'s' * (len(names) != 1)}"


def uncounted(operators: Mapping[str, Mapping[str, Any]]) -> None:
    """What the MACs leave out for want of a rule, if anything, with the first places."""
    for name, found in operators.items():
        places = ", ".join(found["paths"]) + (", …" if found["count"] > len(found["paths"]) else "")
        line = f"not counted: {name} ({found['count']} times: {places}) has no MAC rule and may multiply"
        out.print(line, style="yellow", markup=False)


TOTALS_HEADERS = ("", "parameters", "MACs", "in attention", "weights", "activations")


def report_summary(report: Mapping[str, Any], folder: str) -> None:
    """The end of ``optpass apply``: a row per pass, the engine's evidence, where to look."""
    if report.get("components"):
        out.print(
            table("", (*TOTALS_HEADERS[:-1], "engine's error"), [_component_row(c) for c in report["components"]])
        )
        out.print()
    rows = [totals_row("captured", report["before"]["totals"])]
    rows += [totals_row(_pass_label(item), item["after"]["totals"]) for item in report["passes"]]
    out.print(table("", TOTALS_HEADERS, rows))
    if report.get("ladder"):
        out.print()
        out.print(ladder_table(report["ladder"]))
        out.print(LADDER_NOTE, style="dim")
    for item in report["passes"]:
        if item.get("sensitivity"):
            out.print()
            out.print(sensitivity_table(item["sensitivity"]))
        if item.get("verified"):
            out.print(f"  {escape(item['name'])}: {item['contract']}, {escape(item['verified'])}")
        for line in declined_lines(item["declined"], "declined"):
            out.print(f"  {escape(item['name'])} {escape(line)}")
    for line in _evidence_lines(report):
        out.print(f"  {line}")
    out.print(f"\n[bold]{escape(folder)}[/bold]  ({report['seconds']:.1f} s)")
    out.print(f"  report: {escape(folder)}/report.html")


def sensitivity_table(record: Mapping[str, Any]) -> Table:
    """The modules whose integers add most noise, and what was chosen."""
    rows = [module_row(module) for module in record["modules"][:CHARTED]]
    cells = [[row.path, row.operations, row.alone, row.without, "real" if row.real else ""] for row in rows]
    headers = ("noisiest modules", "10⁶ operations", "alone", "all but it", "stays")
    made = table("", headers, cells)
    made.caption, made.caption_justify = escape(sensitivity_words(record)), "left"
    return made


def ladder_table(rungs: Sequence[Mapping[str, Any]]) -> Table:
    """A row a pass: evaluations of the denoiser for a sample, what one takes, what the whole pipeline takes."""
    first = next((rung["total"] for rung in rungs if rung["total"]), None)
    return table("", LADDER_HEADERS, [_rung_row(rung, first) for rung in rungs])


LADDER_HEADERS = (
    "a sample",
    "evaluations",
    "TFLOP each",
    "without attention",
    "beside",
    "TFLOP a sample",
    "without attention",
    "fewer",
    "parameters",
)
LADDER_NOTE = (
    "FLOP = 2·MAC of linear, convolution, matmul and attention; 'without attention' leaves QKᵀ and AV out, as some "
    "papers do; 'beside' are the pipeline's other components, each method once"
)


def _rung_row(rung: Mapping[str, Any], first: int | None) -> list[str]:
    total, most = rung["total"], "≤ " if rung["bound"] else ""
    sample = ["", "", ""]
    if total:
        sample = [most + _tera(total), most + _tera(total - rung["total_attention"]), f"{first / total:.4g}×"]
    return [
        rung["name"],
        str(rung["evaluations"] or "?"),
        _tera(rung["macs"]),
        _tera(rung["macs"] - rung["macs_attention"]),
        _tera(rung["beside"]) if rung["beside"] else "",
        *sample,
        millions(rung["parameters"]),
    ]


def _tera(macs: int) -> str:
    return f"{2 * macs / 1e12:.4g}"


def _component_row(record: Mapping[str, Any]) -> list[str]:
    difference = record.get("engine_difference")
    error = f"{difference['relative_error']:.2g}" if difference else "not run"
    return [*totals_row(record["checkpoint"]["component"], record["after"]["totals"])[:-1], error]


def _pass_label(item: Mapping[str, Any]) -> str:
    if item.get("withdrawn"):
        return f"{item['name']} (rolled back)"
    return f"{item['name']} ({item['sites']} sites)" if item["modified"] else f"{item['name']} (unmodified)"


def declined_lines(declined: Sequence[Mapping[str, str]], verb: str) -> Iterator[str]:
    """The most frequent reasons; a large model has one for every other place."""
    found = sorted(reasons(declined).items(), key=lambda pair: -pair[1])
    for reason, count in found[:REASONS]:
        yield f"{verb} {count}: {reason}"
    if rest := sum(count for _, count in found[REASONS:]):
        yield f"{verb} {rest} more, for {len(found) - REASONS} other reasons: --json has them, and the report"


def reasons(declined: Sequence[Mapping[str, str]]) -> dict[str, int]:
    """How often each reason stands in a pass's ``declined``."""
    counts: dict[str, int] = {}
    for item in declined:
        counts[item["reason"]] = counts.get(item["reason"], 0) + 1
    return counts


def _evidence_lines(report: Mapping[str, Any]) -> Iterator[str]:
    for gate in report["gates"]:
        note = f" ({gate['note']})" if gate.get("note") else ""
        outcome = "held" if gate["held"] else "did not hold"
        yield f"gate {escape(gate['metric'])} after {escape(gate['after'])}: {gate['value']:.4g}, {outcome}{note}"
    if added := report.get("added"):
        yield f"the original went through {escape(', '.join(added))} too, in plain form"
    if unhealed := report.get("unhealed"):
        yield f"quality is undefined until training heals {escape(', '.join(unhealed))}"
    if loop := report.get("loop"):
        yield loop_line(loop)
    for engine in report["engines"]:
        if coverage := engine["details"].get("coverage"):
            yield f"{escape(engine['entry'])}: {coverage_words(coverage)}"
    if report["target"]["verified"].startswith("compiled only"):
        yield escape(report["target"]["verified"])
    if difference := report.get("engine_difference"):
        yield f"engine against the original: relative error {difference['relative_error']:.2g}"
    if latency := report.get("latency"):
        yield latency_line(latency)
    if samples := report.get("samples"):
        yield f"samples against the original's at equal seeds: PSNR {samples['psnr']:.1f} dB"
        if samples.get("quality_after"):
            before, after = samples["quality_before"]["frame_accuracy"], samples["quality_after"]["frame_accuracy"]
            yield f"frames read right: {before:.1%} → {after:.1%}"


def loop_line(loop: Mapping[str, Any]) -> str:
    """The schedule, and a generation's MACs before and after."""
    before, after = loop["before"], loop["after"]
    schedule = escape(", ".join(f"{key}: {value}" for key, value in loop["schedule"].items()))
    most = "at most " if after["bound"] else ""
    return (
        f"loop ({schedule}): a generation of {after['steps']} steps takes {units.macs(before['macs'])} → "
        f"{most}{units.macs(after['macs'])}; {units.size(loop['state_bytes'])} live between steps"
    )


def latency_line(latency: Mapping[str, Any]) -> str:
    """Medians, the ratio of pairs with its spread, and whether noise covers it."""
    ratio = latency["ratio"]
    note = f"; {latency['note']}" if latency["note"] else ""
    return (
        f"latency {latency['before']['median']:.1f} → {latency['after']['median']:.1f} ms, "
        f"ratio {ratio['median']:.2f} ({ratio['p10']:.2f} … {ratio['p90']:.2f}){note}"
    )
