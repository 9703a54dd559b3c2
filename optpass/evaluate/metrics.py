"""Every metric a gate can name, and how it is measured on a Program beside the captured one."""

from __future__ import annotations

from optpass.errors import UserError
from optpass.evaluate.scope import Scope

NUMERIC = ("max_abs", "relative_error", "snr")
QUALITY = ("psnr", "frame_accuracy", "temporal_consistency", "frechet_distance")
METRICS = frozenset((*NUMERIC, *QUALITY))


def measure(metric: str, scope: Scope, *, samples: int, steps: int, seed: int) -> float:
    """The value of ``metric``: numeric ones on random inputs, quality ones on generated samples.

    Raises:
        UserError: the checkpoint has no values, or for a quality metric no pipeline or evaluator.
    """
    if not scope.program.has_values:
        raise UserError(f"gate metric {metric!r} needs weight values; the checkpoint was captured structure-only")
    if metric in NUMERIC:
        from optpass.evaluate.difference import program_difference

        return program_difference(scope.reference, scope.program, seed=seed).as_dict()[metric]
    from optpass.evaluate.generation import quality_of_program

    return quality_of_program(scope, metric, samples=samples, steps=steps, seed=seed)
