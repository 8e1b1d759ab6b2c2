"""What metrics saw of each layer, batch after batch, and what they make of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sinkbench.api import LayerCapture, Metric, Observation
from sinkbench.errors import DataError, PluginError
from sinkbench.measure.results import OF_A_RUN

Values = dict[str, float | list[Any]]
"""Of a metric, or of all: floats and nested lists by key."""


def merged(found: Mapping[str, Values]) -> Values:
    """The results of all metrics.

    Args:
        found: metric -> its results.

    Raises:
        PluginError: two metrics have a result of the same key, or one has one of a run's own keys.
    """
    results: Values = {}
    owners: dict[str, str] = {}
    for name, own in found.items():
        for key in own:
            if key in OF_A_RUN or key.startswith("loss/"):
                problem = f"its result {key!r} has the name of one of the run's own numbers"
                raise PluginError(f"metric {name}", problem, "rename it, as by the metric's name before it")
            other = owners.setdefault(key, name)
            if other != name:
                problem = f"its result {key!r} would overwrite that of the metric {other}"
                raise PluginError(f"metric {name}", problem, f"rename it in one of the two, or drop {name}")
        results |= own
    return results


class Observations:
    """Collects the observations of every metric on the CPU, layer by layer.

    Args:
        metrics: by name.
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self.metrics = metrics
        self._seen: dict[int, list[dict[str, Observation]]] = {}

    def add(self, capture: LayerCapture) -> None:
        """Lets every metric see a layer."""
        seen = {
            name: {key: value.cpu() for key, value in metric.observe(capture).items()}
            for name, metric in self.metrics.items()
        }
        self._seen.setdefault(capture.layer, []).append(seen)

    def results(self) -> dict[str, Values]:
        """The results of each metric over all sequences and layers.

        Raises:
            DataError: the layers differ in their numbers of heads.
        """
        layers = [self._seen[number] for number in sorted(self._seen)]
        results: dict[str, Values] = {}
        for name, metric in self.metrics.items():
            joined = [_joined([seen[name] for seen in layer]) for layer in layers]
            _check_alike(name, joined)
            results[name] = metric.result(joined)
        return results


def _joined(observations: list[Observation]) -> Observation:
    return {key: torch.cat([o[key] for o in observations]) for key in observations[0]}


def _check_alike(name: str, layers: list[Observation]) -> None:
    for key in layers[0]:
        if len({layer[key].shape if key in layer else None for layer in layers}) > 1:
            raise DataError(
                f"metric {name}",
                "layers of this model differ in their heads or sizes",
                "measure a model whose layers are alike",
            )
