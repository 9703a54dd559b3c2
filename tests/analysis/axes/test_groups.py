"""Groups: what must be cut together, of which kind, under which norms; and what may not be cut, and why."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from axis_nets import TOKENS, conv, group_norm, layer_norm, linear, net, small_net, table
from axis_oracle import check_sizes, choices, cut_errors
from loops import cached

from optpass.analysis.axes import Slice, axes_of
from optpass.analysis.axes.record import axes_record
from optpass.analysis.axes.steps import blocks, norm_groups, removable
from optpass.analysis.axes.structure import atoms
from optpass.ir.graph import path_of
from optpass.rewrite.cutting import CutError, cut


def slices(group):
    return {f"{item.weight}:{item.dim}:{item.role}" for item in group.slices}


def test_slices_of_attention():
    heads, queries, values = axes_of(small_net("q, k, v")).groups
    rows = {f"{name}.weight:0:out" for name in "qkv"} | {"q.bias:0:None", "v.bias:0:None"}
    assert slices(heads) == rows | {"out.weight:1:in"}
    assert slices(queries) == {"q.weight:0:out", "q.bias:0:None", "k.weight:0:out"}
    assert slices(values) == {"v.weight:0:out", "v.bias:0:None", "out.weight:1:in"}
    assert heads.paths == ["q", "k", "v"]
    assert (heads.path, heads.label) == ("q", "q [heads]")


def test_slices_of_a_residual_stream():
    [stream] = axes_of(small_net("residual stream")).groups
    assert slices(stream) == {
        *("enter.weight:0:out", "enter.bias:0:None", "norm.weight:0:scale", "norm.bias:0:None"),
        *("one.weight:1:in", "one.weight:0:out", "one.bias:0:None"),
        *("two.weight:1:in", "two.weight:0:out", "two.bias:0:None", "leave.weight:1:in"),
    }
    assert [path_of(node) for node in stream.norms] == ["norm"]


def test_one_weight_that_two_layers_read():
    """Its rows are read by the one and given by the other: one axis, twice in the weight where it is square."""

    def body(m, x):
        return m.leave(torch.tanh(m.enter(x) @ m.square) @ m.square.T)

    program = net(body, TOKENS, enter=linear(6, 8), square=table(8, 8), leave=linear(8, 6))
    found = axes_of(program)
    assert [group.size for group in found.groups] == [8, 8]
    assert Slice("square", 0) in found.groups[0].slices
    half = choices(found)
    assert max(cut_errors(program, [half, {0: half[0]}, {1: half[1]}])) <= 1e-12


def test_kinds():
    names = ("geglu", "attention in two products", "low rank", "depthwise", "einsum", "heads folded into the batch")
    kinds = {name: [group.kind for group in axes_of(small_net(name)).groups] for name in names}
    assert kinds["geglu"] == ["ffn"]
    assert kinds["attention in two products"] == ["heads", "head-dim", "head-dim"]
    assert kinds["low rank"] == ["stream", "ffn"]
    assert kinds["depthwise"] == ["conv"]
    assert kinds["heads folded into the batch"][1] == "heads"
    assert kinds["einsum"] == ["ffn", "other"]


def test_what_one_layer_writes_is_no_stream():
    """x + γ·(x·n(x)) inside a feed-forward, as ConvNeXt V2 normalises responses."""

    def body(m, x):
        y = m.enter(x)
        return m.leave(y + m.scale * (y * y.norm(dim=1, keepdim=True)))

    [group] = axes_of(net(body, TOKENS, enter=linear(6, 8), scale=table(8), leave=linear(8, 6))).groups
    assert group.label == "enter [ffn]"


def test_every_fixed_axis_says_why_and_where():
    program = net(lambda m, x: m.last(m.first(x).relu()), (2, 3, 8, 6), first=conv(3, 4, 3), last=conv(4, 2, 1))
    found = axes_of(program)
    check_sizes(program, found)
    assert [(item.path, item.atom.size, item.reason) for item in found.fixed] == [
        ("first", 3, "is a dimension of the input x"),
        ("first", 3, "is a convolution's kernel (first)"),
        ("first", 3, "is a convolution's kernel (first)"),
        ("last", 2, "is a dimension of the output output"),
    ]


def test_entries_share_weights_and_states():
    """An axis of a state is one in the entry that writes it and in the one that reads it; all weights follow."""
    program, _ = cached()
    found = axes_of(program)
    check_sizes(program, found)
    [stream] = found.groups
    assert slices(stream) >= {"enter.weight:0:out", "inner.weight:1:in", "inner.weight:0:out", "mix.weight:0:out"}
    (written,) = (n for n in program.entries["full"].calls if "tanh" in str(n.target))
    past = program.entries["reuse"].placeholders[list(program.entries["reuse"].signature.inputs).index("past.deep")]
    assert set(atoms(found.of(written)[-1])) == set(atoms(found.of(past)[-1])) == {stream.atom}
    kept = {stream.atom: (1, 3)}
    after = cut(program, found, kept)
    assert after.loop.states["deep"].shape == (2, 2)
    assert cut_errors(cached()[0], [{0: (1, 3)}])[0] <= 1e-12


def test_without_the_loop_a_state_is_an_input():
    program, _ = cached()
    graph = program.entries["reuse"]
    alone = replace(program, entries={"reuse": graph}, loop=None)
    assert axes_of(alone).groups == ()


def test_a_program_without_weights_has_no_groups():
    program = net(lambda m, x: x.softmax(-1), TOKENS)
    found = axes_of(program)
    assert (found.groups, found.fixed) == ((), ())


def test_what_group_norms_ask_for():
    """Whole groups' worth of channels at a time, and equally many of each block where one norm sees only them."""

    def body(m, x):
        y = m.norm(m.enter(x))
        return m.leave(m.skip_norm(torch.cat([y, m.side(y)], 1)))

    layers = {"enter": conv(3, 8, 1), "norm": group_norm(4, 8), "side": conv(8, 4, 1)}
    program = net(body, (2, 3, 8, 6), **layers, skip_norm=group_norm(2, 12), leave=conv(12, 2, 1))
    found = axes_of(program)
    enter, side = found.groups
    steps = norm_groups(found)
    assert (steps[enter.atom], steps[side.atom]) == (4, 2)
    assert blocks(found, steps) == {enter.atom: 4}
    assert [len(group.norms) for group in found.groups] == [2, 1]
    copy = program.copy()
    again = axes_of(copy)
    with pytest.raises(CutError, match="7 channels do not divide into the 4 groups of the norm at norm"):
        cut(copy, again, {again.groups[0].atom: tuple(range(7))})


@pytest.mark.parametrize(
    ("size", "most", "step", "multiple", "expected"),
    [(8, 3.9, 1, 1, 3), (8, 4, 3, 1, 3), (8, 100, 1, 1, 7), (8, 5, 1, 4, 4), (8, 2, 4, 1, 0), (6, 5, 2, 4, 2)],
)
def test_removable(size, most, step, multiple, expected):
    assert removable(size, most, step, multiple) == expected


def test_the_record_has_it_all():
    program = net(
        lambda m, x: m.leave(m.norm(m.enter(x))), TOKENS, enter=linear(6, 8), norm=layer_norm(8), leave=linear(8, 6)
    )
    record = axes_record(program, axes_of(program))
    assert record["inputs"] == {"full.x": ["batch", "tokens", "channels"]}
    [group] = record["groups"]
    assert (group["path"], group["kind"], group["size"], group["norms"]) == ("enter", "ffn", 8, ["norm"])
    assert {"weight": "leave.weight", "dim": 1, "role": "in"} in group["slices"]
    assert [(item["path"], item["size"], item["reason"]) for item in record["fixed"]] == [
        ("enter", "6", "is a dimension of the input x"),
        ("leave", "6", "is a dimension of the output output"),
    ]
