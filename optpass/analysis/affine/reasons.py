"""Why an affine function was left in several operators, in words for a report."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from optpass.analysis.affine.cover import Costlier, Cover
from optpass.analysis.affine.forms import Bare, Form, Forms
from optpass.analysis.affine.maps import Affine, Transposed, Uniform, by
from optpass.analysis.affine.steps import Term
from optpass.analysis.operators import POINTWISE_BINARY, POINTWISE_UNARY, aten
from optpass.ir.graph import Graph
from optpass.report.units import macs

ACTIVATION_STEPS = 8
"""Operators that one activation function is written in at most."""


def reasons(graph: Graph, forms: Forms, cover: Cover) -> Iterator[tuple[Node, str]]:
    """What looked like something to collapse and was left alone, with the reason."""
    for refusal in forms.refused:
        yield refusal.node, refusal.reason
    for left in cover.left:
        yield left.node, _why_left(left)
    for weight in forms.constants.exchangeable:
        for node in weight.users:
            yield node, f"@{weight.target} can be exchanged after the build"
    for node in graph.calls:
        if reason := _why_apart(node, forms):
            yield node, reason


def _why_left(left: Costlier) -> str:
    root = left.form.root
    source = f"%{root.node.name} without its scale and shift" if isinstance(root, Bare) else f"%{root.name}"
    what = f"{_named(left.form)} on {source}"
    if left.price.macs > left.kept.macs == 0:
        return f"{what} would take {macs(left.price.macs)} more: what it would go into has other readers"
    if left.price.macs > left.kept.macs:
        return f"{what} would take {macs(left.price.macs)}, what it replaces takes {macs(left.kept.macs)}"
    if left.price.macs == left.kept.macs and left.price.weights > left.kept.weights:
        more, less = (f"{int(price.weights):,}" for price in (left.price, left.kept))
        return f"{what} would hold {more} weight elements, what it replaces holds {less}"
    return f"{what} would save nothing: what lies between has other readers"


def _named(form: Form) -> str:
    made = form.map
    if isinstance(made, Transposed):
        return f"one transposed convolution {made.inputs}→{made.outputs}"
    if isinstance(made, Uniform) or made.is_elementwise:
        return "a scale and shift"
    kind = f"{by(made.kernel)} convolution" if made.spatial else "linear layer"
    groups = f" in {made.groups} groups" if made.groups > 1 else ""
    return f"one {kind} {made.inputs}→{made.outputs}{groups}"


def _why_apart(node: Node, forms: Forms) -> str | None:
    """Why a product with a factor that is no constant parts what is linear; x·σ(x) and its kind are none."""
    if node.target is not aten.mul.Tensor or node in forms.steps or node in forms.computed:
        return None
    linear, factor = node.args[:2]
    if linear not in forms.steps:
        linear, factor = factor, linear
    if not isinstance(factor, Node) or not isinstance(linear, Node) or linear not in forms.steps:
        return None
    if factor in forms.computed:
        return f"the factor %{factor.name} is arithmetic on weights: fold constants first"
    into = any(_is_layer(term) for user in node.users for term in forms.steps.get(user, ()))
    if forms.constants(factor) is not None or not into or _is_pointwise_of(factor, linear):
        return None
    return f"the factor %{factor.name} depends on the input: what is linear before and after stays apart"


def _is_layer(term: Term) -> bool:
    return not isinstance(term.map, Uniform) and not (isinstance(term.map, Affine) and term.map.is_elementwise)


def _is_pointwise_of(node: Node, source: Node) -> bool:
    """Whether only operators that work element by element lead from ``source`` to ``node``."""
    for _ in range(ACTIVATION_STEPS):
        if node is source:
            return True
        if node.target not in POINTWISE_UNARY | POINTWISE_BINARY or not isinstance(node.args[0], Node):
            return False
        node = node.args[0]
    return False
