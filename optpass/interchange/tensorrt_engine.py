"""An ONNX file → a TensorRT engine: the editions of the library, its log turned into errors, profiles of open sizes.

TensorRT (of data centres) builds for the GPU of this machine, TensorRT for RTX ahead of time for any number of compute
capabilities. Both have one API.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from optpass.errors import UserError
from optpass.interchange.onnx_file import module_path
from optpass.ir.hashing import HashedFile

Edition = Literal["datacenter", "rtx"]
MODULES: dict[Edition, str] = {"datacenter": "tensorrt", "rtx": "tensorrt_rtx"}
Shape = tuple[int, ...]
QUOTED = re.compile(r"'([^'/]+/[^']+)'")
LAYER = re.compile(r"^Name: (.+?), LayerType: (\w+)", re.MULTILINE)
ATTENTION = "_mha"
"""Part of the names of kernels in which a whole attention is."""
ASYMMETRIC = "zero point"
SHOWN = 3


@dataclass(frozen=True)
class Profile:
    """The sizes of an input that calls may choose: smallest, those that are tuned for, largest."""

    smallest: Shape
    usual: Shape
    largest: Shape


@dataclass(frozen=True)
class Building:
    """What an engine is built for.

    ``capabilities`` (``SM86`` …) are asked of TensorRT for RTX alone. ``refit`` leaves the weights exchangeable.
    ``timing_cache`` is a file of kernel times, read and added to, which only a build on its GPU has.
    """

    edition: Edition
    capabilities: Sequence[str] = ()
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    refit: bool = False
    timing_cache: Path | None = None


@dataclass(frozen=True)
class Built:
    """A written engine. ``layers`` counts what runs by kind, where the builder tells; ``attentions`` run as one."""

    bytes: int
    digest: str
    layers: Mapping[str, int]
    attentions: int


def installed(edition: Edition) -> bool:
    """Whether the library of ``edition`` is there."""
    return importlib.util.find_spec(MODULES[edition]) is not None


def library(edition: Edition) -> Any:
    """
    Raises:
        UserError: it is not installed, or does not load here.
    """
    name = MODULES[edition]
    if not installed(edition):
        raise UserError(
            f"{name} is not installed; install it with: pip install 'optpass[tensorrt]'"
            if edition == "rtx"
            else f"{name} is not installed; NVIDIA's own packages have it, or set edition: rtx"
        )
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"{name} does not load here: {error}") from error


@cache
def messages(edition: Edition) -> Any:
    """The log of ``edition``: TensorRT keeps the first that a process gives it."""
    tensorrt = library(edition)

    class Log(tensorrt.ILogger):  # type: ignore[misc, name-defined]
        """Keeps errors, and counts the layers that the builder lists at the end."""

        def __init__(self) -> None:
            super().__init__()
            self.clear()

        def clear(self) -> None:
            self.errors: list[str] = []
            self.layers: Counter[str] = Counter()
            self.attentions = 0

        def log(self, severity: Any, message: str) -> None:
            if severity <= tensorrt.ILogger.Severity.ERROR:
                self.errors.append(message.strip())
            elif severity == tensorrt.ILogger.Severity.VERBOSE:
                for name, kind in LAYER.findall(message):
                    self.layers[kind] += 1
                    self.attentions += ATTENTION in name

    return Log()


def build_engine(path: Path, out: Path, building: Building) -> Built:
    """Parse ``path``, with the weights beside it, and write its engine to ``out``.

    Raises:
        UserError: TensorRT cannot parse or build it; the message names module paths, as far as TensorRT does.
            ``out`` is then not there.
    """
    tensorrt, log = library(building.edition), messages(building.edition)
    log.clear()
    builder = tensorrt.Builder(log)
    network = _parsed(tensorrt, builder, path)
    config = _config(tensorrt, builder, building)
    try:
        with HashedFile(out) as file:
            if not builder.build_serialized_network_to_stream(network, config, _writer(tensorrt, file)):
                raise UserError(f"TensorRT cannot build {path.stem}: {_said(log.errors)}")
            built = Built(file.size, file.digest, dict(log.layers.most_common()), log.attentions)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    if building.timing_cache is not None:
        _keep_timings(config, building.timing_cache)
    return built


def _parsed(tensorrt: Any, builder: Any, path: Path) -> Any:
    flags = getattr(tensorrt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flags is None else 1 << int(flags))
    parser = tensorrt.OnnxParser(network, builder.logger)
    if not parser.parse_from_file(str(path)):
        found = [_refusal(parser.get_error(index)) for index in range(parser.num_errors)]
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise UserError(f"TensorRT cannot take {path.stem}: {'; '.join(found[:SHOWN])}{more}")
    return network


def _refusal(error: Any) -> str:
    place = module_path(error.node_name()) if error.node_name() else "(interface)"
    reason = str(error.desc()).strip()
    if ASYMMETRIC in reason.lower():
        reason = "quantised about a zero point other than 0; quantise symmetrically"
    elif reason in ("", "false"):
        reason = "no such operator in TensorRT's ONNX parser"
    return f"{place}: {error.node_operator() or 'tensor'}: {reason}"


def _config(tensorrt: Any, builder: Any, building: Building) -> Any:
    config = builder.create_builder_config()
    # Without, the builder does not list the layers, and profiles of the engine do not name them.
    config.profiling_verbosity = tensorrt.ProfilingVerbosity.DETAILED
    if building.edition == "rtx":
        config.num_compute_capabilities = len(building.capabilities)
        for index, name in enumerate(building.capabilities):
            config.set_compute_capability(getattr(tensorrt.ComputeCapability, name), index)
    if building.refit:
        config.set_flag(tensorrt.BuilderFlag.REFIT)
    if building.profiles:
        profile = builder.create_optimization_profile()
        for name, sizes in building.profiles.items():
            profile.set_shape(name, sizes.smallest, sizes.usual, sizes.largest)
        config.add_optimization_profile(profile)
    if building.timing_cache is not None:
        known = building.timing_cache.read_bytes() if building.timing_cache.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    return config


def _writer(tensorrt: Any, file: HashedFile) -> Any:
    class Writer(tensorrt.IStreamWriter):  # type: ignore[misc]
        """Hands the engine on as it is serialised: it is never in memory whole."""

        def write(self, data: bytes) -> int:
            file.write(data)
            return len(data)

    return Writer()


def _keep_timings(config: Any, path: Path) -> None:
    """Written aside and renamed: builds may share the file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(config.get_timing_cache().serialize())
    aside.replace(path)


def _said(errors: Sequence[str]) -> str:
    """The builder's errors, with the modules that they name in front."""
    text = " ".join(dict.fromkeys(errors)) or "it gives no reason"
    places = dict.fromkeys(module_path(name) for name in QUOTED.findall(text))
    return f"{', '.join(list(places)[:SHOWN])}: {text}" if places else text
