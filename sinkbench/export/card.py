"""The model card of an exported model: what it is, how it was trained, what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from sinkbench.checkpoint import Checkpoint
from sinkbench.config import BigramBackcopyConfig, Config
from sinkbench.export import template

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [sinkbench, attention-sink]
---

# {name}

A causal language model trained with sinkbench, exported at step {step} as `{class_name}`.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH OR NAME"{trust})
```
{code}
| | |
|---|---|
{rows}

## Measured

{measured}

The whole recipe is in `recipe.yaml`.
"""

_CODE = """
It needs `trust_remote_code=True`: the Python files beside this card are the model and the plain-torch source
of its plugins, and need nothing but torch and transformers.
"""


def write_card(folder: Path, config: Config, checkpoint: Checkpoint, class_name: str) -> None:
    """Writes README.md from the recipe and from what the run logged up to the checkpoint's step."""
    ours = class_name == template.CLASS_NAME
    rows = "\n".join(f"| {name} | {value} |" for name, value in _facts(config).items())
    text = _CARD.format(
        name=f"{config.name}/{config.label}" if config.label else config.name,
        step=checkpoint.step,
        class_name=class_name,
        trust=", trust_remote_code=True" if ours else "",
        code=_CODE if ours else "",
        rows=rows,
        measured=_measured(checkpoint),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _facts(config: Config) -> dict[str, object]:
    model, train = config.model, config.train
    return {
        "layers, hidden size, heads, kv heads": (
            f"{model.num_layers}, {model.hidden_size}, {model.num_attention_heads}, {model.kv_heads}"
        ),
        "feed-forward": f"{model.ffn} {model.ffn_hidden_size or ''}",
        "sequence length": model.seq_length,
        "attention": _plugin(model.attention.model_dump()),
        "normalization": _plugin(model.normalization.model_dump()),
        "positional": _plugin(model.positional.model_dump()),
        "loss": _plugin(config.loss.model_dump()),
        "data": _data(config),
        "training": (
            f"{train.steps} steps of {train.global_batch_size} sequences, learning rate {config.optim.lr} "
            f"({config.optim.schedule}), weight decay {config.optim.weight_decay}, {train.precision}"
        ),
    }


def _plugin(block: dict[str, Any]) -> str:
    rest = ", ".join(f"{key}: {value}" for key, value in block.items() if key != "name")
    return f"{block['name']} ({rest})" if rest else str(block["name"])


def _data(config: Config) -> str:
    data = config.data
    if isinstance(data, BigramBackcopyConfig):
        return f"Bigram-Backcopy, {data.vocab_size} tokens, {data.num_triggers} triggers"
    if data.prepare is not None:
        return ", ".join(data.prepare.inputs)
    return ", ".join(Path(entry.path).name for entry in data.train)


def _measured(checkpoint: Checkpoint) -> str:
    """The last numbers of the run's metrics.jsonl that belong to the checkpoint, as a table."""
    path = checkpoint.folder.parent.parent / "metrics.jsonl"
    if not path.is_file():
        return "No metrics lie beside the checkpoint."
    found: dict[str, float] = {}
    for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not text.endswith("\n"):
            break  # by a run that was killed
        line = json.loads(text)
        if line["step"] > checkpoint.step:
            continue
        line = {key: math.nan if value is None else value for key, value in line.items()}
        numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
        if line["event"] == "probe":
            found |= {key: numbers[key] for key in numbers if key not in ("step", "time")}
        elif "loss" in numbers and line["event"] != "skipped":
            found[f"{line['event']} loss"] = numbers["loss"]
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in found.items())
    return f"| metric | value |\n|---|---|\n{rows}"
