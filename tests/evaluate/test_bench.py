"""Contestants side by side: processes of their own, turns, what is called a difference, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import cached, denoiser
from torch import nn

from optpass import cli, console_bench
from optpass.capture.spans import Span
from optpass.errors import OptpassError, UserError
from optpass.evaluate import bench as module
from optpass.evaluate.bench import Effort, Row, bench
from optpass.evaluate.bench_bundle import bundle_contestants
from optpass.evaluate.bench_machine import Moment, machine_state
from optpass.evaluate.bench_process import Contestant, Process
from optpass.evaluate.bench_worker import Worker
from optpass.evaluate.latency import Latency, Ratio
from optpass.ir.loop import Listed
from optpass.ir.program import Program
from optpass.pipeline.registry import target_class
from optpass.pipeline.target import Lowering
from optpass.runtime.bundle import BundleWriter

LOADERS = """
import os, time
from optpass.errors import UserError
from optpass.evaluate.bench_worker import Ready

def sleeper(milliseconds, megabytes=0, gives="a: f32[1]"):
    print("what a library prints")
    held = bytearray(b"x") * (megabytes << 20)
    return Ready(lambda: time.sleep(milliseconds / 1e3) or held, items=4, interface={"a": gives})

def killed():
    os.kill(os.getpid(), 9)

def refuses():
    raise UserError("not today")

def fails():
    raise ZeroDivisionError("by design")
"""


@pytest.fixture(scope="module")
def contestant(tmp_path_factory) -> Callable[..., Contestant]:
    path = tmp_path_factory.mktemp("loaders") / "loaders.py"
    path.write_text(LOADERS)

    def make(label: str, function: str, **arguments: Any) -> Contestant:
        return Contestant(label, f"{path}:{function}", arguments)

    return make


class Inside:
    """A contestant in this process: what it costs to start one is not paid in every test."""

    def __init__(self, contestant: Contestant, threads: int | None = None) -> None:
        self.contestant, self.threads, self.worker = contestant, threads, Worker()

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def load(self) -> None:
        arguments = json.loads(json.dumps(self.contestant.arguments))
        threads = torch.get_num_threads()
        found = self.worker.answer(
            {"do": "load", "loader": self.contestant.loader, "arguments": arguments, "threads": self.threads}
        )
        torch.set_num_threads(threads)
        self.facts, self.interface, self.items = found["facts"], found["interface"], found["items"]

    def time(self, calls: int, untimed: int = 0) -> list[float]:
        return self.worker.answer({"do": "time", "calls": calls, "untimed": untimed})["ms"]

    def memory(self) -> dict[str, Any]:
        return self.worker.answer({"do": "memory"})


@pytest.fixture
def inside(monkeypatch):
    monkeypatch.setattr(module, "Process", Inside)
    monkeypatch.setattr(module, "TURN", 1.0)


def test_processes_take_turns_and_are_told_apart(contestant):
    slow, fast = bench(
        [contestant("slow", "sleeper", milliseconds=6, megabytes=64), contestant("fast", "sleeper", milliseconds=2)],
        Effort(runs=8, warmup=1),
    ).rows
    assert slow.ratio is None
    assert fast.ratio is not None
    assert fast.ratio.certain
    assert 0.2 < fast.ratio.median < 0.8
    assert fast.fastest
    assert not slow.fastest
    assert slow.latency.median >= 6
    # A turn is calls of 100 ms at least, by the warm-up's time of one.
    assert fast.latency.runs >= 8 * 4
    assert fast.throughput == pytest.approx(4000 / fast.latency.median)
    assert slow.memory is not None
    assert fast.memory is not None
    assert 60 << 20 < slow.memory < 90 << 20
    assert fast.memory < 30 << 20
    assert slow.facts["threads"] == 1


def test_what_a_process_cannot_do_is_said_under_its_label(contestant):
    with Process(contestant("it", "refuses")) as process:
        with pytest.raises(UserError, match="it: not today"):
            process.load()
        process.contestant = contestant("other", "fails")
        with pytest.raises(OptpassError, match=r"(?s)other failed: ZeroDivisionError.*by design"):
            process.load()
        process.contestant = contestant("big", "killed")
        with pytest.raises(UserError, match="big: its process was killed"):
            process.load()


@pytest.mark.usefixtures("inside")
def test_different_tensors_are_refused_with_both_sides(contestant):
    pair = [contestant("one", "sleeper", milliseconds=1), contestant("two", "sleeper", milliseconds=1, gives="b: f32")]
    with pytest.raises(UserError, match=r"(?s)one and two have different tensors:.*one: a: f32\[1\].*two: b: f32"):
        bench(pair, Effort(runs=1))


@pytest.mark.usefixtures("inside")
def test_those_that_cannot_be_loaded_are_left_out_where_asked(contestant, inside):
    some = [contestant("it", "refuses"), contestant("sleeper", "sleeper", milliseconds=1)]
    found = bench(some, Effort(runs=2), leave_out=True)
    assert [row.latency.label for row in found.rows] == ["sleeper"]
    assert found.as_json()["left_out"].keys() == {"it"}
    assert "not today" in found.left_out["it"]
    with pytest.raises(UserError, match="not today"):
        bench(some, Effort(runs=2))
    with pytest.raises(UserError, match="not today"):
        bench(some[:1], Effort(runs=2), leave_out=True)


def test_a_time_limit_stands_for_runs(contestant):
    found = bench([contestant("it", "sleeper", milliseconds=20)], Effort(seconds=0.3, warmup=1))
    assert 2 <= found.rows[0].latency.runs <= 16


@pytest.mark.usefixtures("inside")
def test_equal_contestants_are_not_told_apart(contestant):
    """Few turns never tell a difference, whatever they say."""
    pair = [contestant(name, "sleeper", milliseconds=3) for name in ("one", "two")]
    _, second = bench(pair, Effort(runs=4, warmup=1)).rows
    assert second.as_json()["note"] == "the difference lies within the noise of this machine"
    assert second.fastest


def row(label: str, drift: float = 1.0, threads: int = 1, ratio: Ratio | None = None) -> Row:
    return Row(Latency(label, 1.0, 1.0, 1.0, 8), 1.0, None, None, drift, ratio, False, {"threads": threads})


def test_what_disturbs_a_measurement_is_noted():
    machine = {"others": 0.8, "cores": 2}
    assert module._notes([row("a", drift=1.25), row("b", threads=2)], machine) == [
        "other processes kept 0.8 of 2 cores busy meanwhile",
        "a was 25% slower in the second half than in the first",
        "threads differ: a 1, b 2; --threads makes them equal",
    ]
    assert module._notes([row("a")], {"others": None, "cores": 2}) == []


def test_other_processes_are_what_the_benchmark_did_not_use():
    before, after = Moment(10.0, 100.0, 0.5, (2000.0,)), Moment(14.0, 109.0, 1.5, (2100.4,))
    state = machine_state(before, after, own_seconds=6.0)
    assert state["others"] == pytest.approx(0.75)
    assert state["load"] == {"before": 0.5, "after": 1.5}
    assert state["megahertz"] == {"before": [2000], "after": [2100]}
    assert machine_state(Moment(0, None, None, ()), Moment(1, None, None, ()), 0)["others"] is None


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        (Ratio(0.5, 0.4, 0.6, 0.45, 0.55), "2.00× faster (0.450 … 0.550)"),
        (Ratio(1.5, 1.4, 1.6, 1.45, 1.55), "1.50× slower (1.450 … 1.550)"),
        (Ratio(0.9, 0.7, 1.3, 0.8, 1.1), "within noise (0.800 … 1.100)"),
        (Ratio(0.5, 0.5, 0.5, 0.0, float("inf")), "within noise (too few runs)"),
        (None, ""),
    ],
)
def test_the_table_says_what_is_known(ratio, said):
    assert console_bench.verdict(row("a", ratio=ratio).as_json()["ratio"]) == said


# -------------------------------------------------------------------------------------------------------- bundles


def write(out: Path, program: Program, name: str = "program", **options: Any) -> Path:
    target = target_class(name).of(name, options)
    with BundleWriter(out) as writer:
        engines = target.lower(program, Lowering(writer.folder))
        writer.finish(program=program, target=name, options=target.as_options(), engines=engines)
    return out


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("bundles")
    return {
        "plain": write(home / "plain", denoiser()[0]),
        "cached": write(home / "cached", cached()[0]),
        "listed": write(home / "listed", cached(Listed((0, 2), of=4))[0]),
        "wide": write(home / "wide", denoiser(batch=3)[0]),
    }


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["optpass", "bench", *map(str, arguments)])
    capsys.readouterr()
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.usefixtures("inside")
def test_the_command_measures_a_period_or_a_generation(bundles, monkeypatch, capsys, tmp_path):
    named = (bundles["plain"], bundles["cached"], "--runs", 2)
    code, out, err = run(monkeypatch, capsys, *named, "--sample", "--steps", 6, "--json", "-o", tmp_path / "all.json")
    assert code == 0, err
    record = json.loads(out)
    assert record == json.loads((tmp_path / "all.json").read_text())
    assert [item["label"] for item in record["contestants"]] == ["plain", "cached"]
    assert [item["facts"]["steps"] for item in record["contestants"]] == [6, 6]
    assert record["contestants"][1]["facts"]["entries"] == ["full", "reuse"]
    assert record["machine"]["cores"] >= 1
    code, out, _ = run(monkeypatch, capsys, *named, "-o", tmp_path / "table.md")
    assert code == 0
    assert "against the first" in out
    page = (tmp_path / "table.md").read_text("utf-8")
    assert page.startswith("`optpass bench ")
    assert "| plain" in page
    assert "within noise (too few runs)" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plain", "wide"], "plain and wide have different tensors"),
        (["plain", "plain"], "a bundle is named twice"),
        (["plain", "--batch", 4], "its batch is fixed: build it with --inputs batch=1..4"),
        (["plain", "--steps", 4], "--steps are those of --sample"),
        (["listed", "--sample", "--steps", 5], "and does not serve 5"),
        (["plain", "-o", "table.txt"], "expected .md, .json"),
    ],
)
@pytest.mark.usefixtures("inside")
def test_what_cannot_be_measured_is_refused(bundles, arguments, message, monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, *(bundles.get(str(a), a) for a in arguments), "--runs", 1)
    assert code == 2
    assert message in " ".join(err.split())


@pytest.mark.usefixtures("inside")
def test_an_emulator_has_no_times(bundles, monkeypatch):
    monkeypatch.setattr(target_class("program"), "runs", lambda self: "emulated")
    with pytest.raises(UserError, match="run in an emulator here, whose times mean nothing"):
        bench(bundle_contestants([bundles["plain"]]), Effort(runs=1))


@pytest.mark.usefixtures("inside")
def test_an_open_batch_is_chosen_and_threads_are_set(capture_shared, tmp_path):
    program = capture_shared(lambda: nn.Linear(4, 4), {"input": ("batch", 4)}, {"batch": Span(1, 8)})
    folder = write(tmp_path / "open", program, "onnxruntime")
    measured = bench(bundle_contestants([folder], batch=6, threads=1), Effort(runs=1, threads=1)).rows[0]
    assert measured.throughput == pytest.approx(6000 / measured.latency.median)
    assert measured.facts["options"]["threads"] == 1
    assert measured.facts["threads"] == 1
    with pytest.raises(UserError, match=r"--batch 9: the engine was built for 1\.\.8"):
        bench(bundle_contestants([folder], batch=9), Effort(runs=1))
