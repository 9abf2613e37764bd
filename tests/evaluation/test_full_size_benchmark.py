"""The benchmark at the papers' scale: its data, networks and clock; its rows take a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CIFAR10 = Path(__file__).parents[2] / "benchmarks" / "cifar10"

# In a process of its own: the folders of benchmarks have modules of one name.
CHECKS = """
import math, torch
from dataset import batches
from full_size import NETWORKS, Clock, FullSizeRecipe, NoTimeLeft, choices, part
from torch.utils.data import DataLoader, TensorDataset

data = TensorDataset(torch.randn(10, 3, 32, 32), torch.arange(10))
own, plain = (torch.Generator().manual_seed(3) for _ in range(2))
pairs = zip(batches(data, 4, own), DataLoader(data, 4, shuffle=True, generator=plain), strict=True)
assert all(torch.equal(ours, theirs) for pair in pairs for ours, theirs in zip(*pair, strict=True))
assert torch.equal(torch.cat([labels for _, labels in batches(data, 4)]), data.tensors[1])

images = data.tensors[0]
moved = FullSizeRecipe(1, True).augmented(images, torch.Generator().manual_seed(0))
assert moved.shape == images.shape and moved.is_contiguous(memory_format=torch.channels_last)
padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
for number in range(10):
    crops = [padded[number, :, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    assert any(torch.equal(moved[number], each) for crop in crops for each in (crop, crop.flip(2)))

sizes = {name: sum(p.numel() for p in each.build().parameters()) for name, each in NETWORKS.items()}
assert sizes == {"resnet18": 11_173_962, "vit": 4_771_082}, sizes

names = [row.name for row in choices()]
assert len(set(names)) == len(names), names
first, second = (names[part(text)[0] - 1 :: 2] for text in ("1/2", "2/2"))
assert all("KLToOriginal" in name or "CrossEntropy" in name for name in first), first
assert all("no retain data" in name for name in second), second

Clock(math.inf, 40, 15).check("training")
try:
    Clock(20, 40, 15).check("training")
except NoTimeLeft:
    Clock(20, 40, 15).check("row")
else:
    raise AssertionError("there was no time for it")
"""


@pytest.mark.slow
def test_data_networks_and_clock() -> None:
    done = subprocess.run([sys.executable, "-c", CHECKS], cwd=CIFAR10, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
