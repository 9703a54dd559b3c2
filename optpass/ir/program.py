"""What is optimised: named entries that share one weight store, where they came from, how they loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from optpass.ir.graph import Graph
from optpass.ir.interface import Interface
from optpass.ir.loop import Loop, State, present
from optpass.ir.weights import Expression, WeightStore


@dataclass(frozen=True)
class Origin:
    """Where a Program came from: for the lock file, and for writing the original layout back.

    ``folder`` is the checkpoint's folder (``None`` when it was a single file or made in memory),
    ``component`` the sub-folder that was captured, ``library`` and ``class_name`` what rebuilds the
    module, ``config`` its configuration, ``pipeline`` whether the folder is a whole diffusers pipeline,
    ``digest`` the checkpoint's content hash, or what computes it when it is asked for.
    """

    kind: str
    path: Path | None = None
    component: str = ""
    library: str = ""
    class_name: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    pipeline: bool = False
    digest: str | Callable[[], str] = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "name": self.path.name if self.path else "",
            "component": self.component,
            "library": self.library,
            "class": self.class_name,
            "config": dict(self.config),
            "pipeline": self.pipeline,
            "sha256": self.digest() if callable(self.digest) else self.digest,
        }


@dataclass(frozen=True)
class InputRange:
    """What random values of an input may be: integers in [low, high), floats ``uniform`` there, or ``normal``."""

    low: float = 0.0
    high: float = 1.0
    distribution: str = "normal"

    def as_json(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high, "distribution": self.distribution}


@dataclass(frozen=True)
class Program:
    """Entries, weights, loop and origin. Treat as a value: passes return a new one.

    The graphs inside are mutable; :meth:`copy` before editing. The manager hands every pass a copy.
    ``untrained`` are the weights that passes added and that training has yet to find values for.
    """

    entries: Mapping[str, Graph]
    weights: WeightStore
    origin: Origin
    loop: Loop | None = None
    ranges: Mapping[str, InputRange] = field(default_factory=dict)
    untrained: frozenset[str] = frozenset()

    def copy(self) -> Program:
        return replace(self, entries={name: graph.copy() for name, graph in self.entries.items()})

    @property
    def interfaces(self) -> dict[str, Interface]:
        """What every entry takes and gives."""
        return {name: Interface.of(graph) for name, graph in self.entries.items()}

    def with_weights(self, changes: Mapping[str, Expression]) -> Program:
        """This Program with some weights' expressions added or replaced."""
        return replace(self, weights=self.weights.updated(changes))

    def with_untrained(self, added: Mapping[str, Expression]) -> Program:
        """This Program with new weights, whose expressions are what they are before training."""
        return replace(self.with_weights(added), untrained=self.untrained | set(added))

    def with_written_states(self) -> Program:
        """With every state of the loop in the shape and dtype that entries write it in: after a change of both ends."""
        if self.loop is None or not self.loop.states:
            return self
        outputs = {spec.name: spec for entry in self.interfaces.values() for spec in entry.outputs}
        states = {
            name: State.of(name, outputs[present(name)], state.initial) if present(name) in outputs else state
            for name, state in self.loop.states.items()
        }
        return replace(self, loop=replace(self.loop, states=states))

    def used_weights(self) -> WeightStore:
        """The weights that some entry reads, each once."""
        names = dict.fromkeys(name for graph in self.entries.values() for name in graph.weight_names)
        return WeightStore({name: self.weights[name] for name in names})

    def pruned(self) -> Program:
        """Without weights that no entry reads."""
        used = self.used_weights()
        return replace(self, weights=used, untrained=frozenset(self.untrained & used.keys()))

    @property
    def has_values(self) -> bool:
        return self.used_weights().has_values
