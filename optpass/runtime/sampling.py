"""Generate samples with a pipeline folder, some of whose components are replaced by optimised ones."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optpass.errors import OptpassError, UserError, nearest
from optpass.ir.loop import Listed, Loop, usual_steps
from optpass.quiet import first_lines
from optpass.runtime.folder import OWN_CLASS, build_pipeline
from optpass.runtime.looped import LoopModule
from optpass.runtime.module import EngineModule

GUIDANCE, UNGUIDED = 3.0, 1.0
"""Scales of classifier-free guidance: of samples for reports, and the one that is none."""
LABELS = tuple(range(10))


@dataclass(frozen=True)
class Samples:
    """Generated clips [N, F, C, H, W] in [0, 1] and the class label of each [N]; an image is a clip of one frame.

    ``labels`` are the samples' numbers where the pipeline takes no class; ``moving`` tells clips from images.
    """

    frames: Tensor
    labels: Tensor
    moving: bool = True


@dataclass(frozen=True)
class Asked:
    """What a pipeline's call is given. What is ``None``, and what the call does not take, is left to the pipeline.

    ``labels`` are used in turn; ``image`` is a PIL image; ``call`` holds further arguments by name.
    """

    prompt: str | None = None
    labels: tuple[int, ...] = LABELS
    image: Any = None
    steps: int | None = 20
    guidance: float | None = None
    call: Mapping[str, Any] = field(default_factory=dict)


def usual_guidance(loop: Loop | None, otherwise: float | None) -> float | None:
    """The scale of guidance where nobody says: none for a model that is made to be asked once a step.

    ``None`` for a model that takes scales itself, whose own they are.
    """
    if loop and loop.signature.defaults:
        return None
    return UNGUIDED if loop and loop.sampling and loop.sampling.guidance == 1 else otherwise


def asked_beside(before: Loop | None, after: Loop | None, steps: int) -> tuple[Asked, Asked]:
    """How two models are sampled to be compared: each as it is made for, else in ``steps`` steps with guidance.

    Where the second one's schedule serves one number of steps, that is ``steps`` for both.
    """
    shared = after.schedule.of if after and isinstance(after.schedule, Listed) else steps
    first, second = (
        Asked(steps=usual_steps(loop, shared), guidance=usual_guidance(loop, GUIDANCE)) for loop in (before, after)
    )
    return first, second


def can_sample(folder: Path | None) -> bool:
    """Whether the pipeline in ``folder`` can be driven without being told anything but labels."""
    return folder is not None and pipeline_class_name(folder) == OWN_CLASS


def pipeline_class_name(folder: Path) -> str:
    """``_class_name`` of the folder's ``model_index.json``; empty when there is none."""
    try:
        index = json.loads((folder / "model_index.json").read_text("utf-8"))
    except (OSError, ValueError):
        return ""
    name = index.get("_class_name", "") if isinstance(index, dict) else ""
    return name if isinstance(name, str) else ""


def generate(
    folder: Path,
    replaced: Mapping[str, Any],
    *,
    samples: int,
    asked: Asked,
    seed: int = 0,
    progress: Callable[[float], None] = lambda _: None,
) -> Samples:
    """``samples`` clips or images, the i-th from seed ``seed + i`` and label ``asked.labels[i]``, in turn.

    Raises:
        UserError: the folder's pipeline cannot be built, or its call needs something that was not given.
    """
    return drive(build_pipeline(folder, replaced), samples=samples, asked=asked, seed=seed, progress=progress)


def drive(
    pipeline: Any,
    *,
    samples: int,
    asked: Asked,
    seed: int = 0,
    progress: Callable[[float], None] = lambda _: None,
) -> Samples:
    """As :func:`generate`, with a pipeline in memory."""
    made: list[Tensor] = []
    moving = False
    labelled = takes_labels(pipeline)
    _tell_steps(pipeline, asked)
    asked = _tell_scales(pipeline, asked)
    numbers = [asked.labels[i % len(asked.labels)] if labelled else i for i in range(samples)]
    for index, number in enumerate(numbers):
        # One sample a call: an engine has the batch that it was built for, two with guidance.
        clip, moving = _sample(pipeline, replace(asked, labels=(number,)), seed + index)
        made.append(clip)
        progress((index + 1) / samples)
    return Samples(torch.cat(made), torch.tensor(numbers), moving)


def _tell_steps(pipeline: Any, asked: Asked) -> None:
    """Tell schedules that count steps how many calls the sampler makes: with PNDM or Heun, others than steps.

    Raises:
        UserError: a schedule was made for another number.
    """
    looped = [module for module in pipeline.components.values() if isinstance(module, LoopModule)]
    if not looped or asked.steps is None:
        return
    calls = asked.steps
    try:
        pipeline.scheduler.set_timesteps(asked.steps)
        calls = len(pipeline.scheduler.timesteps)
    except (AttributeError, TypeError, ValueError):
        # Schedulers that want more than a number (a shift, sigmas) make one call a step.
        pass
    for module in looped:
        module.steps = calls


def _tell_scales(pipeline: Any, asked: Asked) -> Asked:
    """Tell modules that take scales of guidance those that are asked for; the pipeline is to ask once a step then."""
    taking = [each for each in pipeline.components.values() if isinstance(each, EngineModule) and each.scales]
    if not taking:
        return asked
    known = {**({"guidance_scale": asked.guidance} if asked.guidance is not None else {}), **asked.call}
    for module in taking:
        module.scales |= {name: float(known[name]) for name in module.scales if name in known}
    of_modules = {name for module in taking for name in module.scales}
    left = {name: value for name, value in asked.call.items() if name not in of_modules}
    return replace(asked, guidance=UNGUIDED, call=left)


def takes_labels(pipeline: Any) -> bool:
    """Whether the pipeline is told what to make by class."""
    return not {"labels", "class_labels"}.isdisjoint(call_parameters(pipeline))


def call_parameters(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of the pipeline's call, by name."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    return {name: item for name, item in parameters.items() if name != "self"}


def call_arguments(pipeline: Any, asked: Asked, seed: int) -> dict[str, Any]:
    """Keyword arguments of one call that makes one sample.

    Raises:
        UserError: the call requires something that is not given, or does not take something that is.
    """
    parameters, name = call_parameters(pipeline), type(pipeline).__name__
    known: dict[str, Any] = {
        "prompt": asked.prompt,
        "labels": list(asked.labels),
        "class_labels": list(asked.labels),
        "image": asked.image,
        "num_inference_steps": asked.steps,
        "guidance_scale": asked.guidance,
        "max_guidance_scale": asked.guidance,
        "seeds": [seed],
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "np",
    }
    if "seeds" in parameters:
        known |= {"generator": None, "output_type": "pt"}
    for flag, value in (("--prompt", asked.prompt), ("--image", asked.image)):
        if value is not None and flag[2:] not in parameters:
            raise UserError(f"{flag}: the call of a {name} takes no {flag[2:]}")
    for key in asked.call:
        if key not in parameters:
            raise UserError(f"call: a {name} takes no {key!r}{nearest(key, parameters)}")
    given = {key: value for key, value in known.items() if key in parameters and value is not None} | dict(asked.call)
    needed = [key for key, item in parameters.items() if item.default is item.empty or key == "prompt"]
    missing = [key for key in needed if key not in given and parameters[key].kind is not inspect.Parameter.VAR_KEYWORD]
    if missing:
        how = " and ".join(f"--{key}" if key in ("prompt", "image") else f"{key!r}" for key in missing)
        raise UserError(f"a {name} needs {how}{'' if set(missing) <= {'prompt', 'image'} else _BY_HAND}")
    return given


_BY_HAND = ", which this command cannot give: call the pipeline that optpass.load_pipeline(BUNDLE) returns"


def _sample(pipeline: Any, asked: Asked, seed: int) -> tuple[Tensor, bool]:
    """One clip [1, F, C, H, W] in [0, 1], and whether the pipeline makes clips."""
    arguments = call_arguments(pipeline, asked, seed)
    try:
        with torch.no_grad():
            result = pipeline(**arguments)
    except OptpassError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"the call of {type(pipeline).__name__}({', '.join(sorted(arguments))}) fails: {first_lines(error)}; "
            "for another call use the pipeline that optpass.load_pipeline(BUNDLE) returns"
        ) from error
    moving = getattr(result, "frames", None) is not None
    made = result.frames if moving else result.images
    # Arrays have their channels last.
    tensor = made if isinstance(made, Tensor) else torch.as_tensor(np.asarray(made)).movedim(-1, -3)
    return (tensor if moving else tensor[:, None]).float(), moving
