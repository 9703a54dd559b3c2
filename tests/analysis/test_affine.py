"""The algebra of affine maps against torch's own operators, and the cover of small graphs by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from optpass.analysis.affine.composition import compose
from optpass.analysis.affine.cover import cheapest_cover
from optpass.analysis.affine.forms import LIMIT, forms_of
from optpass.analysis.affine.maps import Affine, NotExactError, Transposed, Uniform, channelwise
from optpass.analysis.affine.sums import add
from optpass.ir.algebra import Full
from optpass.ir.weights import Constant

CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
TRANSPOSED = {2: functional.conv_transpose2d}
TOLERANCE = 1e-5


def affine(inputs, outputs, kernel=(), *, groups=1, stride=1, padding=0, dilation=1, bias=True):
    torch.manual_seed(len(kernel) + inputs + outputs)
    n = len(kernel)
    each = lambda size: (size,) * n if isinstance(size, int) else size  # noqa: E731
    weight = Constant(torch.randn(outputs, inputs // groups, *kernel))
    shift = Constant(torch.randn(outputs)) if bias else None
    return Affine(weight, shift, groups, each(stride), each(padding), each(dilation))


def evaluate(item, x):
    """The map by torch's operators."""
    if isinstance(item, Uniform):
        return x * item.scale.evaluate() + (0 if item.shift is None else item.shift.evaluate())
    weight, bias = item.weight.evaluate(), None if item.bias is None else item.bias.evaluate()
    if isinstance(item, Transposed):
        rest = (item.stride, item.padding, item.output_padding, item.groups, item.dilation)
        return TRANSPOSED[item.spatial](x, weight, bias, *rest)
    if not item.spatial:
        if item.groups > 1:
            return x * weight[:, 0] + (0 if bias is None else bias)
        return functional.linear(x, weight, bias)
    return CONVOLUTIONS[item.spatial](x, weight, bias, item.stride, item.padding, item.dilation, item.groups)


def assert_same(found, expected):
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def example(channels, spatial):
    return torch.randn(2, channels, *(11, 13, 7)[:spatial]) if spatial else torch.randn(2, 5, channels)


GROUPS = [(1, 1), (1, 12), (12, 1), (12, 12), (2, 4), (3, 2), (4, 12), (12, 6)]


@pytest.mark.parametrize(("outer_groups", "inner_groups"), GROUPS)
@pytest.mark.parametrize("wide", ["outer", "inner"])
def test_composition_of_groups(outer_groups, inner_groups, wide):
    """One side is 3×3 (dilated, strided), the other 1×1 with a stride; every pair of block structures."""
    large = {"kernel": (3, 3), "stride": (2, 1), "dilation": (1, 2)}
    small = {"kernel": (1, 1), "stride": (1, 2)}
    outer = affine(12, 24 if outer_groups < 12 else 12, groups=outer_groups, **(large if wide == "outer" else small))
    inner = affine(12, 12, groups=inner_groups, **(small if wide == "outer" else {**large, "padding": (1, 2)}))
    x = example(12, 2)
    made = compose(outer, inner)
    assert_same(evaluate(made, x), evaluate(outer, evaluate(inner, x)))
    # Blocks nest, and what acts on each channel alone keeps the other's.
    assert made.groups == {12: inner_groups}.get(outer_groups, outer_groups if inner_groups == 12 else made.groups)


@pytest.mark.parametrize("padding", [(0, 1), (2, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_padded_kernel_over_a_pointwise_one_without_bias(padding, stride):
    outer = affine(8, 6, (3, 3), padding=padding, stride=(1, 2), dilation=(2, 1))
    inner = affine(5, 8, (1, 1), stride=stride, padding=(1, 0), bias=False)
    x = example(5, 2)
    assert_same(evaluate(compose(outer, inner), x), evaluate(outer, evaluate(inner, x)))


def test_axes_that_only_one_kernel_has_multiply():
    outer, inner = affine(6, 4, (3, 1), stride=(2, 1)), affine(5, 6, (1, 3), padding=(0, 1))
    x = example(5, 2)
    made = compose(outer, inner)
    assert made.kernel == (3, 3)
    assert_same(evaluate(made, x), evaluate(outer, evaluate(inner, x)))


@pytest.mark.parametrize("spatial", [0, 1, 2, 3])
def test_scalars_and_scales_per_channel_on_both_sides(spatial):
    half = Uniform(Full((), 0.5, torch.float32), Full((), 3.0, torch.float32))
    learned = Uniform(Constant(torch.tensor(0.7)), Constant(torch.tensor(-2.0)))
    diagonal = channelwise(Constant(torch.randn(6)), Constant(torch.randn(6)), spatial)
    dense = affine(6, 6, (1,) * spatial)
    x = example(6, spatial)
    for outer, inner in itertools.permutations((half, learned, diagonal, dense), 2):
        assert_same(evaluate(compose(outer, inner), x), evaluate(outer, evaluate(inner, x)))
        assert_same(evaluate(add(outer, inner), x), evaluate(outer, x) + evaluate(inner, x))


@pytest.mark.parametrize(
    ("outer", "inner", "reason"),
    [
        (affine(4, 4, (3, 3), padding=1), affine(4, 4, (1, 1)), "3×3 kernel pads with zeros.* border would differ"),
        (affine(4, 4, (3, 3), padding=1), Uniform(*(Full((), v, torch.float32) for v in (1.0, 2.0))), "border"),
        (affine(4, 4, (3, 3)), affine(4, 4, (3, 3)), "3×3 kernel over a 3×3 kernel"),
        (affine(4, 4, (1, 1), padding=1), affine(4, 4, (3, 3), bias=False), "padding stands between"),
    ],
)
def test_composition_is_refused(outer, inner, reason):
    with pytest.raises(NotExactError, match=reason):
        compose(outer, inner)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize(("left_groups", "right_groups"), [(1, 1), (4, 2), (12, 1), (6, 12), (4, 6)])
def test_sums_align_kernels_and_nest_groups(stride, dilation, left_groups, right_groups):
    wide = affine(
        12, 12, (5, 3), groups=left_groups, padding=(2 * dilation, dilation), stride=stride, dilation=dilation
    )
    small = affine(12, 12, (1, 3), groups=right_groups, padding=(0, dilation), stride=stride, dilation=(1, dilation))
    x = example(12, 2)
    made = add(small, wide)
    assert made.kernel == (5, 3)
    assert_same(evaluate(made, x), evaluate(small, x) + evaluate(wide, x))


def test_sums_are_refused():
    with pytest.raises(NotExactError, match="strides 1×1 and 2×2"):
        add(affine(4, 4, (1, 1)), affine(4, 4, (1, 1), stride=2))
    with pytest.raises(NotExactError, match=r"kernels 3×3 and 2×2, padded by 1×1 and 0×0, are centred differently"):
        add(affine(4, 4, (3, 3), padding=1, stride=2), affine(4, 4, (2, 2), stride=2))
    with pytest.raises(NotExactError, match="dilations 1×1 and 2×2"):
        add(affine(4, 4, (3, 3), padding=1), affine(4, 4, (3, 3), padding=2, dilation=2))


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_take_scales_per_channel(groups):
    torch.manual_seed(0)
    weight, bias = Constant(torch.randn(6, 4 // groups, 3, 3)), Constant(torch.randn(4))
    up = Transposed(weight, bias, groups, (2, 2), (1, 1), (1, 1), (1, 1))
    behind = channelwise(Constant(torch.randn(4)), Constant(torch.randn(4)), 2)
    before = channelwise(Constant(torch.randn(6)), None, 2)
    x = example(6, 2)
    made = compose(behind, compose(up, before))
    assert isinstance(made, Transposed)
    assert_same(evaluate(made, x), evaluate(behind, evaluate(up, evaluate(before, x))))
    assert made.price((2, 4, 22, 26)).macs == 2 * 11 * 13 * weight.numel
    assert_same(evaluate(add(up, made), x), evaluate(up, x) + evaluate(made, x))
    with pytest.raises(NotExactError, match="transposed"):
        compose(up, channelwise(Constant(torch.randn(6)), Constant(torch.randn(6)), 2))
    with pytest.raises(NotExactError, match="same geometry"):
        add(up, affine(6, 4, (1, 1)))


class Chain(nn.Module):
    def __init__(self, length):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(length)))

    def forward(self, x):
        return self.layers(x)


def test_work_per_node_is_bounded(capture_module):
    program, _ = capture_module(lambda: Chain(200), x=torch.zeros(3, 4))
    forms = forms_of(program.entries["full"], program.weights, lambda node: True)
    assert max(map(len, forms.of.values())) == LIMIT
    assert sum(map(len, forms.of.values())) < LIMIT * 200


class Shared(nn.Module):
    """A low-rank adapter in front of three layers, and maybe of an activation."""

    def __init__(self, also_read):
        super().__init__()
        self.down, self.up, self.also_read = nn.Linear(16, 4), nn.Linear(4, 16), also_read
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        x = torch.relu(x)
        y = x + self.up(self.down(x))
        return self.q(y), self.k(y), self.v(y), torch.relu(y) if self.also_read else x


def test_what_is_shared_is_folded_into_every_reader_or_none(capture_module):
    """By itself no reader saves by folding the adapter, which stays for the others: only all three together do."""
    program, _ = capture_module(lambda: Shared(also_read=False), x=torch.zeros(2, 5, 16))
    graph = program.entries["full"]
    cover = cheapest_cover(graph, forms_of(graph, program.weights, lambda node: True))
    assert [form.root.name for form in cover.chosen.values()] == ["relu"] * 3
    program, _ = capture_module(lambda: Shared(also_read=True), x=torch.zeros(2, 5, 16))
    graph = program.entries["full"]
    cover = cheapest_cover(graph, forms_of(graph, program.weights, lambda node: True))
    assert not cover.chosen
    # The low-rank pair as one layer, the sum with its input, and the three readers past it.
    assert len(cover.left) == 5
