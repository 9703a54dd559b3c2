"""The pass ``reparameterize``."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch
from pydantic import Field
from torch.fx import Node

from optpass.analysis.affine.cover import Cover, cheapest_cover, is_rearranged, price_of
from optpass.analysis.affine.forms import Bare, Form, Forms, forms_of
from optpass.analysis.affine.reasons import reasons
from optpass.errors import OptpassError
from optpass.ir.graph import PATH, Graph, path_of, shape_of
from optpass.ir.program import Program
from optpass.ir.weights import Expression
from optpass.pipeline.contract import exact
from optpass.pipeline.passes import Context, Pass
from optpass.rewrite.affine import emit, emit_bare
from optpass.rewrite.merged_weights import Made, MergedWeights
from optpass.rewrite.rules import layout

aten = torch.ops.aten


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
        weights = MergedWeights(program)
        for entry, graph in program.entries.items():
            # What a round leaves can lie in regions that were cut for their length.
            while True:
                forms = forms_of(graph, weights.store, self._considers)
                cover = cheapest_cover(graph, forms)
                if not cover.chosen:
                    break
                for node in _Collapse(entry, graph, forms, cover, weights).run():
                    context.rewrote(node, entry)
            for node, reason in reasons(graph, forms, cover):
                context.decline(node, reason, entry)
        return weights.settled(program)

    def _considers(self, node: Node) -> bool:
        path = str(node.meta.get(PATH, ""))
        return not self.match or any(fnmatchcase(path, pattern) for pattern in self.match)


class _Collapse:
    """Puts the chosen forms of one graph in place; the nodes that were replaced are erased."""

    def __init__(self, entry: str, graph: Graph, forms: Forms, cover: Cover, weights: MergedWeights) -> None:
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
