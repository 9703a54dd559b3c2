"""A Program → a folder of ONNX files that share their weights: where every target that takes ONNX starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from optpass.errors import MissingValuesError
from optpass.interchange.external_data import ExternalData
from optpass.interchange.onnx_file import OPSET, OnnxFacts, Progress, write_onnx
from optpass.ir.program import Program
from optpass.ir.slots import Placement

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class OnnxFolder:
    """What was written: a file for each entry with its facts; hashes of the files of weights beside them, by name.

    ``slotted`` is where the weights lie whose content can be exchanged.
    """

    paths: Mapping[str, Path]
    facts: Mapping[str, OnnxFacts]
    digests: Mapping[str, str]
    slotted: tuple[Placement, ...]


def write_onnx_folder(
    program: Program,
    folder: Path,
    *,
    opset: int = OPSET,
    optimize: bool = True,
    rewrite: Callable[[ir.Model], object] | None = None,
    allow_nonfinite: bool = False,
    progress: Progress = lambda stage, fraction: None,
) -> OnnxFolder:
    """Write ``ENTRY.onnx`` for every entry; weights go to ``ENTRY.onnx.data``, of several to ``weights.onnx.data``.

    ``rewrite`` as for :func:`~optpass.interchange.onnx_file.write_onnx`.

    Raises:
        MissingValuesError: the Program was captured structure-only.
        UserError: a graph has no ONNX form; the message names the node.
        WeightError: a weight holds NaN or Inf (unless allowed), or cannot be read.
    """
    if not program.has_values:
        raise MissingValuesError("ONNX engines need weight values; the checkpoint was captured structure-only")
    names = list(program.entries)
    paths = {name: folder / f"{name}.onnx" for name in names}
    path = folder / f"{names[0] if len(names) == 1 else 'weights'}.onnx.data"
    with ExternalData(path, allow_nonfinite=allow_nonfinite) as data:
        facts = {
            name: write_onnx(
                graph,
                program.weights,
                paths[name],
                data,
                opset=opset,
                optimize=optimize,
                rewrite=rewrite,
                progress=progress,
            )
            for name, graph in program.entries.items()
        }
    return OnnxFolder(paths, facts, data.digests, data.slotted)
