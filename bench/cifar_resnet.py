"""The CIFAR ResNets (He et al. 2016, arXiv 1512.03385, section 4.2) and their weights in $WELLREAD_DATA/cifar10-resnets."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from wellread import ImageInput, Network

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Block(nn.Module):
    """Two 3 x 3 convolutions; where the resolution halves, the shortcut takes every second pixel and pads new channels with zeros (option A)."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.pad = stride, (out - width) // 2

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.stride == 1 else F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(skip + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    """Images [B, 3, 32, 32] to logits [B, classes]. blocks: in each of three stages, 3 for ResNet-20, 5 for ResNet-32, 9 for ResNet-56."""

    def __init__(self, blocks: int = 3, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(*[Block(width, width, 1) for _ in range(blocks)])
        self.layer2 = nn.Sequential(Block(width, 2 * width, 2), *[Block(2 * width, 2 * width, 1) for _ in range(blocks - 1)])
        self.layer3 = nn.Sequential(Block(2 * width, 4 * width, 2), *[Block(4 * width, 4 * width, 1) for _ in range(blocks - 1)])
        self.linear = nn.Linear(4 * width, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def network(depth: int = 20, *, pretrained: bool = True) -> Network:
    """ResNet-`depth` (8, 20, 32, 56) for CIFAR-10, with the weights of 20, 32 and 56 when `pretrained`. They were trained on the original pixels."""
    blocks = (depth - 2) // 6
    module = ResNet(blocks)
    if pretrained:
        module.load_state_dict(load_file(Path(os.environ["WELLREAD_DATA"]) / "cifar10-resnets" / f"resnet{depth}.safetensors"))
    architecture = {"family": "class", "name": "bench.cifar_resnet:ResNet", "arguments": {"blocks": blocks}}
    return Network(module, ImageInput((32, 32)), "linear", CLASSES, architecture=architecture)
