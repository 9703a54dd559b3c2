"""Exported programs, and everything in one that could run code."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optpass.capture.sources import capture
from optpass.errors import UserError, WeightError
from optpass.ir.graph import path_of

MODEL = "models/model.json"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.register_buffer("scale", torch.rand(8, 1, 1), persistent=False)

    def forward(self, image: Tensor, *, extra: dict[str, Tensor] | None = None, flag: bool = True) -> dict[str, Tensor]:
        out = self.act(self.norm(self.conv(image))) * self.scale * torch.tensor([[[2.0]]])
        return {"out": out if extra is None else out + extra["bias"], "view": out.transpose(1, 2)}


@pytest.fixture
def net(random_weights: Any) -> nn.Module:
    module: nn.Module = random_weights(Net())
    return module


@pytest.fixture
def archive(tmp_path: Path, net: nn.Module) -> Path:
    path = tmp_path / "net.pt2"
    example = {"extra": {"bias": torch.ones(1)}, "flag": False}
    torch.export.save(torch.export.export(net, (torch.randn(2, 3, 6, 5),), example, strict=False), path)
    return path


def rewrite(path: Path, change: Callable[[str, bytes], bytes | None], add: dict[str, bytes] | None = None) -> None:
    """The archive with every record passed through ``change`` (``None`` drops it)."""
    with zipfile.ZipFile(path) as old:
        records = {entry.filename: old.read(entry) for entry in old.infolist()}
    root = next(iter(records)).partition("/")[0]
    with zipfile.ZipFile(path, "w") as new:
        for name, data in records.items():
            changed = change(name.partition("/")[2], data)
            if changed is not None:
                new.writestr(name, changed)
        for name, data in (add or {}).items():
            new.writestr(f"{root}/{name}", data)


def edit_json(path: Path, record: str, edit: Callable[[Any], None]) -> None:
    def change(name: str, data: bytes) -> bytes:
        if name != record:
            return data
        parsed = json.loads(data)
        edit(parsed)
        return json.dumps(parsed).encode()

    rewrite(path, change)


def test_an_exported_model_computes_what_the_module_computes(
    archive: Path, net: nn.Module, assert_same_function: Any
) -> None:
    program = capture(archive)
    assert [spec.name for spec in program.entries["full"].inputs] == ["image", "extra.bias"]
    assert program.entries["full"].signature.outputs == ("out", "view")
    assert_same_function(program, net)
    assert "conv" in {path_of(node) for node in program.entries["full"].calls}


def test_an_exported_diffusers_model_keeps_its_output_class(
    tmp_path: Path, small_unet: Any, assert_same_function: Any
) -> None:
    path = tmp_path / "unet.pt2"
    exported = torch.export.export(small_unet, (torch.randn(1, 2, 8, 8), torch.tensor(3.0)), strict=False)
    torch.export.save(exported, path)
    program = capture(path)
    assert program.entries["full"].signature.output.name.endswith("UNet2DOutput")
    assert_same_function(program, small_unet)


def test_a_program_after_decomposition_is_taken(tmp_path: Path, assert_same_function: Any, random_weights: Any) -> None:
    module = random_weights(nn.Sequential(nn.Linear(4, 3), nn.GELU()))
    exported = torch.export.export(module, (torch.randn(2, 4),), strict=False).run_decompositions()
    torch.export.save(exported, tmp_path / "x.pt2")
    assert_same_function(capture(tmp_path / "x.pt2"), module)


def test_structure_only_has_no_values(archive: Path) -> None:
    assert not capture(archive, structure_only=True).has_values


def test_sizes_are_fixed(archive: Path) -> None:
    assert capture(archive, inputs={"image": [2, 3, 6, 5]}).has_values
    with pytest.raises(
        UserError, match=r"was exported with image: f32\[2, 3, 6, 5\]; it cannot take image=\[1, 3, 6, 5\]"
    ):
        capture(archive, inputs={"image": [1, 3, 6, 5]})
    with pytest.raises(UserError, match="has no input 'imgae'; did you mean 'image'"):
        capture(archive, inputs={"imgae": [1]})


def test_pickled_sample_inputs_never_run(archive: Path, runs: Any, marker: Path, tmp_path: Path) -> None:
    torch.save(runs, tmp_path / "inputs.pt")
    evil = (tmp_path / "inputs.pt").read_bytes()
    rewrite(archive, lambda name, data: evil if name.startswith("data/sample_inputs") else data)
    assert capture(archive).has_values
    assert not marker.exists()


def test_torchs_own_loader_would_have_run_them(archive: Path, runs: Any, marker: Path, tmp_path: Path) -> None:
    torch.save(runs, tmp_path / "inputs.pt")
    evil = (tmp_path / "inputs.pt").read_bytes()
    rewrite(archive, lambda name, data: evil if name.startswith("data/sample_inputs") else data)
    with pytest.raises((AssertionError, RuntimeError, TypeError)):
        torch.export.load(archive)
    assert marker.exists()


def test_a_pickled_weight_never_runs(archive: Path, runs: Any, marker: Path, tmp_path: Path) -> None:
    torch.save(runs, tmp_path / "w.pt")
    evil = (tmp_path / "w.pt").read_bytes()
    config = "data/weights/model_weights_config.json"
    edit_json(archive, config, lambda table: table["config"]["conv.weight"].update(use_pickle=True))
    rewrite(archive, lambda name, data: evil if name == "data/weights/weight_0" else data)
    with pytest.raises(WeightError, match="could run code"):
        capture(archive)
    assert not marker.exists()


def test_a_pickled_weight_that_is_a_tensor_is_taken(archive: Path, net: Any, tmp_path: Path) -> None:
    torch.save(net.conv.weight.detach(), tmp_path / "w.pt")
    honest = (tmp_path / "w.pt").read_bytes()
    config = "data/weights/model_weights_config.json"
    edit_json(archive, config, lambda table: table["config"]["conv.weight"].update(use_pickle=True))
    rewrite(archive, lambda name, data: honest if name == "data/weights/weight_0" else data)
    assert torch.equal(capture(archive).weights["conv.weight"].evaluate(), net.conv.weight)


def test_an_opaque_constant_never_runs(archive: Path, runs: Any, marker: Path) -> None:
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    config = "data/constants/model_constants_config.json"
    edit_json(archive, config, lambda table: table["config"].update(evil=entry))
    rewrite(archive, lambda _, data: data, {"data/constants/opaque_obj_0": pickle.dumps(runs)})
    with pytest.raises(UserError, match="'evil' is a pickled object, no tensor; refused"):
        capture(archive)
    assert not marker.exists()


def test_legacy_pickled_weights_are_refused(archive: Path, runs: Any, marker: Path) -> None:
    rewrite(archive, lambda _, data: data, {"data/weights/model.pt": pickle.dumps(runs)})
    with pytest.raises(UserError, match="older pickled form"):
        capture(archive)
    assert not marker.exists()


INJECTION = "x\n__import__('pathlib').Path({marker!r}).touch()\n#"


def graph_edit(edit: Callable[[dict[str, Any], str], None]) -> Callable[[Path, Path], None]:
    def apply(archive: Path, marker: Path) -> None:
        edit_json(archive, MODEL, lambda model: edit(model["graph_module"], INJECTION.format(marker=str(marker))))

    return apply


def name_of_a_node(module: dict[str, Any], code: str) -> None:
    module["graph"]["nodes"][0]["name"] = code


def name_of_a_value(module: dict[str, Any], code: str) -> None:
    module["graph"]["nodes"][0]["outputs"][0]["as_tensor"]["name"] = code


def name_of_an_input(module: dict[str, Any], code: str) -> None:
    module["graph"]["inputs"][0]["as_tensor"]["name"] = code


def name_of_an_argument(module: dict[str, Any], code: str) -> None:
    module["graph"]["nodes"][0]["inputs"][0]["name"] = code


def name_of_a_parameter(module: dict[str, Any], code: str) -> None:
    module["signature"]["input_specs"][0]["parameter"]["parameter_name"] = code


def key_of_the_signature(module: dict[str, Any], code: str) -> None:
    call = module["module_call_graph"][0]["signature"]
    call["in_spec"] = call["in_spec"].replace("extra", "x(")


def enum_in_the_signature(module: dict[str, Any], code: str) -> None:
    call = module["module_call_graph"][0]["signature"]
    leaf = {"type": None, "context": None, "children_spec": []}
    enum = {"__enum__": True, "fqn": "antigravity:x", "name": "y"}
    call["in_spec"] = json.dumps([1, {"type": "builtins.dict", "context": json.dumps([enum]), "children_spec": [leaf]}])


def import_in_the_signature(module: dict[str, Any], code: str) -> None:
    call = module["module_call_graph"][0]["signature"]
    context = {"default_factory_module": "antigravity", "default_factory_name": "x", "dict_context": []}
    spec = {"type": "collections.defaultdict", "context": context, "children_spec": []}
    call["out_spec"] = json.dumps([1, spec])


def operator_outside_aten(module: dict[str, Any], code: str) -> None:
    module["graph"]["nodes"][0]["target"] = "torch.os.system"


def higher_order_operator(module: dict[str, Any], code: str) -> None:
    module["graph"]["nodes"][0]["target"] = "torch.ops.higher_order.cond"


def symbolic_size(module: dict[str, Any], code: str) -> None:
    value = next(iter(module["graph"]["tensor_values"].values()))
    value["sizes"][0] = {"as_expr": {"expr_str": code, "hint": None}}


def custom_object(module: dict[str, Any], code: str) -> None:
    module["graph"]["nodes"][0]["inputs"][0]["arg"] = {"as_custom_obj": {"name": "x", "class_fqn": "y"}}


@pytest.mark.parametrize(
    "edit",
    [
        name_of_a_node,
        name_of_a_value,
        name_of_an_input,
        name_of_an_argument,
        name_of_a_parameter,
        key_of_the_signature,
        enum_in_the_signature,
        import_in_the_signature,
        operator_outside_aten,
        higher_order_operator,
        symbolic_size,
        custom_object,
    ],
)
def test_a_graph_that_could_run_code_is_refused(
    archive: Path, marker: Path, edit: Callable[[dict[str, Any], str], None]
) -> None:
    import sys

    graph_edit(edit)(archive, marker)
    with pytest.raises(UserError):
        capture(archive)
    assert not marker.exists()
    assert "antigravity" not in sys.modules


def test_a_name_that_would_become_code_is_refused_as_a_weight(archive: Path) -> None:
    config = "data/weights/model_weights_config.json"
    edit_json(archive, config, lambda table: table["config"].update({'a"), b("': table["config"]["conv.weight"]}))
    with pytest.raises(UserError, match="is no name for a weight; refused"):
        capture(archive)


def test_dynamic_sizes_are_refused(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=2, max=8)
    exported = torch.export.export(nn.Linear(4, 3), (torch.randn(2, 4),), dynamic_shapes=({0: batch},), strict=False)
    torch.export.save(exported, tmp_path / "x.pt2")
    with pytest.raises(UserError, match="holds symbolic sizes; export it with fixed ones"):
        capture(tmp_path / "x.pt2")


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pt2").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"is damaged, or not written by torch\.export\.save"):
        capture(tmp_path / "x.pt2")


def test_compiled_code_alone_is_refused(archive: Path) -> None:
    rewrite(archive, lambda name, data: None if name == MODEL else data, {"data/aotinductor/model/x.so": b"\x7fELF"})
    with pytest.raises(UserError, match="holds no exported graph"):
        capture(archive)


def test_a_missing_record_is_reported(archive: Path) -> None:
    rewrite(archive, lambda name, data: None if name == "data/weights/weight_0" else data)
    with pytest.raises(UserError, match=r"lacks the uncompressed record data/weights/weight_0"):
        capture(archive)


def test_a_record_that_is_too_small_is_reported(archive: Path) -> None:
    rewrite(archive, lambda name, data: data[:8] if name == "data/weights/weight_0" else data)
    with pytest.raises(WeightError, match=r"the record of 'conv\.weight' is smaller than its shape"):
        capture(archive)


def test_a_graph_that_is_no_json_is_reported(archive: Path) -> None:
    rewrite(archive, lambda name, data: b"{" if name == MODEL else data)
    with pytest.raises(UserError, match="is not valid JSON"):
        capture(archive)
    rewrite(archive, lambda name, data: b'{"graph_module": {}}' if name == MODEL else data)
    with pytest.raises(UserError, match="unexpected graph JSON"):
        capture(archive)
