"""The numbers of a quantisation, found by NNCF: ranges of activations, smoothing factors, corrected biases.

NNCF runs the graph over the calibration calls with quantisers where the placement has them, through its interface for
quantisers of torchao's kind. What it finds is read off the graph that it gives back, and goes into ours; the weights
themselves stay as lazy as they were.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from optpass.errors import OptpassError, UserError
from optpass.ir.graph import Graph, path_of
from optpass.ir.quantized import DEQUANTIZE, DEQUANTIZE_CHANNELS, Quantizer
from optpass.ir.weights import WeightStore
from optpass.quantization.form import QuantizationForm
from optpass.quantization.placement import Placement
from optpass.quiet import first_lines, quiet

Estimator = Literal["minmax", "mean-minmax", "percentile", "mean-percentile", "histogram"]
Correction = Literal["none", "fast", "full"]


@dataclass(frozen=True)
class Method:
    """How ranges are found: NNCF's options by the field's names.

    ``estimator``: extremes over all calls, or their mean over calls, or percentiles, or the histogram that loses least.
    ``bias_correction`` shifts biases by what quantisation adds to the mean of an operator's output: ``fast`` one
    operator at a time, ``full`` after what comes before. ``smooth`` moves outliers of activations into weights.
    """

    estimator: Estimator = "histogram"
    bias_correction: Correction = "none"
    smooth: bool = False


@dataclass
class Ranges:
    """What was found, by names of nodes of the graph that was asked about.

    ``activations``: the quantiser of each edge, by value and reader. ``factors``: what a linear's input is multiplied
    by, [in], and its weight's columns divided by; a depthwise convolution's is [in, 1…]. ``multiples``: of the steps of
    an operator's weight, [out]. ``biases``: corrected biases.
    """

    activations: dict[tuple[str, str], Quantizer] = field(default_factory=dict)
    factors: dict[str, Tensor] = field(default_factory=dict)
    multiples: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)

    def symmetric(self) -> Ranges:
        """With zero points of 0. NNCF gives what is never negative, as after a ReLU, all integers; kernels that want
        symmetric ones take half of them then."""
        return replace(self, activations={edge: _symmetric(found) for edge, found in self.activations.items()})

    def widened(self, form: QuantizationForm) -> Ranges:
        """Of unsigned integers of 8 bits, in the 16 of ``form``: the same ranges in 257 times as many steps."""
        return replace(self, activations={edge: _widened(found, form) for edge, found in self.activations.items()})


def _symmetric(quantizer: Quantizer) -> Quantizer:
    low, high, zero = quantizer.low, quantizer.high, quantizer.zero_point
    if zero == 0:
        return quantizer
    return replace(quantizer, scale=max(zero - low, high - zero) * quantizer.scale / high, zero_point=0)


def _widened(quantizer: Quantizer, form: QuantizationForm) -> Quantizer:
    low, high = form.bounds
    finer = (high - low) // (quantizer.high - quantizer.low)
    return Quantizer(quantizer.scale / finer, quantizer.zero_point * finer, low, high, form.dtype)


def find_ranges(
    graph: Graph,
    weights: WeightStore,
    placement: Placement,
    form: QuantizationForm,
    calls: Sequence[Mapping[str, Tensor]],
    method: Method,
) -> Ranges:
    """Run ``graph`` over ``calls`` (inputs by name) and see what the quantisers of ``placement`` must hold.

    Executes the model: every weight is in memory.

    Raises:
        MissingValuesError: the Program was captured structure-only.
        OptpassError: NNCF cannot take the graph; the message is its own.
        UserError: a value held NaN or Inf in a call.
    """
    if not placement.edges:
        return Ranges()
    # NNCF edits what it is given.
    module = graph.copy().module(weights)
    module.eval()
    names = graph.signature.inputs
    data = [tuple(call[name] for name in names) for call in calls]
    try:
        with _quietly():
            # NNCF has 8 bits.
            found = _quantised(module, placement, form.narrowed, data, method)
    except OptpassError:
        raise
    except Exception as error:
        _refuse_nonfinite(graph.copy().module(weights), placement, data)
        raise OptpassError(
            f"NNCF cannot calibrate this graph: {type(error).__name__}: {first_lines(error, 3)}"
        ) from error
    ranges = _read(placement, module, found)
    _check(placement, ranges)
    if form.wide:
        return ranges.widened(form)
    return ranges.symmetric() if form.symmetric else ranges


def _quantised(
    module: GraphModule, placement: Placement, form: QuantizationForm, data: Sequence[Any], method: Method
) -> GraphModule:
    import nncf
    from nncf.experimental.torch.fx import quantize_pt2e
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    estimator = {
        "minmax": RangeEstimatorParametersSet.MINMAX,
        "mean-minmax": RangeEstimatorParametersSet.MEAN_MINMAX,
        "percentile": RangeEstimatorParametersSet.MEDIAN_MINMAX,
        "mean-percentile": RangeEstimatorParametersSet.MEAN_NO_OUTLIERS_MINMAX,
        "histogram": RangeEstimatorParametersSet.HISTOGRAM,
    }[method.estimator]
    result: GraphModule = quantize_pt2e(
        module,
        _annotator(placement, form),
        nncf.Dataset(data, lambda call: call),
        subset_size=len(data),
        fast_bias_correction={"none": None, "fast": True, "full": False}[method.bias_correction],
        smooth_quant=method.smooth,
        activations_range_estimator_params=estimator,
        batchwise_statistics=False,
        fold_quantize=False,
    )
    return result


def _annotator(placement: Placement, form: QuantizationForm) -> Any:
    """A quantiser of torchao's interface that asks for what ``placement`` has and no more."""
    from torchao.quantization.pt2e import HistogramObserver
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec
    from torchao.quantization.pt2e.quantizer import Quantizer as Base

    low, high = form.bounds
    scheme = torch.per_tensor_symmetric if form.symmetric else torch.per_tensor_affine
    activation = QuantizationSpec(form.dtype, HistogramObserver, quant_min=low, quant_max=high, qscheme=scheme)
    # By place among the operands: smoothing has put others there by the time that this is asked.
    wanted: dict[str, dict[int, Any]] = defaultdict(dict)
    for value, reader in placement.edges:
        wanted[reader.name] |= {index: activation for index, operand in enumerate(reader.args) if operand is value}
    for weight in placement.weights:
        wanted[weight.operator.name][weight.operator.args.index(weight.read)] = QuantizationSpec(
            torch.int8,
            HistogramObserver,
            quant_min=-127,
            quant_max=127,
            qscheme=torch.per_channel_symmetric,
            ch_axis=weight.axis,
        )

    class Annotator(Base):  # type: ignore[misc]
        def annotate(self, model: GraphModule) -> GraphModule:
            nodes = {node.name: node for node in model.graph.nodes}
            for reader, places in wanted.items():
                inputs = {nodes[reader].args[place]: specification for place, specification in places.items()}
                nodes[reader].meta["quantization_annotation"] = QuantizationAnnotation(inputs, None, _annotated=True)
            return model

        def validate(self, model: GraphModule) -> None:
            pass

    return Annotator()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without NNCF's bars, its notes that the interface is young, and torchao's about libraries that it lacks."""
    with contextlib.ExitStack() as stack:
        for library in ("nncf", "torchao", "torch.utils._pytree"):
            stack.enter_context(quiet(library))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


def _read(placement: Placement, original: GraphModule, found: GraphModule) -> Ranges:
    ranges = Ranges()
    nodes: dict[str, Node] = {node.name: node for node in found.graph.nodes}
    for value, reader in placement.edges:
        for index, operand in enumerate(reader.args):
            if operand is value:
                _read_operand(ranges, found, value, reader, nodes[reader.name].args[index])
    for weight in placement.weights:
        name, changed = weight.operator.name, nodes[weight.operator.name]
        before, bias = (node.args[2] if len(node.args) > 2 else None for node in (weight.operator, changed))
        if isinstance(bias, Node) and isinstance(before, Node) and bias.target != before.target:
            ranges.biases[name] = _attribute(found, bias)
    return ranges


def _read_operand(ranges: Ranges, found: GraphModule, value: Node, reader: Node, operand: Any) -> None:
    """Follow ``operand`` of a reader back to ``value``, through what NNCF has put between."""
    while isinstance(operand, Node) and operand.name != value.name:
        if operand.target == DEQUANTIZE:
            quantize = operand.args[0]
            assert isinstance(quantize, Node)
            ranges.activations[value.name, reader.name] = Quantizer(*quantize.args[1:])  # type: ignore[arg-type]
            operand = quantize.args[0]
        elif operand.op == "call_module":
            (factor,) = found.get_submodule(str(operand.target)).buffers()
            ranges.factors[reader.name] = factor.detach().clone().flatten()
            operand = operand.args[0]
        elif operand.target == DEQUANTIZE_CHANNELS:
            return
        else:
            raise OptpassError(f"NNCF put {operand.format_node()} where a quantiser was asked for")


_UNSEEN = "{} reads NaN or Inf in calibration ({}): it has no range"


def _check(placement: Placement, ranges: Ranges) -> None:
    for value, reader in placement.edges:
        quantizer = ranges.activations.get((value.name, reader.name))
        if quantizer is not None and not (math.isfinite(quantizer.scale) and quantizer.scale > 0):
            raise UserError(_UNSEEN.format(path_of(reader), value.name))


def _refuse_nonfinite(module: GraphModule, placement: Placement, data: Sequence[Any]) -> None:
    """Histograms of what is no number fail, without telling where.

    Raises:
        UserError: an operator that is to read integers reads NaN or Inf.
    """
    readers = {value.name: reader for value, reader in reversed(placement.edges)}

    class Watch(Interpreter):
        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            if n.name in readers and not value.isfinite().all():
                raise UserError(_UNSEEN.format(path_of(readers[n.name]), n.name))
            return value

    with torch.no_grad():
        for call in data:
            Watch(module, garbage_collect_values=True).run(*call)


def _attribute(module: GraphModule, node: Node) -> Tensor:
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value.detach().clone()  # type: ignore[no-any-return]
