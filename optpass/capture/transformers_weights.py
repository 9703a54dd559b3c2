"""Tensors of a transformers checkpoint → weights of the module, by transformers' own rules, and no value is read.

transformers says how an old checkpoint becomes a new module: names are rewritten, and converters cut, join
and transpose tensors. Those converters run here as they are, on :class:`Recorded` tensors, which keep what is
done to them as an expression.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import accumulate
from math import prod
from typing import Any

import torch

from optpass.errors import UserError
from optpass.ir.weights import Concat, Expression, Permute, Reshape, Select
from optpass.quiet import first_lines


def module_weights(module: Any, found: Mapping[str, Expression]) -> dict[str, Expression]:
    """The tensors of ``found``, under the names and in the layouts that the PreTrainedModel ``module`` has.

    What matches nothing in the module keeps the name that the rules give it.

    Raises:
        UserError: a converter computes on values, which is not lazy.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(module)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, wanted = module.base_model_prefix, module.state_dict()
    weights: dict[str, Expression] = {}
    pending: dict[str, Any] = {}
    # Converters stack what they collect in the order of the numbers in the names.
    for name in sorted(found, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = rename_source_key(name, [], [], prefix, wanted)
        if pattern is None or target not in wanted:
            weights[target] = found[name]
            continue
        converter = pending.setdefault(target, deepcopy(by_pattern[pattern]))
        converter.add_tensor(target, name, pattern, Recorded(found[name]))
    for target, converter in pending.items():
        weights |= _converted(target, converter, module)
    return weights


def _converted(target: str, converter: Any, module: Any) -> dict[str, Expression]:
    sources = sorted({name for names in converter.layer_targets.values() for name in names})
    try:
        results = converter.convert(target, model=module, config=module.config)
        items = {name: value[0] if isinstance(value, list) else value for name, value in results.items()}
        return {name: value.expression for name, value in items.items()}
    except Exception as error:
        raise UserError(
            f"transformers computes {target!r} from {', '.join(map(repr, sources))} when it loads this checkpoint, "
            f"in a way that lazy weights do not know ({first_lines(error)}); let transformers load the checkpoint "
            "and save it again with save_original_format=False"
        ) from error


class Recorded:
    """A tensor without values: torch functions that move values about give the expression of their result."""

    def __init__(self, expression: Expression) -> None:
        self.expression = expression

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.expression.shape)

    @property
    def ndim(self) -> int:
        return len(self.expression.shape)

    def numel(self) -> int:
        return self.expression.numel

    def contiguous(self) -> Recorded:
        return self

    def transpose(self, dim0: int, dim1: int) -> Recorded:
        order = list(range(self.ndim))
        order[dim0], order[dim1] = order[dim1], order[dim0]
        return Recorded(Permute(self.expression, tuple(order)))

    def reshape(self, *shape: Any) -> Recorded:
        sizes = list(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        if -1 in sizes:
            sizes[sizes.index(-1)] = self.numel() // prod(size for size in sizes if size != -1)
        return Recorded(Reshape(self.expression, tuple(sizes)))

    view = reshape

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function not in FUNCTIONS:
            raise UserError(f"{getattr(function, '__name__', function)} computes on values")
        return FUNCTIONS[function](*args, **kwargs or {})


def _cat(tensors: Sequence[Recorded], dim: int = 0) -> Recorded:
    return Recorded(Concat(tuple(tensor.expression for tensor in tensors), dim))


def _stack(tensors: Sequence[Recorded], dim: int = 0) -> Recorded:
    shape = tensors[0].shape
    return _cat([tensor.reshape(*shape[:dim], 1, *shape[dim:]) for tensor in tensors], dim)


def _split(tensor: Recorded, sizes: Sequence[int], dim: int = 0) -> tuple[Recorded, ...]:
    ends = list(accumulate(sizes))
    if ends[-1] != tensor.shape[dim]:
        raise ValueError(f"{list(sizes)} do not add up to {tensor.shape[dim]}")
    ranges = [tuple(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    return tuple(Recorded(Select(tensor.expression, dim, indices)) for indices in ranges)


def _chunk(tensor: Recorded, chunks: int, dim: int = 0) -> tuple[Recorded, ...]:
    size = tensor.shape[dim]
    step = -(-size // chunks)
    return _split(tensor, [min(step, size - start) for start in range(0, size, step)], dim)


FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.cat: _cat,
    torch.stack: _stack,
    torch.split: _split,
    torch.chunk: _chunk,
    torch.transpose: lambda tensor, dim0, dim1: tensor.transpose(dim0, dim1),
}
"""What transformers' converters call that moves values and computes none."""
