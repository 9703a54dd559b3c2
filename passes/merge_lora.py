"""The pass ``merge-lora``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from optpass.adapters.adaptation import Adaptation, merged
from optpass.adapters.branches import add_branches
from optpass.adapters.matching import Matched, match_adapter
from optpass.adapters.reading import Adapter, adapter_files, read_adapter
from optpass.adapters.sites import SUFFIX
from optpass.errors import UserError
from optpass.ir.hashing import file_digest
from optpass.ir.program import Program
from optpass.ir.weights import Expression
from optpass.pipeline.contract import exact
from optpass.pipeline.passes import Context, Pass


class Weighted(BaseModel):
    """One adapter of several, and how strongly it counts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    scale: float = Field(default=1.0, allow_inf_nan=False)


class MergeLora(Pass):
    """W, adapter → W + scale·(α/r)·B·A, for every linear and convolution that the adapter changes.

    LoRA, rsLoRA, DoRA, LoHa and LoKr, in the layouts of peft (a folder), diffusers, sd-scripts (kohya) and
    LyCORIS; several adapters are added up. DoRA gives m/‖W+ΔW‖·(W+ΔW), its scale inside ΔW as in peft. The
    sum is made in float32 and rounded once to the weight's dtype.

    Leaves alone, and says so: tensors of the pipeline's other components; what is merged already; with
    `strict: false` also what matches no module, does not fit its shape, or is of another kind (embeddings,
    biases, whole modules, OFT …), each of which is an error otherwise. A weight that several modules share,
    or that something else than a linear or convolution reads, is not changed.

    Source: Hu et al., arXiv 2106.09685; Kalajdzievski, 2312.03732; Liu et al., 2402.09353; Yeh et al., 2309.14859.
    """

    adapter: Path | tuple[Weighted, ...] = Field(description="a file or folder, or a list of {path, scale}")
    scale: float = Field(1.0, allow_inf_nan=False, description="multiplies the scale of every adapter")
    mode: Literal["merge"] = Field("merge", description="merge: into the weights")
    strict: bool = Field(True, description="whether a tensor of the adapter that changes nothing is an error")

    contract = exact(rtol=1e-5)

    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(file for item in self._given() for file in adapter_files(item.path)))

    def run(self, program: Program, context: Context) -> Program:
        plan = self._plan(program, context)
        changes: dict[str, Expression] = {}
        for name, adaptations in plan.items():
            changes[name] = merged(program.weights[name], adaptations)
            context.rewrote(name.removesuffix(SUFFIX))
        return program.with_weights(changes)

    def reference(self, program: Program) -> Program:
        """The model with the adapters as branches beside its layers."""
        return add_branches(program.copy(), self._plan(program, Context()))

    def _plan(self, program: Program, context: Context) -> dict[str, list[tuple[Adaptation, float]]]:
        """The adaptations of each weight, in the order of the adapters, and their strengths."""
        plan: dict[str, list[tuple[Adaptation, float]]] = defaultdict(list)
        for adapter, strength in self._adapters():
            found = match_adapter(adapter, program, strict=self.strict)
            _report(adapter, found, context)
            for name, adaptation in found.weights.items():
                if _is_merged(adaptation, program.weights[name]):
                    context.decline(name.removesuffix(SUFFIX), f"{adapter.path.name} is merged into it already")
                else:
                    plan[name].append((adaptation, strength))
        for name, adaptations in plan.items():
            _refuse_conflict(name, [adaptation for adaptation, _ in adaptations])
        return dict(plan)

    def _given(self) -> tuple[Weighted, ...]:
        return self.adapter if isinstance(self.adapter, tuple) else (Weighted(path=self.adapter),)

    def _adapters(self) -> Iterator[tuple[Adapter, float]]:
        """
        Raises:
            UserError: a file is no adapter, or is given twice.
            WeightError: one is damaged, or holds NaN or Inf.
        """
        given = self._given()
        if not given:
            raise UserError("merge-lora: the list of adapters is empty")
        seen: dict[str, Path] = {}
        for item in given:
            digest = file_digest(adapter_files(item.path)[0])
            if digest in seen:
                raise UserError(f"merge-lora: {seen[digest]} and {item.path} are the same adapter; give it once")
            seen[digest] = item.path
            adapter = read_adapter(item.path)
            adapter.check_finite()
            yield adapter, item.scale * self.scale


def _report(adapter: Adapter, found: Matched, context: Context) -> None:
    for note in adapter.notes:
        context.decline(adapter.path.name, note)
    elsewhere: dict[str, list[str]] = defaultdict(list)
    for refusal in found.refused:
        if refusal.harmless:
            elsewhere[refusal.reason].append(refusal.key)
        else:
            context.decline(refusal.key, refusal.reason)
    for reason, keys in elsewhere.items():
        context.decline(keys[0], f"{reason} ({len(keys)} module{'s' * (len(keys) > 1)})")


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


def _refuse_conflict(name: str, adaptations: list[Adaptation]) -> None:
    """
    Raises:
        UserError: two adapters both set the length of a weight's rows.
    """
    keys = [adaptation.keys["magnitude"] for adaptation in adaptations if adaptation.magnitude is not None]
    if len(keys) > 1:
        raise UserError(
            f"merge-lora: {keys[0]!r} and {keys[1]!r} of two adapters both are DoRA magnitudes of {name}, "
            "of which one can hold; merge one of the adapters"
        )
