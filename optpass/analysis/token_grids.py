"""What the tokens of a sequence are: a grid of pixels, frames, a text, rows that were put in front."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from optpass.analysis.axes import Axes, Structure
from optpass.analysis.axes.structure import factors, terms

Over = Literal["space", "time", "space-time", "sequence"]
PIXELS = frozenset({"height", "width"})
GRID = PIXELS | {"frames"}
IMAGES = (("height", "width"), ("frames", "height", "width"))


@dataclass(frozen=True)
class Part:
    """Consecutive tokens, ``size`` of them; ``axes`` are the sizes of what they are folded from, outermost first.

    Names are those of the axis analysis, each once: "frames", "height", "width", "tokens". Without names they are
    rows that come from no input: class tokens, registers, prompts.
    """

    size: Any
    axes: Mapping[str, Any]

    @property
    def is_grid(self) -> bool:
        return not GRID.isdisjoint(self.axes)

    @property
    def is_image(self) -> bool:
        """Whether they are rows of pixels, of one frame or of several."""
        return tuple(self.axes) in IMAGES


@dataclass(frozen=True)
class Grid:
    """Rows ``start`` to ``stop`` (not included) of a sequence: ``frames`` times ``height`` × ``width`` tokens."""

    start: Any
    stop: Any
    frames: Any
    height: Any
    width: Any


@dataclass(frozen=True)
class Tokens:
    """The tokens of a sequence, as ``parts`` after one another.

    ``folded`` are the named axes that stand in the batch of the attention: frames where it is over the pixels of each,
    rows and columns of windows where it is over the pixels of a window.
    """

    parts: tuple[Part, ...]
    folded: Mapping[str, Any]

    @property
    def size(self) -> Any:
        return sum(part.size for part in self.parts)

    @property
    def grid(self) -> Mapping[str, Any]:
        """The sizes of frames, height and width of the only part that has some; empty where no one has."""
        grids = [part.axes for part in self.parts if part.is_grid]
        return grids[0] if len(grids) == 1 else {}

    @property
    def image(self) -> Grid | None:
        """Where the pixels are, of one frame or of several; ``None`` unless one part is such a grid and no more."""
        start: Any = 0
        found: list[Grid | None] = []
        for part in self.parts:
            stop = start + part.size
            if part.is_grid:
                found.append(_image(part, start, stop))
            start = stop
        return found[0] if len(found) == 1 else None

    @property
    def class_tokens(self) -> Any:
        """How many rows that come from no input stand before all others."""
        count: Any = 0
        for part in self.parts:
            if part.axes:
                return count
            count = count + part.size
        return 0

    @property
    def over(self) -> Over:
        names = {name for part in self.parts if part.is_grid for name in part.axes}
        if "frames" in names:
            return "time" if names.isdisjoint(PIXELS) else "space-time"
        return "space" if names else "sequence"

    @property
    def is_windowed(self) -> bool:
        """Whether the sequence is a part of an axis of which the rest is folded into the batch."""
        return any(name in self.folded for part in self.parts for name in part.axes)


def _image(part: Part, start: Any, stop: Any) -> Grid | None:
    if not part.is_image:
        return None
    frames, height, width = part.axes.get("frames", 1), part.axes["height"], part.axes["width"]
    return Grid(start, stop, frames, height, width) if part.size == frames * height * width else None


def tokens_of(axes: Axes, dimension: Structure, batch: Iterable[Structure]) -> Tokens:
    """The tokens along ``dimension`` of a value whose other dimensions, without its channels, are ``batch``."""
    parts = tuple(Part(term.size, _named(axes, term)) for term in terms(dimension))
    folded: dict[str, Any] = {}
    for structure in batch:
        for name, size in _named(axes, structure).items():
            if name in GRID:
                folded[name] = folded.get(name, 1) * size
    return Tokens(parts, folded)


def _named(axes: Axes, structure: Structure) -> dict[str, Any]:
    """The sizes of ``structure``'s factors by their names.

    A factor has the names of all that it was ever computed with. Of a grid's it has those alone ("tokens" is what a
    kept state is called by its shape), and of these not the ones by which another factor alone is called (a table of
    rotary positions has those of every axis).
    """
    pairs = [(factor.size, axes.names(factor)) for factor in factors(structure)]
    pairs = [(size, names & GRID or names) for size, names in pairs]
    alone = frozenset[str]().union(*(names for _, names in pairs if len(names) == 1))
    found: dict[str, Any] = {}
    for size, names in pairs:
        if name := "·".join(sorted(names if len(names) == 1 else names - alone)):
            found[name] = found.get(name, 1) * size
    return found
