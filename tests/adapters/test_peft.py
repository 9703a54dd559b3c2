"""Adapters that peft made, merged here and by peft itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapted_layers import Layers, randomise_adapter
from peft import LoHaConfig, LoKrConfig, LoraConfig

from optpass.errors import UserError
from optpass.evaluate.difference import program_difference
from optpass.evaluate.widened import widened
from optpass.passes.merge_lora import MergeLora

DENSE = ["conv_in", "point", "line", "to_q", "to_k"]
ALL = [*DENSE, "grouped"]
PLANE = [name for name in ALL if name != "line"]
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": DENSE}
LYCORIS: dict[str, Any] = {"r": 2, "alpha": 5, "target_modules": ALL}
LOKR: dict[str, Any] = {"alpha": 5, "target_modules": PLANE}

CONFIGS = {
    "lora": LoraConfig(**LORA),
    "rank-stabilised": LoraConfig(**LORA, use_rslora=True),
    "patterns": LoraConfig(
        **LORA, rank_pattern={"to_q": 2, "conv_in": 3}, alpha_pattern={"block.to_q": 9, "^point": 1}
    ),
    "dora": LoraConfig(**LORA, use_dora=True),
    "dora rank-stabilised": LoraConfig(**LORA, use_dora=True, use_rslora=True, rank_pattern={"to_k": 1}),
    "loha": LoHaConfig(**LYCORIS),
    "loha of convolutions": LoHaConfig(**LYCORIS, use_effective_conv2d=True, alpha_pattern={"to_q": 3}),
    "lokr": LoKrConfig(**LOKR, r=1),
    "lokr of convolutions": LoKrConfig(**LOKR, r=1, use_effective_conv2d=True),
    "lokr, both decomposed": LoKrConfig(**LOKR, r=1, decompose_both=True, decompose_factor=4),
    "lokr of full matrices": LoKrConfig(**LOKR, r=64, decompose_both=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_as_peft_merges(peft_adapter, merge, worst_difference, name):
    trained = peft_adapter(CONFIGS[name])
    targets = CONFIGS[name].target_modules
    after, record = merge(trained.program, trained.folder)
    assert len(record.sites) == len(targets)
    assert {path.rpartition(".")[2] for path in record.sites} == set(targets)
    assert not record.declined
    assert worst_difference(after, trained.expected) <= 1e-6
    assert worst_difference(trained.program, trained.expected) > 0.01
    reference = MergeLora(adapter=trained.folder).reference(trained.program)
    assert program_difference(reference, after).relative_error <= 1e-5
    assert program_difference(trained.program, after).relative_error > 1e-3


@pytest.mark.parametrize("name", ["lora", "dora", "loha of convolutions", "lokr"])
def test_half_precision(peft_adapter, merge, worst_difference, name):
    trained = peft_adapter(CONFIGS[name], torch.float16)
    after, _ = merge(trained.program, trained.folder)
    assert {value.dtype for value in after.weights.values()} == {torch.float16}
    assert worst_difference(after, trained.expected) <= 1e-3
    # The contract is about what was computed, not about how it was rounded.
    reference = MergeLora(adapter=trained.folder).reference(trained.program)
    pair = widened(reference, unrounded=True), widened(after, unrounded=True)
    assert program_difference(*pair).relative_error <= 1e-5


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_a_strength_is_a_smaller_alpha(peft_adapter, merge, worst_difference, kind):
    """As peft's ``scale_layer`` has it: a DoRA's norm is of the scaled change."""
    trained = peft_adapter(LoraConfig(**LORA, **kind))
    weaker = peft_adapter(LoraConfig(**{**LORA, "lora_alpha": 6 * 0.7}, **kind))
    after, _ = merge(trained.program, [{"path": trained.folder, "scale": 1.4}], scale=0.5)
    assert worst_difference(after, weaker.expected) <= 1e-6
    assert worst_difference(after, trained.expected) > 1e-3


@pytest.mark.parametrize("order", [("plain", "dora"), ("dora", "plain")], ids=" then ".join)
def test_several_adapters_in_their_order(layers, merge, worst_difference, tmp_path, order):
    from peft import get_peft_model

    real = Layers().eval()
    real.load_state_dict({name: value.evaluate().clone() for name, value in layers.weights.items()})
    configs = {"plain": LoraConfig(**LORA), "dora": LoraConfig(**{**LORA, "r": 2}, use_dora=True)}
    model = get_peft_model(real, configs[order[0]], order[0])
    model.add_adapter(order[1], configs[order[1]])
    randomise_adapter(model)
    model.save_pretrained(tmp_path)
    expected = model.merge_and_unload(adapter_names=list(order)).state_dict()
    given = [{"path": tmp_path / name} for name in order]
    after, record = merge(layers, given)
    assert len(record.sites) == len(DENSE)
    assert worst_difference(after, expected) <= 1e-6
    reference = MergeLora(adapter=given).reference(layers)
    assert program_difference(reference, after).relative_error <= 1e-5


def test_a_grouped_convolution_takes_no_lora_of_peft(layers, merge, tmp_path):
    """peft says so itself; its branch sees all channels, where the weight has those of its group."""
    from peft import get_peft_model

    with pytest.warns(UserWarning, match="Merging is not supported"):
        get_peft_model(Layers(), LoraConfig(r=4, target_modules=["grouped"])).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"grouped.*disagree about the rank; a branch around a grouped convolution"):
        merge(layers, tmp_path)


def test_peft_s_lokr_of_a_one_dimensional_kernel_is_named(layers, merge, tmp_path):
    from peft import get_peft_model

    model = get_peft_model(Layers(), LoKrConfig(r=8, target_modules=["line", "to_q"]))
    randomise_adapter(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"line\.lokr_w1: a LoKr of a one-dimensional convolution as peft orders it"):
        merge(layers, tmp_path)
    _, record = merge(layers, tmp_path, strict=False)
    assert record.sites == ("block.to_q",)
    assert len(record.declined) == 1
