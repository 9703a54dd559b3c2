"""A published checkpoint of half-precision weights, TAEF2's decoder: from its .pth to ONNX Runtime."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

import optpass as library
from optpass.evaluate.difference import tensor_difference

ROOT = Path(__file__).parents[2]
FACTORY = ROOT / "tests" / "checkpoints" / "taef2.py"
ASSETS = Path(os.environ.get("OPTPASS_ASSETS", ROOT.parent / "shared" / "assets"))
WEIGHTS = ASSETS / "taef2" / "taef2_decoder.pth"

pytestmark = pytest.mark.skipif(
    not WEIGHTS.is_file(), reason=f"{WEIGHTS} is not there; OPTPASS_ASSETS names its folder"
)


@pytest.fixture(scope="module")
def eager():
    sys.path.insert(0, str(FACTORY.parent))
    try:
        from taef2 import Decoder
    finally:
        sys.path.remove(str(FACTORY.parent))
    module = Decoder()
    module.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    return module.eval()


@pytest.fixture
def latents():
    return torch.randn(2, 32, 12, 8, generator=torch.Generator().manual_seed(0))


def test_the_engine_decodes_as_eager_does(optpass, eager, latents, tmp_path):
    out = tmp_path / "bundle"
    flags = ("--weights", WEIGHTS, "--no-baseline", "--json")
    outcome = optpass("apply", "export", f"{FACTORY}:decoder", "-o", out, *flags)
    assert outcome.code == 0, outcome.err
    assert outcome.json["before"]["totals"]["parameters"] == sum(p.numel() for p in eager.parameters())
    with torch.no_grad():
        expected, found = eager(latents), library.load(out)(latents)
    assert found.shape == (2, 3, 96, 64)
    assert float(expected.std()) > 0.05
    assert tensor_difference(expected, found).snr >= 100
