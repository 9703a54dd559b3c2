"""Adapter files and folders → :class:`Adapter`. Headers and the scalar ``alpha`` tensors are read, no factor is."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from optpass.adapters.adaptation import Adaptation, Kind
from optpass.adapters.keys import ModuleKey, TensorKey, parse
from optpass.adapters.settings import Settings, settings_of
from optpass.capture.checkpoint_weights import SAFE, read_weights
from optpass.errors import UserError, WeightError
from optpass.ir.weights import Cast, Expression, dtype_name
from optpass.untrusted import read_json

CONFIG = "adapter_config.json"
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
FILES = (*PEFT_FILES, "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
PEFT_PREFIX = "base_model.model."
METADATA = "lora_adapter_metadata"
"""Where diffusers keeps the adapter's configuration in a safetensors header."""

NEEDED: dict[Kind, tuple[tuple[str, ...], ...]] = {
    "lora": (("down",), ("up",)),
    "loha": (("w1_a",), ("w1_b",), ("w2_a",), ("w2_b",)),
    "lokr": (("w1", "w1_a"), ("w2", "w2_a")),
}
"""Factors without which a kind is nothing, each with what stands in its place."""
TOGETHER = (("w1_a", "w1_b"), ("w2_a", "w2_b"), ("t1", "t2"))
"""Factors that come in pairs (``t2`` of LoKr comes alone)."""


@dataclass(frozen=True)
class Adapter:
    """What is in an adapter file. ``unsupported`` are keys that are known or unknown and not merged, with the reason.

    ``notes`` are assumptions that a reader of the report should know.
    """

    path: Path
    modules: Mapping[ModuleKey, Adaptation]
    unsupported: Mapping[str, tuple[ModuleKey, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def check_finite(self) -> None:
        """Read every factor once; they are small.

        Raises:
            WeightError: one holds NaN or Inf, or cannot be read; names its key.
        """
        for adaptation in self.modules.values():
            for name, factor in _leaves(adaptation).items():
                # Not every dtype has the test: 8-bit floats lack it.
                if not bool(torch.isfinite(Cast(factor, torch.float64).evaluate()).all()):
                    raise WeightError(
                        f"{self.path}: {adaptation.keys[name]!r} holds NaN or Inf; the adapter is damaged"
                    )


def _is_scrambled(adaptation: Adaptation) -> bool:
    """Whether peft multiplies the kernel with the channels: its Kronecker product pads the smaller factor in front."""
    return adaptation.kind == "lokr" and "w2" in adaptation.factors and len(adaptation.factors["w2"].shape) == 3


def _leaves(adaptation: Adaptation) -> dict[str, Expression]:
    magnitude = {} if adaptation.magnitude is None else {"magnitude": adaptation.magnitude}
    return {**adaptation.factors, **magnitude}


def read_adapter(path: Path) -> Adapter:
    """An adapter from a file, or from a folder that peft or diffusers wrote.

    Raises:
        UserError: there is no adapter, it is of a kind that is not merged, half of a pair is missing, ranks
            disagree, or an ``alpha`` is missing; names the key.
        WeightError: a file is damaged.
    """
    file, *configs = adapter_files(path)
    config = read_json(configs[0]) if configs else None
    settings = settings_of(config, _metadata(file), file)
    tensors = read_weights(file)
    grouped: dict[ModuleKey, dict[str, str]] = defaultdict(dict)
    unsupported: dict[str, tuple[ModuleKey, str]] = {}
    for key in tensors:
        found = parse(key)
        if not found.factor:
            unsupported[key] = (found.module, found.unsupported)
            continue
        _claim(grouped[found.module], found, key, file)
    notes = _check_alphas(grouped, settings, file)
    modules = {module: _adaptation(module, keys, tensors, settings, file) for module, keys in grouped.items()}
    for module in [module for module, found in modules.items() if settings.covers(module) and _is_scrambled(found)]:
        unsupported[modules.pop(module).key] = (module, "a LoKr of a one-dimensional convolution as peft orders it")
    if not modules:
        kinds = ", ".join(sorted({reason for _, reason in unsupported.values()}))
        raise UserError(f"{file} holds no LoRA, LoHa or LoKr: {kinds or 'it is empty'}")
    return Adapter(file, modules, unsupported, notes)


def adapter_files(path: Path) -> tuple[Path, ...]:
    """The files of an adapter given as a file or as a folder: its weights, then peft's configuration if there is one.

    Raises:
        UserError: there are no weights.
    """
    file = path if path.is_file() else next((path / name for name in FILES if (path / name).is_file()), None)
    if file is None:
        what = f"none of {', '.join(FILES)} is in it" if path.is_dir() else "there is no such file or folder"
        raise UserError(f"no adapter at {path}: {what}")
    # A configuration is of the file that peft wrote beside it, not of others in the folder.
    config = file.parent / CONFIG
    return (file, config) if file.name in PEFT_FILES and config.is_file() else (file,)


def _metadata(file: Path) -> Mapping[str, Any] | None:
    """diffusers' configuration in the file's header.

    Raises:
        WeightError: the header is damaged.
    """
    if file.suffix != SAFE:
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get(METADATA)
        found = json.loads(text) if text else None
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise WeightError(f"{file}: damaged safetensors header: {error}") from error
    return found if isinstance(found, dict) else None


def _claim(keys: dict[str, str], found: TensorKey, key: str, file: Path) -> None:
    if found.factor in keys:
        raise UserError(f"{file}: {keys[found.factor]!r} and {key!r} both are the {found.factor} of {found.module}")
    keys[found.factor] = key


def _check_alphas(grouped: Mapping[ModuleKey, Mapping[str, str]], settings: Settings, file: Path) -> tuple[str, ...]:
    """What is assumed where a file says no ``alpha``.

    Raises:
        UserError: some modules have one and others not, or peft's configuration is missing.
    """
    bare = {module: keys for module, keys in grouped.items() if not settings.covers(module)}
    without = [keys for keys in bare.values() if "alpha" not in keys]
    if key := next((key for keys in without for key in keys.values() if key.startswith(PEFT_PREFIX)), ""):
        raise UserError(f"{file}: {key!r} is of peft, whose alpha stands in {CONFIG}; it is not beside the file")
    if without and len(without) < len(bare):
        key = next(iter(without[0].values()))
        raise UserError(
            f"{file}: {key!r} has no 'alpha' beside it, and {len(bare) - len(without)} other modules have one; "
            "a scale cannot be told from the rank alone"
        )
    return ("no alpha in the file: taken as the rank, so that the scale is 1",) if without else ()


def _adaptation(
    module: ModuleKey, keys: Mapping[str, str], tensors: Mapping[str, Expression], settings: Settings, file: Path
) -> Adaptation:
    kind = _kind(keys, file)
    # Factors first: the first key is what messages call the module by.
    ordered = sorted(keys.items(), key=lambda item: item[0] in ("alpha", "magnitude"))
    names = {name.rpartition(".")[2]: key for name, key in ordered}
    factors = {name: tensors[key] for name, key in names.items() if name not in ("alpha", "magnitude")}
    _check_complete(kind, names, file)
    _check_factors(factors, names, file)
    _check_ranks(kind, factors, names, file)
    rank = settings.checked_rank(module, _rank(kind, factors), next(iter(names.values())))
    alpha = settings.alpha(module, rank)
    if "alpha" in names:
        # A product of two full matrices has no rank, and LyCORIS gives it no scale.
        alpha = rank if _is_full(kind, factors) else _scalar(names["alpha"], tensors, file)
    magnitude = tensors[names["magnitude"]] if "magnitude" in names else None
    settings.check_magnitude(module, magnitude, next(iter(names.values())))
    return Adaptation(
        kind,
        factors,
        float(alpha),
        rank,
        settings.rank_stabilised(module),
        magnitude,
        "in" if _is_of_inputs(magnitude, names.get("magnitude", "")) else "out",
        names,
    )


def _kind(keys: Mapping[str, str], file: Path) -> Kind:
    kinds = {name.partition(".")[0] if "." in name else "lora" for name in keys if name not in ("alpha", "magnitude")}
    if len(kinds) != 1:
        listed = ", ".join(map(repr, keys.values()))
        raise UserError(f"{file}: {listed} are {'of several kinds' if kinds else 'without factors'}")
    return {"lora": "lora", "hada": "loha", "lokr": "lokr"}[kinds.pop()]  # type: ignore[return-value]


def _check_complete(kind: Kind, names: Mapping[str, str], file: Path) -> None:
    """
    Raises:
        UserError: half of a pair, or another factor, is missing.
    """
    missing = [" or ".join(choice) for choice in NEEDED[kind] if not any(name in names for name in choice)]
    for pair in TOGETHER:
        present = [name for name in pair if name in names]
        if len(present) == 1 and not (kind == "lokr" and "t2" in present):
            missing += [name for name in pair if name not in names]
    if kind == "lokr" and "t2" in names and "w2_a" not in names:
        missing.append("w2_a")
    if missing:
        raise UserError(f"{file}: {next(iter(names.values()))!r} is half of a pair: its module has no {missing[0]}")


def _check_factors(factors: Mapping[str, Expression], names: Mapping[str, str], file: Path) -> None:
    """
    Raises:
        UserError: a factor is no matrix of numbers: it has fewer than two dimensions, no values, or whole numbers.
    """
    for name, factor in factors.items():
        if len(factor.shape) < 2 or not factor.numel:
            raise UserError(f"{file}: {names[name]!r} is {list(factor.shape)} where a matrix belongs")
        if not factor.dtype.is_floating_point:
            raise UserError(
                f"{file}: {names[name]!r} is {dtype_name(factor.dtype)}; factors are floating-point numbers"
            )


def _check_ranks(kind: Kind, factors: Mapping[str, Expression], names: Mapping[str, str], file: Path) -> None:
    """
    Raises:
        UserError: factors that are multiplied disagree about the rank.
    """
    for (left, left_axis), (right, right_axis) in _contractions(kind, factors):
        a, b = factors[left].shape, factors[right].shape
        if left_axis >= len(a) or right_axis >= len(b) or a[left_axis] != b[right_axis]:
            raise UserError(
                f"{file}: {names[left]!r} is {list(a)} and {names[right]!r} {list(b)}: they disagree about the rank"
                + (
                    "; a branch around a grouped convolution, which no merged weight can be?"
                    if kind == "lora" and len(b) > 2
                    else ""
                )
            )


Axis = tuple[str, int]


def _contractions(kind: Kind, factors: Mapping[str, Expression]) -> list[tuple[Axis, Axis]]:
    """Pairs of axes that have the rank in common."""
    if kind == "lora":
        if "mid" in factors:
            return [(("up", 1), ("mid", 0)), (("down", 0), ("mid", 1))]
        return [(("up", 1), ("down", 0))]
    pairs: list[tuple[Axis, Axis]] = []
    for number in (1, 2):
        left, right, core = f"w{number}_a", f"w{number}_b", f"t{number}"
        if core in factors:
            pairs += [((left, 0), (core, 0)), ((right, 0), (core, 1))]
        elif left in factors:
            pairs.append(((left, 1), (right, 0)))
    return pairs


def _rank(kind: Kind, factors: Mapping[str, Expression]) -> int | None:
    """The rank that the factors have; ``None`` for a product of full matrices."""
    if kind == "lora":
        return factors["down"].shape[0]
    found = next((factors[name] for name in ("w2_b", "w1_b") if name in factors), None)
    return None if found is None else found.shape[0]


def _is_full(kind: Kind, factors: Mapping[str, Expression]) -> bool:
    return _rank(kind, factors) is None


def _scalar(key: str, tensors: Mapping[str, Expression], file: Path) -> float:
    expression = tensors[key]
    if expression.numel != 1:
        raise UserError(f"{file}: {key!r} is {list(expression.shape)} where a single number belongs")
    value = float(expression.evaluate().item())
    if not isfinite(value):
        raise WeightError(f"{file}: {key!r} is {value}; the adapter is damaged")
    return value


def _is_of_inputs(magnitude: Expression | None, key: str) -> bool:
    """Whether LyCORIS took the norm of each input: [1, in, 1…], where peft's [1, out, 1…] is of the outputs."""
    shape = magnitude.shape if magnitude is not None else ()
    return key.endswith("dora_scale") and len(shape) > 1 and shape[0] == 1 and shape[1] > 1
