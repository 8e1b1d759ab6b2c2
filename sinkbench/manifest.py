"""What a run was made with."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sinkbench
from sinkbench import packages
from sinkbench.plugin_sources import sources
from sinkbench.redaction import redact

if TYPE_CHECKING:
    from sinkbench.api import Params
    from sinkbench.megatron.parallel import Layout
    from sinkbench.model import Declarations
    from sinkbench.plugins import Resolved

PACKAGES = ("torch", "megatron-core", "numpy", "pluggy", "triton")
OPTIONAL = ("transformer-engine", "flash-attn", "flash-attn-4", "flash-linear-attention", "liger-kernel")


def describe(resolved: Resolved, declared: Declarations, layout: Layout, data: str) -> dict[str, Any]:
    """The manifest of a run.

    Args:
        data: fingerprint of the data source.
    """
    from sinkbench.megatron import fusions, step_graph

    config = declared.context.config
    parallel = config.parallel
    return {
        "sinkbench": sinkbench.__version__,
        "git": git_commit(Path(sinkbench.__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": command_line(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "optional_packages": optional_packages(),
        "device": device_name(layout.device),
        "processes": layout.world_size,
        "parallel": {**parallel.model_dump(), "data": layout.data_size},
        **programs(declared),
        "fused": sorted(fusions.chosen(config, layout.device)),
        "cuda_graph": step_graph.wanted(config, layout),
        "plugins": {
            chosen.path: {
                "name": chosen.plugin.name,
                "package": chosen.package.distribution,
                "version": chosen.package.version,
                "module": chosen.package.module,
                "sources": sources(chosen),
                "defaults": defaults(chosen.params),
            }
            for chosen in resolved
        },
        "data": data,
        "vocab_size": declared.context.vocab_size,
        "padded_vocab_size": declared.padded_vocab_size,
    }


def defaults(params: Params) -> dict[str, Any]:
    """The parameters that a recipe leaves to the plugin."""
    values: dict[str, Any] = params.model_dump(mode="json", exclude=params.model_fields_set)
    return values


def programs(declared: Declarations) -> dict[str, str | None]:
    """Whose programs compute the parts of a step that a recipe may choose them for."""
    config = declared.context.config
    return {
        "attention_backend": declared.backend.name,
        "linears": config.model.linear_maps,
        "norms": declared.norms,
        "optimizer": config.optim.implementation,
        "fp8": config.train.fp8,
    }


def in_words(declared: Declarations) -> str:
    """The programs of a run that are not those of sinkbench, megatron-core and torch, and their versions."""
    chosen = programs(declared)
    backend = chosen["attention_backend"]
    parts = [f"attention by the {backend} backend"]
    for part in ("linears", "norms", "optimizer"):
        if chosen[part] not in ("local", "torch"):
            parts.append(f"{part} by {chosen[part]}")
    parts += [f"products in fp8 ({chosen['fp8']})"] if chosen["fp8"] else []
    versions = optional_packages()
    used = {packages.PACKAGES[name].distribution for name in chosen.values() if name in packages.PACKAGES}
    named = [f"{name} {versions[name]}" for name in sorted(used)]
    return ", ".join(parts) + (f"; {', '.join(named)}" if named else "")


def optional_packages() -> dict[str, str | None]:
    """Versions of those that are installed."""
    apex = packages.PACKAGES["apex"]
    version = _version(apex.distribution) if packages.is_installed(apex) else None
    return {name: _version(name) for name in OPTIONAL} | {apex.distribution: version}


def command_line() -> list[str]:
    """How this process was called, secrets aside."""
    return [redact(word) for word in sys.argv]


def git_commit(folder: Path) -> str | None:
    """The commit of the checkout sinkbench runs from, with -dirty for local changes; None for an
    installed package."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def device_name(device: Any) -> str:
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
