"""The dtype that a checkpoint is captured in: its own, unless somebody says otherwise."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch

from optpass.errors import UserError, nearest
from optpass.ir.weights import Expression

PRECISIONS: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
AUTO = "auto"


def precision(name: str) -> torch.dtype | None:
    """The dtype called ``name``; ``None`` for ``auto``.

    Raises:
        UserError: the name is neither.
    """
    if name == AUTO:
        return None
    if name not in PRECISIONS:
        known = [AUTO, *PRECISIONS]
        raise UserError(f"dtype {name!r} is none of {', '.join(known)}{nearest(name, known)}")
    return PRECISIONS[name]


def own_precision(weights: Iterable[Expression], among: Collection[torch.dtype]) -> torch.dtype:
    """The one floating dtype of ``weights``, if it is ``among`` those that will do, else float32.

    float32 holds every value of the narrower ones: where they mix, and where one is not wanted, nothing is lost.
    """
    found = {weight.dtype for weight in weights if weight.dtype.is_floating_point}
    only = found.pop() if len(found) == 1 else torch.float32
    return only if only in among and only in PRECISIONS.values() else torch.float32
