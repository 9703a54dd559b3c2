"""What evaluating weights reads and holds, against files of known size."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

from optpass.analysis.evaluation import held_bytes, read_bytes
from optpass.ir.safetensors_io import read_safetensors
from optpass.ir.weights import Absent, Cast, Concat, Constant, Reshape


def test_bytes_by_expression(tmp_path):
    save_file({"a": torch.zeros(4, 6), "b": torch.zeros(2, 6)}, tmp_path / "w.safetensors")
    stored = read_safetensors(tmp_path / "w.safetensors")
    a, b = stored["a"], stored["b"]
    assert (read_bytes(stored), held_bytes(stored)) == (4 * 36, 0)
    assert (read_bytes({"v": Reshape(a, (24,))}), held_bytes({"v": Reshape(a, (24,))})) == (4 * 24, 0)
    joined = {"v": Cast(Concat((a, b), 0), torch.float16)}
    assert (read_bytes(joined), held_bytes(joined)) == (4 * 36, 2 * 36)
    assert read_bytes({"v": Constant(torch.zeros(3))}) == 0
    assert read_bytes({"v": Absent("v", (5,), torch.float32)}) == 20
