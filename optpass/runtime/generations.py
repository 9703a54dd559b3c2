"""Which generation a call belongs to: a module is only ever called step by step, by anybody, and told nothing else."""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from optpass.ir.loop import Loop

log = logging.getLogger(__name__)

CORRELATION = 0.3
"""Cosine below which two samples are not of one generation. Noises of a thousand elements stay under 0.1."""
SAME_TIME = 0.7
"""The cosine that the two samples of a time that is evaluated twice have: above 0.8 with Heun's 4 steps.

Two noisy versions of one image, as image-to-image starts from, stay under it but for the last quarter of the steps.
"""
OPEN = 32
"""Generations of one module that are kept, of all threads; the one that rested longest goes first."""
RESTED = 16
"""Calls of its thread after which a generation that none of them went on with is over, and what it kept is freed."""
SAME_NOISE = 1e-5
"""Distance of two unit vectors up to which a sample is a multiple of another: rounding, and no step of a sampler."""
SUSPICIOUS = 4
"""Calls in a row that each start a generation, after which the log says why nothing is reused."""


@dataclass(frozen=True)
class Said:
    """What a pipeline says of a call beside its arguments (diffusers' ``cache_context``), as far as it says anything.

    ``name`` tells the calls of a step apart ("cond", "uncond"), ``step`` counts from 0, ``of`` is the number of steps.
    """

    name: str = ""
    step: int | None = None
    of: int | None = None


@dataclass(eq=False)
class Generation:
    """One sample on its way through the steps, with what its entries wrote and told.

    With guidance in two calls a step, each of the two is a generation of its own.
    """

    thread: int
    said: Said
    conditioning: Mapping[str, Tensor]
    start: Tensor
    step: int = -1
    used: int = 0
    timestep: float = math.inf
    sample: Tensor = field(init=False)
    states: dict[str, Tensor] = field(default_factory=dict)
    computed: list[int] = field(default_factory=list)
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)

    def advance(self, sample: Tensor, timestep: float) -> None:
        """The next step begins, with this sample."""
        self.step += 1
        # The pipeline may go on writing into its own tensor.
        self.sample, self.timestep = sample.clone(), timestep


class Generations:
    """Those in progress in one module; calls find theirs by what they are given.

    A call goes on with a generation of the same thread whose conditioning is equal in shape and value, when its
    timestep has moved on and its sample is like the last one (cosine of :data:`CORRELATION` or more); of
    several, with the one whose sample is nearest. At an equal timestep, the sample must differ, and little (samplers of
    higher order evaluate a time twice; the same question twice gets the same answer). Every other call starts anew, as
    does one with the noise that a generation began with, whatever its scale: that takes the generation's place.
    What a pipeline says (:meth:`saying`) counts too: calls by other names never meet, and step 0 starts anew.
    So a generation that was broken off, a changed batch, guidance in two calls and pipelines that
    share a module are told apart, and what is not certain is computed.
    """

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.correlation = CORRELATION
        self.ascending = False
        self._open: list[Generation] = []
        self._said = threading.local()
        self._calls: Counter[int] = Counter()
        self._lock = threading.Lock()
        self._started_in_a_row = 0

    @contextmanager
    def saying(self, said: Said) -> Iterator[None]:
        """For the calls of this thread inside, this is what the pipeline says of them."""
        before = self._now
        self._said.now = said
        try:
            yield
        finally:
            self._said.now = before

    @property
    def _now(self) -> Said:
        found: Said = getattr(self._said, "now", Said())
        return found

    def of(self, tensors: Mapping[str, Tensor]) -> Generation:
        """The generation of a call, advanced by a step; a new one stands at step 0 and has no state."""
        sample, timestep = tensors[self.loop.sample], float(tensors[self.loop.timestep].max())
        with self._lock:
            found = self._continued(tensors, sample, timestep)
            self._watch(found)
            if found is None:
                over = self._begun_again(tensors, sample, timestep)
                self._open = [item for item in self._open if item not in over]
                given = {name: tensors[name].clone() for name in self.loop.conditioning}
                found = Generation(_this_thread(), self._now, given, sample.clone())
            else:
                self._open.remove(found)
            self._keep(found)
            found.advance(sample, timestep)
        return found

    def _keep(self, found: Generation) -> None:
        """Make ``found`` the latest, and let go of those that are over."""
        thread = found.thread
        self._calls[thread] += 1
        found.used = now = self._calls[thread]
        running = {each.ident for each in threading.enumerate()}
        kept = [
            item
            for item in self._open
            if (now - item.used <= RESTED if item.thread == thread else item.thread in running)
        ]
        self._open = [*kept[-OPEN + 1 :], found]

    def drop(self, generation: Generation | None = None) -> None:
        """Forget one generation, or all of them."""
        with self._lock:
            self._open = [] if generation is None else [item for item in self._open if item is not generation]

    def _continued(self, tensors: Mapping[str, Tensor], sample: Tensor, timestep: float) -> Generation | None:
        nearest, best = None, -math.inf
        for item in self._alike(tensors, sample):
            if self._now.step == 0 or not self._moved_on(item, timestep) or _is_multiple(item.start, sample):
                continue
            likeness = _cosine(item.sample, sample)
            if item.timestep == timestep and (likeness < SAME_TIME or item.sample.equal(sample)):
                continue
            # Of equally near ones, the latest: an older one was broken off.
            if likeness >= max(best, self.correlation):
                nearest, best = item, likeness
        return nearest

    def _alike(self, tensors: Mapping[str, Tensor], sample: Tensor) -> Iterator[Generation]:
        """Those of this thread and of the calls of this name that have the conditioning of a call."""
        for item in self._open:
            if item.thread != threading.get_ident() or item.said.name != self._now.name:
                continue
            if item.sample.shape == sample.shape and _equal(item.conditioning, tensors):
                yield item

    def _begun_again(self, tensors: Mapping[str, Tensor], sample: Tensor, timestep: float) -> list[Generation]:
        """Those that are over when one starts: of its noise, and not the other call of its first step."""
        return [
            item
            for item in self._alike(tensors, sample)
            if (item.step or item.timestep != timestep) and _is_multiple(item.start, sample)
        ]

    def _moved_on(self, item: Generation, timestep: float) -> bool:
        return timestep >= item.timestep if self.ascending else timestep <= item.timestep

    def _watch(self, found: Generation | None) -> None:
        self._started_in_a_row = 0 if found else self._started_in_a_row + 1
        if self._started_in_a_row == SUSPICIOUS:
            log.warning(
                "%d calls in a row each started a generation, so nothing was reused: conditioning that changes at "
                "every step, a sample that stays, timesteps that ascend (set module.ascending = True), or a sampler "
                "that draws new noise at every step (set module.correlation = -1, and use the module for one "
                "generation at a time)",
                SUSPICIOUS,
            )


def _this_thread() -> int:
    """The running thread's number; one that Python did not start is known to :mod:`threading` from here on."""
    return threading.current_thread().ident or threading.get_ident()


def _equal(conditioning: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> bool:
    return all(
        value.shape == tensors[name].shape and value.dtype == tensors[name].dtype and value.equal(tensors[name])
        for name, value in conditioning.items()
    )


def _cosine(one: Tensor, other: Tensor) -> float:
    """The cosine between two tensors of equal shape; 0 where one is zero or not finite."""
    a, b = one.flatten().float(), other.flatten().float()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if math.isfinite(scale) and scale else 0.0


def _is_multiple(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of equal shape have one direction; not where one is zero or not finite."""
    a, b = one.flatten().float(), other.flatten().float()
    sizes = float(a.norm()), float(b.norm())
    if not all(math.isfinite(size) and size for size in sizes):
        return False
    return float((a / sizes[0] - b / sizes[1]).norm()) <= SAME_NOISE
