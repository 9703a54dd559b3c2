"""The pass ``cache-features``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from torch.fx import Node

from optpass.analysis.boundaries import ancestors, depending_on, module_paths, values_entering, values_leaving
from optpass.analysis.mac_rules import macs_of
from optpass.errors import nearest
from optpass.ir.graph import Graph
from optpass.ir.loop import Listed, Loop, Schedule, State, every, past, present
from optpass.ir.program import Program
from optpass.ir.weights import Expression
from optpass.pipeline.contract import Contract, approximate, retrain
from optpass.pipeline.passes import Context, Pass
from optpass.rewrite.adaptor import AdaptorInputs, adaptor_inputs, write_adaptor
from optpass.rewrite.splitting import subgraph
from optpass.rewrite.stepping import without_loop

FEATURE, REUSE = "feature", "reuse"


class CacheFeatures(Pass):
    """step → a full step that keeps the values at a cut, and a cheaper one that takes them from the last full step.

    ``cut`` is the path of a module; what leaves it (``at: output``) or enters it (``at: input``) and depends on the
    sample is kept. What only these values need is not in the step that reuses them: its other parts, those nearest to
    the sample and to the result in a UNet, are computed afresh. The published cuts of Stable Diffusion 1.5 are
    ``up_blocks.2.upsamplers.0`` at its input (the paper's, before the upsampler) and ``up_blocks.2`` at its output (the
    released code's); the finer ones of DeepCache are outputs too: branch 0 is ``up_blocks.3.attentions.1``.
    Steps 0, n, 2n … are full with ``every: n``, or those that ``steps`` lists, ``of`` so many. The ``resnet`` adaptor
    (:mod:`optpass.rewrite.adaptor`) changes the feature on its way; its parameters have to be trained.

    Leaves alone: a loop that caches already; and, where every step is to be full, every loop. Refuses a cut after
    which a step that reuses would save no product, or would not see the sample.

    Source: Clockwork Diffusion, Habibian et al., CVPR 2024, arXiv 2312.08128; with the identity adaptor at finer cuts
    DeepCache, Ma et al., CVPR 2024, arXiv 2312.00858.
    """

    cut: str = Field(description="the path of a module, as up_blocks.2")
    at: Literal["output", "input"] = Field("output", description="keep what leaves the module, or what enters it")
    every: int | None = Field(None, ge=1, description="every n-th step is full; 2 where nothing is said")
    steps: tuple[int, ...] | None = Field(None, description="the steps that are full, from 0, in place of every")
    of: int | None = Field(None, ge=1, description="how many steps a generation has, with steps")
    adaptor: Literal["identity", "resnet"] = Field("identity", description="what is done to a kept value")
    width: int = Field(384, ge=32, multiple_of=32, description="channels of the resnet adaptor")

    contract = approximate()

    @model_validator(mode="after")
    def _one_schedule(self) -> Self:
        if self.steps is not None and self.every is not None:
            raise ValueError("every and steps are two schedules: give one")
        if (self.steps is None) != (self.of is None):
            raise ValueError("steps and of belong together: steps: [0, 3, 5], of: 20")
        if self.steps is not None and self.of is not None and not Listed(self.steps, self.of).in_order:
            raise ValueError("steps has 0 and later steps below of, in order: steps: [0, 3, 5], of: 20")
        if self.adaptor == "identity" and self.width != type(self).model_fields["width"].default:
            raise ValueError("width is that of the resnet adaptor: adaptor: resnet")
        return self

    @property
    def promise(self) -> Contract:
        return retrain() if self.adaptor == "resnet" else self.contract

    def requires(self, program: Program) -> list[str]:
        if program.loop is None:
            return without_loop(program)
        found = None if _idle(self, program.loop) else self._cut(program)
        return [found] if isinstance(found, str) else []

    def run(self, program: Program, context: Context) -> Program:
        assert program.loop is not None
        entry = program.loop.variants[program.loop.computed][0]
        if reason := _idle(self, program.loop):
            context.decline(self.cut, reason, entry)
            return program
        cut = self._cut(program)
        assert isinstance(cut, Cut)
        context.rewrote(self.cut, entry)
        full, (reuse, weights) = cut.full(), cut.reuse(self.width)
        written = {spec.name: spec for spec in full.outputs}
        states = {name: State.of(name, written[present(name)]) for name in cut.named()}
        variants = {**program.loop.variants, REUSE: (REUSE,)}
        loop = replace(
            program.loop,
            variants=variants,
            schedule=self._schedule(tuple(variants)),
            states={**program.loop.states, **states},
        )
        made = replace(program, entries={**program.entries, entry: full, REUSE: reuse}, loop=loop)
        return made.with_untrained(weights)

    def _schedule(self, variants: tuple[str, ...]) -> Schedule:
        if self.steps is not None and self.of is not None:
            return Listed(self.steps, self.of)
        return every(self.every or 2, variants)

    def _cut(self, program: Program) -> Cut | str:
        """The cut, or why there is none to make."""
        loop = program.loop
        assert loop is not None
        graph = program.entries[loop.variants[loop.computed][0]]
        if self.cut not in (known := module_paths(graph)):
            as_deep = [path for path in known if path.count(".") <= self.cut.count(".")]
            return f"no module {self.cut!r} in the graph{nearest(self.cut, as_deep)}"
        crossing = (values_leaving if self.at == "output" else values_entering)(graph, self.cut)
        what = f"what {'leaves' if self.at == 'output' else 'enters'} {self.cut}"
        moving = depending_on(graph, [loop.sample])
        features = [node for node in crossing if node in moving]
        fresh = depending_on(graph, [loop.sample], stop=set(features))
        kept = ancestors(graph.output_node.all_input_nodes, stop=set(features))
        features = [node for node in features if node in kept]
        rest = [node for node in graph.calls if node in kept and node not in features]
        if not features:
            return f"{what} does not depend on {loop.sample}"
        if fresh.isdisjoint(rest):
            return f"a step that reuses {what} would not see {loop.sample}"
        if sum(map(macs_of, graph.calls)) == sum(map(macs_of, rest)):
            return f"a step that reuses {what} would save no product"
        adapted = self._adapted(graph, loop, features, {*rest, *graph.placeholders})
        return adapted if isinstance(adapted, str) else Cut(graph, tuple(features), adapted)

    def _adapted(self, graph: Graph, loop: Loop, features: list[Node], kept: set[Node]) -> AdaptorInputs | str | None:
        if self.adaptor == "identity":
            return None
        if len(features) > 1:
            return f"the resnet adaptor takes one value, and {len(features)} cross the cut"
        return adaptor_inputs(graph, loop, features[0], kept)


@dataclass(frozen=True)
class Cut:
    """The values of ``graph`` that a step takes from the last full one, and what adapts them, if anything does."""

    graph: Graph
    features: tuple[Node, ...]
    adaptor: AdaptorInputs | None = None

    def named(self) -> dict[str, Node]:
        """The features by the name of their state."""
        if len(self.features) == 1:
            return {FEATURE: self.features[0]}
        return {f"{FEATURE}.{index}": node for index, node in enumerate(self.features)}

    def full(self) -> Graph:
        """The step that computes everything and writes the features."""
        written = {present(name): node for name, node in self.named().items()}
        return subgraph(self.graph, inputs={}, outputs={**self._results, **written}, keep=self.graph.signature.inputs)

    def reuse(self, width: int) -> tuple[Graph, dict[str, Expression]]:
        """The step that reads the features, and its adaptor's weights, ``width`` channels wide."""
        read = {past(name): node for name, node in self.named().items()}
        if self.adaptor is None:
            return subgraph(self.graph, inputs=read, outputs=self._results), {}
        others = self.adaptor.others()
        graph = subgraph(self.graph, inputs=read, outputs={**self._results, **others})
        found: dict[str, Any] = dict(zip(graph.signature.outputs, graph.output_node.args[0], strict=True))  # type: ignore[arg-type]
        feature = graph.placeholders[-1]
        users = list(feature.users)
        inputs = AdaptorInputs(feature, found["fresh"], found["time"], found.get("context"))
        with graph.before(next(node for node in graph.fx.nodes if node in feature.users)):
            adapted, weights = write_adaptor(graph, inputs, width=width)
        for user in users:
            user.replace_input_with(feature, adapted)
        return subgraph(graph, inputs={}, outputs={name: found[name] for name in self._results}), weights

    @property
    def _results(self) -> dict[str, Node]:
        """What the call gives, by name."""
        return dict(zip(self.graph.signature.outputs, self.graph.output_node.args[0], strict=True))  # type: ignore[arg-type]


def _idle(options: CacheFeatures, loop: Loop) -> str:
    """Why nothing is to be done; empty where there is something."""
    if len(loop.variants) > 1:
        return f"the loop reuses already: its steps are {', '.join(loop.variants)}"
    if len(loop.variants[loop.computed]) > 1:
        return f"a step runs several entries: {', '.join(loop.variants[loop.computed])}"
    listed = options.steps is not None and len(options.steps) == options.of
    return "every step is full, so none would reuse" if options.every == 1 or listed else ""
