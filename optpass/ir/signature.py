"""How the captured module is called and what it returns: nested Python structures around flat tensors.

An engine takes and returns a flat list of tensors. A :class:`Tree` remembers the structure around
them (keyword arguments, dicts, tuples, diffusers' and transformers' output classes), so that what
:func:`optpass.load` returns has the module's own signature. Trees are plain JSON in the manifest.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Generator, Tensor
from torch.utils._pytree import TreeSpec

from optpass.errors import UserError, nearest

Kind = Literal["tensor", "constant", "dict", "list", "tuple", "object"]
# Output classes are imported by name when an engine is loaded; nothing else may be.
OUTPUT_LIBRARIES = ("diffusers.", "transformers.")
OUTPUT_CLASSES = frozenset({"BaseOutput", "ModelOutput", "DiagonalGaussianDistribution"})
"""What an output class is one of, or derived from: containers, and the autoencoders' posterior."""
FORWARD = "forward"
VARIADIC = "**"
"""Stands among the parameters of a method that takes further keyword arguments."""


@dataclass(frozen=True)
class Tree:
    """One node of a structure; ``name`` is a tensor's name, an output class, or empty.

    ``value`` is what a constant is, or what a tensor is where a call leaves it out (a number, of a scalar).
    """

    kind: Kind
    name: str = ""
    value: Any = None
    children: Mapping[str, Tree] = field(default_factory=dict)

    def leaves(self) -> Iterator[str]:
        """Names of the tensors, in flattening order."""
        if self.kind == "tensor":
            yield self.name
        for child in self.children.values():
            yield from child.leaves()

    def as_json(self) -> dict[str, Any]:
        json: dict[str, Any] = {"kind": self.kind}
        if self.name:
            json["name"] = self.name
        if self.kind == "constant" or self.value is not None:
            json["value"] = self.value
        if self.children:
            json["children"] = {key: child.as_json() for key, child in self.children.items()}
        return json

    @staticmethod
    def from_json(json: Mapping[str, Any]) -> Tree:
        children = {key: Tree.from_json(child) for key, child in json.get("children", {}).items()}
        return Tree(json["kind"], json.get("name", ""), json.get("value"), children)

    def flatten(self, value: Any, path: str = "") -> dict[str, Any]:
        """``value``'s tensors by name.

        Raises:
            UserError: ``value`` has another structure than the captured one.
        """
        if self.kind == "tensor":
            if value is None and self.value is None:
                raise UserError(f"argument {path or self.name!r} is required: the engine was captured with it")
            return {self.name: self.value if value is None else value}
        if self.kind == "constant":
            if value is not None and value != self.value:
                raise UserError(f"argument {path!r} was captured as {self.value!r}; the engine cannot take {value!r}")
            return {}
        found: dict[str, Any] = {}
        for key, child in self.children.items():
            found |= child.flatten(self._item(value, key, path), f"{path}.{key}" if path else key)
        return found

    def _item(self, value: Any, key: str, path: str) -> Any:
        try:
            if self.kind == "object":
                return getattr(value, key)
            return value[key] if self.kind == "dict" else value[int(key)]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(f"argument {path!r} lacks {key!r}, with which the engine was captured") from error

    def unflatten(self, tensors: Mapping[str, Any]) -> Any:
        """The structure around ``tensors``; an output class that cannot be imported becomes a dict."""
        if self.kind == "tensor":
            return tensors[self.name]
        if self.kind == "constant":
            return self.value
        children = {key: child.unflatten(tensors) for key, child in self.children.items()}
        if self.kind == "dict":
            return children
        if self.kind == "object":
            return output_class(self.name)(**children)
        items = list(children.values())
        return tuple(items) if self.kind == "tuple" else items


def output_class(name: str) -> Any:
    """The diffusers or transformers output class called ``name``; ``dict`` for any other name.

    A bundle is data: a name from its manifest never imports anything but an output class.
    """
    if not name.startswith(OUTPUT_LIBRARIES):
        return dict
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        return dict
    bases = {base.__name__ for base in getattr(found, "__mro__", ())}
    return found if bases & OUTPUT_CLASSES else dict


def tree_of_example(value: Any, path: str) -> Tree:
    """The tree of example arguments; tensors are named by their path (``added_cond_kwargs.time_ids``)."""
    if isinstance(value, Tensor):
        return Tree("tensor", path)
    if isinstance(value, dict):
        return Tree("dict", children={k: tree_of_example(v, f"{path}.{k}" if path else k) for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        kind: Kind = "tuple" if isinstance(value, tuple) else "list"
        return Tree(kind, children={str(i): tree_of_example(v, f"{path}.{i}") for i, v in enumerate(value)})
    return Tree("constant", value=value)


def named_leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """What stands in nested arguments, by the names that :func:`tree_of_example` gives, in flattening order."""
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        yield path, value
        return
    for key, item in items:
        yield from named_leaves(item, f"{path}.{key}" if path else str(key))


def tree_of_spec(spec: TreeSpec, path: str = "") -> Tree:
    """The tree of what the module returns; unnamed tensors are called ``output``, ``output.0`` …"""
    if spec.is_leaf():
        return Tree("tensor", path or "output")
    if spec.type is None:
        return Tree("constant")
    keys: Sequence[Any] = spec.context if isinstance(spec.context, list) else range(spec.num_children)
    if spec.type not in (tuple, list, dict):
        keys = list(_field_names(spec))
    children = {}
    for key, child in zip(keys, spec.children(), strict=True):
        named = isinstance(key, str)
        children[str(key)] = tree_of_spec(child, (f"{path}.{key}" if path else (key if named else f"output.{key}")))
    if spec.type in (tuple, list, dict):
        return Tree(spec.type.__name__, children=children)
    return Tree("object", f"{spec.type.__module__}.{spec.type.__qualname__}", children=children)


def _field_names(spec: TreeSpec) -> Sequence[Any]:
    context = spec.context
    if isinstance(context, (list, tuple)) and len(context) == spec.num_children:
        return context
    if isinstance(context, (list, tuple)) and context and isinstance(context[0], (list, tuple)):
        return context[0]
    return range(spec.num_children)


@dataclass(frozen=True)
class Signature:
    """The captured call: the module's parameter names in order, the arguments' tree, the output's tree.

    ``method`` is the method of the module that was captured.
    """

    parameters: tuple[str, ...]
    arguments: Tree
    output: Tree
    method: str = FORWARD

    @staticmethod
    def flat(inputs: Iterable[str], outputs: Iterable[str]) -> Signature:
        """The call of something that is no module's: named tensors → a dict of named tensors."""
        arguments = Tree("dict", children={name: Tree("tensor", name) for name in inputs})
        output = Tree("dict", children={name: Tree("tensor", name) for name in outputs})
        return Signature(tuple(arguments.children), arguments, output)

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(self.arguments.leaves())

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(self.output.leaves())

    @property
    def defaults(self) -> dict[str, float]:
        """What arguments are that a call may leave out: those that passes added to the captured module's own."""
        children = self.arguments.children.values()
        return {tree.name: float(tree.value) for tree in children if tree.kind == "tensor" and tree.value is not None}

    def with_scalar(self, name: str, default: float) -> Signature:
        """This call with one more argument, a scalar, which is ``default`` where it is left out.

        Raises:
            ValueError: there is an argument of that name.
        """
        if name in self.parameters or name in self.inputs:
            raise ValueError(f"there is an argument {name!r} already")
        arguments = replace(self.arguments, children={**self.arguments.children, name: Tree("tensor", name, default)})
        return replace(self, parameters=(*self.parameters, name), arguments=arguments)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors of a call, by input name.

        Raises:
            UserError: an argument is unknown, missing, or was not part of the capture.
        """
        if len(args) > len(self.parameters):
            raise UserError(f"{len(args)} positional arguments; the module takes {len(self.parameters)}")
        given = dict(zip(self.parameters, args, strict=False))
        for name, value in kwargs.items():
            if name not in self.parameters and not (VARIADIC in self.parameters and _neutral(value)):
                raise UserError(f"unknown argument {name!r}{nearest(name, self.parameters)}")
            if name in given:
                raise UserError(f"argument {name!r} is given twice")
            given[name] = value
        for name, value in given.items():
            if name not in self.arguments.children and not _neutral(value):
                raise UserError(f"argument {name!r} was not part of the capture; the engine cannot take it")
        return {
            k: v
            for name, tree in self.arguments.children.items()
            for k, v in tree.flatten(given.get(name), name).items()
        }

    def result(self, tensors: Mapping[str, Any], *, return_dict: bool | None = None) -> Any:
        """What the module would have returned; ``return_dict=False`` gives a tuple, as in diffusers."""
        if return_dict is False and self.output.kind == "object":
            return tuple(child.unflatten(tensors) for child in self.output.children.values())
        return self.output.unflatten(tensors)

    def as_json(self) -> dict[str, Any]:
        json = {
            "parameters": list(self.parameters),
            "arguments": self.arguments.as_json(),
            "output": self.output.as_json(),
        }
        return json if self.method == FORWARD else {**json, "method": self.method}

    @staticmethod
    def from_json(json: Mapping[str, Any]) -> Signature:
        arguments, output = Tree.from_json(json["arguments"]), Tree.from_json(json["output"])
        return Signature(tuple(map(str, json["parameters"])), arguments, output, str(json.get("method", FORWARD)))


def _neutral(value: Any) -> bool:
    # Pipelines hand every decoder a generator, and no graph draws random numbers.
    if value is None or isinstance(value, (bool, Generator)):
        return True
    return isinstance(value, (dict, list, tuple)) and not value
