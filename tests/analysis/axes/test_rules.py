"""Every rule on a small module: what it leaves free, why the rest is fixed, and that cutting is zeroing."""

from __future__ import annotations

import pytest
import torch
from axis_nets import CASES, TOKENS, linear, net, small_net, table
from axis_oracle import check_sizes, choices, cut_errors
from torch import nn
from torch.nn import functional

from optpass.analysis.axes import Atom, axes_of
from optpass.analysis.axes.rules import RULES, axis_rule
from optpass.analysis.axes.structure import atoms


@pytest.mark.parametrize("name", CASES)
def test_free_axes_and_their_cut(name):
    program = small_net(name)
    found = axes_of(program)
    check_sizes(program, found)
    assert [f"{group.size} {group.label}" for group in found.groups] == CASES[name][-1]
    half = choices(found)
    errors = cut_errors(program, [half, *({i: kept} for i, kept in half.items())])
    assert max(errors) <= 1e-12


REASONS = {
    "softmax": (lambda m, x: m.enter(x).softmax(-1), "8 enter: aten.softmax.int runs over it ((root))"),
    "output": (lambda m, x: m.enter(x), "8 enter: is a dimension of the output output"),
    "maximum": (lambda m, x: m.enter(x).amax(-1), "8 enter: aten.amax.default reduces it ((root))"),
    "largest": (lambda m, x: m.enter(x).max(-1)[0], "8 enter: aten.max.dim reduces it ((root))"),
    "sorted": (lambda m, x: m.enter(x).sort(-1)[0].mean(-1), "8 enter: aten.sort.default runs over it ((root))"),
    "best": (lambda m, x: m.enter(x).topk(3)[0].sum(-1), "8 enter: aten.topk.default runs over it ((root))"),
    "neighbours": (lambda m, x: m.enter(x).diff().sum(-1), "8 enter: aten.diff.default runs over it ((root))"),
    "all": (lambda m, x: m.enter(x).sum(), "8 enter: aten.sum.default reduces it ((root))"),
    "product": (lambda m, x: m.enter(x).prod(-1), "8 enter: aten.prod.dim_int reduces it ((root))"),
    "one": (lambda m, x: m.enter(x)[..., 3], "8 enter: one element is picked from it ((root))"),
    "given places": (lambda m, x: m.enter(x)[..., [3, 1]], "8 enter: is looked up in ((root))"),
    "reversed": (lambda m, x: m.enter(x).flip(-1).mean(-1), "8 enter: its elements change places ((root))"),
    "padded": (lambda m, x: functional.pad(m.enter(x), (1, 0)).mean(-1), "8 enter: is padded ((root))"),
    "misaligned": (
        lambda m, x: (m.enter(x)[:, :3].reshape(2, 4, 6)).softmax(-1),
        "8 enter: reshaped from [3, 8] to [4, 6], which share no border ((root))",
    ),
    "unknown": (
        lambda m, x: torch.cdist(m.enter(x), m.enter(x)),
        "8 enter: aten.cdist.default has no axis rule ((root))",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons_say_what_and_where(name):
    body, reason = REASONS[name]
    program = net(body, TOKENS, enter=linear(6, 8))
    found = axes_of(program)
    check_sizes(program, found)
    assert not found.groups
    assert f"{found.fixed[0].atom.size} {found.fixed[0].path}: {found.fixed[0].reason}" == reason


def test_a_mask_of_two_dimensions_gives_one():
    def body(m, x):
        y = m.enter(x)
        return m.leave(y[:, torch.eye(5, 8) == 0])

    program = net(body, TOKENS, enter=linear(6, 8), leave=linear(35, 6))
    found = axes_of(program)
    check_sizes(program, found)
    assert found.groups == ()
    assert {item.reason for item in found.fixed if item.atom.size == 8} == {"is looked up in by a mask ((root))"}


class Inner(nn.Module):
    def forward(self, x):
        return x.softmax(-1)


def test_a_reason_names_the_module():
    def build():
        return nn.Sequential(nn.Linear(6, 8), Inner(), nn.Linear(8, 6))

    program = net(lambda m, x: m.layers(x), TOKENS, layers=build)
    [fixed] = [item for item in axes_of(program).fixed if item.atom.size == 8]
    assert fixed.paths == ["layers.0"]
    assert fixed.reason == "aten.softmax.int runs over it (layers.1)"


def test_overlapping_rows_of_a_table_of_positions_are_not_one_axis():
    """The first three rows for one axis and the first five for another, as rotary tables are read."""

    def body(m, x):
        return x * m.table[:5] + (x.mT * m.table[:6]).mT

    program = net(body, (2, 5, 6), table=table(9, 1))
    found = axes_of(program)
    rows, columns = found.of(program.entries["full"].placeholders[0])[1:]
    assert not set(atoms(rows)) & set(atoms(columns))
    assert found.groups == ()


def test_slices_of_one_weight_side_by_side_are_its_parts():
    def body(m, x):
        return functional.linear(functional.linear(x, m.table[:4]) * functional.linear(x, m.table[4:8]), m.table[8:].T)

    program = net(body, TOKENS, table=table(12, 6))
    [group] = axes_of(program).groups
    assert (group.size, group.slices[0].weight, len(set(group.slices))) == (4, "table", 1)
    assert cut_errors(program, [{0: (0, 3)}])[0] <= 1e-12


def test_concatenations_of_concatenations_stay_flat():
    """Dense connections: a thousand of them, nested, would be more than Python recurses."""

    def body(m, x):
        for _ in range(4):
            x = torch.cat([x, m.layer(x[..., :6])], -1)
        return x.mean(-1)

    program = net(body, TOKENS, layer=linear(6, 2))
    joined = program.entries["full"].calls[-2]
    structure = axes_of(program).of(joined)[-1]
    assert structure.size == 14
    assert all(isinstance(part, Atom) for part in structure.parts)


def test_a_rule_that_is_wrong_is_not_believed():
    aten = torch.ops.aten

    @axis_rule(aten.cdist.default)
    def cdist(node, walk):
        return walk.of(node.args[0])

    try:
        found = axes_of(net(REASONS["unknown"][0], TOKENS, enter=linear(6, 8)))
    finally:
        del RULES[aten.cdist.default]
    assert found.groups == ()
    assert found.fixed[0].reason == "aten.cdist.default has a wrong axis rule ((root))"


def test_an_authors_rule_holds():
    aten = torch.ops.aten
    assert aten.cdist.default not in RULES

    @axis_rule(aten.cdist.default)
    def cdist(node, walk):
        one, two = walk.of(node.args[0]), walk.of(node.args[1])
        walk.unify(one[-1], two[-1])
        return (*walk.unified(one[:-2], two[:-2]), one[-2], two[-2])

    try:
        body = REASONS["unknown"][0]
        program = net(body, TOKENS, enter=linear(6, 8))
        [group] = axes_of(program).groups
        assert group.label == "enter [ffn]"
        assert cut_errors(program, [{0: (1, 2, 5)}])[0] <= 1e-12
    finally:
        del RULES[aten.cdist.default]
