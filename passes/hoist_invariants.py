"""The pass ``hoist-invariants``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Literal

from pydantic import Field
from torch.fx import Node

from optpass.analysis.boundaries import ancestors
from optpass.analysis.dependence import Dependence
from optpass.analysis.invariants import Refusal, invariants
from optpass.analysis.operators import aten, is_view
from optpass.ir.graph import PATH, Graph
from optpass.ir.interface import Interface
from optpass.ir.loop import PRESENT, Loop, State, past, present
from optpass.ir.program import Program
from optpass.pipeline.contract import exact
from optpass.pipeline.passes import Context, Pass
from optpass.rewrite.joining import joined
from optpass.rewrite.splitting import subgraph, unread_inputs
from optpass.rewrite.stepping import results, unique_name, without_loop

PREPARE, EMBED = "prepare", "embed"


class HoistInvariants(Pass):
    """step(sample, timestep, context) → prepare(context) once, embed(timestep) per timestep, step(sample, states).

    What depends on conditioning alone (keys and values of a cross-attention to a fixed context, rotary tables, a
    planner over reference images) is computed when a generation starts, by the entry ``prepare``; what depends on the
    timestep besides (time embeddings, the modulations of every block of a DiT: a third of its weights) once for each
    timestep, by the entry ``embed``, and kept for later generations that come to the same one. Their results are
    states that all steps read; weights that only they needed leave the steps. Several entries (after feature
    caching) share the states of what they all compute. Kept are the values of fewest bytes: a product rather than
    its parts, a row rather than its repetition. The operators stay the same, each as it was.

    Leaves alone what costs nothing (inputs; masks, casts and repetitions of them; tables) without a report; and, with
    the reason: what is drawn at random, what takes its size from the sample alone, and what would keep, or be made
    from, more than ``largest`` bytes for every timestep.

    Source: loop-invariant code motion, Allen and Cocke 1972; for samplers derived.
    """

    timesteps: Literal["table", "keep"] = Field(
        "table", description="what depends on the timestep: kept in a table by timestep, or computed in every step"
    )
    largest: int = Field(1 << 20, ge=0, description="bytes of a value that is kept for every timestep")

    contract = exact(rtol=1e-6)

    def requires(self, program: Program) -> list[str]:
        return without_loop(program)

    def run(self, program: Program, context: Context) -> Program:
        loop = program.loop
        assert loop is not None
        names = list(dict.fromkeys(entry for chain in loop.variants.values() for entry in chain))
        steps = [program.entries[name] for name in names]
        whole, places = joined(steps, program.weights, _handed(program, loop, names))
        constant = [*loop.conditioning, *(past(state) for state in _once_states(program, loop))]
        found = invariants(whole, constant, loop.timestep, largest=self.largest)
        timed = found.timed if self.timesteps == "table" else []
        owners = _Owners(names, places)
        refused = (*found.refused, *self._refused_timed(found.timed, found.refused_timed))
        for item in refused:
            context.decline(item.node, item.reason, owners.of(item.node))
        values = (*found.constant, *timed)
        if not values:
            if not refused:
                context.decline("(root)", "no step computes what another one has, beyond what costs nothing", names[0])
            return program
        kept = dict(zip(_state_names(values, loop), values, strict=True))
        for node in kept.values():
            context.rewrote(_maker(node), owners.of(node))
        changed = {name: _reading(graph, place, kept) for name, graph, place in zip(names, steps, places, strict=True)}
        _drop_unread(changed, program)
        _read_sizes(whole, found.dependence)
        fixed = dict(islice(kept.items(), len(found.constant)))
        once = _writing(whole, fixed, {})
        tables = _writing(whole, {name: node for name, node in kept.items() if name not in fixed}, fixed)
        return _with_hoisted(program, changed, {PREPARE: once} if once else {}, {EMBED: tables} if tables else {})

    def _refused_timed(self, timed: Iterable[Node], too_large: Iterable[Refusal]) -> Iterable[Refusal]:
        if self.timesteps == "table":
            return too_large
        return [Refusal(_maker(node), "it stays the same for a timestep, and 'timesteps: keep'") for node in timed]


def _handed(program: Program, loop: Loop, names: Sequence[str]) -> list[dict[str, tuple[int, str]]]:
    """For each entry the states that another one writes before it in every step that runs it, and only that one."""
    interfaces = program.interfaces
    writers: dict[str, dict[str, set[str]]] = {name: {} for name in names}
    for chain in loop.variants.values():
        written: dict[str, str] = {}
        for name in chain:
            for state in interfaces[name].reads:
                writers[name].setdefault(state, set()).add(written.get(state, ""))
            written |= dict.fromkeys(interfaces[name].writes, name)
    places = {name: index for index, name in enumerate(names)}
    found: list[dict[str, tuple[int, str]]] = []
    for name in names:
        single = {state: next(iter(by)) for state, by in writers[name].items() if len(by) == 1}
        earlier = {state: places[by] for state, by in single.items() if by and places[by] < places[name]}
        found.append({past(state): (index, present(state)) for state, index in earlier.items()})
    return found


class _Owners:
    """The entries that nodes of the joined graph come from."""

    def __init__(self, names: Iterable[str], places: Iterable[Mapping[Node, Node]]) -> None:
        self._names: dict[Node, str] = {}
        for name, place in zip(names, places, strict=True):
            for node in place.values():
                self._names.setdefault(node, name)

    def of(self, node: Node) -> str:
        """The first entry that computes ``node``."""
        return self._names[node]


def _once_states(program: Program, loop: Loop) -> list[str]:
    """The states that stay as they are during a generation already."""
    return [state for name in loop.once for state in Interface.of(program.entries[name]).writes]


def _maker(node: Node) -> Node:
    """The operator that made what ``node`` shows, behind views and casts."""
    while is_view(node) or node.target is aten.to.dtype:
        node = node.all_input_nodes[0]
    return node


def _state_names(nodes: Iterable[Node], loop: Loop) -> list[str]:
    """A name for each value: the module that makes it, with a number where that has several."""
    taken = dict.fromkeys(loop.states)
    for node in nodes:
        maker = _maker(node)
        taken[unique_name(str(maker.meta.get(PATH) or maker.name), taken)] = None
    return list(taken)[len(loop.states) :]


def _reading(graph: Graph, place: Mapping[Node, Node], kept: Mapping[str, Node]) -> Graph:
    """``graph`` with its nodes that are ``kept`` (at their place in the joined graph) read from states."""
    wanted = set(kept.values())
    first: dict[Node, Node] = {}
    for node in graph.fx.nodes:
        if place.get(node) in wanted and first.setdefault(place[node], node) is not node:
            node.replace_all_uses_with(first[place[node]])
    outputs = results(graph)
    inputs = _read({past(name): first[node] for name, node in kept.items() if node in first}, outputs.values())
    return subgraph(graph, inputs=inputs, outputs=outputs, keep=unread_inputs(graph)) if inputs else graph


def _drop_unread(steps: dict[str, Graph], program: Program) -> None:
    """Write no longer what entries handed to later ones that now read it from what is kept."""
    before, after = (
        {state for graph in graphs.values() for state in Interface.of(graph).reads}
        for graphs in (program.entries, {**program.entries, **steps})
    )
    gone = {present(state) for state in before - after}
    for name, graph in steps.items():
        outputs = {output: node for output, node in results(graph).items() if output not in gone}
        if len(outputs) < len(graph.outputs):
            steps[name] = subgraph(graph, inputs={}, outputs=outputs, keep=unread_inputs(graph))


def _writing(graph: Graph, kept: Mapping[str, Node], given: Mapping[str, Node]) -> Graph | None:
    """What computes the ``kept`` values, those that are ``given`` read from states; ``None`` for no value."""
    outputs = {present(name): node for name, node in kept.items()}
    inputs = _read({past(name): node for name, node in given.items()}, outputs.values())
    return subgraph(graph, inputs=inputs, outputs=outputs) if outputs else None


def _read(cut: Mapping[str, Node], outputs: Collection[Node]) -> dict[str, Node]:
    """Those of the ``cut`` values that ``outputs`` are computed from."""
    read = ancestors(outputs, stop=set(cut.values()))
    return {name: node for name, node in cut.items() if node in read}


def _read_sizes(graph: Graph, found: Dependence) -> None:
    """Let every open size be read from the input that its users were found to depend on."""
    placeholders = dict(zip(graph.signature.inputs, graph.placeholders, strict=True))
    for node, (name, axis) in found.sizes.items():
        node.args = (placeholders[name], axis)


def _with_hoisted(
    program: Program, steps: Mapping[str, Graph], once: Mapping[str, Graph], tables: Mapping[str, Graph]
) -> Program:
    """``program`` with its ``steps`` in place of what they were, and new entries beside them."""
    loop = program.loop
    assert loop is not None
    once = {unique_name(name, program.entries): graph for name, graph in once.items()}
    tables = {unique_name(name, program.entries): graph for name, graph in tables.items()}
    entries = {**program.entries, **steps, **once, **tables}
    written = {state for graph in entries.values() for state in Interface.of(graph).writes}
    states = {name: state for name, state in loop.states.items() if name in written}
    for graph in (*once.values(), *tables.values()):
        states |= {s.name.removeprefix(PRESENT): State.of(s.name.removeprefix(PRESENT), s) for s in graph.outputs}
    loop = replace(loop, states=states, once=(*loop.once, *once), tables=(*loop.tables, *tables))
    return replace(program, entries=entries, loop=loop)
