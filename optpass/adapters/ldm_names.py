"""The names that Stability's code (LDM, SGM) gives to the modules of diffusers' UNet2DConditionModel.

sd-scripts trains SDXL on that code, so its adapters say ``input_blocks.4.1`` for ``down_blocks.1.attentions.0``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
MIDDLE = {("resnets", 0): 0, ("attentions", 0): 1, ("resnets", 1): 2}
RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
INSIDE = re.compile(
    r"(?P<side>down|mid|up)_blocks?\.(?:(?P<block>\d+)\.)?"
    r"(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<layer>\d+)\.(?P<rest>.+)"
)


def ldm_names(paths: Iterable[str]) -> dict[str, str]:
    """LDM's name → module path, for those of ``paths`` that have one; empty for a model that is no such UNet."""
    known = list(paths)
    layers = 1 + max((int(found[1]) for path in known if (found := _first_block(path))), default=-1)
    if layers < 1:
        return {}
    attended = {found["block"] for path in known if (found := INSIDE.match(path)) and _is_attended(found)}
    named = {path: _name(path, layers, attended) for path in known}
    return {name: path for path, name in named.items() if name}


def layout_paths(config: Mapping[str, Any]) -> list[str]:
    """The paths of a UNet of this diffusers configuration on which its names depend; none where it is another model's.

    For where not all of the model's paths are known.
    """
    layers, blocks = config.get("layers_per_block"), config.get("up_block_types")
    count = layers[0] if isinstance(layers, (list, tuple)) and layers else layers
    if not isinstance(count, int) or not isinstance(blocks, (list, tuple)):
        return []
    attended = [number for number, kind in enumerate(blocks) if "Attn" in str(kind)]
    down = [f"down_blocks.0.resnets.{layer}.conv1" for layer in range(count)]
    return [*down, *(f"up_blocks.{number}.attentions.0.proj_in" for number in attended)]


def _first_block(path: str) -> re.Match[str] | None:
    return re.match(r"down_blocks\.0\.resnets\.(\d+)\.", path)


def _is_attended(found: re.Match[str]) -> bool:
    return found["side"] == "up" and found["kind"] == "attentions"


def _name(path: str, layers: int, attended: set[str]) -> str:
    """``layers`` is the number of resnets of a down block, ``attended`` the up blocks that have attentions."""
    found = INSIDE.match(path)
    if found is None:
        return OUTSIDE.get(path, "")
    block, layer = int(found["block"] or 0), int(found["layer"])
    kind, rest = found["kind"], found["rest"]
    inner = RESNET.get(rest, "") if kind == "resnets" else rest
    if found["side"] == "mid":
        position = MIDDLE.get((kind, layer))
        return f"middle_block.{position}.{inner}" if position is not None and inner else ""
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{block * (layers + 1) + layers}.{2 if found['block'] in attended else 1}.{rest}"
    first = 1 + block * (layers + 1) if found["side"] == "down" else block * (layers + 1)
    side = "input_blocks" if found["side"] == "down" else "output_blocks"
    return f"{side}.{first + layer}.{0 if kind == 'resnets' else 1}.{inner}" if inner else ""
