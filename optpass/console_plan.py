"""What ``optpass plan`` shows a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape

from optpass import console

SHOWN = 10


def show_plan(plan: Mapping[str, Any]) -> None:
    """A row per pass, then what the apply takes, does and lacks, then the verdict."""
    for part in plan["components"]:
        _show_component(part)
    executes = plan["executes"]
    disk = plan["disk"]
    temporary = f" and {console.size(disk['temporary'])} of temporary files" if disk["temporary"] else ""
    lines = {
        "memory": f"{console.size(plan['memory'])} of anonymous memory at most",
        "disk": f"{console.size(disk['bundle'])} for the bundle{temporary}; {console.size(disk['free'])} free",
        "reads": f"{console.size(plan['read'])} of the checkpoint, counting every time that it is gone through",
        "executes": f"{console.giga(executes['macs'])}MAC, {executes['seconds_at_least']:.0f} s at least"
        if executes["macs"]
        else "nothing",
    }
    console.out.print()
    for label, text in lines.items():
        console.out.print(f"{label:<10}{text}", markup=False)
    for warning in plan["warnings"]:
        console.out.print(f"[yellow]warning:[/yellow] {escape(warning)}")
    if plan["goes_through"]:
        console.out.print("\n[bold]would go through[/bold]")
        return
    console.out.print("\n[bold red]would be refused:[/bold red]")
    for reason in plan["refusals"]:
        console.out.print(f"  {reason}", markup=False)


def _show_component(part: Mapping[str, Any]) -> None:
    checkpoint = part["checkpoint"]
    name = "/".join(filter(None, (checkpoint["name"], checkpoint["component"])))
    console.out.print(f"[bold]{escape(checkpoint['class'])}[/bold]  {escape(name)}")
    rows = [console.totals_row("captured", part["before"]["totals"])]
    rows += [_pass_row(item) for item in part["passes"]]
    console.out.print(console.table("", console.TOTALS_HEADERS, rows))
    for item in part["passes"]:
        for line in _pass_lines(item):
            console.out.print(f"  {item['name']}: {line}", markup=False)
    last = next((item["after"] for item in reversed(part["passes"]) if item["after"]), part["before"])
    for entry in last["entries"].values():
        console.uncounted(entry["uncounted"])
    for item in part["unsupported"][:SHOWN]:
        console.out.print(f"  not supported: {item['path']}: {item['operator']}: {item['reason']}", markup=False)
    if len(part["unsupported"]) > SHOWN:
        console.out.print(f"  … and {len(part['unsupported']) - SHOWN} more")
    console.out.print(f"  evidence: {part['evidence']}", markup=False)
    console.out.print()
    stages = [[s["name"], console.size(s["memory"]), console.size(s["read"]), _macs(s["macs"])] for s in part["stages"]]
    console.out.print(console.table("", ("stage", "memory", "reads", "executes"), stages))


def _pass_row(item: Mapping[str, Any]) -> list[str]:
    about = "≈ " if item["assumes"] else ""
    if item["after"] is None:
        return [f"{item['name']} ({item['status']})", *("?" for _ in console.TOTALS_HEADERS[1:])]
    changed = f"{item['sites']} sites" if item["modified"] else "unmodified"
    label, *cells = console.totals_row(f"{item['name']} ({changed})", item["after"]["totals"])
    return [label, *(f"{about}{cell}" for cell in cells)]


def _pass_lines(item: Mapping[str, Any]) -> list[str]:
    lines = [f"{item['contract']}, {item['verification']}"] if item["status"] != "not reached" else []
    if item["needs"]:
        lines.append(f"needs {', '.join(item['needs'])}")
    if item["note"]:
        lines.append(item["note"])
    if item["assumes"] and item["after"]:
        lines.append(f"costs take {', '.join(item['assumes'])} for having changed no shape")
    lines += console.declined_lines(item["declined"] or (), "declines")
    return lines


def _macs(count: int) -> str:
    return f"{console.giga(count)}MAC" if count else ""
