"""``import timm`` where torchvision is missing or does not load.

timm requires torchvision for its data transforms and datasets, and for one frozen norm; its models
compute nothing with it. A torchvision that loads is used. Otherwise, and only while timm is being
imported, the modules that timm names are stood in for by classes that say what is missing when
something makes one of them. Nothing of that stays behind: ``import torchvision`` fails afterwards as before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from types import ModuleType
from typing import Any

from optpass.errors import UserError

TORCHVISION = "torchvision"
MODULES = frozenset({"", ".datasets", ".ops", ".ops.misc", ".transforms", ".transforms.functional"})
"""What timm imports unconditionally; for everything else of torchvision it has a way without."""


@contextmanager
def timm_importable() -> Iterator[None]:
    """Inside, ``import timm`` works without a torchvision that loads, by whoever imports it."""
    finder = _TimmFinder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _TimmFinder(MetaPathFinder):
    """Finds timm where it is, and has it loaded beside the stand-in."""

    def __init__(self) -> None:
        self._searching = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "timm" or self._searching:
            return None
        self._searching = True
        try:
            spec = find_spec(name)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _BesideStandIn(spec.loader)
        return spec


class _BesideStandIn(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        reason = _why_not()
        if reason is None:
            self.loader.exec_module(module)
        else:
            with _stand_in(reason):
                self.loader.exec_module(module)


def _why_not() -> str | None:
    """Why torchvision does not load; ``None`` when it does."""
    try:
        __import__(TORCHVISION)
    except ModuleNotFoundError as error:
        return "is not installed" if error.name == TORCHVISION else f"does not load ({error})"
    except Exception as error:  # Built for another torch, it fails in its own registrations with any of several.
        return f"does not load ({error})"
    return None


@contextmanager
def _stand_in(reason: str) -> Iterator[None]:
    finder = _StandIn(reason)
    # What a torchvision that fails half-way has left behind.
    broken = {name: sys.modules.pop(name) for name in _loaded()}
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in _loaded():
            del sys.modules[name]
        sys.modules.update(broken)


def _loaded() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == TORCHVISION]


class _StandIn(MetaPathFinder, Loader):
    """The modules of :data:`MODULES`, each with a class for every name that is asked of it."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        known = name.startswith(TORCHVISION) and name.removeprefix(TORCHVISION) in MODULES
        return spec_from_loader(name, self, is_package=True) if known else None

    def exec_module(self, module: ModuleType) -> None:
        def missing(name: str) -> type:
            # Lower-case names are submodules, which the import system then looks for.
            if not name[:1].isupper():
                raise AttributeError(name)
            found = _Missing(name, (), {"__module__": module.__name__, "reason": self.reason})
            setattr(module, name, found)
            return found

        module.__getattr__ = missing  # type: ignore[method-assign]


class _Missing(type):
    """A class of torchvision that can be named, inherited from and asked for members, and never made."""

    reason: str

    def __getattr__(cls, name: str) -> str:
        if name.startswith("_"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        missing = next(base for base in cls.__mro__ if base.__module__.startswith(TORCHVISION))
        raise UserError(
            f"timm needs torchvision's {missing.__name__} here, and torchvision {cls.reason}: "
            "install the torchvision that was built for this torch"
        )
