"""The model card of an export: which numbers of the run are the checkpoint's."""

from __future__ import annotations

import json
from pathlib import Path

from sinkbench.checkpoint import Checkpoint
from sinkbench.export.card import _measured


def test_what_is_not_finite_is_not_the_number_of_an_earlier_step(tmp_path: Path) -> None:
    lines = [
        {"step": 2, "event": "validation", "loss": 3.5},
        {"step": 3, "event": "skipped", "loss": None},
        {"step": 4, "event": "validation", "loss": None},
        {"step": 6, "event": "validation", "loss": 2.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    checkpoint = Checkpoint(folder=tmp_path / "checkpoints" / "step_4", step=4, layout={}, files={})
    assert _measured(checkpoint).splitlines()[2:] == ["| validation loss | nan |"]
