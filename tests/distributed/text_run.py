"""A short run on text, for the tests of exports."""

from __future__ import annotations

from pathlib import Path

from sinkbench.config import TokenizerConfig
from sinkbench.data.documents import find_inputs
from sinkbench.data.prepare import Request, prepare
from sinkbench.testing import RunDistributed
from tests.distributed.runs import SHORT, SWIGLU, Run, rank_trains

STEPS = 3


def train_on_text(run_distributed: RunDistributed, root: Path) -> Run:
    """Sigmoid attention after three steps on some source code, prepared in ROOT/data."""
    corpus, data = root / "corpus", root / "data"
    corpus.mkdir()
    code = Path(__file__).with_name("runs.py").read_text(encoding="utf-8")
    for number in range(12):
        (corpus / f"{number}.txt").write_text(f"{number}\n{code[number * 300 :]}", encoding="utf-8")
    prepare(
        Request(tuple(find_inputs([str(corpus)])), TokenizerConfig(train_vocab_size=400), holdout=0.3), data
    )
    overrides = [
        *SWIGLU,
        *SHORT,
        f"data={{source: indexed, train: {data}}}",
        "model.attention={name: sigmoid, normalize: false}",
        f"train={{steps: {STEPS}, global_batch_size: 4}}",
        f"measure={{every: {STEPS}, count: 4, length: 16, metrics: [sink, norms]}}",
        f"validation={{every: {STEPS}, sequences: 4}}",
        "optim.warmup_steps=1",
        f"output_dir={root / 'runs'}",
    ]
    run_distributed(1, rank_trains, overrides)
    return Run(root / "runs" / "short")
