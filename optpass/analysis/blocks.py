"""Stacks of residual blocks, found from the graph alone: what repeats, and the values between one block and the next.

Module paths name what is found, group what does not repeat, and say which of several equal ways to cut a periodic
row of additions is the one that its author meant. What repeats is decided by operators, shapes and literals.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor
from torch.fx import Node

from optpass.analysis.carriers import CATS, carried_from, joined
from optpass.analysis.mac_rules import macs_of
from optpass.analysis.pieces import piece_of
from optpass.analysis.residuals import Residual, Residuals, residuals
from optpass.ir.graph import Graph
from optpass.ir.hashing import text_digest
from optpass.ir.sizes import sizes_of
from optpass.ir.weights import dtype_name

LONGEST_PERIOD = 24
"""Residual additions that a repeated block may hold."""


@dataclass(frozen=True)
class Block:
    """Consecutive residual additions of one stream, or of several that share operators (text and image tokens).

    ``entering`` and ``leaving`` are the value of each stream before and after, the same node where the block leaves
    a stream alone. Blocks of one ``structure`` compute the same function of their streams with other weights.
    """

    path: str
    residuals: tuple[Residual, ...]
    entering: tuple[Node, ...]
    leaving: tuple[Node, ...]
    structure: str


@dataclass(frozen=True)
class Run:
    """Blocks ``start`` to ``stop`` (not included) of a stack, all of one structure."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Stack:
    """Blocks in a row: each begins where the one before ended, if need be with the streams put together (Flux)."""

    blocks: tuple[Block, ...]

    @property
    def runs(self) -> list[Run]:
        """The longest runs of equal blocks, in order; a block without an equal neighbour is a run of one."""
        found, start = [], 0
        for _, equal in groupby(self.blocks, key=lambda block: block.structure):
            count = len(list(equal))
            found.append(Run(start, start + count))
            start += count
        return found

    @property
    def macs(self) -> int:
        """Multiply-accumulates of everything in the blocks, at the captured sizes."""
        nodes = {node for block in self.blocks for residual in block.residuals for node in residual.all_nodes}
        return sum(map(macs_of, nodes))


def stacks(graph: Graph, found: Residuals | None = None) -> list[Stack]:
    """All stacks of ``graph``, the costliest first; nested ones (blocks within a branch) stand for themselves.

    Time linear in the nodes, ``found`` being what :func:`residuals` says of the graph.
    """
    found = found or residuals(graph)
    order = {node: index for index, node in enumerate(graph.fx.nodes)}
    groups = _coupled(_chains(found.found), order)
    rows = [_blocks(group, order) for group in groups]
    return sorted(map(Stack, _linked(rows)), key=lambda stack: -stack.macs)


Chain = list[Residual]
Element = tuple[Residual, ...]
"""Residuals of several streams that share operators, or a single one."""


@dataclass
class _Group:
    """Streams that run beside one another: their chains, and the residuals in the order in which they are added."""

    chains: list[Chain]
    elements: list[Element]


def _chains(found: Sequence[Residual]) -> list[Chain]:
    """Residuals of which each carries on the one before; of several that begin at one value, the outermost."""
    follower = {residual.stream: residual for residual in found}
    additions = {residual.add for residual in found}
    chains = []
    for residual in found:
        if residual.stream in additions and follower[residual.stream] is residual:
            continue
        chain: Chain = [residual]
        while (after := follower.get(chain[-1].add)) is not None:
            chain.append(after)
        chains.append(chain)
    return chains


def _coupled(chains: list[Chain], order: dict[Node, int]) -> list[_Group]:
    """Chains with the others that share operators with them, or with what lies within them, at the same depth."""
    outer = {inner: residual for chain in chains for residual in chain for inner in residual.inner}
    number = {residual: index for index, chain in enumerate(chains) for residual in chain}
    elements, streams = _Sets(), _Sets()
    owner: dict[Node, Residual] = {}
    for residual in number:
        for node in residual.nodes:
            one, other = residual, owner.setdefault(node, residual)
            while outer.get(one) is not outer.get(other) and one in outer and other in outer:
                one, other = outer[one], outer[other]
            if number[other] != number[one] and outer.get(other) is outer.get(one):
                elements.join(other, one)
                streams.join(number[other], number[one])
    groups: dict[Any, _Group] = {}
    for index, chain in enumerate(chains):
        groups.setdefault(streams.of(index), _Group([], [])).chains.append(chain)
    for group in groups.values():
        members: dict[Any, list[Residual]] = {}
        for residual in sorted((r for chain in group.chains for r in chain), key=lambda r: order[r.add]):
            members.setdefault(elements.of(residual), []).append(residual)
        group.elements = list(map(tuple, members.values()))
    return list(groups.values())


class _Sets:
    """Disjoint sets of whatever was joined."""

    def __init__(self) -> None:
        self.above: dict[Any, Any] = {}

    def of(self, item: Any) -> Any:
        while (above := self.above.get(item, item)) is not item:
            self.above[item] = item = self.above.get(above, above)
        return item

    def join(self, one: Any, other: Any) -> None:
        one, other = self.of(one), self.of(other)
        if one is not other:
            self.above[other] = one


def _blocks(group: _Group, order: dict[Node, int]) -> list[Block]:
    number = {residual: index for index, chain in enumerate(group.chains) for residual in chain}
    values = [chain[0].stream for chain in group.chains]
    texts: dict[Residual, str] = {}
    tokens = ["|".join(f"{number[r]}:{_structure(r, texts)}" for r in element) for element in group.elements]
    blocks = []
    for start, stop in _cuts(tokens, [element[0].path for element in group.elements]):
        entering = tuple(values)
        members = tuple(residual for element in group.elements[start:stop] for residual in element)
        for residual in members:
            values[number[residual]] = residual.add
        path = _path(residual.path for residual in members)
        blocks.append(Block(path, members, entering, tuple(values), text_digest("\n".join(tokens[start:stop]))))
    return blocks


def _path(paths: Iterable[str]) -> str:
    return "+".join(dict.fromkeys(paths))


def _cuts(tokens: list[str], paths: list[str]) -> list[tuple[int, int]]:
    """Where blocks begin and end: what repeats, from the left; the rest by the module that it stands in."""
    repeats = {period: _repeats(tokens, period) for period in range(1, min(LONGEST_PERIOD, len(tokens) // 2) + 1)}
    cuts: list[tuple[int, int]] = []
    position = rest = 0

    def close(end: int) -> None:
        for _, equal in groupby(range(rest, end), key=paths.__getitem__):
            places = list(equal)
            cuts.append((places[0], places[-1] + 1))

    while position < len(tokens):
        covered = {period: period * counts[position] for period, counts in repeats.items() if counts[position] > 1}
        if not covered:
            position += 1
            continue
        period = max(covered, key=lambda p: (covered[p], -p))
        start = _phase(position, period, repeats[period], paths)
        close(start)
        position = rest = start + period * repeats[period][start]
        cuts.extend((at, at + period) for at in range(start, position, period))
    close(len(tokens))
    return cuts


def _repeats(tokens: list[str], period: int) -> list[int]:
    """For every position, how many equal pieces of length ``period`` follow one another from there."""
    equal, counts = 0, [1] * len(tokens)
    for position in reversed(range(len(tokens) - period)):
        equal = equal + 1 if tokens[position] == tokens[position + period] else 0
        counts[position] = equal // period + 1
    return counts


def _phase(position: int, period: int, counts: list[int], paths: list[str]) -> int:
    """The place, of those that lose no repetition, where a module begins; ``position`` where none does."""
    for start in range(position, position + period):
        if counts[start] == counts[position] and (start == 0 or paths[start - 1] != paths[start]):
            return start
    return position


def _structure(residual: Residual, texts: dict[Residual, str]) -> str:
    """What a branch computes: operators, shapes, dtypes and literals; values from outside by their shape alone.

    Rearrangements on the way in count as the stream itself: the first block has none where the second has some.
    """
    if residual in texts:
        return texts[residual]
    names: dict[Node, str] = {residual.root: "x"}
    for index, inner in enumerate(residual.inner):
        names[inner.add] = f"inner{index}:{_structure(inner, texts)}"
    lines: list[str] = [residual.kind]
    for node in residual.nodes:
        if _carries(node, names):
            names[node] = "x"
            continue
        names[node] = f"%{len(lines)}"
        arguments = _text((node.args, node.kwargs), names)
        lines.append(f"{node.target}{arguments}{_value_text(node.meta['val'])}")
    texts[residual] = text_digest("\n".join([*lines, str(names.get(residual.branch))]))
    return texts[residual]


def _carries(node: Node, names: dict[Node, str]) -> bool:
    before = carried_from(node)
    if before is None and (piece := piece_of(node)) and all(user.target in CATS for user in node.users):
        before = piece.source
    return before is not None and names.get(before) == "x"


def _text(value: Any, names: dict[Node, str]) -> str:
    if isinstance(value, Node):
        return names.get(value) or f"{value.op == 'get_attr'}{_value_text(value.meta['val'])}"
    if isinstance(value, (list, tuple)):
        return f"({','.join(_text(item, names) for item in value)})"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}={_text(item, names)}' for key, item in value.items())}}}"
    return repr(value)


def _value_text(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)}{sizes_of(value)}"
    return f"({','.join(map(_value_text, value))})" if isinstance(value, (list, tuple)) else type(value).__name__


def _linked(rows: list[list[Block]]) -> list[tuple[Block, ...]]:
    """Rows of blocks after one another where the one begins with what the other ends with, joined or not.

    Of several that begin there, the costliest follows: of a branch and of what lies within it, the branch.
    """
    ends = {value: index for index, row in enumerate(rows) for value in row[-1].leaving}
    macs = [Stack(tuple(row)).macs for row in rows]
    after: dict[int, int] = {}
    for index, row in enumerate(rows):
        sources = {ends.get(value) for head in row[0].entering for value in _put_together(head, ends)}
        if len(sources) == 1 and (source := sources.pop()) is not None and source != index:
            after[source] = max(after.get(source, index), index, key=macs.__getitem__)
    result = []
    for first in sorted(set(range(len(rows))) - set(after.values())):
        joined_rows, current = list(rows[first]), first
        while (following := after.get(current)) is not None:
            joined_rows.extend(rows[following])
            current = following
        result.append(tuple(joined_rows))
    return result


def _put_together(head: Node, ends: Mapping[Node, int]) -> list[Node]:
    """The values that a stream's beginning is rearranged or joined from, as far back as what ``ends`` has."""
    found, pending = [], [head]
    while pending:
        node = pending.pop()
        before = carried_from(node)
        parts = [] if node in ends else joined(node) if before is None else [before]
        pending.extend(parts)
        if not parts:
            found.append(node)
    return found
