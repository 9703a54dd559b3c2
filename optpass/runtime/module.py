"""What replaces a model in a pipeline: an engine behind the captured module's own call."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor, nn

from optpass.errors import UserError, nearest
from optpass.ir.dimensions import FIXED, Dimensions
from optpass.ir.graph import FixedSpec, TensorSpec
from optpass.ir.program import Program
from optpass.ir.signature import Signature
from optpass.pipeline.target import Runner


class Config(dict[str, Any]):
    """A model's configuration, readable as attributes, as diffusers' own is.

    A key that the checkpoint leaves out has the default of its diffusers class.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            defaults = _class_defaults(str(self.get("_class_name", "")))
        if name not in defaults:
            raise AttributeError(f"the model's config has no {name!r}")
        return defaults[name]


@lru_cache(maxsize=8)
def _class_defaults(name: str) -> Mapping[str, Any]:
    """Defaults of the constructor of diffusers' model class ``name``; empty for any other name."""
    import inspect

    import diffusers

    if name not in diffusers._import_structure["models"]:
        return {}
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    return {key: item.default for key, item in parameters.items() if item.default is not item.empty}


class EngineModule(nn.Module):
    """An engine that is called as the captured module was, and returns what it returned.

    Inputs are converted to the engine's dtypes; Python numbers serve for scalar tensors. Floating
    outputs have the dtype of the first floating input that was given, and lie on its device, as they
    would with a model of that dtype.
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
    ) -> None:
        super().__init__()
        self.signature = signature
        self.inputs = inputs
        self.outputs = outputs
        self.dimensions = dimensions
        self.runner = runner
        self.config = Config(config or {})
        self._device = torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating input: what a pipeline should prepare its tensors in."""
        return next((spec.dtype for spec in self.inputs if spec.dtype.is_floating_point), torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the pipeline has put its tensors; the engine itself runs where its target runs it."""
        return self._device

    @property
    def add_embedding(self) -> Any:
        """SVD's and SDXL's pipelines read ``add_embedding.linear_1.in_features`` to check their conditioning."""
        size = self.config.get("projection_class_embeddings_input_dim")
        return SimpleNamespace(linear_1=SimpleNamespace(in_features=size))

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
        given = self.signature.bind(args, kwargs)
        tensors = self.checked(given)
        like = next((v for v in given.values() if isinstance(v, Tensor) and v.is_floating_point()), None)
        found = {name: _as(value, like) for name, value in self.runner(tensors).items()}
        return self.signature.result(found, return_dict=return_dict)

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


def program_module(program: Program, entry: str) -> EngineModule:
    """An entry of a Program in memory, executed by PyTorch, behind the captured module's call.

    Raises:
        MissingValuesError: the Program was captured structure-only.
    """
    from optpass.evaluate.difference import program_runner

    graph = program.entries[entry]
    return EngineModule(
        graph.signature,
        graph.inputs,
        graph.outputs,
        program_runner(program, entry),
        config=program.origin.config,
        dimensions=graph.dimensions,
    )


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
