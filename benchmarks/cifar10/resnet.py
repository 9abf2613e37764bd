"""The CIFAR ResNet of the benchmark: He et al. 2016 basic blocks, three stages, trained here from scratch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, `(N, C_in, H, W) -> (N, C_out, H/stride, W/stride)`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-14 (two blocks a stage), 32-64-128 channels, stride-2 stem: 0.70M parameters.

    The stride in the stem makes it several times cheaper than ResNet-20 on a CPU at about its accuracy. Without it and
    with 64-128-256-512 channels this is the ResNet-18 of the papers, 11.2M parameters.
    """

    def __init__(
        self, num_classes: int = 10, widths: tuple[int, ...] = (32, 64, 128), blocks: int = 2, stem_stride: int = 2
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, stem_stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        layers: list[nn.Module] = []
        channels = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                layers.append(BasicBlock(channels, width, 2 if stage > 0 and block == 0 else 1))
                channels = width
        self.blocks = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(pixel_values))))
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
