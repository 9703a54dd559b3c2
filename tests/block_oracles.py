"""Caching of blocks in eager PyTorch by forward hooks: what the compiled caches are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Memory(Protocol):
    """What a residual is kept in."""

    def update(self, residual: Tensor) -> None: ...

    def predict(self) -> Tensor: ...


class Kept:
    """The residual of the last computed step, as it was."""

    residual: Tensor

    def update(self, residual: Tensor) -> None:
        self.residual = residual

    def predict(self) -> Tensor:
        return self.residual


class Extrapolated:
    """diffusers' own TaylorSeer state; ``step`` is advanced by whoever drives it."""

    def __init__(self, order: int) -> None:
        from diffusers.hooks.taylorseer_cache import TaylorSeerState

        self.state = TaylorSeerState(torch.float32, order)

    def tick(self) -> None:
        self.state.current_step += 1

    def update(self, residual: Tensor) -> None:
        self.state.update((residual,))

    def predict(self) -> Tensor:
        (predicted,) = self.state.predict()
        return predicted


@contextmanager
def range_cache(first: nn.Module, behind: nn.Module, computes: Callable[[], bool], memory: Memory) -> Iterator[None]:
    """Let ``behind`` read what entered ``first`` plus a remembered residual, on steps that are not computed.

    ``first`` is the first block of the range and ``behind`` the module behind the last one. The blocks between run
    all the same, and nobody reads them: slower than any cache, and with fewer ways to be wrong.
    """
    entered: dict[str, Tensor] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered["x"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    def put(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if computes():
            memory.update(args[0] - entered["x"])
            return None
        return (entered["x"] + memory.predict(), *args[1:])

    handles = [first.register_forward_pre_hook(note, with_kwargs=True), behind.register_forward_pre_hook(put)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
