"""Modules of the positional plugins, in a file of their own because it imports torch."""

from __future__ import annotations

import torch
from torch import Tensor


class Sinusoidal(torch.nn.Module):
    """int64 positions [s] -> float32 [s, size]: sines of all frequencies, then cosines."""

    def __init__(self, size: int, base: float) -> None:
        super().__init__()
        self.size = size
        self.base = base

    def forward(self, position_s: Tensor) -> Tensor:
        exponent = torch.arange(0, self.size, 2, dtype=torch.float32, device=position_s.device) / self.size
        angle = position_s.float()[:, None] * self.base**-exponent
        return torch.cat([angle.sin(), angle.cos()], -1)
