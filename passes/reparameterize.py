"""The pass ``reparameterize``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from pydantic import Field
from torch.fx import Node

from optpass.analysis.affine.cover import Costlier, Cover, cheapest_cover, is_rearranged, price_of
from optpass.analysis.affine.forms import Bare, Form, Forms, forms_of
from optpass.analysis.affine.maps import Affine, Transposed, Uniform, by
from optpass.analysis.affine.steps import Term
from optpass.analysis.operators import POINTWISE_BINARY, POINTWISE_UNARY
from optpass.errors import OptpassError
from optpass.ir.graph import PATH, Graph, path_of, shape_of
from optpass.ir.program import Program
from optpass.ir.weights import Expression, WeightStore
from optpass.pipeline.contract import exact
from optpass.pipeline.passes import Context, Pass
from optpass.report.units import macs
from optpass.rewrite.affine import emit, emit_bare
from optpass.rewrite.naming import WeightNames
from optpass.rewrite.rules import layout

aten = torch.ops.aten
ACTIVATION_STEPS = 8
"""Operators that one activation function is written in at most."""


class Reparameterize(Pass):
    """Linear operators between two non-linearities → the cheapest one that computes the same.

    Every value is read as an affine function of earlier ones: through linear layers, convolutions, BatchNorm with
    running statistics, products and sums with numbers and with constants per channel, average pools, reshapes that
    keep the last dimension, and sums of two such values. LayerNorm, GroupNorm and RMSNorm end in one, their scale and
    shift. Where one operator on an earlier value costs less than all that dies with it, it takes its place:
    multiply-accumulates decide, then stored weight elements, then nodes. So BatchNorm goes into the convolution on
    either side, the branches of RepVGG and MobileOne become one convolution, linear adapters (ZeroI2V, FouRA with a
    frozen gate) go into the layers beside them, a normalisation's scale and shift into the layers that read it, layer
    scales into what they scale. Nothing is evaluated: weights become expressions.

    Leaves alone, with the reason: what would cost more (a depthwise convolution followed by a pointwise one, the two
    halves of a low-rank pair); what has readers that need it anyway, weights included (a tied embedding); weights that
    can be exchanged after the build; a padded kernel over a value to which a constant was added, whose border would
    differ, and over another kernel; branches with different strides or centres; products with a factor that depends
    on the input. It does not look through transpositions and other reshapes of activations, and takes arithmetic on
    weights (a BatchNorm written out) for constants only where it was folded before.

    Source: Ioffe and Szegedy, arXiv 1502.03167 (BatchNorm in inference); RepVGG, arXiv 2101.03697, section 3.3;
    MobileOne, arXiv 2206.04040, section 3.2; ZeroI2V, arXiv 2310.01324, section 3.3.
    """

    match: tuple[str, ...] = Field((), description="only nodes of modules that match, e.g. 'stages.*'; empty: all")

    contract = exact(rtol=1e-5)

    def requires(self, program: Program) -> list[str]:
        paths = {str(node.meta.get(PATH, "")) for graph in program.entries.values() for node in graph.calls}
        return [
            f"match: {pattern!r} matches no module of the model"
            for pattern in self.match
            if not any(fnmatchcase(path, pattern) for path in paths)
        ]

    def run(self, program: Program, context: Context) -> Program:
        weights = NewWeights(program)
        for entry, graph in program.entries.items():
            # What a round leaves can lie in regions that were cut for their length.
            while True:
                forms = forms_of(graph, weights.store, self._considers)
                cover = cheapest_cover(graph, forms)
                if not cover.chosen:
                    break
                for node in _Collapse(entry, graph, forms, cover, weights).run():
                    context.rewrote(node, entry)
            for node, reason in _reasons(graph, forms, cover):
                context.decline(node, reason, entry)
        return weights.settled(program)

    def _considers(self, node: Node) -> bool:
        path = str(node.meta.get(PATH, ""))
        return not self.match or any(fnmatchcase(path, pattern) for pattern in self.match)


@dataclass(frozen=True)
class Made:
    """What a new weight is: the ``role`` (``weight``, ``bias``) of the layer ``module`` in ``entry``."""

    entry: str
    module: str
    role: str

    @property
    def wish(self) -> str:
        return ".".join(filter(None, (self.module, self.role)))


class NewWeights:
    """Weights under provisional names, until it is known whose readers are gone and whose names are free."""

    def __init__(self, program: Program) -> None:
        self.store = dict(program.weights)
        self.names = WeightNames(program)
        self.made: dict[str, Made] = {}
        self.of_layer: dict[str, list[str]] = defaultdict(list)

    def put(self, made: Made, value: Expression) -> str:
        """A provisional name for ``value``; entries share what is equal."""
        for name in self.of_layer[made.wish]:
            if self.made[name].entry != made.entry and self.store[name] == value:
                return name
        name = self.names.fresh(made.module, f"merged_{made.role}")
        self.store[name], self.made[name] = value, made
        self.of_layer[made.wish].append(name)
        return name

    def settled(self, program: Program) -> Program:
        """``program`` with these weights, each under the name of the layer's own where nothing reads that any more."""
        reads = [node for graph in program.entries.values() for node in graph.fx.nodes if node.op == "get_attr"]
        taken = {str(node.target) for node in reads}
        final: dict[str, str] = {}
        for name, made in self.made.items():
            if name in taken and made.wish not in taken:
                final[name] = made.wish
                taken.add(made.wish)
                self.store[made.wish] = self.store.pop(name)
        for node in reads:
            node.target = final.get(str(node.target), node.target)
        return replace(program, weights=WeightStore(self.store)).pruned()


class _Collapse:
    """Puts the chosen forms of one graph in place; the nodes that were replaced are erased."""

    def __init__(self, entry: str, graph: Graph, forms: Forms, cover: Cover, weights: NewWeights) -> None:
        self.entry, self.graph, self.forms, self.cover, self.weights = entry, graph, forms, cover, weights
        self.bare: dict[Node, Node] = {}
        self.result: dict[Node, Node] = {}

    def run(self) -> list[Node]:
        """The nodes that were replaced, by which sites are told."""
        for node, form in self.cover.chosen.items():
            self._replace(node, form)
        self.graph.remove_dead_code()
        return list(self.cover.chosen)

    def _replace(self, node: Node, form: Form) -> None:
        operand = self._bare(form.root.node) if isinstance(form.root, Bare) else form.root
        operand = self.result.get(operand, operand)
        owner = _owner(node, form, self.forms)
        module = _module_of(owner)

        def store(role: str, value: Expression) -> Node:
            name = self.weights.put(Made(self.entry, module, role), value)
            return self.graph.weight(name, value, like=owner)

        with self.graph.before(node):
            made = emit(self.graph, operand, form.map, like=owner, store=store)
            if is_rearranged(node, form):
                made = self.graph.call(aten.reshape.default, made, list(shape_of(node)), like=node)
        if layout(made) != layout(node):
            raise OptpassError(f"%{node.name} ({path_of(node)}), {layout(node)}, became {layout(made)}")
        node.replace_all_uses_with(made)
        self.result[node] = made

    def _bare(self, norm: Node) -> Node:
        if norm not in self.bare:
            with self.graph.before(norm):
                self.bare[norm] = emit_bare(self.graph, norm)
        return self.bare[norm]


def _owner(node: Node, form: Form, forms: Forms) -> Node:
    """The dearest node between ``node`` and the root of ``form``, the last of equals: the others go into it."""
    root = form.root.node if isinstance(form.root, Bare) else form.root
    seen, pending = {node}, [node]
    while pending:
        current = pending.pop()
        for term in forms.steps.get(current, ()):
            if term.operand is not root and term.operand not in seen:
                seen.add(term.operand)
                pending.append(term.operand)
    return max(sorted(seen, reverse=True), key=lambda item: price_of(item, forms))


def _module_of(node: Node) -> str:
    """Where the weights of ``node`` lie: the module that holds the one it reads first, else its own."""
    stored = next((str(item.target) for item in node.all_input_nodes if item.op == "get_attr"), "")
    return stored.rpartition(".")[0] if stored else str(node.meta.get(PATH, ""))


def _reasons(graph: Graph, forms: Forms, cover: Cover) -> Iterator[tuple[Node, str]]:
    """What looked like a place of this pass and is none."""
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
