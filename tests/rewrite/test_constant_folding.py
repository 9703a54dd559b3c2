"""What becomes a weight, within which bounds, and that nobody evaluates one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optpass.ir.computed import Computed
from optpass.ir.text import graph_text, operator_name
from optpass.ir.weights import Absent, Cast, Constant, Permute, Reshape, is_larger
from optpass.rewrite import constant_folding
from optpass.rewrite.constant_folding import fold_constants

FOLDS = {
    "literals": (lambda m, x, y: x + (torch.arange(4) * 0.5).exp(), Constant, ["add.Tensor"]),
    "a view of a weight": (lambda m, x, y: x[..., None] * m.features.weight.t(), Permute, ["unsqueeze", "mul.Tensor"]),
    "a reshaped weight": (lambda m, x, y: x[:1] * m.table.reshape(8, 1, 4), Reshape, ["slice.Tensor", "mul.Tensor"]),
    "a cast weight": (lambda m, x, y: x.double() * m.table[0].double(), Cast, ["to.dtype", "mul.Tensor"]),
    "arithmetic on weights": (lambda m, x, y: x * (m.table[1:] / m.table.norm()).sum(0), Computed, ["mul.Tensor"]),
    "a part of a split": (lambda m, x, y: x * m.table.chunk(2)[1][0], Computed, ["mul.Tensor"]),
    "below a repetition": (lambda m, x, y: x * m.table[:5].sin().expand(3, 5, 4), Computed, ["expand", "mul.Tensor"]),
}


@pytest.mark.parametrize("case", FOLDS)
def test_folds(capture_body, same_bits, case):
    body, kind, operators = FOLDS[case]
    program = capture_body(body)
    before = program.copy()
    after, folded = fold_constants(program, "full")
    assert [operator_name(node) for node in after.entries["full"].calls] == operators
    made = [expression for name, expression in after.weights.items() if name not in before.weights]
    assert [type(expression) for expression in made] == [kind] * len(folded)
    assert len(folded) == 1
    same_bits(before, after)


STAYS = {
    "depends on an input": lambda m, x, y: m.features.bias + x[..., :1],
    "a repetition": lambda m, x, y: x[:, :, :1] + m.features.bias.expand(5, 6),
    "an output": lambda m, x, y: [x.sin(), m.table.sin()],
    "a fill": lambda m, x, y: x + torch.ones(4),
    "random": lambda m, x, y: x + torch.rand(4),
}


@pytest.mark.parametrize("case", STAYS)
def test_stays(capture_body, case):
    program = capture_body(STAYS[case])
    text = graph_text(program.entries["full"])
    after, folded = fold_constants(program, "full")
    assert folded == []
    assert graph_text(after.entries["full"]) == text


def test_structure_only_weights_are_never_evaluated(capture_body):
    program = capture_body(lambda m, x, y: x * (m.table * m.table).sum(0).rsqrt())
    absent = {name: Absent(name, item.shape, item.dtype) for name, item in program.weights.items()}
    after, folded = fold_constants(program.with_weights(absent), "full")
    assert len(folded) == 1
    [made] = [item for name, item in after.weights.items() if name not in program.weights]
    assert str(made) == "aten.rsqrt.default(aten.sum.dim_IntList(aten.mul.Tensor(absent, absent), [0]))"
    assert not made.has_values


class Tied(nn.Module):
    def __init__(self, both):
        super().__init__()
        self.both, self.table = both, nn.Parameter(torch.zeros(8, 4))

    def forward(self, x):
        y = x @ self.table.t()
        return torch.nn.functional.linear(y, self.table.t()) if not self.both else y @ self.table


def test_beyond_the_bound_only_what_replaces_its_weights(capture_module, monkeypatch):
    monkeypatch.setattr(constant_folding, "LIMIT", 64)
    alone, _ = capture_module(Once, x=torch.zeros(2, 4))
    assert len(fold_constants(alone, "full")[1]) == 1
    tied, _ = capture_module(lambda: Tied(both=True), x=torch.zeros(2, 4))
    assert fold_constants(tied, "full")[1] == []


class Once(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(8, 4))

    def forward(self, x):
        return x @ self.table.t()


def test_a_result_beyond_the_bound_stays(capture_body, monkeypatch):
    monkeypatch.setattr(constant_folding, "LIMIT", 64)
    program = capture_body(lambda m, x, y: x * torch.arange(20.0).reshape(5, 4).exp())
    assert fold_constants(program, "full")[1] == []


def test_half_precision_arithmetic_stays_and_moves_fold(capture_module):
    class Half(nn.Module):
        def __init__(self, arithmetic):
            super().__init__()
            self.arithmetic, self.scale = arithmetic, nn.Parameter(torch.zeros(2, 4, dtype=torch.float16))

        def forward(self, x):
            return x * ((self.scale * 0.3)[0] if self.arithmetic else self.scale.flip(0)[0])

    x = torch.zeros(2, 4, dtype=torch.float16)
    assert len(fold_constants(capture_module(lambda: Half(False), x=x)[0], "full")[1]) == 1
    program, _ = capture_module(lambda: Half(True), x=x)
    assert fold_constants(program, "full")[1] == []


def test_long_chains_are_cut(capture_body, same_bits):
    def body(m, x, y):
        value = m.table[0]
        for _ in range(200):
            value = value * value.cos()
        return x + value

    program = capture_body(body)
    before = program.copy()
    after, folded = fold_constants(program, "full")
    assert folded
    assert all(str(item).count("aten.") <= constant_folding.STEPS for item in after.weights.values())
    same_bits(before, after)


def test_what_reads_itself_twice_does_not_grow_without_bound(capture_body):
    def body(m, x, y):
        table = m.table
        for _ in range(30):
            table = table * 0.5 + table.relu()
        return x * table[0]

    program = capture_body(body)
    while True:
        program, folded = fold_constants(program, "full")
        if not folded:
            break
    assert not any(is_larger(weight) for weight in program.weights.values())
