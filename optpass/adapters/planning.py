"""Several adapters → what happens to each weight of a model, in order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from optpass.adapters.adaptation import Adaptation
from optpass.adapters.matching import Adaptable, Matched, match_adapter
from optpass.adapters.reading import FILES, Adapter, adapter_files, read_adapter
from optpass.errors import UserError
from optpass.ir.hashing import file_digest

Adaptations = Sequence[tuple[Adaptation, float]]
"""What changes one weight, and how strongly, in order."""
Note = Callable[[str, str], None]
"""Told a key or file, and what a reader of the report should know of it."""


@dataclass(frozen=True)
class Chosen:
    """An adapter and the strength that it is given."""

    adapter: Adapter
    strength: float

    def __str__(self) -> str:
        path = self.adapter.path
        # Libraries call the file in an adapter's folder always alike.
        name = path.parent.name if path.name in FILES else path.name
        return f"{name} × {self.strength:g}"


def read_adapters(given: Sequence[tuple[Path, float]]) -> list[Chosen]:
    """Every adapter with its strength; their factors, which are small, are looked at once.

    Raises:
        UserError: a file is no adapter, or is given twice.
        WeightError: one is damaged, or holds NaN or Inf.
    """
    seen: dict[str, Path] = {}
    chosen = []
    for path, strength in given:
        digest = file_digest(adapter_files(path)[0])
        if digest in seen:
            raise UserError(f"{seen[digest]} and {path} are the same adapter; give it once")
        seen[digest] = path
        adapter = read_adapter(path)
        adapter.check_finite()
        chosen.append(Chosen(adapter, strength))
    return chosen


def plan_adapters(
    chosen: Sequence[Chosen], model: Adaptable, *, strict: bool, note: Note, elsewhere: bool = False
) -> Mapping[str, list[tuple[Adaptation, float]]]:
    """By the name of the weight, what the adapters do to it, in their order.

    Raises:
        UserError: a key matches nothing of the model (as :func:`match_adapter`), or two adapters conflict.
    """
    plan: dict[str, list[tuple[Adaptation, float]]] = defaultdict(list)
    for item in chosen:
        found = match_adapter(item.adapter, model, strict=strict, elsewhere=elsewhere)
        _tell(item.adapter, found, note)
        for name, adaptation in found.weights.items():
            plan[name].append((adaptation, item.strength))
    for name, adaptations in plan.items():
        _refuse_conflict(name, [adaptation for adaptation, _ in adaptations])
    return dict(plan)


def _tell(adapter: Adapter, found: Matched, note: Note) -> None:
    """Another component's keys by their first one: there are hundreds."""
    for text in adapter.notes:
        note(adapter.path.name, text)
    elsewhere: dict[str, list[str]] = defaultdict(list)
    for refusal in found.refused:
        if refusal.harmless:
            elsewhere[refusal.reason].append(refusal.key)
        else:
            note(refusal.key, refusal.reason)
    for reason, keys in elsewhere.items():
        note(keys[0], f"{reason} ({len(keys)} module{'s' * (len(keys) > 1)})")


def _refuse_conflict(name: str, adaptations: Sequence[Adaptation]) -> None:
    """
    Raises:
        UserError: two adapters both set the length of a weight's rows.
    """
    keys = [adaptation.keys["magnitude"] for adaptation in adaptations if adaptation.magnitude is not None]
    if len(keys) > 1:
        raise UserError(
            f"{keys[0]!r} and {keys[1]!r} of two adapters both are DoRA magnitudes of {name}, "
            "of which one can hold; merge one of the adapters"
        )
