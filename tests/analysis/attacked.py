"""Models and images that the attacks are tested on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

D = torch.float64
X, Y = torch.rand(4, 2, 3, 3), torch.zeros(4, dtype=torch.int64)
MODEL = nn.Sequential(nn.Flatten(), nn.Linear(18, 3))
BIM: dict[str, Any] = {"eps": 0.1, "step_size": 0.04, "num_steps": 5}
SIMBA: dict[str, Any] = {"eps": 0.2, "max_queries": 60}


class Linear(nn.Module):
    """Logits (0, w . x + b): the way to class 1 is along w, to class 0 against it."""

    def __init__(self, w: Tensor, b: float = 0.0) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(w), b

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.w + self.b
        return torch.stack([torch.zeros_like(score), score], 1)


def network(dtype: torch.dtype = D) -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 20, 3)
    )
    net(torch.rand(32, 2, 4, 5))  # statistics
    return net.to(dtype)


def images(n: int = 6, dtype: torch.dtype = D) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 2, 4, 5, dtype=dtype), torch.randint(3, (n,))
