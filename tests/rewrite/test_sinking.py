"""Views that meet across pointwise operators."""

from __future__ import annotations

import pytest
import torch

from optpass.capture.sources import capture
from optpass.ir.text import operator_name
from optpass.rewrite.sinking import sink_views

SINKS = {
    "inverse": (lambda m, x, y: (x.transpose(1, 2).sin() * 3).mT, ["sin", "mul.Tensor"]),
    "two to one": (lambda m, x, y: x.permute(2, 0, 1).sin().transpose(0, 2), ["sin", "permute"]),
    "reshaped back": (lambda m, x, y: x.reshape(15, 4).relu().reshape(3, 5, 4), ["relu"]),
    "reshaped on": (lambda m, x, y: x.reshape(15, 4).relu().unsqueeze(0), ["relu", "reshape"]),
    "sum of permuted": (lambda m, x, y: x.transpose(0, 1) + y.transpose(0, 1), ["add.Tensor", "permute"]),
    "sum of reshaped": (lambda m, x, y: x.reshape(15, 4) - y.reshape(15, 4), ["sub.Tensor", "reshape"]),
}

STAYS = {
    "no view below": lambda m, x, y: x.transpose(1, 2).sin(),
    "read on the way": lambda m, x, y: (lambda z: [z.mT, z + 1])(x.transpose(1, 2).sin()),
    "view read twice": lambda m, x, y: (lambda z: [z.sin().mT, z])(x.transpose(1, 2)),
    "a reduction between": lambda m, x, y: x.transpose(1, 2).softmax(-1).mT,
    "a permutation and a reshape": lambda m, x, y: x.transpose(1, 2).sin().reshape(12, 5),
    "shapes that broadcast": lambda m, x, y: x.transpose(0, 1) + y[:1].transpose(0, 1),
    "dtypes": lambda m, x, y: x.transpose(0, 1) + y.double().transpose(0, 1),
}


@pytest.mark.parametrize("case", SINKS)
def test_sinks(capture_body, same_bits, case):
    body, operators = SINKS[case]
    program = capture_body(body)
    before, graph = program.copy(), program.entries["full"]
    assert len(sink_views(graph)) == 1
    assert [operator_name(node) for node in graph.calls] == operators
    same_bits(before, program)


@pytest.mark.parametrize("case", STAYS)
def test_stays(capture_body, case):
    program = capture_body(STAYS[case])
    assert sink_views(program.entries["full"]) == []


def test_one_of_two_open_sizes_is_not_computed_for_it(tmp_path):
    """A reshape to two open sizes would take nodes that compute them."""
    source = tmp_path / "model.py"
    source.write_text(
        "import torch\n"
        "class Model(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x.unsqueeze(0).relu().unsqueeze(0)\n"
        "def model():\n    return Model()\n"
        "def model_inputs():\n    return {'x': torch.zeros(3, 5)}\n"
    )
    both = capture(f"{source}:model", inputs={"x": ["2..4", "3..9"]})
    assert sink_views(both.entries["full"]) == []
    one = capture(f"{source}:model", inputs={"x": ["2..4", 5]})
    assert len(sink_views(one.entries["full"])) == 1
    assert torch.ops.aten.sym_size.int not in {node.target for node in one.entries["full"].calls}
