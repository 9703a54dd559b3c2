"""The graph of a checked ``.pt2`` archive, by torch's own deserialiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from optpass.errors import UserError
from optpass.interchange.archive import Archive
from optpass.ir.weights import Expression
from optpass.quiet import first_lines, quiet_export


def deserialised(archive: Archive) -> ExportedProgram:
    """The graph by torch's deserialiser, which sees no pickle: weights are fakes, example inputs left out."""
    from torch._export.serde import schema
    from torch._export.serde.serialize import ExportedProgramDeserializer, _dict_to_dataclass

    json = archive.graph()
    zeros = _placeholders(json, archive.tensors())
    # Buffers that were not persistent, and literals, belong to the constants and may not be in the state.
    transient = _transient_names(json)
    state = {name: value for name, value in zeros.items() if name not in transient}
    constants = {name: value for name, value in zeros.items() if name in transient}
    with quiet_export():
        try:
            program = _dict_to_dataclass(  # type: ignore[no-untyped-call]
                schema.ExportedProgram, json
            )
            exported: ExportedProgram = ExportedProgramDeserializer().deserialize(program, state, constants, None)
        except Exception as error:
            raise UserError(f"{archive.path} cannot be read by this torch: {first_lines(error)}") from error
    return exported


def _placeholders(json: Mapping[str, Any], tensors: Mapping[str, Expression]) -> dict[str, Tensor]:
    """Zeros without memory in place of the weights: torch's verifier asks for a tensor of every name."""
    zeros = {
        name: torch.zeros((), dtype=expression.dtype).expand(expression.shape) for name, expression in tensors.items()
    }
    for spec in json["graph_module"]["signature"]["input_specs"]:
        name = spec.get("parameter", {}).get("parameter_name")
        if name in zeros:
            zeros[name] = nn.Parameter(zeros[name], requires_grad=False)
    return zeros


def _transient_names(json: Mapping[str, Any]) -> set[str]:
    found: set[str] = set()
    for spec in json["graph_module"]["signature"]["input_specs"]:
        if not spec.get("buffer", {}).get("persistent", True):
            found.add(spec["buffer"]["buffer_name"])
        if "tensor_constant" in spec:
            found.add(spec["tensor_constant"]["tensor_constant_name"])
    return found
