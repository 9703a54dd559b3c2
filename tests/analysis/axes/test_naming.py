"""Names of axes: they come from the inputs and travel with what is unified."""

from __future__ import annotations

import pytest
import torch
from axis_nets import TOKENS, conv, linear, net
from zoo import saved, small_model

from optpass.analysis.axes import axes_of
from optpass.analysis.operators import FUSED_ATTENTION, argument
from optpass.capture.sources import capture
from optpass.ir.graph import path_of


def captured(case, folder):
    source, options = saved(case, small_model(case), folder / "model")
    return capture(source, inputs=case.inputs, **options)


def named(cases, name):
    return next(case for case in cases if case.name == name)


def input_names(program, found, entry="full"):
    graph = program.entries[entry]
    return {
        name: ["·".join(sorted(found.names(structure))) for structure in found.of(node)]
        for name, node in zip(graph.signature.inputs, graph.placeholders, strict=True)
    }


def token_names(program, found):
    """For every attention, what its queries run over and what is attended to in parallel, beside heads."""
    names = {}
    for node in program.entries["full"].calls:
        if node.target in FUSED_ATTENTION:
            batch, *_, queries, _ = found.of(argument(node, "query"))
            keys = found.of(argument(node, "key"))[-2]
            names[path_of(node)] = tuple("·".join(sorted(found.names(s))) for s in (batch, queries, keys))
    return names


def test_an_image_and_tokens():
    program = net(lambda m, x: m.enter(x), (2, 3, 8, 6), enter=conv(3, 8, 3))
    assert input_names(program, axes_of(program)) == {"x": ["batch", "channels", "height", "width"]}
    program = net(lambda m, x: m.enter(x), TOKENS, enter=linear(6, 8))
    assert input_names(program, axes_of(program)) == {"x": ["batch", "tokens", "channels"]}


def test_names_travel_through_reshapes_and_strides():
    def body(m, x):
        y = m.enter(x)
        return m.leave(y.flatten(2).mT)

    program = net(body, (2, 3, 8, 6), enter=lambda: torch.nn.Conv2d(3, 8, 2, stride=2), leave=linear(8, 4))
    found = axes_of(program)
    reshaped = program.entries["full"].output_node.args[0][0]
    batch, tokens, features = found.of(reshaped)
    assert found.names(batch) == {"batch"}
    assert found.names(tokens) == {"height", "width"}
    assert found.names(features) == frozenset()


def test_a_unet(tmp_path):
    from cases_diffusers import CASES

    program = captured(named(CASES, "SD 1.5 UNet"), tmp_path)
    found = axes_of(program)
    assert input_names(program, found) == {
        "sample": ["batch", "channels", "height", "width"],
        "timestep": [],
        "encoder_hidden_states": ["batch", "tokens", "channels"],
    }
    attentions = token_names(program, found)
    pixels = ("batch", "height·width")
    assert {names for path, names in attentions.items() if path.endswith("attn1")} == {(*pixels, "height·width")}
    assert {names for path, names in attentions.items() if path.endswith("attn2")} == {(*pixels, "tokens")}


def test_a_video_unet_attends_over_frames_in_its_temporal_blocks(tmp_path):
    from cases_diffusers import CASES

    program = captured(named(CASES, "SVD UNet"), tmp_path)
    found = axes_of(program)
    assert input_names(program, found)["sample"] == ["batch", "frames", "channels", "height", "width"]
    attentions = token_names(program, found)
    temporal = {names[1] for path, names in attentions.items() if "temporal_transformer" in path}
    spatial = {names[1] for path, names in attentions.items() if "temporal_transformer" not in path}
    assert temporal == {"frames"}
    assert spatial == {"height·width"}


@pytest.mark.parametrize(
    ("name", "input_name", "expected"),
    [
        ("Wan 2.1 text-to-video 1.3B", "hidden_states", ["batch", "channels", "frames", "height", "width"]),
        ("ViT", "pixel_values", ["batch", "channels", "height", "width"]),
    ],
)
def test_transformers(tmp_path, name, input_name, expected):
    import cases_diffusers
    import cases_transformers

    program = captured(named([*cases_diffusers.CASES, *cases_transformers.CASES], name), tmp_path)
    found = axes_of(program)
    assert input_names(program, found)[input_name] == expected
    queries = {names[1] for names in token_names(program, found).values()}
    assert queries == {"·".join(sorted(set(expected) - {"batch", "channels"}))}
