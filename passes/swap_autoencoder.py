"""The pass ``swap-autoencoder``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch.fx import Node

from optpass.analysis.operators import aten
from optpass.capture.methods import Methods, Taken, capture_methods, model_files
from optpass.errors import UserError
from optpass.ir.dimensions import Size
from optpass.ir.graph import Graph, shape_of, value_of
from optpass.ir.program import Program
from optpass.ir.text import program_text
from optpass.pipeline.contract import approximate
from optpass.pipeline.options import RecipePath
from optpass.pipeline.passes import Context, Pass
from optpass.runtime.module import Config

ENCODE, DECODE = "encode", "decode"
SWAPPED = ("AutoencoderKL", "AutoencoderKLTemporalDecoder")
TINY = "AutoencoderTiny"
CERTAIN = -30.0
"""The logarithm of the variance at which diffusers clamps a posterior."""


class SwapAutoencoder(Pass):
    """AutoencoderKL → AutoencoderTiny of another checkpoint, behind the same calls.

    It stands in the section of a pipeline's autoencoder: `components: {vae: {passes: [{swap-autoencoder: …}]}}`.
    What the pipeline calls (`encode`, `decode` or both) becomes the other model's, at the same sizes; the temporal
    decoder of Stable Video Diffusion decodes frame by frame then. The pipeline need not know: latents are brought from
    one model's scale and shift to the other's inside the graphs, and a posterior is one without variance.
    The error that is measured is that between the two autoencoders.

    The other checkpoint has to belong to the same latents: that is trained and cannot be seen from a config. Refuses a
    model that is no such autoencoder, its own call (`full`), and one of other scale or channels.

    Source: TAESD, as in MoViE, arXiv 2412.06578 (Mobile-Pix2Pix), and MobileVD, arXiv 2412.07583.
    """

    checkpoint: RecipePath = Field(description="the folder of an AutoencoderTiny; its config.json alone for costs")

    contract = approximate()

    def files(self) -> tuple[Path, ...]:
        return model_files(self.checkpoint)

    def requires(self, program: Program) -> list[str]:
        if program.origin.class_name not in SWAPPED:
            return [f"{program.origin.class_name or 'the model'} is none of {', '.join(SWAPPED)}: name the component"]
        others = {graph.signature.method for graph in program.entries.values()} - {ENCODE, DECODE}
        if others:
            return [f"it replaces {ENCODE} and {DECODE}, and the model is called by {', '.join(sorted(others))}"]
        return []

    def run(self, program: Program, context: Context) -> Program:
        found = self._captured(program)
        config = Config({**program.origin.config, "_class_name": program.origin.class_name})
        scales, entries = Scales.between(config, found.config), {}
        for name, graph in program.entries.items():
            method = graph.signature.method
            made = found.graphs[method]
            if method == ENCODE:
                encoded(made, scales, graph.outputs[0].shape[1])
            else:
                decoded(made, scales)
            made.signature = graph.signature
            if made.outputs != graph.outputs:
                raise UserError(
                    f"{self.checkpoint}: {method} gives {', '.join(map(str, made.outputs))} where the pipeline's gives "
                    f"{', '.join(map(str, graph.outputs))}"
                )
            entries[name] = made
        after = replace(program, entries=entries, weights=found.weights)
        if program_text(after.pruned()) == program_text(program):
            context.decline("(root)", f"it is the autoencoder of {self.checkpoint} already")
            return program
        for name in entries:
            context.rewrote("(root)", name)
        return after

    def _captured(self, program: Program) -> Methods:
        calls = {}
        for graph in program.entries.values():
            (spec,) = graph.inputs
            calls[graph.signature.method] = Taken(spec.shape, graph.dimensions, spec.dtype)
        found = capture_methods(self.checkpoint, calls, structure_only=not program.has_values)
        if found.class_name != TINY:
            raise UserError(f"{self.checkpoint} holds a {found.class_name}, and an {TINY} is to be put in")
        if program.has_values and not found.weights.has_values:
            raise UserError(f"{self.checkpoint} has no weights: with --structure-only its config will do")
        return found


@dataclass(frozen=True)
class Scales:
    """u = (latents − shift) · scale is what the denoiser sees, of either autoencoder."""

    scale: float
    shift: float
    tiny_scale: float
    tiny_shift: float

    @staticmethod
    def between(config: Any, tiny: Any) -> Scales:
        """As the two configs say."""
        own, other = (
            (float(each.scaling_factor), float(getattr(each, "shift_factor", None) or 0.0)) for each in (config, tiny)
        )
        return Scales(*own, *other)

    def to_tiny(self) -> tuple[float, float]:
        """Factor and summand that make the tiny autoencoder's latents of the other's."""
        factor = self.scale / self.tiny_scale
        return factor, self.tiny_shift - self.shift * factor

    def from_tiny(self) -> tuple[float, float]:
        """The other way."""
        factor = self.tiny_scale / self.scale
        return factor, self.shift - self.tiny_shift * factor


def decoded(graph: Graph, scales: Scales) -> None:
    """latents of the other autoencoder → tiny ones, before everything else."""
    (latents,) = graph.placeholders
    users = list(latents.users)
    with graph.before(latents.next):
        scaled = _affine(graph, latents, *scales.to_tiny())
    for user in users:
        user.replace_input_with(latents, scaled)


def encoded(graph: Graph, scales: Scales, channels: Size) -> None:
    """tiny latents → the other autoencoder's; and a posterior's variance beside them, where ``channels`` ask for it."""
    outputs: Any = graph.output_node.args[0]
    (latents,) = outputs
    with graph.before(graph.output_node):
        result = _affine(graph, latents, *scales.from_tiny())
        if channels == 2 * shape_of(latents)[1]:
            variance = graph.call(
                aten.full.default,
                list(shape_of(result)),
                CERTAIN,
                dtype=value_of(result).dtype,
                device=torch.device("cpu"),
                pin_memory=False,
                like=latents,
            )
            result = graph.call(aten.cat.default, [result, variance], 1, like=latents)
    graph.output_node.args = ((result,),)


def _affine(graph: Graph, node: Node, factor: float, summand: float) -> Node:
    if factor != 1:
        node = graph.call(aten.mul.Tensor, node, factor, like=node)
    return graph.call(aten.add.Tensor, node, summand, like=node) if summand else node
