"""The implementations and gradients of each op, as ``define`` writes them down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Op -> backend -> implementation. The implementations of "cuda" are registered by the extension and not here.
_IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {}

_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}  # op -> its gradient
