"""A ``.pt2`` archive, read without torch.export's loader.

That loader unpickles sample inputs and some weights without restriction, evaluates symbolic sizes with
SymPy's ``sympify`` (which is Python's ``eval``), imports what tree contexts name, and writes names from
the file into generated code. Here tensors are leaves over the archive's uncompressed records, nothing
is unpickled except weights-only, and the graph's JSON is reduced to a harmless subset before torch
sees it; what has no place in the subset is refused.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optpass.errors import UserError, WeightError
from optpass.interchange.expressions import SYMBOL, is_harmless
from optpass.interchange.pickled import load_weights_only
from optpass.ir.signature import output_class
from optpass.ir.weights import Constant, Expression, Shape

LOCAL_HEADER = 30
# from_file maps, and creates, a file of any name.
OPERATOR = re.compile(r"torch\.ops\.aten\.(?!from_file\b)\w+\.\w+|_operator\.getitem")
SIZE_OPERATOR = re.compile(
    r"_operator\.(add|sub|mul|floordiv|mod|neg|truediv|pow)|torch\.sym_(max|min|float|int|sum)|math\.trunc"
)
IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
WEIGHT_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
REFUSED_ARGUMENTS = {
    "as_graph": "a nested graph (capture it under torch.no_grad(), without autocast or control flow)",
    "as_custom_obj": "a custom object",
    "as_operator": "an operator given as a value",
    "custom_obj": "a custom object",
}
SYMBOLIC = ("as_expr", "as_name", "expr_str")
CONTAINERS = ("builtins.tuple", "builtins.list", "builtins.dict")


@dataclass(frozen=True)
class Record(Expression):
    """A tensor in an uncompressed record of a zip archive: a strided view of the record's bytes."""

    path: Path
    key: str
    shape: Shape
    dtype: torch.dtype
    begin: int
    nbytes_stored: int
    stride: tuple[int, ...]
    offset: int

    def evaluate(self) -> Tensor:
        if self.numel == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        try:
            with self.path.open("rb") as file:
                file.seek(self.begin)
                data = bytearray(file.read(self.nbytes_stored))
            flat = torch.frombuffer(data, dtype=self.dtype)
            return flat.as_strided(self.shape, self.stride, self.offset).contiguous()
        except (OSError, ValueError, RuntimeError) as error:
            raise WeightError(f"{self.path}: cannot read {self.key!r}: {error}") from error

    def operands(self) -> tuple[Expression, ...]:
        return ()

    def __str__(self) -> str:
        return f"{self.path.name}[{self.key}]"


class Archive:
    """The records of one ``.pt2`` file; with ``open_sizes``, its graph may have symbolic ones.

    Raises:
        UserError: it is no such file, is of an older format, or holds compiled code only.
    """

    def __init__(self, path: Path, *, open_sizes: bool = False) -> None:
        self.path = path.resolve()
        self.open_sizes = open_sizes
        try:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged, or not written by torch.export.save: {error}") from error
        self._entries = {entry.filename.partition("/")[2]: entry for entry in entries}
        if len(self._entries) != len(entries):
            raise UserError(f"{path} is damaged: it has several records of one name")
        models = sorted(name for name in self._entries if re.fullmatch(r"models/\w+\.json", name))
        if "serialized_exported_program.json" in {entry.filename for entry in entries}:
            raise UserError(f"{path} is of the format before torch 2.8; load it there and save it with a newer torch")
        if not models:
            raise UserError(f"{path} holds no exported graph (compiled code alone cannot be optimised)")
        self.model = "model" if "models/model.json" in models else Path(models[0]).stem

    def read(self, name: str) -> bytes:
        """The bytes of a record.

        Raises:
            UserError: it is missing or damaged.
        """
        if name not in self._entries:
            raise UserError(f"{self.path} is damaged: it lacks {name}")
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(self._entries[name])
        except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
            raise UserError(f"{self.path} is damaged at {name}: {error}") from error

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON record.

        Raises:
            UserError: it is missing, or damaged.
        """
        try:
            found = json.loads(self.read(name))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path} is damaged: {name} is not valid JSON") from error
        if not isinstance(found, dict):
            raise UserError(f"{self.path} is damaged: {name} is not a JSON object")
        return found

    def tensors(self) -> dict[str, Expression]:
        """Weights, buffers and constants by name, lazy.

        Raises:
            UserError: the archive holds something else than tensors, or is damaged.
        """
        found: dict[str, Expression] = {}
        for kind in ("weights", "constants"):
            if f"data/{kind}/{self.model}.pt" in self._entries:
                raise UserError(f"{self.path} holds {kind} in an older pickled form; save it with a newer torch")
            table = self.json(f"data/{kind}/{self.model}_{kind}_config.json").get("config")
            if not isinstance(table, Mapping):
                raise UserError(f"{self.path} is damaged: its {kind} table is no table")
            for name, entry in table.items():
                found[name] = self._tensor(name, kind, entry)
        return found

    def _tensor(self, name: str, kind: str, entry: Any) -> Expression:
        if not WEIGHT_NAME.fullmatch(name):
            raise UserError(f"{self.path}: {name!r} is no name for a weight; refused")
        try:
            record = f"data/{kind}/{entry['path_name']}"
            if entry["tensor_meta"] is None:
                raise UserError(f"{self.path}: {name!r} is a pickled object, no tensor; refused: it could run code")
            if entry["use_pickle"]:
                return self._pickled(name, record)
            return self._record(name, record, entry["tensor_meta"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{self.path} is damaged at the weight {name!r}: {error!r}") from error

    def _pickled(self, name: str, record: str) -> Expression:
        value = load_weights_only(io.BytesIO(self.read(record)), self.path)
        if not isinstance(value, Tensor):
            raise UserError(f"{self.path}: {name!r} is a pickled object, no tensor; refused")
        return Constant(value)

    def _record(self, name: str, record: str, meta: Mapping[str, Any]) -> Expression:
        from torch._export.serde.schema import ScalarType
        from torch._export.serde.serialize import deserialize_scalar_type

        dtype = deserialize_scalar_type(ScalarType(meta["dtype"]))
        shape, stride = _numbers(meta["sizes"]), _numbers(meta["strides"])
        (offset,) = _numbers([meta["storage_offset"]])
        begin, size = self._extent(record)
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if (0 not in shape and (last + 1) * dtype.itemsize > size) or size % dtype.itemsize:
            raise WeightError(f"{self.path} is damaged: the record of {name!r} is smaller than its shape {list(shape)}")
        return Record(self.path, name, shape, dtype, begin, size, stride, offset)

    def _extent(self, record: str) -> tuple[int, int]:
        """Where a record's bytes begin in the file, and how many there are."""
        entry = self._entries.get(record)
        if entry is None or entry.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{self.path} is damaged: it lacks the uncompressed record {record}")
        with self.path.open("rb") as file:
            file.seek(entry.header_offset)
            header = file.read(LOCAL_HEADER)
        name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
        return entry.header_offset + LOCAL_HEADER + name + extra, entry.file_size

    def graph(self) -> dict[str, Any]:
        """The exported program's JSON, reduced to what is safe to hand to torch's deserialiser.

        Raises:
            UserError: the graph needs more than ATen operators on tensors of fixed sizes.
        """
        exported = self.json(f"models/{self.model}.json")
        # Code to evaluate.
        exported.update(guards_code=[])
        exported.update(range_constraints=self._ranges(exported) if self.open_sizes else {})
        try:
            module = exported["graph_module"]
            module["metadata"] = {}
            module["module_call_graph"] = [entry for entry in module["module_call_graph"] if entry["fqn"] == ""]
            for node in module["graph"]["nodes"]:
                self._check_node(node)
            self._check_names(module["graph"]["tensor_values"])
            self._check_values(module)
            for entry in module["module_call_graph"]:
                self._check_call(entry["signature"])
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path} is damaged: unexpected graph JSON ({error!r})") from error
        return exported

    def _check_node(self, node: dict[str, Any]) -> None:
        known = OPERATOR.fullmatch(node["target"]) or (self.open_sizes and SIZE_OPERATOR.fullmatch(node["target"]))
        if not known:
            raise UserError(f"{self.path} uses {node['target'][:80]!r}; only ATen operators can be taken from a .pt2")
        stack = node["metadata"].get("nn_module_stack")
        node["metadata"] = {"nn_module_stack": stack} if stack else {}

    def _check_values(self, value: Any) -> None:
        for key, item in _pairs(value):
            if key in REFUSED_ARGUMENTS:
                raise UserError(f"{self.path} holds {REFUSED_ARGUMENTS[key]}")
            if key in SYMBOLIC:
                self._check_symbolic(key, item)
            if key == "name" and isinstance(item, str) and item:
                self._check_names([item])
            if key in ("parameter_name", "buffer_name", "tensor_constant_name") and not WEIGHT_NAME.fullmatch(item):
                raise UserError(f"{self.path}: {item!r} is no name for a weight; refused")

    def _check_symbolic(self, key: str, item: Any) -> None:
        if not self.open_sizes:
            raise UserError(f"{self.path} holds symbolic sizes; export it with fixed ones (no dynamic_shapes)")
        if key == "as_name":
            self._check_names([item])
        if key == "expr_str" and not is_harmless(item):
            raise UserError(f"{self.path}: {str(item)[:80]!r} is no size; refused")

    def _ranges(self, exported: Mapping[str, Any]) -> dict[str, Any]:
        """The ranges of the symbols, which are whole numbers."""
        found = {}
        for symbol, span in exported["range_constraints"].items():
            low, high = span["min_val"], span["max_val"]
            if not (SYMBOL.fullmatch(symbol) and isinstance(low, int) and isinstance(high, int)):
                raise UserError(f"{self.path} is damaged: the range of {symbol[:20]!r} is none")
            found[symbol] = {"min_val": low, "max_val": high}
        return found

    def _check_names(self, names: Any) -> None:
        for name in names:
            # Names become identifiers of generated code.
            if not IDENTIFIER.fullmatch(name):
                raise UserError(f"{self.path}: {name!r} is no name for a value; refused")

    def _check_call(self, signature: Mapping[str, Any]) -> None:
        self._check_names(signature.get("forward_arg_names") or [])
        for spec in (signature["in_spec"], signature["out_spec"]):
            _, tree = json.loads(spec)
            self._check_tree(tree)

    def _check_tree(self, tree: Mapping[str, Any]) -> None:
        kind, context = tree["type"], tree["context"]
        # Importing an output class also registers it as a tree, which the deserialiser needs.
        known = kind is None or kind in CONTAINERS or output_class(kind) is not dict
        if not known:
            raise UserError(f"{self.path}: inputs or outputs are of the type {kind!r}, which cannot be taken")
        keys = json.loads(context) if isinstance(context, str) else context
        self._check_names(key for key in _strings(keys))
        for child in tree["children_spec"]:
            self._check_tree(child)


def _numbers(sizes: list[Mapping[str, int]]) -> tuple[int, ...]:
    found = tuple(size["as_int"] for size in sizes)
    if not all(isinstance(n, int) and n >= 0 for n in found):
        raise ValueError(f"sizes {found}")
    return found


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value of nested JSON; a key whose value is ``null`` says nothing and is left out."""
    if isinstance(value, dict):
        for key, item in value.items():
            if item is not None:
                yield key, item
                yield from _pairs(item)
    elif isinstance(value, list):
        for item in value:
            yield from _pairs(item)


def _strings(value: Any) -> Iterator[str]:
    """The keys in a tree's context.

    Raises:
        TypeError: it holds anything but strings (objects there name enums to import).
    """
    if value is None:
        return
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    else:
        raise TypeError(f"a tree context holds {type(value).__name__}")
