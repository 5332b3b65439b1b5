"""ResNet-18 in its CIFAR form (He et al., arXiv 1512.03385): images of 32 x 32, so a 3x3 stem and no max pooling.

Four stages of two basic blocks, 64, 128, 256 and 512 channels times ``width``; the first block of stages 2 to 4 has
stride 2 and a 1x1 convolution as shortcut (option B).
"""

from __future__ import annotations

from collections import OrderedDict
from fractions import Fraction

from torch import Tensor, nn

STAGES = (64, 128, 256, 512)
BLOCKS = 2


class Block(nn.Module):
    """ReLU(norm(conv(ReLU(norm(conv(x))))) + shortcut(x))."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != channels:
            projection = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet18(width: Fraction | int | str = 1, classes: int = 10) -> nn.Sequential:
    """Build a network (n, 3, 32, 32) -> (n, classes) with BatchNorm.

    Its convolutions begin as those of He et al. do (arXiv 1502.01852).

    Raises:
        ValueError: ``width`` times 64 is not an integer of at least 1.
    """
    channels = [stage * Fraction(width) for stage in STAGES]
    if channels[0] < 1 or channels[0].denominator != 1:
        raise ValueError(f"width: expected a positive multiple of 1/{STAGES[0]}, got {width}")
    widths = [int(c) for c in channels]
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(3, widths[0], 3, padding=1, bias=False),
        norm=nn.BatchNorm2d(widths[0]),
        relu=nn.ReLU(inplace=True),
    )
    before = widths[0]
    for stage, c in enumerate(widths, start=1):
        strides = [1 if stage == 1 else 2, *[1] * (BLOCKS - 1)]
        blocks = [Block(before if i == 0 else c, c, stride) for i, stride in enumerate(strides)]
        layers[f"stage{stage}"] = nn.Sequential(*blocks)
        before = c
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "classifier": nn.Linear(before, classes)}
    model = nn.Sequential(layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
