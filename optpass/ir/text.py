"""The text form of a Program: stable, line per node, made for ``diff`` and golden tests.

    full(sample: f32[2, 8, 4, 16, 16], …):
      %conv_in = conv2d(%sample, @conv_in.weight, @conv_in.bias, [1, 1], [1, 1]) : f32[…]  ; conv_in
      return sample=%conv_out

``%`` is a value, ``@`` a weight, the comment after ``;`` the module path.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from optpass.ir.graph import Graph, TensorSpec, path_of
from optpass.ir.loop import Loop
from optpass.ir.program import Program
from optpass.ir.sizes import SYMBOLIC, size_of, sizes_of
from optpass.ir.weights import dtype_name


def program_text(program: Program, *, weights: bool = True) -> str:
    """Every entry, then (unless ``weights`` is false) the expression of every weight in use."""
    parts = [graph_text(graph, name) for name, graph in program.entries.items()]
    if program.loop and (program.loop.sampling or not program.loop.stateless):
        parts.append(loop_text(program.loop))
    if weights:
        lines = [
            f"  @{name} = {expression} : {dtype_name(expression.dtype)}{list(expression.shape)}"
            for name, expression in program.used_weights().items()
        ]
        parts.append("\n".join(["weights:", *lines]))
    return "\n\n".join(parts) + "\n"


def loop_text(loop: Loop) -> str:
    """Schedule, sampling, variants and states.

    loop every=2:
      sampled in 25 steps of 2 evaluations
      full: head, body
      reuse: head, tail
      state hidden: f32[2, 4] (written)
    """
    schedule = " ".join(f"{key}={value}" for key, value in loop.schedule.as_json().items())
    lines = [f"loop {schedule}:"]
    if loop.sampling:
        lines.append(f"  sampled in {loop.sampling.steps} steps of {loop.sampling.guidance} evaluations")
    lines += [f"  {name}: {', '.join(chain)}" for name, chain in loop.variants.items()]
    lines += [f"  once: {name}" for name in loop.once] + [f"  table: {name}" for name in loop.tables]
    for state in loop.states.values():
        lines.append(f"  state {TensorSpec(state.name, state.shape, state.dtype)} ({state.initial})")
    return "\n".join(lines)


def graph_text(graph: Graph, name: str = "graph") -> str:
    """One graph, weights inlined by name."""
    inputs = ", ".join(map(str, graph.inputs))
    lines = [f"{name}({inputs}):"]
    for node in graph.calls:
        comment = f"  ; {path_of(node)}"
        lines.append(f"  %{node.name} = {operator_name(node)}({_arguments(node)}) : {_type(node.meta['val'])}{comment}")
    results: Any = graph.output_node.args[0]
    returned = ", ".join(f"{k}={_value(v)}" for k, v in zip(graph.signature.outputs, results, strict=True))
    return "\n".join([*lines, f"  return {returned}"])


def operator_name(node: fx.Node) -> str:
    """``linear``, ``add.Tensor``, ``getitem``: the ATen name, without ``.default``."""
    if isinstance(node.target, torch._ops.OpOverload):
        name = str(node.target)
        return name.removeprefix("aten.").removesuffix(".default")
    return getattr(node.target, "__name__", str(node.target))


def _arguments(node: fx.Node) -> str:
    positional = [_value(argument) for argument in node.args]
    named = [f"{key}={_value(value)}" for key, value in node.kwargs.items()]
    return ", ".join([*positional, *named])


def _value(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"@{value.target}" if value.op == "get_attr" else f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    return repr(value) if isinstance(value, str) else str(value)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)}[{', '.join(map(str, sizes_of(value)))}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_type, value))})"
    return f"size {size_of(value)}" if isinstance(value, SYMBOLIC) else type(value).__name__
