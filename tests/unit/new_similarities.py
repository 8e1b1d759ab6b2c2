"""Three similarities that nobody has written before, in plain torch: no derivative, no kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softsign


def softsign_squared(score: Tensor) -> Tensor:
    """(s / (1 + |s|))^2"""
    return softsign(score).square()


def log_power(score: Tensor) -> Tensor:
    """log(1 + exp(s))^1.5"""
    return torch.log1p(score.exp()).pow(1.5)


def gaussian_slope(score: Tensor) -> Tensor:
    """s exp(-s^2) + 1"""
    return score * torch.exp(-score * score) + 1
