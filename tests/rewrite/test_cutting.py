"""Cutting: sizes that stand in the graph follow, the result is a Program like any other, and what cannot be is said."""

from __future__ import annotations

import pytest
import torch
from axis_nets import CASES, IMAGE, TOKENS, conv, group_norm, linear, net, small_net, table
from axis_oracle import choices, cut_errors, cut_program
from torch import nn
from torch.nn import functional

from optpass.analysis.axes import Atom, axes_of
from optpass.analysis.axes.structure import atoms
from optpass.capture.spans import Span
from optpass.evaluate.difference import outputs_difference, program_difference, program_runner
from optpass.interchange.storage import load_program, save_program
from optpass.ir.dialect import verify, verify_shapes
from optpass.ir.text import graph_text
from optpass.ir.weights import Select, Sum
from optpass.pipeline.target import Lowering
from optpass.rewrite.cutting import CutError, cut
from optpass.targets.onnxruntime import OnnxRuntime
from optpass.testing import capture_module


def text(program):
    return graph_text(program.entries["full"])


def test_golden_attention():
    """Heads and their width: shapes follow, and the scale stays that of the captured width of 3."""
    after = cut_program(small_net("q, k, v"), {0: (0, 3), 1: (2,), 2: (0, 1)})
    assert text(after) == GOLDEN
    assert after.weights["q.weight"].shape == (2, 6)
    assert isinstance(after.weights["q.weight"], Select)


GOLDEN = """\
graph(x: f32[2, 5, 6]):
  %linear = linear(%x, @q.weight, @q.bias) : f32[2, 5, 2]  ; q
  %linear_1 = linear(%x, @k.weight) : f32[2, 5, 2]  ; k
  %linear_2 = linear(%x, @v.weight, @v.bias) : f32[2, 5, 4]  ; v
  %reshape = reshape(%linear, [2, 5, 2, -1]) : f32[2, 5, 2, 1]  ; (root)
  %transpose = transpose.int(%reshape, 1, 2) : f32[2, 2, 5, 1]  ; (root)
  %reshape_1 = reshape(%linear_1, [2, 5, 2, -1]) : f32[2, 5, 2, 1]  ; (root)
  %transpose_1 = transpose.int(%reshape_1, 1, 2) : f32[2, 2, 5, 1]  ; (root)
  %reshape_2 = reshape(%linear_2, [2, 5, 2, -1]) : f32[2, 5, 2, 2]  ; (root)
  %transpose_2 = transpose.int(%reshape_2, 1, 2) : f32[2, 2, 5, 2]  ; (root)
  %scaled_dot_product_attention = scaled_dot_product_attention(%transpose, %transpose_1, %transpose_2, \
scale=0.5773502691896258) : f32[2, 2, 5, 2]  ; (root)
  %transpose_3 = transpose.int(%scaled_dot_product_attention, 1, 2) : f32[2, 5, 2, 2]  ; (root)
  %flatten = reshape(%transpose_3, [2, 5, 4]) : f32[2, 5, 4]  ; (root)
  %linear_3 = linear(%flatten, @out.weight, @out.bias) : f32[2, 5, 6]  ; out
  return output=%linear_3"""


def enters(body, **layers):
    """x through a linear to width 8, ``body``, and a linear back from width 8, or that which is given."""
    return net(
        lambda m, x: m.leave(body(m, m.enter(x))),
        TOKENS,
        **{"enter": linear(6, 8), "leave": linear(8, 6), **layers},
    )


BAKED = {
    "reshape": (lambda m, y: y.reshape(10, 8).reshape(2, 5, 8), ["[10, 6]", "[2, 5, 6]"]),
    "expand": (lambda m, y: y + m.table.expand(2, 5, 8), ["expand(@table, [2, 5, 6])"]),
    "zeros": (lambda m, y: y + torch.zeros(8), ["zeros([6]"]),
    "new_full": (lambda m, y: y * y.new_full((5, 8), 2.0), ["[5, 6], 2.0"]),
    "split": (lambda m, y: torch.cat(y.split([4, 4], -1)[::-1], -1), ["split_with_sizes(%linear, [2, 4], -1)"]),
    "chunk": (lambda m, y: torch.cat(y.chunk(2, -1)[::-1], -1), ["split_with_sizes(%linear, [2, 4], 2)"]),
    "tensor_split": (lambda m, y: torch.cat(y.tensor_split(2, -1)[::-1], -1), ["split_with_sizes(%linear, [2, 4], 2)"]),
    "slices": (lambda m, y: torch.cat([y[..., 4:], y[..., :4]], -1), ["(%linear, 2, 2, 6)", "(%linear, 2, 0, 2)"]),
    "narrow": (
        lambda m, y: torch.cat([y.narrow(-1, 4, 4), y.narrow(-1, 0, 4)], -1),
        ["(%linear, -1, 2, 4)", "(%linear, -1, 0, 2)"],
    ),
    "layer norm": (lambda m, y: functional.layer_norm(y, (8,)), ["layer_norm(%linear, [6]"]),
    "rms norm": (lambda m, y: functional.rms_norm(y, (8,)), ["rms_norm(%linear, [6]"]),
}


@pytest.mark.parametrize("name", BAKED)
def test_sizes_in_the_graph_follow(name):
    body, expected = BAKED[name]
    layers = {"table": table(8)} if "table" in body.__code__.co_names else {}
    program = enters(body, **layers)
    split = len(axes_of(program).groups) == 2
    choice = {0: (1, 3)} if split else {0: (0, 2, 3, 5, 6, 7)}
    assert all(line in text(cut_program(program, choice)) for line in expected), text(cut_program(program, choice))
    assert cut_errors(program, [choice])[0] <= 1e-12


@pytest.mark.parametrize(
    ("name", "choice", "line"),
    [
        ("depthwise", {0: (1, 4, 5)}, "conv2d(%conv2d, @depth.weight, @depth.bias, [1, 1], [0, 0], [1, 1], 3)"),
        ("grouped", {0: (1, 3)}, "conv2d(%conv2d, @groups.weight, @groups.bias, [1, 1], [0, 0], [1, 1], 2)"),
        ("grouped", {1: (1,), 2: (0, 2)}, "@groups.bias, [1, 1], [0, 0], [1, 1], 4) : f32[2, 8, 6, 4]"),
        ("transposed, grouped", {0: (1, 3)}, "(%conv2d, @up.weight, @up.bias, [1, 1], [0, 0], [0, 0], 2)"),
        ("repeated", {1: (1,)}, "repeat(%linear, [1, 1, 1])"),
        ("interleaved", {1: (1,)}, "repeat_interleave.self_int(%linear, 1, -1)"),
        ("shared heads, expanded", {0: (1,), 1: (0, 2)}, "expand(%unsqueeze, [2, 1, 2, 5, 3])"),
    ],
)  # fmt: skip
def test_groups_and_repetitions_follow(name, choice, line):
    program = small_net(name)
    assert line in text(cut_program(program, choice)), text(cut_program(program, choice))
    assert cut_errors(program, [choice])[0] <= 1e-12


def test_nothing_asked_for_is_nothing_changed():
    program = small_net("geglu")
    before, found = text(program), axes_of(program)
    [group] = found.groups
    after = cut(program, found, {group.atom: tuple(range(group.size))})
    assert text(after) == before
    assert dict(after.weights) == dict(program.weights)


def rejected(program, choose, match):
    before, weights = text(program), dict(program.weights)
    found = axes_of(program)
    with pytest.raises(CutError, match=match):
        cut(program, found, choose(found))
    assert text(program) == before
    assert dict(program.weights) == weights


@pytest.mark.parametrize(
    ("choose", "match"),
    [
        (lambda g: {g.atom: ()}, "nothing would be left of an axis of size 8"),
        (lambda g: {g.atom: (3, 1)}, "kept indices of an axis of size 8 must ascend within it"),
        (lambda g: {g.atom: (1, 1)}, "must ascend within it"),
        (lambda g: {g.atom: (1, 8)}, "must ascend within it"),
        (lambda g: {g.atom: (-1, 1)}, "must ascend within it"),
        (lambda g: {g.atom: tuple(range(7, -1, -1))}, "must ascend within it"),
        (lambda g: {Atom(8): (1, 2)}, "an axis of size 8 is not one of this Program's weights"),
    ],
)
def test_bad_choices(choose, match):
    rejected(small_net("geglu"), lambda found: choose(found.groups[0]), match)


def test_inputs_and_outputs_are_not_cut():
    program = small_net("geglu")
    [x], result = program.entries["full"].placeholders, program.entries["full"].output_node.args[0][0]
    for node, what in ((x, "input x"), (result, "output output")):
        for dim in range(3):
            match = (
                f"cannot be cut: it is a dimension of the (in|out)put|cannot be cut: it is a dimension of the {what}"
            )
            rejected(program, lambda found, n=node, d=dim: dict.fromkeys(atoms(found.of(n)[d]), (0,)), match)


def test_a_group_norm_that_would_not_divide():
    layers = {"enter": conv(3, 8, 1), "norm": group_norm(4, 8), "leave": conv(8, 4, 1)}
    program = net(lambda m, x: m.leave(m.norm(m.enter(x))), IMAGE, **layers)
    match = "6 channels do not divide into the 4 groups of the norm at norm"
    rejected(program, lambda found: {found.groups[0].atom: range(6)}, match)


def test_a_norm_whose_groups_cross_the_seam_of_a_skip():
    """Each part goes in multiples of the number of groups, and those that stay are in other groups than before."""
    assert max(cut_errors(small_net("group norm over a skip"), [{0: (0, 3, 5, 6)}, {0: (0, 3), 1: (0, 1)}])) <= 1e-12


def test_a_second_cut_of_the_result():
    program = small_net("residual stream")
    first = cut_program(program, {0: (0, 2, 3, 6, 7)})
    assert cut_errors(first, [{0: (1, 4)}])[0] <= 1e-12
    twice, once = cut_program(first, {0: (1, 4)}), cut_program(program, {0: (2, 7)})
    assert text(twice) == text(once)
    assert program_difference(once, twice).max_abs == 0.0


def test_weights_that_are_given_are_taken():
    program = small_net("geglu")
    found = axes_of(program)
    halves = program.weights["leave.weight"]
    merged = Sum(Select(halves, 1, (0, 1, 2, 3)), Select(halves, 1, (4, 5, 6, 7)))
    after = cut(program, found, {found.groups[0].atom: (0, 1, 2, 3)}, {"leave.weight": merged})
    verify_shapes(after)
    assert after.weights["leave.weight"] is merged


def test_it_is_stored_and_loaded(tmp_path):
    program = small_net("grouped")
    after = cut_program(program, choices(axes_of(program)))
    save_program(after, tmp_path)
    loaded = load_program(tmp_path)
    assert text(loaded) == text(after)
    assert program_difference(after, loaded).max_abs == 0.0
    assert loaded.weights["groups.weight"].shape == after.weights["groups.weight"].shape


@pytest.mark.parametrize("name", ["q, k, v", "group norm over a skip"])
def test_it_runs_in_onnx_runtime(tmp_path, name):
    program = small_net(name)
    after = cut_program(program, choices(axes_of(program)))
    entry = OnnxRuntime(threads=1).lower(after, Lowering(tmp_path))["full"]
    record = {"engine": entry.main, "outputs": [spec.as_json() for spec in entry.outputs]}
    inputs = {"x": torch.randn(CASES[name][2])}
    found = OnnxRuntime.load(tmp_path, record, {"threads": 1})(inputs)
    assert outputs_difference(program_runner(after, "full")(inputs), found).relative_error <= 1e-5


def test_half_precision():
    def build():
        return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 6)).half()

    program, module = capture_module(build, input=torch.randn(3, 6).half())
    after = cut_program(program, {0: (0, 1, 4, 7)})
    verify(after)
    verify_shapes(after)
    assert {expression.dtype for expression in after.weights.values()} == {torch.float16}
    kept, (first, norm, _, last) = torch.tensor([0, 1, 4, 7]), module
    x = torch.randn(3, 6).half()
    [(_, found)] = program_runner(after, "full")({"input": x}).items()
    y = functional.linear(x, first.weight[kept], first.bias[kept])
    y = functional.gelu(functional.layer_norm(y, (4,), norm.weight[kept], norm.bias[kept]))
    torch.testing.assert_close(found, functional.linear(y, last.weight[:, kept], last.bias))


class Open(nn.Module):
    """Convolution, group norm, attention over pixels: the batch and both sides may be open."""

    def __init__(self):
        super().__init__()
        self.enter, self.norm, self.leave = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 1)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        y = self.norm(self.enter(x))
        tokens = y.flatten(2).mT
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*tokens.shape)
        return self.leave(y + self.out(attended).mT.reshape(y.shape))


def test_open_sizes_stay_open(capture_shared):
    spans = {"batch": Span(1, 4), "height": Span(2, 8), "width": Span(2, 12)}
    opened = capture_shared(Open, {"x": ("batch", 3, "height", "width")}, spans)
    closed = capture_shared(Open, {"x": (3, 3, 5, 2)}, {})
    choice = choices(axes_of(opened))
    assert choice == choices(axes_of(closed))
    assert len(choice) == 3
    after, expected = cut_program(opened, choice), cut_program(closed, choice)
    verify(after)
    verify_shapes(after)
    inputs = {"x": torch.randn(3, 3, 5, 2)}
    answers = [program_runner(program, "full")(inputs) for program in (expected, after)]
    assert outputs_difference(*answers).relative_error <= 1e-6
    assert cut_errors(opened, [choice])[0] <= 1e-12
