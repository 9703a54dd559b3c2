"""Python factories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from optpass.capture.sources import capture
from optpass.errors import UserError, WeightError

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 3)

    def forward(self, tokens, scale=None, extra=None):
        hidden = self.embed(tokens).mean(1) * scale
        return self.head(hidden if extra is None else hidden + extra["bias"])

def net():
    return Net()

def net_inputs():
    return {"tokens": torch.arange(10).reshape(2, 5), "scale": torch.ones(2, 1)}

def other():
    return Net()

def example_inputs():
    return torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 1)

def bare():
    return nn.Linear(4, 2)

def bare_inputs():
    return {"inputs": torch.zeros(1, 4)}

def nested():
    return Net()

def nested_inputs():
    return {"tokens": torch.zeros(2, 5, dtype=torch.int64), "scale": torch.ones(2, 1), "extra": {"bias": torch.ones(4)}}

def broken():
    raise RuntimeError("no such thing")

def text():
    return "a module"
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "nets.py"
    path.write_text(CODE)
    return path


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain.py"
    path.write_text("from torch import nn\n\ndef conv():\n    return nn.Conv2d(3, 4, 3)\n")
    return path


def net(code: Path, random_weights: Any) -> nn.Module:
    namespace: dict[str, Any] = {}
    exec(code.read_text(), namespace)
    return random_weights(namespace["Net"]())


@pytest.mark.parametrize("wrapped", ["safetensors", "pth", "state_dict", "DataParallel"])
def test_weights_come_from_a_file(
    code: Path, wrapped: str, tmp_path: Path, random_weights: Any, assert_same_function: Any
) -> None:
    module = net(code, random_weights)
    state = module.state_dict()
    weights = tmp_path / ("net.safetensors" if wrapped == "safetensors" else "net.pth")
    if wrapped == "safetensors":
        save_file(state, weights)
    elif wrapped == "state_dict":
        torch.save({"state_dict": state, "epoch": 3}, weights)
    else:
        torch.save({f"module.{k}": v for k, v in state.items()} if wrapped == "DataParallel" else state, weights)
    program = capture(f"{code}:net", weights=weights)
    assert_same_function(program, module)
    assert program.origin.kind == "factory"


def test_the_example_follows_the_dtype_of_the_weights(code: Path, tmp_path: Path, random_weights: Any) -> None:
    halves = {name: tensor.half() for name, tensor in net(code, random_weights).state_dict().items()}
    torch.save(halves, tmp_path / "net.pth")
    specs = capture(f"{code}:net", weights=tmp_path / "net.pth").entries["full"].inputs
    assert {spec.name: spec.dtype for spec in specs} == {"tokens": torch.int64, "scale": torch.float16}
    wide = capture(f"{code}:net", weights=tmp_path / "net.pth", dtype=torch.float32).entries["full"].inputs
    assert {spec.name: spec.dtype for spec in wide} == {"tokens": torch.int64, "scale": torch.float32}


@pytest.mark.parametrize("function", ["net", "other", "nested"])
def test_example_inputs_come_from_the_file(code: Path, function: str) -> None:
    program = capture(f"{code}:{function}")
    shapes = {spec.name: (spec.shape, spec.dtype) for spec in program.entries["full"].inputs}
    assert shapes["tokens"] == ((2, 5), torch.int64)
    assert shapes["scale"] == ((2, 1), torch.float32)
    assert ("extra.bias" in shapes) == (function == "nested")
    assert not program.has_values


def test_integer_inputs_stay_in_the_examples_range(code: Path) -> None:
    assert capture(f"{code}:net").ranges["tokens"].high == 10


def test_a_new_batch_size_reaches_the_other_inputs(code: Path) -> None:
    specs = capture(f"{code}:net", inputs={"tokens": [7, 3]}).entries["full"].inputs
    assert {spec.name: spec.shape for spec in specs} == {"tokens": (7, 3), "scale": (7, 1)}


def test_one_module_of_the_factorys_model_is_captured_alone(
    code: Path, tmp_path: Path, random_weights: Any, assert_same_function: Any
) -> None:
    module = net(code, random_weights)
    save_file(module.state_dict(), tmp_path / "net.safetensors")
    options = {"weights": tmp_path / "net.safetensors", "inputs": {"input": [2, 4]}}
    assert_same_function(capture(f"{code}:net", component="head", **options), module.head)
    with pytest.raises(UserError, match="Net has no module 'haed'; did you mean 'head'"):
        capture(f"{code}:net", component="haed", **options)


def test_sizes_alone_serve_as_an_example(plain: Path) -> None:
    assert capture(f"{plain}:conv", inputs={"input": [1, 3, 8, 6]}).entries["full"].outputs[0].shape == (1, 4, 6, 4)


def test_structure_only_leaves_the_weights_alone(code: Path, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(b"not looked at")
    assert not capture(f"{code}:net", weights=tmp_path / "x.pth", structure_only=True).has_values


def test_a_malicious_pickle_is_refused_and_does_not_run(code: Path, tmp_path: Path, runs: Any, marker: Path) -> None:
    for name, content in {"bad.pth": runs, "hidden.pth": {"head.weight": torch.ones(2), "more": runs}}.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(WeightError, match="is refused: its pickle holds more than tensors and could run code"):
            capture(f"{code}:net", weights=tmp_path / name)
    assert not marker.exists()


def test_the_malicious_pickle_would_have_run(tmp_path: Path, runs: Any, marker: Path) -> None:
    torch.save(runs, tmp_path / "bad.pth")
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert marker.exists()


def test_a_pickle_without_tensors_is_reported(code: Path, tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "x.pth")
    with pytest.raises(WeightError, match="holds no state dict"):
        capture(f"{code}:net", weights=tmp_path / "x.pth")


def test_weights_that_do_not_fit_are_named(code: Path, tmp_path: Path) -> None:
    torch.save({"embed.weight": torch.ones(10, 5), "head.weight": torch.ones(3, 4)}, tmp_path / "x.pth")
    with pytest.raises(WeightError, match=r"embed\.weight: the model has \[10, 4\], the checkpoint \[10, 5\]"):
        capture(f"{code}:net", weights=tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nett", r"has no function 'nett'; did you mean 'net'"),
        ("broken", "broken fails: RuntimeError: no such thing"),
        ("text", "returns str, not a torch.nn.Module"),
        ("bare", "the example gives 'inputs', no argument of the model; did you mean 'input'"),
    ],
)
def test_a_factory_that_gives_no_model_is_refused(code: Path, function: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        capture(f"{code}:{function}")


def test_a_model_without_example_inputs_is_refused(plain: Path) -> None:
    with pytest.raises(
        UserError, match=r"give the sizes of input with --inputs .*; or write a function conv_inputs\(\)"
    ):
        capture(f"{plain}:conv")


def test_a_file_that_fails_on_import_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import no_such_module\n")
    with pytest.raises(UserError, match="fails on import: ModuleNotFoundError"):
        capture(f"{tmp_path / 'bad.py'}:net")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no Python file at"):
        capture(f"{tmp_path / 'gone.py'}:net")


def test_the_file_may_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "optpass_test_neighbour.py").write_text("from torch import nn\nlayer = nn.Linear\n")
    (tmp_path / "main.py").write_text("from optpass_test_neighbour import layer\ndef net():\n    return layer(2, 3)\n")
    assert capture(f"{tmp_path / 'main.py'}:net", inputs={"input": [1, 2]}).entries["full"].outputs[0].shape == (1, 3)
