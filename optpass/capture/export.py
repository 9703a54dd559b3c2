"""torch.export of a module that has no weights: fake parameters in, a canonical Program out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map_only

from optpass.canonical.rewrites import rewrite
from optpass.capture.binding import bind
from optpass.capture.inputs import Example
from optpass.capture.open_sizes import export_open
from optpass.capture.tracing import data_is_traced, failing_module
from optpass.errors import CaptureError, UserError
from optpass.interchange.canonical import canonicalise
from optpass.ir.dialect import verify
from optpass.ir.dimensions import FIXED, Dimensions
from optpass.ir.graph import Graph
from optpass.ir.loop import single_step
from optpass.ir.program import InputRange, Origin, Program
from optpass.ir.signature import Signature, tree_of_example, tree_of_spec
from optpass.ir.weights import Expression
from optpass.quiet import first_lines, quiet_export

ENTRY = "full"


def build_fake(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> tuple[nn.Module, FakeTensorMode]:
    """The module that ``build`` makes, its parameters fake (no memory), its computed buffers real.

    Buffers stay real because their values come from code, not from the checkpoint (position ids,
    rotary frequencies). ``dtype`` is the parameters' dtype at construction.
    """
    with default_dtype(dtype), _parameters_on_meta(), torch.no_grad():
        module = build().eval()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _fake_parameters(module, mode)
    return module, mode


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Floating tensors that are made without a dtype have this one."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter loses its values when a module registers it, so that one layer at a time has any.

    Unlike accelerate's ``init_empty_weights``, this keeps one parameter one that several modules register.
    """
    register = nn.Module.register_parameter

    def register_without_values(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_without_values  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _fake_parameters(module: nn.Module, mode: FakeTensorMode) -> None:
    # Fake tensors on "cpu" rather than meta tensors: SVD mixes them with tensors made on the input's device.
    replaced: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in replaced:
                with mode:
                    value = torch.empty(parameter.shape, dtype=parameter.dtype)
                replaced[id(parameter)] = nn.Parameter(value, requires_grad=False)
            owner._parameters[name] = replaced[id(parameter)]


def export_program(
    module: nn.Module,
    mode: FakeTensorMode,
    example: Example | Mapping[str, Any],
    checkpoint: Mapping[str, Expression] | None,
    origin: Origin,
    *,
    ranges: Mapping[str, InputRange] | None = None,
    loop: bool = False,
) -> Program:
    """Export ``module(**example.arguments)`` and bind its weights to ``checkpoint``.

    The example's arguments are real or fake tensors; only shape and dtype count. ``checkpoint`` is
    ``None`` for a structure-only capture.

    Raises:
        UserError: torch.export refuses the model; the message carries the module path and the reason.
        WeightError: the checkpoint lacks a weight, or one has another shape.
    """
    example = example if isinstance(example, Example) else Example(example)
    exported, dimensions = _exported(module, mode, example)
    signature = Signature(
        parameters=tuple(inspect.signature(module.forward).parameters),
        arguments=tree_of_example(dict(example.arguments), ""),
        output=tree_of_spec(exported.call_spec.out_spec),
    )
    constants = _constants(module, exported.constants)
    return program_of(
        exported,
        signature,
        tied_names(module),
        constants,
        checkpoint,
        origin,
        ranges=ranges,
        loop=loop,
        dimensions=dimensions,
    )


def _exported(module: nn.Module, mode: FakeTensorMode, example: Example) -> tuple[ExportedProgram, Dimensions]:
    def export(example: Example, shapes: dict[str, Any] | None) -> ExportedProgram:
        return torch.export.export(module, (), _fakes(mode, example), strict=False, dynamic_shapes=shapes)

    with quiet_export(), torch.no_grad(), data_is_traced():
        # Under no_grad, a model's own no_grad blocks change nothing and leave no nested graph behind.
        try:
            return export_open(module, example, export) if example.dimensions else (export(example, None), FIXED)
        except UserError:
            raise
        except Exception as error:
            # Torch's own hint at a line of code ends in the frames of the tracer.
            where, reason = failing_module(error, module), first_lines(error).partition(" Caused by:")[0]
            raise CaptureError(f"torch.export cannot capture {type(module).__name__}: at {where}: {reason}") from error


def _fakes(mode: FakeTensorMode, example: Example) -> dict[str, Any]:
    def fake(tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else torch.empty(tensor.shape, dtype=tensor.dtype)

    with mode:
        return {name: tree_map_only(Tensor, fake, value) for name, value in example.arguments.items()}


def program_of(
    exported: ExportedProgram,
    signature: Signature,
    aliases: Mapping[str, tuple[str, ...]],
    constants: Mapping[str, Tensor],
    checkpoint: Mapping[str, Expression] | None,
    origin: Origin,
    *,
    ranges: Mapping[str, InputRange] | None = None,
    loop: bool = False,
    dimensions: Dimensions = FIXED,
) -> Program:
    """The verified Program of one exported graph; arguments as in :func:`optpass.capture.binding.bind`.

    Raises:
        UserError: the graph cannot be brought into the dialect.
        WeightError: as :func:`optpass.capture.binding.bind`.
    """
    graph = canonicalise(exported, signature, dimensions)
    constants = rewrite(graph, constants)
    _merge_tied(graph, aliases, checkpoint or {})
    weights = bind(graph, aliases, constants, checkpoint)
    driven = single_step(ENTRY, signature) if loop else None
    program = Program({ENTRY: graph}, weights, origin, driven, dict(ranges or {}))
    verify(program)
    return program


def _merge_tied(graph: Graph, aliases: Mapping[str, tuple[str, ...]], checkpoint: Mapping[str, Expression]) -> None:
    """One name for every tensor: of tied weights, the first that the checkpoint knows."""
    for node in graph.fx.nodes:
        if node.op == "get_attr":
            names = aliases.get(str(node.target), (str(node.target),))
            node.target = next((name for name in names if name in checkpoint), names[0])


def tied_names(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """For every parameter and buffer name, all names that the same tensor has (tied weights)."""
    groups: dict[int, list[str]] = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        groups.setdefault(id(tensor), []).append(name)
    return {name: tuple(names) for names in groups.values() for name in names}


def _constants(module: nn.Module, lifted: Mapping[str, Any]) -> dict[str, Tensor]:
    """Real tensors that come from code: buffers that no checkpoint holds, and the literals that export lifted."""
    stored = module.state_dict(keep_vars=True)
    buffers = dict(module.named_buffers(remove_duplicate=False))
    found = {name: value for name, value in {**lifted, **buffers}.items() if isinstance(value, Tensor)}
    found = {name: value for name, value in found.items() if name not in stored}
    # A fake made from a literal (torch.tensor([1, 2])) remembers its value.
    known = {name: value.constant if isinstance(value, FakeTensor) else value for name, value in found.items()}
    return {name: value for name, value in known.items() if value is not None}
