"""Source: an exported program that ``torch.export.save`` wrote (``.pt2``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_unflatten

from optpass.capture.export import program_of
from optpass.capture.request import Request
from optpass.capture.spans import as_written
from optpass.errors import UserError, nearest
from optpass.interchange.archive import Archive
from optpass.interchange.deserialise import deserialised
from optpass.ir.program import Origin, Program
from optpass.ir.signature import Signature, tree_of_example, tree_of_spec

DESCRIPTION = "an exported program (.pt2, written by torch.export.save)"


def recognises(request: Request) -> bool:
    """A ``.pt2`` file."""
    return request.path.suffix == ".pt2" and request.path.is_file()


def capture(request: Request) -> Program:
    """The archive's graph; its sizes are those it was exported with.

    Raises:
        UserError: other sizes are asked for, or the archive is damaged, would run code, or leaves the dialect.
        WeightError: a weight is missing or damaged.
    """
    archive = Archive(request.path)
    tensors = archive.tensors()
    exported = deserialised(archive)
    signature = _signature(exported)
    origin = Origin(kind="exported", path=request.path.resolve(), library="torch", class_name="ExportedProgram")
    checkpoint = None if request.structure_only else tensors
    program = program_of(exported, signature, {}, {}, checkpoint, origin)
    _refuse_sizes(program, request)
    return program


def _signature(exported: ExportedProgram) -> Signature:
    values = {node.name: node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder"}
    leaves: list[Any] = []
    names: list[str] = []
    for spec in exported.graph_signature.input_specs:
        if spec.kind.name != "USER_INPUT":
            continue
        value = values.get(spec.arg.name)
        leaves.append(value if isinstance(value, Tensor) else getattr(spec.arg, "value", None))
        names.append(spec.arg.name)
    args, kwargs = tree_unflatten(leaves, exported.call_spec.in_spec)
    declared = exported.module_call_graph[0].signature
    order = list((declared and declared.forward_arg_names) or [])
    positional = order[: len(args)] if len(order) >= len(args) else names[: len(args)]
    arguments: Mapping[str, Any] = {**dict(zip(positional, args, strict=True)), **kwargs}
    return Signature(tuple(arguments), tree_of_example(dict(arguments), ""), tree_of_spec(exported.call_spec.out_spec))


def _refuse_sizes(program: Program, request: Request) -> None:
    specs = {spec.name: spec for graph in program.entries.values() for spec in graph.inputs}
    for name, sizes in request.sizes.items():
        if name not in specs:
            raise UserError(f"{request.path} has no input {name!r}{nearest(name, specs)}")
        if tuple(sizes) != specs[name].shape:
            raise UserError(
                f"{request.path} was exported with {specs[name]}; it cannot take {name}={as_written(sizes)}"
            )
