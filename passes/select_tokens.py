"""The pass ``select-tokens``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from torch.fx import Node

from optpass.analysis.attention import Attention, Attentions, attentions
from optpass.analysis.blocks import Block
from optpass.analysis.module_paths import matches
from optpass.analysis.operators import aten, is_view
from optpass.analysis.token_flow import TokenFlow, token_flow
from optpass.ir.graph import Graph, shape_of
from optpass.ir.program import Program
from optpass.ir.weights import Expression
from optpass.pipeline.contract import Contract, approximate, retrain
from optpass.pipeline.passes import Context, Pass
from optpass.rewrite.attention_received import unreadable
from optpass.rewrite.bypassed_tokens import Bypass, BypassedTokens
from optpass.rewrite.dropped_tokens import Protected
from optpass.rewrite.fewer_tokens import DroppedTokens, MergedTokens, Place, countable
from optpass.rewrite.merged_tokens import key_layout, most
from optpass.rewrite.naming import WeightNames

SHARE = 0.066
"""Of the tokens that are merged in a layer where nothing is said: 13 of 197, as often in the paper."""
RATE = 0.7
"""Of the tokens that stay, or take part, where nothing is said: EVAD's."""
DROPPING = (0.25, 0.5, 0.75)
"""Where tokens are dropped in a stack of any depth: in layers 3, 6 and 9 of 12."""


class SelectTokens(Pass):
    """Attention and MLP on all N tokens → on fewer: alike ones merged, unimportant ones dropped or past a layer.

    `merge` (ToMe): between attention and MLP the r most alike pairs of tokens become one token each, by bipartite
    soft matching of the keys; attention counts a token as often as it stands for others (log size), and so does a
    mean over tokens. `r` is a number, one for each layer, or a `ratio` of the tokens there are; at most half of those
    that are free. `inflect` tilts a number over the layers: −1 merges twice as many in the first and none in the last.

    `drop` (EVAD, IA-RED²): at the same place, ⌈rate · N⌉ tokens stay: class tokens, with `protect: frame` the middle
    frame of a video, and those that receive most attention, the mean over heads and queries; `weight` is how often
    queries of that frame count. A mean over tokens is over those that are left.

    `bypass` (ToSA): of a layer only ⌈rate · N⌉ tokens take part, class tokens and those that a selector predicts to be
    wanted, from the attention map of the layer before; the others pass it by unchanged, and all keep their places. The
    selector is ours, for the authors' is not published, and has to be trained; `surrogate: column-mean` takes what each
    token received in the layer before as the prediction, and has no parameters.

    Nothing is changed where r is 0 or the rate 1. The contract is `approximate`, with a selector `retrain`.

    Leaves alone, with the reason: cross-attention, windows, masks and causal attention; an open number of tokens;
    layers behind which something reads tokens by their place, such as a grid or a result with a row for each (not
    `bypass`); layers without a map in the layer before (`bypass`); what an earlier run has selected.

    Source: ToMe, Bolya et al., arXiv 2210.09461; EVAD, Chen et al., arXiv 2304.08451; IA-RED², Pan et al., arXiv
    2106.12620; ToSA, Singh et al., arXiv 2406.08816.
    """

    method: Literal["merge", "drop", "bypass"] = Field("merge", description="what becomes of tokens")
    r: Annotated[int, Field(ge=0)] | tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="merge: tokens that go in each layer, or one number for each of the chosen layers"
    )
    ratio: float | None = Field(None, ge=0, le=0.5, description="merge: share of the tokens that goes in each layer")
    inflect: float = Field(0.0, ge=-1, le=1, description="merge: r falls (-1) or rises (1) over the layers")
    rate: float | None = Field(None, gt=0, le=1, description="drop, bypass: share of the tokens that stay or take part")
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="from 0 in each stack; all (merge), the ends of three quarters (drop), every second (bypass)"
    )
    match: tuple[str, ...] = Field((), description="only attentions of these modules, e.g. '*.layers.[3-8].*'")
    protect: Literal["class", "frame"] = Field(
        "class", description="drop: what always stays, class tokens or a frame too"
    )
    weight: float = Field(1.0, gt=0, description="drop: of the queries of the protected frame")
    surrogate: Literal["selector", "column-mean"] = Field("selector", description="bypass: what predicts the map")
    seed: int = Field(0, ge=0, description="of the selector's weights")

    contract = approximate()

    @property
    def promise(self) -> Contract:
        return retrain() if self.method == "bypass" and self.surrogate == "selector" else self.contract

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        merging = self.r is not None or self.ratio is not None or bool(self.inflect)
        if merging and self.method != "merge":
            raise ValueError(f"r, ratio and inflect go with method: merge; of {self.method} give the rate")
        if self.rate is not None and self.method == "merge":
            raise ValueError("rate goes with method: drop or bypass; of merge give r or ratio")
        if self.r is not None and self.ratio is not None:
            raise ValueError("r and ratio say the same thing in two ways: give one")
        if self.inflect and not isinstance(self.r, int):
            raise ValueError("inflect tilts one number r over the layers: give that")
        if (self.protect == "frame" or self.weight != 1) and self.method != "drop":
            raise ValueError("protect: frame and weight go with method: drop")
        if self.weight != 1 and self.protect != "frame":
            raise ValueError("weight is that of the protected frame: add protect: frame")
        return self

    def run(self, program: Program, context: Context) -> Program:
        found = attentions(program)
        made: dict[str, Expression] = {}
        selectors = _Selectors(WeightNames(program))
        for entry, graph in program.entries.items():
            rows = [row for row in found.rows if row[0].entry == entry]
            if (node := _selected(graph)) and rows:
                context.decline(node, "tokens are selected already", entry)
                continue
            chosen = [each for row in rows for each in self._of_row(row, context)]
            self._note_missed(found, rows, entry, context)
            site = _Sites(self, graph, entry, found, context)
            if self.method == "bypass":
                site.bypass(chosen, selectors, made)
            elif chosen:
                site.shorten(sorted(chosen, key=lambda each: each.core.result.node))
            graph.remove_dead_code()
        return program.with_untrained(made) if made else program

    def _of_row(self, row: Sequence[Attention], context: Context) -> Iterator[Attention]:
        """The attentions of a stack that the options mean."""
        depth = len(row)
        for number in self._numbers(depth):
            if number >= depth:
                context.decline(row[0].path, f"there is no layer {number} in its stack of {depth}", row[0].entry)
            elif not self.match or matches(row[number].path, self.match):
                yield row[number]

    def _numbers(self, depth: int) -> Sequence[int]:
        if self.layers is not None:
            return self.layers
        if self.method == "merge" or self.match:
            return range(depth)
        if self.method == "drop":
            return sorted({int(depth * share) for share in DROPPING})
        return range(1, depth, 2)

    def goes(self, count: int, protected: int, number: int, places: int) -> int:
        """How many of ``count`` tokens are merged at the place ``number`` (from 0) of ``places``."""
        if isinstance(self.r, tuple):
            wanted = self.r[number]
        elif self.r is not None:
            # The authors' schedule: from one end to the other in equal steps, rounded down.
            least = int(self.r * (1 - self.inflect))
            step = (2 * (self.r - least)) / (places - 1) if places > 1 else 0
            wanted = int(least + step * number) if places > 1 else self.r
        else:
            wanted = int((SHARE if self.ratio is None else self.ratio) * count)
        return min(wanted, most(count, protected))

    def stay(self, count: int) -> int:
        """How many of ``count`` tokens stay, or take part."""
        return math.ceil((RATE if self.rate is None else self.rate) * count)

    def _note_missed(
        self, found: Attentions, rows: Sequence[Sequence[Attention]], entry: str, context: Context
    ) -> None:
        for each in found.of(entry):
            if each.stack is None:
                context.decline(each.core.result.node, "its result enters no residual stream", entry)
        for pattern in self.match:
            if not any(matches(each.path, [pattern]) for row in rows for each in row):
                context.decline(pattern, "no attention of a stack is in such a module", entry)


class _Selectors:
    """What a layer's selector's parameters are called, by the attention's path and its number among those of it."""

    def __init__(self, names: WeightNames) -> None:
        self.names = names
        self.known: dict[tuple[str, int], str] = {}

    def of(self, path: str, number: int) -> str:
        if (path, number) not in self.known:
            self.known[path, number] = self.names.fresh(path, "selector")
        return self.known[path, number]


class _Sites:
    """Chooses the places in one entry, says why others are none, and has the rewrite done."""

    def __init__(self, options: SelectTokens, graph: Graph, entry: str, found: Attentions, context: Context) -> None:
        self.options, self.graph, self.entry, self.context = options, graph, entry, context
        self.attentions = found.of(entry)
        self.rows = [row for row in found.rows if row[0].entry == entry]
        self.numbers: dict[Attention, int] = {}

    def decline(self, each: Attention, reason: str) -> None:
        self.context.decline(each.path, reason, self.entry)

    def shorten(self, chosen: Sequence[Attention]) -> None:
        """Merge or drop behind each of ``chosen``, which are in the order of the graph."""
        r = self.options.r
        if isinstance(r, tuple) and len(r) != len(chosen):
            self.decline(chosen[0], f"r has {len(r)} numbers, and {len(chosen)} layers are chosen")
            return
        self.numbers = {each: number for number, each in enumerate(chosen)}
        fitting = self._fitting(chosen)
        flow = self._flow(fitting)
        fitting = self._allowed(fitting, flow)
        places = self._places(fitting, self._flow(fitting))
        if not places:
            return
        flow = self._flow([place.attention for place in places])
        protected = _protected(places[0].attention, self.options.protect)
        assert isinstance(protected, Protected)
        if self.options.method == "merge":
            MergedTokens(self.graph, places, flow, protected.first, self.attentions).write()
        else:
            DroppedTokens(self.graph, places, flow, protected, self.options.weight).write()
        for place in places:
            self.context.rewrote(place.attention.path, self.entry)

    def _fitting(self, chosen: Sequence[Attention]) -> list[Attention]:
        fitting: list[Attention] = []
        for each in chosen:
            reason = _unfit(each) or self._unlike(each, fitting[0] if fitting else each)
            if reason:
                self.decline(each, reason)
            else:
                fitting.append(each)
        return fitting

    def _unlike(self, each: Attention, first: Attention) -> str:
        """Why tokens cannot be chosen by this attention, together with those behind ``first``."""
        batch = shape_of(_stream(each))[0]
        protected = _protected(each, self.options.protect)
        if isinstance(protected, str):
            return protected
        if protected != _protected(first, self.options.protect):
            return "the tokens that always stay are not those of the first place"
        return key_layout(each, batch) if self.options.method == "merge" else unreadable(each, batch)

    def _flow(self, sites: Sequence[Attention]) -> TokenFlow:
        starts = {_stream(each): number for number, each in enumerate(sites, 1)}
        nodes = (*self.graph.calls, self.graph.output_node)
        protected = sites[0].queries.class_tokens if sites else 0
        flow = token_flow(nodes, starts, [each.core for each in self.attentions], protected)
        if self.options.method == "merge":
            for each in self.attentions:
                rows = flow.rows.get(each.core.key.node)
                if rows and not countable(each.core, shape_of(_stream(sites[rows.level - 1]))[0], each.heads):
                    flow.refuse(each.core.result.node, rows.level, "has scores that are no batch and heads")
        return flow

    def _allowed(self, sites: Sequence[Attention], flow: TokenFlow) -> list[Attention]:
        """The ``sites`` behind which nothing needs all tokens."""
        hindered = flow.hindered
        for number, each in enumerate(sites, 1):
            if number in hindered:
                obstacle = hindered[number]
                self.decline(each, f"%{obstacle.node.name} behind it {obstacle.reason}")
        return [each for number, each in enumerate(sites, 1) if number not in hindered]

    def _places(self, sites: Sequence[Attention], flow: TokenFlow) -> list[Place]:
        """Where fewer tokens stay, and how many."""
        places: list[Place] = []
        left: dict[int, int] = {0: 0}
        for number, each in enumerate(sites, 1):
            stream = _stream(each)
            total = int(shape_of(stream)[1])
            count = left[flow.arriving[stream]] or total
            kept = self._kept(each, count)
            left[number] = kept if isinstance(kept, int) else count
            if isinstance(kept, int):
                places.append(Place(stream, each, kept, total))
            else:
                self.decline(each, kept)
        return places

    def _kept(self, each: Attention, count: int) -> int | str:
        protected = _protected(each, self.options.protect)
        assert isinstance(protected, Protected)
        if self.options.method == "merge":
            kept = count - self.options.goes(count, protected.first, self.numbers[each], len(self.numbers))
            return kept if kept < count else f"nothing is to be merged of its {count} tokens"
        kept = self.options.stay(count)
        if kept <= protected.count:
            return f"{kept} of {count} tokens would stay, and {protected.count} always do"
        return kept if kept < count else f"all of its {count} tokens stay"

    def bypass(self, chosen: Sequence[Attention], selectors: _Selectors, made: dict[str, Expression]) -> None:
        """Let some tokens pass by the blocks of ``chosen``."""
        before = {each: prior for row in self.rows for prior, each in pairwise(row)}
        taken: set[Block] = set()
        writer = BypassedTokens(self.graph, self.options.surrogate, self.options.seed, made)
        counts = Counter[str]()
        numbers = {}
        for each in self.attentions:
            numbers[each] = counts[each.path]
            counts[each.path] += 1
        for each in chosen:
            site = self._bypass(each, before.get(each), taken)
            if isinstance(site, str):
                self.decline(each, site)
                continue
            writer.write(site, selectors.of(each.path, numbers[each]))
            taken.add(_block(each))
            self.context.rewrote(each.path, self.entry)

    def _bypass(self, each: Attention, prior: Attention | None, taken: set[Block]) -> Bypass | str:
        """The block of ``each``, or why all tokens have to take part in it."""
        if prior is None or prior.layer is None or each.layer != prior.layer + 1:
            return "there is no such attention in the layer before, from which to predict"
        block = _block(each)
        if block in taken:
            return "another attention of its block says already which tokens take part"
        if _block(prior) in taken:
            return "in the layer before only some tokens take part"
        for reason in (_unfit(each), _unfit(prior)):
            if reason:
                return reason
        site = Bypass.of(block, prior, self._by_block[block], int(each.queries.class_tokens))
        if isinstance(site, str):
            return site
        count = int(shape_of(site.entering)[1])
        kept = self.options.stay(count)
        if kept <= site.protected:
            return f"{kept} of {count} tokens would take part, and {site.protected} always do"
        if kept >= count:
            return f"all of its {count} tokens take part"
        return site.keeping(kept)

    @cached_property
    def _by_block(self) -> dict[Block, list[Attention]]:
        """The attentions of every block."""
        found: dict[Block, list[Attention]] = {}
        for each in self.attentions:
            if each.stack is not None:
                found.setdefault(_block(each), []).append(each)
        return found


def _block(each: Attention) -> Block:
    assert each.stack is not None
    assert each.layer is not None
    return each.stack.blocks[each.layer]


def _stream(each: Attention) -> Node:
    """The stream behind the attention, to which its result is added."""
    assert each.residual is not None
    return each.residual.add


def _unfit(each: Attention) -> str:
    if each.kind == "cross":
        return "cross-attention: its keys are other tokens"
    if each.residual is None:
        return "its result enters several streams"
    if each.queries.is_windowed:
        return "it is among the tokens of a window, each of which has its place"
    if each.core.is_causal:
        return "it is causal, and the order of tokens counts"
    if each.core.masks:
        return "it has a mask or a bias for pairs of tokens (simplify drops a mask that hides nothing)"
    shape = shape_of(each.residual.add)
    if len(shape) != 3 or shape[1] != each.queries.size:
        return f"its stream is {list(shape)}, and not [batch, tokens, channels]"
    if not isinstance(shape[1], int):
        return "the number of its tokens is open: give the inputs that it depends on one size"
    return ""


def _protected(each: Attention, protect: Literal["class", "frame"]) -> Protected | str:
    """The tokens that always stay: class tokens, and the middle one of the frames."""
    first = int(each.queries.class_tokens)
    if protect == "class":
        return Protected(first)
    start = 0
    for part in each.queries.parts:
        if next(iter(part.axes), "") == "frames" and len(part.axes) > 1:
            frames = int(part.axes["frames"])
            size = int(part.size) // frames
            return Protected(first, (start + frames // 2 * size, start + (frames // 2 + 1) * size))
        start += int(part.size)
    return "its tokens are not those of several frames, one behind the other"


def _selected(graph: Graph) -> Node | None:
    """A lookup of rows in an order that was computed: what this pass leaves behind."""
    return next((node for node in graph.calls if node.target is aten.index_select.default and _is_choice(node)), None)


def _is_choice(node: Node) -> bool:
    pending: list[Any] = [node.args[2]]
    for _ in range(8):
        found = pending.pop() if pending else None
        if not isinstance(found, Node) or found.op != "call_function":
            return False
        if found.target in (aten.topk.default, aten.sort.default):
            return True
        if is_view(found) or found.target in (aten.add.Tensor, aten.mul.Tensor, aten.cat.default):
            pending.append(found.all_input_nodes[-1 if found.target is aten.cat.default else 0])
    return False
