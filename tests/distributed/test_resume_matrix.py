"""Every layout goes on from the checkpoint of every other: tensor, pipeline, context and data parallelism of
1 and 2, with at most 4 processes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from sinkbench.testing import RunDistributed
from tests.distributed.runs import SWIGLU, Run, train
from tests.distributed.test_resume import STOPPED, assert_identical, stopped

RECIPE = (
    *SWIGLU,
    "train.steps=30",
    "checkpoint={every: 10, keep_last: 3}",
    "validation.every=0",
    "measure={every: 30, count: 4}",
)
DIMENSIONS = ("tensor", "pipeline", "context", "data")
LAYOUTS = {
    " ".join(f"{name[0]}{size}" for name, size in zip(DIMENSIONS, sizes, strict=True)): sizes
    for sizes in itertools.product((1, 2), repeat=4)
    if math.prod(sizes) <= 4
}
"""Name -> sizes of ``DIMENSIONS``."""

pytestmark = pytest.mark.full


def train_under(run_distributed: RunDistributed, folder: Path, layout: str) -> Run:
    *model_parallel, data = LAYOUTS[layout]
    overrides = [f"parallel.{name}={size}" for name, size in zip(DIMENSIONS, model_parallel, strict=False)]
    return train(run_distributed, folder, (*RECIPE, *overrides), processes=math.prod(model_parallel) * data)


@pytest.fixture(scope="module", params=LAYOUTS)
def before(request: pytest.FixtureRequest) -> str:
    layout: str = request.param
    return layout


@pytest.fixture(scope="module")
def whole(run_distributed: RunDistributed, tmp_path_factory: pytest.TempPathFactory, before: str) -> Run:
    """An uninterrupted run of 30 steps."""
    return train_under(run_distributed, tmp_path_factory.mktemp("whole"), before)


@pytest.mark.parametrize("after", LAYOUTS)
def test_goes_on(
    run_distributed: RunDistributed,
    whole: Run,
    tmp_path: Path,
    before: str,
    after: str,
    record_property: Callable[[str, object], None],
) -> None:
    """The differences are in the report of ``pytest --junit-xml``."""
    stopped(whole, tmp_path)
    resumed = train_under(run_distributed, tmp_path, after)
    if before == after:
        assert_identical(resumed, whole)
    losses, expected = resumed.series("train", "loss"), whole.series("train", "loss")
    first = STOPPED + 1
    differences = {step: abs(losses[step] / expected[step] - 1) for step in expected}
    record_property("first", differences[first])
    record_property("largest", max(differences.values()))
    assert losses[first] == pytest.approx(expected[first], rel=1e-6)
    assert len(losses) == 30
    assert losses == pytest.approx(expected, rel=1e-4)
