"""Reshapes, permutations, slices and splits that come to nothing or to one."""

from __future__ import annotations

import pytest
import torch

from optpass.analysis.permutations import composed, permutation_of
from optpass.ir.text import operator_name
from optpass.pipeline.passes import Context
from optpass.rewrite.rules import apply_rules
from optpass.rewrite.views import view_rules

GOES = {
    "own shape": (lambda m, x, y: x.reshape(3, 5, 4).sin(), ["sin"]),
    "expand to itself": (lambda m, x, y: x.expand(3, -1, 4).sin(), ["sin"]),
    "slice of everything": (lambda m, x, y: torch.ops.aten.slice.Tensor(x, 1, 0, 9).sin(), ["sin"]),
    "repeat once": (lambda m, x, y: x.repeat(1, 1, 1).sin(), ["sin"]),
    "transposed back": (lambda m, x, y: x.transpose(1, 2).mT.sin(), ["sin"]),
    "permutations": (lambda m, x, y: x.permute(2, 0, 1).transpose(0, 2).sin(), ["permute", "sin"]),
    "no permutation": (lambda m, x, y: x.transpose(1, 1).sin(), ["sin"]),
    "reshapes": (lambda m, x, y: x.reshape(15, 4).reshape(3, 20).sin(), ["reshape", "sin"]),
    "unsqueezed twice": (lambda m, x, y: x.unsqueeze(1).unsqueeze(-1).sin(), ["reshape", "sin"]),
    "squeezed back": (lambda m, x, y: x.unsqueeze(1).squeeze(1).sin(), ["sin"]),
    "expands": (lambda m, x, y: x.expand(2, 3, 5, 4).expand(7, 2, 3, 5, 4).sin(), ["expand", "sin"]),
    "chunks": (lambda m, x, y: torch.cat(x.chunk(2, -1), -1).sin(), ["sin"]),
    "split": (lambda m, x, y: torch.cat(x.split([1, 3, 1], 1), 1).sin(), ["sin"]),
    "slices": (lambda m, x, y: torch.cat([x[:, :2], x[:, 2:4], x[:, -1:]], 1).sin(), ["sin"]),
    "slices among others": (lambda m, x, y: torch.cat([y, x[:, :2], x[:, 2:]], 1), ["cat"]),
    "one part": (lambda m, x, y: torch.cat([x], 1).sin(), ["sin"]),
    "split into one": (lambda m, x, y: x.split(7, 1)[0].sin(), ["sin"]),
    "part of a cat": (lambda m, x, y: torch.cat([x, y], 1)[:, 5:].sin(), ["sin"]),
    "parts of a cat": (lambda m, x, y: torch.cat([x, y, x], 1)[:, :10], ["cat"]),
    "part of a cat with the empty tensor": (lambda m, x, y: torch.cat([torch.ones(0), x, y], 1)[:, 5:].sin(), ["sin"]),
    "chunk of a cat": (lambda m, x, y: torch.cat([x, y], 2).chunk(2, 2)[1].sin(), ["sin"]),
    "halves swapped": (
        lambda m, x, y: (lambda z: torch.cat([z[..., 4:], z[..., :4]], -1))(torch.cat([x.sin(), x.cos()], -1)),
        ["sin", "cos", "cat"],
    ),
}

STAYS = {
    "another order": lambda m, x, y: torch.cat(x.chunk(2, -1)[::-1], -1),
    "another dimension": lambda m, x, y: torch.cat(x.chunk(2, -1), 1),
    "a gap": lambda m, x, y: torch.cat([x[:, :2], x[:, 3:]], 1),
    "an overlap": lambda m, x, y: torch.cat([x[:, :3], x[:, 2:]], 1),
    "every second": lambda m, x, y: torch.cat([x[:, ::2], x[:, 1::2]], 1),
    "two sources": lambda m, x, y: torch.cat([x[:, :2], y[:, 2:]], 1),
    "square transposed": lambda m, x, y: x[:, :4].transpose(1, 2),
    "across the parts": lambda m, x, y: torch.cat([x, y], 1)[:, 3:7],
    "read in between": lambda m, x, y: (lambda z: [z, z.transpose(0, 2)])(x.permute(2, 0, 1)),
    "repeated": lambda m, x, y: x.repeat(2, 1, 1),
    "reversed": lambda m, x, y: x.flip(1),
}


def rewritten(program):
    before, context = program.copy(), Context()
    apply_rules(program, view_rules(), context)
    return before, context


@pytest.mark.parametrize("case", GOES)
def test_goes(capture_body, same_bits, case):
    body, operators = GOES[case]
    program = capture_body(body)
    before, context = rewritten(program)
    assert [operator_name(node) for node in program.entries["full"].calls] == operators
    assert context.sites
    same_bits(before, program)


@pytest.mark.parametrize("case", STAYS)
def test_stays(capture_body, case):
    program = capture_body(STAYS[case])
    assert rewritten(program)[1].sites == []


def test_a_cat_that_converts_is_declined(capture_body):
    program = capture_body(lambda m, x, y: torch.cat([x, y.double()], 1)[:, :5])
    _, context = rewritten(program)
    assert context.sites == []
    assert [item.reason for item in context.declined] == ["the parts differ in dtype: the cat converts"]


def test_orders(capture_body):
    program = capture_body(lambda m, x, y: [x.transpose(0, -1), x.permute(1, -1, 0), x.mT, x[0].t()])
    orders = [permutation_of(node) for node in program.entries["full"].calls]
    assert [order for order in orders if order] == [(2, 1, 0), (1, 2, 0), (0, 2, 1), (1, 0)]
    x = torch.randn(2, 3, 4)
    assert torch.equal(x.permute(2, 0, 1).permute(1, 0, 2), x.permute(composed((2, 0, 1), (1, 0, 2))))
