"""Reports as the pipeline writes them: a structure-only run on SVD, a full run on moving digits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from optpass.report.clips import Clips

Report = dict[str, Any]


def cost(parameters: float, macs: float, attention: float, weights: float, peak: float) -> Report:
    totals = {
        "parameters": parameters,
        "macs": macs,
        "macs_attention": attention,
        "weight_bytes": weights,
        "peak_activation_bytes": peak,
    }
    return {"entries": {"full": {"totals": totals}}, "totals": totals}


def svd_sites() -> list[str]:
    places = [f"down_blocks.{b}.attentions.{a}" for b in range(3) for a in range(2)] + ["mid_block.attentions.0"]
    places += [f"up_blocks.{b}.attentions.{a}" for b in range(1, 4) for a in range(3)]
    return [
        f"{place}.{kind}.0.attn2" for place in places for kind in ("transformer_blocks", "temporal_transformer_blocks")
    ]


def make_pass(name: str, before: Report, after: Report, **given: Any) -> Report:
    record: Report = {
        "name": name,
        "summary": "Cross-attention to one context token: its softmax is 1, so the output is to_out(to_v(context)).",
        "options": {},
        "contract": "exact to 1e-05",
        "modified": before != after,
        "sites": 0,
        "site_paths": [],
        "declined": [],
        "seconds": 0.61,
        "before": before,
        "after": after,
        "difference": None,
        "verified": "not verified: captured structure-only",
    }
    record.update(given)
    if record["site_paths"]:
        record["sites"] = len(record["site_paths"])
    return record


@pytest.fixture
def svd_report() -> Report:
    before = cost(1_524_623_082, 4.2295e12, 3.87e11, 6_098_492_328, 3_221_225_472)
    after = cost(1_474_283_562, 4.038e12, 3.71e11, 5_897_134_248, 3_221_225_472)
    step = make_pass("single-token-attention", before, after, site_paths=svd_sites())
    return {
        "schema_version": 1,
        "optpass": "0.1.0",
        "created": "2026-11-21T05:40:12+00:00",
        "name": "MobileVD: exact cross-attention",
        "description": "Cross-attention to a single image token needs no queries or keys.",
        "recipe": {
            "name": "MobileVD: exact cross-attention",
            "description": "Cross-attention to a single image token needs no queries or keys.",
            "inputs": {"sample": [1, 14, 8, 32, 64], "encoder_hidden_states": [1, 1, 1024]},
            "passes": [{"single-token-attention": {}}],
            "gates": [],
            "target": {"onnxruntime": {"threads": 2, "opset": 20}},
        },
        "checkpoint": {
            "name": "stable-video-diffusion-img2vid",
            "kind": "diffusers",
            "class": "UNetSpatioTemporalConditionModel",
            "component": "unet",
            "sha256": "9f2c" * 16,
            "pipeline": "",
        },
        "structure_only": True,
        "before": before,
        "after": after,
        "passes": [step],
        "gates": [],
        "target": {"name": "onnxruntime", "options": {"threads": 2, "opset": 20}, "verified": "not run"},
        "engines": [],
        "engine_difference": None,
        "latency": None,
        "samples": None,
        "machine": {"processor": "x86_64", "cores": 2, "threads": 2, "torch": "2.13.0+cpu", "python": "3.11.9"},
        "seconds": 14.2,
    }


@pytest.fixture
def digits_report(svd_report: Report) -> Report:
    whole = cost(5_214_884, 1.2512e9, 4.8e7, 20_859_536, 9_961_472)
    single = cost(4_902_308, 1.2391e9, 4.6e7, 19_609_232, 9_961_472)
    half = cost(4_902_308, 1.2391e9, 4.6e7, 9_804_616, 4_980_736)
    declined = [
        {
            "entry": "full",
            "path": "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
            "node": "scaled_dot_product_attention",
            "reason": "self-attention: keys come from 256 tokens, not from one",
        },
        {
            "entry": "full",
            "path": "mid_block.attentions.0.temporal_transformer_blocks.0.attn1",
            "node": "scaled_dot_product_attention_7",
            "reason": "self-attention: keys come from 8 tokens, not from one",
        },
        {
            "entry": "full",
            "path": "up_blocks.2.attentions.0.temporal_transformer_blocks.0.attn1",
            "node": "scaled_dot_product_attention_9",
            "reason": "self-attention: keys come from 8 tokens, not from one",
        },
    ]
    exact = {"max_abs": 8.3e-7, "relative_error": 3.1e-7, "snr": 128.4}
    lossy = {"max_abs": 2.1e-3, "relative_error": 7.4e-4, "snr": 66.2}
    passes = [
        make_pass(
            "single-token-attention",
            whole,
            single,
            site_paths=svd_sites()[:12],
            declined=declined,
            difference=exact,
            verified="held: 3.1e-07 ≤ 1e-05",
            seconds=0.184,
        ),
        make_pass(
            "cast",
            single,
            half,
            summary="Weights and compute in another floating type.",
            options={"dtype": "float16", "keep": ["*.norm*", "time_embedding.*"]},
            site_paths=["conv_in", "time_embedding.linear_1", "down_blocks.0.resnets.0.spatial_res_block.conv1"],
            contract="approximate",
            difference=lossy,
            verified="measured",
            seconds=0.042,
        ),
        make_pass(
            "merge-lora",
            half,
            half,
            summary="Adds a low-rank adapter to the weights that it adapts.",
            difference={"max_abs": 0.0, "relative_error": 0.0, "snr": math.inf},
            verified="held: 0 ≤ 1e-05",
            seconds=0.0007,
        ),
    ]
    quality = {"frame_accuracy": 0.984, "temporal_consistency": 0.931, "frechet_distance": 4.17}
    return {
        **svd_report,
        "name": "digits on a laptop",
        "description": "Trained digits, half precision, one engine for ONNX Runtime.",
        "recipe": {
            "name": "digits on a laptop",
            "inputs": {"sample": [2, 8, 4, 16, 16]},
            "passes": [
                {"single-token-attention": {}},
                {"cast": {"dtype": "float16", "keep": ["*.norm*", "time_embedding.*"]}},
                {"merge-lora": {"adapter": "rain.safetensors", "scale": 0.8}},
            ],
            "gates": [{"after": "cast", "metric": "psnr", "min": 40.0}],
            "target": {"onnxruntime": {"threads": 2}},
        },
        "checkpoint": {**svd_report["checkpoint"], "name": "tests/checkpoints/moving-digits", "kind": "diffusers"},
        "structure_only": False,
        "before": whole,
        "after": half,
        "passes": passes,
        "gates": [
            {
                "after": "cast",
                "metric": "psnr",
                "min": 40.0,
                "value": 58.2,
                "held": True,
                "clips": 8,
                "steps": 20,
                "seed": 0,
            }
        ],
        "target": {"name": "onnxruntime", "options": {"threads": 2}, "verified": "numerics"},
        "engines": [
            {
                "entry": "full",
                "file": "engines/full.onnx",
                "bytes": 10_212_442,
                "nodes": 1571,
                "details": {"opset": 20, "providers": ["CPUExecutionProvider"], "data": "engines/full.onnx.data"},
            }
        ],
        "engine_difference": {"max_abs": 2.3e-3, "relative_error": 8.1e-4, "snr": 65.7},
        "latency": {
            "unit": "ms",
            "before": {"label": "original", "median": 41.7, "p10": 39.9, "p90": 47.2, "runs": 20},
            "after": {"label": "optimised", "median": 36.2, "p10": 35.1, "p90": 40.8, "runs": 20},
            "ratio": {"median": 0.871, "p10": 0.842, "p90": 0.913, "certain": True},
            "note": "",
        },
        "samples": {
            "labels": list("0123456789")[:6],
            "steps": 20,
            "guidance": 2.0,
            "seed": 0,
            "psnr": 58.2,
            "quality_before": quality,
            "quality_after": {**quality, "frechet_distance": 4.19},
        },
        "seconds": 71.4,
    }


@pytest.fixture
def make_clips() -> Callable[..., Clips]:
    """Rings that move and bounce, and the same with noise."""

    def make(count: int = 6, frames: int = 8, size: tuple[int, int] = (32, 32), *, noise: float = 0.002) -> Clips:
        generator = torch.Generator().manual_seed(3)
        before = torch.stack([disc(index, frames, size) for index in range(count)])
        after = (before + noise * torch.randn(before.shape, generator=generator)).clamp(0, 1)
        return Clips(labels=tuple(str(index) for index in range(count)), before=before, after=after)

    return make


def disc(index: int, frames: int, size: tuple[int, int]) -> Tensor:
    """A ring on a bouncing path, [frames, 1, height, width]; a different one for every index."""
    height, width = size
    ys, xs = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    radius = min(size) / 5
    pictures = []
    for frame in range(frames):
        x = radius + (width - 2 * radius) * abs(((0.13 * frame + 0.21 * index) % 2) - 1)
        y = radius + (height - 2 * radius) * abs(((0.21 * frame + 0.37 * index) % 2) - 1)
        distance = ((xs - x) ** 2 + (ys - y) ** 2).sqrt()
        pictures.append((1 - (distance - radius * (0.4 + 0.1 * (index % 4))).abs() / 2.5).clamp(0, 1))
    return torch.stack(pictures).unsqueeze(1)
