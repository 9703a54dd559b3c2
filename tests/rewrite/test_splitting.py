"""Parts of a graph, cut at values."""

from __future__ import annotations

import pytest
import torch
from loops import denoiser

from optpass.evaluate.difference import program_runner
from optpass.ir.graph import Graph, graph_module
from optpass.ir.program import Program
from optpass.rewrite.splitting import subgraph, unread_inputs


def call(program: Program, graph: Graph, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    module = graph.module(program.weights)
    results = module(*(tensors[name] for name in graph.signature.inputs))
    return dict(zip(graph.signature.outputs, results, strict=True))


@pytest.fixture(name="program", scope="module")
def _program() -> Program:
    return denoiser()[0]


def test_two_halves_are_the_whole(program):
    graph = program.entries["full"]
    deep = next(node for node in graph.calls if "tanh" in str(node.target))
    (result,) = graph.output_node.args[0]
    first = subgraph(graph, inputs={}, outputs={"present.deep": deep})
    second = subgraph(graph, inputs={"past.deep": deep}, outputs={"answer": result})
    assert first.signature.inputs == ("sample", "timestep", "context")
    assert second.signature.inputs == ("sample", "timestep", "past.deep")
    assert set(first.weight_names) | set(second.weight_names) == set(graph.weight_names)
    assert not any(name.startswith(("inner", "mix")) for name in second.weight_names)
    tensors = {"sample": torch.randn(2, 4), "timestep": torch.tensor(3.0), "context": torch.randn(2, 3)}
    middle = call(program, first, **tensors)["present.deep"]
    answer = call(program, second, **tensors, **{"past.deep": middle})["answer"]
    assert torch.equal(answer, program_runner(program, "full")(tensors)["output"])


def test_names_and_provenance_stay(program):
    graph = program.entries["full"]
    (result,) = graph.output_node.args[0]
    part = subgraph(graph, inputs={}, outputs={"output": result})
    assert [(n.name, n.meta["path"]) for n in part.calls] == [(n.name, n.meta["path"]) for n in graph.calls]


def test_an_input_that_nothing_reads_can_stay(program):
    graph = program.entries["full"]
    outer = next(node for node in graph.calls if "tanh" in str(node.target)).all_input_nodes[0]
    kept = subgraph(graph, inputs={"past.outer": outer}, outputs={"outer": outer}, keep=("context",))
    assert kept.signature.inputs == ("context", "past.outer")
    assert unread_inputs(kept) == ["context"]
    module = graph_module({}, kept.fx)
    value = torch.randn(2, 4)
    assert torch.equal(module(torch.zeros(2, 3), value)[0], value)


def test_a_cut_value_needs_a_name_of_its_own(program):
    graph = program.entries["full"]
    deep = next(node for node in graph.calls if "tanh" in str(node.target))
    (result,) = graph.output_node.args[0]
    with pytest.raises(ValueError, match="cut values are called as inputs are: sample"):
        subgraph(graph, inputs={"sample": deep}, outputs={"output": result})
