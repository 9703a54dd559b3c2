"""Which blocks of a model are meant: by number, by module path, or all but the first of the costliest stack."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch.fx import Node

from optpass.analysis.blocks import Block, Stack
from optpass.analysis.mac_rules import macs_of
from optpass.analysis.module_paths import matches
from optpass.analysis.operators import aten
from optpass.errors import UserError, nearest
from optpass.ir.graph import Graph, operators, path_of

SHARE = 0.5
"""Part of a graph's products that a stack holds at least, to be the one that is meant without a name."""
NORMALISATIONS = (aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default)
NUMBERS = re.compile(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?")


@dataclass(frozen=True)
class BlockRange:
    """The ``blocks`` of a stack, with those ``before`` them."""

    before: tuple[Block, ...]
    blocks: tuple[Block, ...]

    @property
    def entering(self) -> tuple[Node, ...]:
        """The values of the streams in front of the range."""
        return self.blocks[0].entering

    @property
    def leaving(self) -> tuple[Node, ...]:
        """Those behind it that it has changed."""
        return tuple(value for value in self.blocks[-1].leaving if value not in self.entering)


class NoRangeError(Exception):
    """There are no blocks to speak of; the text says why."""


def block_range(graph: Graph, found: Sequence[Stack], sampled: Collection[Node], text: str, head: int) -> BlockRange:
    """The range that ``text`` names in ``found``, the stacks of ``graph``, the costliest first.

    ``3-24`` are blocks of the costliest stack by number, from 0 and both included; anything else is a list of
    patterns of module paths, separated by commas or spaces. Without a text, all blocks but the first ``head``.
    Blocks count that compute on what depends on the sample (``sampled``): not those of a text's refiner.

    Raises:
        NoRangeError: nothing is named, and no stack stands out or it has no more blocks than ``head``.
        UserError: what is named is not there, or not in a row.
    """
    rows = [_sampled(stack, sampled) for stack in found]
    rows = [row for row in rows if row]
    if numbers := NUMBERS.fullmatch(text):
        first = int(numbers[1])
        return _numbered(rows[0] if rows else (), first, int(numbers[2] or first))
    if text.strip():
        return _matching(rows, text.replace(",", " ").split())
    row = _main(graph, rows)
    if len(row) <= head:
        raise NoRangeError(f"the stack has {len(row)} blocks, and the first {head} are computed in every step")
    return BlockRange(row[:head], row[head:])


def _sampled(stack: Stack, sampled: Collection[Node]) -> tuple[Block, ...]:
    return tuple(block for block in stack.blocks if any(residual.add in sampled for residual in block.residuals))


def _main(graph: Graph, rows: Sequence[tuple[Block, ...]]) -> tuple[Block, ...]:
    if not rows:
        raise NoRangeError("nothing is added to a residual stream: there are no blocks")
    total, macs = sum(map(macs_of, operators(graph))), Stack(rows[0]).macs
    if macs < SHARE * total:
        if norm := _norm_between(rows):
            raise NoRangeError(
                f"the stream is normalised between additions (post-norm, at {path_of(norm)}), so that what leaves a "
                "block is not what entered it and a residual"
            )
        raise NoRangeError(
            f"no stack of blocks holds half of the model's products (from {rows[0][0].path}: {macs / total:.0%}); "
            "name blocks, or cut the model at a module with cache-features"
        )
    return rows[0]


def _norm_between(rows: Sequence[tuple[Block, ...]]) -> Node | None:
    """A normalisation that ends one row and begins another."""
    ends = {value for row in rows for value in row[-1].leaving}
    heads = (value for row in rows for value in row[0].entering)
    return next((head for head in heads if head.target in NORMALISATIONS and head.args[0] in ends), None)


def _numbered(row: tuple[Block, ...], first: int, last: int) -> BlockRange:
    if not first <= last < len(row):
        raise UserError(f"there are no blocks {first}-{last}: the stack has {len(row)}, counted from 0")
    return BlockRange(row[:first], row[first : last + 1])


def _matching(rows: Sequence[tuple[Block, ...]], patterns: Sequence[str]) -> BlockRange:
    for row in rows:
        places = [place for place, block in enumerate(row) if _is_named(block, patterns)]
        if places and places != list(range(places[0], places[-1] + 1)):
            missing = next(place for place in range(places[0], places[-1]) if place not in places)
            raise UserError(f"blocks {patterns} are not in a row: {row[missing].path} lies between them")
        if places:
            return BlockRange(row[: places[0]], row[places[0] : places[-1] + 1])
    known = [block.path for row in rows for block in row]
    raise UserError(f"no block is called {' '.join(patterns)!r}{nearest(' '.join(patterns), known)}")


def _is_named(block: Block, patterns: Sequence[str]) -> bool:
    return any(matches(path, patterns) for path in block.path.split("+"))
