"""A published checkpoint of half-precision weights, TAEF2's decoder: from its .pth to ONNX Runtime."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

import optpass as library
from optpass.errors import UserError
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


def latents(*sizes):
    batch, height, width = sizes
    return torch.randn(batch, 32, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The decoder with open batch, height and width."""
    from optpass.pipeline.apply import apply
    from optpass.pipeline.recipe import find_recipe, load_recipe
    from optpass.pipeline.request import Request

    out = tmp_path_factory.mktemp("taef2") / "bundle"
    sizes = {"latents": ["1..4", 32, "4..32", "4..32"]}
    request = Request(f"{FACTORY}:decoder", out, weights=WEIGHTS, inputs=sizes, dtype="float32", baseline=False)
    return apply(load_recipe(find_recipe("export")), request)


def test_every_published_parameter_is_in_the_engine(bundle, eager):
    totals = bundle.report["before"]["totals"]
    assert totals["parameters"] == sum(parameter.numel() for parameter in eager.parameters())


@pytest.mark.parametrize("sizes", [(2, 12, 8), (1, 4, 32), (4, 9, 5)])
def test_the_engine_decodes_as_eager_does_at_any_size(bundle, eager, sizes):
    with torch.no_grad():
        expected, found = eager(latents(*sizes)), library.load(bundle.folder)(latents(*sizes))
    assert found.shape == (sizes[0], 3, 8 * sizes[1], 8 * sizes[2])
    assert float(expected.std()) > 0.05
    assert tensor_difference(expected, found).snr >= 100


def test_a_size_outside_the_declared_range_is_refused_by_name(bundle):
    with pytest.raises(UserError, match=r"latents\[2\] is 40, and the engine was built for 4\.\.32"):
        library.load(bundle.folder)(latents(1, 40, 8))


def test_the_command_takes_the_factory_and_its_weights(optpass, eager, tmp_path):
    flags = ("--weights", WEIGHTS, "--dtype", "float32", "--no-baseline", "--inputs", "latents=1x32x6x4")
    outcome = optpass("apply", "export", f"{FACTORY}:decoder", "-o", tmp_path / "bundle", *flags)
    assert outcome.code == 0, outcome.err
    with torch.no_grad():
        expected, found = eager(latents(1, 6, 4)), library.load(tmp_path / "bundle")(latents(1, 6, 4))
    assert tensor_difference(expected, found).snr >= 100
