"""An engine's call is the captured module's: arguments, numbers, dtypes, results and attributes."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from torch import nn

from optpass.errors import UserError
from optpass.ir.program import Origin, Program
from optpass.runtime.looped import program_module
from optpass.runtime.module import Config, EngineModule
from optpass.testing import capture_module


@pytest.fixture(scope="module")
def engine(program: Program) -> EngineModule:
    return program_module(program)


def expected(program: Program, sample: torch.Tensor, timestep: float) -> torch.Tensor:
    w = {name: expression.evaluate() for name, expression in program.weights.items()}
    hidden = torch.relu(sample @ w["first.weight"].T + w["first.bias"])
    return (hidden @ w["second.weight"].T + w["second.bias"]) * timestep


SAMPLE = torch.linspace(-1, 1, 12).reshape(2, 6)


@pytest.mark.parametrize(
    "timestep",
    [3, 3.0, torch.tensor(3), torch.tensor([3.0]), np.float64(3.0)],
    ids=["int", "float", "0-d", "1-d", "numpy"],
)
def test_numbers_serve_for_scalar_tensors(timestep: object, engine: EngineModule, program: Program) -> None:
    result = engine(SAMPLE, timestep=timestep)["sample"]
    torch.testing.assert_close(result, expected(program, SAMPLE, 3.0))


def test_positional_and_keyword_arguments(engine: EngineModule) -> None:
    torch.testing.assert_close(engine(SAMPLE, 2)["sample"], engine(timestep=2, sample=SAMPLE)["sample"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_result_has_the_callers_dtype(dtype: torch.dtype, engine: EngineModule) -> None:
    result = engine(SAMPLE.to(dtype), 2)["sample"]
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), engine(SAMPLE, 2)["sample"], atol=0.05, rtol=0.05)


def test_another_shape_says_how_to_rebuild(engine: EngineModule) -> None:
    with pytest.raises(UserError, match=r"'sample' has the shape \[3, 6\].*\[2, 6\].*--inputs sample=3x6"):
        engine(torch.zeros(3, 6), 1)


def test_more_rows_are_answered_in_turns(engine: EngineModule, program: Program) -> None:
    rows = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(engine(rows, 3)["sample"], expected(program, rows, 3.0))


def test_rows_that_do_not_go_together_are_refused() -> None:
    program, _ = capture_module(Sum, left=torch.zeros(2, 3), right=torch.zeros(2, 3))
    module = program_module(program)
    assert module(torch.ones(4, 3), torch.ones(4, 3)).shape == (4, 3)
    # What has the engine's own rows goes into every turn.
    assert torch.equal(module(torch.ones(4, 3), torch.eye(2, 3)), 1 + torch.eye(2, 3).repeat(2, 1))
    with pytest.raises(UserError, match="has the shape"):
        module(torch.ones(4, 3), torch.ones(6, 3))


class Sum(nn.Module):
    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left + right


def test_wrong_arguments_are_named(engine: EngineModule) -> None:
    with pytest.raises(UserError, match="did you mean 'timestep'"):
        engine(SAMPLE, timesteps=1)
    with pytest.raises(UserError, match="'timestep' is required"):
        engine(SAMPLE)
    with pytest.raises(UserError, match="no input 'tmestep'"):
        engine.checked({"sample": SAMPLE, "tmestep": 1})


def test_a_fraction_is_never_lost() -> None:
    class Gate(nn.Module):
        def forward(self, index: torch.Tensor) -> torch.Tensor:
            return index * 2

    module = program_module(capture_module(Gate, index=torch.tensor([1, 2]))[0])
    assert module(torch.tensor([3.0, 4.0])).tolist() == [6, 8]
    with pytest.raises(UserError, match="fractions would be lost"):
        module(torch.tensor([0.5, 1.0]))


def test_a_batch_takes_one_number_as_models_do() -> None:
    class Net(nn.Module):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return sample * timestep[:, None]

    program, _ = capture_module(Net, sample=torch.zeros(2, 3), timestep=torch.zeros(2))
    assert program_module(program)(torch.ones(2, 3), 5).tolist() == [[5.0] * 3] * 2


def test_return_dict_false_gives_a_tuple() -> None:
    from diffusers import UNet2DModel

    def build() -> nn.Module:
        return UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(32,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
        )

    program, module = capture_module(build, sample=torch.zeros(1, 3, 8, 8), timestep=torch.tensor(1))
    engine = program_module(program)
    sample = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        eager = module(sample, 7)
    assert type(engine(sample, 7)) is type(eager)
    torch.testing.assert_close(engine(sample, 7).sample, eager.sample, atol=1e-5, rtol=1e-5)
    for call in (engine(sample, 7, return_dict=False), engine(sample, 7, None, False)):
        assert isinstance(call, tuple)
        torch.testing.assert_close(call[0], eager.sample, atol=1e-5, rtol=1e-5)


def test_attributes_that_pipelines_read(program: Program) -> None:
    from dataclasses import replace

    config = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": 9,
        "block_out_channels": [32],
        "down_block_types": ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 2,
        "projection_class_embeddings_input_dim": 24,
    }
    origin = Origin("diffusers", library="diffusers", class_name="UNet2DConditionModel", config=config)
    engine = program_module(replace(program, origin=origin))
    assert engine.dtype == torch.float32
    assert engine.device == torch.device("cpu")
    assert engine.to("cpu", torch.float16) is engine
    assert engine.dtype == torch.float32
    assert engine.config.in_channels == engine.config["in_channels"] == 9
    assert engine.config.time_cond_proj_dim is None
    assert not hasattr(engine.config, "nonsense")
    assert engine.add_embedding.linear_1.in_features == 24
    assert [(value.dtype, value.numel()) for value in engine.parameters()] == [(torch.float32, 0)]
    assert "added_cond_kwargs" in inspect.signature(engine.forward).parameters
    with pytest.raises(AttributeError, match="enable_freeu is not in the engine"):
        engine.enable_freeu(1, 1, 1, 1)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = engine.nonsense


def test_a_config_of_no_known_class_has_no_defaults() -> None:
    with pytest.raises(AttributeError, match="no 'sample_size'"):
        _ = Config({"_class_name": "os"}).sample_size
