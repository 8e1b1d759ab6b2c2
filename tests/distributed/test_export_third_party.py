"""Plugins of a package that sinkbench does not know: exported by their own source, or refused in one line."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from sinkbench.testing import RunDistributed
from tests.distributed.exports import LLAMA, SMALL, check_exports, probe_tokens, rank_writes

pytest.importorskip("transformers")

ATTENTION = '''
"""The squared positive part of the score against a threshold of each head, and an idle slot."""

from __future__ import annotations

import math

from sinkbench.api import AttentionSpec, ExtraSlot, ParameterSpec, Params, Plugin, Rows, hookimpl

from outside.rules import row_rule

LEAST = 1e-3


class ThresholdParams(Params):
    power: float = 2.0


def build(params, context):
    def rule(score_bhqk, allowed):
        return row_rule(score_bhqk, allowed, params.power, LEAST)

    return AttentionSpec(
        rule=Rows(function=rule),
        scale=1 / math.sqrt(context.head_size),
        score_bias="threshold",
        extra_slot=ExtraSlot(key="idle"),
        parameters={
            "threshold": ParameterSpec(shape=("heads",), mean=0.1),
            "idle": ParameterSpec(shape=("kv_heads", "head_size"), std=0.5),
        },
    )


@hookimpl
def sinkbench_attention():
    return [Plugin(name="threshold", summary="relu(s + t)^p", params=ThresholdParams, build=build)]
'''

RULES = """
def row_rule(score, allowed, power, least):
    value = score.relu().pow(power).masked_fill(~allowed, 0.0)
    return value / (value.sum(-1, keepdim=True) + least)


def not_needed():
    import numpy_of_tomorrow
"""

PLACES = '''
"""A norm by the largest number, a learned wave of positions, and a bias that decays with the distance."""

from typing import ClassVar

import torch
from pydantic import PositiveFloat
from torch import Tensor

from sinkbench.api import (
    BuildContext,
    NormalizationSpec,
    ParameterSpec,
    Params,
    Plugin,
    PositionalSpec,
    ScoreBias,
    hookimpl,
)


class PlaceParams(Params):
    shares: ClassVar[dict] = {}
    rate: PositiveFloat = 0.5


class NormParams(Params):
    location: str = "sandwich"


class LargestNorm(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size))
        self.register_buffer("least", torch.full((size,), 1e-3), persistent=False)

    def forward(self, x):
        return x / torch.maximum(x.abs().amax(-1, keepdim=True), self.least) * self.weight


class Wave(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.0, 1.0, size))

    def forward(self, position):
        return torch.sin(position[:, None] * self.weight)


def decay(distance: Tensor, heads: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    return -parameters["slope"][:, None, None].abs() * distance.abs().float()


def build_norm(params, context):
    return NormalizationSpec(norm=LargestNorm, location=params.location)


def build_place(params: PlaceParams, context: BuildContext) -> PositionalSpec:
    slope = ParameterSpec(shape=("heads",), mean=params.rate)
    return PositionalSpec(
        embedding=lambda: Wave(context.hidden_size),
        score_bias=ScoreBias(function=decay, parameters={"slope": slope}),
    )


@hookimpl
def sinkbench_normalization():
    return [Plugin(name="largest", summary="x / max |x|", params=NormParams, build=build_norm)]


@hookimpl
def sinkbench_positional():
    return [Plugin(name="wave", summary="a wave and a decay", params=PlaceParams, build=build_place)]
'''

UNABLE = '''
"""What can be trained here, and computed nowhere else; and what declares nothing."""

import rich
import torch

from sinkbench.api import AttentionSpec, Elementwise, Plugin, hookimpl


def similarity(score):
    rich.get_console()
    return score.sigmoid()


def build(params, context):
    return AttentionSpec(rule=Elementwise(function=similarity))


@hookimpl
def sinkbench_attention():
    return [
        Plugin(name="needs_rich", summary="its module imports a package", build=build),
        Plugin(name="bare", summary="a module alone", build=lambda params, context: torch.nn.Identity()),
    ]
'''
MODULES = {"__init__": "", "attention": ATTENTION, "rules": RULES, "places": PLACES, "unable": UNABLE}
POINTS = ("attention", "places", "unable")

MODELS: dict[str, tuple[str, ...]] = {
    "outside_attention": (LLAMA, "model.attention={name: threshold, power: 1.5}"),
    "outside_places": (LLAMA, "model={normalization: largest, positional: {name: wave, rate: 0.2}}"),
    "all_outside": (
        LLAMA,
        "model={attention: threshold, normalization: {name: largest, location: pre}, positional: wave}",
    ),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages that holds the plugins' package."""
    site = tmp_path_factory.mktemp("site")
    info = site / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    points = "\n".join(f"{module} = outside.{module}" for module in POINTS)
    (info / "entry_points.txt").write_text(f"[sinkbench]\n{points}\n")
    (site / "outside").mkdir()
    for module, text in MODULES.items():
        (site / "outside" / f"{module}.py").write_text(textwrap.dedent(text))
    return site


def rank_exports(
    rank: int, world_size: int, site: Path, models: Mapping[str, tuple[str, ...]], root: Path
) -> dict[str, bool]:
    """Exports each model, with what is expected of it, and whether it comes back to the same checkpoint."""
    sys.path.insert(0, str(site))
    from sinkbench.export import from_hf, to_hf
    from sinkbench.export.stored import StoredTensors

    bitwise = {}
    for name, overrides in models.items():
        logits = rank_writes(rank, world_size, [*SMALL, *overrides], root / name, None)
        checkpoint, export = root / name / "step_0", root / "exports" / name
        to_hf.convert(checkpoint, export)
        from_hf.convert(str(export), root / "back" / name)
        stored = [StoredTensors(folder) for folder in (checkpoint, root / "back" / name)]
        assert stored[0].tensors == stored[1].tensors
        bitwise[name] = all(
            torch.equal(*(one.read(tensor) for one in stored)) for tensor in stored[0].tensors
        )
        torch.save({"tokens": probe_tokens(), "logits": logits}, export / "expected.pt")
    return bitwise


def test_it_is_exported_with_its_source(run_distributed: RunDistributed, site: Path, tmp_path: Path) -> None:
    (bitwise,) = run_distributed(1, rank_exports, site, MODELS, tmp_path)
    assert bitwise == dict.fromkeys(MODELS, True)
    folders = [tmp_path / "exports" / name for name in MODELS]
    found = check_exports(folders, tmp_path / "cache")
    for folder in folders:
        checks = found[str(folder)]
        assert checks["class"] == "SinkbenchForCausalLM"
        assert checks["scale"] > 0.1
        for key in ("logits", "padding", "cache", "checkpointing"):
            assert checks[key] < 1e-4, f"{folder.name} {key}: {checks[key]}"
        assert checks["saved_again"] == 0
        assert checks["generate"]
        assert (checks["slot"] is not None) == ("attention" in folder.name or folder.name == "all_outside")
    source = (tmp_path / "exports" / "outside_attention" / "plugin_outside_rules.py").read_text()
    assert "row_rule" in source
    assert "not_needed" not in source


def rank_is_refused(rank: int, world_size: int, site: Path, root: Path) -> dict[str, Any]:
    """Exit code and standard error of exporting a model that cannot be, and the line for one that declares
    nothing, which cannot even be built."""
    import contextlib
    import io

    sys.path.insert(0, str(site))
    from sinkbench.errors import SinkbenchError
    from sinkbench.export import commands

    rank_writes(rank, world_size, [*SMALL, LLAMA, "model.attention=needs_rich"], root / "run", None)
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        code = commands.to_hf([str(root / "run" / "step_0"), str(root / "out")])
    try:
        rank_writes(rank, world_size, [*SMALL, LLAMA, "model.attention=bare"], root / "bare", None)
    except SinkbenchError as error:
        return {"code": code, "printed": printed.getvalue(), "bare": str(error)}
    raise AssertionError("a bare module was built")


def test_what_cannot_be_exported_is_one_line(
    run_distributed: RunDistributed, site: Path, tmp_path: Path
) -> None:
    (found,) = run_distributed(1, rank_is_refused, site, tmp_path)
    assert found["code"] == 2
    assert found["printed"] == (
        "export of plugin module outside.unable: line 4 imports rich, which an exported model cannot rely "
        "on; import it in the function that uses it\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert found["bare"] == (
        "model.attention: plugin bare of outside 1.0: build returned Identity; it must return AttentionSpec"
    )
