"""One module of a model instead of the whole: SAM 2's memory attention, the encoder of a pair, a single block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from optpass.capture.configs import MODULE_OF
from optpass.capture.export import tied_names
from optpass.errors import UserError, nearest
from optpass.ir.program import Origin
from optpass.ir.weights import Expression

Weights = dict[str, Expression] | None


def submodule(module: nn.Module, weights: Weights, origin: Origin, path: str) -> tuple[nn.Module, Weights, Origin]:
    """The module at ``path`` (``memory_attention``, ``layers.0``), its weights under their names in it, its origin.

    A weight tied to one outside is found under that one's name.

    Raises:
        UserError: there is no such module, or it only holds others and cannot be called.
    """
    modules = dict(module.named_modules())
    if path not in modules:
        known = [name for name in modules if name.count(".") == path.count(".")]
        raise UserError(f"{type(module).__name__} has no module {path!r}{nearest(path, known)}")
    part: Any = modules[path]
    if type(part).forward is nn.Module.forward:
        inside = ", ".join(f"{path}.{name}" for name, _ in part.named_children())
        raise UserError(f"{path!r} is a {type(part).__name__}, which computes nothing itself; choose one of: {inside}")
    config = part.config.to_dict() if hasattr(getattr(part, "config", None), "to_dict") else {}
    # No library: from_pretrained could not load what is written back.
    kind = f"{MODULE_OF}{origin.kind}"
    origin = replace(origin, kind=kind, component=path, library="", class_name=type(part).__name__, config=config)
    return part, None if weights is None else _inner(module, weights, f"{path}."), origin


def _inner(module: nn.Module, weights: dict[str, Expression], prefix: str) -> dict[str, Expression]:
    found = {}
    for name, names in tied_names(module).items():
        known = next((candidate for candidate in (name, *names) if candidate in weights), None)
        if name.startswith(prefix) and known is not None:
            found[name.removeprefix(prefix)] = weights[known]
    return found
