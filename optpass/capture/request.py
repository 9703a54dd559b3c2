"""What a capture is asked for, and what every kind of source provides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from optpass.capture.spans import Sizes
from optpass.ir.program import Program


@dataclass(frozen=True)
class Request:
    """A checkpoint and how to capture it.

    ``path`` is the folder or file, ``function`` what follows ``:`` in ``file.py:function``. ``sizes``
    are the user's sizes by input name, ``defaults`` sizes of named dimensions that a source
    prefers (a pipeline's batch of 2); the other fields are those of :func:`optpass.capture.sources.capture`.
    """

    path: Path
    function: str = ""
    sizes: Sizes = field(default_factory=dict)
    defaults: Mapping[str, int] = field(default_factory=dict)
    structure_only: bool = False
    weights: Path | None = None
    trust_remote_code: bool = False
    component: str | None = None
    dtype: torch.dtype = torch.float32
    loop: bool = False


class Source(Protocol):
    """One kind of checkpoint; every module in ``sources.KINDS`` provides these."""

    DESCRIPTION: str

    def recognises(self, request: Request) -> bool:
        """Whether ``request.path`` is a checkpoint of this kind, judged by names and configs alone."""

    def capture(self, request: Request) -> Program:
        """The Program; called only when :meth:`recognises` said so."""
