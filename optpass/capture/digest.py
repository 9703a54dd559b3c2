"""The checkpoint's identity for lock files, taken while its weights are read for other reasons."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from optpass.ir.hashing import tensor_digest
from optpass.ir.program import Program
from optpass.ir.weights import Expression, Shape, WeightStore, with_operands


def identified(program: Program) -> Program:
    """``program``, as it was captured, with a digest in its origin that knows what it reads from here on.

    The digest is asked for at the end: every leaf that was read by then is hashed already, so that
    writing a bundle reads a checkpoint once.
    """
    identity = Identity(program)
    weights = WeightStore({name: identity.watched(expression) for name, expression in program.weights.items()})
    return replace(program, weights=weights, origin=replace(program.origin, digest=identity))


def checkpoint_digest(program: Program) -> str:
    """The digest of :class:`Identity` at once: reads every weight of ``program``, which is as it was captured."""
    return Identity(program)()


class Identity:
    """Hex SHA-256 of a checkpoint: its configuration, and name, dtype, shape and content of every weight in use.

    It follows what the captured Program is made of. How the weights lie in files does not count
    (shards, order, format, file names), nor what a file holds besides. Calling it reads the leaves that
    nobody has read yet, such as weights that a pass dropped.
    """

    def __init__(self, program: Program) -> None:
        self._config = json.dumps(dict(program.origin.config), sort_keys=True, default=str)
        expressions = program.used_weights().values()
        self._leaves = {_key(leaf): leaf for expression in expressions for leaf in _leaves(expression)}
        self._hashes: dict[tuple[str, str], str] = {}

    def watched(self, expression: Expression) -> Expression:
        """``expression`` over leaves that are hashed here when they are first read."""
        if _is_file_leaf(expression):
            return Watched(expression, self)
        return with_operands(expression, self.watched)

    def saw(self, leaf: Expression, value: Tensor) -> None:
        """``leaf`` has this value."""
        key = _key(leaf)
        if key in self._leaves and key not in self._hashes:
            self._hashes[key] = tensor_digest(value)

    def __call__(self) -> str:
        """
        Raises:
            WeightError: a weight that is read only now is damaged.
        """
        for key, leaf in self._leaves.items():
            if key not in self._hashes:
                self.saw(leaf, leaf.evaluate())
        digest = hashlib.sha256(self._config.encode())
        for name, content in sorted((key[1], content) for key, content in self._hashes.items()):
            digest.update(f"{name}\0{content}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Watched(Expression):
    """A leaf that tells the checkpoint's identity what it read."""

    leaf: Expression
    identity: Identity

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return self.leaf.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.leaf.dtype

    def evaluate(self) -> Tensor:
        value = self.leaf.evaluate()
        self.identity.saw(self.leaf, value)
        return value

    def operands(self) -> tuple[Expression, ...]:
        return (self.leaf,)

    def __str__(self) -> str:
        return str(self.leaf)


def weight_files(program: Program) -> list[Path]:
    """The files that the weights in use are read from, each once, in name order."""
    leaves = [leaf for expression in program.used_weights().values() for leaf in _leaves(expression)]
    return sorted({Path(_key(leaf)[0]) for leaf in leaves})


def _leaves(expression: Expression) -> Iterator[Expression]:
    if _is_file_leaf(expression):
        yield expression
    for operand in expression.operands():
        yield from _leaves(operand)


def _is_file_leaf(expression: Expression) -> bool:
    return isinstance(getattr(expression, "path", None), Path)


def _key(leaf: Expression) -> tuple[str, str]:
    """File and name in it, which every leaf over a file has."""
    return str(leaf.path), str(leaf.key)  # type: ignore[attr-defined]
