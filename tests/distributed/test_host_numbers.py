"""A pass of the model makes no tensor of numbers from the host: their copy holds up a card, and a CUDA graph
cannot have it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import step_subjects, step_variants
from benchmarks.step_subjects import TINY, Ours
from sinkbench.testing import RunDistributed

ROOT = Path(__file__).resolve().parents[2]
OURS = (str(ROOT / "sinkbench"), str(ROOT / "plugins"), str(ROOT / "examples"))
MAKES_ONE, READS_ONE = "aten::lift_fresh", "aten::_local_scalar_dense"


class FromTheHost(TorchDispatchMode):
    """Where code of ours makes tensors of numbers, or reads numbers of tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.name() in (MAKES_ONE, READS_ONE):
            frame: FrameType | None = sys._getframe(1)
            while frame is not None and f"{torch.__name__}/" in frame.f_code.co_filename:
                frame = frame.f_back
            if frame is not None and frame.f_code.co_filename.startswith(OURS):
                self.places.add(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        return function(*args, **kwargs or {})


def rank_passes(rank: int, world_size: int, variants: list[str]) -> dict[str, set[str]]:
    found = {}
    for variant in variants:
        overrides = ("train.device=cpu", "train={micro_batch_size: 2, global_batch_size: 2}", *TINY)
        config = step_variants.load_variant("60m", variant, overrides)
        layout = step_subjects.start(config)
        subject = Ours(config, layout)
        (tokens,) = step_subjects.random_tokens(config, 1, layout)
        subject.step([tokens])
        batch = subject.declared.loss.transform({"tokens": tokens})
        with FromTheHost() as watched:
            subject.engine._pass(batch, torch.zeros((), dtype=torch.int64), last=False)
        found[variant] = watched.places
        subject.close()
    return found


def test_no_variant_of_the_paper(run_distributed: RunDistributed) -> None:
    variants = ["softmax", *step_variants.paper_variants()]
    (found,) = run_distributed(1, rank_passes, variants, timeout=240)
    assert len(found) == len(variants) > 30
    assert {variant: places for variant, places in found.items() if places} == {}


def test_what_it_would_find(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "OURS", (str(ROOT / "tests"),))
    with FromTheHost() as watched:
        torch.zeros(2).new_tensor([1.0, 2.0])
        float(torch.ones(()))
    assert len(watched.places) == 2
