"""Optional packages: whether those that a recipe asks for are here, told without importing them, and modules
that are used where they can be."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from sinkbench.config import Config
from sinkbench.errors import HostError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """Attributes:
    distribution: what it is installed as.
    modules: that tell it from another project of its name.
    """

    name: str
    distribution: str
    modules: tuple[str, ...]


PACKAGES = {
    "te": Package("transformer_engine", "transformer-engine", ("transformer_engine",)),
    "apex": Package("NVIDIA Apex", "apex", ("apex", "amp_C")),
}
"""By what a recipe calls them."""
EXTENSIONS = {("model.norms", "apex"): "fused_layer_norm_cuda"}
"""What a key and value need of a package that can be built without."""


def is_installed(package: Package) -> bool:
    return all(find_spec(module) is not None for module in package.modules)


def module_if_usable(name: str) -> Any:
    """None if the package is not installed, or, with a line in the log, not with all that it needs."""
    try:
        return import_module(name)
    except (ImportError, OSError) as error:
        if not (getattr(error, "name", None) or "").startswith(name.partition(".")[0]):
            _log.warning("%s is installed, but cannot be used: %s", name, error)
        return None


def asked_for(config: Config) -> Iterator[tuple[str, str, str]]:
    """Key, value of each that a recipe names, and what to write instead."""
    model = config.model
    for key, value, instead in (
        ("model.backend", model.backend, "auto"),
        ("model.linears", model.linears, "local"),
        ("model.norms", model.norms, "local"),
        ("optim.implementation", config.optim.implementation, "torch"),
    ):
        if value in PACKAGES:
            assert value is not None
            yield key, value, instead


def check(config: Config, *, on_card: bool) -> None:
    """
    Args:
        on_card: the run is on a CUDA card.

    Raises:
        HostError: a package that the recipe names is not installed, or not as a whole, there is no card for
            it, or it does not compute in the recipe's precision.
    """
    if config.log.wandb is not None and find_spec("wandb") is None:
        problem = "the package wandb is not installed"
        raise HostError("log.wandb", problem, "pip install wandb, or remove log.wandb")
    for key, value, instead in asked_for(config):
        package = PACKAGES[value]
        if not is_installed(package):
            raise HostError(
                key, f"{value} is {package.name}, which is not installed", f"install it, or write {instead}"
            )
        extension = EXTENSIONS.get((key, value))
        if extension is not None and find_spec(extension) is None:
            problem = f"{value} is {package.name}, which was built without {extension}"
            raise HostError(key, problem, f"build it with its CUDA extensions, or write {instead}")
        if not on_card:
            raise HostError(key, f"{value} is {package.name}, which needs a CUDA card", f"write {instead}")
    if config.model.linear_maps == "te" and config.train.precision == "fp32":
        problem = "te computes products of float32 in TF32"
        raise HostError("model.linears", problem, "write local, or train.precision: bf16")
