"""One quantiser for what is handed on: devices of integers alone move, compare and join integers as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from optpass.analysis.operators import aten
from optpass.ir.quantized import Quantizer
from optpass.quantization.placement import MONOTONE, Placement, is_real
from optpass.quantization.ranges import Ranges

HANDED_ON = MONOTONE | frozenset(
    {aten.hardtanh.default, aten.clamp.default, aten.cat.default, aten.view.default, aten.flatten.using_ints}
    | {aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default, aten.clone.default, aten.constant_pad_nd.default}
    | {aten.select.int, aten.index_select.default, aten.repeat.default, aten.roll.default, aten.flip.default}
    | {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int}
)
"""Operators of which such a device computes the integers alone: what they read and give has one scale."""


def shared(ranges: Ranges, placement: Placement) -> Ranges:
    """``ranges`` in which a value has one quantiser for all its readers, the same as what is handed on from it.

    That holds all of their ranges. Kernels of integers compare, move and join them without a scale: where operands of
    a concatenation, or what a ReLU reads and gives, had two, their result would be another.
    """
    groups: dict[str, str] = {}
    for value, reader in placement.edges:
        if reader.op == "call_function" and reader.target in HANDED_ON:
            # A split gives its parts through operators of their own.
            for given in (reader,) if is_real(reader) else reader.users:
                _join(groups, value.name, given.name)
    members: dict[str, list[Quantizer]] = {}
    for (value_name, reader_name), quantizer in ranges.activations.items():
        # What is smoothed is another value, of its reader alone.
        if reader_name not in ranges.factors:
            members.setdefault(_first(groups, value_name), []).append(quantizer)
    one = {group: _union(quantizers) for group, quantizers in members.items()}
    # Operands in a list, as a concatenation's, have no range of their own yet.
    edges = ((value.name, reader.name) for value, reader in placement.edges if reader.name not in ranges.factors)
    found = {edge: one[group] for edge in edges if (group := _first(groups, edge[0])) in one}
    return replace(ranges, activations={**ranges.activations, **found})


def _join(groups: dict[str, str], one: str, other: str) -> None:
    groups[_first(groups, other)] = _first(groups, one)


def _first(groups: Mapping[str, str], name: str) -> str:
    while groups.get(name, name) != name:
        name = groups[name]
    return name


def _union(quantizers: Iterable[Quantizer]) -> Quantizer:
    """The quantiser with the least range that holds those of all."""
    first, *others = dict.fromkeys(quantizers)
    if not others:
        return first
    lows = ((each.low - each.zero_point) * each.scale for each in (first, *others))
    highs = ((each.high - each.zero_point) * each.scale for each in (first, *others))
    low, high = min(0.0, *lows), max(0.0, *highs)
    if all(each.zero_point == 0 for each in (first, *others)):
        return replace(first, scale=max(each.scale for each in (first, *others)))
    scale = (high - low) / (first.high - first.low)
    return replace(first, scale=scale, zero_point=first.low - round(low / scale))
