"""What torch.export's tracing needs around it: no way past it, and the place where it failed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_READ_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


class _DataAsDetach(TorchFunctionMode):
    """``tensor.data`` is ``tensor.detach()``: the same storage, and seen by the tracer."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].detach() if function == _READ_DATA else function(*args, **(kwargs or {}))


@contextmanager
def data_is_traced() -> Iterator[None]:
    """``tensor.data``, which the tracer does not see, taken as ``tensor.detach()``.

    Unseen, what a model writes into ``x.data`` (positional tables often are) goes into a constant of the
    graph beside ``x``, and ``x`` keeps the values from before.
    """
    with _DataAsDetach():
        yield


def failing_module(error: BaseException, root: nn.Module) -> str:
    """The path below ``root`` of the innermost module whose code ``error`` or one of its causes left."""
    # While it traces, torch.export puts proxies in the modules' place, which share their attributes.
    names = {id(module.__dict__): name for name, module in root.named_modules()}
    paths = [_innermost(cause.__traceback__, names) for cause in _causes(error)]
    return max(paths, key=lambda path: path.count(".") + bool(path)) or "(root)"


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        yield cause
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__


def _innermost(traceback: TracebackType | None, names: dict[int, str]) -> str:
    path = ""
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            path = names.get(id(owner.__dict__), path)
        traceback = traceback.tb_next
    return path
