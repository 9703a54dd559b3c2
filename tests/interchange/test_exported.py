"""A canonical graph as an exported program: names, values and provenance as they were."""

from __future__ import annotations

import torch
from torch import nn

from optpass.interchange.canonical import canonicalise
from optpass.interchange.exported import to_exported
from optpass.ir.graph import PATH
from optpass.ir.text import graph_text
from optpass.testing import capture_module


class Net(nn.Module):
    """A shared weight, an integer buffer, several results of one operator, an input that is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.register_buffer("index", torch.tensor([2, 0, 1]))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        a, b, c = self.fc(x).split(2, dim=-1)
        return {"first": a + c, "picked": x[:, self.index], "second": self.fc(x) * torch.cat([b, b, b], -1), "same": x}


def test_the_graph_comes_back_as_it_was() -> None:
    graph = capture_module(Net, x=torch.zeros(2, 4))[0].entries["full"]
    again = canonicalise(to_exported(graph), graph.signature)
    assert graph_text(again) == graph_text(graph)


def test_it_computes_what_the_module_does_once_weights_are_put_in() -> None:
    program, module = capture_module(Net, x=torch.zeros(2, 4))
    exported = to_exported(program.entries["full"])
    for name, value in program.weights.items():
        tensor = value.evaluate()
        exported.state_dict[name] = nn.Parameter(tensor) if tensor.is_floating_point() else tensor
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = module(x), exported.module(check_guards=False)(x)
    for key, value in zip(expected, found, strict=True):
        torch.testing.assert_close(value, expected[key])


def test_weights_keep_their_names_and_kinds() -> None:
    graph = capture_module(Net, x=torch.zeros(2, 4))[0].entries["full"]
    exported = to_exported(graph)
    assert set(exported.graph_signature.parameters) == {"fc.weight", "fc.bias"}
    assert list(exported.graph_signature.buffers) == ["index"]
    assert list(exported.graph_signature.user_inputs) == ["x"]


def test_provenance_that_a_pass_set_survives() -> None:
    graph = capture_module(Net, x=torch.zeros(2, 4))[0].entries["full"].copy()
    graph.calls[0].meta[PATH] = "elsewhere"
    again = canonicalise(to_exported(graph), graph.signature)
    assert again.calls[0].meta[PATH] == "elsewhere"
    assert graph_text(again) == graph_text(graph)


def test_a_weight_never_takes_the_name_of_a_node() -> None:
    graph = capture_module(Net, x=torch.zeros(2, 4))[0].entries["full"].copy()
    graph.calls[0].name = "p_fc_weight"
    again = canonicalise(to_exported(graph), graph.signature)
    assert again.calls[0].name == "p_fc_weight"
