"""Checkpoints of a state of one small file."""

from __future__ import annotations

from sinkbench.checkpoint import RECIPE, CheckpointStore, write_info
from sinkbench.checksums import write_hashed

LAYOUT = {"tensor": 1, "pipeline": 1}


def save(store: CheckpointStore, step: int, content: str = "weights", recipe: str | None = None) -> None:
    """A checkpoint of a state of one file."""
    folder = store.begin(step)
    contents = {"shard": content.encode(), RECIPE: (recipe or f"seed: {step}\n").encode()}
    files = {name: write_hashed(folder / name, data) for name, data in contents.items()}
    write_info(folder, step=step, layout=LAYOUT, files=files)
    store.commit(folder, step)
