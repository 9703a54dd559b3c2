"""Libraries without their chatter, and their errors without their walls of text."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType

TELLERS = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")
"""Loggers that print, at length, what the error that follows says."""

IMPORTED = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")
"""Loggers that tell, when diffusers imports torchao, of GPU libraries that are not there."""


def quiet_imports() -> None:
    """From now on without what libraries say of each other while they are imported."""
    for library in IMPORTED:
        logging.getLogger(library).setLevel(logging.ERROR)


@contextmanager
def quiet(library: str, level: int = logging.ERROR) -> Iterator[None]:
    """Without what a library logs below ``level``."""
    logger = logging.getLogger(library)
    previous = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(previous)


@contextmanager
def _not_printing(module: ModuleType) -> Iterator[None]:
    """``print`` does nothing in ``module``; a redirected stderr would also stop what draws the progress there."""
    vars(module)["print"] = lambda *values, **options: None
    try:
        yield
    finally:
        vars(module).pop("print", None)


@contextmanager
def _set(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """``module.name`` is ``value`` for a while; nothing happens in a release that has no such setting."""
    if not hasattr(module, name):
        yield
        return
    previous = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, previous)


@contextmanager
def quiet_export() -> Iterator[None]:
    """Without torch.export's warnings about things that the dialect settles anyway, and without stack traces.

    Provenance comes from module paths; a Python stack for every node costs a tenth of the capture.
    """
    # A second to import, for whoever does not export.
    import torch.export._trace

    with ExitStack() as stack:
        stack.enter_context(_set(torch.fx.config, "do_not_emit_stack_traces", True))
        stack.enter_context(quiet("torch.export"))
        for teller in TELLERS:
            stack.enter_context(quiet(teller, logging.CRITICAL))
        stack.enter_context(_not_printing(torch.export._trace))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


def first_lines(error: BaseException, count: int = 3) -> str:
    """The part of a torch error that a reader can use."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:count]) or type(error).__name__
