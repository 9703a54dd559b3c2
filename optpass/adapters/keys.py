"""The names of an adapter's tensors: which module and which factor each one belongs to, in every layout.

- PEFT: ``base_model.model.PATH.lora_A.weight``, ``.lora_B.weight``, ``.lora_magnitude_vector``, ``.hada_w1_a`` …
- diffusers: the same after ``unet.``, ``transformer.``, ``text_encoder.`` …; before peft
  ``PATH.lora.down.weight``, ``PATH.processor.to_q_lora.up.weight``, ``PATH.lora_linear_layer.down.weight``
- kohya-ss/sd-scripts and LyCORIS: ``lora_unet_PATH.lora_down.weight``, ``.lora_up.weight``, ``.lora_mid.weight``,
  ``.alpha``, ``.dora_scale``, ``.hada_w1_a``, ``.lokr_w1`` …, where PATH has underscores for dots
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

COMPONENTS = (
    *("unet", "transformer", "transformer_2", "prior", "controlnet", "vae", "image_encoder"),
    *("text_encoder", "text_encoder_2", "text_encoder_3"),
)
"""Components of diffusers' pipelines that adapters name in front of their modules."""

WRAPPERS = ("base_model.model.", "diffusion_model.")
"""What stands in front of a path and says nothing about it: peft's wrapping, ComfyUI's name of the denoiser."""

FLAT_PREFIXES = {
    "lora_unet_": "unet",
    "lora_transformer_": "transformer",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_prior_unet_": "prior",
    "lora_prior_te_": "text_encoder",
    "lycoris_": "",
}
"""Prefixes of underscored names, and the component that each stands for."""

FACTORS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "dora_scale": "magnitude",
    "alpha": "alpha",
    **{f"hada_{name}": f"hada.{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": f"lokr.{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
"""Ends of names, and what each tensor is; ``hada.`` and ``lokr.`` mark the factors of these kinds."""

UNSUPPORTED = {
    "lora_embedding_A": "a LoRA of an embedding",
    "lora_embedding_B": "a LoRA of an embedding",
    "lora_B.bias": "a bias of the low-rank branch (lora_bias)",
    "lora_A.bias": "a bias of the low-rank branch (lora_bias)",
    "lora_E": "AdaLoRA",
    "lora_ranknum": "AdaLoRA",
    "oft_r": "OFT",
    "oft_R.weight": "OFT",
    "oft_blocks": "OFT",
    "oft_diag": "OFT",
    "boft_R": "BOFT",
    "boft_s": "BOFT",
    "vera_lambda_b": "VeRA",
    "vera_lambda_d": "VeRA",
    "ia3_l": "IA³",
    "on_input": "IA³",
    "diff": "a full difference of weights",
    "diff_b": "a difference of biases",
    "w_norm": "a trained normalisation",
    "b_norm": "a trained normalisation",
    "a1.weight": "GLoRA",
    "a2.weight": "GLoRA",
    "b1.weight": "GLoRA",
    "b2.weight": "GLoRA",
    "hra_u": "HRA",
    "fourierft_spectrum": "FourierFT",
    "bone_": "Bone",
    "miss_block": "MiSS",
    "randlora_lambda": "RandLoRA",
    "randlora_gamma": "RandLoRA",
    "c3a_kernel": "C³A",
    "shira_weight": "SHiRA",
    "bias": "a whole bias (saved by bias: all or lora_only)",
    "weight": "a whole weight (saved by modules_to_save)",
}
"""Ends of names of adapters that are known and not merged."""

PROCESSORS = {"to_q_lora": "to_q", "to_k_lora": "to_k", "to_v_lora": "to_v", "to_out_lora": "to_out.0"}
TEXT_PROCESSORS = {"to_q_lora": "q_proj", "to_k_lora": "k_proj", "to_v_lora": "v_proj", "to_out_lora": "out_proj"}
"""Modules inside an attention, as diffusers' attention processors called them before peft."""

ADAPTER_NAME = re.compile(r"\.(lora_[AB]|lora_magnitude_vector)\.(?!weight$|bias$)[^.]+(\.weight)?$")
"""The adapter's own name, which peft's running models have between the factor and ``weight``."""


@dataclass(frozen=True)
class ModuleKey:
    """A module as an adapter names it: the ``component`` it is of (empty where the file does not say) and its path.

    ``flat`` paths have underscores for dots.
    """

    component: str
    path: str
    flat: bool = False

    def __str__(self) -> str:
        return f"{self.component}.{self.path}" if self.component else self.path


@dataclass(frozen=True)
class TensorKey:
    """One tensor of an adapter: its module, and its ``factor`` there or, where it is ``unsupported``, what it is."""

    module: ModuleKey
    factor: str
    unsupported: str = ""


def parse(key: str) -> TensorKey:
    """The module and the factor of a tensor by its name; nothing is asked about any model."""
    plain = ADAPTER_NAME.sub(lambda found: f".{found[1]}{found[2] or ''}", key).replace(".processor.", ".")
    path, factor = _split(plain, FACTORS)
    if factor:
        return TensorKey(module_key(path), FACTORS[factor])
    path, end = _split(plain, UNSUPPORTED)
    return TensorKey(module_key(path or plain), "", UNSUPPORTED.get(end, "no tensor of an adapter by its name"))


def _split(key: str, ends: Mapping[str, str]) -> tuple[str, str]:
    """Path and end of ``key`` for the longest of ``ends`` that it has: one to three parts of the name."""
    parts = key.split(".")
    for count in range(3, 0, -1):
        end = ".".join(parts[-count:])
        if len(parts) > count and end in ends:
            return ".".join(parts[:-count]), end
        # to_q_lora.down.weight: the end is written onto the module's name.
        module, _, rest = end.partition("_lora.")
        if len(parts) >= count and module and f"{module}_lora" in PROCESSORS and f"lora.{rest}" in ends:
            return ".".join([*parts[:-count], f"{module}_lora"]), f"lora.{rest}"
    return "", ""


def module_key(name: str) -> ModuleKey:
    """A module's name in an adapter → its component and path, prefixes removed."""
    for prefix, component in FLAT_PREFIXES.items():
        if name.startswith(prefix):
            return ModuleKey(component, name.removeprefix(prefix), flat=True)
    component = ""
    for _ in WRAPPERS:
        for wrapper in WRAPPERS:
            name = name.removeprefix(wrapper)
        head, _, rest = name.partition(".")
        if not component and head in COMPONENTS and rest:
            component, name = head, rest
    return ModuleKey(component, _modern(name, component))


def _modern(path: str, component: str) -> str:
    """``path`` with the names of today for an attention processor's modules."""
    parent, _, last = path.rpartition(".")
    names = TEXT_PROCESSORS if component.startswith("text_encoder") else PROCESSORS
    return f"{parent}.{names[last]}" if last in names else path
