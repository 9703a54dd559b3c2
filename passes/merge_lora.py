"""The pass ``merge-lora``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from optpass.adapters.adaptation import Adaptation, merged
from optpass.adapters.branches import Plan, add_branches, layer_weights
from optpass.adapters.exchangeable import Branch, merged_slot, needed_rank
from optpass.adapters.matching import Adaptable
from optpass.adapters.planning import Adaptations, Chosen, plan_adapters, read_adapters
from optpass.adapters.reading import adapter_files
from optpass.adapters.sites import SUFFIX
from optpass.errors import UserError
from optpass.ir.program import Program
from optpass.ir.slots import slots_in
from optpass.ir.weights import Expression
from optpass.pipeline.contract import exact
from optpass.pipeline.options import RecipePath
from optpass.pipeline.passes import Context, Pass


class Weighted(BaseModel):
    """One adapter of several, and how strongly it counts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: RecipePath
    scale: float = Field(default=1.0, allow_inf_nan=False)


class MergeLora(Pass):
    """W, adapter → W + scale·(α/r)·B·A, for every linear and convolution that the adapter changes.

    LoRA, rsLoRA, DoRA, LoHa and LoKr, in the layouts of peft (a folder), diffusers, sd-scripts (kohya) and
    LyCORIS; several adapters are added up. DoRA gives m/‖W+ΔW‖·(W+ΔW), its scale inside ΔW as in peft. The
    sum is made in float32 and rounded once to the weight's dtype.

    With `mode: refit` the engine computes the same, and the bundle can make those weights again with other
    adapters or none (`optpass refit`). With `mode: keep` a LoRA stands beside the weight, y + B·A·x, at its cost
    in every call, and `optpass refit` swaps A and B alone, for adapters up to the `rank` that is left room for.

    Leaves alone, and says so: tensors of the pipeline's other components; what is merged already; with
    `strict: false` also what matches no module, does not fit its shape, or is of another kind (embeddings,
    biases, whole modules, OFT …), each of which is an error otherwise. A weight that several modules share,
    or that something else than a linear or convolution reads, is not changed.

    Source: Hu et al., arXiv 2106.09685; Kalajdzievski, 2312.03732; Liu et al., 2402.09353; Yeh et al., 2309.14859.
    """

    adapter: RecipePath | Annotated[tuple[Weighted, ...], Field(min_length=1)] = Field(
        description="a file or folder, or a list of {path, scale}"
    )
    scale: float = Field(1.0, allow_inf_nan=False, description="multiplies the scale of every adapter")
    mode: Literal["merge", "keep", "refit"] = Field(
        "merge",
        description="merge: into the weights; keep: as a branch, whose tensors can be swapped; "
        "refit: into the weights, which the bundle can make again",
    )
    rank: int | None = Field(
        None, ge=1, description="keep: the rank to leave room for; default: what the adapters take"
    )
    strict: bool = Field(True, description="whether a tensor of the adapter that changes nothing is an error")

    contract = exact(rtol=1e-5)

    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(file for path, _ in self._given() for file in adapter_files(path)))

    def run(self, program: Program, context: Context) -> Program:
        chosen = read_adapters(self._given())
        plan = self._plan(chosen, program, context)
        if self.mode != "merge":
            _refuse_second_slots(plan, program)
        for name in plan:
            context.rewrote(name.removesuffix(SUFFIX))
        content = ", ".join(map(str, chosen))
        if self.mode == "keep":
            return add_branches(program, self._kept(plan, program, content))
        changes: dict[str, Expression] = {}
        for name, adaptations in plan.items():
            base = program.weights[name]
            slot = self.mode == "refit"
            changes[name] = merged_slot(name, base, adaptations, content) if slot else merged(base, adaptations)
        return program.with_weights(changes)

    def _kept(self, plan: Plan, program: Program, content: str) -> Plan:
        """One branch for each weight, of which the adapters are parts."""
        kept = {}
        for name, adaptations in plan.items():
            base = program.weights[name]
            branch = Branch(name, base.shape, base.dtype, self.rank or needed_rank(adaptations))
            kept[name] = [(branch.holding(adaptations, content), 1.0)]
        return kept

    def reference(self, program: Program) -> Program:
        """The model with the adapters as branches beside its layers."""
        return add_branches(program.copy(), self._plan(read_adapters(self._given()), program, Context()))

    def _given(self) -> list[tuple[Path, float]]:
        given = self.adapter if isinstance(self.adapter, tuple) else (Weighted(path=self.adapter),)
        return [(item.path, item.scale * self.scale) for item in given]

    def _plan(self, chosen: Sequence[Chosen], program: Program, context: Context) -> Plan:
        """The adaptations of each weight, in the order of the adapters, without those that are in it."""
        plan = plan_adapters(chosen, Adaptable.of(program), strict=self.strict, note=context.decline)
        new: dict[str, Adaptations] = {}
        for name, adaptations in plan.items():
            path = name.removesuffix(SUFFIX)
            found = [item for item in adaptations if not _is_in(item[0], program, path)]
            if len(found) < len(adaptations):
                context.decline(path, "the adapter is in it already")
            if found:
                new[name] = found
        return new


def _refuse_second_slots(plan: Plan, program: Program) -> None:
    """
    Raises:
        UserError: a weight has exchangeable adapters already: an exchange would put the new ones in twice.
    """
    for name in plan:
        weights = layer_weights(program, name.removesuffix(SUFFIX))
        held = next((slot for weight in weights for slot in slots_in(weight) if slot.name == name), None)
        if held is not None:
            raise UserError(
                f"{name} holds exchangeable adapters of an earlier merge-lora already ({held.content}); "
                "give all adapters in one list, adapter: [{path: …}, {path: …}]"
            )


def _is_in(adaptation: Adaptation, program: Program, path: str) -> bool:
    """Whether a layer's weight or branch is made from this adaptation's factors already."""
    return any(_is_merged(adaptation, expression) for expression in layer_weights(program, path))


def _is_merged(adaptation: Adaptation, weight: Expression) -> bool:
    """Whether a weight is made from this adaptation's factors already."""
    factors = {_place(factor) for factor in adaptation.factors.values()}
    pending = [weight]
    while pending:
        expression = pending.pop()
        if not expression.operands() and _place(expression) in factors:
            return True
        pending += expression.operands()
    return False


def _place(leaf: Expression) -> tuple[object, object]:
    """File and name in it, by which a tensor is the same after a file is read again."""
    return getattr(leaf, "path", leaf), getattr(leaf, "key", None)
