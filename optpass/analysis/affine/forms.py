"""Every node as an affine function of earlier values, nearest first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch.fx import Node

from optpass.analysis.affine.composition import compose
from optpass.analysis.affine.constants import Constants
from optpass.analysis.affine.maps import Map, NotExactError, Uniform
from optpass.analysis.affine.norms import norm_affine
from optpass.analysis.affine.steps import Step, Term, step_of
from optpass.analysis.affine.sums import add
from optpass.ir.algebra import Full
from optpass.ir.graph import Graph, value_of
from optpass.ir.weights import Expression, accumulation_dtype, is_larger

LIMIT, DEPTH = 16, 128
"""Forms of one node, and steps to the farthest. Beyond them a new region begins, which bounds the work per node."""


@dataclass(frozen=True)
class Bare:
    """A normalisation without the scale and shift that end it: a value that the graph does not hold yet."""

    node: Node


Value = Node | Bare


@dataclass(frozen=True, eq=False)
class Form:
    """A node is ``map`` of ``root``; ``depth`` steps lie between them on the longest way."""

    root: Value
    map: Map
    depth: int


@dataclass(frozen=True)
class Refusal:
    """Why ``node`` has no forms past its operand."""

    node: Node
    reason: str


@dataclass
class Forms:
    """``of[node]``: what ``node`` is of earlier values, nearest first, itself left out.

    A node without forms is affine in nothing before it, so it is there whatever is chosen. ``steps`` says which
    nodes were read as maps of their operands; ``refused`` which compositions are not exact; ``readers`` how many
    nodes read each weight; ``computed`` are the nodes that depend on weights alone.
    """

    constants: Constants
    readers: Counter[str]
    of: dict[Node, tuple[Form, ...]] = field(default_factory=dict)
    steps: dict[Node, Step] = field(default_factory=dict)
    refused: list[Refusal] = field(default_factory=list)
    computed: set[Node] = field(default_factory=set)

    def upto(self, node: Node) -> Iterator[Form]:
        """The forms of ``node`` and, before them, itself."""
        identity = Uniform(Full((), 1.0, accumulation_dtype(value_of(node).dtype)))
        yield Form(node, identity, 0)
        yield from self.of.get(node, ())


def forms_of(graph: Graph, weights: Mapping[str, Expression], considered: Callable[[Node], bool]) -> Forms:
    """The forms of every operator; of one that is not ``considered``, none. Linear in the nodes."""
    constants = Constants(weights)
    found = Forms(constants, _readers(graph))
    for node in graph.calls:
        if all(item.op == "get_attr" or item in found.computed for item in node.all_input_nodes):
            found.computed.add(node)
            continue
        if not considered(node):
            continue
        affine = norm_affine(node, constants)
        if affine is not None:
            found.of[node] = (Form(Bare(node), affine, 1),)
            continue
        step = step_of(node, constants)
        if step is None:
            continue
        found.steps[node] = step
        forms = _composed(found, node, step[0]) if len(step) == 1 else _summed(found, node, step)
        if forms and len(forms) <= LIMIT and forms[-1].depth <= DEPTH and not _is_larger(forms[-1].map):
            found.of[node] = forms
    return found


def _readers(graph: Graph) -> Counter[str]:
    readers: Counter[str] = Counter()
    for node in graph.fx.nodes:
        if node.op == "get_attr":
            readers[str(node.target)] += len(node.users)
    return readers


def _is_larger(made: Map) -> bool:
    """Whether the expressions of ``made`` are larger than a weight's may become."""
    parts = (made.scale, made.shift) if isinstance(made, Uniform) else (made.weight, made.bias)
    return any(part is not None and is_larger(part) for part in parts)


def _composed(found: Forms, node: Node, term: Term) -> tuple[Form, ...]:
    """``term`` over each form of its operand."""
    return tuple(_after(found, node, term.map, 1, found.upto(term.operand)))


def _summed(found: Forms, node: Node, step: Step) -> tuple[Form, ...]:
    """The sum over the nearest root that both operands have, and from there on to what is a root of that one."""
    left, right = step
    others = {form.root: form for form in found.upto(right.operand)}
    common = next((form for form in found.upto(left.operand) if form.root in others), None)
    if common is None:
        return ()
    other = others[common.root]
    try:
        a, b = compose(left.map, common.map), compose(right.map, other.map)
        if not _same_channels(a, b):
            return ()
        total = add(a, b)
    except NotExactError as refusal:
        found.refused.append(Refusal(node, str(refusal)))
        return ()
    nearest = Form(common.root, total, max(common.depth, other.depth) + 1)
    deeper = found.of.get(common.root, ()) if isinstance(common.root, Node) else ()
    return (nearest, *_after(found, node, total, nearest.depth, deeper))


def _after(found: Forms, node: Node, outer: Map, depth: int, forms: Iterable[Form]) -> Iterator[Form]:
    """``outer``, which ends in ``node`` and is ``depth`` steps, over each of ``forms`` until one is not exact."""
    for form in forms:
        if not _same_channels(outer, form.map):
            return
        try:
            yield Form(form.root, compose(outer, form.map), form.depth + depth)
        except NotExactError as refusal:
            found.refused.append(Refusal(node, str(refusal)))
            return


def _same_channels(outer: Map, inner: Map) -> bool:
    """Whether both act along the same dimension."""
    return isinstance(outer, Uniform) or isinstance(inner, Uniform) or outer.spatial == inner.spatial
