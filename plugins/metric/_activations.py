"""The tensors behind the metric plugins of ``sinkbench_plugins.metric.activations``.

Shape suffixes: l layer, b sequence, s position, n hidden size. Positions count from 1, hidden
dimensions from 0 (both as the literature does).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sinkbench.api import LayerCapture, Observation

from ._measures import POSITIONS_KEPT, Result, stacked


class MassiveActivations:
    """Activations |h| > absolute and >= relative * median |h| of the sequence, in the residual stream
    after a layer (Sun et al. 2402.17762: above 100 and about 1000 times the median).

    Floats:
        massive_activations: percent of sequences and layers that have one; NaN for a diverged model.
        massive_activation_top, massive_activation_median: largest |h| of any layer, mean over
            sequences, and the median |h| of that layer.

    Lists:
        massive_activations_layers, massive_activation_top_layers, massive_activation_median_layers:
            [layer].
        massive_dimensions: [layer][dimension number]: where any sequence has one.
        massive_positions: [layer][position]: at which of the first 64 tokens any sequence has one.
    """

    def __init__(self, *, absolute: float, relative: float) -> None:
        self.absolute = absolute
        self.relative = relative

    def observe(self, capture: LayerCapture) -> Observation:
        """Reduce to top and median [b], and whether the sequence [b] (NaN if it holds NaN), a dimension
        [b, n] and a position [b, s] has one."""
        size_bsn = capture.output_bsn.float().abs()
        flat_bx = size_bsn.flatten(1)
        top_b, median_b = flat_bx.amax(dim=1), _median(flat_bx)
        massive_bsn = (size_bsn > self.absolute) & (size_bsn >= self.relative * median_b[:, None, None])
        return {
            "top": top_b,
            "median": median_b,
            "dimensions": massive_bsn.any(dim=1),
            "positions": massive_bsn.any(dim=2)[:, :POSITIONS_KEPT],
            "any": torch.where(top_b.isnan(), top_b, massive_bsn.flatten(1).any(dim=1).float()),
        }

    def result(self, layers: Sequence[Observation]) -> Result:
        """Means over sequences."""
        top_l = stacked(layers, "top").mean(dim=1)
        median_l = stacked(layers, "median").mean(dim=1)
        percent_l = 100 * stacked(layers, "any").mean(dim=1)
        highest = int(top_l.argmax())
        return {
            "massive_activations": percent_l.mean().item(),
            "massive_activation_top": top_l[highest].item(),
            "massive_activation_median": median_l[highest].item(),
            "massive_activations_layers": percent_l.tolist(),
            "massive_activation_top_layers": top_l.tolist(),
            "massive_activation_median_layers": median_l.tolist(),
            "massive_dimensions": [_where(layer["dimensions"]) for layer in layers],
            "massive_positions": [[p + 1 for p in _where(layer["positions"])] for layer in layers],
        }


def _median(flat_bx: Tensor) -> Tensor:
    """Of each row; the mean of the middle two for an even count. (torch.quantile limits its input.)"""
    ordered = flat_bx.sort(dim=1).values
    count = flat_bx.shape[1]
    return (ordered[:, (count - 1) // 2] + ordered[:, count // 2]) / 2


def _where(massive_bx: Tensor) -> list[int]:
    return massive_bx.any(dim=0).nonzero().flatten().tolist()


class Outliers:
    """How far the residual stream after a layer departs from a normal distribution (Bondarenko et al.
    2306.12929): kurtosis E[(x - mean)^4] / (std^4 + 1e-6) over all positions and dimensions of a
    sequence, and the maximum infinity norm.

    Floats:
        kurtosis: mean over layers and sequences (3 for a normal distribution).
        max_infinity_norm: max |x| of a sequence, mean over sequences, largest of any layer.

    Lists:
        kurtosis_layers, infinity_norm_layers: [layer], mean over sequences.
    """

    def observe(self, capture: LayerCapture) -> Observation:
        """Reduce to kurtosis and infinity norm [b]."""
        flat_bx = capture.output_bsn.float().flatten(1)
        centred = flat_bx - flat_bx.mean(dim=1, keepdim=True)
        std_b = centred.square().sum(dim=1).div(flat_bx.shape[1] - 1).sqrt()
        return {
            "kurtosis": centred.pow(4).mean(dim=1) / (std_b**4 + 1e-6),
            "infinity_norm": flat_bx.abs().amax(dim=1),
        }

    def result(self, layers: Sequence[Observation]) -> Result:
        """Means over sequences."""
        kurtosis_l = stacked(layers, "kurtosis").mean(dim=1)
        norm_l = stacked(layers, "infinity_norm").mean(dim=1)
        return {
            "kurtosis": kurtosis_l.mean().item(),
            "max_infinity_norm": norm_l.max().item(),
            "kurtosis_layers": kurtosis_l.tolist(),
            "infinity_norm_layers": norm_l.tolist(),
        }
