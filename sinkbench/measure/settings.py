"""How to measure: one set of settings for every target of a call."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from sinkbench.errors import DataError, HostError, PluginError
from sinkbench.measure.inputs import Inputs
from sinkbench.plugins import refuse_repeated

if TYPE_CHECKING:
    import torch

STREAMING_LENGTH = 512
"""Sequences longer than this are measured without ever holding a layer's whole attention weights."""

BATCH_TOKENS = 4096
"""Tokens of one forward pass, unless a batch size is given."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What ``sinkbench measure`` was asked for.

    Attributes:
        inputs: kinds of token sequences; each gives a result.
        prompts: file of the natural text, one prompt a line; default: the running Python's documentation, for
            a run held-out sequences of its data.
        length: tokens of a sequence, a beginning-of-sequence token among them; default: 64, for a run
            the recipe's.
        count: sequences; default: 100 or as many as the prompts are, for a run the recipe's.
        seed: of random and repeated tokens, and of the order of the documentation's paragraphs.
        bos: put the beginning-of-sequence token in front; the paper does not.
        metrics: names of metric plugins or YAML mappings with parameters; default: sink and norms, for a
            run the recipe's.
        step: of a run's checkpoint; default: the last.
        device: "auto", "cpu" or "cuda".
        dtype: of the weights of an open model: float32, bfloat16 or float16.
        batch_size: sequences per forward pass of an open model; default: 4096 tokens.
        attention: "whole" holds a layer's attention weights; "streaming" never does; "auto" takes the
            second for sequences longer than 512.
        allow_pickle, allow_code: whether weights may be unpickled, and code beside them run.

    Raises:
        PluginError: one of the metrics is neither a name nor a mapping.
        RecipeError: a metric is given twice.
        DataError: there are prompts, and no natural text is asked for.
    """

    inputs: tuple[Inputs, ...] = ("natural",)
    prompts: Path | None = None
    length: int | None = None
    count: int | None = None
    seed: int = 0
    bos: bool = False
    metrics: tuple[str, ...] = ()
    step: int | None = None
    device: str = "auto"
    dtype: str = "float32"
    batch_size: int | None = None
    attention: Literal["auto", "whole", "streaming"] = "auto"
    allow_pickle: bool = False
    allow_code: bool = False

    def __post_init__(self) -> None:
        if self.prompts is not None and "natural" not in self.inputs:
            raise DataError("--prompts", "is natural text", "add natural to --inputs")
        refuse_repeated((f"--metrics {text}", _metric_name(text)) for text in self.metrics)

    @property
    def open_length(self) -> int:
        """Tokens of a sequence for a model that has no recipe."""
        return self.length or 64

    @property
    def streaming(self) -> bool:
        if self.attention == "auto":
            return self.open_length > STREAMING_LENGTH
        return self.attention == "streaming"

    @property
    def open_batch_size(self) -> int:
        return self.batch_size or max(1, BATCH_TOKENS // self.open_length)

    def torch_device(self) -> torch.device:
        """
        Raises:
            HostError: there is no such device.
        """
        import torch

        if self.device == "cuda" and not torch.cuda.is_available():
            raise HostError("--device", "there is no CUDA device", "give --device cpu")
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)


def metric_reference(text: str) -> Any:
    """A metric as written on the command line: a name, or a YAML mapping with parameters.

    Raises:
        PluginError: it is neither.
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("name"), str)):
        return value
    raise PluginError(f"--metrics {text}", "is no metric", "write a name, or '{name: sink, k: [1, 2]}'")


def _metric_name(text: str) -> str:
    reference = metric_reference(text)
    name: str = reference if isinstance(reference, str) else reference["name"]
    return name
