"""The cheapest way to compute a graph's affine nodes: each by its own operator, or by one operator on an earlier value.

The problem is that of technology mapping: a node's forms are its cuts, and what a choice saves depends on who else
reads what lies between. So it is solved as mappers do it (Mishchenko, Cho, Chatterjee and Brayton, "Combinational
and sequential mapping with priority cuts", 2007): first by prices shared among readers, then, what is read being
known, again by exact prices, a node at a time. Both are linear in the nodes, and what comes out dearer than the graph
as it was is dropped.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from torch.fx import Node

from optpass.analysis.affine.forms import Bare, Form, Forms, Value
from optpass.analysis.affine.maps import FREE, Affine, Price, Uniform
from optpass.analysis.mac_rules import macs_of
from optpass.ir.graph import Graph, example_shape, shape_of

ROUNDS = 2
"""Passes with exact prices; a third has not been seen to change anything."""


@dataclass(frozen=True, eq=False)
class Option:
    """One way to compute a value: its own price, the affine values it reads, the form (None: as it stands)."""

    price: Price
    reads: tuple[Value, ...]
    form: Form | None = None


@dataclass(frozen=True)
class Costlier:
    """A form of ``node`` that was left alone: it would cost ``price``, and what it would replace costs ``kept``."""

    node: Node
    form: Form
    price: Price
    kept: Price


@dataclass
class Cover:
    """``chosen``: the nodes to replace and their forms, in execution order; ``left``: what would have cost more."""

    chosen: dict[Node, Form] = field(default_factory=dict)
    left: list[Costlier] = field(default_factory=list)


def cheapest_cover(graph: Graph, forms: Forms) -> Cover:
    """Choose for every node of ``graph`` that is read."""
    return _Mapper(graph, forms).run()


class _Mapper:
    """``refs`` counts the readers that each value has under the present choice; a value without any is not computed."""

    def __init__(self, graph: Graph, forms: Forms) -> None:
        self.graph, self.forms = graph, forms
        self.options: dict[Value, tuple[Option, ...]] = {}
        for node in graph.calls:
            if node in forms.of:
                self._enter(node)
        self.choice: dict[Value, int] = {}
        self.refs: Counter[Value] = Counter()

    def _enter(self, node: Node) -> None:
        """The options of ``node``, the one that changes nothing first."""
        kept = Option(price_of(node, self.forms), self._open(t.operand for t in self.forms.steps.get(node, ())))
        made = [
            Option(_price_of_form(node, form), self._open([form.root]), form)
            for form in self.forms.of[node]
            if _is_worth_pricing(form)
        ]
        root = self.forms.of[node][0].root
        if isinstance(root, Bare):
            self.options[root] = (Option(Price(0, 0, 1), ()),)
        self.options[node] = (kept, *made)

    def _open(self, values: Iterable[Value]) -> tuple[Value, ...]:
        """Those of ``values`` that there is a choice about; the others are there anyway."""
        return tuple(value for value in values if isinstance(value, Bare) or value in self.forms.of)

    def run(self) -> Cover:
        self._share()
        self._count()
        for _ in range(ROUNDS):
            for value in self.options:
                if self.refs[value] and len(self.options[value]) > 1:
                    self._improve(value)
        self._drop_dearer()
        return self._cover()

    def _share(self) -> None:
        """Choose by prices of which each reader of a value bears its part."""
        flow: dict[Value, Price] = {}
        for value, options in self.options.items():
            node = value.node if isinstance(value, Bare) else value
            prices = []
            for option in options:
                price = option.price
                for read in option.reads:
                    price = price.plus(flow[read])
                prices.append(price)
            best = _best(prices)
            self.choice[value], flow[value] = best, prices[best].shared(max(1, len(node.users)))

    def _count(self) -> None:
        """Readers under the present choice, those outside of all regions first."""
        self.refs = Counter(read for node in self.graph.fx.nodes for read in self._fixed_reads(node))
        for value in reversed(self.options):
            if self.refs[value]:
                self.refs.update(self._chosen(value).reads)

    def _fixed_reads(self, node: Node) -> Iterable[Value]:
        """What is read whatever is chosen: by a node without forms, and by a normalisation, bare or not."""
        if node in self.forms.of and not isinstance(self.forms.of[node][0].root, Bare):
            return ()
        return self._open(node.all_input_nodes)

    def _chosen(self, value: Value) -> Option:
        return self.options[value][self.choice[value]]

    def _acquire(self, option: Option) -> Price:
        """Count ``option`` as used; what that adds."""
        price, pending = FREE, [option]
        while pending:
            current = pending.pop()
            price = price.plus(current.price)
            for read in current.reads:
                self.refs[read] += 1
                if self.refs[read] == 1:
                    pending.append(self._chosen(read))
        return price

    def _release(self, option: Option) -> Price:
        """The inverse of :meth:`_acquire`."""
        price, pending = FREE, [option]
        while pending:
            current = pending.pop()
            price = price.plus(current.price)
            for read in current.reads:
                self.refs[read] -= 1
                if self.refs[read] == 0:
                    pending.append(self._chosen(read))
        return price

    def _prices(self, value: Value) -> list[Price]:
        """What each option of ``value`` costs together with what only it reads; ``value`` must be released."""
        prices = []
        for option in self.options[value]:
            prices.append(self._acquire(option))
            self._release(option)
        return prices

    def _improve(self, value: Value) -> None:
        self._release(self._chosen(value))
        self.choice[value] = _best(self._prices(value))
        self._acquire(self._chosen(value))

    def _drop_dearer(self) -> None:
        """Back to the graph as it was, region by region, where that costs no more."""
        region = _Regions(self.options)
        now: dict[Value, Price] = defaultdict(lambda: FREE)
        before: dict[Value, Price] = defaultdict(lambda: FREE)
        for value, options in self.options.items():
            name = region.of(value)
            if self.refs[value]:
                now[name] = now[name].plus(self._chosen(value).price)
            if isinstance(value, Node):
                before[name] = before[name].plus(options[0].price)
        for value in self.options:
            name = region.of(value)
            if now[name] >= before[name]:
                self.choice[value] = 0
        self._count()

    def _cover(self) -> Cover:
        cover = Cover()
        for value in self.options:
            if not isinstance(value, Node) or not self.refs[value]:
                continue
            chosen = self._chosen(value)
            if chosen.form is not None:
                cover.chosen[value] = chosen.form
            farthest = self.options[value][-1]
            if farthest is not chosen and farthest.form is not None and farthest.form.depth > 1:
                cover.left.append(self._compared(value, farthest, farthest.form))
        return cover

    def _compared(self, node: Node, option: Option, form: Form) -> Costlier:
        """What ``option`` costs and what the present choice does, its root being there for both."""
        chosen, root = self._chosen(node), Option(FREE, option.reads)
        self._release(chosen)
        self._acquire(root)
        prices = self._prices(node)
        self._release(root)
        self._acquire(chosen)
        return Costlier(node, form, prices[self.options[node].index(option)], prices[self.choice[node]])


def _best(prices: Sequence[Price]) -> int:
    """The cheapest option; among equals the one that changes nothing, then the farthest, which leaves least behind."""
    return min(range(len(prices)), key=lambda index: (prices[index], index > 0, -index))


def _is_worth_pricing(form: Form) -> bool:
    """Not one step by another operator (a BatchNorm as product and sum would store less), nor reshapes alone."""
    if isinstance(form.map, Uniform):
        return form.depth > 1 or form.map.price(()) == FREE
    return form.depth > 1 and not (isinstance(form.map, Affine) and form.map.is_view)


def _price_of_form(node: Node, form: Form) -> Price:
    price = form.map.price(example_shape(node))
    return price.plus(Price(0, 0, 1)) if is_rearranged(node, form) else price


def is_rearranged(node: Node, form: Form) -> bool:
    """Whether ``node`` has the rows of what ``form`` makes of its root in another arrangement."""
    root = form.root.node if isinstance(form.root, Bare) else form.root
    dense = isinstance(form.map, Affine) and not form.map.spatial
    return dense and shape_of(root)[:-1] != shape_of(node)[:-1]


def price_of(node: Node, forms: Forms) -> Price:
    """What ``node`` costs as it stands; a weight that several nodes read is borne by all of them.

    Scale and shift per channel have no products that count.
    """
    step = forms.steps.get(node, ())
    elementwise = len(step) == 1 and isinstance(step[0].map, Affine) and step[0].map.is_elementwise
    inputs = node.all_input_nodes
    stored = [item for item in inputs if item.op == "get_attr" or forms.constants(item) is not None]
    weights = sum((Fraction(item.meta["val"].numel(), _readers(item, forms)) for item in stored), Fraction())
    return Price(0 if elementwise else macs_of(node), weights, 1)


def _readers(stored: Node, forms: Forms) -> int:
    """How many nodes read ``stored``, a weight or what is made of one."""
    return forms.readers[str(stored.target)] if stored.op == "get_attr" else len(stored.users)


class _Regions:
    """Disjoint sets of the values whose choices bear on one another."""

    def __init__(self, options: dict[Value, tuple[Option, ...]]) -> None:
        self.parent: dict[Value, Value] = {value: value for value in options}
        for value, choices in options.items():
            for option in choices:
                for read in option.reads:
                    self.parent[self.of(read)] = self.of(value)

    def of(self, value: Value) -> Value:
        """The value that stands for the whole region."""
        while self.parent[value] != value:
            self.parent[value] = self.parent[self.parent[value]]
            value = self.parent[value]
        return value
