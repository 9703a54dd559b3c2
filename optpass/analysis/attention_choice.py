"""What passes that replace attentions ask of them: which are meant, what stands around them, who may see whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal

from torch.fx import Node

from optpass.analysis.attention import NORMS, Attention, Attentions
from optpass.analysis.module_paths import matches
from optpass.analysis.operators import aten, is_view
from optpass.errors import nearest_paths
from optpass.ir.graph import path_of, shape_of, value_of
from optpass.ir.weights import Constant, WeightStore

Key = tuple[str, int]
"""An attention in all entries: its path, and its number among those of this path."""


def keys_of(found: Attentions) -> dict[Attention, Key]:
    """The key of every attention."""
    counts: Counter[tuple[str, str]] = Counter()
    keys: dict[Attention, Key] = {}
    for each in found.found:
        keys[each] = (each.path, counts[each.entry, each.path])
        counts[each.entry, each.path] += 1
    return keys


class Choice:
    """The attentions that a pass's options ``layers`` (numbers in stacks) and ``match`` (modules) mean; all without."""

    def __init__(self, found: Attentions, layers: Collection[int] | None, match: Sequence[str]) -> None:
        self.found, self.layers, self.match = found, layers, match

    @property
    def chosen(self) -> list[Attention]:
        """In the order of entries and graphs."""
        return [each for each in self.found.found if self._in_layers(each) and self._matched(each, self.match)]

    @property
    def missed(self) -> Iterator[tuple[str, str]]:
        """Patterns and numbers that mean no attention, with the reason."""
        for pattern in self.match:
            if not any(self._matched(each, [pattern]) for each in self.found.found):
                near = nearest_paths(pattern, [each.path for each in self.found.found])
                yield pattern, f"no attention is in such a module{near}"
        for number in self.layers or ():
            if not any(each.layer == number for each in self.found.found):
                yield f"layer {number}", "no stack has an attention in such a layer"

    def _in_layers(self, each: Attention) -> bool:
        return self.layers is None or each.layer in self.layers

    def _matched(self, each: Attention, patterns: Sequence[str]) -> bool:
        return not patterns or matches(each.path, patterns)


def hiding(each: Attention, weights: WeightStore) -> Literal["causal", "mask", ""]:
    """What keeps some tokens from seeing others; a learned bias (a parameter, no input) hides none."""
    if each.core.is_causal:
        return "causal"
    return "" if all(_is_learned(mask, weights) for mask in each.core.masks) else "mask"


def _is_learned(mask: Node, weights: WeightStore) -> bool:
    """Whether ``mask`` is made of parameters, and of nothing that the input says."""
    if not value_of(mask).is_floating_point():
        return False
    pending, seen, learned = [mask], {mask}, False
    while pending:
        node = pending.pop()
        if node.op == "placeholder":
            return False
        if node.op == "get_attr":
            expression = weights[str(node.target)]
            computed = isinstance(expression, Constant) and expression.computed
            learned |= expression.dtype.is_floating_point and not computed
        fresh = [operand for operand in node.all_input_nodes if operand not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return learned


def output_projection(each: Attention) -> Node | str:
    """The linear layer that gives [batch, tokens, d] from the result and nothing else, or why there is none."""
    layers = each.projections.output
    if len(layers) != 1 or layers[0].target is not aten.linear.default:
        return "no one linear layer projects its result"
    [layer] = layers
    node: Any = layer.args[0]
    while node is not each.core.result.node:
        if not (is_view(node) or node.target is aten.to.dtype or node.target in NORMS):
            return f"its projection reads more than the attention ({path_of(node)}: %{node.name})"
        node = node.all_input_nodes[0]
    if len(shape_of(layer)) != 3 or shape_of(layer)[1] != each.queries.size:
        return f"its projection gives {list(shape_of(layer))}, and not [batch, tokens, channels]"
    return layer


def dead_without(result: Node, kept: Node) -> set[Node]:
    """The operators that nothing reads once ``result`` is gone, itself included, up to ``kept``; linear in them."""
    gone, pending = {result}, list(result.all_input_nodes)
    while pending:
        node = pending.pop()
        if node in gone or node is kept or node.op != "call_function" or not gone.issuperset(node.users):
            continue
        gone.add(node)
        pending.extend(node.all_input_nodes)
    return gone
