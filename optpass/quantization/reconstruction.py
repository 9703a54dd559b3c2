"""One operator's integers, chosen by what they add to its output: steps of its weight and of its input, in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from optpass.analysis.operators import argument
from optpass.ir.quantized import Quantizer, Steps
from optpass.ir.weights import Constant
from optpass.quantization.form import CHANNELS, QuantizationForm
from optpass.quantization.placement import CONVOLUTIONS, LINEARS

MULTIPLES = tuple(0.01 + index * (1.2 - 0.01) / 100 for index in range(101))
"""Of the step that extremes alone would give."""
ROUNDS = 3
JOINED = 1 << 16
"""Elements of what calls' inputs are joined to: fewer executions, and still many places to give a candidate up at."""


@dataclass(frozen=True, eq=False)
class Setting:
    """How an operator reads integers.

    ``multiples`` [out]: of the steps of its weight's channels, 1 where there are none. ``factor``: what its input is
    multiplied by before, [in, 1…], and its weight's columns divided by.
    """

    quantizer: Quantizer
    multiples: Tensor | None = None
    factor: Tensor | None = None


@dataclass(frozen=True)
class Sample:
    """The operator's input, quantised before it as it will be; its real output, and what an error there weighs."""

    value: Tensor
    target: Tensor
    importance: Tensor | None = None


Candidates = tuple[Tensor | None, Sequence[Quantizer]]
"""Quantisers of an input that is multiplied by a factor, or is not."""


@dataclass(frozen=True)
class Reconstruction:
    """What was chosen, and the error ``before`` and ``after``; the unit is the objective's."""

    setting: Setting
    before: float
    after: float


class QuantizedOperator:
    """``node`` executed in integers. ``weight`` are its values, ``others`` its arguments behind input and weight."""

    def __init__(self, node: Node, weight: Tensor, axis: int, others: Sequence[Any]) -> None:
        self.node = node
        self._weight, self._axis, self._others = weight.float(), axis, tuple(others)
        self.output_axis = -1 if node.target in LINEARS else 1 - weight.ndim

    @property
    def source(self) -> Node:
        """The node of the operator's input."""
        value = self.node.args[0]
        assert isinstance(value, Node)
        return value

    @property
    def weight_name(self) -> str:
        """The name of the weight in the store."""
        weight = self.node.args[1]
        assert isinstance(weight, Node)
        return str(weight.target)

    @property
    def channels(self) -> int:
        return self._weight.shape[self._axis]

    @property
    def is_depthwise(self) -> bool:
        """Whether each output channel reads one input channel, so that a factor of that is one of its weight's step."""
        convolves = self.node.target in CONVOLUTIONS and self._weight.shape[1] == 1
        return convolves and int(argument(self.node, "groups") or 1) > 1

    def __call__(self, value: Tensor, setting: Setting) -> Tensor:
        """The output for a real ``value``; gradients pass rounding as they are."""
        return self.apply(quantized(value, setting), self.weight(setting))

    def apply(self, value: Tensor, weight: Tensor) -> Tensor:
        return self.node.target(value, weight, *self._others, **self.node.kwargs)  # type: ignore[operator, no-any-return]

    def weight(self, setting: Setting) -> Tensor:
        """The weight as its integers say."""
        weight, (low, high) = self._weight, CHANNELS.bounds
        if setting.factor is not None:
            weight = weight / along_weight(setting.factor, weight)
        steps = Steps(Constant(weight), self._axis, low, high).evaluate()
        if setting.multiples is not None:
            steps = steps * setting.multiples
        zeros = torch.zeros_like(steps, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, steps, zeros, self._axis, low, high)

    def errors(
        self,
        values: Iterable[Tensor],
        weight: Tensor,
        samples: Sequence[Sample],
        given_up: Callable[[Tensor], bool] = lambda errors: False,
    ) -> Tensor:
        """[out], float64: of each output channel the sum of (importance · difference)², with quantised ``values``.

        Of the first samples alone, once ``given_up`` holds for their sum.
        """
        total = torch.zeros(self.channels, dtype=torch.float64)
        for value, sample in zip(values, samples, strict=False):
            difference = self.apply(value, weight) - sample.target
            if sample.importance is not None:
                difference *= sample.importance
            channels = difference.movedim(self.output_axis, 0).flatten(1)
            total += channels.square().sum(1).double()
            if given_up(total):
                break
        return total

    def corrected_bias(self, samples: Sequence[Sample], setting: Setting) -> Tensor:
        """[out]: the bias with the mean of what is missing in each output channel."""
        weight, missing, count = self.weight(setting), torch.zeros(self.channels, dtype=torch.float64), 0
        for sample in samples:
            difference = sample.target - self.apply(quantized(sample.value, setting), weight)
            channels = difference.movedim(self.output_axis, 0).flatten(1)
            missing += channels.sum(1).double()
            count += channels.shape[1]
        bias: Tensor = self._others[0]
        return bias + (missing / count).to(bias.dtype)


def along_weight(factor: Tensor, weight: Tensor) -> Tensor:
    """The ``factor`` of an input so that it broadcasts against the ``weight`` of a linear or depthwise convolution."""
    if weight.ndim == 2:
        return factor.flatten()
    repeats = weight.shape[0] // factor.numel()
    return factor.flatten().repeat_interleave(repeats).reshape(-1, *[1] * (weight.ndim - 1))


def quantized(value: Tensor, setting: Setting) -> Tensor:
    """``value`` as its integers say."""
    found = setting.quantizer
    if setting.factor is not None:
        value = value * setting.factor
    return torch.fake_quantize_per_tensor_affine(value, found.scale, found.zero_point, found.low, found.high)


def reconstruct(
    operator: QuantizedOperator,
    samples: Sequence[Sample],
    start: Setting,
    form: QuantizationForm,
    *,
    of_weight: bool = True,
) -> Reconstruction:
    """The setting that adds least to the operator's output: the weight's steps, then the input's, in rounds.

    The weight has a step for each output channel, each chosen by its own error. The input has a step, and a zero point
    where ``form`` knows one, symmetric or not; of a depthwise convolution a step for each channel, or one for all. What
    it starts from is among the candidates, so the error never grows. Without ``of_weight`` its weight, and a factor
    of it, are left as they are.
    """
    samples = list(_joined(samples))
    setting, before = start, _total(operator, start, samples, operator.weight(start))
    channels = of_weight and operator.is_depthwise and start.factor is None and not form.everything
    candidates = list(_candidates(samples, start, form, channels))
    for _ in range(ROUNDS):
        last = setting
        if of_weight:
            setting = _weight_chosen(operator, setting, samples)
        setting = _input_chosen(operator, setting, samples, candidates)
        if setting is last:
            break
    return Reconstruction(setting, before, _total(operator, setting, samples, operator.weight(setting)))


def _total(
    operator: QuantizedOperator, setting: Setting, samples: Sequence[Sample], weight: Tensor, bound: float = math.inf
) -> float:
    """The error of all output channels, exact where it is less than ``bound``."""
    values = (quantized(sample.value, setting) for sample in samples)
    return float(operator.errors(values, weight, samples, lambda errors: float(errors.sum()) >= bound).sum())


def _weight_chosen(operator: QuantizedOperator, setting: Setting, samples: Sequence[Sample]) -> Setting:
    values = [quantized(sample.value, setting) for sample in samples]
    multiples = torch.ones(operator.channels) if setting.multiples is None else setting.multiples.clone()
    least = operator.errors(values, operator.weight(setting), samples)
    improved = False
    for multiple in MULTIPLES:
        tried = replace(setting, multiples=torch.full((operator.channels,), multiple))
        worse = partial(_nowhere_less, least)
        found = operator.errors(values, operator.weight(tried), samples, worse)
        better = found < least
        multiples[better] = multiple
        least = torch.minimum(least, found)
        improved |= bool(better.any())
    return replace(setting, multiples=multiples) if improved else setting


def _nowhere_less(least: Tensor, errors: Tensor) -> bool:
    return bool((errors >= least).all())


def _input_chosen(
    operator: QuantizedOperator, setting: Setting, samples: Sequence[Sample], candidates: Sequence[Candidates]
) -> Setting:
    best, least = setting, _total(operator, setting, samples, operator.weight(setting))
    for factor, quantizers in candidates:
        weight = operator.weight(replace(setting, factor=factor))
        for quantizer in quantizers:
            tried = Setting(quantizer, setting.multiples, factor)
            if (found := _total(operator, tried, samples, weight, least)) < least:
                best, least = tried, found
    return best


def _candidates(
    samples: Sequence[Sample], start: Setting, form: QuantizationForm, channels: bool
) -> Iterator[Candidates]:
    """What is open for the input: factors, and for each the quantisers of every scheme at every multiple."""
    factors = [start.factor]
    if channels and (factor := _equalising(samples)) is not None:
        factors.append(factor)
    for factor in factors:
        values = [sample.value if factor is None else sample.value * factor for sample in samples]
        least, greatest = (min(float(value.min()) for value in values), max(float(value.max()) for value in values))
        yield factor, list(_quantizers(min(least, 0.0), max(greatest, 0.0), form))


def _quantizers(least: float, greatest: float, form: QuantizationForm) -> Iterator[Quantizer]:
    """Symmetric ones around 0 and, where ``form`` knows zero points, those from ``least`` to ``greatest``."""
    low, high = form.bounds
    most = max(-least, greatest)
    if most == 0:
        return
    steps = {0 if form.signed else (high + 1) // 2: 2 * most / (high - low)}
    if not form.symmetric:
        step = (greatest - least) / (high - low)
        steps = {round(low - least / step): step} | steps
    for zero, step in steps.items():
        for multiple in MULTIPLES:
            yield Quantizer(step * multiple, zero, low, high, form.dtype)


def _equalising(samples: Sequence[Sample]) -> Tensor | None:
    """What makes the extremes of all input channels one, [in, 1…]; ``None`` where they are."""
    found = [sample.value.movedim(1, 0).flatten(1).abs().amax(1) for sample in samples]
    most = torch.stack(found).amax(0)
    factor = torch.where(most > 0, most.max() / most, torch.ones_like(most))
    return None if bool((factor == 1).all()) else factor.reshape(-1, *[1] * (samples[0].value.ndim - 2))


def _joined(samples: Sequence[Sample]) -> Iterator[Sample]:
    """Samples of one shape, along their first dimension, as far as that is no larger than :data:`JOINED`."""
    group: list[Sample] = []
    for sample in samples:
        elements = sum(other.value.numel() for other in (*group, sample))
        if group and (elements > JOINED or sample.value.shape[1:] != group[0].value.shape[1:]):
            yield _one(group)
            group = []
        group.append(sample)
    yield _one(group)


def _one(group: Sequence[Sample]) -> Sample:
    importance = [sample.importance for sample in group if sample.importance is not None]
    return Sample(
        torch.cat([sample.value for sample in group]),
        torch.cat([sample.target for sample in group]),
        torch.cat(importance) if importance else None,
    )
