"""An ONNX file → a context binary of Qualcomm's HTP, and sessions that run one: on the device, or in its emulator.

Compiled in a process of its own (``python -m optpass.interchange.qnn_context``): the compiler takes several times the
weights, keeps it, and on some graphs dies.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from optpass.errors import UserError
from optpass.quiet import first_lines

PROVIDER = "QNNExecutionProvider"
ERRORS_ONLY = 3
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
INSERTED = re.compile(r"_token_\d+$")
"""What ONNX Runtime appends to the name of a node when it changes its layout."""
SHOWN = 400


@dataclass(frozen=True)
class Device:
    """What a context is compiled for: the architecture of the HTP, and the chip's number in Qualcomm's SDK."""

    architecture: int
    model: int

    def options(self, effort: int) -> dict[str, str]:
        """Of the execution provider. ``effort`` (0 to 3) is what the compiler spends on the order of the graph."""
        import onnxruntime_qnn

        return {
            "backend_path": onnxruntime_qnn.get_qnn_htp_path(),
            "htp_arch": str(self.architecture),
            "soc_model": str(self.model),
            # What is left in float computes in f16: the HTP has nothing wider.
            "enable_htp_fp16_precision": "1",
            # Else the quantizers at the graph's ends stay with the CPU.
            "offload_graph_io_quantization": "0",
            "htp_graph_finalization_optimization_mode": str(effort),
        }


@dataclass(frozen=True)
class Compiled:
    """The nodes of the ONNX file that fell to the CPU, as (name, operator), and how many subgraphs run on the HTP."""

    fallen: tuple[tuple[str, str], ...]
    subgraphs: int


def compile_context(path: Path, out: Path, device: Device, effort: int) -> Compiled:
    """Compile ``path``, with the weights beside it, into ``out`` and a binary beside that.

    Raises:
        UserError: the compiler refuses the graph, or died; the message has its own words.
    """
    # Contexts are never written over; the binary's name is made from the file's.
    for old in (out, out.with_name(f"{out.stem}_qnn.bin")):
        old.unlink(missing_ok=True)
    asked = json.dumps({"path": str(path), "out": str(out), "device": asdict(device), "effort": effort})
    command = [sys.executable, "-m", "optpass.interchange.qnn_context", asked]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise UserError(f"QNN cannot compile {path.stem}: {_reason(done.returncode, done.stderr)}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Compiled(tuple((name, kind) for name, kind in found["fallen"]), found["subgraphs"])


def _reason(status: int, said: str) -> str:
    lines = [ESCAPES.sub("", line).strip() for line in said.splitlines()]
    errors = [re.sub(r"^\S+ \S+ \[E:[^\]]*\] ", "", line) for line in lines if "[E:" in line]
    if status == -9:
        return "the compiler was killed, most likely for want of memory"
    if status < 0:
        return f"the compiler died of signal {-status}; its last words: {' '.join((errors or lines)[-2:])[:SHOWN]}"
    return " ".join([*errors[-2:], lines[-1] if lines else ""])[:SHOWN]


def _compile(path: str, out: str, device: Device, effort: int) -> Compiled:
    options = _options(device, effort)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.add_session_config_entry("ep.context_enable", "1")
    options.add_session_config_entry("ep.context_file_path", out)
    options.add_session_config_entry("ep.context_embed_mode", "0")
    session = _session(path, options)
    assigned = session.get_provider_graph_assignment_info()
    others = [node for part in assigned if part.ep_name != PROVIDER for node in part.get_nodes()]
    fallen = tuple((INSERTED.sub("", node.name), str(node.op_type)) for node in others)
    return Compiled(fallen, sum(part.ep_name == PROVIDER for part in assigned))


def context_session(path: Path, device: Device, effort: int) -> Any:
    """A session of a compiled context. Where there is no HTP, its emulator computes.

    Raises:
        UserError: ONNX Runtime refuses the file.
    """
    try:
        return _session(str(path), _options(device, effort))
    except Exception as error:
        # ONNX Runtime's errors share no base class but Exception.
        raise UserError(f"QNN cannot run {path.name}: {first_lines(error, 2)}") from error


def _session(path: str, options: Any) -> Any:
    import onnxruntime

    with _stdout_kept():
        return onnxruntime.InferenceSession(path, options)


def _options(device: Device, effort: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    # Products and their biases that ONNX Runtime joins lose 15 dB on the HTP, see optpass.interchange.onnx_surgery.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_provider_for_devices(_devices(), device.options(effort))
    return options


@cache
def _devices() -> list[Any]:
    import onnxruntime
    import onnxruntime_qnn

    with _stdout_kept():
        onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER]


@contextmanager
def _stdout_kept() -> Iterator[None]:
    """What the backend's C++ prints when it loads goes to stderr: stdout may be somebody's JSON."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _main(asked: Mapping[str, Any]) -> None:
    found = _compile(asked["path"], asked["out"], Device(**asked["device"]), asked["effort"])
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
