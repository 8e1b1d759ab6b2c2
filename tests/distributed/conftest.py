"""A short run on text and its export."""

from __future__ import annotations

from pathlib import Path

import pytest

from sinkbench.export import to_hf
from sinkbench.testing import RunDistributed
from tests.distributed.runs import Run
from tests.distributed.text_run import train_on_text


@pytest.fixture(scope="session")
def text_run(run_distributed: RunDistributed, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_on_text(run_distributed, tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def text_export(text_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "model"
    assert to_hf.convert(text_run.folder, out) == "SinkbenchForCausalLM"
    return out
