"""Cross-attentions to the frames of a video that see a memory bank in their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from optpass.analysis.attention import NORMS, Attention
from optpass.analysis.axes import Atom, Axes
from optpass.analysis.axes.structure import atoms, factors, quotient, sized
from optpass.analysis.operators import POINTWISE_BINARY, POINTWISE_UNARY, is_view
from optpass.ir.graph import Graph, shape_of
from optpass.ir.sizes import is_size
from optpass.rewrite.baked_sizes import NewSizes, with_new_sizes
from optpass.rewrite.memory_bank import BankWriter, is_bank

CARRIED = POINTWISE_UNARY | POINTWISE_BINARY | NORMS


@dataclass(frozen=True)
class Remembered:
    """Attentions whose keys and values are projections of ``features`` [batch, frames · tokens, channels].

    ``atom`` is the axis of the frames, or of frames and tokens where nothing tells them apart; ``nodes`` are the
    operators from the projections to the attentions' results.
    """

    features: Node
    frames: int
    atom: Atom
    readers: tuple[Node, ...]
    nodes: frozenset[Node]


def remembered(each: Attention, axes: Axes, frames: int | None) -> Remembered | str:
    """What is behind the keys of one attention, a video of ``frames`` if given; or why that cannot become a bank."""
    if each.core.is_causal or each.core.masks:
        return "it has a mask or is causal (simplify drops a mask that hides nothing)"
    if each.kind == "self":
        return "it is self-attention: queries would be merged with keys"
    features = _features(each)
    if isinstance(features, str):
        return features
    if is_bank(features):
        return "its keys are a bank already"
    found = _frames(axes, features, frames)
    if isinstance(found, str):
        return found
    if found[1] in atoms(axes.of(each.core.query.node)[each.core.query.tokens]):
        return "its queries are of the same frames"
    readers = tuple(dict.fromkeys((*each.projections.key, *each.projections.value)))
    nodes = _between(each, readers)
    return nodes if isinstance(nodes, str) else Remembered(features, *found, readers, nodes)


def _features(each: Attention) -> Node | str:
    keys, values = each.projections.key, each.projections.value
    if len(keys) != 1 or len(values) != 1 or keys[0].args[0] is not values[0].args[0]:
        return "its keys and values are not projections of one value"
    features: Any = keys[0].args[0]
    size = shape_of(each.core.key.node)[each.core.key.tokens]
    if len(shape_of(features)) != 3 or shape_of(features)[1] != size:
        return f"%{features.name} is not [batch, {size}, channels]"
    assert isinstance(features, Node)
    return features


def _frames(axes: Axes, features: Node, frames: int | None) -> tuple[int, Atom] | str:
    """How many frames there are, and their axis."""
    dimension = axes.of(features)[1]
    outermost = factors(dimension)[0]
    if not isinstance(outermost, Atom):
        return f"its {dimension.size} keys are {dimension!r}, and no frames"
    if frames is None and "frames" not in axes.names(outermost):
        return f"what of its {dimension.size} keys are frames is not known: say frames"
    frames = outermost.size if frames is None else frames
    if not isinstance(frames, int):
        return "the number of frames is open, and a bank takes them one by one"
    if quotient(dimension.size, frames) is None:
        return f"its {dimension.size} keys are not those of {frames} frames"
    if outermost.size != frames and len(factors(dimension)) > 1:
        return f"its keys are {dimension!r}, and not {frames} frames one after another"
    return frames, outermost


def _between(each: Attention, readers: Sequence[Node]) -> frozenset[Node] | str:
    """The operators from ``readers`` to the attention's result, or why keys may not be fewer there."""
    found = {*each.core.nodes, *readers}
    pending = [operand.node for operand in (each.core.key, each.core.value)]
    while pending:
        node = pending.pop()
        if node in found:
            continue
        if node.target not in CARRIED and not is_view(node):
            return f"%{node.name} stands between its projections and the attention"
        found.add(node)
        for operand in node.all_input_nodes:
            if is_size(operand):
                continue
            if operand.op != "get_attr":
                pending.append(operand)
            elif len(shape_of(operand)) > 1:
                return f"%{node.name} has a value for every key"
    for node in found - {each.core.result.node}:
        if not found.issuperset(node.users):
            return f"%{node.name} is read by more than the attention"
    return frozenset(found)


def remember(graph: Graph, axes: Axes, sites: Sequence[Remembered], length: int) -> None:
    """Put one bank of ``length`` frames in the place of the features that all ``sites`` read."""
    site = sites[0]
    readers = sorted({reader for each in sites for reader in each.readers})
    with graph.before(readers[0]):
        writer = BankWriter(graph, length, readers[0])
        bank = writer.flat(writer.filled(site.features, site.frames), site.features)
    size = site.atom.size // site.frames * length
    for reader in readers:
        reader.replace_input_with(site.features, bank)
    sizes = NewSizes(axes.walk, lambda structure: sized(structure, lambda a: size if a is site.atom else a.size))
    for node in sorted({node for each in sites for node in each.nodes}):
        with_new_sizes(graph, node, sizes)
        node.meta["val"] = graph.infer(node)
