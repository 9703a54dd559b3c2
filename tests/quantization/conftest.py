from __future__ import annotations

import pytest
import torch
from quantized_nets import Attention, Residual

from optpass.testing import capture_module


@pytest.fixture(scope="session")
def residual():
    """The Program of a residual convolutional network."""
    return capture_module(Residual, x=torch.zeros(2, 3, 16, 16))[0]


@pytest.fixture(scope="session")
def attention():
    """The Program of an attention, computed without the fused operator."""
    return capture_module(Attention, x=torch.zeros(2, 6, 16), timestep=torch.zeros(2))[0]
