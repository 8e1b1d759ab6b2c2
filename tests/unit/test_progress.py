"""What a run shows and sends: TensorBoard, lines without a terminal, Weights & Biases without a key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sinkbench.config import Config
from sinkbench.progress import Bar, open_sinks


def config(**log: Any) -> Config:
    return Config.model_validate(
        {
            "name": "shown",
            "model": {
                "num_layers": 1,
                "hidden_size": 8,
                "num_attention_heads": 1,
                "ffn": "none",
                "seq_length": 8,
            },
            "data": {"source": "bigram_backcopy"},
            "optim": {"lr": 1e-3, "warmup_steps": 1},
            "train": {"steps": 20, "global_batch_size": 1},
            "measure": {"every": 0},
            "log": log,
        }
    )


TRAIN = {"loss": 2.5, "lr": 1e-3, "grad_norm": 0.5, "tokens": 80, "tokens_per_second": 1234.5, "mfu": 41.25}


def test_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar(config(), 0)
    bar.log(10, "train", TRAIN)
    bar.log(10, "probe", {"sink_1_raw": 18.0, "rows": [1.0]})
    bar.close()
    first, second = capsys.readouterr().err.splitlines()
    assert first == "shown 10/20 loss 2.5000  lr 1.00e-03  grad norm 0.50  1,234 tokens/s  MFU 41.2 %"
    assert second == "shown 10/20 probe: sink_1_raw 18"


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (sink,) = open_sinks(config(tensorboard=True, progress=False), tmp_path, 0)
    sink.log(10, "train", TRAIN)
    sink.log(20, "train", TRAIN | {"loss": 2.0, "mfu": None})
    sink.close()
    written = EventAccumulator(str(tmp_path / "tensorboard"))
    written.Reload()
    assert [(s.step, s.value) for s in written.Scalars("train/loss")] == [(10, 2.5), (20, 2.0)]
    assert [s.step for s in written.Scalars("train/mfu")] == [10]


def test_tensorboard_takes_back_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, loss in ((0, 2.5), (10, 2.0)):
        (sink,) = open_sinks(config(tensorboard=True, progress=False), tmp_path, start)
        for step in (10, 20):
            if step > start:
                sink.log(step, "train", TRAIN | {"loss": loss})
        sink.close()
    written = EventAccumulator(str(tmp_path / "tensorboard"))
    written.Reload()
    assert [(s.step, s.value) for s in written.Scalars("train/loss")] == [(10, 2.5), (20, 2.0)]


def test_nothing_is_opened_unasked(tmp_path: Path) -> None:
    assert open_sinks(config(progress=False), tmp_path, 0) == []
    assert not any(tmp_path.iterdir())


def test_wandb_is_offline_without_a_key_and_goes_on_under_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for start in (0, 10):
        (sink,) = open_sinks(config(wandb={}, progress=False), tmp_path, start)
        sink.log(start + 10, "train", TRAIN)
        sink.close()
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    run_id = (tmp_path / "wandb_run_id").read_text().strip()
    assert [file.name for file in files] == [f"run-{run_id}.wandb"] * 2
