"""What a capture is asked for, and what every kind of source provides."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from optpass.capture.checkpoint_weights import folder_weights, given_weights
from optpass.capture.precision import PRECISIONS, own_precision
from optpass.capture.spans import Sizes
from optpass.errors import UserError, WeightError
from optpass.ir.program import Origin, Program
from optpass.ir.weights import Expression


@dataclass(frozen=True)
class Request:
    """A checkpoint and how to capture it.

    ``path`` is the folder or file, ``function`` what follows ``:`` in ``file.py:function``. ``sizes``
    are the user's sizes by input name, ``defaults`` sizes of named dimensions that a source
    prefers (a pipeline's batch of 2), ``given_dtype`` the dtype that somebody asked for; the other fields
    are those of :func:`optpass.capture.sources.capture`.
    """

    path: Path
    function: str = ""
    sizes: Sizes = field(default_factory=dict)
    defaults: Mapping[str, int] = field(default_factory=dict)
    structure_only: bool = False
    weights: Path | None = None
    trust_remote_code: bool = False
    component: str | None = None
    given_dtype: torch.dtype | None = None
    floats: Collection[torch.dtype] = PRECISIONS.values()
    loop: bool = False

    @cached_property
    def dtype(self) -> torch.dtype:
        """What floating weights are computed in: as asked for, or as they lie in the checkpoint.

        Raises:
            UserError: the weights cannot be chosen among the folder's files.
            WeightError: a weight file is damaged.
        """
        if self.given_dtype is not None:
            return self.given_dtype
        try:
            weights = self._read
        except (UserError, WeightError):
            if self.structure_only:
                return torch.float32
            raise
        return own_precision((weights or {}).values(), self.floats)

    @property
    def checkpoint(self) -> dict[str, Expression] | None:
        """The weights that were given apart, else those of the folder; ``None`` for structure only.

        Raises:
            UserError: as :func:`optpass.capture.checkpoint_weights.folder_weights`.
            WeightError: as there.
        """
        return None if self.structure_only or self._read is None else dict(self._read)

    @cached_property
    def _read(self) -> dict[str, Expression] | None:
        return given_weights(self.weights) if self.weights else folder_weights(self.path)


@dataclass(frozen=True)
class Opened:
    """A model folder before it is captured: its module with fake parameters, and where its weights are.

    ``checkpoint`` is ``None`` for a folder without weights, or when none are to be read; ``config`` is the
    library's own configuration, defaults included, where the module does not carry it.
    """

    module: nn.Module
    mode: FakeTensorMode
    checkpoint: Mapping[str, Expression] | None
    origin: Origin
    config: Mapping[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """One kind of checkpoint; every module in ``sources.KINDS`` provides these."""

    DESCRIPTION: str

    def recognises(self, request: Request) -> bool:
        """Whether ``request.path`` is a checkpoint of this kind, judged by names and configs alone."""

    def capture(self, request: Request) -> Program:
        """The Program; called only when :meth:`recognises` said so."""


class ModelSource(Source, Protocol):
    """A source whose folder holds one model of a library."""

    def open_model(self, request: Request) -> Opened:
        """The model without its example inputs; called only when :meth:`recognises` said so."""
