"""Programs on disk: exact round trips, damage, and nothing that runs or leaves the folder."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from optpass.capture.export import build_fake, export_program
from optpass.errors import UserError, WeightError
from optpass.evaluate.difference import program_difference
from optpass.interchange.storage import load_program, save_program
from optpass.ir.program import InputRange, Origin, Program
from optpass.ir.safetensors_io import write_safetensors
from optpass.ir.text import graph_text
from optpass.ir.weights import Constant, Scale
from optpass.testing import capture_module


class Net(nn.Module):
    """A baked table, a tied weight, an infinite literal, several dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.norm = nn.Embedding(7, 8), nn.Linear(8, 7, bias=False), nn.LayerNorm(8)
        self.fc.weight = self.embed.weight
        self.register_buffer("table", torch.linspace(0, 1, 8), persistent=False)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.norm(self.embed(tokens) + self.table)
        logits = self.fc(x).masked_fill(mask[..., None], float("-inf"))
        return logits, x.half()


@pytest.fixture(scope="module")
def program() -> Program:
    found, _ = capture_module(Net, tokens=torch.zeros(2, 3, dtype=torch.long), mask=torch.zeros(2, 3, dtype=torch.bool))
    origin = Origin("factory", None, "", "torch", "Net", {"depth": 1, "names": ["a", "b"]}, digest="abc")
    return replace(found, origin=origin, ranges={"tokens": InputRange(0, 7)}, untrained=frozenset({"norm.weight"}))


def texts(program: Program) -> dict[str, str]:
    return {name: graph_text(graph, name) for name, graph in program.entries.items()}


def test_a_round_trip_is_exact(program: Program, tmp_path: Path) -> None:
    save_program(program, tmp_path)
    loaded = load_program(tmp_path)
    assert texts(loaded) == texts(program)
    assert {n: g.signature for n, g in loaded.entries.items()} == {n: g.signature for n, g in program.entries.items()}
    assert (loaded.loop, dict(loaded.ranges)) == (program.loop, dict(program.ranges))
    assert loaded.untrained == program.untrained
    assert loaded.origin == replace(program.origin, path=tmp_path.resolve())
    assert list(loaded.weights) == list(program.used_weights())
    for name, expression in program.used_weights().items():
        assert torch.equal(loaded.weights[name].evaluate(), expression.evaluate())
    # Weights of a mapped file are aligned otherwise, which moves the last bit.
    assert program_difference(program, loaded).relative_error < 1e-6


def test_saving_what_was_loaded_gives_the_same_bytes(program: Program, tmp_path: Path) -> None:
    save_program(program, tmp_path / "a")
    save_program(load_program(tmp_path / "a"), tmp_path / "b")
    indices = [json.loads((tmp_path / name / "program.json").read_text()) for name in "ab"]
    for index in indices:
        index["origin"].pop("name")
    assert indices[0] == indices[1]
    for name in ("weights.safetensors", "full.pt2"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_lazy_expressions_are_evaluated_into_the_file(program: Program, tmp_path: Path) -> None:
    scaled = program.with_weights({"norm.weight": Scale(program.weights["norm.weight"], 2.0)})
    save_program(scaled, tmp_path)
    assert torch.equal(
        load_file(tmp_path / "weights.safetensors")["norm.weight"], scaled.weights["norm.weight"].evaluate()
    )


def test_what_the_models_code_computed_stays_no_parameter(program: Program, tmp_path: Path) -> None:
    save_program(program, tmp_path)
    table = load_program(tmp_path).weights["table"]
    assert isinstance(table, Constant)
    assert table.computed


def test_the_graph_file_is_an_exported_program_for_other_tools(program: Program, tmp_path: Path) -> None:
    save_program(program, tmp_path)
    exported = torch.export.load(tmp_path / "full.pt2")
    values = load_file(tmp_path / "weights.safetensors")
    assert {name: value.shape for name, value in exported.state_dict.items()} == {n: v.shape for n, v in values.items()}
    assert (tmp_path / "full.pt2").stat().st_size < 100_000


def test_a_structure_only_program_round_trips(tmp_path: Path) -> None:
    module, mode = build_fake(lambda: nn.Linear(4096, 4096))
    program = export_program(module, mode, {"input": torch.zeros(1, 4096)}, None, Origin("test"))
    save_program(program, tmp_path)
    loaded = load_program(tmp_path)
    assert texts(loaded) == texts(program)
    assert dict(loaded.weights) == dict(program.weights)
    assert not loaded.has_values
    assert {path.name for path in tmp_path.iterdir()} == {"program.json", "full.pt2"}


def test_progress_ends_at_one(program: Program, tmp_path: Path) -> None:
    seen: list[float] = []
    save_program(program, tmp_path, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1.0)


def test_nan_names_the_weight(program: Program, tmp_path: Path) -> None:
    broken = program.with_weights({"norm.bias": Constant(torch.full((8,), float("nan")))})
    with pytest.raises(WeightError, match=r"norm\.bias"):
        save_program(broken, tmp_path)
    save_program(broken, tmp_path, allow_nonfinite=True)


def test_components_beside_a_saved_pipeline_are_found_again(program: Program, tmp_path: Path) -> None:
    origin = replace(program.origin, pipeline=True, path=Path("/elsewhere"), component="unet")
    save_program(replace(program, origin=origin), tmp_path / "program")
    assert not load_program(tmp_path / "program").origin.pipeline
    (tmp_path / "components").mkdir()
    (tmp_path / "components" / "model_index.json").write_text("{}")
    loaded = load_program(tmp_path / "program").origin
    assert loaded.pipeline
    assert loaded.path == (tmp_path / "components").resolve()


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / "program.json").read_text())
    change(index)
    (folder / "program.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("schema_version"), "no Program of optpass"),
        (lambda index: index.update(schema_version=9), "newer"),
        (lambda index: index.pop("weights"), "damaged"),
        (lambda index: index.update(entries={}), "lacks the entry"),
        (lambda index: index.update(loop={"entry": "other"}), "damaged"),
        (lambda index: index.update(loop={"variants": {}}), "damaged"),
        (lambda index: index["entries"]["full"].update(graph="../full.pt2"), "outside its folder"),
        (lambda index: index["entries"]["full"].update(graph="/etc/passwd"), "outside its folder"),
        (lambda index: index["entries"]["full"].update(graph="none.pt2"), "none.pt2"),
        (lambda index: index["entries"]["full"].pop("signature"), "damaged"),
        (lambda index: index["weights"].update(file="../weights.safetensors"), "outside its folder"),
        (lambda index: index["weights"].update(file=None), "damaged|no weight named"),
        (lambda index: index.update(ranges={"tokens": {"lowest": 1}}), "damaged"),
    ],
)
def test_a_damaged_index_is_a_clear_error(
    change: Callable[[dict[str, Any]], None], message: str, program: Program, tmp_path: Path
) -> None:
    save_program(program, tmp_path / "p")
    edit(tmp_path / "p", change)
    with pytest.raises(UserError, match=message):
        load_program(tmp_path / "p")


@pytest.mark.parametrize("name", ["program.json", "full.pt2", "weights.safetensors"])
def test_truncated_files_are_a_clear_error(name: str, program: Program, tmp_path: Path) -> None:
    save_program(program, tmp_path)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=name):
        load_program(tmp_path)


def test_weights_of_another_shape_are_refused(program: Program, tmp_path: Path) -> None:
    save_program(program, tmp_path)
    changed = {**program.used_weights(), "norm.weight": Constant(torch.ones(9))}
    write_safetensors(changed, tmp_path / "weights.safetensors")
    with pytest.raises(WeightError, match=r"norm_weight.*shape"):
        load_program(tmp_path)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def rewritten(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(name, change(name, data))


def test_a_pickle_in_the_graph_file_never_runs(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_program(program, tmp_path / "p")
    rewritten(
        tmp_path / "p" / "full.pt2",
        lambda name, data: pickle.dumps(Bomb()) if name.endswith("sample_inputs/model.pt") else data,
    )
    monkeypatch.chdir(tmp_path)
    assert texts(load_program(tmp_path / "p")) == texts(program)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("target", ["os.system", "torch.hub.load", "torch.ops.aten.from_file.default", "math.sin"])
def test_only_aten_operators_are_taken_from_the_graph_file(target: str, program: Program, tmp_path: Path) -> None:
    save_program(program, tmp_path)

    def change(name: str, data: bytes) -> bytes:
        return data.replace(b"torch.ops.aten.embedding.default", target.encode()) if name.endswith(".json") else data

    rewritten(tmp_path / "full.pt2", change)
    with pytest.raises(UserError, match="only ATen operators"):
        load_program(tmp_path)
