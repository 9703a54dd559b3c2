"""Arithmetic that comes to nothing or to less, and what only looks like it."""

from __future__ import annotations

import pytest
import torch

from optpass.ir.text import operator_name
from optpass.pipeline.passes import Context
from optpass.rewrite.identities import arithmetic_rules, holds
from optpass.rewrite.rules import apply_rules

GOES = {
    "x + 0": (lambda m, x, y: (x + 0) * y, ["mul.Tensor"]),
    "x - 0.0": (lambda m, x, y: (x - 0.0) * y, ["mul.Tensor"]),
    "x * 1": (lambda m, x, y: (x * 1).sin(), ["sin"]),
    "x / 1.0": (lambda m, x, y: (x / 1.0).sin(), ["sin"]),
    "x ** 1": (lambda m, x, y: (x**1).sin(), ["sin"]),
    "zeros + x": (lambda m, x, y: (torch.zeros(3, 1, 4) + x).sin(), ["sin"]),
    "x * ones": (lambda m, x, y: (x * torch.ones_like(y)).sin(), ["sin"]),
    "expanded full": (lambda m, x, y: (x * torch.full((1,), 1.0).expand(3, 5, 4)).sin(), ["sin"]),
    "--x": (lambda m, x, y: x.neg().neg().sin(), ["sin"]),
    "widened and back": (lambda m, x, y: x.double().float().sin(), ["sin"]),
    "widened twice": (lambda m, x, y: x.half().float().double(), ["to.dtype", "to.dtype"]),
    "a power of two": (lambda m, x, y: x * 0.3 / 4, ["mul.Tensor"]),
    "quotients": (lambda m, x, y: x / 0.3 / 4, ["div.Tensor"]),
    "a quotient, then a product": (lambda m, x, y: x / 8 * 3, ["mul.Tensor"]),
    "whole numbers": (lambda m, x, y: (x > 0).long() + 3 - 5, ["gt.Scalar", "to.dtype", "add.Tensor"]),
}

STAYS = {
    "NaN": (lambda m, x, y: x * 0, None),
    "zeros that repeat": (lambda m, x, y: x + torch.zeros(2, 3, 5, 4), "converts or repeats"),
    "ones that convert": (lambda m, x, y: x * torch.ones(4, dtype=torch.float64), "converts or repeats"),
    "0 - x": (lambda m, x, y: torch.zeros(4) - x, None),
    "one over": (lambda m, x, y: torch.ones(4) / x, None),
    "parameter of ones": (lambda m, x, y: x * m.table[0], None),
    "rounded between": (lambda m, x, y: x * 0.3 * 0.7, "rounded before"),
    "beyond the range": (lambda m, x, y: x * 1e-30 * 2.0**-40, "does not hold"),
    "divided by zero": (lambda m, x, y: x / 0.0 * 2, "does not hold"),
    "float sums": (lambda m, x, y: x + 1e8 - 1e8, None),
    "read in between": (lambda m, x, y: (lambda z: [z, z * 4])(x * 2), None),
    "narrowed": (lambda m, x, y: x.half().float(), None),
    "whole numbers through floats": (lambda m, x, y: (x * 1e9).long().float().long(), None),
}


def rewritten(program):
    before, context = program.copy(), Context()
    apply_rules(program, arithmetic_rules(program.weights), context)
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
    body, reason = STAYS[case]
    program = capture_body(body)
    _, context = rewritten(program)
    assert context.sites == []
    assert [reason in item.reason for item in context.declined] == ([True] if reason else [])


def attention(mask):
    return lambda m, x, y: torch.nn.functional.scaled_dot_product_attention(x, y, y, attn_mask=mask(x), scale=0.7)


def test_a_mask_that_hides_nothing_goes(capture_body, same_bits):
    for mask in (lambda x: torch.ones(5, 5, dtype=torch.bool), lambda x: torch.zeros(3, 1, 5)):
        program = capture_body(attention(mask))
        before, _ = rewritten(program)
        [call] = program.entries["full"].calls
        assert len(call.args) == 3
        assert call.kwargs == {"scale": 0.7}
        same_bits(before, program)
    for mask in (lambda x: torch.ones(5, 5).tril().bool(), lambda x: torch.full((5, 5), 0.5), lambda x: x[:, :, :1]):
        program = capture_body(attention(mask))
        assert rewritten(program)[1].sites == []


@pytest.mark.parametrize(
    ("wide", "dtype", "expected"),
    [
        (torch.float32, torch.float16, True),
        (torch.float16, torch.bfloat16, False),
        (torch.float32, torch.int16, True),
        (torch.float32, torch.int32, False),
        (torch.float64, torch.int32, True),
        (torch.bfloat16, torch.int8, True),
        (torch.int32, torch.uint8, True),
        (torch.int8, torch.uint8, False),
        (torch.int64, torch.float16, False),
        (torch.float16, torch.bool, True),
        (torch.bool, torch.uint8, False),
    ],
)
def test_a_dtype_holds_another(wide, dtype, expected):
    assert holds(wide, dtype) is expected
    if not dtype.is_floating_point and dtype != torch.bool and expected:
        limits = torch.tensor([torch.iinfo(dtype).min, torch.iinfo(dtype).max], dtype=dtype)
        assert torch.equal(limits.to(wide).to(dtype), limits)
