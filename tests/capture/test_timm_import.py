"""``import timm`` beside a torchvision that loads, one that does not, and none."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is an optional extra")

WORKS = {
    "__init__.py": "",
    "ops/__init__.py": "",
    "ops/misc.py": "class FrozenBatchNorm2d:\n    def __init__(self, features): self.mine = features\n",
    "transforms/__init__.py": "class ToTensor: pass\n",
    "transforms/functional.py": (
        "import enum\nnames = 'NEAREST BILINEAR BICUBIC BOX HAMMING LANCZOS'\n"
        "InterpolationMode = enum.Enum('InterpolationMode', names)\n"
    ),
    "datasets.py": "CIFAR100 = CIFAR10 = MNIST = KMNIST = FashionMNIST = ImageFolder = object\n",
}
BROKEN = {
    "__init__.py": "from torchvision import half\nraise RuntimeError('operator torchvision::nms does not exist')\n",
    "half.py": "",
}
CODE = """
import sys
from optpass.capture.timm_import import timm_importable
with timm_importable():
    import timm
assert timm.create_model("resnet18", num_classes=2).fc.out_features == 2
assert type(timm.__loader__).__name__ == type(timm.models.__loader__).__name__
{after}
"""
FAILS_AS_BEFORE = """
assert not any(name.startswith("torchvision.o") for name in sys.modules)
try:
    timm.layers.norm_act.FrozenBatchNorm2d(3)
except Exception as error:
    print(error)
try:
    import torchvision
except (ImportError, RuntimeError) as error:
    print(error)
"""


def run(code: str, folder: Path, torchvision: dict[str, str] | None) -> str:
    if torchvision is None:
        code = f"import sys\nsys.modules['torchvision'] = None\n{code}"
    for name, content in (torchvision or {}).items():
        path = folder / "torchvision" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    code = f"import sys\nsys.path.insert(0, {str(folder)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_torchvision_that_loads_is_used(tmp_path: Path) -> None:
    after = "print(timm.layers.norm_act.FrozenBatchNorm2d(3).mine, sys.modules['torchvision'].__file__)"
    assert run(CODE.format(after=after), tmp_path, WORKS) == f"3 {tmp_path / 'torchvision' / '__init__.py'}\n"


@pytest.mark.parametrize(
    ("torchvision", "reason", "again"),
    [
        (None, "is not installed", "halted"),
        (
            BROKEN,
            r"does not load (operator torchvision::nms does not exist)",
            "operator torchvision::nms does not exist",
        ),
    ],
    ids=["none", "broken"],
)
def test_without_one_timm_says_what_is_missing_when_it_is_needed(
    tmp_path: Path, torchvision: dict[str, str] | None, reason: str, again: str
) -> None:
    needed, after = run(CODE.format(after=FAILS_AS_BEFORE), tmp_path, torchvision).splitlines()
    assert needed == (
        f"timm needs torchvision's FrozenBatchNorm2d here, and torchvision {reason}: "
        "install the torchvision that was built for this torch"
    )
    assert again in after


def test_a_factory_may_import_timm_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import timm\nfrom timm.layers import trunc_normal_\n\n"
        "def net():\n    return timm.create_model('resnet18', num_classes=2)\n"
    )
    code = (
        "from optpass.capture.sources import capture\n"
        f"program = capture({str(tmp_path / 'net.py')!r} + ':net', inputs={{'x': [1, 3, 64, 96]}})\n"
        "print(program.entries['full'].outputs[0].shape, 'torchvision' in sys.modules)"
    )
    assert run(code, tmp_path, BROKEN) == "(1, 2) False\n"
