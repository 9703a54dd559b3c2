"""What passes that quantise have in common: their options, what they refuse, what they calibrate on."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch.fx import Node

from optpass.errors import UserError, nearest_paths
from optpass.evaluate.calibration_set import CalibrationSet, given_set, random_set, sampled_set
from optpass.ir.graph import Graph, path_of, value_of
from optpass.ir.program import Program
from optpass.ir.quantized import DEQUANTIZERS
from optpass.pipeline.contract import approximate
from optpass.pipeline.passes import Context, Pass
from optpass.quantization.bridge_search import Objective, bridge_paths, search_bridges
from optpass.quantization.bridges import bridges
from optpass.quantization.form import CHANNELS, FORMS, PORTABLE, QuantizationForm, WeightScheme
from optpass.quantization.placement import Reason, weighted
from optpass.quantization.program import Quantization
from optpass.quantization.ranges import Correction, Estimator, Method
from optpass.quantization.scopes import Fact, facts, left_alone, unmatched
from optpass.quantization.sensitivity import noise_of, outputs_noise, outputs_of
from optpass.runtime.sampling import LABELS, Asked

Scheme = Literal["int8", "w8", "w4"]
GROUP = 128
CANDIDATES: tuple[Estimator, ...] = ("histogram", "mean-minmax", "minmax")
TRIALS, MARGIN = 4, 1.0
"""Calls of each entry by which estimators are told apart; what another must gain on the first one, in dB."""
BATCH_NORMS = frozenset(
    {torch.ops.aten.batch_norm.default, torch.ops.aten._native_batch_norm_legit_no_training.default}
)


class QuantizingPass(Pass):
    """A pass that puts integers into a Program; what it then does with that is up to a subclass."""

    scheme: Scheme = Field("int8", description="int8 weights and activations, or weights alone")
    form: Literal["auto", "portable", "cpu", "integer"] = Field("auto", description="int8: auto is the target's own")
    activations: Literal[8, 16] = Field(
        8, description="int8: bits of activations; 16 for NPUs that multiply them by int8 weights"
    )
    symmetric: bool = Field(True, description="w8, w4: no zero points")
    group_size: int | None = Field(None, ge=0, description="w8, w4: weights that share a scale; 0 is a whole row")
    match: tuple[str, ...] = Field((), description="patterns of module paths that are quantised; all by default")
    keep: tuple[str, ...] = Field((), description="patterns of module paths that stay real")
    keep_facts: tuple[Fact, ...] = Field((), description="operators that stay real, by what they are in the graph")
    data: str | None = Field(
        None, description="calibration: a folder of tensors or images, or module:name of a dataset"
    )
    calls: int = Field(32, ge=1, description="calibration: calls of each entry")
    samples: int = Field(2, ge=1, description="calibration: samples of the pipeline")
    steps: int = Field(20, ge=1, description="calibration: sampling steps of each")
    guidance: float | None = Field(None, description="calibration: guidance scale; the pipeline's own by default")
    seed: int = Field(0, description="calibration: seed of the first sample, or of the random calls")
    prompt: str | None = Field(None, description="calibration: what a text-to-image pipeline is asked for")
    labels: tuple[int, ...] = Field(LABELS, min_length=1, description="calibration: classes, in turn")
    call: dict[str, Any] = Field(default_factory=dict, description="calibration: arguments of the pipeline's call")
    estimator: Literal["auto"] | Estimator = Field(
        "auto", description="how an activation's range is found over the calls; auto takes what outputs lose least by"
    )
    bias_correction: Correction = Field("none", description="shift biases by what quantisation adds to the mean")
    smooth: bool = Field(False, description="SmoothQuant: outliers of activations move into the weights")
    search: Literal["none"] | Objective = Field(
        "none",
        description="Q-HyViT: choose the steps of bridge blocks by what they add to their outputs, weighted or not",
    )
    bridge: tuple[str, ...] = Field(
        (), description="search: patterns of module paths that are bridge blocks; found by structure by default"
    )
    calibration: str | None = Field(None, description="the calibration set's SHA-256, as an earlier run settled it")

    contract = approximate()
    executes = True
    needs = "calibration samples"
    of_activations: ClassVar[tuple[str, ...]] = (
        *("form", "activations", "estimator", "bias_correction", "smooth"),
        *("search", "bridge"),
    )
    """Options that say nothing where weights alone are integers."""

    @field_validator("match", "keep", "keep_facts", "bridge", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _of_its_scheme(self) -> Self:
        of_weights = () if self.scheme in ("w8", "w4") else ("symmetric", "group_size")
        for name in (*of_weights, *(() if self.scheme == "int8" else self.of_activations)):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name!r} says nothing of scheme {self.scheme!r}")
        if self.bridge and self.search == "none":
            raise ValueError("'bridge' says where to search, and there is no 'search'")
        if self.activations == 16 and self.search != "none":
            raise ValueError("search chooses among steps of 8 bits; of activations: 16 there is nothing to choose")
        if self.group_size == 1:
            raise ValueError("group_size: 1 is a scale for every weight; 0 is a whole row")
        return self

    def requires(self, program: Program) -> list[str]:
        graphs = program.entries.values()
        missing = unmatched(graphs, (*self.match, *self.keep, *self.bridge))
        found = [
            f"{pattern!r} matches nothing to quantise{nearest_paths(pattern, p)}" for pattern, p in missing.items()
        ]
        if any(node.target in DEQUANTIZERS for graph in graphs for node in graph.calls):
            found.append("the model is quantised already")
        if norms := [node for graph in graphs for node in graph.calls if _follows_convolution(node)]:
            what = f"{len(norms)} batch norms stand behind convolutions ({path_of(norms[0])} …)"
            found.append(f"{what}: put reparameterize before it, which folds them")
        if self.scheme == "int8" and (half := _half(program)):
            found.append(f"it calibrates in float32, and {half} is not: capture with dtype: float32")
        return found

    def placed(self, program: Program, context: Context) -> Quantization:
        """What of ``program`` becomes integers, as the options and the target say."""
        form = self._form(context) if self.scheme == "int8" else None
        return Quantization.placed(program, form, self._weights(), self.reason)

    @staticmethod
    def report(quantization: Quantization, context: Context) -> None:
        """Every operator that reads integers as a site, and what was declined."""
        for name, placement in quantization.placements.items():
            for operator in dict.fromkeys([*(w.operator for w in placement.weights), *placement.operators]):
                context.rewrote(operator, name)
            for node, why in placement.declined:
                context.decline(node, why, name)

    def reason(self, graph: Graph) -> Reason:
        """Why an operator of ``graph`` stays real, as the options say."""
        known = facts(graph)

        def reason(node: Node) -> str:
            if kept := [fact for fact in self.keep_facts if fact in known.get(node, ())]:
                return f"kept, as {kept[0]}"
            return left_alone(path_of(node), self.match, self.keep)

        return reason

    def calibrate(
        self, program: Program, quantization: Quantization, calls: CalibrationSet, context: Context
    ) -> Quantization:
        """``quantization`` with ranges; where nothing says how they are found, by the way that proves best, settled."""
        names = CANDIDATES if self.estimator == "auto" else (self.estimator,)
        if self.activations == 16 and self.estimator == "auto":
            # So fine are the steps that nothing is gained by cutting values off.
            names = ("minmax",)
        trials, found = calls.split(TRIALS)[1].entries, dict[str, tuple[float, Quantization]]()
        for name in names:
            method = Method(name, self.bias_correction, self.smooth)
            calibrated = quantization.calibrated(program, calls, method)
            noise = noise_of(program, calibrated.applied(program), trials).snr if len(names) > 1 else 0.0
            found[name] = noise, calibrated
        # Fewer calls than there will be: what clips looks better on them than it is.
        best = max(found, key=lambda name: found[name][0] + (MARGIN if name == names[0] else 0))
        if len(names) > 1:
            context.settle(estimator=best)
            context.facts["estimators"] = {name: snr for name, (snr, _) in found.items()}
        return self._searched(program, found[best][1], calls, context)

    def _searched(
        self, program: Program, quantization: Quantization, calls: CalibrationSet, context: Context
    ) -> Quantization:
        """``quantization`` with the bridge blocks' integers searched, if outputs of calls that it did not see allow."""
        if self.search == "none":
            return quantization
        seen, held = calls.split(TRIALS)
        paths = self.bridge or bridge_paths(program)
        correct = self.bias_correction != "none"
        search = search_bridges(program, quantization, seen.entries, paths, self.search, correct_biases=correct)
        for entry, node, why in search.declined:
            context.decline(node, why, entry)
        if not search.searched:
            if not search.declined:
                self._nothing_to_search(program, context)
            return quantization
        expected = outputs_of(program, held.entries)
        before, after = (
            outputs_noise(expected, outputs_of(found.applied(program), held.entries)).snr
            for found in (quantization, search.quantization)
        )
        context.facts["bridge_search"] = {
            "snr": {"before": before, "after": after},
            "kept": after >= before,
            "operators": [searched.as_json() for searched in search.searched],
        }
        if after >= before:
            context.settle(bridge=paths)
            return search.quantization
        for searched in search.searched:
            why = f"bridge search: outputs have {after:.2f} dB with it and {before:.2f} dB without"
            context.decline(searched.operator, why, searched.entry)
        context.settle(search="none", bridge=())
        return quantization

    def _nothing_to_search(self, program: Program, context: Context) -> None:
        for name, graph in program.entries.items():
            found = bridges(graph)
            if self.bridge or found.operators:
                what = "nothing under 'bridge' reads integers" if self.bridge else "its bridge blocks stay real"
                context.decline("(root)", f"bridge search: {what}", name)
                continue
            for node, why in found.declined:
                context.decline(node, f"bridge search: {why}", name)
            if not found.declined:
                context.decline("(root)", "bridge search: no convolutional stage leads to attention", name)

    def calls_of(self, program: Program, count: int) -> CalibrationSet:
        """``count`` calls of every entry, from what the options name."""
        if self.data is not None:
            return given_set(program, self.data, count=count)
        if program.origin.pipeline and program.origin.path is not None:
            asked = Asked(self.prompt, self.labels, None, self.steps, self.guidance, self.call)
            return sampled_set(program, program.origin.path, asked, count=count, samples=self.samples, seed=self.seed)
        return random_set(program, count=count, seed=self.seed)

    def settle_set(self, found: CalibrationSet, context: Context) -> None:
        """Hold a given set to the hash that was settled; hash and source go into the record.

        Raises:
            UserError: the set is given, and another one than was settled.
        """
        if self.data is not None and self.calibration not in (None, found.digest):
            raise UserError(
                f"{self.data} is not the calibration set that was settled (SHA-256 {found.digest[:12]}… in "
                f"place of {str(self.calibration)[:12]}…); give that one, or leave 'calibration' out to take this"
            )
        context.settle(calibration=found.digest)
        calls = {name: len(calls) for name, calls in found.entries.items()}
        context.facts["calibration_set"] = {"source": found.source, "sha256": found.digest, "calls": calls}

    def _form(self, context: Context) -> QuantizationForm:
        """
        Raises:
            UserError: the target has no kernels for activations of so many bits.
        """
        target = context.target
        form = type(target).quantization if target is not None else PORTABLE
        form = form if self.form == "auto" else FORMS[self.form]
        if self.activations == 8:
            return form
        if target is not None and not type(target).wide_activations:
            raise UserError("activations: 16: the target has no kernels for them; qnn has")
        return form.widened

    def _weights(self) -> WeightScheme:
        if self.scheme == "int8":
            return CHANNELS
        size = GROUP if self.group_size is None else self.group_size
        return WeightScheme(int(self.scheme[1:]), self.symmetric, size)


def _follows_convolution(node: Node) -> bool:
    source = node.args[0] if node.target in BATCH_NORMS else None
    return isinstance(source, Node) and ".conv" in str(source.target)


def _half(program: Program) -> str:
    """The first convolution or linear that computes in another dtype than float32; empty when none does."""
    for graph in program.entries.values():
        for node in weighted(graph):
            if value_of(node).dtype != torch.float32:
                return path_of(node)
    return ""
