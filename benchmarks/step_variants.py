"""What a step is timed with: an attention, or a run of one of the paper's recipes."""

from __future__ import annotations

from collections.abc import Sequence

from sinkbench import recipe
from sinkbench.config import Config

PAPER: dict[str, tuple[str, ...]] = {
    "attention_operations/similarity": (),
    "attention_operations/off_by_one": (),
    "attention_biases/biases": (),
    "attention_operations/kernel": (),
    "model_architecture/position": (),
    "loss_function/prefix_lm": ("p5",),
    "loss_function/window": ("window=128", "window=1024"),
    "model_architecture/norm_location": (),
    "model_architecture/ffn": (),
    "model_architecture/heads": ("heads_4", "heads_8_summed"),
    "attention_biases/fixed_value": ("m5",),
    "attention_operations/softmax_scale": ("alpha=0.1",),
}
"""The paper's recipes for the 60M model whose runs compute something else than the default, and the runs: all
of them, or those named, where the others differ in a number alone. Models of one and two heads are left out:
their heads of 768 and 384 fit no fused kernel."""
_NO_DATA = "data={source: bigram_backcopy}"
_STEPS_ALONE = (_NO_DATA, "measure.every=0", "validation.every=0")


def default(model: str) -> Config:
    """The shipped recipe (60m or 1b) with its probes."""
    return recipe.to_config(recipe.load(f"default_{model}.yaml", [_NO_DATA]))


def load(model: str, overrides: Sequence[str]) -> Config:
    """The shipped recipe without data, probes and validation."""
    return recipe.to_config(recipe.load(f"default_{model}.yaml", [*_STEPS_ALONE, *overrides]))


def paper_variants() -> list[str]:
    """Names ``RECIPE/LABEL`` for ``load_variant``."""
    return [
        f"{name}/{label}"
        for name, labels in PAPER.items()
        for label in labels
        or (run.values["label"] for run in recipe.expand(recipe.load(f"paper/{name}.yaml")))
    ]


def load_variant(model: str, variant: str, overrides: Sequence[str]) -> Config:
    """
    Args:
        variant: a name of ``paper_variants``, which are all of the 60m model, or a value of model.attention.
    """
    name, _, label = variant.rpartition("/")
    if name not in PAPER:
        return load(model, [f"model.attention={variant}", *overrides])
    runs = recipe.expand(recipe.load(f"paper/{name}.yaml", [*_STEPS_ALONE, *overrides]))
    return recipe.to_config(next(run for run in runs if run.values["label"] == label))
