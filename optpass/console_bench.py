"""What ``optpass bench`` shows: one table on the terminal, the same as Markdown. No decisions here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optpass import console

HEADERS = ("", "median", "p10 … p90", "a second", "memory", "against the first")
UNKNOWN = "?"


def show(record: Mapping[str, Any]) -> None:
    """The table of a benchmark's record, the machine's state and its notes on stdout."""
    console.out.print(console.table("", headers(record), rows(record)))
    console.out.print()
    for line in remarks(record):
        console.out.print(line, style="dim", markup=False)


def markdown(record: Mapping[str, Any], command: str) -> str:
    """The same as a Markdown file."""
    shown = headers(record)
    lines = [_cells(shown), "|" + "|".join(["---"] + ["---:"] * (len(shown) - 1)) + "|"]
    lines += [_cells([_escaped(cell) for cell in row]) for row in rows(record)]
    remarked = [f"- {_escaped(line)}" for line in remarks(record)]
    return "\n".join([f"`{command}`", "", *lines, "", *remarked, ""])


def headers(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of :func:`rows`; the device's memory stands where a device has one."""
    device = any(row["device_memory"] is not None for row in record["contestants"])
    return (*HEADERS[:-1], *(["on the device"] if device else []), HEADERS[-1])


def rows(record: Mapping[str, Any]) -> list[list[str]]:
    """A row of text for each contestant; the fastest, and what noise does not tell from it, are marked."""
    device = "on the device" in headers(record)
    return [_row(row, device) for row in record["contestants"]]


def _row(row: Mapping[str, Any], device: bool) -> list[str]:
    return [
        f"{row['label']} *" if row["fastest"] else row["label"],
        f"{milliseconds(row['median'])} ms",
        f"{milliseconds(row['p10'])} … {milliseconds(row['p90'])}",
        f"{row['throughput']:,.4g}",
        _size(row["memory"]),
        *([_size(row["device_memory"])] if device else []),
        verdict(row["ratio"]),
    ]


def verdict(ratio: Mapping[str, Any] | None) -> str:
    """``1.52× faster``, with the interval of the ratio of times; or that noise covers the difference."""
    if ratio is None:
        return ""
    bounds = f"{ratio['low']:.3f} … {ratio['high']:.3f}" if "low" in ratio and "high" in ratio else "too few runs"
    if not ratio["certain"]:
        return f"within noise ({bounds})"
    middle = ratio["median"]
    return f"{1 / middle:.2f}× faster ({bounds})" if middle < 1 else f"{middle:.2f}× slower ({bounds})"


def milliseconds(value: float) -> str:
    """Three significant figures, and no exponent."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def remarks(record: Mapping[str, Any]) -> Iterator[str]:
    """What the figures mean, and what they were measured on."""
    effort, machine = record["effort"], record["machine"]
    turns = f"{effort['runs']} turns" if effort["seconds"] is None else f"{effort['seconds']:g} s of turns"
    yield (
        f"* the fastest, and what noise does not tell from it. {turns} of each, alternating, after {effort['warmup']} "
        "calls; in brackets the 99 % interval of the ratio of times, turn by turn; memory is the peak of a process of "
        "its own, beyond Python and PyTorch"
    )
    yield f"{machine['processor']}, {machine['cores']} cores; {', '.join(_state(machine))}"
    threads = dict.fromkeys(f"{row['facts'].get('threads', UNKNOWN)}" for row in record["contestants"])
    yield f"threads {', '.join(threads)}; {', '.join(f'{name} {tool}' for name, tool in machine['tools'].items())}"
    for note in record["notes"]:
        yield f"note: {note}"


def _state(machine: Mapping[str, Any]) -> Iterator[str]:
    if machine["governor"]:
        yield f"governor {machine['governor']}"
    if clocks := [*machine["megahertz"]["before"], *machine["megahertz"]["after"]]:
        yield f"{min(clocks)} … {max(clocks)} MHz"
    load = machine["load"]
    if load["before"] is not None:
        yield f"load {load['before']:.1f} before and {load['after']:.1f} after"
    if machine["others"] is not None:
        yield f"{machine['others']:.2f} cores taken by other processes"


def _size(nbytes: int | None) -> str:
    return UNKNOWN if nbytes is None else console.size(nbytes)


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(cell: str) -> str:
    # A star at the end of a cell would open an emphasis.
    return cell.replace("|", "\\|").replace("*", "\\*")
