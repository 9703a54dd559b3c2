"""A Program on disk: ``program.json``, one exported program (``.pt2``) per entry, one safetensors file.

The ``.pt2`` files hold no weights; for other tools, ``torch.export.load`` gives the graph with zeros, and
``weights.safetensors`` holds the values under the same names. Loading here unpickles nothing.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from optpass.errors import DialectError, OptpassError, UserError, WeightError
from optpass.ir.dimensions import FIXED, Dimensions
from optpass.ir.graph import Graph
from optpass.ir.loop import Loop, single_step
from optpass.ir.program import InputRange, Origin, Program
from optpass.ir.safetensors_io import read_safetensors, write_safetensors
from optpass.ir.signature import Signature
from optpass.ir.weights import (
    Absent,
    Constant,
    Expression,
    WeightStore,
    dtype_from_name,
    dtype_name,
)

INDEX = "program.json"
WEIGHTS = "weights.safetensors"
SCHEMA = 3


def save_program(
    program: Program,
    folder: Path,
    *,
    weights_file: str = WEIGHTS,
    allow_nonfinite: bool = False,
    progress: Callable[[float], None] = lambda fraction: None,
) -> dict[str, str]:
    """Write ``program`` into ``folder``, weights streamed one at a time to ``folder / weights_file``.

    ``progress`` is called with the fraction of the weights' bytes that are written. Returns the hex SHA-256
    of the weight file by its name, if there is one.

    Raises:
        WeightError: a weight holds NaN or Inf (unless ``allow_nonfinite``), or cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = program.used_weights()
    present = {name: expression for name, expression in weights.items() if expression.has_values}
    index: dict[str, Any] = {
        "schema_version": SCHEMA,
        "entries": {},
        "weights": {
            "file": weights_file if present else None,
            "absent": {
                name: {"shape": list(expression.shape), "dtype": dtype_name(expression.dtype)}
                for name, expression in weights.items()
                if name not in present
            },
            "computed": [name for name, item in weights.items() if isinstance(item, Constant) and item.computed],
        },
        "ranges": {name: span.as_json() for name, span in program.ranges.items()},
        "loop": program.loop.as_json() if program.loop else None,
        "untrained": sorted(program.untrained & weights.keys()),
    }
    for name, graph in program.entries.items():
        (folder / f"{name}.pt2").write_bytes(_archive(graph))
        index["entries"][name] = {"graph": f"{name}.pt2", "signature": graph.signature.as_json()}
        if graph.dimensions:
            index["entries"][name]["dimensions"] = graph.dimensions.as_json()
    digests: dict[str, str] = {}
    if present:
        written = _Fraction(sum(expression.nbytes for expression in present.values()), progress)
        (folder / weights_file).parent.mkdir(parents=True, exist_ok=True)
        # from_pretrained of older libraries asks for the format's name.
        metadata = {"format": "pt"}
        digests[weights_file] = write_safetensors(
            present, folder / weights_file, metadata=metadata, allow_nonfinite=allow_nonfinite, progress=written
        )
    # Last, for by now the checkpoint's digest is known from what was read.
    index["origin"] = program.origin.as_json()
    (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return digests


class _Fraction:
    """Bytes written so far, as a fraction of ``total``."""

    def __init__(self, total: int, progress: Callable[[float], None]) -> None:
        self.total, self.written, self.progress = max(total, 1), 0, progress

    def __call__(self, count: int) -> None:
        self.written += count
        self.progress(self.written / self.total)


def _archive(graph: Graph) -> bytes:
    """The graph as torch.export's archive, each weight a single zero broadcast to its shape."""
    from optpass.interchange.exported import to_exported

    exported = to_exported(graph)
    # Fake tensors would do, but torch 2.13 writes them as views of one storage and then cannot load that.
    for name, value in list(exported.state_dict.items()):
        zero = torch.zeros((), dtype=value.dtype).expand(value.shape)
        exported.state_dict[name] = nn.Parameter(zero, requires_grad=False) if isinstance(value, nn.Parameter) else zero
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No complete tensor found")
        torch.export.save(exported, buffer)
    return buffer.getvalue()


def load_program(folder: Path) -> Program:
    """The Program that :func:`save_program` wrote; weights are lazy leaves over its safetensors file.

    Raises:
        UserError: the folder holds no Program, a newer or damaged one, or one that leaves its folder.
        WeightError: the weights are missing, damaged, or do not fit the graphs.
    """
    from optpass.ir.dialect import verify

    index = _read_index(folder)
    try:
        entries = {name: _load_entry(folder, entry) for name, entry in index["entries"].items()}
        program = Program(
            entries,
            _load_weights(folder, index["weights"]),
            _load_origin(folder, index["origin"]),
            _load_loop(index["loop"], entries) if index["loop"] else None,
            {name: InputRange(**span) for name, span in index["ranges"].items()},
            frozenset(map(str, index.get("untrained", ()))),
        )
        verify(program)
    except DialectError as error:
        raise WeightError(f"{folder} is damaged: {error}") from error
    except OptpassError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / INDEX} is damaged: {type(error).__name__}: {error}") from error
    if not entries:
        raise UserError(f"{folder / INDEX} is damaged: it lacks the entry that runs")
    return program


def _load_loop(record: Mapping[str, Any], entries: Mapping[str, Graph]) -> Loop | None:
    if "entry" in record:
        # Schema 1 knew loops of one entry.
        return single_step(str(record["entry"]), entries[record["entry"]].signature)
    return Loop.from_json(record)


def _read_index(folder: Path) -> dict[str, Any]:
    from optpass.untrusted import read_json

    index = read_json(folder / INDEX)
    version = index.get("schema_version")
    if not isinstance(version, int):
        raise UserError(f"{folder / INDEX} is no Program of optpass: it has no schema_version")
    if version > SCHEMA:
        raise UserError(f"{folder / INDEX} has schema {version}, newer than {SCHEMA}: install a newer optpass")
    return index


def _load_entry(folder: Path, entry: Mapping[str, Any]) -> Graph:
    from optpass.interchange.canonical import canonicalise
    from optpass.untrusted import inside

    dimensions = Dimensions.from_json(entry["dimensions"]) if entry.get("dimensions") else FIXED
    exported = read_exported(inside(folder, str(entry["graph"]), folder / INDEX), open_sizes=bool(dimensions))
    return canonicalise(exported, Signature.from_json(entry["signature"]), dimensions)


def read_exported(path: Path, *, open_sizes: bool = False) -> ExportedProgram:
    """The graph in a ``.pt2`` file, weights fake, nothing unpickled.

    Raises:
        UserError: the file is missing, damaged, or holds more than ATen operators (on fixed sizes, unless
            ``open_sizes``).
    """
    from optpass.interchange.archive import Archive
    from optpass.interchange.deserialise import deserialised

    return deserialised(Archive(path, open_sizes=open_sizes))


def _load_weights(folder: Path, record: Mapping[str, Any]) -> WeightStore:
    from optpass.untrusted import inside

    found: dict[str, Expression] = {}
    if record["file"]:
        found |= read_safetensors(inside(folder, str(record["file"]), folder / INDEX))
    for name, spec in record["absent"].items():
        found[name] = Absent(name, tuple(int(n) for n in spec["shape"]), dtype_from_name(spec["dtype"]))
    for name in record["computed"]:
        found[name] = Constant(_value(found[name]), computed=True)
    return WeightStore(found)


def _value(expression: Expression) -> Tensor:
    # A copy, for a view would keep the file's whole map alive.
    return expression.evaluate().clone()


def _load_origin(folder: Path, record: Mapping[str, Any]) -> Origin:
    """The recorded origin; its folder is that of the bundle's other components, never a path from the file."""
    components = next((path for path in (folder, folder.parent / "components") if _is_pipeline(path)), None)
    pipeline = bool(record["pipeline"]) and components is not None
    return Origin(
        kind=str(record["kind"]),
        path=(components if pipeline and components else folder).resolve(),
        component=str(record["component"]),
        library=str(record["library"]),
        class_name=str(record["class"]),
        config=dict(record["config"]),
        pipeline=pipeline,
        digest=str(record["sha256"]),
    )


def _is_pipeline(path: Path) -> bool:
    return (path / "model_index.json").is_file()
