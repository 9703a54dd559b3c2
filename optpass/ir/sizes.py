"""Sizes in fake shapes: whole numbers, or expressions of the symbols that stand for open dimensions.

torch's own ``SymInt`` decides a comparison by an example value and remembers the decision as a guard, so a
pass that compares two of them can quietly specialise a graph. Here sizes are SymPy expressions: they compare
by structure, and an order that depends on the call cannot be decided by accident (SymPy raises).
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.utils._sympy.functions import CeilToInt, FloatTrueDiv, ToFloat

if TYPE_CHECKING:
    from optpass.ir.dimensions import Dimensions, Size

Annotate = Callable[[Node], Node]
"""Gives a new node its provenance and its value, and returns it."""

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


@contextmanager
def open_rules(mode: FakeTensorMode) -> Iterator[None]:
    """Shape inference that takes an open size for neither 0 nor 1, and notes no guard.

    Kernels ask for layouts (``batch > 1``?) that no shape depends on, so a guard here says nothing; that a
    pass has not specialised a graph shows when it is executed at other sizes.
    """
    # Without the Python dispatcher, composite kernels in C++ turn sizes into numbers.
    with oblivious(), enable_python_dispatcher(), unguarded(mode):
        yield


def unguarded(mode: FakeTensorMode) -> AbstractContextManager[Any]:
    """Without torch noting what it asked about open sizes: a guard narrows the ranges of every graph of ``mode``."""
    environment = mode.shape_env
    return environment.suppress_guards() if environment else nullcontext()


def oblivious() -> AbstractContextManager[Any]:
    """torch.export's rule that an open size of 1 does not broadcast, so that 1 may be in its range."""
    patch: AbstractContextManager[Any] = torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    return patch


def size_of(value: Any) -> Any:
    """A size as a whole number, or as an expression over symbols."""
    if not isinstance(value, torch.SymInt):
        return value
    expression = value.node.expr
    if expression.has(CeilToInt):
        # arange(0.5, n): n - 0.5 rounded up, which nothing downstream can compute from n as it stands.
        expression = expression.replace(CeilToInt, _rounded_up)
    return int(expression) if expression.is_number else expression


def _rounded_up(value: Any) -> Any:
    """⌈n + c⌉ as n + ⌈c⌉ for a whole n and a number c; ``CeilToInt(value)`` where it is not of that form."""
    total = value.args[0] if isinstance(value, FloatTrueDiv) and value.args[1] == 1.0 else value
    terms = sympy.Add.make_args(total)
    whole = [term.args[0] for term in terms if isinstance(term, ToFloat)]
    rest = [term for term in terms if not isinstance(term, ToFloat)]
    if not all(term.is_number for term in rest):
        return CeilToInt(value)
    return sympy.Add(*whole, math.ceil(sum(map(float, rest))))


def sizes_of(tensor: Tensor) -> tuple[Any, ...]:
    """The shape of a fake tensor, each size as in :func:`size_of`."""
    return tuple(size_of(size) for size in tensor.shape)


def example(size: Any) -> int:
    """A size as it was in the captured example."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def example_sizes(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a fake tensor in the captured example: what costs are counted at."""
    return tuple(map(example, tensor.shape))


def is_size(node: Node) -> bool:
    """Whether a node computes a size, not a tensor."""
    return isinstance(node.meta.get("val"), (*SYMBOLIC, int, float, bool))


def named(size: Any, dimensions: Dimensions) -> Size:
    """A size over the names of open dimensions, as manifests and messages have it."""
    size = size_of(size)
    if isinstance(size, int):
        return size
    return str(sympy.simplify(size.subs(_by_symbol(dimensions), simultaneous=True)))


def _by_symbol(dimensions: Dimensions) -> dict[sympy.Symbol, sympy.Expr]:
    """Every symbol, in terms of the dimension's whole size."""
    found = {}
    for item in dimensions:
        whole = sympy.Symbol(item.name, integer=True, positive=True)
        found[sympy.Symbol(item.symbol, integer=True, positive=True)] = (whole - item.offset) / item.step
        found[sympy.Symbol(item.symbol, integer=True)] = (whole - item.offset) / item.step
    return found


def materialise(graph: fx.Graph, size: Any, annotate: Annotate) -> int | Node:
    """A node that computes ``size`` from the sizes of the graph's inputs; a whole number stays one.

    New nodes stand at the graph's insertion point, each given its value by ``annotate``.

    Raises:
        ValueError: a symbol of it is in no input.
    """
    if isinstance(size, int):
        return size
    for placeholder, axis, found in _open_sizes(graph):
        if found == size:
            return annotate(_sym_size(graph, placeholder, axis))
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis

    tracer = _Annotating(graph, annotate)
    symbols = {symbol: fx.Proxy(_symbol_node(graph, symbol, annotate), tracer) for symbol in size.free_symbols}
    result: Any = sympy_interp(PythonReferenceAnalysis, symbols, size)
    return result.node if isinstance(result, fx.Proxy) else int(result)


class _Annotating(fx.proxy.GraphAppendingTracer):
    """Appends what is traced to a graph, each node with its value."""

    def __init__(self, graph: fx.Graph, annotate: Annotate) -> None:
        super().__init__(graph)
        self.annotate = annotate

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        return self.annotate(super().create_node(*args, **kwargs))


def _open_sizes(graph: fx.Graph) -> Iterator[tuple[Node, int, Any]]:
    """Every symbolic size of an input: the placeholder, the axis, the expression."""
    for placeholder in itertools.takewhile(lambda node: node.op == "placeholder", graph.nodes):
        value = placeholder.meta["val"]
        for axis, size in enumerate(sizes_of(value) if isinstance(value, Tensor) else ()):
            if not isinstance(size, int):
                yield placeholder, axis, size


def _symbol_node(graph: fx.Graph, symbol: Any, annotate: Annotate) -> Node:
    """A node whose value is ``symbol``: an input's size is step · symbol + offset."""
    for placeholder, axis, size in _open_sizes(graph):
        if size.free_symbols != {symbol}:
            continue
        step, offset = size.coeff(symbol), size.subs(symbol, 0)
        node = annotate(_sym_size(graph, placeholder, axis))
        if offset:
            node = annotate(graph.call_function(operator.sub, (node, int(offset))))
        return node if step == 1 else annotate(graph.call_function(operator.floordiv, (node, int(step))))
    raise ValueError(f"no input has the size {symbol}")


def _sym_size(graph: fx.Graph, placeholder: Node, axis: int) -> Node:
    return graph.call_function(torch.ops.aten.sym_size.int, (placeholder, axis))
