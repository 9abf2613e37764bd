"""A plain convolutional network for CIFAR-10, without shortcuts, so that not everything is seen on ResNets alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvNorm(nn.Module):
    """A 3x3 convolution, batch norm and ReLU, `(N, C_in, H, W) -> (N, C_out, H/stride, W/stride)`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm1(self.conv1(x)))


class PlainNet(nn.Module):
    """Four convolutions, 32-64-128-128 channels, three of them with a stride of 2: 0.24M parameters.

    It has a third of the ResNet-14's multiplications. Its layers are called as there, so that one pattern targets both.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            ConvNorm(3, 32, 2), ConvNorm(32, 64, 2), ConvNorm(64, 128, 1), ConvNorm(128, 128, 2)
        )
        self.classifier = nn.Linear(128, num_classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(self.blocks(pixel_values), 1), 1))
