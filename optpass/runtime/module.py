"""What replaces a model in a pipeline: an engine behind the captured module's own call."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, lru_cache
from types import MethodType
from typing import Any, Self

import torch
from torch import Tensor, nn

from optpass.errors import UserError, nearest
from optpass.ir.dimensions import FIXED, Dimensions
from optpass.ir.graph import FixedSpec, TensorSpec
from optpass.ir.signature import FORWARD, Signature
from optpass.pipeline.target import Runner
from optpass.runtime.library import library_class, model_config, model_skeleton


class Config(dict[str, Any]):
    """A model's configuration, readable as attributes, as diffusers' own is.

    A key that the checkpoint leaves out has the default of its diffusers class or transformers model type.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            defaults = _class_defaults(str(self.get("_class_name", "")))
        if name in defaults:
            return defaults[name]
        settings = model_config(self) if "model_type" in self else None
        if name.startswith("__") or not hasattr(settings, name):
            raise AttributeError(f"the model's config has no {name!r}")
        return getattr(settings, name)


@lru_cache(maxsize=8)
def _class_defaults(name: str) -> Mapping[str, Any]:
    """Defaults of the constructor of diffusers' model class ``name``; empty for any other name."""
    import diffusers

    if name not in diffusers._import_structure["models"]:
        return {}
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    return {key: item.default for key, item in parameters.items() if item.default is not item.empty}


class EngineModule(nn.Module):
    """An engine that is called as the captured module was, and returns what it returned.

    ``precision``, where a pipeline sets it, is the dtype that it computes in around the engine. Inputs are
    converted to the engine's dtypes; Python numbers serve for scalar tensors. Floating
    outputs have the dtype of the first floating input that was given, and lie on its device, as they
    would with a model of that dtype. A call with several times the rows that the engine was built for (guidance:
    without the condition, with it) is answered in as many turns. ``scales`` are values of inputs that a call may
    leave out, and that a pipeline does not know: its own, where passes added some.
    """

    def __init__(
        self,
        signature: Signature,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        runner: Runner,
        *,
        config: Mapping[str, Any] | None = None,
        dimensions: Dimensions = FIXED,
        library: str = "",
        class_name: str = "",
    ) -> None:
        super().__init__()
        self.signature = signature
        self.inputs = inputs
        self.outputs = outputs
        self.dimensions = dimensions
        self.runner = runner
        self.config = Config(config or {})
        self.library = library
        self.class_name = class_name
        self.precision: torch.dtype | None = None
        self.scales: dict[str, float] = signature.defaults
        self._device = torch.device("cpu")
        original = library_class(library, class_name)
        if original is not None:
            # Pipelines ask forward for its parameters to see what it takes.
            self.forward = _with_signature(self.forward, original.forward)  # type: ignore[method-assign]

    @property
    def dtype(self) -> torch.dtype:
        """What a pipeline should prepare its tensors in: ``precision``, or the first floating input's, or output's."""
        if self.precision is not None:
            return self.precision
        specs = (*self.inputs, *self.outputs)
        return next((spec.dtype for spec in specs if spec.dtype.is_floating_point), torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the pipeline has put its tensors; the engine itself runs where its target runs it."""
        return self._device

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """One empty parameter: pipelines take a model's dtype and device from its first."""
        yield nn.Parameter(torch.empty(0, dtype=self.dtype, device=self.device), requires_grad=False)

    def cache_context(self, name: str, **facts: Any) -> AbstractContextManager[None]:
        """What a pipeline says of the calls inside: nothing that an engine without a loop needs."""
        return nullcontext()

    @cached_property
    def _skeleton(self) -> nn.Module | None:
        return model_skeleton(self.library, self.class_name, self.config)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the captured model that are no methods: sizes of layers, scale factors …"""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Underscored names are how libraries ask for their own hooks.
            if name.startswith("_") or self._skeleton is None:
                raise
            found = getattr(self._skeleton, name)
            if isinstance(found, MethodType):
                raise AttributeError(f"{self.class_name}.{name} is not in the engine: it was not captured") from None
            return found

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Remember the device, for :attr:`device`; dtype and place of the engine are fixed."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, (str, int, torch.device)) and not isinstance(value, bool):
                self._device = torch.device(value)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The captured module's forward.

        Raises:
            UserError: an argument is unknown, missing, was not part of the capture, or has another shape
                than the engine was built for.
        """
        return_dict = kwargs.pop("return_dict", None)
        if "return_dict" in self.signature.parameters:
            index = self.signature.parameters.index("return_dict")
            if len(args) > index:
                return_dict = args[index]
                args = (*args[:index], None, *args[index + 1 :])
        given = self.signature.bind(args, {**self.scales, **kwargs})
        like = next((v for v in given.values() if isinstance(v, Tensor) and v.is_floating_point()), None)
        if like is None and self.precision is not None:
            like = torch.empty(0, dtype=self.precision, device=self.device)
        found = {name: _as(value, like) for name, value in self._answer(given).items()}
        return self.signature.result(found, return_dict=return_dict)

    def _answer(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the engine gives, in as many calls as the rows need."""
        turns = in_turns(self.inputs, given)
        answers = [dict(self.runner(self.checked(turn))) for turn in turns]
        if len(answers) == 1:
            return answers[0]
        return {name: torch.cat([answer[name] for answer in answers]) for name in answers[0]}

    def checked(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """``given`` (tensors, arrays or numbers, by input name) as the engine takes them, on the CPU.

        Raises:
            UserError: a tensor is unknown, missing, of another shape, of a size outside the engine's
                ranges, or would lose its fraction.
        """
        names = [spec.name for spec in self.inputs]
        for name in given:
            if name not in names:
                raise UserError(f"the engine has no input {name!r}{nearest(name, names)}")
        tensors = {spec.name: _converted(spec, given.get(spec.name)) for spec in self.inputs}
        declared = [spec for spec in self.inputs if not _serves_all(spec, tensors[spec.name])]
        for spec in declared:
            _check_shape(spec, tensors[spec.name])
        shapes = [(spec.name, spec.shape, tuple(tensors[spec.name].shape)) for spec in declared]
        sizes = {**self.dimensions.examples, **self.dimensions.resolve(shapes)}
        for spec in self.inputs:
            if spec not in declared:
                tensors[spec.name] = tensors[spec.name].reshape(()).expand(spec.at(sizes).shape)
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    def inputs_at(self, sizes: Mapping[str, int] | None = None) -> tuple[FixedSpec, ...]:
        """The inputs with open dimensions at ``sizes``, or as they were captured."""
        chosen = {**self.dimensions.examples, **(sizes or {})}
        return tuple(spec.at(chosen) for spec in self.inputs)


class EngineMethods(EngineModule):
    """Engines behind several methods of one module (``decode``, ``encode`` …), each called as the captured one was.

    ``methods`` are engines by method name. The first one's signature, inputs, outputs and runner are this module's.
    """

    def __init__(self, methods: Mapping[str, EngineModule]) -> None:
        first = next(iter(methods.values()))
        super().__init__(
            first.signature,
            first.inputs,
            first.outputs,
            first.runner,
            config=first.config,
            dimensions=first.dimensions,
            library=first.library,
            class_name=first.class_name,
        )
        self.methods = dict(methods)
        for name, engine in methods.items():
            if name != FORWARD:
                setattr(self, name, engine.__call__)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """
        Raises:
            UserError: the module's own call was not captured, or as that of :class:`EngineModule`.
        """
        if FORWARD not in self.methods:
            raise UserError(f"this engine has {', '.join(self.methods)} of {self.class_name}, not its forward")
        return self.methods[FORWARD](*args, **kwargs)


def component_of(engines: Mapping[str, EngineModule]) -> EngineModule:
    """One module of a component's entries: the only one's engine, or an :class:`EngineMethods`."""
    methods: dict[str, EngineModule] = {}
    for engine in engines.values():
        methods.setdefault(engine.signature.method, engine)
    return methods[FORWARD] if set(methods) == {FORWARD} else EngineMethods(methods)


def in_turns(specs: Sequence[TensorSpec], given: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """``given`` in as many calls as it has the rows of, where every input with a batch has k times the engine's.

    An input that has the engine's own rows goes into each. Where rows do not fit, ``given`` as it is.
    """
    tall: dict[str, int] = {}
    for spec in specs:
        shape = tuple(getattr(given.get(spec.name), "shape", ()))
        if len(shape) == len(spec.shape) and shape and isinstance(spec.shape[0], int) and shape[0] != spec.shape[0]:
            tall[spec.name] = spec.shape[0]
    counts = {given[name].shape[0] / rows for name, rows in tall.items() if rows}
    if len(counts) != 1 or not (count := counts.pop()).is_integer() or count < 1:
        return [given]
    return [
        {name: value[k * tall[name] : (k + 1) * tall[name]] if name in tall else value for name, value in given.items()}
        for k in range(int(count))
    ]


def _with_signature(call: Any, original: Any) -> Any:
    """``call`` as it is, but ``inspect.signature`` sees the parameters of the unbound method ``original``."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    signature = inspect.signature(original)
    forward.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])  # type: ignore[attr-defined]
    return forward


def _converted(spec: TensorSpec, value: Any) -> Tensor:
    """``value`` on the CPU, in the engine's dtype."""
    if value is None:
        raise UserError(f"the engine needs the input {spec.name!r} ({spec})")
    tensor = torch.as_tensor(value).detach().cpu()
    if tensor.is_floating_point() and not spec.dtype.is_floating_point and not torch.equal(tensor, tensor.round()):
        raise UserError(f"input {spec.name!r} was captured as {spec}; fractions would be lost: capture it as a float")
    return tensor.to(spec.dtype)


def _serves_all(spec: TensorSpec, tensor: Tensor) -> bool:
    """Models take one timestep for a whole batch; an engine has one form of the two."""
    return tensor.numel() == 1 and len(spec.shape) <= 1 and tuple(tensor.shape) != spec.shape


def _check_shape(spec: TensorSpec, tensor: Tensor) -> None:
    fits = len(tensor.shape) == len(spec.shape) and all(
        isinstance(size, str) or size == given for size, given in zip(spec.shape, tensor.shape, strict=True)
    )
    if not fits:
        sizes = "x".join(map(str, tensor.shape)) or "(a scalar)"
        declared = ", ".join(map(str, spec.shape))
        raise UserError(
            f"input {spec.name!r} has the shape {list(tensor.shape)}, and the engine was built for [{declared}]; "
            f"rebuild it with --inputs {spec.name}={sizes}"
        )


def _as(value: Tensor, like: Tensor | None) -> Tensor:
    if like is None:
        return value
    return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
