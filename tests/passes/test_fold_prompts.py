from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from optpass.capture.timm_import import timm_importable
from optpass.evaluate.difference import outputs_difference, program_difference, program_runner
from optpass.evaluate.widened import widened
from optpass.ir.text import graph_text, operator_name
from optpass.ir.weights import Absent
from optpass.passes.fold_prompts import FoldPrompts
from optpass.passes.fuse_projections import FuseProjections
from optpass.passes.simplify import Simplify
from optpass.pipeline.manager import run_pass, run_passes
from optpass.pipeline.recipe import Step
from optpass.pipeline.registry import pass_class
from optpass.pipeline.verification import Verification

STEP = Step("fold-prompts", FoldPrompts())
RTOL = FoldPrompts.contract.rtol
WIDTH, HEADS = 8, 2


class Layer(nn.Module):
    """A pre-norm transformer layer; ``attend`` is the attention over heads."""

    def __init__(self, attend=functional.scaled_dot_product_attention):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out, self.fc1, self.fc2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.attend = attend

    def forward(self, x):
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class Prompted(nn.Module):
    """Tokens [cls, rest] through layers; ``prompts`` of every layer stand behind cls, and are replaced by the next's.

    ``pool`` makes the output of the last layer's tokens, of which prompts are 1 to 1 + count.
    """

    def __init__(self, *, depth=2, count=3, layers=None, pool=lambda x: x[:, 0]):
        super().__init__()
        self.layers = nn.ModuleList(layers or [Layer() for _ in range(depth)])
        self.prompts = nn.Parameter(torch.zeros(depth, count, WIDTH))
        self.count, self.pool = count, pool

    def rows(self, index, x):
        return self.prompts[index].expand(x.shape[0], -1, -1)

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            rest = x[:, 1 + self.count :] if index else x[:, 1:]
            x = layer(torch.cat([x[:, :1], self.rows(index, x), rest], 1))
        return self.pool(x)


class Shallow(Prompted):
    def forward(self, x):
        x = torch.cat([x[:, :1], self.rows(0, x), x[:, 1:]], 1)
        for layer in self.layers:
            x = layer(x)
        return self.pool(x)


class Conditional(Prompted):
    def rows(self, index, x):
        return self.prompts[index] + x[:, :1]


def tokens(batch=2):
    return {"x": torch.randn(batch, 6, WIDTH)}


def saving(batch, layers, prompts, others, width):
    """MACs of n prompts in a layer: projections and MLP 12·d² each, and their rows of the attention's two products."""
    return batch * layers * (prompts * 12 * width**2 + 2 * prompts * (others + prompts) * width)


def test_golden(capture_module):
    program, module = capture_module(lambda: Prompted(depth=1), **tokens())
    after, record = run_pass(program, STEP)
    [line] = [
        line for line in graph_text(after.entries["full"]).splitlines() if "attention" in line and "= scaled" in line
    ]
    assert "scaled_dot_product_attention(%transpose_int, %cat_default_1, %cat_default_2)" in line
    assert "f32[2, 2, 6, 4]" in line
    joined = [line for line in graph_text(after.entries["full"]).splitlines() if "= cat" in line or "= expand" in line]
    assert joined == [
        "  %expand_default = expand(@layers.0.prompt_key, [2, 2, 3, 4]) : f32[2, 2, 3, 4]  ; layers.0",
        "  %cat_default_1 = cat([%expand_default, %transpose_int_1], -2) : f32[2, 2, 9, 4]  ; layers.0",
        "  %expand_default_1 = expand(@layers.0.prompt_value, [2, 2, 3, 4]) : f32[2, 2, 3, 4]  ; layers.0",
        "  %cat_default_2 = cat([%expand_default_1, %transpose_int_2], -2) : f32[2, 2, 9, 4]  ; layers.0",
    ]
    assert after.weights["layers.0.prompt_key"].shape == (1, HEADS, 3, WIDTH // HEADS)
    assert "prompts" not in after.weights
    layer = module.layers[0]
    with torch.no_grad():
        key = layer.k(layer.norm1(module.prompts[0])).unflatten(-1, (HEADS, -1)).transpose(0, 1)[None]
    torch.testing.assert_close(after.weights["layers.0.prompt_key"].evaluate(), key)
    assert record.sites == ("layers.0",)
    assert not record.declined
    assert not run_pass(after, STEP)[1].modified


@pytest.mark.parametrize("batch", [1, 2])
def test_every_layer_and_what_it_saves(capture_module, batch):
    program, module = capture_module(lambda: Prompted(depth=3), **tokens(batch))
    after, record = run_pass(program, STEP)
    assert record.sites == ("layers.0", "layers.1", "layers.2")
    totals = record.before.totals, record.after.totals
    assert totals[0].macs - totals[1].macs == saving(batch, 3, 3, 6, WIDTH)
    found = [operator_name(node) for node in after.entries["full"].calls]
    # What is left of the cats and slices between the layers is the tokens as they were.
    assert found.count("cat") == 2 * 3
    x = tokens(batch)
    with torch.no_grad():
        expected = {"output": module(**x)}
    assert outputs_difference(expected, program_runner(after, "full")(x)).relative_error <= RTOL
    assert not run_pass(after, STEP)[1].modified


def test_after_fused_projections(capture_module):
    program, _ = capture_module(lambda: Prompted(depth=2), **tokens())
    steps = [Step("fuse-projections", FuseProjections()), STEP]
    after, records = run_passes(program, steps)
    assert len(records[1].sites) == 2
    assert program_difference(program, after).relative_error <= RTOL


def test_prompts_without_a_class_token_and_a_slice_as_output(capture_module):
    class First(Prompted):
        def forward(self, x):
            for index, layer in enumerate(self.layers):
                x = layer(torch.cat([self.rows(index, x), x[:, self.count :] if index else x], 1))
            return x[:, self.count :]

    program, _ = capture_module(lambda: First(depth=2), **tokens())
    after, record = run_pass(program, STEP)
    assert len(record.sites) == 2
    assert program_difference(program, after).relative_error <= RTOL


def declined(capture_module, build):
    program, _ = capture_module(build, **tokens())
    after, record = run_pass(program, STEP)
    assert not record.modified
    assert graph_text(after.entries["full"]) == graph_text(program.entries["full"])
    return [item.reason for item in record.declined]


def test_shallow_prompts_continue(capture_module):
    assert declined(capture_module, Shallow) == ["prompts continue through the layers (VPT-Shallow, or a class token)"]


def test_prompts_that_depend_on_the_input(capture_module):
    [reason] = declined(capture_module, Conditional)
    assert reason == "the prompts depend on the input: their keys and values are no constants"


def masked(q, k, v):
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(9, 9).tril().bool())


def causal(q, k, v):
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_masks(capture_module):
    [reason] = declined(capture_module, lambda: Prompted(depth=1, layers=[Layer(masked)]))
    assert "mask" in reason
    [reason] = declined(capture_module, lambda: Prompted(depth=1, layers=[Layer(causal)]))
    assert "causal" in reason


def test_rows_that_are_read(capture_module):
    [reason] = declined(capture_module, lambda: Prompted(depth=1, pool=lambda x: x.mean(1)))
    assert "mean" in reason
    [reason] = declined(capture_module, lambda: Prompted(depth=1, pool=lambda x: x))
    assert reason == "the graph returns their rows"
    [reason] = declined(capture_module, lambda: Prompted(depth=1, pool=lambda x: x[:, 2:]))
    assert reason.startswith("prompts continue")
    [reason] = declined(capture_module, lambda: Prompted(depth=1, pool=lambda x: x[:, 3]))
    assert reason.startswith("prompts continue")


def test_the_last_layer_alone_is_declined(capture_module):
    program, _ = capture_module(lambda: Prompted(depth=3, pool=lambda x: x.mean(1)), **tokens())
    after, record = run_pass(program, STEP)
    assert record.sites == ("layers.0", "layers.1")
    assert len(record.declined) == 1
    assert program_difference(program, after).relative_error <= RTOL


def test_half_precision(capture_module):
    def half():
        return Prompted(depth=2).half()

    program, _ = capture_module(half, x=torch.randn(2, 6, WIDTH).half())
    after, record = run_pass(program, STEP)
    assert len(record.sites) == 2
    assert after.weights["layers.0.prompt_key"].dtype == torch.float32
    assert program_difference(widened(program), widened(after)).relative_error <= RTOL
    assert program_difference(program, after).relative_error <= 5e-3


def test_structure_only(capture_module):
    program, _ = capture_module(lambda: Prompted(depth=2), **tokens())
    absent = {name: Absent(name, item.shape, item.dtype) for name, item in program.weights.items()}
    after, record = run_pass(program.with_weights(absent), STEP)
    assert len(record.sites) == 2
    assert not after.has_values


OPEN = """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 8)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.prompts = nn.Parameter(torch.zeros(1, 3, 8))

    def forward(self, x):
        x = torch.cat([x[:, :1], self.prompts.expand(x.shape[0], -1, -1), x[:, 1:]], 1)
        b, n, d = x.shape
        y = self.norm(x)
        q, k, v = (layer(y).view(b, n, 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        return x[:, 0]
"""


@pytest.mark.parametrize("sizes", [["1..4", 6, 8], ["1..4", "3..9", 8]])
def test_open_sizes(capture_open, sizes):
    program = capture_open(OPEN, "{'x': torch.zeros(2, 6, 8)}", {"x": sizes})
    after, record = run_pass(program, STEP)
    assert len(record.sites) == 1
    assert program_difference(program, after).relative_error <= RTOL


class TimmDeep(nn.Module):
    """timm's ViT (query, key and value in one linear), prompts put into every block as VPT's code does."""

    def __init__(self, count=5, depth=12, width=24):
        super().__init__()
        with timm_importable():
            from timm.models.vision_transformer import VisionTransformer
        sizes = {"img_size": (32, 48), "patch_size": 16, "embed_dim": width, "num_heads": 3, "num_classes": 5}
        self.vit = VisionTransformer(depth=depth, **sizes)
        self.prompts, self.count = nn.Parameter(torch.zeros(depth, count, width)), count

    def forward(self, x):
        x = self.vit._pos_embed(self.vit.patch_embed(x))
        for index, block in enumerate(self.vit.blocks):
            rest = x[:, 1 + self.count :] if index else x[:, 1:]
            x = block(torch.cat([x[:, :1], self.prompts[index].expand(x.shape[0], -1, -1), rest], 1))
        return self.vit.forward_head(self.vit.norm(x))


def test_timm_vit_of_twelve_blocks(capture_module):
    program, module = capture_module(TimmDeep, x=torch.randn(2, 3, 32, 48))
    after, record = run_pass(program, STEP)
    assert record.sites == tuple(f"vit.blocks.{index}.attn" for index in range(12))
    assert record.before.totals.macs - record.after.totals.macs == saving(2, 12, 5, 7, 24)
    x = {"x": torch.randn(2, 3, 32, 48)}
    with torch.no_grad():
        expected = {"output": module(**x)}
    assert outputs_difference(expected, program_runner(after, "full")(x)).relative_error <= RTOL


class HubDeep(nn.Module):
    """transformers' ViT (three linears, and a mask that hides nothing), prompts put into every layer."""

    def __init__(self, count=5, depth=12, width=24):
        super().__init__()
        from transformers import ViTConfig, ViTModel

        config = ViTConfig(hidden_size=width, num_hidden_layers=depth, num_attention_heads=3)
        config.update({"intermediate_size": 4 * width, "image_size": [32, 48], "patch_size": 16})
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.prompts, self.count = nn.Parameter(torch.zeros(depth, count, width)), count

    def forward(self, x):
        x = self.vit.embeddings(x)
        for index, layer in enumerate(self.vit.layers):
            rest = x[:, 1 + self.count :] if index else x[:, 1:]
            x = layer(torch.cat([x[:, :1], self.prompts[index].expand(x.shape[0], -1, -1), rest], 1))
        return self.vit.layernorm(x)[:, 0]


def test_transformers_vit_of_twelve_layers(capture_module):
    program, module = capture_module(HubDeep, x=torch.randn(2, 3, 32, 48))
    after, (_, record) = run_passes(program, [Step("simplify", Simplify()), STEP])
    assert record.sites == tuple(f"vit.layers.{index}.attention" for index in range(12))
    assert record.before.totals.macs - record.after.totals.macs == saving(2, 12, 5, 7, 24)
    x = {"x": torch.randn(2, 3, 32, 48)}
    with torch.no_grad():
        expected = {"output": module(**x)}
    assert outputs_difference(expected, program_runner(after, "full")(x)).relative_error <= RTOL


def test_half_precision_after_the_scale_of_a_norm_went_into_the_projections(capture_module):
    program, _ = capture_module(lambda: Prompted().half(), x=tokens()["x"].half())
    steps = [Step("reparameterize", pass_class("reparameterize")()), STEP]
    _, records = run_passes(program, steps, [Verification()])
    assert all(record.modified for record in records)


def test_a_scale_that_depends_on_the_input_is_named(capture_module):
    class Modulated(Layer):
        def forward(self, x):
            return super().forward(x * x[:, :1].sigmoid())

    program, _ = capture_module(lambda: Prompted(layers=[Modulated()], depth=1), **tokens())
    _, record = run_pass(program, STEP)
    assert not record.modified
    assert [item.reason for item in record.declined] == ["layers.0: %mul takes what differs along the batch"]
