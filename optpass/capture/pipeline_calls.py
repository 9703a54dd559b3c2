"""What a pipeline asks of its models: found out by running it once, with models that have shapes and no values.

Which methods a pipeline calls, with which arguments and of which sizes, is decided by its code, its
configs and its tokenizers. One call of two steps tells all of it, so that no list of pipelines is kept
and the sizes of all components fit together.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from optpass.capture.request import Opened
from optpass.errors import OptpassError, UserError
from optpass.ir.program import InputRange
from optpass.ir.signature import named_leaves
from optpass.quiet import first_lines

METHODS = ("forward", "encode", "decode", "get_image_features", "get_text_features")
"""Methods that pipelines call from outside of a model."""
STEPS = 2
PROMPT = "a photograph of a cat that sits in a garden"
LABEL = 3
IMAGE_SIZE = 512
Scalar = (bool, int, float, str)


@dataclass
class MethodCall:
    """The calls of one method: the first one's arguments, and what was seen of the tensors in all of them.

    ``arguments`` are by parameter name, tensors as such on ``meta``; ``spans`` the least and the greatest
    value of every tensor that held whole numbers only.
    """

    arguments: dict[str, Any]
    parameters: tuple[str, ...]
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)

    def ranges(self) -> dict[str, InputRange]:
        """Ranges for random values: whole numbers stay within those that were seen."""
        return {name: InputRange(low, high + 1, "uniform") for name, (low, high) in self.spans.items()}


Calls = dict[str, dict[str, MethodCall]]
"""Component name → method → its calls."""


def observe_calls(folder: Path, models: Mapping[str, Opened], call: Mapping[str, Any]) -> Calls:
    """Run the pipeline of ``folder`` once around ``models``, whose parameters are fake; ``call`` are extra arguments.

    Raises:
        UserError: the pipeline cannot be built or called, or calls a method in two ways that one graph cannot be.
    """
    from optpass.runtime.folder import build_pipeline, listed_components, quiet_libraries
    from optpass.runtime.library import library_class
    from optpass.runtime.sampling import Asked, call_arguments, call_parameters

    register_output_classes()
    replaced: dict[str, Any] = {name: opened.module for name, opened in models.items()}
    for name, (library, class_name) in listed_components(folder).items():
        found = library_class(library, class_name)
        if name not in models and found is not None and issubclass(found, nn.Module):
            replaced[name] = None
    pipeline = build_pipeline(folder, replaced)
    wanted = call_parameters(pipeline)
    asked = Asked(
        prompt=PROMPT if "prompt" in wanted else None,
        image=_blank_image(pipeline, wanted, call) if "image" in wanted else None,
        labels=(LABEL,),
        steps=STEPS,
        call=call,
    )
    arguments = call_arguments(pipeline, asked, seed=0)
    calls: Calls = {name: {} for name in models}
    with _watched(models, calls), quiet_libraries():
        try:
            with torch.no_grad():
                pipeline(**arguments)
        except OptpassError:
            raise
        except Exception as error:
            raise UserError(
                f"cannot find out what {type(pipeline).__name__} asks of its components; "
                f"a call with {', '.join(sorted(arguments))} fails: {first_lines(error)}"
            ) from error
    return calls


def _blank_image(pipeline: Any, parameters: Mapping[str, inspect.Parameter], call: Mapping[str, Any]) -> Any:
    """A grey image of the size that the call says, or else the pipeline's own."""
    from PIL import Image

    denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    sample = getattr(getattr(denoiser, "config", None), "sample_size", None)
    own = sample * getattr(pipeline, "vae_scale_factor", 8) if isinstance(sample, int) else IMAGE_SIZE
    sizes = {}
    for side in ("width", "height"):
        default = parameters[side].default if side in parameters else None
        sizes[side] = int(call.get(side) or (default if isinstance(default, int) else own))
    return Image.new("RGB", (sizes["width"], sizes["height"]), (128, 128, 128))


@contextmanager
def _watched(models: Mapping[str, Opened], calls: Calls) -> Iterator[None]:
    """Every method of :data:`METHODS` records its calls meanwhile and answers with zeros of the right shapes."""
    replaced: list[tuple[nn.Module, str]] = []
    try:
        for name, model in models.items():
            inside = _Inside()
            for method in METHODS:
                if callable(getattr(model.module, method, None)):
                    setattr(model.module, method, _watcher(name, model, method, calls[name], inside))
                    replaced.append((model.module, method))
        yield
    finally:
        for module, method in replaced:
            delattr(module, method)


@dataclass
class _Inside:
    """Whether a call of the model is on the way: what it calls of itself is not the pipeline's call."""

    now: bool = False


def _watcher(
    component: str, model: Opened, method: str, calls: dict[str, MethodCall], inside: _Inside
) -> Callable[..., Any]:
    original = getattr(model.module, method)

    @functools.wraps(original)
    def watch(*args: Any, **kwargs: Any) -> Any:
        if inside.now:
            return original(*args, **kwargs)
        _record(f"{component}.{method}", original, args, kwargs, calls, method)
        inside.now = True
        try:
            with model.mode, torch.no_grad():
                args, kwargs = pytree.tree_map_only(Tensor, _shape_alone, (args, kwargs))
                answer = original(*args, **kwargs)
        finally:
            inside.now = False
        return pytree.tree_map_only(Tensor, lambda value: torch.zeros(value.shape, dtype=value.dtype), answer)

    return watch


def _shape_alone(value: Tensor) -> Tensor:
    return value if isinstance(value, FakeTensor) else torch.empty(value.shape, dtype=value.dtype)


def _record(where: str, original: Any, args: Any, kwargs: Any, calls: dict[str, MethodCall], method: str) -> None:
    signature = inspect.signature(original)
    given: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            raise UserError(f"the pipeline calls {where} with arguments that have no names, which is not captured")
        given |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    kept = {}
    for name, value in given.items():
        parameter = signature.parameters.get(name)
        if name == "return_dict" or _says_nothing(value, None if parameter is None else parameter.default):
            continue
        kept[name] = _without_values(value, f"{where}({name})", name)
    tensors = _tensors(given)
    seen = MethodCall(kept, _parameters(signature, kept))
    first = calls.setdefault(method, seen)
    _check_alike(where, first, seen)
    for name, value in tensors.items():
        _widen(first.spans, name, value)


def _says_nothing(value: Any, default: Any) -> bool:
    """Whether the method would do the same without this argument."""
    if isinstance(value, torch.Generator) or value is None:
        return True
    if isinstance(value, (dict, list, tuple)):
        return not value
    if isinstance(value, Scalar):
        return value is default or value == default or (value is False and default in (None, inspect.Parameter.empty))
    return False


def _without_values(value: Any, where: str, name: str) -> Any:
    if isinstance(value, Tensor):
        # Schedulers differ in whether their timesteps are whole numbers; models turn them into floats.
        whole = name == "timestep" and not value.is_floating_point()
        return torch.empty(value.shape, dtype=torch.float32 if whole else value.dtype, device="meta")
    if isinstance(value, Mapping):
        return {key: _without_values(item, where, key) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return type(value)(_without_values(item, where, name) for item in value)
    if isinstance(value, Scalar):
        return value
    raise UserError(f"the pipeline gives a {type(value).__name__} to {where}, which an engine cannot take")


def _parameters(signature: inspect.Signature, kept: Mapping[str, Any]) -> tuple[str, ...]:
    from optpass.ir.signature import VARIADIC

    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [name for name, item in signature.parameters.items() if item.kind not in variadic]
    further = [name for name in kept if name not in named]
    takes_more = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in signature.parameters.values())
    return (*named, *further, *((VARIADIC,) if takes_more else ()))


def _tensors(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in named_leaves(arguments) if isinstance(value, Tensor)}


def _widen(spans: dict[str, tuple[float, float]], name: str, value: Tensor) -> None:
    if not value.numel() or isinstance(value, FakeTensor) or value.dtype == torch.bool:
        return
    whole = not value.is_floating_point() or bool((value == value.round()).all() and value.abs().max() > 1)
    if not whole:
        return
    low, high = float(value.min()), float(value.max())
    known = spans.get(name, (low, high))
    spans[name] = (min(low, known[0]), max(high, known[1]))


def _check_alike(where: str, first: MethodCall, other: MethodCall) -> None:
    """
    Raises:
        UserError: the two calls differ in more than values.
    """
    component = where.partition(".")[0]
    remedy = f"leave it as it is (components: {{{component}: keep}}), or choose a 'call' that does not"
    if pytree.tree_structure(first.arguments) != pytree.tree_structure(other.arguments):
        names = f"{', '.join(first.arguments)}) and ({', '.join(other.arguments)}"
        raise UserError(f"the pipeline calls {where} in two ways, with ({names}); {remedy}")
    before, after = _tensors(first.arguments), _tensors(other.arguments)
    for name, value in before.items():
        if value.shape != after[name].shape:
            sizes = f"{list(value.shape)} and of {list(after[name].shape)}"
            raise UserError(f"the pipeline calls {where} with {name} of {sizes} in one run; {remedy}")


def register_output_classes() -> None:
    """Let torch look into the autoencoders' posterior, which is no pytree: one tensor, from which all else follows."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    if DiagonalGaussianDistribution not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(
            DiagonalGaussianDistribution,
            lambda value: ([value.parameters], ["parameters"]),
            lambda children, _: DiagonalGaussianDistribution(*children),
            serialized_type_name="diffusers.DiagonalGaussianDistribution",
        )
