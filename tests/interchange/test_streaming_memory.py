"""Weights pass through a bounded window, whatever holds them: shards, a single file, a pickled file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

COUNT, MEGABYTES = 24, 16
WINDOW = 6 * MEGABYTES
"""Two tensors are alive at a time by design; the allocator returns freed ones when it likes. All are 24."""

STREAM = """
import sys, threading, time
from pathlib import Path
import torch
from optpass.capture.checkpoint_weights import folder_weights
from optpass.interchange.external_data import ExternalData, lazy_tensor
from optpass.ir.safetensors_io import write_safetensors
from optpass.ir.weights import Permute
import onnx_ir

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) // 1024

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.001)

folder, out = map(Path, sys.argv[1:])
torch.set_num_threads(1)
weights = folder_weights(folder)
# What the first call allocates for good.
write_safetensors(dict([next(iter(weights.items()))]), out / "first.safetensors")
start = peak = anonymous()
threading.Thread(target=watch, daemon=True).start()
write_safetensors(weights, out / "copy.safetensors")
values = []
for name, expression in weights.items():
    for order, key in (((0, 1), name), ((1, 0), f"{name}.transposed")):
        tensor = lazy_tensor(key, name, Permute(expression, order))
        values.append(onnx_ir.Value(name=key, const_value=tensor))
graph = onnx_ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 18})
with ExternalData(out / "full.onnx.data") as data:
    data.unload(onnx_ir.Model(graph, ir_version=10), lambda fraction: None)
print(peak - start)
"""


def shards(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    table = {}
    for index, name in enumerate(tensors):
        shard = f"part-{index % 3}.safetensors"
        table[name] = shard
    for shard in set(table.values()):
        save_file({name: tensors[name] for name, place in table.items() if place == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for its anonymous memory")
@pytest.mark.parametrize("kind", ["shards", "safetensors", "pth"])
def test_400_megabytes_stream_through_a_few_tensors(kind: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    block = torch.randn(512, 256).half()
    block = block.repeat(1, (MEGABYTES << 20) // block.nbytes)
    tensors = {f"layer.{index}.weight": (block * (index + 1)).contiguous() for index in range(COUNT)}
    if kind == "shards":
        shards(tensors, tmp_path / "in")
    elif kind == "safetensors":
        save_file(tensors, tmp_path / "in" / "model.safetensors")
    else:
        torch.save(tensors, tmp_path / "in" / "pytorch_model.bin")
    command = [sys.executable, "-c", STREAM, str(tmp_path / "in"), str(tmp_path / "out")]
    megabytes = int(subprocess.check_output(command, text=True).strip())
    assert megabytes <= WINDOW
    written = load_file(tmp_path / "out" / "copy.safetensors")
    assert all(torch.equal(written[name], value) for name, value in tensors.items())
    assert (tmp_path / "out" / "full.onnx.data").stat().st_size == 2 * COUNT * (MEGABYTES << 20)
