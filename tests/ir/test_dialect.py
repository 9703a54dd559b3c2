"""Every way of leaving the canonical dialect has its message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from optpass.errors import DialectError
from optpass.ir.dialect import verify, verify_shapes
from optpass.ir.graph import PATH, Graph
from optpass.ir.program import Program
from optpass.ir.weights import Cast, WeightStore

aten = torch.ops.aten


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.fixture
def program(capture_module: Any) -> Program:
    captured, _ = capture_module(Two, x=torch.zeros(3, 4))
    return captured


def node_of(program: Program, name: str) -> fx.Node:
    return next(node for node in program.entries["full"].fx.nodes if node.name == name)


def insert(program: Program, target: Any, *arguments: Any) -> fx.Node:
    """A call after ``relu`` that takes its result, put in between."""
    graph, relu = program.entries["full"], node_of(program, "relu")
    users = list(relu.users)
    with graph.fx.inserting_after(relu):
        node = graph.fx.call_function(target, (relu, *arguments))
    node.meta = {"val": relu.meta["val"], PATH: "between"}
    for user in users:
        user.replace_input_with(relu, node)
    return node


def wrong_output(program: Program) -> None:
    output = program.entries["full"].output_node
    output.args = (output.args[0][0],)  # type: ignore[index]


def extra_output(program: Program) -> None:
    output = program.entries["full"].output_node
    output.args = ((output.args[0][0], node_of(program, "relu")),)  # type: ignore[index]


def extra_input(program: Program) -> None:
    graph = program.entries["full"]
    with graph.before(graph.placeholders[0]):
        graph.fx.placeholder("more").meta["val"] = graph.placeholders[0].meta["val"]


def call_module(program: Program) -> None:
    graph, relu = program.entries["full"], node_of(program, "relu")
    with graph.fx.inserting_after(relu):
        graph.fx.call_method("relu", (relu,)).meta["val"] = relu.meta["val"]


def without(key: str) -> Callable[[Program], None]:
    return lambda program: node_of(program, "relu").meta.pop(key)


def bad_weight(program: Program) -> None:
    weight = next(n for n in program.entries["full"].fx.nodes if n.op == "get_attr")
    weight.target = "first.gone"


def stale_weight(program: Program) -> None:
    weight = next(n for n in program.entries["full"].fx.nodes if n.op == "get_attr")
    weight.target = "second.weight"


def use_before_definition(program: Program) -> None:
    relu, linear = node_of(program, "relu"), node_of(program, "linear")
    linear.prepend(relu)


VIOLATIONS: dict[str, tuple[Callable[[Program], Any], str]] = {
    "in place": (lambda p: insert(p, aten.relu_.default), "relu_.default works in place"),
    "dropout": (lambda p: insert(p, aten.dropout.default, 0.1, False), "dropout.default has no meaning in inference"),
    "detach": (lambda p: insert(p, aten.detach.default), "detach.default has no meaning in inference"),
    "assertion": (
        lambda p: insert(p, aten._assert_tensor_metadata.default, None, None, None),
        "_assert_tensor_metadata.default has no meaning in inference",
    ),
    "view": (lambda p: insert(p, aten.view.default, [3, 4]), "view.default has a canonical spelling"),
    "broadcast": (lambda p: insert(p, aten.broadcast_to.default, [3, 4]), "broadcast_to.default has a canonical sp"),
    "other cast": (lambda p: insert(p, aten._to_copy.default), "_to_copy.default is spelt to.dtype"),
    "idle cast": (lambda p: insert(p, aten.to.dtype, torch.float32), "is a cast that changes nothing"),
    "python function": (lambda p: insert(p, torch.relu), "is not an ATen operator"),
    "method": (call_module, "call_method nodes are not part of the dialect"),
    "no value": (without("val"), "has no fake value"),
    "no provenance": (without(PATH), "has no provenance"),
    "unknown weight": (bad_weight, "is not in the weight store"),
    "weight of another shape": (stale_weight, r"has shape \(4, 4\) in the graph and \(2, 4\) in the store"),
    "nested output": (wrong_output, "the output is not a flat tuple of values"),
    "output too many": (extra_output, "2 outputs where the signature has 1"),
    "input too many": (extra_input, "2 inputs where the signature has 1"),
    "order": (use_before_definition, "used before it has been defined"),
}  # fmt: skip


def test_a_captured_graph_is_in_the_dialect(program: Program) -> None:
    verify(program)
    verify_shapes(program)


@pytest.mark.parametrize("kind", VIOLATIONS)
def test_a_violation_is_refused_by_name(program: Program, kind: str) -> None:
    damage, message = VIOLATIONS[kind]
    damage(program)
    with pytest.raises(DialectError, match=message) as refusal:
        verify(program)
    assert "entry 'full' left the canonical dialect" in str(refusal.value)


def test_a_weight_of_another_dtype_is_refused(program: Program) -> None:
    halved = program.with_weights({"first.weight": Cast(program.weights["first.weight"], torch.float16)})
    with pytest.raises(DialectError, match="is f32 in the graph and f16 in the store"):
        verify(halved)


def test_the_message_names_node_and_module(program: Program) -> None:
    insert(program, aten.relu_.default)
    with pytest.raises(DialectError, match=r"%relu__default \(between\): "):
        verify(program)


def test_all_violations_are_listed_and_many_are_counted(program: Program) -> None:
    for _ in range(25):
        insert(program, aten.detach.default)
    with pytest.raises(DialectError, match=r"… and 5 more") as refusal:
        verify(program)
    assert str(refusal.value).count("has no meaning") == 20


def test_a_stale_shape_is_found(program: Program) -> None:
    relu = node_of(program, "relu")
    relu.meta["val"] = relu.meta["val"][:2]
    with pytest.raises(DialectError, match=r"%relu \(\) says .*2, 4.* and computes .*3, 4"):
        verify_shapes(program)


def test_operands_that_do_not_fit_are_found(program: Program) -> None:
    linear = node_of(program, "linear_1")
    linear.meta["val"] = linear.meta["val"]
    linear.update_arg(1, next(n for n in program.entries["full"].fx.nodes if str(n.target) == "second.bias"))
    with pytest.raises(DialectError, match=r"%linear_1 \(second\): "):
        verify_shapes(program)


def test_an_empty_store_is_refused_weight_by_weight(program: Program) -> None:
    graph: Graph = program.entries["full"]
    with pytest.raises(DialectError) as refusal:
        verify(Program({"full": graph}, WeightStore(), program.origin))
    assert str(refusal.value).count("is not in the weight store") == 4
