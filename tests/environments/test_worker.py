"""A process of a vendor's: answers, chatter, and every end that it can come to."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from optpass.environments.worker import RemoteEngine, Worker, WorkerError
from optpass.ir.graph import TensorSpec

SCRIPT = """
import os, signal, sys, time
import serving

class RefusedError(Exception):
    pass

def echo(**request):
    print("chatter of Python"); os.system("echo chatter of C")
    return {**request, "folder": os.getcwd(), "log": serving.logged()}

def refuse(): raise RefusedError("no kernel for it")
def wrap():
    try: {}["weight"]
    except KeyError as error: raise RuntimeError("a pass failed") from error
def leave(): sys.exit("went away")
def end(): os._exit(7)
def signalled(number): os.kill(os.getpid(), number)
def wait(): time.sleep(60)

def load(engine, tensors, inputs, outputs):
    global maps
    maps = serving.mapped(tensors, inputs), serving.mapped(tensors, outputs)
def call():
    (x, n), (y, count) = maps
    y[...] = x * 2 + n
    count[...] = x.size
"""


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTPASS_HOME", str(tmp_path / "home"))


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "vendor.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def worker(script: Path) -> Iterator[Worker]:
    with Worker("vendor", Path(sys.executable), script) as worker:
        yield worker


def test_chatter_does_not_mix_with_answers(worker: Worker) -> None:
    answer = worker.ask("echo", shape=[1, 2])
    assert answer["shape"] == [1, 2]
    assert Path(answer["folder"]) == worker.folder.resolve()
    assert "chatter of Python" in answer["log"]
    assert "chatter of C" in answer["log"]


def test_nothing_of_ours_is_importable(worker: Worker, tmp_path: Path) -> None:
    probe = tmp_path / "probe.py"
    probe.write_text("import sys\ndef path(): return sys.path\n")
    with Worker("vendor", Path(sys.executable), probe) as other:
        assert all("optpass" not in Path(each).name for each in other.ask("path"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("refuse", "target 'vendor': no kernel for it "),
        ("wrap", "target 'vendor': KeyError: 'weight' "),
        ("leave", "target 'vendor': SystemExit: went away "),
    ],
)
def test_an_error_is_told_in_the_vendors_words(worker: Worker, command: str, message: str) -> None:
    with pytest.raises(WorkerError) as caught:
        worker.ask(command)
    assert str(caught.value).startswith(message)
    kept = Path(str(caught.value).rsplit("whole log: ", 1)[1].rstrip(")"))
    assert "Traceback" in kept.read_text()
    assert worker.ask("echo")["folder"], "the process answers on"


@pytest.mark.parametrize(
    ("number", "message"),
    [(9, "signal 9.*memory"), (11, "crashed .signal 11"), (6, "aborted"), (15, "ended by signal 15")],
)
def test_a_process_that_dies_is_told_by_its_signal(worker: Worker, number: int, message: str) -> None:
    with pytest.raises(WorkerError, match=message):
        worker.ask("signalled", number=number)


def test_one_that_ends_by_itself_and_one_that_takes_too_long(script: Path) -> None:
    with Worker("vendor", Path(sys.executable), script, time_limit=1) as worker:
        with pytest.raises(WorkerError, match=r"longer than time_limit: 1 seconds"):
            worker.ask("wait")
        with pytest.raises(WorkerError):
            worker.ask("echo")
    with Worker("vendor", Path(sys.executable), script) as worker, pytest.raises(WorkerError, match="status 7"):
        worker.ask("end")


def test_the_folder_goes_with_the_process(script: Path) -> None:
    worker = Worker("vendor", Path(sys.executable), script)
    folder = worker.folder
    assert folder.is_dir()
    worker.close()
    assert not folder.exists()


def test_an_engine_takes_numbers_and_tensors_of_every_call(worker: Worker, tmp_path: Path) -> None:
    inputs = [TensorSpec("x", (2, 3), torch.float32), TensorSpec("n", (), torch.int64)]
    outputs = [TensorSpec("x", (2, 3), torch.float32), TensorSpec("count", (), torch.int64)]
    engine = RemoteEngine(worker, tmp_path / "engine", inputs, outputs)
    x = torch.arange(6.0).reshape(2, 3)
    first = engine({"x": x, "n": torch.tensor(1)})
    second = engine({"x": x.mT.contiguous().mT, "n": torch.tensor(5)})
    assert first["x"].equal(x * 2 + 1), "results of a call are not touched by the next"
    assert second["x"].equal(x * 2 + 5)
    assert second["count"].shape == ()
    assert second["count"] == 6
