"""What is folded, what is declined and why, on small modules; real architectures are in test_reparameterize_models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from optpass.capture.sources import capture
from optpass.evaluate.difference import program_difference
from optpass.ir.graph import shape_of
from optpass.ir.slots import Slot
from optpass.ir.text import graph_text, operator_name
from optpass.ir.weights import LARGEST, Constant, is_larger
from optpass.passes.reparameterize import Reparameterize
from optpass.pipeline.manager import run_pass, run_passes
from optpass.pipeline.recipe import Step
from optpass.pipeline.registry import pass_class
from optpass.pipeline.verification import Verification
from optpass.testing import randomised

STEP = Step("reparameterize", Reparameterize())
RTOL = Reparameterize.contract.rtol
IMAGE = torch.zeros(2, 6, 9, 8)


def reparameterized(program, step=STEP):
    """The result and the record, after what holds for every run: the same function, and nothing left to do."""
    after, record = run_pass(program, step)
    assert program_difference(program, after).relative_error <= RTOL
    _, again = run_pass(after, step)
    assert not again.modified
    assert again.declined == record.declined
    return after, record


def names(program):
    return [operator_name(node) for node in program.entries["full"].calls]


def reasons(record):
    return [item.reason for item in record.declined]


class ConvNorm(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())


def test_golden_convolution_and_batch_norm(capture_module):
    program, _ = capture_module(ConvNorm, input=IMAGE)
    after, record = reparameterized(program)
    assert graph_text(after.entries["full"]) == (
        "graph(input: f32[2, 6, 9, 8]):\n"
        "  %conv2d_default = conv2d(%input_1, @0.weight, @0.bias, [1, 1], [1, 1], [1, 1], 1) : f32[2, 8, 9, 8]  ; 0\n"
        "  %relu = relu(%conv2d_default) : f32[2, 8, 9, 8]  ; 2\n"
        "  return output=%relu"
    )
    assert record.sites == ("1",)
    assert set(after.weights) == {"0.weight", "0.bias"}
    assert not record.declined


class Branches(nn.Module):
    """RepVGG's block and an average pool, as one sum."""

    def __init__(self, stride=1):
        super().__init__()
        self.wide, self.small = (nn.Conv2d(6, 6, k, stride, k // 2, bias=False) for k in (3, 1))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(4))
        self.stride = stride

    def forward(self, x):
        x = torch.relu(x)
        a, b, c, d = self.norms
        y = a(self.wide(x)) + b(self.small(x)) + d(functional.avg_pool2d(x, 3, self.stride, 1))
        return torch.relu(y + c(x) if self.stride == 1 else y)


@pytest.mark.parametrize("stride", [1, 2])
def test_branches_become_one_convolution(capture_module, stride):
    program, _ = capture_module(lambda: Branches(stride), x=IMAGE)
    after, record = reparameterized(program)
    assert names(after) == ["relu", "conv2d", "relu"]
    assert record.sites == ("(root)",)
    assert set(after.weights) == {"wide.weight", "wide.bias"}


class Module(nn.Module):
    """A module of ``layers`` that computes ``function(layers, x)``."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, x)


def of(function, **layers):
    return lambda: Module(function, **{name: make() for name, make in layers.items()})


def linear(*sizes, **options):
    return lambda: nn.Linear(*sizes, **options)


def conv(*sizes, **options):
    return lambda: nn.Conv2d(*sizes, **options)


def batch_norm():
    return nn.BatchNorm1d(6)


def parameter(*shape):
    return lambda: nn.Parameter(torch.ones(shape))


TOKENS = torch.zeros(2, 5, 6)


@pytest.mark.parametrize(
    ("build", "x", "left"),
    [
        (of(lambda m, x: m.b(m.a(x)), a=linear(6, 8), b=linear(8, 4)), TOKENS, ["linear"]),
        (of(lambda m, x: m.b(m.a(x) * 2 - 1), a=linear(6, 6), b=linear(6, 6)), TOKENS, ["linear"]),
        (of(lambda m, x: m.a(x) * m.s + x, a=linear(6, 6), s=parameter(6)), TOKENS, ["linear"]),
        (of(lambda m, x: -(m.a(x / m.s) - m.t), a=linear(6, 6), s=parameter(6), t=parameter(6)), TOKENS, ["linear"]),
        (of(lambda m, x: m.a(1 - x) / m.s, a=linear(6, 6), s=parameter(1)), TOKENS, ["linear"]),
        (of(lambda m, x: m.a(x) @ m.w @ m.w.t(), a=linear(6, 6), w=parameter(6, 6)), TOKENS, ["linear"]),
        (of(lambda m, x: torch.addmm(m.t, x, m.w) * m.t, w=parameter(6, 6), t=parameter(6)), TOKENS[0], ["linear"]),
        (of(lambda m, x: torch.add(x, m.a(x), alpha=-0.3), a=linear(6, 6)), TOKENS, ["linear"]),
        (of(lambda m, x: m.n(m.a(x)), a=linear(6, 8), n=lambda: nn.BatchNorm1d(8)), TOKENS[0], ["linear"]),
        (of(lambda m, x: m.a(m.n(x)), a=conv(6, 8, 3), n=lambda: nn.BatchNorm2d(6)), IMAGE, ["conv2d"]),
        (of(lambda m, x: m.b(m.a(x)), a=conv(6, 6, 1, bias=False), b=conv(6, 6, 3, padding=1)), IMAGE, ["conv2d"]),
        (of(lambda m, x: m.b(m.a(x)), a=conv(6, 6, 3, padding="same"), b=conv(6, 6, 1, stride=2)), IMAGE, ["conv2d"]),
        (of(lambda m, x: m.a(x) * m.s[:, None, None], a=conv(6, 6, 3), s=parameter(6)), IMAGE, ["conv2d"]),
        (of(lambda m, x: x + m.s.view(1, 6, 1, 1) * m.n(x), s=parameter(6), n=lambda: nn.BatchNorm2d(6)), IMAGE, None),
        (of(lambda m, x: m.n(m.a(x).flatten(0, 1)).view(2, 5, 6), a=linear(6, 6), n=batch_norm), TOKENS, ["linear"]),
        (of(lambda m, x: m.b(m.a(x).flatten(0, 1)), a=linear(6, 6), b=linear(6, 6)), TOKENS, ["linear", "reshape"]),
        (of(lambda m, x: (x + 0) * 1.0 / 1 + torch.relu(x.neg().neg())), TOKENS, ["relu", "add.Tensor"]),
    ],
)
def test_chains(capture_module, build, x, left):
    program, _ = capture_module(build, x=x)
    after, _ = reparameterized(program)
    assert names(after) == (left or ["mul.Tensor", "add.Tensor"])


def test_a_batch_norm_written_out_is_folded_behind_simplify(capture_module):
    """DETR's frozen BatchNorm is arithmetic on buffers, which is simplify's business."""
    scale = lambda m: m.n.weight * torch.rsqrt(m.n.running_var + m.n.eps)  # noqa: E731
    shift = lambda m: m.n.bias - m.n.running_mean * scale(m)  # noqa: E731
    wide = lambda v: v.reshape(1, -1, 1, 1)  # noqa: E731
    build = of(
        lambda m, x: torch.relu(m.c(x) * wide(scale(m)) + wide(shift(m))),
        c=conv(6, 8, 3),
        n=lambda: nn.BatchNorm2d(8),
    )
    program, _ = capture_module(build, x=IMAGE)
    _, record = reparameterized(program)
    assert not record.modified
    assert "is arithmetic on weights: fold constants first" in reasons(record)[0]
    simplified, _ = run_pass(program, Step("simplify", pass_class("simplify")()))
    after, _ = reparameterized(simplified)
    assert names(after) == ["conv2d", "relu"]
    assert set(after.weights) == {"c.weight", "c.bias"}


def test_batch_norm_in_one_and_three_dimensions(capture_module):
    for n, convolution, norm in ((1, nn.Conv1d, nn.BatchNorm1d), (3, nn.Conv3d, nn.BatchNorm3d)):
        build = of(lambda m, x: torch.relu(m.n(m.c(x))), c=lambda c=convolution: c(4, 6, 3), n=lambda b=norm: b(6))
        program, _ = capture_module(build, x=torch.zeros(2, 4, *(6, 5, 4)[:n]))
        after, record = reparameterized(program)
        assert names(after) == [f"conv{n}d", "relu"]
        assert len(record.sites) == 1


def test_a_transposed_convolution_takes_the_batch_norm_behind_it(capture_module):
    up = lambda: nn.ConvTranspose2d(6, 4, 3, 2, 1, 1, groups=2)  # noqa: E731
    build = of(lambda m, x: torch.relu(m.n(m.up(x))), up=up, n=lambda: nn.BatchNorm2d(4))
    program, _ = capture_module(build, x=IMAGE)
    after, record = reparameterized(program)
    assert names(after) == ["conv_transpose2d.input", "relu"]
    assert len(record.sites) == 1
    build = of(lambda m, x: m.c(m.up(x)), up=up, c=conv(4, 4, 1))
    program, _ = capture_module(build, x=IMAGE)
    _, record = reparameterized(program)
    [reason] = reasons(record)
    assert "transposed convolution" in reason


def test_normalisations_end_where_every_reader_is_linear(capture_module):
    layers = {"n": lambda: nn.LayerNorm(6), "q": linear(6, 6), "k": linear(6, 4)}
    program, _ = capture_module(of(lambda m, x: (m.q(y := m.n(x)), m.k(y)), **layers), x=TOKENS)
    after, record = reparameterized(program)
    assert record.sites == ("q", "k")
    assert set(after.weights) == {"q.weight", "q.bias", "k.weight", "k.bias"}
    program, _ = capture_module(of(lambda m, x: (m.q(y := m.n(x)), torch.relu(y)), **layers), x=TOKENS)
    after, record = reparameterized(program)
    assert not record.modified
    assert "would save nothing: what lies between has other readers" in reasons(record)[0]
    assert "%layer_norm without its scale and shift" in reasons(record)[0]
    # Three biases of 6 would take the place of one scale and one shift.
    layers = {"n": lambda: nn.LayerNorm(6), **{name: linear(6, 6, bias=False) for name in "qkv"}}
    program, _ = capture_module(of(lambda m, x: (m.q(y := m.n(x)), m.k(y), m.v(y)), **layers), x=TOKENS)
    _, record = reparameterized(program)
    assert not record.modified
    assert all("would hold 42 weight elements, what it replaces holds 36" in reason for reason in reasons(record))


def test_group_norm_and_rms_norm(capture_module):
    build = of(lambda m, x: m.c(m.n(x)), n=lambda: nn.GroupNorm(3, 6), c=conv(6, 4, 1))
    program, _ = capture_module(build, x=IMAGE)
    after, record = reparameterized(program)
    assert len(record.sites) == 1
    assert set(after.weights) == {"c.weight", "c.bias"}
    # The shift would be missing from the zeros that the 3×3 kernel pads with.
    build = of(lambda m, x: m.c(m.n(x)), n=lambda: nn.GroupNorm(3, 6), c=conv(6, 4, 3, padding=1))
    program, _ = capture_module(build, x=IMAGE)
    _, record = reparameterized(program)
    [reason] = reasons(record)
    assert "border would differ" in reason
    build = of(lambda m, x: m.a(m.n(x)), n=lambda: nn.RMSNorm(6), a=linear(6, 4, bias=False))
    program, _ = capture_module(build, x=TOKENS)
    after, _ = reparameterized(program)
    assert set(after.weights) == {"a.weight"}


@pytest.mark.parametrize(
    ("build", "x", "reason"),
    [
        (
            of(lambda m, x: m.b(m.a(x)), a=linear(6, 2), b=linear(2, 6)),
            TOKENS,
            "one linear layer 6→6 on %x would take 360 MAC, what it replaces takes 240 MAC",
        ),
        (
            of(lambda m, x: m.b(m.a(x)), a=conv(6, 6, 3, padding=1, groups=6), b=conv(6, 6, 1)),
            IMAGE,
            "one 3×3 convolution 6→6 on %x would take 46.66 kMAC, what it replaces takes 12.96 kMAC",
        ),
        (
            of(lambda m, x: m.b(m.a(x)), a=conv(6, 6, 1), b=conv(6, 6, 3, padding=1)),
            IMAGE,
            "the 3×3 kernel pads with zeros, where the constant that would be folded into it is added: the border",
        ),
        (
            of(lambda m, x: m.b(m.a(x)), a=conv(6, 6, 3), b=conv(6, 6, 3)),
            IMAGE,
            "a 3×3 kernel over a 3×3 kernel is a larger kernel",
        ),
        (
            of(lambda m, x: m.a(x) + functional.avg_pool2d(x, 2), a=conv(6, 6, 3, stride=2, padding=1)),
            torch.zeros(2, 6, 8, 8),
            "are centred differently",
        ),
        (
            of(lambda m, x: m.b(m.a(x) * torch.sigmoid(m.g(x))), a=linear(6, 6), b=linear(6, 6), g=linear(6, 6)),
            TOKENS,
            "the factor %sigmoid depends on the input",
        ),
        (
            of(lambda m, x: m.a(x) * torch.rsqrt(m.s + 1e-5), a=linear(6, 6), s=parameter(6)),
            TOKENS,
            "the factor %rsqrt is arithmetic on weights: fold constants first",
        ),
        (
            of(lambda m, x: m.a(x) + m.b(x), a=conv(12, 12, 1, groups=3), b=conv(12, 12, 1, groups=4)),
            torch.zeros(1, 12, 2, 2),
            "one 1×1 convolution 12→12 on %x would take 576 MAC, what it replaces takes 336 MAC",
        ),
    ],
)
def test_declines_with_the_reason(capture_module, build, x, reason):
    program, _ = capture_module(build, x=x)
    after, record = reparameterized(program)
    assert not record.modified
    assert graph_text(after.entries["full"]) == graph_text(program.entries["full"])
    assert any(reason in given for given in reasons(record)), reasons(record)


@pytest.mark.parametrize(
    ("build", "x"),
    [
        (of(lambda m, x: m.b(functional.silu(m.a(x))), a=linear(6, 6), b=linear(6, 6)), TOKENS),
        (of(lambda m, x: m.b((y := m.a(x)) * torch.sigmoid(y)), a=linear(6, 6), b=linear(6, 6)), TOKENS),
        (of(lambda m, x: m.a(x).transpose(1, 2) * m.s, a=linear(6, 6), s=parameter(5)), TOKENS),
        (of(lambda m, x: m.a(x) * m.s, a=linear(6, 6), s=parameter(5, 1)), TOKENS),
        (of(lambda m, x: m.b(m.a(x).view(2, 10, 3)), a=linear(6, 6), b=linear(3, 3)), TOKENS),
        (of(lambda m, x: torch.relu(x).flatten(0, 1).view(5, 2, 6)), TOKENS),
        (of(lambda m, x: m.c((x * 2 + 1).view(2, 5, 2, 3).view(2, 5, 3, 2)), c=conv(5, 4, 1)), TOKENS),
        (of(lambda m, x: functional.batch_norm(m.a(x), None, None, training=True), a=conv(6, 6, 1)), IMAGE),
        (of(lambda m, x: m.a(functional.avg_pool2d(x, 2, ceil_mode=True)), a=conv(6, 6, 1)), IMAGE),
        (of(lambda m, x: x + m.a(torch.relu(x)), a=linear(6, 6)), TOKENS),
        (of(lambda m, x: torch.relu(m.n(torch.relu(x))), n=lambda: nn.BatchNorm2d(6)), IMAGE),
        (of(lambda m, x: m.a(x) + m.s, a=linear(6, 6), s=parameter(3, 1, 1, 6)), TOKENS),
    ],
)
def test_is_no_place_of_this_pass(capture_module, build, x):
    program, _ = capture_module(build, x=x)
    _, record = reparameterized(program)
    assert not record.modified


ADVERSARIAL = {
    "huge variance": {"1.running_var": 1e12},
    "tiny variance": {"1.running_var": 1e-12},
    "no variance": {"1.running_var": 0.0},
    "zero gamma": {"1.weight": 0.0},
    "negative gamma": {"1.weight": -1.5},
    "far mean": {"1.running_mean": 1e3},
    "zero kernel": {"0.weight": 0.0},
}


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_adversarial_weights(capture_module, case):
    program, _ = capture_module(lambda: nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)), input=IMAGE)
    changes = {}
    for name, value in ADVERSARIAL[case].items():
        tensor = program.weights[name].evaluate().clone()
        # One channel stays as it was, so that the result has a scale to be judged by.
        tensor[1:] = value
        changes[name] = Constant(tensor)
    _, record = reparameterized(program.with_weights(changes))
    assert len(record.sites) == 1


def test_a_zero_layer_scale(capture_module):
    build = of(lambda m, x: x + m.s * m.a(x), a=linear(6, 6), s=parameter(6))
    program, _ = capture_module(build, x=TOKENS)
    _, record = reparameterized(program.with_weights({"s": Constant(torch.zeros(6))}))
    assert len(record.sites) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_folded_wide_and_rounded_once(capture_module, dtype):
    program, module = capture_module(lambda: ConvNorm().to(dtype), input=IMAGE.to(dtype))
    after, _ = run_pass(program, STEP)
    conv, norm, _ = module
    scale = norm.weight.float() * torch.rsqrt(norm.running_var.float() + norm.eps)
    expected = conv.weight.float() * scale[:, None, None, None]
    found = after.weights["0.weight"].evaluate()
    assert found.dtype == dtype
    # A different order of the three factors may tip a value that lies between two.
    assert int((found != expected.to(dtype)).sum()) <= 0.01 * found.numel()
    torch.testing.assert_close(found.float(), expected, rtol=torch.finfo(dtype).eps, atol=0)
    assert {node.meta["val"].dtype for node in after.entries["full"].calls} == {dtype}
    _, [record] = run_passes(program, [STEP], [Verification("always")])
    assert record.facts["verified"].startswith("held")


def test_a_weight_that_others_read_keeps_its_name(capture_module):
    """Of two layers that share a weight, one is followed by a narrower layer, and one is not."""
    build = of(lambda m, x: (m.b(m.a(x)), m.a(torch.relu(x))), a=linear(6, 8), b=linear(8, 2))
    program, _ = capture_module(build, x=TOKENS)
    after, record = reparameterized(program)
    assert record.sites == ("b",)
    assert set(after.weights) == {"a.weight", "a.bias", "a.merged_weight", "a.merged_bias"}


def test_a_tied_embedding_is_not_copied_for_a_norm(capture_module):
    build = of(
        lambda m, x: functional.linear(m.n(m.e(x)), m.e.weight),
        e=lambda: nn.Embedding(20, 6),
        n=lambda: nn.LayerNorm(6),
    )
    program, _ = capture_module(build, x=torch.zeros(2, 5, dtype=torch.long))
    _, record = reparameterized(program)
    assert not record.modified
    assert reasons(record) == [
        "one linear layer 6→20 on %layer_norm without its scale and shift would hold 140 weight elements,"
        " what it replaces holds 72"
    ]


def test_weights_that_can_be_exchanged_stay_where_they_are(capture_module):
    """An adapter beside a layer, as merge-lora keeps it, is a low-rank pair that would go into the layer."""
    build = of(lambda m, x: m.a(x) + m.up(m.down(x)), a=linear(6, 6), down=linear(6, 2), up=linear(2, 6))
    program, _ = capture_module(build, x=TOKENS)
    assert len(reparameterized(program)[1].sites) == 1
    slots = {
        f"{name}.weight": Slot("a.weight", name, value, value, "style")
        for name in ("down", "up")
        for value in [program.weights[f"{name}.weight"]]
    }
    _, record = reparameterized(program.with_weights(slots))
    assert not record.modified
    assert [(item.path, item.reason) for item in record.declined] == [
        (name, f"@{name}.weight can be exchanged after the build") for name in ("down", "up")
    ]


def test_entries_share_what_is_folded_alike(capture_module):
    program, _ = capture_module(ConvNorm, input=IMAGE)
    both = replace(program, entries={"full": program.entries["full"], "other": program.entries["full"].copy()})
    after, record = reparameterized(both)
    assert record.sites == ("1", "other:1")
    assert set(after.weights) == {"0.weight", "0.bias"}


def test_match_limits_the_pass_to_modules(capture_module):
    program, _ = capture_module(lambda: nn.Sequential(ConvNorm(), nn.Conv2d(8, 6, 1), ConvNorm()), input=IMAGE)
    after, record = reparameterized(program, Step("reparameterize", Reparameterize(match=("2.*",))))
    assert record.sites == ("2.1",)
    assert names(after).count("batch_norm") == 1
    assert Reparameterize(match=("3.*",)).requires(program) == ["match: '3.*' matches no module of the model"]


def test_a_chain_longer_than_a_region_ends_as_one_layer(capture_module):
    program, _ = capture_module(lambda: nn.Sequential(*(nn.Linear(6, 6) for _ in range(40))), input=TOKENS)
    after, _ = reparameterized(program)
    assert names(after) == ["linear"]


FACTORY = """
import torch
from torch import nn

def model():
    strided, pointwise = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 1)
    return nn.Sequential(strided, nn.BatchNorm2d(4), nn.ReLU(), pointwise, nn.BatchNorm2d(4))

def model_inputs():
    return {"input": torch.zeros(2, 3, 9, 8)}
"""


def test_open_sizes_stay_open(tmp_path):
    (tmp_path / "model.py").write_text(FACTORY)
    program = capture(f"{tmp_path}/model.py:model", inputs={"input": ("1..4", 3, "8..32", "8..32")})
    scope: dict = {}
    exec(FACTORY, scope)
    real = randomised(scope["model"]())
    program = program.with_weights({name: Constant(value) for name, value in real.state_dict().items()})
    after, record = reparameterized(program)
    assert record.sites == ("1", "4")
    assert names(after) == ["conv2d", "relu", "conv2d"]
    assert shape_of(after.entries["full"].calls[-1]) == shape_of(program.entries["full"].calls[-1])


def test_an_open_size_is_no_constant(tmp_path):
    """A sum with the number of rows, which is known in the call, parts two layers."""
    text = FACTORY.replace("def model_inputs", "class Shifted(nn.Module):\n    def forward(self, x):\n"
                           "        return x + x.shape[0]\n\ndef model_inputs")  # fmt: skip
    text = text.replace("strided, nn.BatchNorm2d(4), nn.ReLU()", "strided, Shifted()")
    (tmp_path / "model.py").write_text(text)
    program = capture(f"{tmp_path}/model.py:model", inputs={"input": ("1..4", 3, 9, 8)})
    after, record = run_pass(program, STEP)
    assert record.sites == ("3",)
    assert names(after) == ["sym_size.int", "conv2d", "add.Tensor", "conv2d"]


def test_structure_only(tmp_path):
    (tmp_path / "model.py").write_text(FACTORY)
    after, record = run_pass(capture(f"{tmp_path}/model.py:model"), STEP)
    assert record.sites == ("1", "4")
    assert not after.has_values


def test_what_skips_a_layer_does_not_grow_without_bound(capture_module):
    class Skips(nn.Module):
        """Every value is the sum of layers on the two before it: as one expression, of Fibonacci's size."""

        def __init__(self):
            super().__init__()
            self.near, self.far = (nn.ModuleList(nn.Linear(4, 4) for _ in range(40)) for _ in range(2))

        def forward(self, x):
            before = x
            for near, far in zip(self.near, self.far, strict=True):
                before, x = x, near(x) / 2 + far(before) / 2
            return x

    program, _ = capture_module(Skips, x=torch.zeros(2, 4))
    after, record = reparameterized(program)
    assert record.modified
    assert not any(is_larger(weight, 2 * LARGEST) for weight in after.weights.values())


def test_infinite_numbers_stay(capture_module):
    class Infinite(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(x) * torch.inf, self.fc(x + torch.inf)

    program, _ = capture_module(Infinite, x=torch.zeros(2, 4))
    _, record = run_pass(program, STEP)
    assert not record.modified
